"""A replica that was away catches up by the log if it can, and by a snapshot if it must."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import pytest
from raft_world import SHARD, SYNC_TURNS, Cluster, Replica
from spillway.cluster.snapshots import Exporter

PAYLOAD = Random(1).randbytes(64 << 10)


class Away:
    """Of three nodes, a follower is cut off from the others. Every snapshot that any of them begins is noted."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster = Cluster(path, 3)
        self.leader = self.cluster.leader()
        names = [n for n in self.cluster.names if n != self.leader.node.config.node_id]
        self.away = self.cluster.nodes[names[0]]
        self.leader.know("d")
        self.begun: list[Exporter] = []
        for node in self.cluster.nodes.values():
            monkeypatch.setattr(node.store._exports, "_begin", self._noted(node))

    def _noted(self, node: Replica) -> Callable[[int], Exporter]:
        def begin(group: int) -> Exporter:
            exporter = node.store.exporter(group)
            if group == SHARD:
                self.begun.append(exporter)
            return exporter
        return begin

    def cut(self) -> None:
        """It is alone."""
        for node in self.cluster.nodes.values():
            self.cluster.network.block(self.away.node.config.node_id, node.node.config.node_id)

    def heal(self) -> None:
        """It is back."""
        for node in self.cluster.nodes.values():
            self.cluster.network.unblock(self.away.node.config.node_id, node.node.config.node_id)

    async def put(self, count: int) -> None:
        """Messages of 64 KiB, that stay."""
        for _ in range(count):
            await self.leader.put("d", PAYLOAD)
            for _ in range(SYNC_TURNS):
                self.cluster.turn()

    async def until(self, condition: Callable[[], object]) -> None:
        """Turns until it holds; snapshots take real time."""
        async with asyncio.timeout(60):
            while not condition():
                self.cluster.turn()
                await asyncio.sleep(0.0005)

    def caught_up(self) -> bool:
        """It has what the leader has."""
        return self.away.applied == self.leader.applied and not self.away.raft.groups[SHARD].installing


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Away]:
    made = Away(tmp_path, monkeypatch)
    yield made
    for node in made.cluster.nodes.values():
        await node.raft.stop(0)
    await made.cluster.close()


async def test_by_the_log_if_it_can(world: Away) -> None:
    """It was away for a few entries, which the leader still has."""
    await world.put(2)
    world.cut()
    await world.put(5)
    world.heal()
    await world.until(world.caught_up)
    assert world.begun == []


async def test_by_one_snapshot_if_it_must(world: Away) -> None:
    """It was away for more than is kept. Meanwhile more comes than would be kept, too: the log from the snapshot on is there."""
    world.cut()
    await world.put(120)
    assert world.leader.raft.groups[SHARD].journal.first > world.away.applied + 1
    world.heal()
    await world.until(lambda: world.begun)
    await world.put(60)
    await world.until(world.caught_up)
    assert len(world.begun) == 1


async def test_by_the_same_snapshot_over_another_connection(world: Away) -> None:
    """The connection breaks in the middle: the transfer goes on with the moment at which it began."""
    world.cut()
    await world.put(120)
    world.heal()
    store = world.away.store
    for chunks in (8, 16):
        await world.until(lambda chunks=chunks: SHARD in store.installers and store.installers[SHARD].position.number > chunks)
        world.cut()
        await world.until(lambda: SHARD in store._staged)
        await world.put(3)
        world.heal()
    await world.until(world.caught_up)
    assert len(world.begun) == 1
    rows = [list(node.store.group(SHARD).scan(b"m", b"n")) for node in (world.leader, world.away)]
    assert len(rows[0]) > 100 and rows[0][:100] == rows[1][:100]
