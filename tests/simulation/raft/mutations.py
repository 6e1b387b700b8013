"""Switches that turn one safety rule off each: the simulation must see that it is missing, or a hand-built scenario must.

`python -m tests.simulation.raft.mutations NAME` runs seeds until one fails.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from spillway.cluster.raft import host as host_module
from spillway.cluster.raft import wire
from spillway.cluster.raft.engine import Engine
from spillway.cluster.raft.formation import Standing
from spillway.cluster.raft.group import RaftGroup
from spillway.cluster.raft.guard import Guard
from spillway.cluster.raft.host import RaftHost
from spillway.cluster.raft.journal import GroupJournal
from spillway.cluster.raft.membership import Membership
from spillway.cluster.raft.recovery import Recovery
from spillway.cluster.raft.seam import LEADER
from spillway.peer.v1.raft_pb2 import RaftFrame

from tests.simulation.raft.world import World

Mutation = Callable[[], Any]


def _send_at_once(self: RaftHost, peer: str, group: int, term: int, message: dict[str, Any]) -> None:
    epoch = self._epochs.get(peer)
    if epoch is not None:
        self.transport.send(peer, epoch, RaftFrame(messages=[wire.encode(group, term, message)]).SerializeToString())


def _release_before_sync() -> Any:
    """R2: messages leave when they are made."""
    return patch.object(RaftHost, "_send", _send_at_once)


def _apply_unsynced() -> Any:
    """R2: what is added counts as synced."""
    append = GroupJournal._append

    def unsafe(self: GroupJournal, entry: tuple[bytes, int, int]) -> None:
        append(self, entry)
        self.synced = self.last
    return patch.object(GroupJournal, "_append", unsafe)


def _compact_applied() -> Any:
    """R5: the log is dropped up to what is applied, though the state does not have it durably."""
    def unsafe(self: RaftGroup, keep_bytes: int) -> int:
        return self.journal.compact(self.engine.applied, 0)
    return patch.object(RaftGroup, "compact", unsafe)


def _apply_again() -> Any:
    """R6: a restarted replica applies from the first entry that the log has."""
    init = Engine.__init__

    def unsafe(self: Engine, *args: Any) -> None:
        init(self, *args)
        journal = args[2]
        self.applied = journal.applied = max(1, journal.first)
    return patch.object(Engine, "__init__", unsafe)


def _never_trim() -> Any:
    """R10: the library sees appends as they come."""
    return patch.object(Guard, "trim", lambda self, append: (append, None))


def _trim_without_clamp() -> Any:
    """R10: the commit index is not clamped to what the append verified."""
    trim = Guard.trim

    def unsafe(self: Guard, append: dict[str, Any]) -> Any:
        trimmed, claim = trim(self, append)
        return dict(trimmed, commit_index=append["commit_index"]), claim
    return patch.object(Guard, "trim", unsafe)


def _trim_without_claim() -> Any:
    """R10: the answer names the end of the log, verified or not."""
    trim = Guard.trim
    return patch.object(Guard, "trim", lambda self, append: (trim(self, append)[0], None))


def _every_reset() -> Any:
    """R10a: every reset is acted upon."""
    judge = Guard.judge
    return patch.object(Guard, "judge", lambda self, answer, term, now: judge(self, dict(answer, round=now), term, now))


def _any_term() -> Any:
    """R10b: an answer to another term's leader counts."""
    judge = Guard.judge
    return patch.object(Guard, "judge",
                        lambda self, answer, term, now: judge(self, dict(answer, sender_term=term), term, now))


def _every_vote() -> Any:
    """R11: a vote counts as often as it comes."""
    return patch.object(Guard, "first_vote", lambda self, voter, term: True)


def _any_epoch() -> Any:
    """R8: frames of old connections are delivered."""
    def unsafe(self: RaftHost, peer: str, epoch: int, data: bytes) -> None:
        received = wire.decode_frame(data)
        self._enqueue("", 0, lambda: self._deliver(peer, received))
    return patch.object(RaftHost, "_on_frame", unsafe)


def _wiped_is_fresh() -> Any:
    """R18: a node that lost its disk takes part at once."""
    return patch.object(host_module, "decide", lambda *args: Standing.FRESH)


def _no_barrier() -> Any:
    """R18: a recovering replica is admitted as soon as it hears of a leader."""
    return patch.object(Recovery, "passed", lambda self, term, verified, applied: True)


