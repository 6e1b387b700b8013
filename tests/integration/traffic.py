"""Load for real clusters that change meanwhile: whoever produces and consumes must notice nothing."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from spillway.client import Client

if TYPE_CHECKING:  # earlier clients have none
    from spillway.client import ClusterStatus

QUEUES = 20


async def until(what: str, condition: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    """Polls a cluster until a condition holds."""
    try:
        async with asyncio.timeout(seconds):
            while not await condition():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {what}") from None


def settled(found: ClusterStatus, *node_ids: str) -> bool:
    """Whether these are the nodes, and every shard is where it belongs, with the leader that it should have."""
    return ({n.id for n in found.nodes} == set(node_ids) and all(n.reachable for n in found.nodes) and not found.moving
            and all(g.leader == g.wanted[0] for g in found.groups if g.group)
            and all({r.node for r in g.replicas} == {*g.voters, *g.learners} for g in found.groups))


class Traffic:
    """Messages of some queues, produced and consumed all the time."""

    def __init__(self, queues: int) -> None:
        self.sent = 0
        self.got: dict[str, list[int]] = {f"k{k}": [] for k in range(queues)}

    @property
    def received(self) -> int:
        return sum(map(len, self.got.values()))


@asynccontextmanager
async def traffic(client: Client, destination: str = "load", queues: int = QUEUES, pause: float = 0.0) -> AsyncIterator[Traffic]:
    """Runs while the block does; then everything has come, in order and once. A send that fails fails the test. `pause`: seconds between
    a message for each queue and the next ones; 0: as fast as the cluster takes them."""
    flow = Traffic(queues)
    ending = False

    async def produce() -> None:
        async with client.producer() as producer:
            while not ending:
                await asyncio.gather(*(producer.send(destination, b"%d" % (flow.sent // queues), key=f"k{k}") for k in range(queues)))
                flow.sent += queues
                if pause:
                    await asyncio.sleep(pause)

    async def consume() -> None:
        async with client.consumer(destination) as consumer:
            async for run in consumer.runs():
                flow.got[run.key].extend(int(p) for p in run.payloads)
                await run.ack()

    producing, consuming = asyncio.ensure_future(produce()), asyncio.ensure_future(consume())
    try:
        yield flow
        ending = True
        await asyncio.wait_for(producing, 30)

        async def all_here() -> bool:
            return flow.received >= flow.sent
        await until("everything is delivered", all_here, 30)
        assert flow.got == {f"k{k}": list(range(flow.sent // queues)) for k in range(queues)}
    finally:
        for task in (producing, consuming):
            task.cancel()
        await asyncio.gather(producing, consuming, return_exceptions=True)
