"""The host: one turn, one sync, then send; who leads; snapshots, failures and stopping."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from spillway.cluster.errors import ChangeRefused, SnapshotInvalid, StorageFailed, StoreRefused
from spillway.cluster.machine import Role
from spillway.cluster.raft import host as host_module
from spillway.cluster.raft.configuration import Change, ChangeKind, Configuration
from spillway.cluster.raft.host import RaftHost
from spillway.cluster.raft.journal import JournalStore
from spillway.cluster.raft.progress import Limits
from spillway.cluster.raft.seam import Timing
from spillway.cluster.snapshots import Position
from spillway.cluster.transport.memory import MemoryNetwork, MemoryTransport

from tests.simulation.raft.checkers import Violation
from tests.simulation.raft.disk import SimDisk
from tests.simulation.raft.mutations import SEEN
from tests.simulation.raft.world import Options, World
from tests.unit.cluster.raft.bench import Machine

QUICK = Timing(heartbeat=0.01, election_min=0.05, election_max=0.1, fallback=0.1, lost_min=0.005, lost_max=0.02)


def _calm(nodes: int = 3, **options: Any) -> World:
    """A simulated cluster without faults, with a leader."""
    world = World(1, Options(nodes=nodes, **options))
    for name in world.names:
        world.nodes[name].start()
    assert world.run_until(world.now + 10, lambda: all(
        any(n.machines[g].role is Role.LEADER for n in world.nodes.values()) for g in range(world.options.groups)))
    return world


def _leader(world: World, group: int = 0) -> Any:
    return next(n for n in world.nodes.values() if n.alive and n.machines[group].role is Role.LEADER)


# -- the turn ----------------------------------------------------------------------------------------------------


def test_nothing_leaves_before_the_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: what a turn has to send is released by `finish`, and `finish` follows `sync`."""
    world = _calm()
    node = _leader(world)
    sent: list[str] = []
    monkeypatch.setattr(node.transport, "send", lambda peer, epoch, frame: sent.append(peer))
    world.run_until(world.now + 0.5, lambda: not node.busy)
    world.propose(node, 0)
    assert node.host.begin(world.now) > 0
    assert node.host._out
    assert sent == []
    node.host.sync()
    assert sent == []
    node.host.finish()
    assert len(sent) == 2


def test_one_write_and_one_sync_for_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: entries of all groups share a batch."""
    world = _calm(nodes=1, groups=2)
    node = world.nodes["n0"]
    world.run_until(world.now + 1)
    for group in range(2):
        world.propose(node, group)
    writes: list[int] = []
    write = node.disk.write
    monkeypatch.setattr(node.disk, "write", lambda batch: (writes.append(len(batch.changes)), write(batch)))
    node.host.turn(world.now)
    assert writes == [2]


def test_the_scheduler_runs_between_applies_and_proposals() -> None:
    """`before_collect` sees what the turn applied, and what it hands out goes into the same turn's entry."""
    world = _calm(nodes=1)
    node = world.nodes["n0"]
    world.run_until(world.now + 1)
    machine = node.machines[0]
    world.propose(node, 0)
    node.host.turn(world.now)
    seen: list[int] = []

    def schedule() -> None:
        seen.append(len(machine.contents))
        machine.waiting.append(b"granted")
        node.host.wake(0)
    node.host.before_collect = schedule
    node.host.turn(world.now)
    assert seen == [1]
    assert node.host.groups[0].journal[-1][0] == b"\0granted"


def test_frames_of_an_older_connection_are_dropped() -> None:
    """R8: also those that had arrived before it broke."""
    def delivered() -> list[str]:
        world = _calm()
        node, taken = world.nodes["n0"], []
        frames: list[bytes] = []
        other = world.nodes["n1"]
        other.transport.send = lambda peer, epoch, frame: frames.append(frame) if peer == "n0" else None
        world.run_until(world.now + 2, lambda: bool(frames))
        epoch = node.host._epochs["n1"]
        node.host._deliver = lambda peer, *rest: taken.append(peer)  # type: ignore[method-assign]
        node.host._on_frame("n1", epoch - 1, frames[0])  # late
        node.host._on_frame("n1", epoch, frames[0])  # in time, but the connection breaks before the turn
        node.host._on_disconnected("n1", epoch)
        node.host.begin(world.now)
        return taken
    assert delivered() == []
    with SEEN["any epoch"]():
        assert delivered() == ["n1", "n1"]