def _two_changes() -> Any:
    """R17: a change is proposed though another one is not committed."""
    return patch.object(Membership, "index", property(lambda self: 0))


def _change_before_no_op() -> Any:
    """R17: a leader changes members before it has committed anything of its term."""
    check = Membership.check

    def unsafe(self: Membership, change: Any) -> Any:
        with patch.object(RaftGroup, "serving", property(lambda group: group.engine.state == LEADER)):
            return check(self, change)
    return patch.object(Membership, "check", unsafe)


def _forget_members() -> Any:
    """R17: a restart goes by the configuration as of the log's first entry."""
    load = GroupJournal._load

    def unsafe(self: GroupJournal, durable: int) -> None:
        load(self, durable)
        del self._configurations[1:]
    return patch.object(GroupJournal, "_load", unsafe)


def _learners_count() -> Any:
    """R17: learners vote and acknowledge as voters do."""
    voters = Membership.other_voters.fget
    return patch.object(Membership, "other_voters", property(
        lambda self: [*voters(self), *(n for n in self.configuration.learners if n != self._group.node_id)]))


def _members_stay() -> Any:
    """R17: a truncation does not bring back the configuration from before."""
    delete = GroupJournal.deleteEntriesFrom

    def unsafe(self: GroupJournal, position: int) -> None:
        known = list(self._configurations)
        delete(self, position)
        self._configurations = known
    return patch.object(GroupJournal, "deleteEntriesFrom", unsafe)


def _snapshot_without_members() -> Any:
    """R17: a snapshot does not say who the members are."""
    installed = RaftGroup.installed
    return patch.object(RaftGroup, "installed", lambda self, index, term, configuration: installed(self, index, term, None))


def _joiner_is_fresh() -> Any:
    """R17: a node that joins takes part at once, though it may have been a member before, whose log it has no more."""
    recover = RaftGroup.recover

    def unsafe(self: RaftGroup, incarnation: str) -> None:
        if self.journal._configurations[0][1].voters:
            recover(self, incarnation)
        else:
            self.journal.admit(incarnation)
    return patch.object(RaftGroup, "recover", unsafe)


@contextmanager
def _vote_lost() -> Iterator[None]:
    """Term and vote are written, but a restart does not see the vote."""
    load = GroupJournal._load

    def unsafe(self: GroupJournal, durable: int) -> None:
        load(self, durable)
        self._vote = None
    with patch.object(GroupJournal, "_load", unsafe):
        yield


@contextmanager
def _forget_install() -> Iterator[None]:
    """R16: a restart does not know that a snapshot was being installed."""
    with patch.object(GroupJournal, "begin_install", lambda self, applied: None):
        yield


SEEN: dict[str, Mutation] = {
    "release before sync": _release_before_sync,
    "apply unsynced": _apply_unsynced,
    "compact applied": _compact_applied,
    "apply again": _apply_again,
    "never trim": _never_trim,
    "trim without clamp": _trim_without_clamp,
    "trim without claim": _trim_without_claim,
    "every reset": _every_reset,
    "any term": _any_term,
    "every vote": _every_vote,
    "any epoch": _any_epoch,
    "wiped is fresh": _wiped_is_fresh,
    "no barrier": _no_barrier,
    "vote lost": _vote_lost,
    "forget install": _forget_install,
    "two changes": _two_changes,
    "change before no-op": _change_before_no_op,
    "forget members": _forget_members,
    "learners count": _learners_count,
    "members stay": _members_stay,
    "snapshot without members": _snapshot_without_members,
    "joiner is fresh": _joiner_is_fresh,
}


def first_failure(name: str, seeds: int) -> tuple[int, BaseException] | None:
    """The first seed from 0 on that fails without the rule, and how; None if all pass."""
    with SEEN[name]():
        for seed in range(seeds):
            try:
                World(seed).run()
            except Exception as error:
                return seed, error
    return None


if __name__ == "__main__":
    logging.getLogger("spillway").setLevel(logging.ERROR)
    for wanted in sys.argv[2:] or SEEN:
        found = first_failure(wanted, int(sys.argv[1]))
        what = "NOT SEEN" if found is None else f"seed {found[0]}: {type(found[1]).__name__}: {str(found[1])[:110]}"
        print(f"{wanted:22} {what}", flush=True)
