"""Five HTTP destinations in one process: healthy, slow, failing, limited, down.

All listen on loopback, on ports of the kernel's choice. The first line on standard output is a JSON object with
the URL of each and of a control server: `GET /counts`, `GET /history/NAME`.

A receiver shows what one has to do to be safe from a sender that lost its lease without knowing: it remembers the
highest fencing token per queue, and drops what comes with a lower one.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import sys
import time
import zlib
from collections.abc import Sequence
from urllib.parse import unquote

from aiohttp import web

from demo.history import ACCEPTED, REFUSED, STALE, History

NAMES = ("healthy", "slow", "failing", "limited", "down")
UP = NAMES[:-1]
EVENT_HEADER = "X-Demo-Event"  # the event's number, put in by the producer


class Receiver:
    """One destination. `answer` is what makes the kinds differ."""

    def __init__(self) -> None:
        self.history = History()
        self._tokens: dict[tuple[str, str], int] = {}

    async def answer(self) -> web.Response | None:
        """An error to answer with, or None for success."""
        return None

    async def handle(self, request: web.Request) -> web.Response:
        """Takes one event."""
        payload = await request.read()
        error = await self.answer()
        headers = request.headers
        queue = unquote(headers["Spillway-Tenant"]), unquote(headers["Spillway-Key"])
        number, token = int(headers[EVENT_HEADER]), int(headers["Spillway-Fencing-Token"])
        checksum = zlib.crc32(payload)
        if token < self._tokens.get(queue, 0):
            self.history.add(*queue, number, checksum, STALE)
            return web.Response(status=409)  # the sender's settlement will be refused: its lease is gone
        self._tokens[queue] = token
        self.history.add(*queue, number, checksum, ACCEPTED if error is None else REFUSED)
        return error or web.Response(status=204)


class Slow(Receiver):
    """Takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    async def answer(self) -> web.Response | None:
        """Success, later."""
        await asyncio.sleep(self._seconds)
        return None


class Failing(Receiver):
    """Answers 500 until some seconds after the first request."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._until: float | None = None

    async def answer(self) -> web.Response | None:
        """An error at first, success later."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._seconds
        return web.Response(status=500) if now < self._until else None


class Limited(Receiver):
    """Takes a number of events per second and answers 429 beyond."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self._tokens_left = self._burst = max(1.0, rate / 2)
        self._at = time.monotonic()

    async def answer(self) -> web.Response | None:
        """Success within the rate."""
        now = time.monotonic()
        self._tokens_left = min(self._burst, self._tokens_left + (now - self._at) * self._rate)
        self._at = now
        if self._tokens_left < 1:
            return web.Response(status=429, headers={"Retry-After": "1"})
        self._tokens_left -= 1
        return None


class Control:
    """What the demo asks the receivers."""

    def __init__(self, receivers: dict[str, Receiver]) -> None:
        self._receivers = receivers

    async def counts(self, request: web.Request) -> web.Response:
        """Arrivals per destination, by verdict."""
        return web.json_response({name: receiver.history.counts for name, receiver in self._receivers.items()})

    async def history(self, request: web.Request) -> web.Response:
        """All arrivals of one destination."""
        return web.Response(body=self._receivers[request.match_info["name"]].history.dump())


async def serve(slow_seconds: float, failing_seconds: float, rate: float) -> None:
    """Serves until a signal."""
    receivers: dict[str, Receiver] = {
        "healthy": Receiver(), "slow": Slow(slow_seconds), "failing": Failing(failing_seconds), "limited": Limited(rate)}
    urls: dict[str, str] = {}
    runners = []

    async def listen(name: str, routes: list[web.RouteDef]) -> None:
        application = web.Application()
        application.add_routes(routes)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        urls[name] = f"http://127.0.0.1:{runner.addresses[0][1]}"

    control = Control(receivers)
    for name, receiver in receivers.items():
        await listen(name, [web.post("/events", receiver.handle)])
    await listen("control", [web.get("/counts", control.counts), web.get("/history/{name}", control.history)])
    with socket.socket() as nobody:  # holds a port on which nobody listens: connections are refused
        nobody.bind(("127.0.0.1", 0))
        urls["down"] = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        sys.stdout.write(json.dumps({n: u if n == "control" else u + "/events" for n, u in urls.items()}) + "\n")
        sys.stdout.flush()
        await stop.wait()
    for runner in runners:
        await runner.cleanup()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the receivers."""
    parser = argparse.ArgumentParser(prog="python -m demo.receivers", description="Five HTTP destinations on loopback.")
    parser.add_argument("--slow-seconds", type=float, default=0.02, help="how long 'slow' takes (default: %(default)s)")
    parser.add_argument("--failing-seconds", type=float, default=10.0,
                        help="how long 'failing' answers 500, from its first request (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=600.0,
                        help="events per second that 'limited' takes (default: %(default)s)")
    options = parser.parse_args(argv)
    asyncio.run(serve(options.slow_seconds, options.failing_seconds, options.rate))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
