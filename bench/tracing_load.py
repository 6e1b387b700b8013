"""A producer whose messages carry trace context, at full speed while it is told to, and a collector that takes what comes."""
from __future__ import annotations

import asyncio
import os
import random
from collections import deque
from typing import Any

from aiohttp import web
from spillway.client import Client, Record

from bench.counters import FINISH, GO, PRODUCED, READY_CONSUMER, READY_PRODUCER, SENT, SETTLED, STOP, Counters
from bench.load import BATCH, BATCHES_MAX, TICK_SECONDS
from bench.queues import names


async def traced(counters: Counters, addresses: list[str], queues: int, payload_bytes: int, outstanding: int, sampled_every: int,
                 headers: bool) -> dict[str, Any]:
    """Sends while `GO` is set, until `STOP`. Each message has a `traceparent` if `headers`; of so many, one is sampled (0: none)."""
    body = os.urandom(payload_bytes)
    cycle = names(queues)
    pending: deque[asyncio.Task[None]] = deque()
    sent = produced = 0
    chance = random.Random(1)

    async def batch(records: list[Record]) -> None:
        nonlocal produced
        await producer.send_many(records, timeout=60)
        produced += len(records)
        counters[PRODUCED] = produced

    async with Client(addresses) as client, client.producer() as producer:
        await client.wait_ready(60)
        counters[READY_PRODUCER] = 1
        while not counters[STOP]:
            if not counters[GO] or sent - counters[SETTLED] > outstanding:
                await asyncio.sleep(TICK_SECONDS)
                continue
            records = []
            for _ in range(BATCH):
                destination, tenant, key = cycle[sent % queues]
                sent += 1
                context = None
                if headers:
                    flag = "01" if sampled_every and not sent % sampled_every else "00"
                    context = {"traceparent": f"00-{chance.getrandbits(128) | 1:032x}-00f067aa0ba902b7-{flag}"}
                records.append(Record(destination, body, tenant, key, context))
            pending.append(asyncio.ensure_future(batch(records)))
            counters[SENT] = sent
            if len(pending) >= BATCHES_MAX:
                await pending.popleft()
        await asyncio.gather(*pending)
    return {"sent": sent, "produced": produced}


async def collector(counters: Counters, port: int) -> dict[str, Any]:
    """Takes OTLP over HTTP until `FINISH`, and looks into nothing."""
    requests = size = 0

    async def take(request: web.Request) -> web.Response:
        nonlocal requests, size
        requests += 1
        size += len(await request.read())
        return web.Response(content_type="application/x-protobuf")

    application = web.Application(client_max_size=64 << 20)
    application.router.add_post("/v1/{signal}", take)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    counters[READY_CONSUMER] = 1
    while not counters[FINISH]:
        await asyncio.sleep(0.02)
    await runner.cleanup()
    return {"requests": requests, "bytes": size}
