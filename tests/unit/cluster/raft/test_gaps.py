"""The library's gaps, each as an interleaving built by hand: closed by the adapter, and open again without its rule."""
from __future__ import annotations

import random

import pytest
from spillway.cluster.machine import Role
from spillway.cluster.raft import wire
from spillway.cluster.raft.journal import LogViolation
from spillway.cluster.raft.progress import Limits
from spillway.peer.v1.raft_pb2 import RaftGroupMessage

from tests.simulation.raft.mutations import SEEN
from tests.unit.cluster.raft.bench import Bench, Replica

SMALL = Limits(append=25_000, window=1 << 30)


def _resent_twice(bench: Bench) -> set[bytes]:
    """A reconnect whose follower answers `reset` twice; of the second resend only the first append arrives, then the leader
    dies. Returns acknowledged commands that its successor lacks."""
    a, b = bench["A"], bench["B"]
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    bench.cut("A", "C")
    bench.cut("B", "C")
    bench.cut("A", "B")
    bench.put("A", *[b"%d" % i + b"p" * 10_000 for i in range(20)])
    bench.join("A", "B")
    bench.links["A", "B"].clear()
    bench.drive()
    a.engine.set_next_index("B", a.journal.last + 1)  # as if they had been sent into the old connection
    bench.turn("A")
    bench.turn("A")  # two heartbeats
    bench.move("A", "B")  # B: reset, reset
    bench.move("B", "A", 1)  # A sends everything, in small appends
    bench.move("A", "B")  # B stores and acknowledges all
    bench.move("B", "A", 1)  # the second reset
    bench.move("B", "A")
    bench.turn("A")
    acked = set(a.machine.commands)
    assert len(acked) == 20
    bench.links["A", "B"] = type(bench.links["A", "B"])(list(bench.links["A", "B"])[:1])
    bench.move("A", "B")
    bench.kill("A")
    bench.join("B", "C")
    bench.elect("B", "C")
    bench.settle("B", "C")
    return acked - set(b.machine.commands)


def test_a_repeated_reset_cuts_nothing() -> None:
    """R10, R10a: 20 acknowledged commands survive a repeated reset."""
    assert not _resent_twice(Bench(limits=SMALL))


def test_a_repeated_reset_cuts_without_both_rules() -> None:
    """Either rule is enough here; without both, acknowledged commands are lost, or the log's own check stops the replica."""
    with SEEN["every reset"]():
        assert not _resent_twice(Bench(limits=SMALL))
    with SEEN["every reset"](), SEEN["never trim"]():
        try:
            lost = _resent_twice(Bench(limits=SMALL))
        except LogViolation:
            return
        assert lost


def _offer_to_a_deposed_leader(bench: Bench) -> Bench:
    """A keeps five entries for itself; B and C go on and compact; A is offered a snapshot."""
    b = bench["B"]
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    bench.cut("A", "B")
    bench.cut("A", "C")
    bench.put("A", *[b"x%d" % i for i in range(5)])
    bench.elect("B", "C")
    bench.settle("B", "C")
    for i in range(10):
        bench.put("B", b"y%d" % i)
        bench.settle("B", "C", rounds=2)
    b.machine.durable = b.engine.applied
    bench.drive()
    assert b.group.compact(keep_bytes=0)
    b.sync()
    bench.join("A", "B")
    return bench


def test_an_offered_snapshot_commits_nothing() -> None:
    """R10c: a deposed leader applies none of its own entries because a snapshot is offered."""
    bench = _offer_to_a_deposed_leader(Bench())
    a, b = bench["A"], bench["B"]
    for _ in range(3):
        bench.turn("B")
        bench.move("B", "A")
        bench.move("A", "B")
        bench.turn("A")
    assert a.machine.seen == []
    assert a.group.installing
    assert a.group.fetch_from == "B"
    index, term, _ = b.machine.seen[-1]
    a.machine.seen = list(b.machine.seen)
    bench.drive()
    a.group.installed(index, term, None)
    a.sync()
    bench.settle("A", "B", "C")
    assert a.log == [(index, term)] or a.log[-1] == b.log[-1]
    assert [c for c in a.machine.commands if c.startswith(b"x")] == []
    bench.put("B", b"z")
    bench.settle("A", "B", "C")
    assert a.machine.commands[-1] == b"z"


