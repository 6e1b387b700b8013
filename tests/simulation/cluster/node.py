"""One node of a simulated cluster: what survives its process, and its process while it lives.

Everything of the product is real but what `app` puts underneath it: sockets, RocksDB's files, clocks.
"""
from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from spillway.broker.config import NodeConfig
from spillway.broker.core import state as state_module
from spillway.broker.runtime import forward
from spillway.broker.runtime import node as node_module
from spillway.broker.runtime import shard as shard_module
from spillway.broker.runtime.balance import Balance
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.runtime.shard import ShardRuntime
from spillway.broker.services import produce
from spillway.broker.services import queue as queue_module
from spillway.broker.services.admin import AdminService
from spillway.broker.services.cluster import ClusterService
from spillway.broker.services.member import MemberService
from spillway.broker.services.queue import QueueService
from spillway.broker.services.share import ShareService
from spillway.cluster import snapshots, state_store
from spillway.cluster.errors import StorageFailed, StoreRefused
from spillway.cluster.machine import Role
from spillway.cluster.raft import host as host_module
from spillway.cluster.raft import journal
from spillway.cluster.raft.host import RaftHost
from spillway.cluster.raft.journal import JournalStore, RocksDisk
from spillway.cluster.state_store import StateStore
from spillway.cluster.transport.base import Handlers
from spillway.cluster.transport.grpc import SILENCE_SECONDS
from spillway.cluster.transport.memory import MemoryTransport
from spillway.peer.v1.member_service_pb2_grpc import add_MemberServiceServicer_to_server
from spillway.peer.v1.share_service_pb2_grpc import add_ShareServiceServicer_to_server
from spillway.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from spillway.v1.cluster_service_pb2_grpc import add_ClusterServiceServicer_to_server

from tests.simulation.cluster import rocks
from tests.simulation.cluster.loop import PROCESS, Process
from tests.simulation.cluster.rpc import Server

if TYPE_CHECKING:
    from tests.simulation.cluster.world import World

START_MS = 1_700_000_000_000
FREE_BYTES = 1 << 40
HANG_SECONDS_MAX = 10_000.0
LINK_SECONDS, CLIENT_SECONDS = 30.0, 80.0  # until keepalives end connections of nodes, and of clients, with a node that hangs
REPLACE_SECONDS = 4  # of a node that is away, where others suffice


class Secrets:
    """In place of the module: from the seed."""

    def __init__(self, rnd: random.Random) -> None:
        self._rnd = rnd

    def token_hex(self, size: int) -> str:
        """As of the module."""
        return f"{self._rnd.getrandbits(8 * size):x}"


class SimPath:
    """A path of a node, for code that only makes a directory and opens it."""

    def __init__(self, disk: rocks.Disk, name: str) -> None:
        self.disk = disk
        self._name = name

    def mkdir(self, **options: Any) -> None:
        """There is nothing to make."""

    @property
    def name(self) -> str:
        """As of a path."""
        return self._name.rpartition("/")[2]

    def with_name(self, name: str) -> SimPath:
        """As of a path."""
        return SimPath(self.disk, f"{self._name.rpartition('/')[0]}/{name}")

    def __str__(self) -> str:
        return self._name


class SimMark:
    """A journal.SyncMark on a simulated disk."""

    def __init__(self, path: SimPath) -> None:
        self._disk = path.disk
        self.value = self._disk.mark

    def set(self, value: int) -> None:
        """See SyncMark."""
        self._disk.marks.append(value)

    def close(self) -> None:
        """See SyncMark."""


class SimClock:
    """A node's Clock: what it takes for the time of day may jump."""

    def __init__(self, node: SimNode) -> None:
        self._node = node

    def monotonic(self) -> float:
        """See Clock."""
        return self._node.world.loop.now

    def unix_ms(self) -> int:
        """See Clock."""
        return START_MS + int(self._node.world.loop.now * 1000) + self._node.skew_ms


class SpyTransport(MemoryTransport):
    """Shows every frame that leaves; runs handlers as code of its process."""

    node: SimNode

    def send(self, peer: str, epoch: int, frame: bytes) -> None:
        """See PeerTransport."""
        if PROCESS.get() is self.node.process and self.node.process.alive:
            self.node.world.unsynced.frame(self.node, peer, frame)  # type: ignore[arg-type]
            super().send(peer, epoch, frame)

    def start(self, handlers: Handlers) -> None:
        """See PeerTransport."""
        loop, process = self.node.world.loop, self.node.process
        handlers = self.node.world.stale.watch(self.node, handlers)  # type: ignore[arg-type]

        def later(handler: Any) -> Any:
            return lambda *args: loop.call_soon(handler, *args, context=process.context) and None
        super().start(Handlers(later(handlers.connected), later(handlers.frame), later(handlers.disconnected)))


