"""Elections, transfer, applying and restarting of one group, on the bench."""
from __future__ import annotations

import random
from pathlib import Path

import pytest
from spillway.cluster.errors import StoreRefused, UntestedLibrary
from spillway.cluster.machine import ENTRY_BYTES_MAX, Role
from spillway.cluster.raft import seam
from spillway.cluster.raft.group import FOLLOWER_ALIVE_SECONDS
from spillway.cluster.raft.journal import LogViolation
from spillway.cluster.raft.progress import Limits
from spillway.cluster.raft.seam import CANDIDATE, FOLLOWER, LEADER, Timing
from spillway.cluster.snapshots import RESUME_SECONDS

from tests.unit.cluster.raft.bench import FAR, Bench, Replica


def _led(names: str = "ABC", **options: object) -> Bench:
    bench = Bench(names, **options)  # type: ignore[arg-type]
    bench.elect(*names)
    bench.settle(*names)
    return bench


def _restart(bench: Bench, name: str, durable: int = 0) -> Replica:
    disk = bench.kill(name).disk
    disk.crash(random.Random(0))
    bench.drive()
    node = bench.nodes[name] = Replica(bench, name, disk, durable)
    for other in bench.names:
        if other != name and other in bench.nodes:
            bench.join(name, other)
    return node


def test_the_library_is_pinned(tmp_path: Path) -> None:
    """R4: another source is refused, loudly, with what to do."""
    seam.check()
    other = tmp_path / "syncobj.py"
    other.write_text("# another version")
    with pytest.raises(UntestedLibrary, match=r"install pysyncobj==0.3.17"):
        seam.check(str(other))


def test_a_leader_is_reported_once_its_first_entry_is_applied() -> None:
    """Role.LEADER comes after the no-op of the term, and nothing is collected before."""
    bench = Bench()
    a = bench["A"]
    a.machine.waiting.append(b"x")
    bench.elect("A", "B", "C")
    assert a.engine.state == LEADER
    assert a.machine.roles[-1][0] is Role.CANDIDATE
    assert a.machine.waiting
    bench.settle("A", "B", "C")
    assert a.machine.roles[-1] == (Role.LEADER, 1, "A")
    assert [n.machine.commands for n in bench.nodes.values()] == [[b"x"]] * 3


def test_one_entry_takes_one_round_trip() -> None:
    """Unloaded: the leader's sync, a hop, the follower's sync, a hop; an idle follower hears of the commit by a heartbeat."""
    bench = _led()
    a, b = bench["A"], bench["B"]
    a.machine.waiting.append(b"x")
    a.group.tick()
    a.group.collect()
    a.sync()
    bench.move("A", "B")
    bench.move("B", "A")
    a.group.tick()
    assert a.machine.commands == [b"x"]
    assert b.machine.commands == []
    bench.turn("A")
    bench.move("A", "B")
    b.group.tick()
    assert b.machine.commands == [b"x"]


def test_nobody_campaigns_without_a_promise_of_a_majority() -> None:
    """R13: a node that was cut off does not raise the term, so its return disturbs nobody."""
    bench = _led()
    c, term = bench["C"], bench["A"].engine.term
    bench.cut("A", "C")
    bench.cut("B", "C")
    for _ in range(20):
        c.engine.deadline = -FAR
        bench.turn("C", seconds=1)
    assert c.engine.state == FOLLOWER
    assert c.engine.term == term


def test_no_vote_against_a_leader_that_is_alive() -> None:
    """R13: a node whose link to the leader broke gets neither promise nor vote from those who hear the leader."""
    bench = _led()
    c, term = bench["C"], bench["A"].engine.term
    bench.cut("A", "C")
    for _ in range(5):
        bench.turn("A")
        bench.move("A", "B")
        bench.move("B", "A")
        c.engine.deadline = -FAR
        bench.turn("C", seconds=0.1)
        bench.move("C", "B")
        bench.move("B", "C")
    assert (c.engine.state, c.engine.term) == (FOLLOWER, term)
    bench["B"].group.deliver("C", {"type": "request_vote", "term": term + 1, "sender_term": term + 1, "last_log_index": 99,
                                   "last_log_term": term, "transfer": False})
    assert bench["B"].engine.term == term


def test_a_broken_connection_to_the_leader_shortens_the_wait() -> None:
    """A killed leader is replaced after tens of milliseconds, not after seconds."""
    bench = _led()
    b = bench["B"]
    bench.drive()
    b.engine.deadline = bench.now + 1.5
    b.group.disconnected("A")
    assert b.engine.deadline <= bench.now + 0.2


