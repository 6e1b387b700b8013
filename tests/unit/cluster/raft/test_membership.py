"""R17 on groups that are driven by hand: who counts, what is refused, who is told. The simulation has the rest."""
from __future__ import annotations

import pytest
from spillway.cluster.errors import ChangeInFlight, ChangeInvalid, NotCaughtUp, NotLeading
from spillway.cluster.raft.configuration import Change, ChangeKind, Configuration, decode_configuration
from spillway.cluster.raft.membership import CAUGHT_UP_ENTRIES, FAREWELL_SECONDS
from spillway.cluster.raft.seam import LEADER

from tests.unit.cluster.raft.bench import FAR, Bench

ADD, PROMOTE, DEMOTE, REMOVE = ChangeKind.ADD_LEARNER, ChangeKind.PROMOTE, ChangeKind.DEMOTE, ChangeKind.REMOVE


def _bench(founders: str = "ABC", names: str = "ABCD") -> Bench:
    """A leads."""
    bench = Bench(names, founders=founders)
    bench.elect("A", *founders)
    bench.settle(*founders)
    assert bench["A"].group.serving
    return bench


def _change(bench: Bench, kind: ChangeKind, name: str, *who: str) -> int:
    """The leader A changes a member, and those talk until it is committed."""
    bench.drive()
    index = bench["A"].group.propose_change(Change(kind, name))
    bench["A"].sync()
    bench.settle(*(who or bench.names))
    assert bench["A"].engine.commit >= index
    return index


def _now(bench: Bench, name: str) -> Configuration:
    return bench[name].group.configuration


def test_a_learner_gets_the_log_and_does_not_count() -> None:
    """It has what the others have; without a majority of the voters nothing is committed, with or without it."""
    bench = _bench()
    bench.put("A", *[b"%d" % i for i in range(10)])
    _change(bench, ADD, "D")
    assert bench["D"].machine.commands == bench["A"].machine.commands
    assert _now(bench, "D") == Configuration(("A", "B", "C"), ("D",))
    for name in "BC":
        bench.cut("A", name)
    commit = bench["A"].engine.commit
    bench.put("A", b"x")
    bench.settle("A", "D", rounds=3)
    assert bench["D"].journal.last > commit == bench["A"].engine.commit


def test_a_learner_never_campaigns() -> None:
    """Nor does a replica that knows no configuration, or is no member."""
    bench = _bench()
    _change(bench, ADD, "D")
    term = bench["D"].engine.term
    for name in "ABC":
        bench.cut(name, "D")
    for _ in range(10):
        bench["D"].engine.deadline = -FAR
        bench.turn("D", seconds=1)
        assert not any(bench.links["D", name] for name in "ABC")
    assert bench["D"].engine.term == term


def test_a_promoted_learner_counts() -> None:
    """Of four voters three decide."""
    bench = _bench()
    _change(bench, ADD, "D")
    _change(bench, PROMOTE, "D")
    assert all(_now(bench, name) == Configuration(("A", "B", "C", "D")) for name in "ABCD")
    bench.cut("A", "B")
    bench.cut("A", "C")
    commit = bench["A"].engine.commit
    bench.put("A", b"x")
    bench.settle("A", "D", rounds=3)
    assert bench["A"].engine.commit == commit
    bench.join("A", "B")
    bench.settle("A", "B", "D")
    assert bench["A"].engine.commit > commit


def test_a_new_voter_votes_before_it_knows() -> None:
    """The leader dies when only some have the change; the new voter's vote is needed, and given."""
    bench = _bench()
    _change(bench, ADD, "D")
    bench.drive()
    bench.cut("A", "D")
    bench["A"].group.propose_change(Change(PROMOTE, "D"))
    bench["A"].sync()
    bench.move("A", "B")
    bench.move("A", "C")
    bench.kill("A")
    assert "D" in _now(bench, "B").voters and "D" not in _now(bench, "D").voters
    with pytest.raises(AssertionError, match="follower"):
        bench.elect("B", "C")  # two of four
    bench.elect("B", "C", "D")
    assert bench["B"].engine.state == LEADER


