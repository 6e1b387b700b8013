"""One replica of one group: the library's engine with our rules around it. Sans-IO: the host delivers, ticks, collects and
sends; time is `seam.source.now`; whatever is written goes into the journal's batch of the turn.

Beside the guard's rules, this is where these are kept:

- R3: an exception of the machine is let through; the host ends the process.
- R5, R16: the log is dropped up to the state's durable index; a follower that needs more is offered a snapshot.
- R6: an entry is applied once, in order, and only when it is on our own disk: otherwise the state could get ahead of a log
  that a crash cuts short.
- R12: a leader of an older term gets an answer with ours, and steps down.
- R13: a campaign needs a pre-vote, and no vote is given while a leader is heard, except in a transfer (thesis, 9.6, 4.2.3).
"""
from __future__ import annotations

from collections.abc import Callable, Container

from spillway.cluster.clock import Clock
from spillway.cluster.errors import REPLACE_HINT, StorageDamaged, StoreRefused
from spillway.cluster.machine import ENTRY_BYTES_MAX, GroupMachine, Role
from spillway.cluster.raft.configuration import Change, Configuration, decode_configuration
from spillway.cluster.raft.engine import Engine
from spillway.cluster.raft.guard import Guard, Message
from spillway.cluster.raft.journal import ENTRY_OVERHEAD_BYTES, GroupJournal, LogViolation
from spillway.cluster.raft.membership import CAUGHT_UP_ENTRIES, Membership
from spillway.cluster.raft.progress import Limits, Progress
from spillway.cluster.raft.recovery import Barriers, Recovery
from spillway.cluster.raft.seam import CANDIDATE, CONFIGURATION, FOLLOWER, LEADER, NO_OP, REGULAR, Timing, source
from spillway.cluster.snapshots import RESUME_SECONDS

APPLY_BYTES_PER_TURN = 8 << 20  # a long replay must not keep other groups waiting
APPLY_SECONDS_PER_TURN = 0.02
TRANSFER_SECONDS = 1.0  # proposals pause at most so long for a transfer that does not come about
TRANSFER_REPEAT_SECONDS = 0.1
FOLLOWER_ALIVE_SECONDS = 3.0  # one that has answered is there for so long: the log is kept for it
SNAPSHOT_RETRY_SECONDS = 0.5  # after a fetch that failed
RESTART_HINT = "replace this node by an empty one; the others will bring it up to date"

Send = Callable[[str, int, int, Message], None]  # peer, group, sender's term, message
NEVER = -1e9


