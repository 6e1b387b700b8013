"""A cluster in one process under a seeded clock, network and disk: real hosts, real library, simulated everything else.

First every fault, then a healed cluster that must make progress. A run depends on its seed only.
"""
from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from spillway.cluster.errors import StorageFailed
from spillway.cluster.machine import Role
from spillway.cluster.raft.host import RaftHost
from spillway.cluster.raft.journal import JournalStore
from spillway.cluster.raft.progress import Limits
from spillway.cluster.snapshots import Position
from spillway.cluster.transport.base import Handlers
from spillway.cluster.transport.memory import MemoryTransport
from spillway.peer.v1.raft_pb2 import RaftFrame

from tests.simulation.members import Operator
from tests.simulation.network import RoughNetwork
from tests.simulation.raft.checkers import (
    CommittedStays,
    ElectedByMajority,
    NothingLost,
    NothingStale,
    NothingUnsynced,
    OneChangeAtATime,
    OneLeader,
    SameHistory,
    StoredByMajority,
    Violation,
)
from tests.simulation.raft.disk import SimDisk

FAULTS = ("drop", "drop", "block", "cut", "alone", "stop", "stop", "slow", "fail", "wipe", "pause", "heal", "transfer",
          "lag", "lag")
HEAL_SECONDS = 30.0  # a healed cluster must commit within


@dataclass
class Options:
    """What may happen in a run; drawn from the seed."""

    nodes: int = 3
    groups: int = 1
    seconds: float = 25.0
    delay: float = 0.002
    faults_per_second: float = 1.5
    wipes: bool = True
    twice: float = 0.0
    """How many frames come twice, and (`ghosts`) late frames of connections that are gone."""
    ghosts: float = 0.0
    spite: float = 0.0
    """How often a candidate's requests reach one voter only."""
    changes: float = 0.0
    """How many changes of members there are in a second, and (`spares`) nodes that are no members at first."""
    spares: int = 0
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def draw(cls, rnd: random.Random) -> Options:
        """Options of a seed."""
        delay = rnd.choice((0.0005, 0.002, 0.02, 0.1))
        small = rnd.random() < 0.8 and delay < 0.02  # else the window is what limits progress
        append = rnd.choice((60, 200, 1000)) if small else 1 << 20
        return cls(nodes=rnd.choice((1, 3, 3, 3, 5)), groups=rnd.choice((1, 1, 2)), seconds=rnd.uniform(10, 30),
                   delay=delay, faults_per_second=rnd.choice((0.5, 1.5, 4.0)),
                   wipes=rnd.random() < 0.4, twice=rnd.choice((0.0, 0.02, 0.3)), ghosts=rnd.choice((0.0, 1.0)),
                   spite=rnd.choice((0.0, 0.0, 0.5)),
                   limits=Limits(append=append, window=append * rnd.choice((1, 3)), tail=rnd.choice((0, 500, 1 << 20)),
                                 keep=rnd.choice((0, 1000, 1 << 20)), hold=rnd.choice((1000, 1 << 20))))

    def with_members(self, seed: int) -> Options:
        """With changes of the members in half of the seeds."""
        rnd = random.Random(f"options {seed}")
        return replace(self, changes=rnd.choice((0.5, 2.0, 8.0)), spares=rnd.choice((1, 2))) if rnd.random() < 0.5 else self


Saved = tuple[int, int, dict[int, bytes], tuple[int, bytes] | None]  # a state: index, term, contents, configuration
BLANK: Saved = (0, 0, {}, None)


