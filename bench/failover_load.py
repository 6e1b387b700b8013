"""A steady load whose every message leaves a trace."""
from __future__ import annotations

import asyncio
import struct
import time
from typing import Any

from spillway.client import Client, SpillwayError

from bench.counters import (
    DELIVERED,
    FINISH,
    PRODUCED,
    READY_CONSUMER,
    READY_PRODUCER,
    SENT,
    STOP,
    Counters,
)

DESTINATION, TENANT = "d0", "t0"
TURN_SECONDS = 0.005
_NUMBER = struct.Struct("=Q")


async def paced(counters: Counters, addresses: list[str], queues: int, per_second: float,
                payload_bytes: int) -> dict[str, Any]:
    """Sends messages 0, 1, 2, ... at that rate until `STOP`, number n to queue n mod `queues`. Returns when each was
    handed in and when it was stored (None: it failed), in order."""
    padding = bytes(payload_bytes - _NUMBER.size)
    sent_at: list[float] = []
    stored_at: list[float | None] = []
    pending: set[asyncio.Task[None]] = set()
    errors: list[str] = []
    stored = 0

    async def send(number: int) -> None:
        nonlocal stored
        try:
            await producer.send(DESTINATION, _NUMBER.pack(number) + padding, tenant=TENANT, key=f"k{number % queues}",
                                timeout=60)
        except SpillwayError as error:
            errors.append(f"{number}: {error!r}")
            return
        stored_at[number] = time.monotonic()
        stored += 1
        counters[PRODUCED] = stored

    async with Client(addresses) as client, client.producer() as producer:
        await client.wait_ready(30)
        counters[READY_PRODUCER] = 1
        start = time.monotonic()
        while not counters[STOP]:
            now = time.monotonic()
            while len(sent_at) < (now - start) * per_second:
                number = len(sent_at)
                sent_at.append(time.monotonic())
                stored_at.append(None)
                task = asyncio.ensure_future(send(number))
                pending.add(task)
                task.add_done_callback(pending.discard)
            counters[SENT] = len(sent_at)
            await asyncio.sleep(TURN_SECONDS)
        await asyncio.gather(*pending)
    return {"sent_at": sent_at, "stored_at": stored_at, "errors": errors[:10], "failed": len(errors)}


async def record(counters: Counters, addresses: list[str], credit: int) -> dict[str, Any]:
    """Acknowledges all it gets until `FINISH`. Returns (number, queue, shard, sequence, time, fencing
    token, attempt) of each delivery."""
    deliveries: list[tuple[int, int, int, int, float, int, int]] = []
    numbers: set[int] = set()
    stale = 0

    def lost(run: object, error: object) -> None:
        nonlocal stale
        stale += 1

    async def take() -> None:
        async for run in consumer.runs():
            now = time.monotonic()
            queue = int(run.key[1:])
            for message in run.messages:
                number, = _NUMBER.unpack_from(message.payload)
                deliveries.append((number, queue, message.shard, message.sequence, now, run.fencing_token,
                                   message.attempt))
                numbers.add(number)
            counters[DELIVERED] = len(numbers)
            run.ack()

    async with Client(addresses) as client, client.consumer(DESTINATION, credit_messages=credit, on_stale=lost) as consumer:
        await client.wait_ready(30)
        task = asyncio.ensure_future(take())
        counters[READY_CONSUMER] = 1
        while not counters[FINISH]:
            await asyncio.sleep(0.02)
            if task.done():
                task.result()
        return {"deliveries": deliveries, "stale_settlements": stale}
