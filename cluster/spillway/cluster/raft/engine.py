"""pysyncobj's SyncObj with the closed list of overrides. The library keeps elections, vote check, log matching, commit rule;
what it does not do well, or unsafely, is the group's (see `group`).

Overridden, by private name:
    __applyLogEntries        our bytes to our machine: no pickle, bounded per turn; an exception ends the process
    __connectedToAnyone      asked only before a campaign: has a pre-vote been won?
    __sendAppendEntries      windows instead of a clock, offers instead of the library's snapshots and chunks
    _checkCommandsToApply    commands are pulled from the machine, see `RaftGroup.collect`
    __tryLogCompaction       off; the host compacts
    _applyCommand, __doApplyCommand, __parseChangeClusterRequest, __loadDumpFile: never reached, so they raise
"""
from __future__ import annotations

from typing import Any, Protocol

from spillway.cluster.raft.guard import Message
from spillway.cluster.raft.journal import GroupJournal, LogViolation
from spillway.cluster.raft.seam import NoPoller, PeerNode, Timing, Transport, configuration, library, source


class EngineOwner(Protocol):
    """What the engine asks of its group."""

    def apply_committed(self) -> None:
        """Applies what is committed, as much as fits into a turn."""

    def may_campaign(self) -> bool:
        """The election deadline has passed: may the replica campaign?"""

    def send_appends(self) -> None:
        """A leadership begins, or a heartbeat is due."""

    def outgoing(self, peer: str, message: Message) -> None:
        """A message of the library to a peer."""


class _Wire(Transport):  # type: ignore[misc]
    """What SyncObj takes for its transport."""

    def __init__(self, owner: EngineOwner) -> None:
        super().__init__(None, None, None)
        self._owner = owner

    def send(self, node: Any, message: Message) -> bool:
        """From SyncObj."""
        self._owner.outgoing(node.id, message)
        return True


def _never(what: str) -> Any:
    def raises(self: Any, *args: Any, **kwargs: Any) -> None:
        raise LogViolation(f"the library's {what} must not be used")
    return raises