class SimMachine:
    """A GroupMachine that remembers what it applied. Its saved state survives the process."""

    def __init__(self, node: SimNode, group: int) -> None:
        self.node = node
        self.group = group
        self.waiting: deque[bytes] = deque()
        self.role = Role.FOLLOWER
        self.configuration: tuple[int, bytes] | None = None
        self.reload()

    def reload(self) -> None:
        """See GroupMachine."""
        self.index, self.term, contents, self.configuration = self.node.saved.get(self.group, BLANK)
        self.contents = dict(contents)

    def save(self) -> None:
        """A checkpoint, durable at once."""
        if self.index > self.durable_index():
            self.node.saved[self.group] = (self.index, self.term, dict(self.contents), self.configuration)

    def durable_index(self) -> int:
        """See GroupMachine."""
        return self.node.saved.get(self.group, BLANK)[0]

    def configured(self, index: int, term: int, configuration: bytes) -> None:
        """See GroupMachine."""
        self.node.world.history.applied(self.node, self.group, self.index, index, term, b"members: " + configuration)
        self.index, self.term, self.configuration = index, term, (index, configuration)

    def apply(self, index: int, term: int, command: bytes) -> None:
        """See GroupMachine."""
        self.node.world.history.applied(self.node, self.group, self.index, index, term, command)
        self.index, self.term = index, term
        self.contents[index] = command
        if command in self.node.proposed and self.role is Role.LEADER:
            self.node.proposed.discard(command)
            self.node.world.lost.ack(self.group, command, index)
            self.node.world.counts["acknowledged"] += 1

    def collect(self) -> bytes | None:
        """See GroupMachine."""
        if not self.waiting:
            return None
        command = self.waiting.popleft()
        self.node.proposed.add(command)
        return command

    def role_changed(self, role: Role, term: int, leader: str | None) -> None:
        """See GroupMachine."""
        if role is Role.LEADER:
            self.node.world.counts["leaderships"] += 1
        elif self.role is Role.LEADER:
            self.waiting.clear()
            self.node.proposed.clear()  # unknown from now on
        self.role = role
        self.node.world.leaders.role(self.node, self.group, role, term)


class SimSnapshots:
    """A SnapshotStore of saved states; the simulation moves them itself."""

    def __init__(self, node: SimNode) -> None:
        self._node = node

    def export(self, group: int, peer: str, position: Position | None) -> AsyncGenerator[bytes, None]:
        """Not used."""
        raise NotImplementedError

    async def install(self, group: int, peer: str, fetch: Callable[[Position | None], AsyncIterator[bytes]],
                      above: int) -> tuple[int, int]:
        """Not used."""
        raise NotImplementedError

    def applied(self, group: int) -> tuple[int, int]:
        """See SnapshotStore."""
        return self._node.saved.get(group, BLANK)[:2]

    def configuration(self, group: int) -> tuple[int, bytes] | None:
        """See SnapshotStore."""
        return self._node.saved.get(group, BLANK)[3]


class SpyTransport(MemoryTransport):
    """Shows every frame to the checker before it leaves."""

    node: SimNode

    def send(self, peer: str, epoch: int, frame: bytes) -> None:
        """See PeerTransport."""
        self.node.world.unsynced.frame(self.node, peer, frame)
        self.node.world.spite(self.node, peer, frame)
        super().send(peer, epoch, frame)


