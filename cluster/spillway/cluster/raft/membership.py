"""How the members of a group change (R17; Ongaro's thesis, chapter 4). Beside what `configuration` says:

- One change at a time: the next one is proposed when the last configuration in the leader's log is committed. The library's own
  check of that is dead code, and its membership changes are never used.
- A leader proposes none before the first entry of its own term is committed. Else an uncommitted configuration of an earlier
  leader and its own could be two steps apart, with majorities that have no node in common (Ongaro's correction of 2015).
- A node comes in as a learner and is promoted when it has caught up: until then a majority would wait for it.
- A leader does not remove or demote itself: it hands over first, so that nobody leads a group that it is not a member of.
- Who is removed or demoted is told only after that is committed. A node with such an entry in its log could not campaign, and
  nobody who lacks the entry could get its vote, though by the configuration before that may be the vote that decides.
- Votes are given to whoever asks and is up to date, member or not, by voters, learners and those who know no configuration: a
  new voter may be needed before it knows that it is one. They are counted by the candidate, from the voters of its own log.
- A change is refused that would leave fewer voters in touch than the new majority: it could not be committed, nor undone. The
  same happens if a voter loses its disk right then; so a group has three voters again before anything else is changed.

A replica that has applied its own removal, and knows all that the leader had committed, is dropped by the host with its log;
its term and vote stay on the disk, because the same node may be added again and must not vote twice. A replica that joins may
have been one that was dropped, so it is treated as one that lost its disk (see `recovery`): it neither campaigns nor votes nor
counts until it has all that was committed when it asked. Else it could go by a part of the log that ends where it was a voter,
even the only one; or its blank log would give somebody its vote who has not heard of what followed. And it is promoted only
with the configuration in its log that made it a learner: it can then not end by a removal from before.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from spillway.cluster.errors import ChangeInFlight, ChangeInvalid, NotCaughtUp, NotLeading
from spillway.cluster.raft.configuration import Change, ChangeKind, Configuration
from spillway.cluster.raft.seam import source

if TYPE_CHECKING:
    from spillway.cluster.raft.group import RaftGroup

CAUGHT_UP_ENTRIES = 100  # a learner that lacks fewer is promoted: with a few turns of a busy log it is there
FAREWELL_SECONDS = 3.0  # a removed node hears for so long that it is


class Membership:
    """The membership of one replica's group, as its log has it."""

    def __init__(self, group: RaftGroup) -> None:
        self._group = group
        self.configuration = group.journal.configuration
        """The one that counts."""
        self.leader_commit = 0
        """What the leader had committed when it was heard last."""
        self._pending = False  # the configuration may not be committed
        self._leaving: tuple[str, int] | None = None  # who was removed by this leader, by which entry
        self._farewell: tuple[str, float] | None = None  # who still hears from it, until when

    @property
    def index(self) -> int:
        """Of the entry that made the configuration; 0 for the one that the group was founded with."""
        return self._group.journal.configuration_index

    @property
    def voting(self) -> bool:
        """Whether this replica may campaign."""
        return self._group.node_id in self.configuration.voters

    @property
    def removed(self) -> bool:
        """Whether this replica has applied that it is no member any more, and is not on its way to an entry that adds it again."""
        journal = self._group.journal
        return self._group.node_id not in self.configuration and 0 < self.index <= journal.applied and (
            0 < self.leader_commit <= journal.last)

    @property
    def other_voters(self) -> list[str]:
        """Whose votes and acknowledgements count, beside its own."""
        return [n for n in self.configuration.voters if n != self._group.node_id]

    @property
    def receivers(self) -> list[str]:
        """To whom a leader sends entries though they do not count."""
        before = self._group.journal.configuration_before if self._pending else None
        demoted = before.voters if before is not None else ()
        learners = [n for n in self.configuration.learners if n != self._group.node_id and n not in demoted]
        return learners if self._farewell is None else [*learners, self._farewell[0]]

    def follow(self) -> bool:
        """Goes by the last configuration in the log. True if that is another one."""
        configuration = self._group.journal.configuration
        self._pending = self.index > self._group.engine.commit
        if configuration is self.configuration:
            return False
        self.configuration = configuration
        if self._farewell is not None and self._farewell[0] in configuration:
            self._farewell = None
        return True

    # -- leader --------------------------------------------------------------------------------------------------

    def check(self, change: Change) -> Configuration:
        """The configuration after a change that may be made now. Raises ChangeRefused."""
        group = self._group
        if not group.serving:
            raise NotLeading(f"this node does not lead group {group.number}")
        if self.index > group.engine.commit:
            raise ChangeInFlight(f"a change of group {group.number} is under way, by entry {self.index}")
        if group.transferring:
            raise ChangeInFlight(f"the leadership of group {group.number} is being handed over")
        changed = self.configuration.after(change)
        if change.kind in (ChangeKind.REMOVE, ChangeKind.DEMOTE) and change.node_id == group.node_id:
            raise ChangeInvalid(f"node {group.node_id} leads group {group.number}; hand it over first")
        if change.kind is ChangeKind.PROMOTE:
            self._check_caught_up(change.node_id)
        if change.kind is not ChangeKind.ADD_LEARNER:
            alive = 1 + sum(self._in_touch(n) for n in changed.voters if n != group.node_id)
            if alive < changed.quorum:
                raise NotCaughtUp(f"group {group.number} would have {len(changed.voters)} voters, and only {alive} are in touch")
        return changed

    def _in_touch(self, node_id: str) -> bool:
        engine = self._group.engine
        return engine.match_index(node_id) > 0 and engine.responded_since(node_id, source.now - self._group.timing.election_min)

    def _check_caught_up(self, node_id: str) -> None:
        group = self._group
        match = group.engine.match_index(node_id)
        lacks = group.journal.last - match
        if lacks > CAUGHT_UP_ENTRIES or match < self.index or not match:
            raise NotCaughtUp(f"node {node_id} lacks {lacks} entries of group {group.number}; up to {CAUGHT_UP_ENTRIES} are few enough")

    def proposed(self, change: Change, index: int) -> None:
        """The leader has a change in its log."""
        if change.kind is ChangeKind.REMOVE:
            self._leaving = change.node_id, index

    def pursue(self) -> bool:
        """In every tick. True if those who receive are others now."""
        if self._leaving is not None and self._group.engine.commit >= self._leaving[1]:
            self._farewell, self._leaving = (self._leaving[0], source.now + FAREWELL_SECONDS), None
            return True
        if self._farewell is not None and source.now >= self._farewell[1]:
            self._farewell = None
            return True
        return self._pending and self._group.engine.commit >= self.index

    def resigned(self) -> bool:
        """A leadership is over. True if those who receive are others now."""
        self._leaving = None
        if self._farewell is None:
            return False
        self._farewell = None
        return True