class Engine(library.SyncObj):  # type: ignore[misc]
    """One replica's library object, driven by its group. Time and chance are those of `seam.source`."""

    def __init__(self, owner: EngineOwner, node_id: str, journal: GroupJournal, timing: Timing, applied: int) -> None:
        """`applied` is the index of the last entry that the machine has; nothing below it is applied again. It is alone until
        `set_members`."""
        self._owner = owner
        self._journal = journal
        self.nodes: dict[str, PeerNode] = {}
        super().__init__(PeerNode(node_id), [], configuration(journal, timing), transport=_Wire(owner))
        self._poller = NoPoller()
        # R6: it would begin at 1 and apply everything again.
        self._SyncObj__raftLastApplied = max(1, applied)
        self._SyncObj__raftCommitIndex = max(journal.getRaftCommitIndex(), self._SyncObj__raftLastApplied)
        journal.applied = self._SyncObj__raftLastApplied
        journal.setRaftCommitIndex(self._SyncObj__raftCommitIndex)

    # -- overrides -----------------------------------------------------------------------------------------------

    def _SyncObj__applyLogEntries(self) -> bool:
        self._owner.apply_committed()
        return False

    def _SyncObj__connectedToAnyone(self) -> bool:
        return self._owner.may_campaign()

    def _SyncObj__sendAppendEntries(self) -> None:
        self._owner.send_appends()

    def _checkCommandsToApply(self) -> None:
        pass

    def _SyncObj__tryLogCompaction(self) -> None:
        pass

    _applyCommand = _never("command queue")
    _SyncObj__doApplyCommand = _never("commands")
    _SyncObj__parseChangeClusterRequest = _never("membership changes")
    _SyncObj__loadDumpFile = _never("dumps")

    # -- what the group reads and sets ---------------------------------------------------------------------------

    def _node(self, peer: str) -> PeerNode:
        node = self.nodes.get(peer)
        if node is None:
            node = self.nodes[peer] = PeerNode(peer)
        return node

    def set_members(self, voters: list[str], receivers: list[str]) -> None:
        """Whose votes and acknowledgements count, and to whom else entries are sent, without this replica."""
        # The library keeps a set, whose order depends on the process; a simulation needs the same order every time.
        self._SyncObj__otherNodes = dict.fromkeys(self._node(peer) for peer in voters).keys()
        for peer in (*voters, *receivers):
            if self._node(peer) not in self._SyncObj__raftMatchIndex:
                self.begin_follower(peer)
        for peer, node in self.nodes.items():
            if peer not in voters and peer not in receivers:
                self._SyncObj__raftMatchIndex.pop(node, None)
                self._SyncObj__raftNextIndex.pop(node, None)
                self._SyncObj__lastResponseTime.pop(node, None)
                self._SyncObj__connectedNodes.discard(node)

    def begin_follower(self, peer: str) -> None:
        """Leader: nothing is known of the peer's log. The library does this for voters when a leadership begins."""
        node = self.nodes[peer]
        self._SyncObj__raftMatchIndex[node] = 0
        self._SyncObj__raftNextIndex[node] = self._journal.last + 1
        self._SyncObj__lastResponseTime[node] = source.now

    @property
    def term(self) -> int:
        """Current term."""
        return int(self._SyncObj__raftCurrentTerm)

    @property
    def state(self) -> int:
        """seam.FOLLOWER, CANDIDATE or LEADER."""
        return int(self._SyncObj__raftState)

    @property
    def leader(self) -> str | None:
        """Node id of the leader that it follows or is, None if unknown."""
        node = self._SyncObj__raftLeader
        return None if node is None else str(node.id)

    @property
    def commit(self) -> int:
        """Highest index known to be committed."""
        return self._SyncObj__raftCommitIndex

    @property
    def applied(self) -> int:
        """Highest index applied."""
        return self._SyncObj__raftLastApplied

    @applied.setter
    def applied(self, index: int) -> None:
        self._SyncObj__raftLastApplied = index

    @property
    def first_of_term(self) -> int | None:
        """Leader: index of its own no-op."""
        index: int | None = self._SyncObj__noopIDx
        return index

    @property
    def transfer_pending(self) -> bool:
        """The leader has asked for an election of this replica."""
        return bool(self._SyncObj__transferInProgress)

    @property
    def deadline(self) -> float:
        """When to campaign, unless a leader is heard."""
        return self._SyncObj__raftElectionDeadline

    @deadline.setter
    def deadline(self, when: float) -> None:
        self._SyncObj__raftElectionDeadline = when

    def next_index(self, peer: str) -> int:
        """Leader: what to send next."""
        return int(self._SyncObj__raftNextIndex[self.nodes[peer]])

    def set_next_index(self, peer: str, index: int) -> None:
        """Leader: what to send next."""
        self._SyncObj__raftNextIndex[self.nodes[peer]] = index

    def match_index(self, peer: str) -> int:
        """Leader: the peer's log agrees up to here."""
        return int(self._SyncObj__raftMatchIndex[self.nodes[peer]])

    def forget_match(self, peer: str) -> None:
        """Leader: the peer's log is lost; what it acknowledged does not count any more."""
        self._SyncObj__raftMatchIndex[self.nodes[peer]] = 0

    def responses_since(self, when: float) -> int:
        """Leader: how many voters were heard since then, itself included."""
        times = self._SyncObj__lastResponseTime
        return 1 + sum(bool(times[node] > when) for node in self._SyncObj__otherNodes)

    def responded_since(self, peer: str, when: float) -> bool:
        """Leader: whether a member was heard since then."""
        return bool(self._SyncObj__lastResponseTime[self.nodes[peer]] > when)

    def heartbeat_at(self, when: float) -> None:
        """Leader: when to send again though there is nothing new."""
        self._SyncObj__newAppendEntriesTime = when

    def set_connected(self, peer: str, connected: bool) -> None:
        """Whether messages reach a peer."""
        nodes = self._SyncObj__connectedNodes
        (nodes.add if connected else nodes.discard)(self._node(peer))

    def is_connected(self, peer: str) -> bool:
        """Whether messages reach a peer."""
        return self.nodes[peer] in self._SyncObj__connectedNodes

    def tick(self) -> None:
        """Campaigns, commits, applies, sends heartbeats."""
        self._onTick(0)

    def receive(self, peer: str, message: Message) -> None:
        """A message that passed the guard."""
        self._SyncObj__onMessageReceived(self._node(peer), message)

    def follow_term(self, term: int) -> None:
        """A higher term was seen: a follower of nobody in it, as after any message of that term."""
        self._SyncObj__setCurrentTerm(term, None)
        self._SyncObj__setState(0)
        self._SyncObj__raftLeader = None

    def spend_vote(self, node_id: str) -> None:
        """Gives this term's vote to a node, so that nobody else gets it."""
        self._SyncObj__setCurrentTerm(self.term, node_id)

    def adopt(self, index: int) -> None:
        """The state is now as of `index`, which is committed."""
        self._SyncObj__raftLastApplied = index
        self._SyncObj__raftCommitIndex = max(self._SyncObj__raftCommitIndex, index)
