"""From the members that a group has to those that it should have, whatever happens on the way."""
from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.cluster.raft.configuration import VOTERS_MAX, Change, ChangeKind, Configuration
from spillway.cluster.steps import HandOver, next_step

ADD, PROMOTE, DEMOTE, REMOVE = ChangeKind.ADD_LEARNER, ChangeKind.PROMOTE, ChangeKind.DEMOTE, ChangeKind.REMOVE


def step(voters: str, learners: str, wanted: str, leader: str, dead: str = "") -> tuple[str, str] | None:
    """What is done next, as (what, node)."""
    found = next_step(Configuration(tuple(voters), tuple(learners)), list(wanted), leader, lambda node: node not in dead)
    if found is None:
        return None
    return ("hand over", "".join(found.to)) if isinstance(found, HandOver) else (found.kind.value, found.node_id)


@pytest.mark.parametrize(("voters", "learners", "wanted", "leader", "dead", "expected"), [
    ("abc", "", "abc", "a", "", None),  # as it should be
    ("abc", "", "bac", "a", "", ("hand over", "b")),  # another one is preferred
    ("abc", "", "bac", "a", "b", None),  # but dead
    ("abc", "", "abd", "a", "", ("add-learner", "d")),  # first the new one
    ("abc", "d", "abd", "a", "", ("promote", "d")),
    ("abcd", "", "abd", "a", "", ("remove", "c")),  # then the old one goes
    ("abcd", "", "bcd", "a", "", ("hand over", "bcd")),  # the leader hands over before it goes, to whoever can take over
    ("abcd", "", "bcd", "a", "bc", ("hand over", "d")),  # to one that is there
    ("abcd", "", "bcd", "a", "bcd", None),
    ("abc", "", "abd", "a", "d", None),  # nobody waits for a dead one
    ("abc", "d", "abd", "a", "d", None),
    ("abc", "d", "abc", "a", "", ("remove", "d")),  # it is wanted no longer
    ("abc", "", "ab", "a", "", ("remove", "c")),  # fewer replicas
    ("abcde", "", "abc", "a", "e", ("remove", "e")),  # the dead one first
    ("a", "", "abc", "a", "", ("add-learner", "b")),
    ("abcdefg", "", "abcdefgh", "a", "", ("add-learner", "h")),  # beyond seven they only learn
    ("abcdefg", "h", "abcdefgh", "a", "", None),
    ("abcdefg", "h", "abcdefh", "a", "", ("remove", "g")),  # no room for the new one before
    ("abcdefg", "h", "abcdefhg", "a", "g", ("demote", "g")),  # it goes on as a learner
    ("abcdefg", "h", "abcdefhg", "a", "h", None),
    ("abcdefg", "hijklmn", "abcdefhgijklmn", "a", "g", ("demote", "g")),  # also in the largest cluster
    ("abcdef", "h", "abcdefh", "a", "", ("promote", "h")),
])
def test_the_next_step(voters: str, learners: str, wanted: str, leader: str, dead: str, expected: tuple[str, str] | None) -> None:
    """One at a time, and in the order in which a group stays safe."""
    assert step(voters, learners, wanted, leader, dead) == expected


def apply(now: Configuration, taken: Change | HandOver, leader: str) -> tuple[Configuration, str]:
    """The group afterwards. Raises ChangeInvalid for what makes no sense."""
    if isinstance(taken, HandOver):
        assert set(taken.to) <= {*now.voters} - {leader}
        return now, taken.to[0]
    assert taken.kind not in (REMOVE, DEMOTE) or taken.node_id != leader, "a leader does not remove itself"
    return now.after(taken), leader


@given(st.integers(0, 1 << 32))
def test_it_gets_there(seed: int) -> None:
    """From anywhere, also if what is wanted changes on the way: within as many steps as it takes, never with fewer voters than there
    were and are wanted, and then it stays."""
    rnd = random.Random(seed)
    names = "abcdefghij"[:rnd.randint(1, 10)]
    voters = rnd.sample(names, rnd.randint(1, min(VOTERS_MAX, len(names))))
    rest = [n for n in names if n not in voters]
    now = Configuration(tuple(sorted(voters)), tuple(sorted(rnd.sample(rest, rnd.randint(0, min(3, len(rest)))))))
    leader = rnd.choice(voters)
    for _ in range(3):
        wanted = rnd.sample(names, rnd.randint(1, len(names)))
        least = min(len(now.voters), len(wanted[:VOTERS_MAX]))
        changes = rnd.randint(0, 6) if rnd.random() < 0.5 else 60
        for _ in range(changes):
            taken = next_step(now, wanted, leader, lambda node: True)
            if taken is None:
                break
            now, leader = apply(now, taken, leader)
            assert len(now.voters) >= min(least, VOTERS_MAX - 1)
        if changes == 60:
            assert set(now.voters) == set(wanted[:VOTERS_MAX]) and leader == wanted[0]
            assert set(now.learners) == set(wanted[VOTERS_MAX:])
            assert next_step(now, wanted, leader, lambda node: True) is None


@given(st.integers(0, 1 << 32))
def test_a_majority_stays_in_touch(seed: int) -> None:
    """With one voter dead, no step leaves a group without a majority that is there, and the dead one is replaced."""
    rnd = random.Random(seed)
    names = "abcdef"
    voters = rnd.sample(names, 3)
    dead = rnd.choice(voters)
    leader = rnd.choice([v for v in voters if v != dead])
    alive = [n for n in names if n != dead]
    wanted = [*[v for v in voters if v != dead], rnd.choice([n for n in alive if n not in voters])]
    now = Configuration(tuple(sorted(voters)))
    for _ in range(10):
        taken = next_step(now, wanted, leader, lambda node: node != dead)
        if taken is None:
            break
        now, leader = apply(now, taken, leader)
        assert sum(v != dead for v in now.voters) >= now.quorum
    assert set(now.voters) == set(wanted)
