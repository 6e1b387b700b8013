"""A replica that lost its disk, on the bench; and what a blank store is."""
from __future__ import annotations

import pytest
from spillway.cluster.errors import StoreRefused
from spillway.cluster.machine import Role
from spillway.cluster.raft.formation import Hello, Standing, decide
from spillway.cluster.raft.progress import Limits
from spillway.cluster.raft.seam import LEADER

from tests.simulation.raft.disk import SimDisk
from tests.simulation.raft.mutations import SEEN
from tests.unit.cluster.raft.bench import FAR, Bench, Replica


def _wipe(bench: Bench, name: str) -> Replica:
    bench.kill(name)
    bench.drive()
    node = bench.nodes[name] = Replica(bench, name, SimDisk())
    node.group.recover("second life")
    return node


def _acknowledged_by_the_wiped(bench: Bench) -> bool:
    """A and B have entries that A acknowledged; C lacks them. B loses its disk, hears A for a moment, then A dies. Returns
    whether C is elected, without those entries."""
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    bench.cut("A", "C")
    bench.cut("B", "C")
    bench.put("A", *[b"%d" % i for i in range(6)])
    for _ in range(20):
        bench.move("A", "B")
        bench.move("B", "A")
        bench.turn("A")
    assert len(bench["A"].machine.commands) == 6
    b = _wipe(bench, "B")
    bench.join("A", "B")
    while b.journal.last < 2:
        bench.move("A", "B", 1)
        b.turn()
        bench.move("B", "A", 1)
    b.turn()
    assert b.journal.last < bench["A"].journal.last
    bench.kill("A")
    bench.join("B", "C")
    c = bench["C"]
    bench.now += 3.0
    for _ in range(4):
        c.engine.deadline = -FAR
        c.turn()
        bench.move("C", "B")
        bench.move("B", "C")
    return c.engine.state == LEADER


def test_a_lost_acknowledgement_elects_nobody() -> None:
    """R18: until the barrier is behind it, the wiped replica votes for nobody; without the barrier acknowledged entries
    are lost."""
    limits = Limits(append=1, window=1)
    assert not _acknowledged_by_the_wiped(Bench(limits=limits))
    with SEEN["no barrier"]():
        assert _acknowledged_by_the_wiped(Bench(limits=limits))


def test_a_wiped_replica_comes_back() -> None:
    """It catches up, is admitted past the barrier, votes and counts again; its vote of that term is spent."""
    bench = Bench()
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    bench.put("A", b"x", b"y")
    bench.settle("A", "B", "C")
    b = _wipe(bench, "B")
    assert b.group.role is Role.RECOVERING
    bench.join("A", "B")
    bench.join("B", "C")
    bench.settle("A", "B", "C", rounds=10)
    assert b.group.role is Role.FOLLOWER
    assert b.journal.admitted == "second life"
    assert b.journal.getVotedForNodeId() == "A"
    assert b.machine.commands == [b"x", b"y"]
    bench.cut("A", "C")
    bench.put("A", b"z")
    bench.settle("A", "B")
    assert bench["A"].machine.commands[-1] == b"z", "its answers count again"


def test_a_recovering_replica_does_not_count() -> None:
    """With the third member away nothing is committed, and the replica stays out."""
    bench = Bench()
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    b = _wipe(bench, "B")
    bench.join("A", "B")
    bench.cut("A", "C")
    bench.put("A", b"x")
    bench.settle("A", "B", rounds=10)
    assert bench["A"].machine.commands == []
    assert bench["A"].engine.match_index("B") == 0
    assert b.journal.last == bench["A"].journal.last, "it does receive the entries"
    assert b.group.role is Role.RECOVERING
    bench.join("A", "C")
    bench.settle("A", "B", "C", rounds=10)
    assert b.group.role is Role.FOLLOWER


def test_a_recovering_replica_neither_campaigns_nor_promises() -> None:
    """It is silent in elections."""
    bench = Bench()
    b = _wipe(bench, "B")
    bench.join("B", "C")
    b.engine.deadline = -FAR
    b.turn()
    assert not bench.links["B", "C"]
    for kind in ("prevote_request", "request_vote"):
        b.group.deliver("C", {"type": kind, "term": 5, "sender_term": 5, "last_log_index": 99, "last_log_term": 4,
                              "transfer": True})
    b.sync()
    assert not bench.links["B", "C"]
    assert b.engine.term == 0


def test_a_barrier_counts_in_its_term_only() -> None:
    """A new leader must set a new one."""
    bench = Bench()
    bench.elect("A", "B", "C")
    bench.settle("A", "B", "C")
    b = _wipe(bench, "B")
    assert b.group.recovery is not None
    b.group.recovery.told(2, 1)
    assert b.group.recovery.passed(1, 5, 5)
    assert not b.group.recovery.passed(2, 5, 5)
    assert not b.group.recovery.passed(1, 1, 5)
    assert not b.group.recovery.passed(1, 5, 1)


def test_the_only_replica_cannot_recover() -> None:
    """A group of one that lost its log says what to do."""
    with pytest.raises(StoreRefused, match="restore a backup"):
        _wipe(Bench("A"), "A")


BLANK_B, BLANK_C = Hello("B", "b", False), Hello("C", "c", False)


@pytest.mark.parametrize(("hellos", "standing"), [
    ({}, Standing.WAIT),
    ({"B": BLANK_B}, Standing.WAIT),
    ({"B": BLANK_B, "C": BLANK_C}, Standing.FRESH),
    ({"B": Hello("B", "b", True, {"A": "a", "B": "b", "C": "c"}), "C": BLANK_C}, Standing.FRESH),
    ({"B": Hello("B", "b", True, {"A": "a", "B": "b", "C": "c"})}, Standing.WAIT),
    ({"B": Hello("B", "b", True, {"A": "old", "B": "b", "C": "c"})}, Standing.LOST),
    ({"B": Hello("B", "b", True), "C": BLANK_C}, Standing.LOST),
])
def test_what_a_blank_store_is(hellos: dict[str, Hello], standing: Standing) -> None:
    """R18: new only when all members were heard and none knew another incarnation of us."""
    assert decide("A", "a", ["A", "B", "C"], hellos) is standing


def test_a_cluster_of_one_forms_at_once() -> None:
    """There is nobody to ask."""
    assert decide("A", "a", ["A"], {}) is Standing.FRESH
