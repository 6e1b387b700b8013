"""Producer and consumer processes at full speed, with a bound on what is between them."""
from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from typing import Any

from spillway.client import Client, LeasedRun, PartialFailure, Record, Settlement, SpillwayError

from bench.counters import (
    DELIVERED,
    FINISH,
    PRODUCED,
    READY_CONSUMER,
    READY_PRODUCER,
    REFUSED,
    SENT,
    SETTLED,
    STOP,
    Counters,
)
from bench.queues import names

BATCH = 256
BATCHES_MAX = 16
TICK_SECONDS = 0.001


async def produce(counters: Counters, addresses: list[str], queues: int, payload_bytes: int, outstanding: int,
                  total: int = 0) -> dict[str, Any]:
    """Sends to the queues in turn until `STOP` (or `total` messages), as long as at most `outstanding` messages are sent
    and not settled (0: no bound)."""
    body = os.urandom(payload_bytes)
    cycle = names(queues)
    pending: deque[asyncio.Task[None]] = deque()
    sent = produced = failed = 0

    async def batch(records: list[Record]) -> None:
        nonlocal produced, failed
        try:
            await producer.send_many(records, timeout=60)
            produced += len(records)
        except PartialFailure as error:
            failed += len(error.errors)
            produced += len(records) - len(error.errors)
        counters[PRODUCED] = produced

    async with Client(addresses) as client, client.producer() as producer:
        await client.wait_ready(30)
        counters[READY_PRODUCER] = 1
        while not counters[STOP] and (not total or sent < total):
            while outstanding and sent - counters[SETTLED] > outstanding and not counters[STOP]:
                await asyncio.sleep(TICK_SECONDS)
            count = min(BATCH, total - sent) if total else BATCH
            records = []
            for _ in range(count):
                destination, tenant, key = cycle[sent % queues]
                sent += 1
                records.append(Record(destination, body, tenant, key))
            pending.append(asyncio.ensure_future(batch(records)))
            counters[SENT] = sent
            if len(pending) >= BATCHES_MAX:
                await pending.popleft()
        await asyncio.gather(*pending)
    return {"sent": sent, "produced": produced, "failed": failed, "cpu_seconds": time.process_time()}


async def consume(counters: Counters, addresses: list[str], credit: int) -> dict[str, Any]:
    """Acknowledges all it gets, until `FINISH`. A message counts as settled when its acknowledgement is confirmed."""
    unconfirmed: deque[tuple[Settlement, int]] = deque()
    delivered = settled = refused = 0

    def stale(run: LeasedRun, error: SpillwayError) -> None:
        nonlocal refused
        refused += len(run)
        counters[REFUSED] = refused

    async def confirm() -> None:
        nonlocal settled
        while True:
            while unconfirmed and unconfirmed[0][0].done:
                settled += unconfirmed.popleft()[1]
            counters[SETTLED] = settled - refused
            counters[DELIVERED] = delivered
            await asyncio.sleep(TICK_SECONDS)

    async def take() -> None:
        nonlocal delivered
        async for run in consumer.runs():
            delivered += len(run)
            unconfirmed.append((run.ack(), len(run)))

    async with Client(addresses) as client, client.consumer(
            ["*"], credit_messages=credit, credit_bytes=64 << 20, on_stale=stale) as consumer:
        await client.wait_ready(30)
        tasks = [asyncio.ensure_future(confirm()), asyncio.ensure_future(take())]
        counters[READY_CONSUMER] = 1
        while not counters[FINISH]:
            await asyncio.sleep(0.02)
            for task in tasks:
                if task.done():
                    task.result()
    return {"delivered": delivered, "settled": settled - refused, "refused": refused, "cpu_seconds": time.process_time()}
