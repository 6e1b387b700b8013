"""One group's replica: pysyncobj's SyncObj, driven from outside, with the rules that make it safe.

What is overridden, and why (the list is closed):

- applying entries: our bytes to our machine, never a pickle; an exception is fatal to the process;
- taking commands: they are pulled from the machine, only on a leader whose own no-op is applied;
- `__connectedToAnyone`, which only guards campaigns: a pre-vote must be won first (Ongaro's thesis 9.6);
- sending appends: a follower that needs entries which the log no longer has is offered our snapshot instead;
- log compaction and the poller: switched off.

Around its transport, both ways (`send`, `deliver`):

- every message carries its sender's term; answers of another term are dropped;
- resets are acted upon once: appends are numbered in rounds, answers echo the round;
- an append never deletes what does not conflict: the prefix that the log has is skipped; an append without anything new
  is delivered at the log's end, and the answer says what it verified; the commit index is clamped to the same;
- a vote counts once per voter and term; votes are not given away while a leader is alive, except in a transfer;
- a replica that lost its disk is silent until a barrier is behind it (see `Replica.recover`).

Why recovery is safe. A blank replica B has forgotten votes and acknowledgements. It neither votes nor acknowledges (its
answers are marked and never counted) until a leader L of a term t has committed, with a majority that does not include B,
an entry that was proposed after L heard of B's blank store, and B has applied up to that entry. (1) A forgotten vote of B
for a term above t: the candidate C had raised its own term before. Whoever acknowledged the barrier was below that term
then, and holds the barrier; C does not hold it, as it refuses appends of t. So none of that majority votes for C, and C
cannot win. (2) A forgotten acknowledgement of an entry e that is committed: any majority that was formed without B before
the barrier intersects the majority that stored e in a replica other than B, or else leaders were elected by B's vote
before it was wiped, when B still held e. So L holds e, and B holds e after the barrier. This equals removing B and adding
a new member as a learner (thesis 3.8, 4.2.1).
"""
from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from spillway.cluster.consensus.journal import GroupJournal
from spillway.cluster.consensus.seam import NO_OP, REGULAR, Node, NoPoller, Timing, Transport, configuration, library
from spillway.cluster.errors import StoreRefused
from spillway.cluster.machine import ENTRY_BYTES_MAX, GroupMachine, Role

APPLY_BYTES_PER_TURN = 8 << 20  # other groups get their turn during a long replay
KEEP_LOG_BYTES = 1 << 20  # of each group, for followers that are merely slow
TRANSFER_SECONDS = 0.5  # proposals pause for at most this long
SNAPSHOT_RETRY_SECONDS = 2.0

Send = Callable[[str, int, int, dict[str, Any]], None]  # peer, group, sender's term, message


class _Wire(Transport):  # type: ignore[misc]
    """What SyncObj takes for its transport."""

    def __init__(self) -> None:
        super().__init__(None, None, None)
        self.replica: Replica | None = None

    def send(self, node: Any, message: dict[str, Any]) -> bool:
        """From SyncObj."""
        assert self.replica is not None
        return self.replica.send(node.id, message)


