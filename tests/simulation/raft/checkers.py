"""What must hold in every run, whatever fails. One class per invariant; each raises Violation the moment it does not."""
from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING

from spillway.cluster.machine import Role
from spillway.cluster.raft.configuration import Configuration
from spillway.cluster.raft.seam import LEADER as RAFT_LEADER
from spillway.cluster.transport.base import Handlers, PeerHello
from spillway.peer.v1.raft_pb2 import RaftFrame

if TYPE_CHECKING:
    from tests.simulation.raft.world import SimNode


class Violation(Exception):
    """An invariant does not hold."""


class SameHistory:
    """Every replica applies the same commands at the same indexes, each once and in order."""

    def __init__(self) -> None:
        self.entries: dict[int, dict[int, tuple[int, bytes]]] = {}

    def applied(self, node: SimNode, group: int, last: int, index: int, term: int, command: bytes) -> None:
        """A machine applies an entry after `last`."""
        if index <= last:
            raise Violation(f"{node.name} applies entry {index} of group {group} after {last}")
        known = self.entries.setdefault(group, {}).setdefault(index, (term, command))
        if known != (term, command):
            raise Violation(f"{node.name} applies {(term, command)!r} at {index} of group {group}, another one {known!r}")


class NothingLost:
    """A command that its leader applied, and so acknowledged, is never lost."""

    def __init__(self) -> None:
        self.acked: dict[int, dict[bytes, int]] = {}

    def ack(self, group: int, command: bytes, index: int) -> None:
        """A client was told."""
        self.acked.setdefault(group, {})[command] = index

    def final(self, group: int, contents: dict[int, bytes], node: str) -> None:
        """After the end, on every replica."""
        lost = [c for c, i in self.acked.get(group, {}).items() if contents.get(i) != c]
        if lost:
            raise Violation(f"{len(lost)} acknowledged commands of group {group} are lost on {node}: {lost[:3]}")


class OneLeader:
    """No two leaders in a term."""

    def __init__(self) -> None:
        self._leaders: dict[tuple[int, int], str] = {}

    def role(self, node: SimNode, group: int, role: Role, term: int) -> None:
        """A machine is told its role."""
        if role is Role.LEADER:
            known = self._leaders.setdefault((group, term), node.name)
            if known != node.name:
                raise Violation(f"{node.name} and {known} lead group {group} in term {term}")


class ElectedByMajority:
    """Whoever leads in a term has the votes of a majority, on their disks."""

    def __init__(self) -> None:
        self._known: set[tuple[str, int, int]] = set()

    def look(self, node: SimNode) -> None:
        """After a turn."""
        for number, group in node.host.groups.items():
            term = group.engine.term
            if group.engine.state != RAFT_LEADER or (node.name, number, term) in self._known:
                continue
            self._known.add((node.name, number, term))
            others = [node.world.nodes[name] for name in group.journal.configuration.voters]
            refused = [other.name for other in others if self._voted_otherwise(other, number, term, node.name)]
            if 2 * (len(others) - len(refused)) <= len(others):
                raise Violation(f"{node.name} leads group {number} in term {term}; {refused} did not vote for it")

    @staticmethod
    def _voted_otherwise(other: SimNode, group: int, term: int, candidate: str) -> bool:
        """Whether a node certainly gave no vote: what it has on its disk is of this term."""
        hard = other.disk.durable.get(group.to_bytes(4, "big") + b"H")
        if other.disks > 1 and group.to_bytes(4, "big") + b"A" not in other.disk.durable:
            return False  # it may have voted with the disk that it lost, and the vote came late
        if hard is None:
            return True
        known = struct.unpack_from("<Q", hard)[0]
        return known < term or (known == term and hard[8:].decode() != candidate)


class NothingStale:
    """What comes from an older connection is not taken in (R8)."""

    def __init__(self) -> None:
        self._epochs: dict[tuple[str, int, str], int] = {}  # (node, life, peer) -> epoch of the present connection

    def watch(self, node: SimNode, handlers: Handlers) -> Handlers:
        """Handlers of a node, seen through."""
        life = node.life

        def connected(peer: str, epoch: int, hello: PeerHello) -> None:
            self._epochs[node.name, life, peer] = epoch
            handlers.connected(peer, epoch, hello)

        def frame(peer: str, epoch: int, data: bytes) -> None:
            waiting = len(node.host._input)
            handlers.frame(peer, epoch, data)
            if self._epochs.get((node.name, life, peer)) != epoch and len(node.host._input) > waiting:
                raise Violation(f"{node.name} takes in a frame of {peer} of an older connection")

        def disconnected(peer: str, epoch: int) -> None:
            self._epochs.pop((node.name, life, peer), None)
            handlers.disconnected(peer, epoch)
        return Handlers(connected, frame, disconnected)


class CommittedStays:
    """The (index, term) of a committed entry never changes, on any replica, and the log keeps it until compaction."""

    def __init__(self) -> None:
        self._terms: dict[tuple[int, int], int] = {}
        self._looked: dict[tuple[str, int], tuple[int, int]] = {}

    def forget(self, node: SimNode, group: int) -> None:
        """A replica ended."""
        self._looked.pop((node.name, group), None)

    def look(self, node: SimNode) -> None:
        """After a turn."""
        for number, group in node.host.groups.items():
            journal, commit = group.journal, group.engine.commit
            life, seen = self._looked.get((node.name, number), (0, 0))
            if life != node.life:
                seen = 0
            if commit < seen:
                raise Violation(f"{node.name}: the commit index of group {number} goes back from {seen} to {commit}")
            if journal.last < commit:
                raise Violation(f"{node.name}: group {number} has committed {commit}, its log ends at {journal.last}")
            for index in range(max(seen, journal.first), commit + 1):
                term = journal.term_at(index)
                known = self._terms.setdefault((number, index), term)
                if term != known:
                    raise Violation(f"{node.name}: entry {index} of group {number} is committed in terms {term} and {known}")
            self._looked[node.name, number] = (node.life, commit)


