"""Endpoints of ten destinations in one process, and who sends them events."""
from __future__ import annotations

import asyncio
import struct
import time
from typing import Any

from aiohttp import web
from spillway.client import Client, Destination, HttpTarget, Record

from bench.counters import FINISH, GO, READY_CONSUMER, READY_PRODUCER, SENT, STOP, Counters

PAYLOAD_BYTES = 1024
TICK_SECONDS = 0.02
_STAMP = struct.Struct("=dI")


async def endpoint(counters: Counters, port: int) -> dict[str, Any]:
    """Answers every POST at once with 200. Returns (time, seconds since it was sent, destination's number) of each."""
    arrived: list[tuple[float, float, int]] = []

    async def handle(request: web.Request) -> web.Response:
        start, number = _STAMP.unpack_from(await request.read())
        now = time.monotonic()
        arrived.append((now, now - start, number))
        return web.Response()

    app = web.Application()
    app.router.add_post("/{name}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    counters[READY_CONSUMER] = 1
    while not counters[FINISH]:
        await asyncio.sleep(0.05)
    await runner.cleanup()
    return {"arrived": arrived}


async def events(counters: Counters, addresses: list[str], destinations: int, per_second: float, tenants: int, keys: int,
                 port: int, closed: int) -> dict[str, Any]:
    """Sends `per_second` messages to each destination until `STOP`. As many destinations as `GO` says are given an address at
    which nobody listens."""
    def target(number: int, dead: bool) -> Destination:
        url = f"http://127.0.0.1:{closed if dead else port}/{number}"
        return Destination(f"d{number}", http=HttpTarget(url, allow_private_addresses=True))

    padding = bytes(PAYLOAD_BYTES - _STAMP.size)
    pending: set[asyncio.Task[Any]] = set()
    late_max = 0.0
    dead = 0
    async with Client(addresses) as client, client.producer() as producer:
        await client.wait_ready(30)
        for number in range(destinations):
            await client.admin.update_destination(target(number, False), create=True)
        counters[READY_PRODUCER] = 1
        sent, due = 0, time.monotonic()
        while not counters[STOP]:
            now = time.monotonic()
            late_max = max(late_max, now - due - TICK_SECONDS)
            records = []
            while due <= now:
                number = sent % destinations
                records.append(Record(f"d{number}", _STAMP.pack(due, number) + padding, f"t{sent % tenants}", f"k{sent % keys}"))
                sent += 1
                due += 1 / (per_second * destinations)
            if records:
                task = asyncio.ensure_future(producer.send_many(records, timeout=60))
                pending.add(task)
                task.add_done_callback(pending.discard)
            while dead < counters[GO]:
                await client.admin.update_destination(target(dead, True))
                dead += 1
            counters[SENT] = sent
            await asyncio.sleep(TICK_SECONDS)
        await asyncio.gather(*pending)
    return {"sent": sent, "late_max": late_max}
