"""One message at a time, timed at every step."""
from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from spillway.client import Client, LeasedRun

from bench.counters import Counters
from bench.stats import summary

QUEUES = 7
ROUND_SECONDS_MAX = 10.0


async def rounds(counters: Counters, addresses: list[str], count: int, warm_up: int, payload_bytes: int) -> dict[str, Any]:
    """Sends a message, gets it, acknowledges it, waits for the confirmation; then the next one. Credit is always there."""
    body = os.urandom(payload_bytes)
    clock = time.perf_counter
    samples: dict[str, list[float]] = {"produced": [], "delivered": [], "settled": [], "ack": []}
    async with Client(addresses) as client, client.producer() as producer, client.consumer("d0") as consumer:
        await client.wait_ready(30)

        async def take() -> tuple[LeasedRun, float]:
            run = await consumer.next_run(ROUND_SECONDS_MAX)
            if run is None or len(run) != 1:
                raise RuntimeError(f"expected the one message that was sent, got {run!r}")
            return run, clock()

        for i in range(warm_up + count):
            taking = asyncio.ensure_future(take())
            await asyncio.sleep(0)
            start = clock()
            await producer.send("d0", body, tenant="t0", key=f"k{i % QUEUES}", timeout=ROUND_SECONDS_MAX)
            produced = clock()
            run, delivered = await taking
            acked = clock()
            await run.ack()
            settled = clock()
            if i >= warm_up:
                for name, value in (("produced", produced - start), ("delivered", delivered - start),
                                    ("settled", settled - start), ("ack", settled - acked)):
                    samples[name].append(value)
    return {name: summary(values) for name, values in samples.items()}
