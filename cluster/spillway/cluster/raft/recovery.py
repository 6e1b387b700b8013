"""A replica that lost its disk, and how it may come back under its old name; and a replica that joins, which may be one that was a
member before and has forgotten that on purpose (see `membership`).

Its new store has a new incarnation. It has forgotten votes and acknowledgements, so it is silent: it gives no votes and no
promises, does not campaign, and its answers are marked and never counted. It asks the leader for a *barrier*: an entry that
the leader L of a term t proposes after it learned of the new incarnation, having dropped what the old one acknowledged, and
that is committed, so by a majority Q without this replica B. When B's log agrees with L's past the barrier and B has applied
it, both within term t, B is admitted: it spends its vote of term t, stores that it is admitted, and takes part again.

Why this is safe. Until the admission B is a crashed node for everybody. So Raft's argument holds for all that happens until
then; in particular L's log has every entry that was committed in earlier terms. Write n for the members, q for a majority.

1. No leader of a term above t existed before the barrier was proposed. It had q votes, all of nodes with a term above t by
   then; Q has q members that accepted the barrier in term t afterwards; 2q > n, so one node is both, but terms only grow.
   B's old store therefore acknowledged nothing to a leader of a later term than t.
2. Forgotten acknowledgements. An entry that was or will be committed with the help of B's old store was acknowledged to a
   leader of a term up to t, which 1 allows. Of an earlier term: it is in L's log, because L was elected by votes that were
   given with memory. Of term t: L itself counted it, it is in L's log. L's log up to the barrier is in B's again.
3. Forgotten votes for a term T above t, for a candidate C, given before the wipe. To win, C needs q - 1 other votes. Of the
   n - 1 others, q are in Q, so one of them is in Q. It accepted the barrier in term t, so it votes in T only afterwards,
   with the barrier in its log. C's log lacks the barrier (C was beyond t when it was proposed) and, by 1, has no entry of a
   later term: the vote is refused, C cannot win, and a second vote of B in T harms nobody.
4. Forgotten votes for term t and below. B's term is t at least, and its vote of t is spent.

So it equals removing B and adding a new member that starts as a learner (Ongaro's thesis, 3.8 and 4.2.1), with a barrier in
place of the two changes of the configuration. The barrier counts only in its own term: if the leader changes on the way, B
forgets it and asks the next one.

Where members change, n and q are those of the configuration that the barrier is committed in. Single changes keep what 1 to 3
use: B's old store is a node that crashed, and a leader that was or will be elected with its help shares a voter with every
majority that commits without it, because configurations that follow each other do (see `membership`).

A group whose only replica is lost has nothing to recover from, and refuses to start.
"""
from __future__ import annotations


class Recovery:
    """The side of the replica that lost its disk."""

    __slots__ = ("asked_at", "barrier_index", "barrier_term", "incarnation")

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.barrier_index = 0  # 0: not known
        self.barrier_term = 0
        self.asked_at = -1e9  # seconds

    def told(self, index: int, term: int) -> None:
        """The leader of a term has committed the barrier."""
        self.barrier_index, self.barrier_term = index, term

    def passed(self, term: int, verified: int, applied: int) -> bool:
        """Whether the barrier of this very term is behind us: verified in the log, and applied."""
        return bool(self.barrier_index) and self.barrier_term == term and min(verified, applied) >= self.barrier_index


class Barriers:
    """The side of the leader, for one leadership."""

    def __init__(self) -> None:
        self._barriers: dict[str, tuple[str, int]] = {}  # peer -> (incarnation, index; 0: to be proposed)
        self.due = False

    def asked(self, peer: str, incarnation: str) -> int | None:
        """A peer asks: the index of its barrier, or None, if it is new and a barrier is due."""
        known = self._barriers.get(peer)
        if known is None or known[0] != incarnation:
            self._barriers[peer] = (incarnation, 0)
            self.due = True
            return None
        return known[1] or None

    def proposed(self, index: int) -> None:
        """An entry was proposed that is a barrier for all who wait for one."""
        self.due = False
        for peer, (incarnation, known) in self._barriers.items():
            if not known:
                self._barriers[peer] = (incarnation, index)

    def clear(self) -> None:
        """The leadership is over."""
        self._barriers.clear()
        self.due = False
