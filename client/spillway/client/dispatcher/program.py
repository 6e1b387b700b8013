"""`spillway dispatch`: the dispatcher as a program."""
from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from spillway.client.connecting import Connection, add_arguments, connect, from_arguments
from spillway.client.contexts import ContextError
from spillway.client.dispatcher.broker import ClientBroker
from spillway.client.dispatcher.dispatcher import GRACE_SECONDS, Dispatcher
from spillway.client.dispatcher.status import HOST, status_server
from spillway.client.errors import SpillwayError

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
    out.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info",
                     help="(default: %(default)s)")
    return out


async def dispatch(connection: Connection, patterns: Sequence[str], name: str, grace_seconds: float,
                   status_port: int | None = None) -> None:
    """Dispatches until SIGTERM or SIGINT. Raises SpillwayError if the connection is of no use, OSError if the port for
    the status is."""
    async with connect(connection) as client, AsyncExitStack() as stack:
        dispatcher = Dispatcher(ClientBroker(client, name), patterns, grace_seconds)
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
    logging.basicConfig(level=options.log_level.upper(), stream=sys.stderr,
                        format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        connection = from_arguments(options)
    except ContextError as error:
        log.error("%s", error)
        return EXIT_USAGE
    try:
        with asyncio.Runner(loop_factory=_event_loop) as runner:
            runner.run(dispatch(connection, options.destination, options.name, options.grace_seconds, options.status_port))
    except SpillwayError as e:
        log.error("cannot dispatch from %s: %s", ", ".join(connection.address), e)
        return EXIT_USAGE
    except (OSError, OverflowError) as e:
        log.error("cannot serve the status on port %s: %s", options.status_port, e)
        return EXIT_USAGE
    return 0
