"""The log is for replaying and for replicas that are behind: neither a message that nobody acknowledges nor a node that is dead makes
it grow."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from node_world import World, payloads
from spillway.broker.config import NodeConfig
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.runtime.shard import LOG_BYTES_MAX
from spillway.broker.services.queue import QueueService
from spillway.cluster.raft.host import RaftHost
from spillway.cluster.raft.journal import JournalStore
from spillway.cluster.raft.progress import Limits
from spillway.cluster.state_store import StateStore
from spillway.cluster.transport.memory import MemoryNetwork, MemoryTransport

from tests.simulation.raft.disk import SimDisk

SHARD = 1
KEEP_BYTES = 1 << 20
PAYLOAD = Random(1).randbytes(64 << 10)
ROUNDS, MESSAGES = 40, 16  # 40 MiB in all
LOG_BYTES_BOUND = LOG_BYTES_MAX + 2 * KEEP_BYTES + MESSAGES * len(PAYLOAD)  # before a checkpoint, kept, of the last round
TURN_SECONDS, SYNC_TURNS = 0.02, 5


class Replica(World):
    """A node over real Raft groups; its `host` is what gives all nodes a turn."""

    def __init__(self, path: Path, name: str, cluster: Cluster) -> None:
        peers = [f"{n}=p{n}:1/{n}:1" for n in cluster.names] if len(cluster.names) > 1 else []
        config = NodeConfig(node_id=name, data_dir=str(path), shards=SHARD, replicas=3, peers=peers)
        self.store = StateStore(path / "state")
        self.disk = SimDisk()
        self.journals = JournalStore(self.disk, config.cluster, name)
        self.transport = MemoryTransport(cluster.network, name, lambda: self.raft.hello(),
                                         lambda group, peer, position: self.raft.export(group, peer, position))
        self.raft = RaftHost(name, cluster.names, self.journals, self.transport, self.store, limits=Limits(keep=KEEP_BYTES),
                             fatal=cluster.fatal, clock=cluster)
        self.host = cluster  # type: ignore[assignment]
        self.node = Node(config, self.store, self.raft, {SHARD: cluster.names}, cluster)
        self.node.random = lambda: 0.5
        self.forwarder = Forwarder(self.node)
        self.service = QueueService(self.node, self.forwarder)
        QueueService(self.node, self.forwarder, peer=True)

    def start(self) -> None:
        """Takes part."""
        self.transport.start(self.raft.handlers())
        self.raft.start(self.host.monotonic())  # type: ignore[attr-defined]

    def upkeep(self, syncs: bool) -> None:
        """As the node's loops do: a checkpoint that is due, and a sync from time to time."""
        if self.node._due_checkpoints:
            self.node._checkpoint(next(iter(self.node._due_checkpoints)))
        if syncs:
            self.store.sync_now()

    @property
    def entries_on_disk(self) -> int:
        """Of the shard."""
        return sum(1 for _ in self.disk.scan(SHARD.to_bytes(4, "big") + b"E", SHARD.to_bytes(4, "big") + b"F"))


class Cluster:
    """Nodes in one process: what time it is, and whose turn. It is their Clock."""

    def __init__(self, path: Path, nodes: int) -> None:
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self.now = 1_000.0
        self.turns = 0
        self.log_bytes_max = 0  # of any replica at any time
        self._due: list[Callable[[], None]] = []
        self.network = MemoryNetwork(lambda seconds, action: self._due.append(action), self.monotonic)
        self.nodes = {name: Replica(path / name, name, self) for name in self.names}
        for node in self.nodes.values():
            node.start()

    def monotonic(self) -> float:
        """See Clock."""
        return self.now

    def unix_ms(self) -> int:
        """See Clock."""
        return int(self.now * 1000)

    def fatal(self, error: BaseException) -> None:
        """As the process's end."""
        raise error

    def turn(self) -> None:
        """Time passes, what was sent arrives, and every node has a turn."""
        self.now += TURN_SECONDS
        self.turns += 1
        due, self._due[:] = self._due[:], []
        for action in due:
            action()
        for node in self.nodes.values():
            node.raft.turn(self.now)
            node.upkeep(self.turns % SYNC_TURNS == 0)
            if SHARD in node.raft.groups:
                self.log_bytes_max = max(self.log_bytes_max, node.raft.groups[SHARD].journal.bytes)

    def leader(self) -> Replica:
        """Of the shard, once there is one."""
        for _ in range(2_000):
            for node in self.nodes.values():
                if SHARD in node.node.shards and node.node.shards[SHARD].leading:
                    return node
            self.turn()
        raise TimeoutError("no leader")

    async def kill(self, name: str) -> None:
        """The node is gone."""
        node = self.nodes.pop(name)
        await node.transport.close()
        await node.forwarder.close()
        node.store.close()

    async def close(self) -> None:
        for name in list(self.nodes):
            await self.kill(name)


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