def test_a_leader_without_answers_steps_down() -> None:
    """R12: after about an election timeout, and it does not campaign at once."""
    bench = Bench(timing=Timing())
    bench.elect("A", "B", "C")
    for name in "BC":
        bench.links["A", name].clear()
    a = bench["A"]
    bench.calm_deadlines = True
    for _ in range(20):
        bench.turn("A", seconds=0.1)
    assert a.engine.state == FOLLOWER
    assert a.machine.roles[-1][0] is Role.FOLLOWER
    assert a.engine.deadline > bench.now


def test_leadership_moves_without_a_gap() -> None:
    """R15: proposals stop, the successor campaigns at once, although the leader is alive."""
    bench = _led()
    a, b = bench["A"], bench["B"]
    bench.drive()
    assert a.group.transfer("B")
    a.machine.waiting.append(b"late")
    a.group.collect()
    a.sync()
    assert a.machine.waiting, "proposals pause"
    bench.move("A", "B")
    b.turn()
    assert b.engine.state == CANDIDATE
    for peer in "AC":
        bench.move("B", peer)
        bench.move(peer, "B")
    assert b.engine.state == LEADER
    assert a.machine.roles[-1][0] is Role.FOLLOWER
    bench.settle("A", "B", "C")
    assert b.group.serving


def test_leadership_moves_when_all_is_answered() -> None:
    """What was proposed before a transfer is applied before the successor is asked to campaign: whoever waits for it gets its
    answer from the leader that took it, and none has to be told that the outcome is unknown."""
    bench = _led("ABCDE")
    a = bench["A"]
    bench.put("A", b"asked")
    bench.move("A", "B")
    bench.move("B", "A")
    assert a.engine.match_index("B") == a.journal.last
    assert a.group.transfer("B")
    bench.turn("A")
    bench.move("A", "B")
    assert not bench["B"].engine.transfer_pending and b"asked" not in a.machine.commands, "two of five have it"
    bench.move("A", "C")
    bench.move("C", "A")
    bench.turn("A")
    assert b"asked" in a.machine.commands
    bench.move("A", "B")
    bench["B"].turn()
    assert bench["B"].engine.state == CANDIDATE


def test_a_transfer_that_fails_ends() -> None:
    """Proposals go on after a bounded time."""
    bench = _led()
    a = bench["A"]
    bench.drive()
    assert a.group.transfer()
    assert not a.group.transfer("B"), "one at a time"
    for name in "BC":
        bench.links["A", name].clear()
    bench.turn("A", seconds=2.0)
    bench.put("A", b"x")
    assert not a.machine.waiting


def test_only_a_connected_member_can_take_over() -> None:
    """Transfers to strangers, to oneself and to the unreachable are refused."""
    bench = _led()
    bench.cut("A", "B")
    bench.drive()
    assert not any(bench["A"].group.transfer(to) for to in ("B", "A", "Z"))
    assert not bench["C"].group.transfer("A"), "not a leader"


def test_only_the_leader_of_the_term_may_ask_for_a_campaign() -> None:
    """timeout_now of anybody else is ignored."""
    bench = _led()
    c, term = bench["C"], bench["A"].engine.term
    for sender, of in (("B", term), ("A", term - 1), ("A", term + 1)):
        c.group.deliver(sender, {"type": "timeout_now", "term": of, "sender_term": of})
        assert not c.engine.transfer_pending


def test_an_oversize_command_stops_the_leader() -> None:
    """R14: entries stay below what the library would chunk; a machine that breaks the limit is a bug."""
    bench = _led()
    bench["A"].machine.waiting.append(bytes(ENTRY_BYTES_MAX))
    bench.settle("A", "B", "C")
    assert len(bench["C"].machine.commands[0]) == ENTRY_BYTES_MAX
    bench["A"].machine.waiting.append(bytes(ENTRY_BYTES_MAX + 1))
    with pytest.raises(LogViolation, match="at most"):
        bench.turn("A")


def test_two_leaders_in_a_term_stop() -> None:
    """An append of our own term while we lead is a bug."""
    bench = _led()
    with pytest.raises(LogViolation, match="own term"):
        bench["A"].group.deliver("B", {"type": "append_entries", "term": 1, "sender_term": 1, "round": 0, "prevLogIdx": 1,
                                       "prevLogTerm": 0, "entries": [], "commit_index": 1})


def test_a_raising_machine_is_not_hidden() -> None:
    """R3: the exception comes out, and the entry does not count as applied."""
    bench = _led()
    a = bench["A"]

    def boom(index: int, term: int, command: bytes) -> None:
        raise RuntimeError("bug")
    a.machine.apply = boom  # type: ignore[method-assign]
    before = a.engine.applied
    with pytest.raises(RuntimeError):
        bench.put("A", b"x")
        bench.settle("A", "B", "C")
    assert a.engine.applied == before