class SimClock:
    """A node's Clock."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        """See Clock."""
        return self._world.now


class SimNode:
    """One node: what survives its process, and its process while it lives."""

    host_class = RaftHost

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.disk = SimDisk()
        self.saved: dict[int, Saved] = {}
        self.replicas: set[int] = set(range(world.options.groups)) if name in world.founders else set()
        self.life = 0
        self.alive = False
        self.stores = 0
        self.disks = 1

    def start(self) -> None:
        """A new process."""
        world = self.world
        self.life += 1
        self.alive = True
        self.busy = self.kicked = False
        self.sync_delay = 0.0
        self.proposed: set[bytes] = set()
        self.stores += 1
        store = JournalStore(self.disk, "sim", self.name, lambda: f"{self.name}-{self.stores}")
        self.machines = {g: SimMachine(self, g) for g in sorted(self.replicas)}
        for number in store.node.dropped:
            self.forget(number)
        self.transport = SpyTransport(world.network, self.name, lambda: self.host.hello())
        self.transport.node = self
        self.host = self.host_class(self.name, world.names, store, self.transport, SimSnapshots(self),
                                    limits=world.options.limits, clock=SimClock(world), chance=world.rnd.random)
        self.host.removed = self.forget
        for number, machine in self.machines.items():  # of a replica that came after the founding, the disk may know nothing yet
            founded = self.name in world.founders and self.host.has_replica(number, world.founders)
            self.host.add_group(number, world.founders if founded else [], machine)
        host = self.host.handlers()
        life = self.life

        def then_turn(handler: Callable[..., None]) -> Callable[..., None]:
            def handle(*args: object) -> None:
                handler(*args)
                if life == self.life:
                    self.kick()
            return handle
        seen = world.stale.watch(self, host)
        self.transport.start(Handlers(then_turn(seen.connected), then_turn(seen.frame), then_turn(seen.disconnected)))
        self.host.start(world.now)
        self.kick()
        self._beat(life)

    def _beat(self, life: int) -> None:
        if self.alive and self.life == life:
            self.kick()
            self.world.later(0.05, lambda: self._beat(life))

    def join(self, group: int) -> None:
        """A replica of a group that the node is to be a member of, once nothing is left of an earlier one."""
        if group not in self.replicas and not (self.alive and group in self.host.ended()):
            self.replicas.add(group)
            if self.alive:
                self.machines[group] = SimMachine(self, group)
                self.host.add_group(group, [], self.machines[group])
                self.kick()

    def forget(self, group: int) -> None:
        """The node is no member any more: nothing is left of the group but the term and the vote."""
        self.world.counts["members: ended"] += 1
        self.replicas.discard(group)
        self.saved.pop(group, None)
        self.machines.pop(group, None)
        self.world.committed.forget(self, group)

    def kick(self) -> None:
        """A turn comes soon."""
        if self.alive and not self.kicked:
            self.kicked = True
            life = self.life
            self.world.later(self.world.rnd.choice((0.0001, 0.001, 0.003)), lambda: self._turn(life))

    def _turn(self, life: int) -> None:
        if self.life != life or not self.alive:
            return
        if self.busy:
            self.world.later(0.001, lambda: self._turn(life))
            return
        self.kicked = False
        try:
            size = self.host.begin(self.world.now)
        except StorageFailed:  # of a node row, which is synced at once
            self._disk_failed()
            return
        if size:
            self.busy = True
            self.world.later(self.sync_delay + self.world.rnd.choice((0.0002, 0.002)), lambda: self._synced(life))
        else:
            self._finish()

    def _synced(self, life: int) -> None:
        if self.life == life and self.alive:
            self.busy = False
            try:
                self.host.sync()
            except StorageFailed:
                self._disk_failed()
                return
            self._finish()

    def _disk_failed(self) -> None:
        """As the process does: it ends."""
        self.world.counts["failed syncs"] += 1
        self.stop()
        self.world.later(1.0, lambda: self.world.restart(self))

    def _finish(self) -> None:
        self.host.finish()
        self.world.committed.look(self)
        self.world.elected.look(self)
        self.world.configurations.look(self)
        self.world.stored.look(self)
        while self.host.fetches:
            group, peer = self.host.fetches.popitem()
            self._fetch(group, peer, self.life)
        if self.host._woken:
            self.kick()

    def _fetch(self, group: int, peer: str, life: int) -> None:
        """Installs the peer's saved state after a while, unless something comes between."""
        world = self.world
        source = world.nodes[peer]
        saved = source.saved.get(group, BLANK)

        def install() -> None:
            if self.life != life or not self.alive or group not in self.host.groups or not self.host.groups[group].installing:
                return
            if not world.network.connected(self.name, peer) or saved[0] <= self.host.groups[group].engine.applied or (
                    world.rnd.random() < 0.2):
                self.host.fetch_failed(group)
                world.counts["failed snapshots"] += 1
            else:
                self.saved[group] = saved
                world.counts["snapshots"] += 1
                if world.rnd.random() < 0.1 and not world.calm:
                    self.stop()  # between the state and the log
                    world.counts["crashes in a snapshot"] += 1
                    world.later(0.1, lambda: world.restart(self))
                    return
                self.machines[group].reload()
                self.host.installed(group, saved[0], saved[1])
            self.kick()
        world.later(world.rnd.uniform(0.01, 1.0), install)

    def stop(self) -> None:
        """The process is killed, or the power fails."""
        self.alive = False
        self.world.network.leave(self.transport)
        self.disk.crash(self.world.rnd)

    def wipe(self) -> None:
        """The disk is replaced by an empty one."""
        self.disk = SimDisk()
        self.saved = {}
        self.disks += 1

    @property
    def whole(self) -> bool:
        """Takes part with all that it ever knew."""
        return self.alive and self.host.store.node.formed and not self.host.store.node.recovering


