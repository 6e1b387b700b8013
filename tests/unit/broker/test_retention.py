"""The log is for replaying and for replicas that are behind: neither a message that nobody acknowledges nor a node that is dead makes
it grow."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from node_world import payloads
from raft_world import KEEP_BYTES, SHARD, SYNC_TURNS, Cluster, Replica
from spillway.broker.runtime.shard import LOG_BYTES_MAX

PAYLOAD = Random(1).randbytes(64 << 10)
ROUNDS, MESSAGES = 40, 16  # 40 MiB in all
LOG_BYTES_BOUND = LOG_BYTES_MAX + 2 * KEEP_BYTES + MESSAGES * len(PAYLOAD)  # before a checkpoint, kept, of the last round


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[[int], Cluster]]:
    """Starts a cluster of so many nodes."""
    made: list[Cluster] = []

    def start(nodes: int) -> Cluster:
        made.append(Cluster(tmp_path, nodes))
        return made[-1]

    yield start
    for cluster in made:
        await cluster.close()


async def traffic(cluster: Cluster, world: Replica, consumer: Any) -> None:
    """A round of messages, produced, delivered and acknowledged."""
    await world.put("d", *[PAYLOAD] * MESSAGES)
    left = MESSAGES
    while left:
        for run in await world.take(consumer):
            left -= len(run.messages)
            world.settle(run)
    for _ in range(2 * SYNC_TURNS):
        cluster.turn()
        await asyncio.sleep(0)


async def test_a_message_that_nobody_acknowledges_holds_no_log(start: Callable[[int], Cluster]) -> None:
    """One is leased and never settled, another one waits for a consumer that never comes, for days, while 40 MiB go by: the log stays
    as small as ever, on disk, too, and both messages are still there."""
    cluster = start(1)
    world = cluster.leader()
    world.know("d", "quiet")
    await world.put("quiet", b"waits")
    await world.put("d", b"stuck", key="stuck")
    consumer = world.consumer(1_000, 1 << 30)
    [stuck] = await world.take(consumer)
    for _ in range(ROUNDS):
        await traffic(cluster, world, consumer)
        cluster.now += 2 * 3600
    assert MESSAGES * len(PAYLOAD) < cluster.log_bytes_max < LOG_BYTES_BOUND
    journal = world.raft.groups[SHARD].journal
    assert world.entries_on_disk == journal.last - journal.first + 1 < ROUNDS
    assert payloads(await world.take(world.consumer(10, 1 << 20, "quiet"))) == [b"waits"]
    assert stuck.fencing_token in world.node.shards[SHARD].state.leases
    state = world.node.shards[SHARD].state
    assert state.counters[b"d"].messages == 1


@pytest.mark.parametrize("dies", ["a follower", "the leader"])
async def test_a_dead_node_holds_no_log(start: Callable[[int], Cluster], dies: str) -> None:
    """Of three nodes one is gone while 40 MiB go by: the logs of the others stay as small as ever."""
    cluster = start(3)
    leader = cluster.leader().node.config.node_id
    await cluster.kill(leader if dies == "the leader" else next(n for n in cluster.names if n != leader))
    world = cluster.leader()
    world.know("d")
    consumer = world.consumer(1_000, 1 << 30)
    for _ in range(ROUNDS):
        await traffic(cluster, world, consumer)
    assert MESSAGES * len(PAYLOAD) < cluster.log_bytes_max < LOG_BYTES_BOUND
    for node in cluster.nodes.values():
        journal = node.raft.groups[SHARD].journal
        assert node.entries_on_disk == journal.last - journal.first + 1 < ROUNDS