class NothingUnsynced:
    """What leaves a node is on its disk."""

    def frame(self, node: SimNode, peer: str, data: bytes) -> None:
        """A frame leaves."""
        durable = node.disk.durable
        for m in RaftFrame.FromString(data).messages:
            name = m.group.to_bytes(4, "big")
            hard = durable.get(name + b"H", b"\0" * 8)
            term = struct.unpack_from("<Q", hard)[0]
            kind = m.WhichOneof("body")
            if kind != "prevote_answer" and kind != "prevote_request" and term < m.term:
                raise Violation(f"{node.name} sends {kind} of term {m.term}, on its disk is {term}")
            if kind == "vote_answer" and term == m.term and hard[8:].decode() != peer:
                raise Violation(f"{node.name} votes for {peer} in term {m.term}, on its disk is {hard[8:]!r}")
            if term != m.term or m.group not in node.host.groups:
                continue
            first = node.host.groups[m.group].journal.first  # what lies before was dropped in this turn, or earlier
            if kind == "append":
                for i, entry in enumerate(m.append.entries, m.append.prev_index + 1):
                    row = durable.get(struct.pack(">IcQ", m.group, b"E", i))
                    if row != struct.pack("<Q", entry.term) + entry.command and i >= first:
                        raise Violation(f"{node.name} sends entry {i} of group {m.group}, which is not on its disk")
            if kind == "append_answer" and m.append_answer.success:
                last = m.append_answer.next_index - 1
                if last >= first and struct.pack(">IcQ", m.group, b"E", last) not in durable:
                    raise Violation(f"{node.name} acknowledges {last} of group {m.group}, which is not on its disk")


class OneChangeAtATime:
    """R17: a replica goes by the last configuration in its log; of a leader's own, one is uncommitted at most, and none is older
    than what it committed first; those that are committed follow each other by one voter."""

    def __init__(self) -> None:
        self._committed: dict[int, dict[int, Configuration]] = {}
        self._seen: set[tuple[int, int, int]] = set()

    def last(self, group: int) -> tuple[int, Configuration | None]:
        """The last one that is known to be committed, and its index."""
        known = self._committed.get(group, {})
        index = max(known, default=0)
        return index, known.get(index)

    def look(self, node: SimNode) -> None:
        """After a turn."""
        for number, group in node.host.groups.items():
            journal, commit, index = group.journal, group.engine.commit, group.journal.configuration_index
            where = f"{node.name}: group {number}"
            known = self._committed.setdefault(number, {})
            if group.configuration != journal.configuration or index > journal.last:
                raise Violation(f"{where} goes by the configuration of entry {index}, its log ends at {journal.last}")
            missed = [i for i in known if index < i <= commit]
            if missed:
                raise Violation(f"{where} goes by the configuration of entry {index}, and has committed {missed}")
            own = []
            for i, configuration in journal._configurations:
                if i and i <= commit and known.setdefault(i, configuration) != configuration:
                    raise Violation(f"{where} has committed {configuration} at {i}, another one {known[i]}")
                term = journal.term_at(i)
                if term == group.engine.term and group.engine.state == RAFT_LEADER:
                    own.append(i)
                    if (number, i, term) not in self._seen:
                        self._seen.add((number, i, term))
                        if commit < journal.term_start(i):
                            raise Violation(f"{where} changes by entry {i}, and has committed nothing of its term {term}")
            if len([i for i in own if i > commit]) > 1:
                raise Violation(f"{where} has proposed {own} and committed {commit}")

    def final(self) -> None:
        """After the end."""
        for group, known in self._committed.items():
            for (i, before), (j, after) in pairwise(sorted(known.items())):
                if len({*before.voters} ^ {*after.voters}) > 1:
                    raise Violation(f"group {group} went from {before} at {i} to {after} at {j}")


class StoredByMajority:
    """What a leader commits is on the disks of a majority of the voters."""

    def __init__(self) -> None:
        self._looked: dict[tuple[str, int, int], int] = {}

    def look(self, node: SimNode) -> None:
        """After a turn."""
        for number, group in node.host.groups.items():
            if group.engine.state != RAFT_LEADER:
                continue
            commit, journal = group.engine.commit, group.journal
            key = (node.name, number, group.engine.term)
            if commit <= self._looked.get(key, 0) or journal.term_at(commit) != group.engine.term:
                continue
            self._looked[key] = commit
            row = struct.pack(">IcQ", number, b"E", commit)
            entry = node.disk.durable.get(row)
            voters = [node.world.nodes[name] for name in journal.configuration.voters]
            if entry is None:
                continue  # compacted in the same turn
            stored = [v for v in voters if v.disk.durable.get(row) == entry or v.disks > 1 or (
                v.saved.get(number, (0,))[0] >= commit)]
            if 2 * len(stored) <= len(voters):
                raise Violation(f"{node.name} has committed {commit} of group {number}, stored by {[v.name for v in stored]} of "
                                f"{journal.configuration.voters}")