class World:
    """A seeded run."""

    node_class = SimNode

    def __init__(self, seed: int, options: Options | None = None) -> None:
        self.seed = seed
        self.rnd = random.Random(seed)
        self.options = options or Options.draw(self.rnd).with_members(seed)
        self.now = 1.0
        self.counts: Counter[str] = Counter()
        self.history, self.lost, self.leaders = SameHistory(), NothingLost(), OneLeader()
        self.committed, self.unsynced = CommittedStays(), NothingUnsynced()
        self._heard_by: dict[tuple[str, int, int], str | None] = {}
        self.elected, self.stale = ElectedByMajority(), NothingStale()
        self.configurations, self.stored = OneChangeAtATime(), StoredByMajority()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._serial = 0
        self.calm = False
        self.lags: dict[tuple[str, str], float] = {}  # seconds, of a direction
        self.names = [f"n{i}" for i in range(self.options.nodes + self.options.spares)]
        self.founders = self.names[:self.options.nodes]
        self.wiped: SimNode | None = None
        self.network = RoughNetwork(self.later, lambda: self.now, self._delay, random.Random(seed), self.options.twice,
                                    self.options.ghosts)
        self.nodes = {n: self.node_class(self, n) for n in self.names}
        self.operator = Operator(self, list(range(self.options.groups)), voters_min=1)

    def founders_of(self, group: int) -> list[str]:
        """The first voters of a group."""
        return self.founders

    # -- time ----------------------------------------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Does something after a while."""
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + seconds, self._sequence, action))

    def run_until(self, when: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Runs what is due; stops early, and says so, when `done`."""
        while self._heap and self._heap[0][0] <= when:
            self.now, _, action = heapq.heappop(self._heap)
            action()
            if done():
                return True
        self.now = when
        return done()

    def _delay(self, sender: str, receiver: str) -> float:
        return self.options.delay * self.rnd.choice((0.5, 1, 1, 3)) + self.lags.get((sender, receiver), 0.0)

    # -- faults --------------------------------------------------------------------------------------------------

    def _pair(self) -> tuple[str, str]:
        a, b = self.rnd.sample(self.names, 2)
        return a, b

    def _fault(self) -> None:
        if self.calm:
            return
        self.later(self.rnd.expovariate(self.options.faults_per_second), self._fault)
        kind = self.rnd.choice(FAULTS)
        many = len(self.names) > 1
        node = self.nodes[self.rnd.choice(self.names)]
        if kind in ("drop", "block", "cut") and many:
            a, b = self._pair()
            if kind == "cut":
                self.network.cut(a, b)
                self.later(self.rnd.uniform(0.1, 4), lambda: self._reconnect(a, b))
            else:
                self.network.block(a, b)
                self.later(0.01 if kind == "drop" else self.rnd.uniform(0.2, 4), lambda: self.network.unblock(a, b))
        elif kind == "lag" and many:
            link = self._pair()
            self.lags[link] = self.rnd.uniform(0.2, 4)
            self.later(self.rnd.uniform(0.5, 6), lambda: self.lags.pop(link, None))
        elif kind == "alone" and many:
            others = [n for n in self.names if n != node.name]
            for other in others:
                self.network.block(node.name, other)
            self.later(self.rnd.uniform(0.5, 5), lambda: [self.network.unblock(node.name, o) for o in others])
        elif kind == "stop" and node.alive:
            node.stop()
            self.later(self.rnd.uniform(0.05, 4), lambda: self.restart(node))
        elif kind == "slow" and node.alive:
            node.sync_delay = self.rnd.uniform(0.01, 1.5)
            self.later(self.rnd.uniform(0.1, 3), lambda: setattr(node, "sync_delay", 0.0))
        elif kind == "fail" and node.alive:
            node.disk.fails = True
            self.later(self.rnd.uniform(0.5, 3), lambda: self.restart(node))
        elif kind == "wipe" and self.options.wipes and node.alive and self._may_wipe(node):
            self.counts["wipes"] += 1
            node.stop()
            node.wipe()
            self.wiped = node
            self.later(self.rnd.uniform(0.05, 2), lambda: self.restart(node))
        elif kind == "pause" and node.alive and not node.busy:
            life = node.life
            node.busy = True
            self.later(self.rnd.uniform(0.1, 3), lambda: node.life == life and setattr(node, "busy", False))
        elif kind == "heal":
            self._heal_links()
        elif kind == "transfer" and node.alive:
            for group in node.host.groups:
                if node.host.transfer(group):
                    self.counts["transfers"] += 1
                    node.kick()
        else:
            return
        self.counts[kind] += 1

    def forgetful(self) -> bool:
        """Whether a node lost its disk and is not back."""
        return self.wiped is not None and not self.wiped.whole

    def _may_wipe(self, node: SimNode) -> bool:
        """Whether the others can do without a node: a disk that is lost is made up for by a majority that does not count it."""
        return len(self.names) > 1 and all(n.whole for n in self.nodes.values()) and all(
            node.name not in c.voters or len(c.voters) > 2
            for other in self.nodes.values() for group in other.host.groups.values() for _, c in group.journal._configurations)

    def spite(self, node: SimNode, peer: str, frame: bytes) -> None:
        """Takes a candidate's requests for votes away from all peers but one, with the rest of these connections."""
        if self.calm or not self.options.spite:
            return
        for m in RaftFrame.FromString(frame).messages:
            if m.WhichOneof("body") == "vote_request":
                candidacy = node.name, m.group, m.term
                if candidacy not in self._heard_by:
                    self._heard_by[candidacy] = None if self.rnd.random() > self.options.spite else self.rnd.choice(
                        [n for n in self.names if n != node.name])
                if self._heard_by[candidacy] not in (None, peer):
                    self.counts["requests for votes lost"] += 1
                    self.network.cut(node.name, peer)
                    self.later(self.rnd.uniform(0.1, 1.0), lambda: self._reconnect(node.name, peer))

    def _reconnect(self, a: str, b: str) -> None:
        self.network.disconnect(a, b)
        self.network.connect(a, b)

    def restart(self, node: SimNode) -> None:
        """A new process, unless there is one."""
        if not node.alive:
            node.start()

    def _heal_links(self) -> None:
        for i, a in enumerate(self.names):
            for b in self.names[i + 1:]:
                self.network.unblock(a, b)

    # -- work ----------------------------------------------------------------------------------------------------

    def _propose(self) -> None:
        if not self.calm:
            self.later(self.rnd.expovariate(20), self._propose)
        for node in self.nodes.values():
            if node.alive:
                for number, machine in node.machines.items():
                    if machine.role is Role.LEADER:
                        for _ in range(self.rnd.choice((1, 1, 2, 10))):
                            self.propose(node, number)

    def propose(self, node: SimNode, group: int) -> bytes:
        """A unique command for a node that leads."""
        self._serial += 1
        command = b"%d." % self._serial + b"x" * self.rnd.choice((0, 20, 60))
        node.machines[group].waiting.append(command)
        node.host.wake(group)
        node.kick()
        return command

    def _save(self) -> None:
        self.later(self.rnd.uniform(0.05, 1), self._save)
        node = self.nodes[self.rnd.choice(self.names)]
        if node.alive:
            for number, machine in node.machines.items():
                group = node.host.groups.get(number)
                if group is not None and not group.installing:
                    machine.save()

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Counter[str]:
        """Raises Violation, or whatever a node raised. Returns what happened how often."""
        for name in self.names:
            self.nodes[name].start()
        self.later(0.5, self._propose)
        self.later(0.5, self._save)
        self.later(self.rnd.uniform(0.1, 3), self._fault)
        if self.options.changes:
            self.operator.start()
        self.run_until(self.now + self.options.seconds)
        self._heal()
        return self.counts

    def _leader(self, group: int) -> SimNode | None:
        return next((n for n in self.nodes.values() if n.alive and group in n.machines and n.machines[group].role is Role.LEADER),
                    None)

    def _machines(self, group: int) -> list[SimMachine]:
        """Of the members, as their leader knows them; empty if it is not known, or one of them has none yet."""
        leader = self._leader(group)
        if leader is None:
            return []
        configuration = leader.host.groups[group].configuration
        members = [self.nodes[n] for n in (*configuration.voters, *configuration.learners)]
        return [node.machines[group] for node in members] if all(group in node.machines for node in members) else []

    def _settled(self) -> bool:
        """Everybody has applied whatever was acknowledged."""
        return all((machines := self._machines(group)) and all(m.index >= max(acked.values(), default=0) for m in machines)
                   for group, acked in self.lost.acked.items())

    def _heal(self) -> None:
        """No more faults: everything must be up, agree, and go on."""
        self.calm = True
        self.lags.clear()
        self.run_until(self.now + 0.1)
        for node in self.nodes.values():
            node.sync_delay = 0.0
            node.disk.fails = False
            if not node.alive:
                node.start()
        for i, a in enumerate(self.names):
            for b in self.names[i + 1:]:
                self.network.disconnect(a, b)
        self._heal_links()
        last = self.now + HEAL_SECONDS
        probes: dict[int, bytes] = {}
        asked = [0.0]

        def agreed() -> bool:
            if self.now >= asked[0]:
                asked[0] = self.now + 1.0
                for group in range(self.options.groups):
                    self.operator.reconcile(group)
                    leader = self._leader(group)
                    if leader is not None and probes.get(group) not in self.lost.acked.get(group, {}):
                        probes[group] = self.propose(leader, group)
            return len(probes) == self.options.groups and all(n.alive and n.whole for n in self.nodes.values()) and all(
                probes[g] in self.lost.acked.get(g, {}) and (machines := self._machines(g)) and all(
                    m.contents.get(self.lost.acked[g][probes[g]]) == probes[g] for m in machines)
                for g in range(self.options.groups))
        if not self.run_until(last, agreed):
            states = [repr(g) for n in self.nodes.values() if n.alive for g in n.host.groups.values()]
            raise Violation(f"no progress {HEAL_SECONDS:.0f} s after everything was healed: {states}")
        self.counts["healed in ms"] += int((HEAL_SECONDS - (last - self.now)) * 1000)
        self.run_until(self.now + HEAL_SECONDS, self._settled)  # what was proposed before the probe's end, too
        for group in range(self.options.groups):
            machines = self._machines(group)
            if not machines:
                raise Violation(f"group {group} has no leader at the end")
            for machine in machines:
                self.lost.final(group, machine.contents, machine.node.name)
        self.configurations.final()
