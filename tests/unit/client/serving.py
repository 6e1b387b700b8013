"""Short ways to get a fake cluster and a client of it."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from spillway.client import Client

from tests.unit.client.fake_broker import FakeCluster


@asynccontextmanager
async def serving(nodes: int = 1, shards: int = 4) -> AsyncIterator[tuple[FakeCluster, Client]]:
    """A cluster of `nodes` and a client that knows its topology. Nothing may take longer than 20 s."""
    async with asyncio.timeout(20):
        cluster = await FakeCluster(shards).start(nodes)
        try:
            async with Client(cluster.addresses) as client:
                await client.wait_ready(5)
                yield cluster, client
        finally:
            await cluster.stop()


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Waits for a condition that other tasks of this loop bring about."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)
