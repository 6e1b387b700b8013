"""`spillway dispatch`: the dispatcher as a program."""
from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from spillway.client.connecting import Connection, add_arguments, connect, from_arguments
from spillway.client.contexts import ContextError
from spillway.client.dispatcher.broker import ClientBroker
from spillway.client.dispatcher.dispatcher import GRACE_SECONDS, Dispatcher
from spillway.client.dispatcher.metrics import collect
from spillway.client.dispatcher.status import HOST, status_server
from spillway.client.errors import InvalidArgument, SpillwayError
from spillway.client.tracing import tracing
from spillway.contract.telemetry import logs
from spillway.contract.telemetry.endpoint import is_http
from spillway.contract.telemetry.metrics import Family
from spillway.contract.telemetry.scrape import PATH, ScrapeServer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from spillway.contract.telemetry.otlp import MetricsPush

log = logging.getLogger("spillway.dispatcher")

EXIT_USAGE = 2  # as for all commands of `spillway`


def parser() -> argparse.ArgumentParser:
    """The flags of `spillway dispatch`."""
    out = argparse.ArgumentParser(
        prog="spillway dispatch",
        description="Deliver messages over HTTP: to all destinations that have a URL, or to those named. Any number of"
                    " dispatchers may run; none gets what another has leased.")
    add_arguments(out)
    out.add_argument("--destination", metavar="NAME", action="append", default=[],
                     help="only this destination; '*' stands for anything; may be repeated (default: all)")
    out.add_argument("--name", default="", help="of this dispatcher, for people")
    out.add_argument("--grace-seconds", type=float, default=GRACE_SECONDS,
                     help="on SIGTERM, how long to wait for requests under way (default: %(default)s)")
    out.add_argument("--status-port", type=int, metavar="PORT",
                     help="serve GET /status as JSON on this port of 127.0.0.1; 0: a free one, see the log (default: do not)")
    out.add_argument("--metrics-listen", metavar="HOST:PORT", default=os.environ.get("SPILLWAY_METRICS_LISTEN", ""),
                     help="serve GET /metrics for Prometheus there (default: do not; variable SPILLWAY_METRICS_LISTEN)")
    out.add_argument("--otlp-endpoint", metavar="URL", default=os.environ.get("SPILLWAY_OTLP_ENDPOINT", ""),
                     help="http://host:4318 of a collector that takes OTLP over HTTP, for metrics and traces (default: none; variable"
                          " SPILLWAY_OTLP_ENDPOINT)")
    out.add_argument("--log-format", choices=logs.FORMATS, default=os.environ.get("SPILLWAY_LOG_FORMAT", "text"),
                     help="json: one object a line, with the ids of traces (default: %(default)s; variable SPILLWAY_LOG_FORMAT)")
    out.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info",
                     help="(default: %(default)s)")
    return out


async def dispatch(connection: Connection, patterns: Sequence[str], name: str, grace_seconds: float,
                   status_port: int | None = None, metrics_listen: str = "", otlp_endpoint: str = "") -> None:
    """Dispatches until SIGTERM or SIGINT. Raises SpillwayError if the connection is of no use, OSError if the port for
    the status or the metrics is."""
    provider: TracerProvider | None = None
    if otlp_endpoint:
        if not is_http(otlp_endpoint):
            raise InvalidArgument("otlp_endpoint", f"{otlp_endpoint!r} is not http://host:port or https://host:port")
        from spillway.contract.telemetry import otlp

        who = otlp.resource("spillway-dispatcher", name or f"{socket.gethostname()}-{os.getpid()}")
        provider = otlp.tracer_provider(otlp_endpoint, who)
    async with AsyncExitStack() as stack, connect(connection, tracer_provider=provider) as client:
        dispatcher = Dispatcher(ClientBroker(client, name), patterns, grace_seconds,
                                tracing=None if provider is None else tracing(provider))

        async def told() -> list[Family]:
            return await collect(dispatcher)

        if provider is not None:
            push = otlp.MetricsPush(otlp_endpoint, who, told)
            pushing = asyncio.create_task(push.run())
            stack.push_async_callback(_leave, provider, push, pushing)
        if metrics_listen:
            server = ScrapeServer(told)
            host, port = _address(metrics_listen)
            port = await server.start(host, port)
            stack.push_async_callback(server.stop)
            log.info("metrics on http://%s:%d%s", f"[{host}]" if ":" in host else host, port, PATH)
        if status_port is not None:
            port = await stack.enter_async_context(status_server(dispatcher.status, status_port))
            log.info("status on http://%s:%d/status", HOST, port)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, dispatcher.stop)
        try:
            await dispatcher.run()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


async def _leave(provider: TracerProvider, push: MetricsPush, pushing: asyncio.Task[None]) -> None:
    """Sends what is left, for a short while at most."""
    from spillway.contract.telemetry import otlp

    pushing.cancel()
    await asyncio.gather(push.stop(), otlp.within(otlp.SHUTDOWN_SECONDS, provider.shutdown))


def _address(text: str) -> tuple[str, int]:
    """Host and port. Raises OSError for what is none."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise OSError(f"{text!r} is not host:port")
    return host.strip("[]"), int(port)


def _event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where there is one: it halves the cost of what comes over gRPC, and does not harm HTTP."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the dispatcher; returns the exit code: 0 after a signal, 2 if the addresses are none or the status's port is
    taken. A cluster that cannot
    be reached is waited for."""
    options = parser().parse_args(argv)
    logs.configure(options.log_level, options.log_format, text="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        connection = from_arguments(options)
    except ContextError as error:
        log.error("%s", error)
        return EXIT_USAGE
    try:
        with asyncio.Runner(loop_factory=_event_loop) as runner:
            runner.run(dispatch(connection, options.destination, options.name, options.grace_seconds, options.status_port,
                                options.metrics_listen, options.otlp_endpoint))
    except SpillwayError as e:
        log.error("cannot dispatch from %s: %s", ", ".join(connection.address), e)
        return EXIT_USAGE
    except (OSError, OverflowError) as e:
        log.error("cannot serve the status on port %s, or metrics on %s: %s", options.status_port, options.metrics_listen or "-", e)
        return EXIT_USAGE
    return 0