def test_one_change_at_a_time() -> None:
    """The next one waits for the commit of the one before it."""
    bench = _bench()
    bench.drive()
    group = bench["A"].group
    group.propose_change(Change(ADD, "D"))
    with pytest.raises(ChangeInFlight, match="entry"):
        group.propose_change(Change(REMOVE, "C"))
    bench["A"].sync()
    bench.settle(*"ABCD")
    group.propose_change(Change(REMOVE, "C"))


def test_only_a_leader_that_serves_changes_members() -> None:
    """Before the commit of its first entry a configuration of an earlier leader may be on its way."""
    bench = Bench("ABCD", founders="ABC")
    with pytest.raises(NotLeading):
        bench["B"].group.propose_change(Change(ADD, "D"))
    bench.elect("A", "B", "C")
    if not bench["A"].group.serving:
        with pytest.raises(NotLeading):
            bench["A"].group.propose_change(Change(ADD, "D"))
    bench.settle(*"ABC")
    bench.drive()
    assert bench["A"].group.propose_change(Change(ADD, "D")) == bench["A"].journal.last


@pytest.mark.parametrize("kind", [REMOVE, DEMOTE])
def test_a_leader_does_not_remove_itself(kind: ChangeKind) -> None:
    """It hands over first."""
    bench = _bench()
    bench.drive()
    with pytest.raises(ChangeInvalid, match="hand it over"):
        bench["A"].group.propose_change(Change(kind, "A"))


def test_a_demoted_voter_goes_on_as_a_learner() -> None:
    """It gets the log, does not count or campaign, keeps its replica, and can be promoted again."""
    bench = _bench(founders="ABCD")
    _change(bench, DEMOTE, "D")
    assert all(_now(bench, name) == Configuration(("A", "B", "C"), ("D",)) for name in "ABCD")
    bench.put("A", b"x")
    bench.settle(*"ABCD")
    assert bench["D"].machine.commands == bench["A"].machine.commands
    assert not bench["D"].group.membership.removed and not bench["D"].group.membership.voting
    for name in "BC":
        bench.cut("A", name)
    commit = bench["A"].engine.commit
    bench.put("A", b"y")
    bench.settle("A", "D", rounds=3)
    assert bench["A"].engine.commit == commit
    for name in "BC":
        bench.join("A", name)
    bench.settle(*"ABCD")
    _change(bench, PROMOTE, "D")
    assert all(_now(bench, name) == Configuration(("A", "B", "C", "D")) for name in "ABCD")


def test_a_voter_is_demoted_while_it_is_dead() -> None:
    """It learns of it when it is back, and does not end."""
    bench = _bench(founders="ABCD")
    for name in "ABC":
        bench.cut(name, "D")
    _change(bench, DEMOTE, "D", *"ABC")
    for name in "ABC":
        bench.join(name, "D")
    bench.settle(*"ABCD")
    assert _now(bench, "D") == Configuration(("A", "B", "C"), ("D",)) and not bench["D"].group.membership.removed


def test_a_learner_that_is_behind_is_not_promoted() -> None:
    """A majority would have to wait for it."""
    bench = _bench()
    _change(bench, ADD, "D", *"ABC")  # D hears nothing of it
    bench.links["A", "D"].clear()
    bench.put("A", *[b"%d" % i for i in range(CAUGHT_UP_ENTRIES + 1)])
    bench.settle(*"ABC")
    with pytest.raises(NotCaughtUp, match="lacks"):
        bench["A"].group.propose_change(Change(PROMOTE, "D"))
    bench.join("A", "D")
    bench.settle(*"ABCD")
    bench["A"].group.propose_change(Change(PROMOTE, "D"))


def test_no_change_that_could_not_be_committed() -> None:
    """With B out of touch, C must stay; a leader alone in its majority would be stuck."""
    bench = _bench()
    bench.cut("A", "B")
    bench.settle("A", "C", rounds=30)
    with pytest.raises(NotCaughtUp, match="only 1 are in touch"):
        bench["A"].group.propose_change(Change(REMOVE, "C"))
    bench["A"].group.propose_change(Change(REMOVE, "B"))


