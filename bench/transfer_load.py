"""Fills queues and leaves them full."""
from __future__ import annotations

import asyncio
import os
from collections import deque
from typing import Any

from spillway.client import Client, Record

from bench.counters import PRODUCED, READY_PRODUCER, Counters

QUEUES = 200
BATCH_BYTES, BATCH_MESSAGES, BATCHES_MAX = 4 << 20, 1024, 4


async def fill(counters: Counters, addresses: list[str], parts: list[list[int]]) -> dict[str, Any]:
    """Sends messages of (payload bytes, how many) for each of `parts`, no two alike, to 200 queues in turn."""
    pending: deque[asyncio.Task[None]] = deque()
    sent = stored = 0

    async def batch(records: list[Record]) -> None:
        nonlocal stored
        await producer.send_many(records, timeout=120)
        stored += len(records)
        counters[PRODUCED] = stored

    async with Client(addresses) as client, client.producer() as producer:
        await client.wait_ready(30)
        counters[READY_PRODUCER] = 1
        for payload_bytes, count in parts:
            size = min(max(1, BATCH_BYTES // payload_bytes), BATCH_MESSAGES)
            for begin in range(0, count, size):
                records = []
                for _ in range(min(size, count - begin)):
                    records.append(Record("d0", os.urandom(payload_bytes), "t0", f"k{sent % QUEUES}"))
                    sent += 1
                pending.append(asyncio.ensure_future(batch(records)))
                if len(pending) >= BATCHES_MAX:
                    await pending.popleft()
        await asyncio.gather(*pending)
    return {"sent": sent, "stored": stored}