@pytest.mark.parametrize("durable", [0, 4, 6])
def test_a_restart_replays_from_the_durable_index_once(durable: int) -> None:
    """R6: each entry above the state's index is applied once, in order, and none below."""
    bench = _led()
    for i in range(5):
        bench.put("A", b"%d" % i)
        bench.settle("A", "B", "C", rounds=3)
    whole = bench["C"].machine.seen
    assert len(whole) == 5
    c = _restart(bench, "C", durable)
    bench.settle("A", "B", "C")
    assert c.machine.seen == [e for e in whole if e[0] > durable]


def test_a_state_beyond_the_log_is_refused() -> None:
    """R18: then acknowledged entries are missing here."""
    bench = _led()
    bench.put("A", b"x")
    bench.settle("A", "B", "C")
    with pytest.raises(StoreRefused, match=r"its log ends at .*replace this node by an empty one"):
        _restart(bench, "C", durable=99)


def test_a_lost_log_of_a_single_member_is_refused() -> None:
    """R18: a cluster of one with a state and no log says what to do."""
    bench = Bench("A")
    bench["A"].turn()
    bench.nodes["A"].disk.durable.clear()
    with pytest.raises(StoreRefused, match="its log is lost: restore both from a backup"):
        _restart(bench, "A", durable=5)


def test_a_single_member_commits_only_what_is_synced() -> None:
    """Finding 8: no special mode, and no entry is applied in the turn that adds it."""
    bench = Bench("A")
    a = bench["A"]
    a.engine.deadline = -FAR
    bench.drive()
    a.group.tick()
    assert a.engine.state == LEADER
    assert not a.group.serving, "its first entry is not on disk yet"
    a.sync()
    a.turn()
    assert a.group.serving
    a.machine.waiting.append(b"x")
    a.group.tick()
    a.group.collect()
    a.group.tick()
    assert a.machine.commands == []
    a.sync()
    a.group.tick()
    assert a.machine.commands == [b"x"]


def test_a_slow_follower_is_sent_a_window_at_a_time() -> None:
    """Memory stays bounded: no more than the window is under way, and everything arrives, once."""
    bench = _led(limits=Limits(append=2_000, window=4_000))
    bench.put("A", *[b"%03d" % i + b"x" * 900 for i in range(40)])
    for _ in range(60):
        assert sum(map(len, bench.links["A", "B"])) < 8_000
        bench.move("A", "B", 1)
        bench.move("B", "A")
        bench.move("A", "C")
        bench.move("C", "A")
    bench.settle("A", "B", "C", rounds=3)
    assert bench["B"].machine.seen == bench["A"].machine.seen
    assert len(bench["B"].machine.seen) == 40