class Replica(library.SyncObj):  # type: ignore[misc]
    """See the module. The host calls `deliver`, `tick`, `propose` in its turns; time is `library.monotonicTime`."""

    def __init__(self, group: int, node_id: str, members: list[str], machine: GroupMachine, journal: GroupJournal,
                 timing: Timing, send: Send) -> None:
        """Raises StoreRefused if the log is behind the state: then acknowledged entries are missing from it."""
        self.group = group
        self.node_id = node_id
        self.machine = machine
        self.journal = journal
        self.timing = timing
        self.recovering = False
        self.barrier = 0  # recovering: the index to reach; 0: not known yet
        self.incarnation = ""
        self._send = send
        self._round: dict[str, int] = {}  # leader: per follower
        self._voted: set[tuple[str, int]] = set()
        self._prevotes: set[str] = set()
        self._prevote_term = 0
        self._prevote_until = 0.0
        self._heard_leader = -1e9  # when an append of the current leader came in
        self._transfer_term = 0  # campaigning for this term at the leader's wish
        self._transfer_until = 0.0
        self._transfer_to: str | None = None
        self._asked = -1e9  # recovering: when the leader was last asked
        self._fix: int | None = None  # the next index that the answer under way may claim
        self._echo = 0
        self._snapshots: dict[str, float] = {}  # peer -> when a snapshot was offered or made progress
        self._recoveries: dict[str, tuple[str, int]] = {}  # peer -> (incarnation, barrier index)
        self._barrier_due = False
        self._told: tuple[Any, ...] = ()
        durable = machine.durable_index()
        fresh = len(journal) == 0
        if not fresh and durable and not journal.first <= durable <= journal.last:
            raise StoreRefused(f"group {group}: the log holds entries {journal.first} to {journal.last}, but the state is at "
                               f"{durable}: part of this node's data is lost. Replace it by an empty node")
        if fresh and durable:
            raise StoreRefused(f"group {group}: the state is at entry {durable}, but the log is lost. Replace this node by an "
                               "empty one; if it is the only one, restore a backup")
        if not fresh and not durable and journal.first > 1:
            raise StoreRefused(f"group {group}: the log starts at {journal.first}, but the state is lost. Replace this node by "
                               "an empty one")
        journal.keep = max(journal.keep, durable)
        wire = _Wire()
        wire.replica = self
        self._nodes = {m: Node(m) for m in members if m != node_id}
        super().__init__(Node(node_id), list(self._nodes.values()), configuration(journal, timing), transport=wire)
        self._poller = NoPoller()
        self._SyncObj__raftLastApplied = max(1, durable)
        self._SyncObj__raftCommitIndex = max(journal.getRaftCommitIndex(), 1, durable)
        # The first election need not wait for a leader's silence: pre-votes protect a leader that is there.
        self._SyncObj__raftElectionDeadline = library.monotonicTime() + (random.random() * 0.4 if self._nodes else 0)  # noqa: S311

    # -- what the host reads -------------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        """Current term."""
        return int(self._SyncObj__raftCurrentTerm)

    @property
    def applied(self) -> int:
        """Highest index applied."""
        return int(self._SyncObj__raftLastApplied)

    @property
    def leader(self) -> str | None:
        """Node id of the leader, as far as known."""
        node = self._SyncObj__raftLeader
        return None if node is None else str(node.id)

    @property
    def serving(self) -> bool:
        """A leader whose own no-op is applied."""
        return bool(self._isLeader()) and self._SyncObj__noopIDx is not None and self.applied >= self._SyncObj__noopIDx

    @property
    def role(self) -> Role:
        """For people and for the machine."""
        if self.recovering:
            return Role.RECOVERING
        if self.serving:
            return Role.LEADER
        return Role.CANDIDATE if self._SyncObj__raftState == 1 else Role.FOLLOWER

    @property
    def behind(self) -> bool:
        """Committed entries wait to be applied."""
        return bool(self._SyncObj__raftCommitIndex > self._SyncObj__raftLastApplied)

    def matched(self, peer: str) -> int:
        """Leader: the follower's log is known to agree up to here."""
        return int(self._SyncObj__raftMatchIndex.get(self._nodes[peer], 0))

    def connected(self, peer: str) -> bool:
        """Whether the library may talk to a peer."""
        return self._nodes[peer] in self._SyncObj__connectedNodes

    # -- driving -------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Elections, commit, apply, heartbeats."""
        now = library.monotonicTime()
        if self._snapshots and self._isLeader():
            for peer, since in list(self._snapshots.items()):
                if now - since > SNAPSHOT_RETRY_SECONDS:
                    del self._snapshots[peer]
                    self._SyncObj__connectedNodes.add(self._nodes[peer])
                else:
                    self._SyncObj__lastResponseTime[self._nodes[peer]] = now
        self._onTick(0)
        if self._transfer_to is not None:
            self._try_transfer()
        if self.recovering:
            if self.barrier and self.applied >= self.barrier:
                self.recovering = False
            else:
                self._ask_recovery(now)
        self.tell_role()

    def propose(self) -> bool:
        """Takes commands from the machine into the log and sends them; true if there were any."""
        if not self.serving:
            return False
        now = library.monotonicTime()
        journal = self.journal
        index = journal.last
        start = index
        term = self.term
        if self._barrier_due:
            self._barrier_due = False
            index += 1
            journal.add(NO_OP, index, term)
            for peer, (incarnation, barrier) in self._recoveries.items():
                if not barrier:
                    self._recoveries[peer] = (incarnation, index)
        if now >= self._transfer_until:
            while (command := self.machine.collect()) is not None:
                assert len(command) <= ENTRY_BYTES_MAX, f"a command of {len(command)} bytes"
                index += 1
                journal.add(REGULAR + command, index, term)
        if index == start:
            return False
        self._SyncObj__sendAppendEntries()
        return True

    def tell_role(self) -> None:
        """Tells the machine when role, term or leader changed."""
        role = self.role
        now = (role, self.term, self.leader)
        if now != self._told:
            if role is not Role.LEADER:
                self._recoveries.clear()
                self._snapshots.clear()
            self._told = now
            self.machine.role_changed(role, self.term, self.leader)

    def connect(self, peer: str) -> None:
        """A new connection to a peer; everything of the old one is dead."""
        self._snapshots.pop(peer, None)
        node = self._nodes[peer]
        self._SyncObj__onNodeConnected(node)
        if self._isLeader():
            matched = self.matched(peer)
            if matched:  # what was sent into the old connection may be lost
                self._SyncObj__raftNextIndex[node] = matched + 1
            self._SyncObj__newAppendEntriesTime = 0

    def disconnect(self, peer: str) -> None:
        """The connection to a peer is lost. If it led, the others need not wait for its silence."""
        self._SyncObj__onNodeDisconnected(self._nodes[peer])
        self._snapshots.pop(peer, None)
        if self.leader == peer and not self._isLeader():
            self._heard_leader = -1e9
            timing = self.timing
            wait = timing.disconnect_min + (timing.disconnect_max - timing.disconnect_min) * random.random()  # noqa: S311
            deadline = library.monotonicTime() + wait
            self._SyncObj__raftElectionDeadline = min(self._SyncObj__raftElectionDeadline, deadline)

    def stalled(self, seconds: float) -> None:
        """The loop stood still: a leader's messages may be waiting, so do not campaign before they are read."""
        self._SyncObj__raftElectionDeadline += seconds
        self._heard_leader += seconds

    def transfer(self, peer: str) -> bool:
        """Asks a follower that has everything to take over; proposals pause meanwhile. False if it cannot now."""
        now = library.monotonicTime()
        if not self.serving or peer not in self._nodes or not self.connected(peer) or now < self._transfer_until:
            return False
        if self.journal.last - self.matched(peer) > 1000:
            return False
        self._transfer_until = now + TRANSFER_SECONDS
        self._transfer_to = peer
        self._try_transfer()
        return True

    def _try_transfer(self) -> None:
        peer = self._transfer_to
        if peer is not None and self._isLeader() and library.monotonicTime() < self._transfer_until and (
                self.matched(peer) == self.journal.last == self.applied and self.connected(peer)):
            self._transfer_to = None
            self._send(peer, self.group, self.term, {"type": "timeout_now"})

    # -- overrides of SyncObj ------------------------------------------------------------------------------------

    def _SyncObj__applyLogEntries(self) -> bool:
        commit = self._SyncObj__raftCommitIndex
        applied = self._SyncObj__raftLastApplied
        if commit > applied:
            apply = self.machine.apply
            size = 0
            first = self.journal.first
            for command, index, term in self.journal[applied + 1 - first:commit + 1 - first]:
                if command[0] == 0:
                    apply(index, term, command[1:])
                self._SyncObj__raftLastApplied = index
                size += len(command)
                if self._SyncObj__noopIDx == index:
                    self.tell_role()  # from here on this leader serves
                if size > APPLY_BYTES_PER_TURN:
                    break
        return False

    def _SyncObj__connectedToAnyone(self) -> bool:
        """SyncObj asks this only when its election deadline has passed: may it campaign?"""
        if self.recovering:
            return False
        term = self.term + 1
        if not self._nodes:
            return True
        if self._SyncObj__transferInProgress:
            self._transfer_term = term
            return True
        now = library.monotonicTime()
        if self._prevote_term == term and len(self._prevotes) + 1 > (len(self._nodes) + 1) / 2:
            self._prevote_term = 0
            return True
        if self._prevote_term != term or now > self._prevote_until:
            self._prevotes.clear()
            self._prevote_term = term
            self._prevote_until = now + self.timing.election_min * 0.25
            for peer in self._nodes:
                self._out(peer, {"type": "prevote", "term": term, "last_log_index": self.journal.last,
                                 "last_log_term": self.journal[-1][2]})
        return False

    def _checkCommandsToApply(self) -> None:
        """Commands are pulled in `propose`."""

    def _SyncObj__tryLogCompaction(self) -> None:
        """Compaction is the host's."""

    def _SyncObj__sendAppendEntries(self) -> None:
        first = self.journal.first
        connected = self._SyncObj__connectedNodes
        for peer, node in self._nodes.items():
            if node in connected and self._SyncObj__raftNextIndex[node] <= first and not (
                    self._SyncObj__raftNextIndex[node] == first == 1):
                connected.discard(node)  # the library must not reach for a snapshot of its own
                self._snapshots[peer] = library.monotonicTime()
                self._out(peer, {"type": "snapshot_offer"})
            elif node in connected and self._SyncObj__raftNextIndex[node] == first:
                self._SyncObj__raftNextIndex[node] = first + 1
        super()._SyncObj__sendAppendEntries()

    # -- out -----------------------------------------------------------------------------------------------------

    def _out(self, peer: str, message: dict[str, Any]) -> None:
        self._send(peer, self.group, self.term, message)

    def send(self, peer: str, message: dict[str, Any]) -> bool:
        """From the library to a peer."""
        kind = message["type"]
        if kind == "append_entries":
            assert "serialized" not in message and "transmission" not in message, "the library's own snapshot or chunking"
            message["round"] = self._round.get(peer, 0)
        elif kind == "next_node_idx":
            if self._fix is not None and message["success"]:
                message["next_node_idx"] = self._fix  # claim only what this append verified
            elif message["reset"]:
                # Everything up to our commit index agrees with any leader: no need to search back entry by entry.
                message["next_node_idx"] = min(message["next_node_idx"], self._SyncObj__raftCommitIndex + 1)
            message["round"] = self._echo
            message["recovering"] = self.recovering
        elif kind == "request_vote":
            message["transfer"] = self._transfer_term == message["term"]
        elif kind == "response_vote" and self.recovering:
            return True
        self._out(peer, message)
        return True

    # -- in ------------------------------------------------------------------------------------------------------

    def deliver(self, peer: str, m: dict[str, Any]) -> None:
        """A decoded message of a peer."""
        node = self._nodes.get(peer)
        if node is None:
            return
        kind = m["type"]
        now = library.monotonicTime()
        if kind == "append_entries":
            self._deliver_append(node, m, now)
        elif kind == "next_node_idx":
            self._deliver_answer(node, peer, m, now)
        elif kind == "request_vote":
            if not self.recovering and (m["transfer"] or not self._leader_alive(now)):
                self._onMessage(node, m)
        elif kind == "response_vote":
            if (peer, m["term"]) not in self._voted:
                self._voted = {v for v in self._voted if v[1] >= self.term}
                self._voted.add((peer, m["term"]))
                self._onMessage(node, m)
        elif kind == "timeout_now":
            if not self.recovering:
                self._onMessage(node, m)
        elif kind == "prevote":
            mine = (self.journal[-1][2], self.journal.last)
            if not self.recovering and m["term"] > self.term and (m["last_log_term"], m["last_log_index"]) >= mine and (
                    not self._leader_alive(now)):
                self._out(peer, {"type": "prevote_granted", "term": m["term"]})
        elif kind == "prevote_granted":
            if m["term"] == self._prevote_term == self.term + 1:
                self._prevotes.add(peer)
        elif kind == "snapshot_done":
            if peer in self._snapshots and m["sender_term"] == self.term:
                del self._snapshots[peer]
                self._SyncObj__raftNextIndex[node] = m["index"] + 1
                self._round[peer] = self._round.get(peer, 0) + 1
                self._SyncObj__connectedNodes.add(node)
        elif kind == "recovery_request":
            self._deliver_recovery(peer, m["incarnation"])
        elif kind == "recovery_answer":
            if self.recovering and m["incarnation"] == self.incarnation and m["sender_term"] == self.term:
                self.barrier = m["index"]
        self.tell_role()

    def _onMessage(self, node: Any, m: dict[str, Any]) -> None:
        self._SyncObj__onMessageReceived(node, m)

    def _leader_alive(self, now: float) -> bool:
        """Whether this replica has, or is, a leader in touch: then nobody needs to campaign."""
        if self._isLeader():
            deadline = now - self.timing.election_min
            heard = 1 + sum(t > deadline for t in self._SyncObj__lastResponseTime.values())
            return bool(heard > (len(self._nodes) + 1) / 2)
        return self._SyncObj__raftLeader is not None and now - self._heard_leader < self.timing.election_min

    def _deliver_append(self, node: Any, m: dict[str, Any], now: float) -> None:
        if m["term"] < self.term:
            # A deposed leader learns of the new term, and does not wait for its fallback.
            self._out(node.id, {"type": "next_node_idx", "next_node_idx": 0, "reset": False, "success": False, "round": 0,
                                "recovering": False})
            return
        assert not (m["term"] == self.term and self._isLeader()), "two leaders in one term"
        self._heard_leader = now
        self._echo = m["round"]
        m = self._trim(m)
        self._onMessage(node, m)
        self._fix = None

    def _trim(self, m: dict[str, Any]) -> dict[str, Any]:
        """Skips what the log already has, so that only a real conflict is ever deleted (Raft 5.3)."""
        journal = self.journal
        first, last = journal.first, journal.last
        prev, term, new = m["prevLogIdx"], m["prevLogTerm"], list(m["entries"])
        end = prev + len(new)
        while prev < first and new:  # compacted here means committed here
            prev, term = new[0][1], new[0][2]
            new.pop(0)
        if prev < first and not new:
            self._fix = end + 1  # all of it is committed here already
            return dict(m, prevLogIdx=last, prevLogTerm=journal[-1][2], entries=[], commit_index=min(m["commit_index"], end))
        if journal.term_at(prev) != term:
            return dict(m, commit_index=0)  # the library answers with a reset; nothing was verified
        skip = 0
        while skip < len(new) and prev < last and journal.term_at(prev + 1) == new[skip][2]:
            prev, term = new[skip][1], new[skip][2]
            skip += 1
        new = new[skip:]
        if not new:  # nothing new: it must not delete the tail
            self._fix, prev, term = end + 1, last, journal[-1][2]
        return dict(m, prevLogIdx=prev, prevLogTerm=term, entries=new, commit_index=min(m["commit_index"], end))

    def _deliver_answer(self, node: Any, peer: str, m: dict[str, Any], now: float) -> None:
        if m["sender_term"] > self.term:
            # Only a newer term makes anyone answer so: step down as for any message of a newer term.
            self._SyncObj__setCurrentTerm(m["sender_term"], None)
            self._SyncObj__setState(0)
            self._SyncObj__raftLeader = None
            self._SyncObj__raftElectionDeadline = now + self.timing.election_min * (1 + random.random())  # noqa: S311
            return
        if m["sender_term"] != self.term or not self._isLeader():
            return
        if m["reset"]:
            if m["round"] != self._round.get(peer, 0):
                m = dict(m, reset=False)  # this reset was acted upon already
            else:
                self._round[peer] = m["round"] + 1
        if m["recovering"]:
            if m["reset"] or m["success"]:
                self._SyncObj__raftNextIndex[node] = m["next_node_idx"]
            if m["reset"]:
                self._SyncObj__newAppendEntriesTime = 0
            return
        if m["success"]:
            self._recoveries.pop(peer, None)
        self._onMessage(node, m)
        if m["reset"]:
            self._SyncObj__newAppendEntriesTime = 0

    # -- recovery of a lost disk ---------------------------------------------------------------------------------

    def recover(self, incarnation: str) -> None:
        """This replica's store is new, but the cluster is not: be silent until a barrier is behind us."""
        self.recovering = True
        self.incarnation = incarnation
        self.barrier = 0

    def _ask_recovery(self, now: float) -> None:
        leader = self.leader
        if leader is not None and leader != self.node_id and now - self._asked > self.timing.heartbeat:
            self._asked = now
            self._out(leader, {"type": "recovery_request", "incarnation": self.incarnation})

    def _deliver_recovery(self, peer: str, incarnation: str) -> None:
        if not self.serving:
            return
        known = self._recoveries.get(peer)
        if known is None or known[0] != incarnation:
            node = self._nodes[peer]
            # What the old store acknowledged no longer counts, and may not be sent after.
            self._SyncObj__raftMatchIndex[node] = 0
            self._recoveries[peer] = (incarnation, 0)
            self._barrier_due = True
        elif known[1] and self._SyncObj__raftCommitIndex >= known[1]:
            self._out(peer, {"type": "recovery_answer", "incarnation": incarnation, "index": known[1]})

    # -- snapshots -----------------------------------------------------------------------------------------------

    def snapshot_progress(self, peer: str) -> None:
        """Leader: the peer is fetching a snapshot."""
        if peer in self._snapshots:
            self._snapshots[peer] = library.monotonicTime()

    def installed(self, index: int, term: int) -> None:
        """Follower: our state is now a snapshot as of an entry; the log starts there."""
        assert index > self.applied, "a snapshot at or below what is applied"
        kept = self.journal.term_at(index) == term
        if kept:
            self.journal.keep = max(self.journal.keep, index)
        else:
            self.journal.restart(index, term)
        self._SyncObj__raftLastApplied = index
        self._SyncObj__raftCommitIndex = max(self._SyncObj__raftCommitIndex, index)
        if self.term < term:
            self._SyncObj__setCurrentTerm(term, None)
        self.machine.reload()

    def compact(self) -> None:
        """Drops the log below what the state has durably."""
        if not self._snapshots:
            self.journal.compact(min(self.machine.durable_index(), self.applied), KEEP_LOG_BYTES)
