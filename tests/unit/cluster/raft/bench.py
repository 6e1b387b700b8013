"""Replicas of one group on a bench: time is a variable, and links are queues that move only when told to.

Nothing ticks, syncs or travels by itself, so every interleaving can be built by hand. Messages take the real encoding.
"""
from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

from spillway.cluster.machine import Role
from spillway.cluster.raft import wire
from spillway.cluster.raft.group import RaftGroup
from spillway.cluster.raft.journal import JournalStore
from spillway.cluster.raft.progress import Limits
from spillway.cluster.raft.seam import LEADER, Timing, drive
from spillway.peer.v1.raft_pb2 import RaftGroupMessage

from tests.simulation.raft.disk import SimDisk

FAR = 1e18
PATIENT = Timing(fallback=FAR)  # a leader without answers stays: the bench decides


class Machine:
    """A GroupMachine that lists what it applied."""

    def __init__(self, durable: int = 0) -> None:
        self.durable = durable
        self.seen: list[tuple[int, int, bytes]] = []
        self.waiting: deque[bytes] = deque()
        self.roles: list[tuple[Role, int, str | None]] = []
        self.configurations: list[tuple[int, bytes]] = []
        self.reloads = 0

    def durable_index(self) -> int:
        """See GroupMachine."""
        return self.durable

    def apply(self, index: int, term: int, command: bytes) -> None:
        """See GroupMachine."""
        self.seen.append((index, term, command))

    def configured(self, index: int, term: int, configuration: bytes) -> None:
        """See GroupMachine."""
        self.configurations.append((index, configuration))

    def collect(self) -> bytes | None:
        """See GroupMachine."""
        return self.waiting.popleft() if self.waiting else None

    def role_changed(self, role: Role, term: int, leader: str | None) -> None:
        """See GroupMachine."""
        self.roles.append((role, term, leader))

    def reload(self) -> None:
        """See GroupMachine."""
        self.reloads += 1

    @property
    def commands(self) -> list[bytes]:
        """What it applied, without indexes."""
        return [c for _, _, c in self.seen]


class Replica:
    """One member."""

    def __init__(self, bench: Bench, name: str, disk: SimDisk, durable: int = 0) -> None:
        self.bench = bench
        self.name = name
        self.disk = disk
        self.machine = Machine(durable)
        self.out: list[tuple[str, bytes]] = []
        self.store = JournalStore(disk, "bench", name, lambda: "i")
        self.journal = self.store.journal(0, bench.limits.tail)
        self.group = RaftGroup(0, name, bench.founders if name in bench.founders else [], self.machine, self.journal, bench.timing,
                               bench.limits, self._send, bench)
        self.engine = self.group.engine
        self.engine.deadline = FAR

    def _send(self, peer: str, group: int, term: int, message: dict[str, Any]) -> None:
        self.out.append((peer, wire.encode(group, term, message).SerializeToString()))

    def sync(self) -> None:
        """The end of a turn: write, sync, send."""
        self.store.write()
        self.store.sync()
        self.store.synced()
        for peer, data in self.out:
            if peer in self.group._connected:
                self.bench.links[self.name, peer].append(data)
        self.out = []

    def turn(self) -> None:
        """A turn that nobody else takes part in."""
        self.bench.drive()
        self.group.tick()
        if not self.bench.calm_deadlines:
            self.engine.deadline = FAR
        self.group.collect()
        self.sync()

    @property
    def log(self) -> list[tuple[int, int]]:
        """(index, term) of every entry."""
        return [(e[1], e[2]) for e in self.journal[:]]


class Bench:
    """The members and the links between them, all connected."""

    def __init__(self, names: str = "ABC", timing: Timing = PATIENT, limits: Limits | None = None, founders: str = "") -> None:
        """`founders` are the first members; the other names have a blank replica."""
        self.names = list(names)
        self.founders = list(founders or names)
        self.timing = timing
        self.limits = limits or Limits()
        self.now = 10.0
        self.calm_deadlines = False
        self.links: defaultdict[tuple[str, str], deque[bytes]] = defaultdict(deque)
        self.drive()
        self.nodes = {n: Replica(self, n, SimDisk()) for n in self.names}
        for a in self.names:
            for b in self.names:
                if a < b:
                    self.join(a, b)

    def __getitem__(self, name: str) -> Replica:
        return self.nodes[name]

    def monotonic(self) -> float:
        """It is the replicas' Clock."""
        return self.now

    def drive(self) -> None:
        """Names the time to the library."""
        drive(self.now, lambda: 0.5)

    def join(self, a: str, b: str) -> None:
        """A new connection."""
        self.drive()
        for x, y in ((a, b), (b, a)):
            self.links[x, y].clear()
            if x in self.nodes:
                self.nodes[x].group.connected(y)
        for x in (a, b):
            if x in self.nodes:
                self.nodes[x].sync()

    def cut(self, a: str, b: str) -> None:
        """The connection breaks; what is under way is lost."""
        self.drive()
        for x, y in ((a, b), (b, a)):
            self.links[x, y].clear()
            if x in self.nodes:
                self.nodes[x].group.disconnected(y)
                self.nodes[x].engine.deadline = FAR

    def kill(self, name: str) -> Replica:
        """The process ends."""
        dead = self.nodes[name]
        for other in self.names:
            if other != name:
                self.cut(name, other)
        del self.nodes[name]
        return dead

    def move(self, sender: str, receiver: str, count: int = 1 << 30) -> int:
        """Delivers messages and ends the receiver's turn with a sync; returns how many."""
        moved = 0
        link = self.links[sender, receiver]
        while link and moved < count and receiver in self.nodes:
            self.drive()
            self.nodes[receiver].group.deliver(sender, wire.decode(RaftGroupMessage.FromString(link.popleft())))
            if not self.nodes[receiver].engine.transfer_pending:
                self.nodes[receiver].engine.deadline = FAR
            moved += 1
        if moved:
            self.nodes[receiver].sync()
        return moved

    def turn(self, *names: str, seconds: float = 0.11) -> None:
        """Time passes, then each has a turn."""
        self.now += seconds
        for name in names:
            self.nodes[name].turn()

    def settle(self, *names: str, rounds: int = 6) -> None:
        """Everybody talks to everybody for a while."""
        for _ in range(rounds):
            self.turn(*names)
            for a in names:
                for b in names:
                    if a != b:
                        self.move(a, b)

    def elect(self, who: str, *voters: str) -> None:
        """A campaign, pre-vote included, in which only these voters take part."""
        self.now += 3.0
        node = self.nodes[who]
        for _ in range(3):
            node.engine.deadline = -FAR
            node.turn()
            node.engine.deadline = FAR
            for voter in voters:
                self.move(who, voter)
                self.move(voter, who)
                if node.engine.state == LEADER:
                    return
        assert node.engine.state == LEADER, node.group

    def put(self, name: str, *commands: bytes) -> None:
        """Commands for a leader, in a turn of its own."""
        self.nodes[name].machine.waiting.extend(commands)
        self.turn(name)