def test_a_long_replay_takes_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3, finding 23: applying is bounded per turn, so that other groups get theirs."""
    from spillway.cluster.raft import group as group_module
    monkeypatch.setattr(group_module, "APPLY_BYTES_PER_TURN", 3_000)
    bench = _led()
    bench.put("A", *[b"x" * 1_000 for _ in range(10)])
    for peer in "BC":
        bench.move("A", peer)
        bench.move(peer, "A")
    a = bench["A"]
    bench.turn("A")
    assert 0 < len(a.machine.commands) < 10
    assert a.group.behind
    for _ in range(6):
        bench.turn("A")
    assert len(a.machine.commands) == 10


def test_a_stall_is_no_silence_of_the_leader() -> None:
    """After a pause of our own, messages are read before anybody campaigns."""
    bench = _led()
    b = bench["B"]
    b.engine.deadline = bench.now + 0.5
    b.group.stalled(3.0)
    assert b.engine.deadline == bench.now + 3.5


def test_a_dead_follower_holds_no_log() -> None:
    """R5: the leader compacts; the follower is offered a snapshot when it is back."""
    bench = _led()
    bench.kill("C")
    a = bench["A"]
    for i in range(20):
        bench.put("A", b"%d" % i)
        bench.settle("A", "B", rounds=2)
    a.machine.durable = a.engine.applied
    bench.drive()
    assert a.group.compact(keep_bytes=0) > 10
    assert len(a.journal) == 2


class Fetching:
    """C is behind the log of A, which goes on all the time and keeps no more of it than it must."""

    def __init__(self, **limits: int) -> None:
        self.bench = _led(limits=Limits(append=2_000, window=4_000, **limits))
        self.a, self.c = self.bench["A"], self.bench["C"]
        for other in "AB":
            self.bench.cut(other, "C")
        self.traffic(10, "AB")
        self.bench.join("A", "C")
        self.bench.settle("A", "B", "C", rounds=2)
        assert self.c.group.installing
        self.c.group.fetch_from = None
        self.index, self.term = self.a.engine.applied, self.a.engine.term

    def traffic(self, count: int, names: str = "ABC") -> None:
        """Entries of about 1 KB, each saved at once."""
        for _ in range(count):
            self.bench.put("A", b"x" * 900)
            self.bench.settle(*names, rounds=2)
            self.a.machine.durable = self.a.engine.applied
            self.bench.drive()
            self.a.group.compact(keep_bytes=0)

    def send(self, size: int, begins: bool = False) -> None:
        """A node sends so much of a snapshot."""
        self.bench.drive()
        self.a.group.exported("C", size, self.index if begins else None)

    def install(self) -> None:
        """The snapshot has come."""
        self.bench.drive()
        self.c.group.installed(self.index, self.term, None)
        self.c.sync()


def test_a_follower_that_took_a_snapshot_goes_on_by_the_log() -> None:
    """R5, R16: it is kept from the moment of the snapshot until the follower has it, however much there is meanwhile; then it goes."""
    world = Fetching()
    world.send(1, begins=True)
    world.traffic(40)
    assert world.a.journal.first <= world.index
    world.install()
    world.traffic(60)
    assert not world.c.group.installing
    applied = [i for i, _, _ in world.c.machine.seen if i > world.index]
    assert applied == list(range(world.index + 1, world.c.engine.applied + 1))
    assert world.c.engine.applied >= world.a.engine.applied - 1  # the last commit comes with the next heartbeat
    world.traffic(1)
    assert world.a.journal.bytes < 10_000


def test_a_lost_connection_does_not_cost_the_log_of_a_snapshot() -> None:
    """The transfer goes on over the next connection, with the state of its moment: the log is needed from there, also while the
    follower is gone for a while."""
    world = Fetching()
    world.send(1, begins=True)
    world.bench.cut("A", "C")
    world.bench.now += FOLLOWER_ALIVE_SECONDS + 1
    world.traffic(10, "AB")
    world.bench.join("A", "C")
    world.send(1)
    world.traffic(10)
    world.install()
    world.traffic(20)
    assert not world.c.group.installing
    assert world.c.engine.applied >= world.a.engine.applied - 1


def test_the_log_that_is_held_for_a_snapshot_is_bounded() -> None:
    """R5: by a number, and beyond it by what was sent of the snapshot: a transfer that takes long needs more, but never as much as
    it would cost to send the state again. A transfer that begins anew needs only what comes after its own moment."""
    world = Fetching(hold=20_000)
    world.send(1, begins=True)
    for sent in (0, 15_000):
        world.send(sent)
        world.traffic(15)
        assert world.a.journal.first <= world.index
    world.index = world.a.machine.durable
    world.send(1, begins=True)
    world.traffic(1)
    assert world.a.journal.first == world.index
    world.traffic(30)
    assert world.a.journal.first > world.index
    assert world.a.journal.bytes < 10_000


def test_a_follower_that_dies_in_a_snapshot_holds_no_log() -> None:
    """R5: after a while."""
    world = Fetching()
    world.send(1, begins=True)
    for other in "AB":
        world.bench.cut(other, "C")
    world.bench.now += RESUME_SECONDS + 1
    world.traffic(1, "AB")
    assert world.a.journal.bytes < 3_000


def test_a_slow_follower_catches_up_by_the_log() -> None:
    """R5: as long as it answers, and within the bound: the log costs less than the state."""
    for hold, by_log in ((1 << 20, True), (10_000, False)):
        bench = _led(limits=Limits(append=2_000, window=4_000, hold=hold))
        a, c = bench["A"], bench["C"]
        for _ in range(30):
            bench.put("A", b"x" * 900)
            bench.settle("A", "B", rounds=2)
            bench.move("A", "C", 1)  # half as fast as what comes
            bench.move("C", "A")
            a.machine.durable = a.engine.applied
            bench.drive()
            a.group.compact(keep_bytes=0)
        bench.settle("A", "B", "C", rounds=40)
        assert (c.engine.applied >= a.engine.applied - 1) is by_log
        assert c.group.installing is not by_log


def test_the_librarys_unsafe_parts_are_out_of_reach() -> None:
    """R9, R10d, R16: commands, membership changes and dumps of the library raise instead of doing something."""
    engine = _led()["A"].engine
    for call in (lambda: engine._applyCommand(b"x", None), lambda: engine._SyncObj__doApplyCommand(b"x"),
                 lambda: engine._SyncObj__parseChangeClusterRequest(b"\2"), lambda: engine._SyncObj__loadDumpFile(True)):
        with pytest.raises(LogViolation, match="must not be used"):
            call()