def test_a_removed_node_hears_of_it_once_it_is_committed() -> None:
    """And for a while only. Before that it must not have the entry: nobody could be elected if the leader died."""
    bench = _bench()
    bench.drive()
    index = bench["A"].group.propose_change(Change(REMOVE, "C"))
    bench["A"].sync()
    bench.turn("A")
    bench.move("A", "C")
    assert bench["C"].journal.last < index
    bench.settle(*"ABC")
    assert bench["C"].group.membership.removed and "C" not in _now(bench, "C")
    assert not bench["A"].group.membership.removed
    bench.turn("A", "B", seconds=FAREWELL_SECONDS + 0.1)
    bench.links["A", "C"].clear()
    bench.settle("A", "B")
    assert "C" not in bench["A"].group._progress and not bench.links["A", "C"]


def test_a_demoted_node_hears_of_it_once_it_is_committed() -> None:
    """Before that it must not have the entry: as a learner it could not campaign, nobody who lacks the entry could get its vote, and the
    others, who have to go by the configuration before, may need that vote when the leader is lost."""
    bench = _bench(founders="ABCD")
    bench.drive()
    index = bench["A"].group.propose_change(Change(DEMOTE, "D"))
    bench.put("A", b"x")
    bench["A"].sync()
    bench.turn("A")
    bench.move("A", "D")
    assert bench["D"].journal.last < index
    for name in "BCD":
        bench.cut("A", name)  # for ever
    bench.elect("B", *"BCD")
    bench.settle(*"BCD")
    assert bench["B"].group.serving and _now(bench, "D") == Configuration(("A", "B", "C", "D"))


def test_a_demotion_that_a_new_leader_inherits_is_kept_back_likewise() -> None:
    """It has it in its log, uncommitted: the one that it demotes hears of it once it is committed."""
    bench = _bench(founders="ABCD")
    bench.drive()
    index = bench["A"].group.propose_change(Change(DEMOTE, "D"))
    bench["A"].sync()
    bench.turn("A")
    bench.move("A", "B")
    for name in "BCD":
        bench.cut("A", name)  # for ever
    bench.elect("B", *"BC")
    for _ in range(4):
        bench.turn("B")
        bench.move("B", "D")
        bench.move("D", "B")
    assert bench["B"].journal.last > index > bench["B"].engine.commit and bench["D"].journal.last < index
    bench.settle(*"BCD")
    assert bench["B"].engine.commit > index and _now(bench, "D") == Configuration(("A", "B", "C"), ("D",))
    assert bench["D"].machine.commands == bench["B"].machine.commands


def test_a_replica_on_its_way_to_its_return_stays() -> None:
    """A node that was removed and added again meets its removal in the log; it does not end by it."""
    bench = _bench()
    bench.cut("A", "C")
    bench.cut("B", "C")
    bench.settle("A", "B")
    _change(bench, REMOVE, "C", "A", "B")
    _change(bench, ADD, "C", "A", "B")
    bench.join("A", "C")
    ended = False
    for _ in range(6):
        bench.turn("A", "C")
        while bench.move("A", "C", 1):
            bench["C"].group.tick()
            ended |= bench["C"].group.membership.removed
        bench.move("C", "A")
    assert not ended and _now(bench, "C") == Configuration(("A", "B"), ("C",))


def test_a_change_that_is_cut_off_is_undone() -> None:
    """A leader that was alone with its change follows the others', and goes by their configuration again."""
    bench = _bench()
    before = _now(bench, "A")
    bench.cut("A", "B")
    bench.cut("A", "C")
    bench.drive()
    bench["A"].group.propose_change(Change(ADD, "D"))
    bench["A"].sync()
    assert _now(bench, "A") != before
    bench.elect("B", "C")
    bench.put("B", b"x")
    bench.settle("B", "C")
    bench.join("A", "B")
    bench.settle(*"ABC")
    assert _now(bench, "A") == before and "D" not in bench["A"].group._progress


def test_the_machine_is_told() -> None:
    """Who takes its state from a snapshot has no log to read it from."""
    bench = _bench()
    index = _change(bench, ADD, "D")
    for name in "ABCD":
        (at, configuration), = bench[name].machine.configurations
        assert at == index and decode_configuration(configuration) == Configuration(("A", "B", "C"), ("D",))


def test_the_only_voter_grows() -> None:
    """From one to two, which decide together."""
    bench = _bench("A", "AB")
    _change(bench, ADD, "B")
    assert bench["B"].machine.commands == bench["A"].machine.commands
    _change(bench, PROMOTE, "B")
    assert bench["A"].group.quorum == 2
    _change(bench, REMOVE, "B")
    assert bench["A"].group.alone
