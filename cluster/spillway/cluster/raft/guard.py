"""The safety rules around what the library sends and receives. Pure: no clock, no I/O, no library.

Messages are the library's dictionaries with three keys of ours: `sender_term`, the sender's current term; `round`, on
appends and their answers; `recovering`, on answers. Each rule closes a gap that loses acknowledged entries or applies
different ones on two replicas; the numbers are those of the adapter's rules.

- R10, `trim`: the library deletes everything after prevLogIdx, matching or not. What the log already has is skipped, so
  only a real conflict is ever deleted (Raft 5.3); an append without anything new is delivered at the end of the log, and
  the answer is put right. The commit index is clamped to the last entry that this append verified.
- R10a, `judge`: a reset is acted upon once. Appends to a follower are numbered in rounds, answers echo the round, and a
  reset of an older round becomes a plain answer.
- R10b, `judge`: an answer to the leader of another term is dropped.
- R10c: snapshots of the library never travel; see `wire`, which has no shape for them.
- R11, `first_vote`: one vote per voter and term counts.
- R8, connections: the host drops what belongs to an older one.
"""
from __future__ import annotations

from typing import Any, Protocol

Message = dict[str, Any]


class LogView(Protocol):
    """What the rules read of a log."""

    first: int
    """Index of the first entry."""
    last: int
    """Index of the last entry."""
    commit: int
    """Everything up to here is committed."""

    def term_at(self, index: int) -> int | None:
        """The term of an entry, None if the log does not have it."""

    def term_start(self, index: int) -> int:
        """The first index of the run of entries with the term of this one."""


class Guard:
    """The rules of one replica, with the little memory that they need."""

    def __init__(self, log: LogView) -> None:
        self.log = log
        self._votes: set[str] = set()
        self._votes_term = 0

    # -- follower ------------------------------------------------------------------------------------------------

    def trim(self, append: Message) -> tuple[Message, int | None]:
        """An append as the library may have it, and the next index that the answer must name (None: as the library says).

        If the log does not have its previous entry, the library is made to answer with a reset, whose next index is our
        hint, and nothing is committed."""
        log = self.log
        prev, term = append["prevLogIdx"], append["prevLogTerm"]
        new = append["entries"]
        skip, count = 0, len(new)
        end = prev + count
        last = log.last
        if prev < log.first:  # compacted here means committed, hence the same, there
            if end < log.first:  # nothing of it is visible any more
                return self._nothing_new(append, end)
            skip = log.first - prev
            prev, term = new[skip - 1][1], new[skip - 1][2]
        if log.term_at(prev) != term:
            # Delivered where the log has nothing, so that the library resets without reading the log from there on.
            return dict(append, prevLogIdx=last + 1, entries=[], commit_index=0), self.hint(prev)
        while skip < count and prev < last and log.term_at(prev + 1) == new[skip][2]:
            prev += 1
            term = new[skip][2]
            skip += 1
        if skip == count and prev < last:
            return self._nothing_new(append, end)
        return dict(append, prevLogIdx=prev, prevLogTerm=term, entries=new[skip:] if skip else new,
                    commit_index=min(append["commit_index"], end)), end + 1

    def _nothing_new(self, append: Message, end: int) -> tuple[Message, int]:
        """At the end of the log, where there is nothing to delete; verified is only up to `end`."""
        last = self.log.last
        return dict(append, prevLogIdx=last, prevLogTerm=self.log.term_at(last), entries=[],
                    commit_index=min(append["commit_index"], end)), end + 1

    def hint(self, prev: int) -> int:
        """Where the leader should go on when the log has not its entry `prev`: after our log if that is shorter, else at the
        start of the conflicting term (the leader has none or another one of it), but never at or below what is committed,
        which agrees with any leader's log."""
        log = self.log
        if prev > log.last:
            return log.last + 1
        return max(log.commit + 1, log.term_start(max(prev, log.first)))

    # -- leader --------------------------------------------------------------------------------------------------

    def judge(self, answer: Message, term: int, round_now: int) -> Message | None:
        """An answer as the leader of `term` may have it, None if it is not for this leader."""
        if answer["sender_term"] != term:
            return None
        if answer["reset"] and answer["round"] != round_now:
            return dict(answer, reset=False)
        return answer

    # -- candidate -----------------------------------------------------------------------------------------------

    def first_vote(self, voter: str, term: int) -> bool:
        """Whether this is the first vote of the voter in a term."""
        if term != self._votes_term:
            self._votes_term = term
            self._votes = set()
        if voter in self._votes:
            return False
        self._votes.add(voter)
        return True