def test_a_snapshot_keeps_what_was_acknowledged_beyond_it() -> None:
    """Second of two snapshots: the log keeps its tail when it has the snapshot's last entry."""
    bench = Bench()
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    for i in range(6):
        bench.put("A", b"w%d" % i)
        bench.settle("A", "B", "C", rounds=2)
    b = bench["B"]
    last = b.journal.last
    index, term, _ = b.machine.seen[2]
    b.engine.applied = b.journal.applied = index - 1  # as if it had fallen behind in applying
    bench.drive()
    b.group.installed(index, term, None)
    b.sync()
    assert b.journal.last == last
    assert b.engine.applied == index


def test_a_snapshot_below_what_is_applied_is_refused() -> None:
    """R16: a state never goes back."""
    bench = Bench()
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    b = bench["B"]
    with pytest.raises(LogViolation):
        b.group.installed(b.engine.applied, 1, None)


def _stale_answer(bench: Bench) -> set[bytes]:
    """Five nodes, at most two down: an answer of term 1 arrives in term 3. Returns what was acknowledged and is lost."""
    a, c = bench["A"], bench["C"]
    bench.elect("A", *"BCDE")
    bench.settle(*"ABCDE")
    for x in "AB":
        for y in "CDE":
            bench.cut(x, y)
    bench.put("A", *[b"x%d" % i for i in range(8)])
    bench.move("A", "B")  # B's answer stays on a slow link
    late = list(bench.links["B", "A"])
    assert late
    bench.elect("C", "D", "E")  # term 2
    bench.links["C", "D"].clear()
    bench.links["C", "E"].clear()
    bench.join("C", "A")
    for _ in range(12):
        bench.turn("C")
        bench.move("C", "A")
        bench.move("A", "C")
    bench.kill("C")
    bench.join("A", "D")
    bench.join("A", "E")
    bench.elect("A", "D", "E")  # term 3
    bench.links["B", "A"].clear()
    bench.settle("A", "D", "E", rounds=3)
    assert a.group.serving
    acked_before = len(a.machine.commands)
    bench.put("A", *[b"z%d" % i for i in range(6)])
    bench.links["B", "A"].extend(late)
    bench.move("B", "A")
    for _ in range(6):
        bench.links["A", "E"].clear()  # E hears nothing
        bench.links["A", "B"].clear()
        bench.move("A", "D")
        bench.move("D", "A")
        bench.turn("A")
    acked = {x for x in a.machine.commands[acked_before:] if x.startswith(b"z")}
    bench.kill("A")
    bench.kill("D")
    bench.nodes["C"] = c
    for x, y in ("BC", "BE", "CE"):
        bench.join(x, y)
    bench.elect("E", "B", "C")
    bench.settle(*"BCE", rounds=20)
    assert c.machine.commands == bench["E"].machine.commands
    return acked - set(c.machine.commands)


def test_an_answer_of_another_term_does_not_count() -> None:
    """R10b: nothing is acknowledged on the strength of it."""
    assert not _stale_answer(Bench("ABCDE"))


def test_an_answer_of_another_term_loses_data_without_the_rule() -> None:
    """R10b: and it is the rule that sees to it."""
    with SEEN["any term"]():
        assert _stale_answer(Bench("ABCDE"))


def _double_vote(bench: Bench) -> int:
    """One of five gets its only vote twice. Returns how many lead."""
    a = bench["A"]
    bench.now += 3
    for _ in range(2):
        a.engine.deadline = -1e18
        a.turn()
        a.engine.deadline = 1e18
        for voter in "BCDE":
            bench.move("A", voter) if a.engine.state == 0 else bench.move("A", "B")
            bench.move(voter, "A", 0 if a.engine.state else 1 << 30)
    votes = list(bench.links["B", "A"])
    assert votes
    bench.links["B", "A"].extend(votes)
    bench.move("B", "A")
    return sum(n.engine.state == 2 for n in bench.nodes.values())