def test_messages_of_a_turn_do_not_go_into_a_new_connection() -> None:
    """R8, on the sender's side: the connection changed while the turn was synced."""
    world = _calm()
    node = _leader(world)
    peer = next(n for n in world.names if n != node.name)
    world.run_until(world.now + 0.5, lambda: not node.busy)
    world.propose(node, 0)
    node.host.begin(world.now)
    node.busy = True
    assert peer in node.host._out
    world.network.disconnect(node.name, peer)
    world.network.connect(node.name, peer)
    sent: list[str] = []
    node.transport.send = lambda to, epoch, frame: sent.append(to)
    node.host.sync()
    node.host.finish()
    assert peer not in sent


def test_a_frame_of_unknown_shape_closes_the_connection() -> None:
    """R7: nothing of it is delivered, and the cluster goes on with a new connection."""
    world = _calm()
    before = world.nodes["n0"].host._epochs["n1"]
    MemoryTransport.send(world.nodes["n1"].transport, "n0", world.nodes["n1"].host._epochs["n0"], b"\xff\xff")
    world.run_until(world.now + 0.1)
    assert "n1" not in world.nodes["n0"].host._epochs
    world.network.connect("n0", "n1")
    assert world.nodes["n0"].host._epochs["n1"] > before


def test_an_idle_follower_learns_of_the_commit_within_a_heartbeat() -> None:
    """No extra message per commit, and no lasting lag."""
    world = _calm()
    node = _leader(world)
    command = world.propose(node, 0)
    assert world.run_until(world.now + 0.3, lambda: all(
        command in n.machines[0].contents.values() for n in world.nodes.values()))


def test_much_for_one_peer_takes_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame is bounded, whatever a turn has to say; order is kept."""
    monkeypatch.setattr(host_module.wire, "FRAME_BYTES_SOFT_MAX", 200)
    world = _calm(limits=Limits(append=100, window=1 << 20))
    node = _leader(world)
    frames: list[bytes] = []
    send = node.transport.send
    monkeypatch.setattr(node.transport, "send", lambda peer, epoch, frame: (frames.append(frame), send(peer, epoch, frame)))
    commands = [world.propose(node, 0) for _ in range(40)]
    assert world.run_until(world.now + 1, lambda: all(
        commands[-1] in n.machines[0].contents.values() for n in world.nodes.values()))
    assert max(map(len, frames)) < 600
    other = next(n for n in world.nodes.values() if n is not node)
    assert [c for c in other.machines[0].contents.values() if c in commands] == commands


def test_idle_groups_are_ticked_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: turns of one group cost the others nothing."""
    world = _calm(nodes=1, groups=2)
    node = world.nodes["n0"]
    world.run_until(world.now + 1, lambda: not node.busy)
    ticks: list[float] = []
    monkeypatch.setattr(node.host.groups[1], "tick", lambda: ticks.append(world.now))
    for i in range(100):
        node.host.wake(0)
        node.host.turn(world.now + i * 0.01)
    assert 15 <= len(ticks) <= 21


# -- who leads ---------------------------------------------------------------------------------------------------


class OnThree(RaftHost):
    """Group 0 on the first three nodes only."""

    def add_group(self, group: int, members: list[str], machine: Any) -> None:
        """See RaftHost."""
        if self.node_id != "n3":
            super().add_group(group, members[:3], machine)


def test_leaders_are_known_where_there_is_no_replica() -> None:
    """leader_of and on_leadership work for groups without a replica here, and forget who is gone."""
    world = World(3, Options(nodes=4))
    heard: list[tuple[int, str | None, int]] = []
    for name in world.names:
        world.nodes[name].host_class = OnThree  # type: ignore[misc]
        world.nodes[name].start()
    last = world.nodes["n3"].host
    last.on_leadership(lambda group, leader, term: heard.append((group, leader, term)))
    assert last.leader_of(0) == (None, 0)
    world.run_until(world.now + 10, lambda: last.leader_of(0)[0] is not None)
    leader = _leader(world)
    assert last.leader_of(0) == (leader.name, leader.host.groups[0].engine.term)
    assert heard[-1] == (0, leader.name, leader.host.groups[0].engine.term)
    leader.stop()
    world.run_until(world.now + 0.01, lambda: not last._input)
    last.begin(world.now)
    last.finish()
    assert last.leader_of(0)[0] is None
    world.run_until(world.now + 10, lambda: last.leader_of(0)[0] is not None)
    assert last.leader_of(0)[0] != leader.name


