"""From the members that a group has to those that it should have: the next step. Pure.

A replica comes before the one that it replaces goes, so that a group has never fewer voters than before. Whoever leads takes the
steps, and each follows from the group's configuration alone: after a crash of anybody, or a change of what is wanted, the next
leader goes on from where the group is. See `raft.membership` for when a change is refused; then it is tried again.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spillway.cluster.raft.configuration import LEARNERS_MAX, VOTERS_MAX, Change, ChangeKind, Configuration


@dataclass(frozen=True, slots=True)
class HandOver:
    """The leader is to leave, or another one is preferred: it hands over first, to the first of these that can take over."""

    to: tuple[str, ...]


def next_step(now: Configuration, wanted: Sequence[str], leader: str, in_touch: Callable[[str], bool]) -> Change | HandOver | None:
    """What the group's leader does next, so that the voters become those `wanted`, preferred leader first; None if nothing.
    Those beyond VOTERS_MAX are to be learners. Nodes that are not `in_touch` are neither added nor handed over to: a group
    must not wait for them."""
    voters, learners = wanted[:VOTERS_MAX], wanted[VOTERS_MAX:VOTERS_MAX + LEARNERS_MAX]
    for node in now.learners:
        if node not in wanted:
            return Change(ChangeKind.REMOVE, node)
    missing = [node for node in voters if node not in now.voters]
    surplus = [node for node in now.voters if node not in voters]
    ready = [node for node in missing if node in now.learners and in_touch(node)]
    if ready and len(now.voters) < VOTERS_MAX:
        return Change(ChangeKind.PROMOTE, ready[0])
    # Without its replacement a voter goes, or steps back to the learners, only if it is dead or nobody takes its place: a group keeps as
    # many as it had.
    if surplus and (not missing or (len(now.voters) == VOTERS_MAX and ready)):
        gone = [node for node in surplus if not in_touch(node)] or [node for node in surplus if node != leader]
        if gone:
            return Change(ChangeKind.DEMOTE if gone[0] in learners else ChangeKind.REMOVE, gone[0])
        stays = tuple(node for node in voters if node in now.voters and in_touch(node))
        return HandOver(stays) if stays else None
    for node in (*missing, *learners):
        if node not in now and in_touch(node) and len(now.learners) < LEARNERS_MAX:
            return Change(ChangeKind.ADD_LEARNER, node)
    if voters and voters[0] != leader and voters[0] in now.voters and in_touch(voters[0]):
        return HandOver((voters[0],))
    return None
