"""Who leads which shard, and the task that keeps it up to date.

`Topology` and `merged` are pure. The watch moves to another node when its stream breaks; a failure elsewhere (a leader
that does not answer) makes it ask other nodes at once, since the node that it watches may be the one that hangs.
"""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
from spillway.client.connection import Channels, Health
from spillway.client.errors import InternalError, SpillwayError, Unavailable, from_rpc_error
from spillway.client.retry import Backoff, is_final
from spillway.contract.limits import SHARDS_MAX
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1 import cluster_service_pb2_grpc as rpc

log = logging.getLogger("spillway.client")

REFRESH_SECONDS_MIN = 0.1  # between questions that failures cause
ASK_SECONDS_MAX = 1.0
FIRST_SECONDS_MAX = 5.0  # until a node has told the topology: it may hang, or not have joined yet
FOREIGN_MAX = 100  # other clusters that are told of in the log


@dataclass(frozen=True, slots=True)
class Topology:
    """The cluster as last heard of. Tuples by shard start with shard 1."""

    cluster: str = ""
    shard_count: int = 0  # 0: nothing is known yet
    nodes: dict[str, str] = field(default_factory=dict)  # id -> host:port
    leaders: tuple[str, ...] = ()  # node ids; "": none known
    terms: tuple[int, ...] = ()
    replicas: tuple[tuple[str, ...], ...] = ()
    cluster_id: str = ""  # its identity, which the name is not; "": not known

    def leader_of(self, shard: int) -> str | None:
        """Address of the node that leads a shard, if one is known to."""
        return self.nodes.get(self.leaders[shard - 1]) if 1 <= shard <= len(self.leaders) else None

    def leads(self, node: str) -> frozenset[int]:
        """The shards that a node leads."""
        return frozenset(i for i, leader in enumerate(self.leaders, 1) if leader == node)

    @property
    def ready(self) -> bool:
        """Whether every shard has a leader."""
        return self.shard_count > 0 and all(leader in self.nodes for leader in self.leaders)


def is_foreign(known: Topology, heard: pb.Topology) -> bool:
    """Whether a node is of another cluster than the known one, and not of one that was restored from its backup. It may have that one's
    name, and the address of one of its nodes: it lost its disk, and was started as if there were no cluster to come back to."""
    ids = ("", heard.cluster_id, *heard.former_ids)
    return bool(heard.cluster_id) and known.cluster_id not in ids


def merged(old: Topology, heard: pb.Topology) -> Topology:
    """What is known after a node said `heard`: its view, but for shards of which a later term is known already. What a node of another
    cluster says changes nothing. Raises InternalError for more shards than a cluster can have."""
    if is_foreign(old, heard):
        return old
    count = heard.shard_count
    if count > SHARDS_MAX:
        raise InternalError(f"a node says that there are {count} shards; there can be {SHARDS_MAX}")
    leaders = [""] * count
    terms = [0] * count
    replicas: list[tuple[str, ...]] = [()] * count
    for shard in heard.shards:
        if 1 <= shard.shard <= count:
            leaders[shard.shard - 1] = shard.leader
            terms[shard.shard - 1] = shard.term
            replicas[shard.shard - 1] = tuple(shard.replicas)
    nodes = {node.id: node.address for node in heard.nodes}
    if old.cluster == heard.cluster and old.shard_count == count:
        for i, term in enumerate(old.terms):
            if term > terms[i] and old.leaders[i] in nodes:
                leaders[i], terms[i] = old.leaders[i], term
            elif term == terms[i] and not leaders[i]:
                leaders[i] = old.leaders[i]  # a follower that has not heard from its leader yet
    return Topology(heard.cluster, count, nodes, tuple(leaders), tuple(terms), tuple(replicas), heard.cluster_id or old.cluster_id)


