"""Quiet tenants, a tenant that dumps, and a consumer with a limited capacity."""
from __future__ import annotations

import asyncio
import struct
import time
from typing import Any

from spillway.client import Client, LeasedRun, Record

from bench.counters import (
    DELIVERED,
    DUMPED,
    FINISH,
    GO,
    PRODUCED,
    READY_BURST,
    READY_CONSUMER,
    READY_PRODUCER,
    SENT,
    SETTLED,
    STOP,
    Counters,
)

DESTINATION = "d0"
QUIET, BURST = "quiet", "burst"
QUIET_KEYS = 10  # per tenant
BATCH = 512
_STAMP = struct.Struct("=d")


async def quiet(counters: Counters, addresses: list[str], tenants: int, per_second: float,
                payload_bytes: int) -> dict[str, Any]:
    """Sends `per_second` messages for each tenant, spread evenly over time, until `STOP`. A payload begins with the time
    at which it was handed in. Returns (time, seconds until it was stored) of each."""
    padding = bytes(payload_bytes - _STAMP.size)
    stored: list[tuple[float, float]] = []
    pending: set[asyncio.Task[None]] = set()
    late_max = 0.0

    async def send(number: int) -> None:
        start = time.monotonic()
        await producer.send(DESTINATION, _STAMP.pack(start) + padding, tenant=f"{QUIET}-{number % tenants}",
                            key=f"k{number // tenants % QUIET_KEYS}", timeout=60)
        stored.append((start, time.monotonic() - start))
        counters[PRODUCED] = len(stored)

    async with Client(addresses) as client, client.producer() as producer:
        await client.wait_ready(30)
        counters[READY_PRODUCER] = 1
        interval = 1 / (tenants * per_second)
        number, due = 0, time.monotonic()
        while not counters[STOP]:
            while due <= time.monotonic():
                late_max = max(late_max, time.monotonic() - due)
                task = asyncio.ensure_future(send(number))
                pending.add(task)
                task.add_done_callback(pending.discard)
                number += 1
                due += interval
            counters[SENT] = number
            await asyncio.sleep(max(due - time.monotonic(), 0))
        await asyncio.gather(*pending)
    return {"sent": number, "stored": stored, "late_max": late_max}


async def burst(counters: Counters, addresses: list[str], messages: int, keys: int, payload_bytes: int) -> dict[str, Any]:
    """Waits for `GO`, then sends everything at once. Returns when it began and when all was stored."""
    body = bytes(payload_bytes)
    records = [Record(DESTINATION, body, BURST, f"k{i % keys}") for i in range(messages)]
    async with Client(addresses) as client, client.producer() as producer:
        await client.wait_ready(30)
        counters[READY_BURST] = 1
        while not counters[GO]:
            await asyncio.sleep(0.001)
        start = time.monotonic()
        await asyncio.gather(*(producer.send_many(records[i:i + BATCH], timeout=120) for i in range(0, messages, BATCH)))
        end = time.monotonic()
        counters[DUMPED] = 1
    return {"start": start, "end": end}


async def handle(counters: Counters, addresses: list[str], handlers: int, handler_seconds: float) -> dict[str, Any]:
    """Handles so many messages at a time, each for so long, until `FINISH`; holds no message that it does not handle.
    Returns (time handed in, seconds until its handler began) of the quiet tenants' messages."""
    begun: list[tuple[float, float]] = []
    delivered = settled = others = 0

    async def work() -> None:
        nonlocal delivered, settled, others
        while True:
            run: LeasedRun | None = await consumer.next_run()
            assert run is not None
            now = time.monotonic()
            delivered += 1
            counters[DELIVERED] = delivered
            if run.tenant == BURST:
                others += 1
            else:
                start, = _STAMP.unpack_from(run.payloads[0])
                begun.append((start, now - start))
            await asyncio.sleep(handler_seconds)
            await run.ack()
            settled += 1
            counters[SETTLED] = settled

    async with Client(addresses) as client, client.consumer(
            DESTINATION, credit_messages=handlers, run_messages_max=1) as consumer:
        await client.wait_ready(30)
        tasks = [asyncio.ensure_future(work()) for _ in range(handlers)]
        counters[READY_CONSUMER] = 1
        while not counters[FINISH]:
            await asyncio.sleep(0.02)
            for task in tasks:
                if task.done():
                    task.result()
        return {"begun": begun, "burst_handled": others}