class RaftGroup:
    """See the module. `send` takes (peer, group, term, message), to be released after the turn's sync."""

    def __init__(self, number: int, node_id: str, members: list[str], machine: GroupMachine, journal: GroupJournal,
                 timing: Timing, limits: Limits, send: Send, clock: Clock,
                 changed: Callable[[int], None] = lambda group: None) -> None:
        """`members` are the voters that the group was founded with; none on a node that joined later: its log tells. Raises
        StoreRefused if log and state do not fit together: then something acknowledged is missing."""
        self.number = number
        self.node_id = node_id
        self.machine = machine
        self.journal = journal
        self.timing = timing
        self.limits = limits
        self.clock = clock
        self.guard = Guard(journal)
        self.recovery: Recovery | None = None
        self.installing = False  # a snapshot: nothing is applied, no campaign
        self.fetch_from: str | None = None  # whom to ask for it; the host takes this
        self._send_out = send
        self._changed = changed
        self._barriers = Barriers()
        self._progress: dict[str, Progress] = {}
        self._connected: set[str] = set()
        self._leading_term = 0  # for which the progress stands
        self._heard = NEVER  # a leader
        self._verified = (0, 0)  # term, index: our log agrees with that term's leader up to here
        self._next_claim: int | None = None  # the next index that the answer under way may name
        self._round = 0  # of the message that is being answered
        self._offer: tuple[str, int, int] | None = None  # leader, term, round of the offer that is being followed
        self._fetch_after = NEVER
        self._prevote_term = 0
        self._prevote_until = 0.0
        self._promises: set[str] = set()
        self._transfer_term = 0  # the term for which the leader asked us to campaign
        self._transfer: tuple[str, float] | None = None  # to whom, until when
        self._transfer_sent = NEVER
        self._told: tuple[int, int, str | None, bool, bool] | None = None
        durable = machine.durable_index()
        check_fit(number, journal, durable, members)
        journal.found(Configuration.of(members))
        self.engine = Engine(self, node_id, journal, timing, durable)
        self.membership = Membership(self)
        self._follow_members()
        if self.alone:
            self.engine.deadline = NEVER  # nobody to wait for

    # -- what others read ----------------------------------------------------------------------------------------

    @property
    def configuration(self) -> Configuration:
        """Who the members are, as far as this replica's log says."""
        return self.membership.configuration

    @property
    def quorum(self) -> int:
        """How many voters decide."""
        return self.membership.configuration.quorum

    @property
    def alone(self) -> bool:
        """The only voter."""
        return self.membership.configuration.voters == (self.node_id,)

    @property
    def serving(self) -> bool:
        """Leads, and has applied its own first entry."""
        engine = self.engine
        if engine.state != LEADER:
            return False
        first = engine.first_of_term
        return first is not None and engine.applied >= first

    @property
    def role(self) -> Role:
        """As the machine is told."""
        if self.recovery is not None:
            return Role.RECOVERING
        if self.serving:
            return Role.LEADER
        return Role.FOLLOWER if self.engine.state == FOLLOWER else Role.CANDIDATE

    @property
    def leader(self) -> str | None:
        """Node id of the leader; our own only when it serves."""
        leader = self.engine.leader
        return leader if leader != self.node_id or self.serving else None

    @property
    def behind(self) -> bool:
        """More can be applied right away."""
        return not self.installing and min(self.engine.commit, self.journal.synced) > self.engine.applied

    @property
    def transferring(self) -> bool:
        """Proposals pause for a transfer."""
        return self._transfer is not None

    def __repr__(self) -> str:
        e, j = self.engine, self.journal
        return (f"<group {self.number} on {self.node_id}: {self.role.value}, leader {self.leader}, term {e.term}, "
                f"log {j.first}..{j.last}, commit {e.commit}, applied {e.applied}>")

    # -- connections ---------------------------------------------------------------------------------------------

    def connected(self, peer: str) -> None:
        """A new connection to a peer; nothing of an older one counts any more."""
        self._connected.add(peer)
        if peer in self._progress:
            self._restart_progress(peer)
            if self.engine.state == LEADER:
                self._send_entries(peer, beat=True)

    def disconnected(self, peer: str) -> None:
        """The connection to a peer broke. If it led, its silence need not be waited for: those who still hear it refuse
        the pre-vote."""
        self._connected.discard(peer)
        self.engine.set_connected(peer, False)
        engine = self.engine
        if engine.leader == peer and engine.state == FOLLOWER:
            self._heard = NEVER
            wait = self.timing.lost_min + (self.timing.lost_max - self.timing.lost_min) * source.random()
            engine.deadline = min(engine.deadline, source.now + wait)

    def _restart_progress(self, peer: str) -> None:
        progress = self._progress[peer]
        progress.start_over()
        progress.offered()
        engine = self.engine
        engine.set_connected(peer, peer in self._connected)
        if engine.state == LEADER and engine.match_index(peer):
            engine.set_next_index(peer, engine.match_index(peer) + 1)

    # -- driving -------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Campaigns, commits, applies, heartbeats; then what is ours to do in time."""
        engine = self.engine
        engine.tick()
        self._note()
        if engine.state == LEADER and self.membership.pursue():
            self._follow_members()
        if self._transfer is not None:
            self._pursue_transfer()
        if self.recovery is not None:
            self._pursue_recovery(self.recovery)

    def collect(self) -> bool:
        """On a leader that serves: takes the machine's commands into the log and sends them. True if there were any."""
        if self._transfer is not None or not self.serving:
            return False
        journal, term = self.journal, self.engine.term
        start = journal.last
        if self._barriers.due:
            journal.add(NO_OP, journal.last + 1, term)
            self._barriers.proposed(journal.last)
        collect = self.machine.collect
        while (command := collect()) is not None:
            if len(command) > ENTRY_BYTES_MAX:
                raise LogViolation(f"group {self.number}: a command of {len(command)} bytes; at most {ENTRY_BYTES_MAX}")
            journal.add(REGULAR + command, journal.last + 1, term)
        if journal.last == start:
            return False
        for peer in self._progress:
            self._send_entries(peer, beat=False)
        return True

    def stalled(self, seconds: float) -> None:
        """The node stood still; a leader's messages may be on their way, so that silence does not count."""
        self.engine.deadline += seconds
        self._heard += seconds

    def compact(self, keep_bytes: int) -> int:
        """Drops what the state has durably from the log; returns the number of entries. Keeps what followers that answer still need,
        and those that fetch a snapshot will, within bounds; a dead follower holds nothing."""
        journal = self.journal
        if journal.bytes <= keep_bytes + keep_bytes // 4:
            return 0
        upto = self.machine.durable_index()
        if self.engine.state == LEADER:
            hold = self.limits.hold
            for progress in self._progress.values():
                if (source.now < progress.alive_until and journal.first <= progress.hold_index < upto
                        and journal.bytes <= hold + progress.snapshot_bytes):
                    upto = progress.hold_index
        return journal.compact(upto, keep_bytes)

    def _note(self) -> None:
        """Tells the machine and the host when role, term or leader changed."""
        engine = self.engine
        told = (engine.state, engine.term, engine.leader, self.serving, self.recovery is not None)
        if told == self._told:
            return
        before, self._told = self._told, told
        if before is not None and before[0] == LEADER and engine.state != LEADER:
            self._barriers.clear()
            self._transfer = None
            if self.membership.resigned():
                self._follow_members()
            self._wait_again(self.timing.election_min, self.timing.election_max)
        elif engine.state == CANDIDATE and (before is None or before[:2] != told[:2]):
            # A split vote is tried again soon; the pre-vote keeps that harmless.
            self._wait_again(self.timing.election_min * 0.3, self.timing.election_min * 0.8)
        self.machine.role_changed(self.role, engine.term, self.leader)
        self._changed(self.number)

    def _wait_again(self, least: float, most: float) -> None:
        self.engine.deadline = source.now + least + (most - least) * source.random()

    # -- what the engine asks for --------------------------------------------------------------------------------

    def apply_committed(self) -> None:
        """See EngineOwner."""
        engine, journal = self.engine, self.journal
        applied = engine.applied
        limit = min(engine.commit, journal.synced)
        if limit <= applied or self.installing:
            return
        apply, monotonic = self.machine.apply, self.clock.monotonic
        until = monotonic() + APPLY_SECONDS_PER_TURN
        for command, index, term in journal.entries_up_to(applied + 1, limit + 1, APPLY_BYTES_PER_TURN):
            if command[0] == 0:
                apply(index, term, command[1:])
            elif command[:1] == CONFIGURATION:
                self.machine.configured(index, term, command[1:])
            engine.applied = journal.applied = index
            if monotonic() > until:
                break

    def may_campaign(self) -> bool:
        """See EngineOwner."""
        engine = self.engine
        if self.recovery is not None or self.installing or not self.membership.voting:
            return False
        if self.alone:
            return True
        term = engine.term + 1
        if engine.transfer_pending:
            self._transfer_term = term
            return True
        if self._prevote_term == term:
            if len(self._promises) + 1 >= self.quorum:
                self._prevote_term = 0
                return True
            if source.now < self._prevote_until:
                return False
        self._prevote_term = term
        self._prevote_until = source.now + self.timing.election_min * (0.2 + 0.2 * source.random())
        self._promises.clear()
        last_term, last = self._end()
        for peer in self.membership.other_voters:
            self._out(peer, {"type": "prevote_request", "term": term, "last_log_index": last, "last_log_term": last_term,
                             "transfer": False})
        return False

    def send_appends(self) -> None:
        """See EngineOwner."""
        engine = self.engine
        engine.heartbeat_at(source.now + self.timing.heartbeat)
        if self._leading_term != engine.term:
            self._leading_term = engine.term
            for peer, progress in self._progress.items():
                progress.start_over()
                progress.offered()
                progress.lead()
                engine.begin_follower(peer)
                engine.set_connected(peer, peer in self._connected)
        for peer in self._progress:
            self._send_entries(peer, beat=True)

    def outgoing(self, peer: str, message: Message) -> None:
        """See EngineOwner."""
        kind = message["type"]
        if kind == "next_node_idx":
            if self._next_claim is not None:
                message["next_node_idx"] = self._next_claim  # name only what this append verified
            if message["success"]:
                self._verified = (self.engine.term, message["next_node_idx"] - 1)
            message["round"] = self._round
            message["recovering"] = self.recovery is not None
        elif kind == "request_vote":
            message["transfer"] = self._transfer_term == message["term"]
        elif kind != "response_vote":
            raise LogViolation(f"the library sent {kind}")
        self._out(peer, message)

    # -- sending -------------------------------------------------------------------------------------------------

    def _out(self, peer: str, message: Message) -> None:
        if peer in self._connected:
            self._send_out(peer, self.number, self.engine.term, message)

    def _end(self) -> tuple[int, int]:
        """Term and index of the last entry: what elections compare."""
        last = self.journal[-1]
        return last[2], last[1]

    def _send_entries(self, peer: str, beat: bool) -> None:
        """Leader: sends what the follower lacks and the window allows; with `beat` at least a heartbeat."""
        if peer not in self._connected:
            return
        engine, journal, progress = self.engine, self.journal, self._progress[peer]
        index = engine.next_index(peer)
        if index <= journal.first:
            if not progress.offering:
                progress.offer(journal.first, self.machine.durable_index(), source.now + FOLLOWER_ALIVE_SECONDS)
                engine.set_connected(peer, False)  # the library must not reach for a snapshot of its own
                beat = True
            if beat:
                self._out(peer, {"type": "snapshot_offer", "round": progress.round, "first_index": journal.first})
            return
        if progress.offering:
            progress.offered()
            engine.set_connected(peer, True)
        last = journal.last
        while index <= last and progress.in_flight_bytes < self.limits.window:
            entries = journal.entries_up_to(index, last + 1, self.limits.append)
            self._append(peer, progress, index, entries)
            index = entries[-1][1] + 1
            progress.sent(index - 1, sum(len(e[0]) for e in entries) + ENTRY_OVERHEAD_BYTES * len(entries))
            beat = False
        engine.set_next_index(peer, index)
        if beat:
            self._append(peer, progress, index, [])

    def _append(self, peer: str, progress: Progress, index: int, entries: list[tuple[bytes, int, int]]) -> None:
        self._out(peer, {"type": "append_entries", "round": progress.round, "entries": entries, "prevLogIdx": index - 1,
                         "prevLogTerm": self.journal.term_at(index - 1), "commit_index": self.engine.commit})

    # -- receiving -----------------------------------------------------------------------------------------------

    def deliver(self, peer: str, message: Message) -> None:
        """A message of a peer. Of a node that is no member, as far as this replica knows, only what it may say as a leader or a
        candidate of a configuration that is not known here yet."""
        if peer in self._progress or message["type"] in _OF_ANYBODY:
            _RECEIVERS[message["type"]](self, peer, message)
            self._note()

    def _receive_append(self, peer: str, m: Message) -> None:
        if self._from_leader(peer, m):
            self.membership.leader_commit = m["commit_index"]
            trimmed, self._next_claim = self.guard.trim(m)
            self.engine.receive(peer, trimmed)
            self._next_claim = None
            if self.journal.configuration is not self.membership.configuration:
                self._follow_members()

    def _from_leader(self, peer: str, m: Message) -> bool:
        """Whether a leader's message is of the present leader; an older one is told of our term (R12)."""
        term = self.engine.term
        self._round = m["round"]
        if m["term"] < term:
            self._answer(peer, next_index=0, reset=False)
            return False
        if m["term"] == term and self.engine.state == LEADER:
            raise LogViolation(f"group {self.number}: node {peer} leads in our own term {term}")
        self._heard = source.now
        self._prevote_term = 0
        return True

    def _answer(self, peer: str, next_index: int, reset: bool) -> None:
        self._out(peer, {"type": "next_node_idx", "next_node_idx": next_index, "reset": reset, "success": False,
                         "round": self._round, "recovering": self.recovery is not None})

    def _receive_answer(self, peer: str, m: Message) -> None:
        engine = self.engine
        if m["sender_term"] > engine.term:
            engine.follow_term(m["sender_term"])
            self._wait_again(self.timing.election_min, self.timing.election_max)
            return
        if engine.state != LEADER:
            return
        progress = self._progress[peer]
        answer = self.guard.judge(m, engine.term, progress.round)
        if answer is None:
            return
        index = answer["next_node_idx"]
        last = self.journal.last
        if answer["success"] and index > last + 1:
            return  # it claims entries of our term that we never had: cannot be true, and must not count
        before = engine.next_index(peer)
        if answer["recovering"]:
            engine.forget_match(peer)
        else:
            engine.receive(peer, answer)
        progress.alive_until = max(progress.alive_until, source.now + FOLLOWER_ALIVE_SECONDS)
        if answer["reset"]:
            progress.start_over()
            engine.set_next_index(peer, max(1, min(index, last + 1)))
            progress.needs(engine.next_index(peer) - 1)
            self._send_entries(peer, beat=True)
        else:
            if answer["success"]:
                progress.answered(index - 1)
                before = max(before, index)
            engine.set_next_index(peer, before)  # the library goes back to what was answered, and would send it twice
            if before <= last and not progress.offering:
                self._send_entries(peer, beat=False)

    # -- elections -----------------------------------------------------------------------------------------------

    def _leader_alive(self) -> bool:
        """Whether there is a leader whom an election would only disturb."""
        engine, since = self.engine, source.now - self.timing.election_min
        if engine.state == LEADER:
            return engine.responses_since(since) >= self.quorum
        return engine.leader is not None and self._heard > since

    def _receive_vote_request(self, peer: str, m: Message) -> None:
        if self.recovery is None and (m["transfer"] or not self._leader_alive()):
            self.engine.receive(peer, m)

    def _receive_vote(self, peer: str, m: Message) -> None:
        engine = self.engine
        if m["term"] == engine.term and engine.state == CANDIDATE and (
                peer in self.configuration.voters) and self.guard.first_vote(peer, m["term"]):
            engine.receive(peer, m)

    def _receive_prevote_request(self, peer: str, m: Message) -> None:
        if self.recovery is not None:
            return
        engine = self.engine
        granted = m["term"] > engine.term and (m["last_log_term"], m["last_log_index"]) >= self._end() and (
            not self._leader_alive())
        if granted and engine.state != LEADER and not self.installing:
            # Two that promise each other would campaign against each other.
            engine.deadline = max(engine.deadline, source.now + self.timing.lost_max * (0.2 + 0.8 * source.random()))
        self._out(peer, {"type": "prevote_answer", "term": m["term"], "granted": granted})

    def _receive_prevote(self, peer: str, m: Message) -> None:
        engine = self.engine
        if m["granted"]:
            if m["term"] == self._prevote_term == engine.term + 1 and peer in self.configuration.voters:
                self._promises.add(peer)
        elif m["sender_term"] > engine.term and engine.state != LEADER and self.recovery is None:
            engine.follow_term(m["sender_term"])  # the others are further; ask again for a later term
            self._prevote_term = 0

    def _receive_timeout_now(self, peer: str, m: Message) -> None:
        engine = self.engine
        if self.recovery is None and not self.installing and m["term"] == engine.term and engine.leader == peer:
            engine.receive(peer, m)

    # -- transfer ------------------------------------------------------------------------------------------------

    def transfer(self, to: str | None = None, leaving: Container[str] = ()) -> bool:
        """Hands leadership to a follower, or the one that is furthest and not `leaving`, once everything proposed is applied here, so
        that whoever waits for it has an answer; proposals pause until the other one leads, or for TRANSFER_SECONDS. False if there is
        nobody to hand it to who has nearly everything, or a transfer is under way."""
        if self._transfer is not None or not self.serving:
            return False
        if to is None:
            able = [p for p in self.membership.other_voters if self.engine.is_connected(p) and p not in leaving]
            to = max(able, key=self.engine.match_index, default=None)
        if to is None or to not in self.membership.other_voters or not self.engine.is_connected(to):
            return False
        match = self.engine.match_index(to)
        if not match or self.journal.last - match > CAUGHT_UP_ENTRIES:
            return False  # everybody would wait for it
        self._transfer = (to, source.now + TRANSFER_SECONDS)
        self._transfer_sent = NEVER
        self._pursue_transfer()
        return True

    def _pursue_transfer(self) -> None:
        assert self._transfer is not None
        to, until = self._transfer
        now = source.now
        if now > until or to not in self._connected:
            self._transfer = None
        elif (self.engine.applied == self.journal.last == self.engine.match_index(to)
              and now - self._transfer_sent >= TRANSFER_REPEAT_SECONDS):
            self._transfer_sent = now
            self._out(to, {"type": "timeout_now"})

    # -- members -------------------------------------------------------------------------------------------------

    def propose_change(self, change: Change) -> int:
        """Leader: changes the members, by the entry whose index is returned; it may be lost with the leadership until it is
        committed. Raises ChangeRefused; see `membership`."""
        configuration = self.membership.check(change)
        index = self.journal.last + 1
        self.journal.add(CONFIGURATION + configuration.encode(), index, self.engine.term)
        self.membership.proposed(change, index)
        self._follow_members()
        for peer in self._progress:
            self._send_entries(peer, beat=False)
        return index

    def _follow_members(self) -> None:
        """Goes by the configuration of the log, and by who else receives entries."""
        membership = self.membership
        if not membership.follow() and self._progress.keys() == {*membership.other_voters, *membership.receivers}:
            return
        engine = self.engine
        voters, receivers = membership.other_voters, membership.receivers
        engine.set_members(voters, receivers)
        before, self._progress = self._progress, {}
        for peer in (*voters, *receivers):
            progress = before.get(peer)
            if progress is None:
                progress = Progress()
                engine.set_connected(peer, peer in self._connected)
            self._progress[peer] = progress

    # -- snapshots -----------------------------------------------------------------------------------------------

    def _receive_offer(self, peer: str, m: Message) -> None:
        if not self._from_leader(peer, m):
            return
        engine = self.engine
        engine.receive(peer, {"type": "append_entries", "term": m["term"], "commit_index": 0})  # a sign of life, no more
        if engine.commit >= m["first_index"]:
            self._answer(peer, engine.commit + 1, reset=True)  # its log suffices
            return
        self._answer(peer, 0, reset=False)
        self._offer = (peer, m["term"], m["round"])
        if not self.installing and source.now >= self._fetch_after:
            self.installing = True
            self.fetch_from = peer
            self.journal.begin_install(engine.applied)

    def exported(self, peer: str, size: int, moment: int | None) -> None:
        """So many bytes of a snapshot are sent to a follower; with `moment`, the first ones of the state as of that entry."""
        progress = self._progress.get(peer)
        if progress is not None:
            progress.exported(size, moment, source.now + RESUME_SECONDS)

    def fetch_failed(self) -> None:
        """The snapshot did not come about; the state is as it was."""
        self.installing = False
        self.journal.end_install()
        self._fetch_after = source.now + SNAPSHOT_RETRY_SECONDS

    def installed(self, index: int, term: int, configuration: tuple[int, bytes] | None) -> None:
        """The machine's state is now a snapshot as of the entry (index, term), durably, and it was reloaded. `configuration` is
        what it says of the members, as in SnapshotStore. Raises LogViolation if that is not above what was applied."""
        engine, journal = self.engine, self.journal
        if index <= engine.applied:
            raise LogViolation(f"group {self.number}: a snapshot of {index}, but {engine.applied} is applied")
        self.installing = False
        adopt_snapshot(journal, index, term, configuration)
        engine.adopt(index)
        self._follow_members()
        if engine.term < term:
            engine.follow_term(term)
        if self._offer is not None and self._offer[:2] == (engine.leader, engine.term):
            leader, _, self._round = self._offer
            self._answer(leader, index + 1, reset=True)
        self._offer = None
        self._note()

    # -- recovery ------------------------------------------------------------------------------------------------

    def recover(self, incarnation: str) -> None:
        """This replica's disk was lost, or it joins: it is silent until it is admitted. Raises StoreRefused if it was the only one."""
        if self.alone and not self.journal.configuration_index:
            raise StoreRefused(f"group {self.number} has one replica, here, and its log is lost; restore a backup by `spillway restore`")
        self.recovery = Recovery(incarnation)

    def _pursue_recovery(self, recovery: Recovery) -> None:
        engine = self.engine
        term, index = self._verified
        if term == engine.term and engine.leader is not None and recovery.passed(term, index, engine.applied):
            if self.journal.getVotedForNodeId() is None:
                engine.spend_vote(engine.leader)
            self.journal.admit(recovery.incarnation)
            self.recovery = None
            self._note()
        elif engine.leader is not None and source.now - recovery.asked_at >= self.timing.heartbeat:
            recovery.asked_at = source.now
            self._out(engine.leader, {"type": "recovery_request", "incarnation": recovery.incarnation})

    def _receive_recovery_request(self, peer: str, m: Message) -> None:
        if not self.serving:
            return
        index = self._barriers.asked(peer, m["incarnation"])
        if index is None:
            self.engine.forget_match(peer)
        elif self.engine.commit >= index:
            self._out(peer, {"type": "recovery_answer", "incarnation": m["incarnation"], "barrier_index": index})

    def _receive_recovery_answer(self, peer: str, m: Message) -> None:
        recovery, engine = self.recovery, self.engine
        if recovery is not None and m["incarnation"] == recovery.incarnation and m["sender_term"] == engine.term and (
                engine.leader == peer):
            recovery.told(m["barrier_index"], engine.term)