def test_a_later_term_is_believed() -> None:
    """A replica that is no member any more and was not told follows a leader of before, for ever if that one is gone; who announces a
    later term is the one to ask."""
    world = _calm()
    follower = next(n for n in world.nodes.values() if n.host.groups[0].role is Role.FOLLOWER)
    leader, term = follower.host.leader_of(0)
    other = next(name for name in world.names if name not in (leader, follower.name))
    follower.host._claims.take(other, [(0, term)], False)
    assert follower.host.leader_of(0) == (leader, term)
    follower.host._claims.take(other, [(0, term + 1)], False)
    assert follower.host.leader_of(0) == (other, term + 1)


def test_status_names_every_replica() -> None:
    """For people and metrics."""
    world = _calm()
    node = _leader(world)
    status = node.host.status()[0]
    assert node.host.status_of(0) == status and node.host.status_of(99) is None
    assert (status.role, status.leader, status.term) == (Role.LEADER, node.name, node.host.groups[0].engine.term)
    assert status.log_first_index <= status.applied_index <= status.commit_index <= status.log_last_index
    assert "leads 1" in repr(node.host)


def test_a_killed_leader_is_replaced_soon() -> None:
    """A broken connection is not waited for as silence is: half a second, not two."""
    world = _calm()
    leader = _leader(world)
    began = world.now
    leader.stop()
    assert world.run_until(began + 5, lambda: any(
        n.alive and n.machines[0].role is Role.LEADER for n in world.nodes.values()))
    assert world.now - began < 1.0


# -- starting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flipped", [True, False])
def test_an_interrupted_snapshot_is_finished_at_the_next_start(flipped: bool) -> None:
    """R16: a crash between the state and the log leaves the new state with a log to match, or the old one."""
    world = _calm()
    node = next(n for n in world.nodes.values() if n.machines[0].role is not Role.LEADER)
    world.run_until(world.now + 0.5, lambda: not node.busy)
    journal = node.host.groups[0].journal
    journal.begin_install(node.host.groups[0].engine.applied)
    node.host.store.write()
    node.host.store.sync()
    if flipped:
        node.saved[0] = (500, 1, {500: b"s"}, (400, Configuration.of(["n0", "n1"]).encode()))
    node.stop()
    node.start()
    journal = node.host.groups[0].journal
    assert journal.install_above is None
    assert (journal.first == journal.last == 500) is flipped
    assert (journal.configuration_index == 400) is flipped


def test_a_node_that_lost_its_disk_comes_back() -> None:
    """R18: by itself, under its old name, and says so meanwhile."""
    world = _calm()
    node = next(n for n in world.nodes.values() if n.machines[0].role is not Role.LEADER)
    node.stop()
    node.wipe()
    node.start()
    roles: set[Role] = set()

    def back() -> bool:
        if 0 in node.host.groups:
            roles.add(node.host.groups[0].role)
        return bool(node.whole)
    assert world.run_until(world.now + 10, back)
    assert Role.RECOVERING in roles
    assert node.host.hello().formed
    assert node.host.hello().founders == {}


def test_what_is_founded_is_on_the_disk_with_the_row_that_says_so() -> None:
    """A crash in between would leave a node that took part, and has no replicas."""
    world = World(1, Options(nodes=1))
    node, = world.nodes.values()
    node.start()
    node.stop()
    store = JournalStore(node.disk, "sim", "n0")
    assert store.node.formed and store.has_replica(0)


def _lead(world: World, name: str, group: int = 0) -> None:
    node = world.nodes[name]
    assert world.run_until(world.now + 20, lambda: group in node.machines and node.machines[group].role is Role.LEADER)


def _change(world: World, leader: str, kind: ChangeKind, name: str) -> int:
    """Until it is made and committed; returns the entry's index."""
    host, made = world.nodes[leader].host, []

    def done(what: int | ChangeRefused) -> None:
        if isinstance(what, int):
            made.append(what)
        else:
            world.later(0.1, propose)

    def propose() -> None:
        host.propose_change(0, Change(kind, name), done)
        world.nodes[leader].kick()
    propose()
    assert world.run_until(world.now + 20, lambda: bool(made) and host.groups[0].engine.commit >= made[0])
    return made[0]