class TopologyWatch:
    """Keeps `current` up to date. `start` it in the loop that it is to live in."""

    def __init__(self, seeds: Sequence[str], channels: Channels, health: Health) -> None:
        self.current = Topology()
        self._seeds = tuple(seeds)
        self._channels = channels
        self._health = health
        self._listeners: list[Callable[[Topology, Topology], None]] = []
        self._changed = asyncio.Event()
        self._watched = ""
        self._call: grpc.aio.UnaryStreamCall[pb.WatchTopologyRequest, pb.WatchTopologyResponse] | None = None
        self._task: asyncio.Task[None] | None = None
        self._refresh: asyncio.Task[None] | None = None
        self._refreshed = 0.0
        self._turn = 0
        self.reason = ""  # why the node that was asked last did not answer; empty if it did
        self._refused: SpillwayError | None = None  # nodes do not let this client in
        self._foreign: set[str] = set()  # identities of other clusters that were heard of

    def start(self) -> None:
        """Starts watching."""
        self._task = asyncio.create_task(self._run(), name="spillway topology")

    async def close(self) -> None:
        """Stops watching."""
        tasks = [task for task in (self._task, self._refresh) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def listen(self, listener: Callable[[Topology, Topology], None]) -> None:
        """Calls `listener(old, new)` after every change."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[Topology, Topology], None]) -> None:
        """Undoes `listen`."""
        self._listeners.remove(listener)

    async def known(self, complete: bool = False) -> Topology:
        """Waits until a topology is known; if `complete`, until every shard has a leader. Raises PermissionDenied if nodes refuse this
        client."""
        while not (self.current.ready if complete else self.current.shard_count):
            if self._refused is not None:
                raise self._refused
            self._changed.clear()
            await self._changed.wait()
        return self.current

    @property
    def addresses(self) -> list[str]:
        """Every address that may answer: the nodes, then the seeds."""
        return list(dict.fromkeys((*self.current.nodes.values(), *self._seeds)))

    def suspect(self, address: str, *, alive: bool = False) -> None:
        """Something at `address` failed: asks others who leads now, and, unless it is `alive`, watches elsewhere if
        need be."""
        now = asyncio.get_running_loop().time()
        if now - self._refreshed < REFRESH_SECONDS_MIN or self._task is None:
            return
        self._refreshed = now
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(self._ask(address, alive), name="spillway topology refresh")

    async def _ask(self, suspect: str, alive: bool) -> None:
        others = [a for a in self.addresses if a != suspect and self._health.is_up(a)]
        for address in others[:3]:
            stub = rpc.ClusterServiceStub(self._channels.get(address, "control"))
            try:
                response = await stub.GetTopology(pb.GetTopologyRequest(), timeout=ASK_SECONDS_MAX)
            except grpc.aio.AioRpcError:
                continue
            if not self._heard(response.topology, address):
                continue
            if self._watched == suspect and not alive and self._call is not None:
                self._call.cancel()
            return

    async def _run(self) -> None:
        backoff = Backoff(0.05, 2.0)
        warned = False
        while True:
            token = self._channels.token()
            address = self._watched = self._candidate()
            stub = rpc.ClusterServiceStub(self._channels.get(address, "control"))
            self._call = call = stub.WatchTopology(pb.WatchTopologyRequest())
            reason = "the node ended it"
            try:
                async with asyncio.timeout(FIRST_SECONDS_MAX) as patience:
                    async for response in call:
                        if not self._heard(response.topology, address):
                            call.cancel()
                            reason = "it is of another cluster"
                            break
                        if not response.topology.shard_count:
                            continue  # it has not joined yet
                        patience.reschedule(None)
                        self._health.worked(address)
                        backoff.reset()
                        warned = False
                        self.reason, self._refused = "", None
            except TimeoutError:
                call.cancel()
                reason = "it has not told the topology"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
                if is_final(error.code()) and self._channels.token() == token:
                    self._refused = from_rpc_error(error)
                    self._changed.set()
            except asyncio.CancelledError:
                if not call.cancelled() or asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    call.cancel()
                    raise
                reason = "it hangs"
            self.reason = reason
            self._health.failed(address)
            if not warned:
                warned = True
                log.warning("topology watch at %s ended (%s); trying other nodes", address, reason)
            await asyncio.sleep(backoff.next())

    def _candidate(self) -> str:
        """The next address to watch: in turn, those first that did not fail lately."""
        addresses = self.addresses
        self._turn += 1
        order = [addresses[(self._turn + i) % len(addresses)] for i in range(len(addresses))]
        return next((a for a in order if self._health.is_up(a)), order[0])

    def _heard(self, heard: pb.Topology, address: str) -> bool:
        """Takes in what a node says; false if it is of another cluster."""
        old = self.current
        if is_foreign(old, heard):
            self._health.failed(address)
            if heard.cluster_id not in self._foreign and len(self._foreign) < FOREIGN_MAX:
                self._foreign.add(heard.cluster_id)
                log.error("%s is of another cluster %r, with the identity %s instead of %s: what it says is left out. If that is to be "
                          "used now, start this client again", address, heard.cluster, heard.cluster_id, old.cluster_id)
            return False
        if not heard.shard_count:
            return True  # the node has not joined yet
        try:
            new = merged(old, heard)
        except InternalError as error:
            log.error("%s; what it says is left out", error)
            return True
        if new == old:
            return True
        self.current = new
        self._changed.set()
        for listener in list(self._listeners):
            listener(old, new)
        return True


class Router:
    """Where requests of a shard go: to its leader; if that is unknown or fails, to any node that answers, which
    forwards."""

    def __init__(self, watch: TopologyWatch, health: Health) -> None:
        self.watch = watch
        self.health = health
        self.answered = ""  # the address that answered the last call that any node serves

    def route(self, shard: int) -> str:
        """The address to send a shard's requests to now. Raises Unavailable if no address is known at all."""
        leader = self.watch.current.leader_of(shard)
        if leader is not None and self.health.is_up(leader):
            return leader
        others = [a for a in self.watch.addresses if self.health.is_up(a)]
        if others:
            return others[shard % len(others)]
        addresses = self.watch.addresses
        if not addresses:
            raise Unavailable("no address of a node is known")
        return leader or addresses[shard % len(addresses)]

    def is_leader(self, shard: int, address: str) -> bool:
        """Whether the shard is led at `address`, as far as is known."""
        leader = self.watch.current.leader_of(shard)
        return leader is None or leader == address