class SimNode:
    """See the module."""

    process: Process
    host: RaftHost
    node: Node
    transport: SpyTransport

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.rnd = random.Random(world.rnd.getrandbits(64))
        self.life = 0
        self.alive = False
        self.started = False
        self.hangs = False
        self._times_hung = 0
        self.skew_ms = 0
        self.io_factor = 1.0
        self.free_bytes = FREE_BYTES
        self.stores = 0
        self.disks = 1
        self.wipe()

    def wipe(self) -> None:
        """The disks are replaced by empty ones."""
        self.disk, self.state_disk = rocks.Disk(), rocks.Disk()
        self.disks += 1

    @property
    def whole(self) -> bool:
        """Takes part with all that it ever knew."""
        return self.started and self.host.store.node.formed and not self.host.store.node.recovering and not self.damaged

    @property
    def damaged(self) -> bool:
        """Something on its disks cannot be read."""
        return bool(self.disk.bad or self.state_disk.bad)

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A new process."""
        if self.alive:
            return
        self.life += 1
        self.alive = True
        self.process = Process(self.name)
        self.process.io_seconds = self._io_seconds
        task = self.world.loop.spawn(self.process, self._main())
        task.add_done_callback(lambda done: None if done.cancelled() or done.exception() is None else self._fatal(done.exception()))

    def join(self, group: int) -> None:
        """A replica of a shard that the node is to be a member of, if it runs and has none."""
        if self.started and group not in self.node.shards and group not in self.host.store.node.dropped:
            self.process.context.copy().run(self.node.add_replica, group, [])

    def kick(self) -> None:
        """Its loop wakes by itself."""

    def _io_seconds(self) -> float:
        return self.rnd.choice((0.0002, 0.0005, 0.002)) * self.io_factor

    async def _main(self) -> None:
        world = self.world
        self.stores += 1
        try:
            log: Any = RocksDisk(SimPath(self.disk, f"{self.name}/log"))  # type: ignore[arg-type]
            store = JournalStore(log, "sim", self.name, lambda: f"{self.name}-{self.stores}")
            self.store = StateStore(SimPath(self.state_disk, f"{self.name}/state"))  # type: ignore[arg-type]
            self._compose(store)
            self.node.start(self.forwarder)
            running = world.loop.create_task(self.host.run())
            running.add_done_callback(self.node.task_done)
        except (StorageFailed, StoreRefused) as error:
            self._fatal(error)
            return
        self.started = True
        world.trace("start", self.name, str(self.life))
        world.counts["starts"] += 1

    def _compose(self, store: JournalStore) -> None:
        """As `app.App` does."""
        world, options = self.world, self.world.options
        config = NodeConfig(node_id=self.name, cluster="sim", data_dir=f"/{self.name}", shards=options.shards,
                            replicas=options.replicas, replace_after_seconds=REPLACE_SECONDS, listen=f"{self.name}:1",
                            peer_listen=f"p-{self.name}:1",
                            peers=[f"{n}=p-{n}:1/{n}:1" for n in world.names] if len(world.names) > 1 else [])
        self.transport = SpyTransport(world.network, self.name, lambda: self.host.hello(),
                                      lambda group, peer, position: self.host.export(group, peer, position))
        self.transport.node = self
        clock = SimClock(self)
        self.host = RaftHost(self.name, sorted(world.names), store, self.transport, self.store, limits=options.limits,
                             fatal=self._fatal, clock=clock, chance=self.rnd.random)
        self.node = Node(config, self.store, self.host, world.placement, clock)
        self.node.random = self.rnd.random
        self.forwarder = Forwarder(self.node)
        self.queue = QueueService(self.node, self.forwarder)
        server, peers = Server(world.rpc, self.process, f"{self.name}:1"), Server(world.rpc, self.process, f"p-{self.name}:1")
        server.add_generic_rpc_handlers((self.queue.handler(),))
        add_AdminServiceServicer_to_server(AdminService(self.node, self.forwarder), server)
        add_ClusterServiceServicer_to_server(ClusterService(self.node, self.forwarder), server)
        peers.add_generic_rpc_handlers((QueueService(self.node, self.forwarder, peer=True).handler(),))
        add_AdminServiceServicer_to_server(AdminService(self.node, self.forwarder, peer=True), peers)
        add_ClusterServiceServicer_to_server(ClusterService(self.node, self.forwarder, peer=True), peers)
        add_ShareServiceServicer_to_server(ShareService(self.node), peers)
        add_MemberServiceServicer_to_server(MemberService(self.node, self.forwarder), peers)
        if options.changes:
            self.node.balance.run = _follow(self.node.balance)  # type: ignore[method-assign]  # the world's operator changes the groups
        self._watch()

    def _watch(self) -> None:
        """Everything that the machines are told, the checkers are told first."""
        world = self.world
        for number, runtime in self.node.shards.items():
            self._watch_shard(number, runtime)
        add_replica = self.node.add_replica

        def add(number: int, founders: list[str]) -> ShardRuntime:
            runtime = add_replica(number, founders)
            self._watch_shard(number, runtime)
            return runtime
        self.node.add_replica = add  # type: ignore[method-assign]
        meta = self.node.meta
        meta_apply = meta.apply

        def apply(index: int, term: int, command: bytes) -> None:
            world.meta_history.applied(self, 0, self.meta_index, index, term, command)  # type: ignore[arg-type]
            self.meta_index = index
            meta_apply(index, term, command)
        self.meta_index = 0
        meta.apply = apply  # type: ignore[method-assign]
        meta.role_changed = self._watched_role(0, meta.role_changed)  # type: ignore[method-assign]
        finish = self.host.finish

        def finished() -> None:
            finish()
            world.committed.look(self)  # type: ignore[arg-type]
            world.elected.look(self)  # type: ignore[arg-type]
            if world.changing:
                world.configurations.look(self)  # type: ignore[arg-type]
        self.host.finish = finished  # type: ignore[method-assign]
        removed = self.host.removed

        def forget(group: int) -> None:
            world.counts["members: ended"] += 1
            world.committed.forget(self, group)  # type: ignore[arg-type]
            removed(group)
        self.host.removed = forget

    def _watch_shard(self, number: int, runtime: ShardRuntime) -> None:
        runtime.apply = self._watched_apply(number, runtime, runtime.apply)  # type: ignore[method-assign]
        runtime.role_changed = self._watched_role(number, runtime.role_changed)  # type: ignore[method-assign]

    def _watched_role(self, group: int, told: Any) -> Any:
        def role_changed(role: Role, term: int, leader: str | None) -> None:
            self.world.leaders.role(self, group, role, term)  # type: ignore[arg-type]
            if role is Role.LEADER:
                self.world.counts["leaderships"] += 1
                self.world.trace("leads", self.name, f"{group} {term}")
            told(role, term, leader)
        return role_changed

    def _watched_apply(self, number: int, runtime: Any, apply: Any) -> Any:
        observer, world = self.world.observers[number], self.world

        def watched(index: int, term: int, command: bytes) -> None:
            if observer.applied(self.name, runtime.applied, index, term, command):
                world.trace("commit", self.name, f"{number} {index} {term} {len(command)}")
            apply(index, term, command)
            if index % world.options.audit_every == 0:
                observer.compare(self.name, index, runtime.state)
                world.counts["states compared"] += 1
        return watched

    def _fatal(self, error: BaseException | None) -> None:
        """As the process does: it ends. It comes back, if that is what a supervisor would do."""
        world = self.world
        meant = isinstance(error, (StorageFailed, StoreRefused)) and "simulated" in str(error)
        if not meant:
            world.failed(error or AssertionError("no error"))
            return
        world.counts["ended by its disk"] += 1
        world.trace("fatal", self.name, type(error).__name__)
        self.stop()
        world.later(self.rnd.uniform(0.5, 2.0), self.recover)

    def recover(self) -> None:
        """Starts again; a damaged disk is replaced as soon as the others can do without this node."""
        if self.hangs:
            self._go_on()
        if self.alive:
            return
        if self.damaged:
            if not self.world.may_wipe(self):
                self.world.later(0.5, self.recover)
                return
            self.wipe()
            self.world.counts["disks replaced"] += 1
        self.start()

    def stop(self) -> None:
        """The process is killed, or the power fails."""
        if not self.alive:
            return
        if self.hangs:
            self._found_again()
        self.alive = self.started = False
        world = self.world
        world.loop.kill(self.process)
        if hasattr(self, "transport"):
            world.network.leave(self.transport)
        world.rpc.died(self.process)
        for disk in (self.disk, self.state_disk):
            disk.crash(self.rnd)
            disk.full = disk.fails = False
        self.free_bytes = FREE_BYTES
        world.trace("stop", self.name, "")

    def hang(self) -> None:
        """Nothing of it runs any more until it recovers, and its connections stay open until somebody finds it out."""
        self.started, self.hangs = False, True
        world = self.world
        world.loop.pause(self.process, HANG_SECONDS_MAX)
        world.rpc.hanging.add(self.name)
        self._times_hung += 1
        found = partial(self._found, self._times_hung)
        world.later(SILENCE_SECONDS, partial(found, partial(world.network.leave_alone, self.name)))
        world.later(LINK_SECONDS, partial(found, self._left_by_nodes))
        world.later(CLIENT_SECONDS, partial(found, self._left_by_all))
        world.trace("hang", self.name, "")

    def _found(self, time: int, find: Callable[[], None]) -> None:
        if self.hangs and self._times_hung == time:
            find()

    def _left_by_nodes(self) -> None:
        for other in self.world.names:
            for link in self.world.rpc.between(self.name, other):
                link.reset()

    def _left_by_all(self) -> None:
        self.world.rpc.died(self.process)

    def _go_on(self) -> None:
        self._found_again()
        self.started = True
        self.world.loop.resume(self.process)
        self.world.trace("go on", self.name, "")

    def _found_again(self) -> None:
        self.hangs = False
        self.world.rpc.hanging.discard(self.name)
        self.world.network.find_again(self.name)

    async def stop_gently(self) -> None:
        """As `app.App.stop`."""
        self.node.stopping = True
        await self.host.hand_over()
        self.queue.drain()
        await self.host.stop(0)
        await self.forwarder.close()
        await self.node.stop()
        self.stop()


def _follow(balance: Balance) -> Any:
    """It takes no step, and knows who the nodes are."""
    async def run(forwarder: Forwarder) -> None:
        while True:
            balance.follow()
            await asyncio.sleep(0.25)
    return run


@contextmanager
def underneath(world: World) -> Iterator[None]:
    """What nodes stand on while a world runs."""
    def opened(path: str, options: Any) -> rocks.Rdict:
        node, _, which = path.partition("/")
        sim = world.nodes[node]
        return rocks.Rdict(sim.disk if which == "log" else sim.state_disk)

    class Usage:
        def __init__(self, free: int) -> None:
            self.free = free

    class Shutil:
        @staticmethod
        def disk_usage(path: Any) -> Usage:
            return Usage(world.nodes[str(path).strip("/")].free_bytes)

    options = world.options
    with ExitStack() as stack:
        for module in (state_store, journal):
            stack.enter_context(patch.object(module, "Rdict", opened))
        for module in (state_store, journal, snapshots):
            stack.enter_context(patch.object(module, "WriteBatch", rocks.WriteBatch))
            stack.enter_context(patch.object(module, "ReadOptions", rocks.ReadOptions))
        stack.enter_context(patch.object(journal, "SyncMark", SimMark))
        stack.enter_context(patch.object(state_store, "_options", lambda size: None))
        stack.enter_context(patch.object(node_module, "shutil", Shutil))
        stack.enter_context(patch.object(node_module, "_malloc_trim", None))
        stack.enter_context(patch.object(queue_module, "secrets", Secrets(world.rnd)))
        stack.enter_context(patch.object(forward, "grpc", world.rpc.module()))
        stack.enter_context(patch.object(host_module, "INLINE_SYNC_BYTES", 0))
        stack.enter_context(patch.object(node_module, "TICK_SECONDS", 0.04))
        stack.enter_context(patch.object(node_module, "CHECKPOINT_SECONDS", options.checkpoint_seconds))
        stack.enter_context(patch.object(node_module, "TURN_BYTES", options.turn_bytes))
        stack.enter_context(patch.object(produce, "BATCH_BYTES_MAX", options.piece_bytes))
        stack.enter_context(patch.object(state_module, "CACHE_BYTES_MAX", options.cache_bytes))
        stack.enter_context(patch.object(shard_module, "UNSAVED_BYTES_MAX", options.unsaved_bytes))
        stack.enter_context(patch.object(shard_module, "LOG_BYTES_MAX", options.unsaved_bytes * 2))
        yield