def test_a_replica_that_never_became_a_member_is_dropped() -> None:
    """It joined, and the change came to nothing; a member stays, whatever it is told of."""
    world = World(1, Options(nodes=1, spares=1))
    founder, spare = world.nodes["n0"], world.nodes["n1"]
    founder.start()
    spare.start()
    _lead(world, "n0")
    spare.join(0)
    assert world.run_until(world.now + 1, lambda: 0 in spare.host.groups)
    for node in founder, spare:
        node.host.drop_group(0, 0, 0)
        node.kick()
    assert world.run_until(world.now + 1, lambda: 0 not in spare.machines)
    world.run_until(world.now + 1)
    assert founder.machines[0].role is Role.LEADER


def test_a_replica_that_became_a_member_in_vain_is_dropped() -> None:
    """The leader that added it was deposed before that was committed: it goes by an entry that the group does not have."""
    world = World(1, Options(nodes=3, spares=1))
    for node in world.nodes.values():
        node.start()
    spare = world.nodes["n3"]
    assert world.run_until(world.now + 20, lambda: any(m.role is Role.LEADER for n in world.nodes.values() for m in n.machines.values()))
    leader = _leader(world)
    added = _change(world, leader.name, ChangeKind.ADD_LEARNER, "n3")
    spare.join(0)
    assert world.run_until(world.now + 20, lambda: 0 in spare.host.groups and "n3" in spare.host.groups[0].configuration)
    for by, upto in ((0, added - 1), (added, added)):  # it may have been added behind; it is what it goes by
        spare.host.drop_group(0, by, upto)
        spare.kick()
        world.run_until(world.now + 1)
        assert 0 in spare.host.groups
    spare.host.drop_group(0, 0, added)
    spare.kick()
    assert world.run_until(world.now + 1, lambda: 0 not in spare.host.groups)


def test_a_replica_that_is_being_dropped_is_none(tmp_path: Path) -> None:
    """Also on a node that lost its disk and is only recovering, to which the founders' list says that it has one: it would be dropped
    twice, the second time beneath a new one."""
    store = JournalStore(tmp_path, "c", "n0")
    network = MemoryNetwork(lambda seconds, action: None, lambda: 0.0)
    host = RaftHost("n0", ["n0", "n1"], store, MemoryTransport(network, "n0", lambda: host.hello()))
    assert store.founding and host.has_replica(3, ["n0", "n1"])
    store.drop(3)
    assert not host.has_replica(3, ["n0", "n1"]) and host.ended() == [3]
    store.close()


def _return() -> None:
    """A node that was the only voter once is removed and comes back with an empty log. The log that it gets ends where it was the only
    voter, and it is alone for a while."""
    world = World(1, Options(nodes=1, spares=1, limits=Limits(append=1, window=1)))
    first, second = world.nodes["n0"], world.nodes["n1"]
    first.start()
    second.start()
    _lead(world, "n0")
    past = _change(world, "n0", ChangeKind.ADD_LEARNER, "n1")
    second.join(0)
    _change(world, "n0", ChangeKind.PROMOTE, "n1")
    assert first.host.transfer(0, "n1")
    _lead(world, "n1")
    _change(world, "n1", ChangeKind.REMOVE, "n0")
    assert world.run_until(world.now + 10, lambda: 0 not in first.machines)
    _change(world, "n1", ChangeKind.ADD_LEARNER, "n0")
    first.join(0)
    assert world.run_until(world.now + 1, lambda: 0 in first.host.groups)

    def there() -> bool:
        journal = first.host.groups[0].journal
        return journal.configuration_index == past <= journal.synced
    assert world.run_until(world.now + 10, there)
    second.stop()
    first.stop()
    first.start()
    assert there()
    assert not world.run_until(world.now + 10, lambda: first.machines[0].role is Role.LEADER)
    second.start()
    assert world.run_until(world.now + 20, lambda: first.machines[0].role is Role.FOLLOWER)
    assert first.host.groups[0].configuration == Configuration(("n1",), ("n0",))


