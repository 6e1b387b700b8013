"""Nodes over real Raft groups and stores in one process, for tests: time and turns are the test's."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from node_world import World
from spillway.broker.config import NodeConfig
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.services.queue import QueueService
from spillway.cluster.raft.host import RaftHost
from spillway.cluster.raft.journal import JournalStore
from spillway.cluster.raft.progress import Limits
from spillway.cluster.state_store import StateStore
from spillway.cluster.transport.memory import MemoryNetwork, MemoryTransport

from tests.simulation.raft.disk import SimDisk

SHARD = 1  # the only one
KEEP_BYTES = 1 << 20
LIMITS = Limits(append=64 << 10, window=128 << 10, keep=KEEP_BYTES)  # who is behind takes many turns
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
        self.raft = RaftHost(name, cluster.names, self.journals, self.transport, self.store, limits=LIMITS,
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

    @property
    def applied(self) -> int:
        """Of the shard."""
        return self.node.shards[SHARD].applied if SHARD in self.raft.groups else 0

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
            while node.raft.fetches:
                node.raft._start_fetch(*node.raft.fetches.popitem())
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