_RECEIVERS: dict[str, Callable[[RaftGroup, str, Message], None]] = {
    "append_entries": RaftGroup._receive_append,
    "next_node_idx": RaftGroup._receive_answer,
    "request_vote": RaftGroup._receive_vote_request,
    "response_vote": RaftGroup._receive_vote,
    "prevote_request": RaftGroup._receive_prevote_request,
    "prevote_answer": RaftGroup._receive_prevote,
    "timeout_now": RaftGroup._receive_timeout_now,
    "snapshot_offer": RaftGroup._receive_offer,
    "recovery_request": RaftGroup._receive_recovery_request,
    "recovery_answer": RaftGroup._receive_recovery_answer,
}


_OF_ANYBODY = frozenset(("append_entries", "request_vote", "prevote_request", "timeout_now", "snapshot_offer", "recovery_answer"))


def adopt_snapshot(journal: GroupJournal, index: int, term: int, configuration: tuple[int, bytes] | None) -> None:
    """Makes the log agree with a state as of (index, term): kept if it has that entry, else started there. Raises StorageDamaged if
    the state's configuration is none."""
    if journal.term_at(index) == term:
        journal.commit = max(journal.commit, index)
        journal.applied = max(journal.applied, index)
    else:
        journal.restart(index, term, None if configuration is None else _adopted(journal.group, index, *configuration))
    journal.end_install()


def _adopted(group: int, index: int, at: int, configuration: bytes) -> tuple[int, Configuration]:
    try:
        if at > index:
            raise ValueError(f"entry {at} has a configuration, but the state is as of entry {index}")
        return at, decode_configuration(configuration)
    except ValueError as error:
        raise StorageDamaged(f"the state of group {group} is damaged: {error}. {REPLACE_HINT}") from None


def check_fit(group: int, journal: GroupJournal, durable: int, members: list[str]) -> None:
    """Refuses a log and a state that do not belong together (R18)."""
    if journal.last == 0 and durable:
        alone = "restore both from a backup of one moment, or remove the whole directory to start empty"
        raise StoreRefused(f"group {group}: its state is as of entry {durable}, but its log is lost: "
                           f"{alone if len(members) == 1 else RESTART_HINT}")
    if journal.last and durable > journal.last:
        raise StoreRefused(f"group {group}: its state is as of entry {durable}, but its log ends at {journal.last}: "
                           f"{RESTART_HINT}")
    if journal.first > 1 and durable < journal.first:
        raise StoreRefused(f"group {group}: its log begins at {journal.first}, but its state ends at {durable}: "
                           f"{RESTART_HINT}")