def test_a_returned_member_does_not_go_by_its_past() -> None:
    """R17: it is silent until it is admitted. Else it would lead, beside the others."""
    _return()
    with SEEN["joiner is fresh"](), pytest.raises(Violation, match="is committed in terms"):
        _return()


# -- run, on a real loop -----------------------------------------------------------------------------------------


class Snapshots:
    """A SnapshotStore of one Machine's list."""

    def __init__(self, machine: Machine, failures: int = 0) -> None:
        self.machine = machine
        self.failures = failures
        self.installed = 0

    async def export(self, group: int, peer: str, position: Position | None) -> AsyncGenerator[bytes, None]:
        """See SnapshotStore."""
        for index, term, command in self.machine.seen[:]:
            yield b"%d %d " % (index, term) + command

    def configuration(self, group: int) -> tuple[int, bytes] | None:
        """See SnapshotStore."""
        return None

    async def install(self, group: int, peer: str, fetch: Callable[[Position | None], AsyncIterator[bytes]],
                      above: int) -> tuple[int, int]:
        """See SnapshotStore."""
        rows = []
        async for chunk in fetch(None):
            index, term, command = chunk.split(b" ", 2)
            rows.append((int(index), int(term), command))
        if self.failures:
            self.failures -= 1
            raise SnapshotInvalid("it broke off")
        if not rows or rows[-1][0] <= above:
            raise SnapshotInvalid("too old")
        self.machine.seen = rows
        self.machine.durable = rows[-1][0]
        self.installed += 1
        return rows[-1][:2]

    def applied(self, group: int) -> tuple[int, int]:
        """See SnapshotStore."""
        return self.machine.seen[-1][:2] if self.machine.seen else (0, 0)


class Running:
    """Hosts on the test's loop."""

    def __init__(self, names: str, limits: Limits | None = None, failures: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self.network = MemoryNetwork(loop.call_later, loop.time)
        self.names = list(names)
        self.machines = {n: Machine() for n in self.names}
        self.snapshots = {n: Snapshots(self.machines[n], failures) for n in self.names}
        self.disks = {n: SimDisk() for n in self.names}
        self.limits = limits
        self.errors: list[BaseException] = []
        self.hosts: dict[str, RaftHost] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, *names: str) -> None:
        """Runs hosts."""
        for name in names or self.names:
            store = JournalStore(self.disks[name], "c", name)
            transport = MemoryTransport(self.network, name, lambda n=name: self.hosts[n].hello(),  # type: ignore[misc]
                                        lambda group, peer, position, n=name: self.hosts[n].export(group, peer, position))  # type: ignore[misc]
            host = self.hosts[name] = RaftHost(name, self.names, store, transport, self.snapshots[name], QUICK, self.limits,
                                               fatal=self.errors.append)
            host.add_group(0, self.names, self.machines[name])
            self.tasks[name] = asyncio.get_running_loop().create_task(host.run())

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits, bounded."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.001)

    def leader(self) -> str | None:
        """Who leads."""
        return next((n for n, h in self.hosts.items() if 0 in h.groups and h.groups[0].serving and not self.tasks[n].done()),
                    None)

    async def put(self, *commands: bytes) -> None:
        """Proposes, and waits until the leader applied it."""
        await self.until(self.leader)
        name = self.leader()
        assert name is not None
        self.machines[name].waiting.extend(commands)
        self.hosts[name].wake(0)
        await self.until(lambda: commands[-1] in self.machines[name].commands)

    async def stop(self) -> None:
        """Ends all."""
        for host in self.hosts.values():
            await host.stop(0)
        await asyncio.gather(*self.tasks.values())