def test_a_vote_counts_once() -> None:
    """R11: a repeated vote makes no leader."""
    assert _double_vote(Bench("ABCDE")) == 0
    with SEEN["every vote"]():
        assert _double_vote(Bench("ABCDE")) == 1


def test_only_members_vote_and_answer() -> None:
    """What a node outside of the group answers or asks of its leader is dropped."""
    bench = Bench()
    bench.elect("A", "B", "C")
    before = repr(bench["A"].group)
    bench["A"].group.deliver("Z", {"type": "next_node_idx", "sender_term": 99})
    bench["A"].group.deliver("Z", {"type": "recovery_request", "sender_term": 1, "incarnation": "z"})
    assert repr(bench["A"].group) == before


def _restarted_voter(bench: Bench) -> bool:
    """B votes for A, restarts, and is asked by C in the same term. Returns whether it votes again."""
    bench.elect("A", "B")
    term = bench["A"].engine.term
    disk = bench.kill("B").disk
    disk.crash(random.Random(0))
    bench.drive()
    b = bench.nodes["B"] = Replica(bench, "B", disk)
    bench.join("B", "C")
    b.group.deliver("C", {"type": "request_vote", "term": term, "sender_term": term, "last_log_index": 99, "last_log_term": term,
                          "transfer": True})
    b.sync()
    return bool(bench.links["B", "C"])


def test_a_restarted_voter_remembers_its_vote() -> None:
    """Term and vote survive a crash."""
    assert not _restarted_voter(Bench())
    with SEEN["vote lost"]():
        assert _restarted_voter(Bench())


def test_a_follower_applies_only_what_is_on_its_disk() -> None:
    """R2, R6: an append that brings entries and says that they are committed is applied after the sync."""
    def applied_before_sync() -> list[bytes]:
        bench = Bench()
        bench.elect("A", "B", "C")
        bench.settle("A", "B", "C")
        bench.cut("A", "B")
        bench.put("A", b"x")
        bench.settle("A", "C")
        bench.join("A", "B")
        bench.links["B", "A"].clear()
        b = bench["B"]
        bench.turn("A")
        for data in bench.links["A", "B"]:
            b.group.deliver("A", wire.decode(RaftGroupMessage.FromString(data)))
        b.group.tick()
        return list(b.machine.commands)
    assert applied_before_sync() == []
    with SEEN["apply unsynced"]():
        assert applied_before_sync() == [b"x"]


def test_a_leader_that_is_cut_off_hears_of_the_new_term() -> None:
    """R12: a stale leader is answered, steps down at once, and its machine is told."""
    bench = Bench()
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    bench.cut("A", "B")
    bench.cut("A", "C")
    bench.elect("B", "C")
    bench.join("A", "C")
    bench.turn("A")
    bench.move("A", "C")
    bench.move("C", "A")
    assert bench["A"].machine.roles[-1][0] is Role.FOLLOWER
    assert bench["A"].engine.term == bench["B"].engine.term


def _sent_after_two_resets(bench: Bench) -> int:
    """Two heartbeats beyond the follower's log, two answers `reset`. Returns how many entries the leader sends."""
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    bench.cut("A", "B")
    bench.put("A", *[b"%d" % i for i in range(5)])
    bench.join("A", "B")
    bench.links["A", "B"].clear()
    bench.drive()
    bench["A"].engine.set_next_index("B", bench["A"].journal.last + 1)
    bench.turn("A")
    bench.turn("A")
    bench.move("A", "B")
    bench.move("B", "A")
    return sum(len(RaftGroupMessage.FromString(data).append.entries) for data in bench.links["A", "B"])


def test_a_repeated_reset_is_acted_upon_once() -> None:
    """R10a: what was asked for twice is sent once."""
    assert _sent_after_two_resets(Bench()) == 5
    with SEEN["every reset"]():
        assert _sent_after_two_resets(Bench()) == 10