@pytest.mark.parametrize("threshold", [1 << 20, 0], ids=["inline", "in a thread"])
@pytest.mark.parametrize("names", ["A", "ABC"])
async def test_hosts_run(names: str, threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node or three, the same path; with syncs in a thread, too."""
    monkeypatch.setattr(host_module, "INLINE_SYNC_BYTES", threshold)
    running = Running(names)
    running.start()
    await running.put(b"x", b"y")
    await running.until(lambda: all(m.commands == [b"x", b"y"] for m in running.machines.values()))
    await running.stop()
    assert running.errors == []


async def test_stopping_hands_leadership_over() -> None:
    """R15: planned stops cost no election timeout, and nothing proposed is lost."""
    running = Running("ABC")
    running.start()
    await running.put(b"x")
    old = running.leader()
    assert old is not None
    await running.hosts[old].stop()
    await running.tasks[old]
    assert not running.hosts[old].groups[0].serving
    await running.until(lambda: running.leader() not in (None, old))
    await running.put(b"y")
    await running.stop()
    assert running.errors == []


async def test_a_follower_behind_the_log_fetches_a_snapshot() -> None:
    """R16: also when the first attempts break off."""
    running = Running("ABC", Limits(keep=0), failures=2)
    running.start()
    await running.put(b"first")
    leader = running.leader()
    assert leader is not None
    late = next(n for n in running.names if n != leader)
    await running.hosts[late].stop(0)
    await running.tasks[late]
    running.network.leave(running.hosts[late].transport)  # type: ignore[arg-type]
    await running.put(*[b"%d" % i for i in range(20)])
    others = [n for n in running.names if n != late]  # whoever of them leads then
    await running.until(lambda: all(running.machines[n].commands[-1:] == [b"19"] for n in others))
    for name in others:
        running.machines[name].durable = running.hosts[name].groups[0].engine.applied
    await running.until(lambda: all(running.hosts[n].groups[0].journal.first > 10 for n in others))
    saved = running.machines[late].seen
    running.machines[late] = running.snapshots[late].machine = Machine()
    running.machines[late].seen, running.machines[late].durable = saved, running.hosts[late].groups[0].engine.applied
    running.start(late)
    await running.until(lambda: running.snapshots[late].installed)
    await running.put(b"last")
    await running.until(lambda: running.machines[late].commands == running.machines[leader].commands)
    assert running.machines[late].reloads == 1
    await running.stop()
    assert running.errors == []


async def test_a_failing_sync_is_fatal() -> None:
    """R18: one failed sync and nothing is sent or applied any more; the process is told to end."""
    running = Running("A")
    running.start()
    await running.put(b"x")
    running.disks["A"].fails = True
    running.machines["A"].waiting.append(b"y")
    running.hosts["A"].wake(0)
    await running.tasks["A"]
    assert [type(e) for e in running.errors] == [StorageFailed]
    assert running.machines["A"].commands == [b"x"]
    assert running.hosts["A"].failed is running.errors[0]


async def test_a_raising_machine_is_fatal() -> None:
    """R3: the process stops rather than diverge."""
    running = Running("A")
    running.start()
    await running.put(b"x")

    def boom(index: int, term: int, command: bytes) -> None:
        raise RuntimeError("a bug")
    running.machines["A"].apply = boom  # type: ignore[method-assign]
    running.machines["A"].waiting.append(b"y")
    running.hosts["A"].wake(0)
    await running.tasks["A"]
    assert [str(e) for e in running.errors] == ["a bug"]


async def test_a_cluster_of_one_without_its_log_refuses() -> None:
    """R18: and marks nothing as formed."""
    running = Running("A")
    running.machines["A"].durable = 7
    running.start()
    await running.tasks["A"]
    assert isinstance(running.errors[0], StoreRefused)
    assert "restore both from a backup" in str(running.errors[0])
    assert not running.hosts["A"].store.node.formed


async def _one_life(path: Path, machine: Machine, command: bytes, count: int) -> list[BaseException]:
    loop = asyncio.get_running_loop()
    errors: list[BaseException] = []
    store = JournalStore(path, "c", "A")
    transport = MemoryTransport(MemoryNetwork(loop.call_later, loop.time), "A", lambda: host.hello())
    host = RaftHost("A", ["A"], store, transport, timing=QUICK, fatal=errors.append)
    host.add_group(0, ["A"], machine)
    task = loop.create_task(host.run())
    machine.waiting.append(command)
    host.wake(0)
    async with asyncio.timeout(60):
        while len(machine.seen) < count:
            await asyncio.sleep(0.001)
    await host.stop()
    await task
    store.close()
    return errors


async def test_hosts_run_on_rocksdb(tmp_path: Path) -> None:
    """The real disk: what was committed is there after a restart."""
    for life, commands in enumerate(([b"0"], [b"0", b"1"]), 1):
        machine = Machine()
        assert await _one_life(tmp_path / "log", machine, commands[-1], life) == []
        assert machine.commands == commands
