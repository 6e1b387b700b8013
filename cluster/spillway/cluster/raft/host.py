"""All Raft groups of a node, driven together.

One turn, for all groups (R2):

    begin    deliver what peers sent; tick the groups concerned (commit, apply); `before_collect`, where the broker's
             scheduler runs; take new commands into the logs and send; write one batch
    sync     make it durable; nothing else of the host runs meanwhile, only input collects
    finish   release what the turn has to send

So no vote, no answer and no leader's own entry ever counts before it is on disk: messages leave after the sync, and what is
synced is applied and counted in the next turn. The three phases are plain functions of the time given to them; a simulator
calls them, and `run` is a thin loop around them. Errors of the disk, exceptions of a machine and violations of the log are
fatal: `fatal` ends the process, because after one failed sync nothing later can be trusted.
"""
from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Set
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from spillway.cluster.clock import Clock, SystemClock
from spillway.cluster.errors import ChangeRefused, ClusterError, NotLeading, StorageFailed, StoreRefused
from spillway.cluster.machine import GroupMachine, Role
from spillway.cluster.raft import wire
from spillway.cluster.raft.claims import Claims
from spillway.cluster.raft.configuration import Change, Configuration
from spillway.cluster.raft.formation import Hello, Standing, decide
from spillway.cluster.raft.group import RaftGroup, adopt_snapshot, check_fit
from spillway.cluster.raft.guard import Message
from spillway.cluster.raft.journal import FORMAT, JournalStore
from spillway.cluster.raft.progress import Limits
from spillway.cluster.raft.seam import Timing, drive
from spillway.cluster.snapshots import Position, moment_of
from spillway.cluster.transport.base import Handlers, PeerHello, PeerTransport
from spillway.peer.v1.raft_pb2 import RaftFrame, RaftGroupMessage

log = logging.getLogger(__name__)

TICK_SECONDS = 0.05  # idle groups are ticked this often
INLINE_SYNC_BYTES = 64 << 10  # a smaller sync takes 0.13 ms, less than the way to a thread and back
STALL_SECONDS = 0.4  # a longer gap between two turns was ours, not the leader's
CLAIMS_SECONDS = 1.0  # all claims are repeated this often, though only changes matter
STOP_SECONDS = 3.0  # to hand leaderships over
EXIT_FATAL = 70  # EX_SOFTWARE: start again
EXIT_REFUSED = 3  # the data directory: look before starting again


class SnapshotStore(Protocol):
    """The state store's part in snapshots."""

    def export(self, group: int, peer: str, position: Position | None) -> AsyncGenerator[bytes, None]:
        """The group's rows as of one moment for a peer, in chunks: from `position` on if that moment is still there, else of a new
        one from the first chunk on."""

    async def install(self, group: int, peer: str, fetch: Callable[[Position | None], AsyncIterator[bytes]],
                      above: int) -> tuple[int, int]:
        """Replaces the group's rows by those that `fetch` gets from a peer, atomically and durably; returns (index, term) of the last
        entry in them. Raises SnapshotInvalid if the snapshot is damaged or not above entry `above`, SnapshotBroken if its transfer
        broke, so that a next call may go on; the state is as it was then."""

    def applied(self, group: int) -> tuple[int, int]:
        """(index, term) of the last entry in the group's rows."""

    def configuration(self, group: int) -> tuple[int, bytes] | None:
        """Index and configuration of the last call of GroupMachine.configured as of that entry; None if there was none."""


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One replica, for people and metrics."""

    role: Role
    leader: str | None
    term: int
    commit_index: int
    applied_index: int
    durable_index: int
    log_first_index: int
    log_last_index: int
    configuration: Configuration
    configuration_index: int


def _status(g: RaftGroup) -> GroupStatus:
    return GroupStatus(g.role, g.leader, g.engine.term, g.engine.commit, g.engine.applied, g.machine.durable_index(), g.journal.first,
                       g.journal.last, g.configuration, g.membership.index)


def end_process(error: BaseException) -> None:
    """The default of `fatal`: what was acknowledged is safe on disk, and a restart begins from there."""
    if isinstance(error, StoreRefused):
        log.critical("%s", error)
    else:
        log.critical("fatal: %s; the process ends, what it acknowledged is safe", error, exc_info=error)
    logging.shutdown()
    os._exit(EXIT_REFUSED if isinstance(error, StoreRefused) else EXIT_FATAL)


class RaftHost:
    """The replicas of one node. Everything is called on the node's loop."""

    def __init__(self, node_id: str, members: list[str], store: JournalStore, transport: PeerTransport,
                 snapshots: SnapshotStore | None = None, timing: Timing | None = None, limits: Limits | None = None,
                 fatal: Callable[[BaseException], None] = end_process, clock: Clock | None = None,
                 chance: Callable[[], float] = random.random, joins: bool = False) -> None:
        """`members` are all nodes that the cluster is founded with; with `joins`, it was founded without this one. `snapshots` may be
        missing where nobody ever falls behind the log."""
        self.node_id = node_id
        self.members = members
        self.store = store
        self.transport = transport
        self.snapshots = snapshots
        self.timing = timing or Timing()
        self.limits = limits or Limits()
        self.clock = clock or SystemClock()
        self.chance = chance
        self._joins = joins
        self.before_collect: Callable[[], None] = lambda: None
        self.removed: Callable[[int], None] = lambda group: None
        """A replica ended and its log is gone, durably: its state is to be dropped, durably on return. After a crash the owner does
        so for those that `ended`, before it adds groups."""
        self.groups: dict[int, RaftGroup] = {}
        self.fetches: dict[int, str] = {}  # group -> peer: snapshots to fetch, for `run` or a simulator to take
        self.failed: BaseException | None = None
        self.snapshot_bytes_sent = self.snapshot_bytes_received = 0
        self._fatal = fatal
        self._pending: dict[int, tuple[list[str], GroupMachine]] = {}
        self._started = False
        self._hellos: dict[str, PeerHello] = {}
        self._epochs: dict[str, int] = {}  # of present connections
        self._input: deque[tuple[str, int, Callable[[], None]]] = deque()  # peer ("" for none), epoch, what to do
        self._woken: dict[int, None] = {}
        self._out: dict[str, list[RaftGroupMessage]] = {}
        self._out_epochs: dict[str, int] = {}
        self._claims = Claims()
        self.features = (0, 0)
        """Lowest and highest feature level of this node, for hellos; whoever knows them sets them before `run`."""
        self._hands_over = False
        self._leaving: set[str] = set()  # peers that are about to stop
        self._claims_due = False
        self._claims_at = 0.0
        self._claims_frame = b""
        self._leads: dict[int, int] = {}  # group -> term, as announced
        self._watchers: list[Callable[[int, str | None, int], None]] = []
        self._known: dict[int, tuple[str | None, int]] = {}
        self.turned: float | None = None
        """When the last turn that ended had begun, as the clock has it; None before the first."""
        self._last_turn = 0.0
        self._last_tick = 0.0
        self._written = 0
        self._event: asyncio.Event | None = None
        self._stopping = False
        self._tasks: dict[int, asyncio.Task[None]] = {}  # group -> fetch of a snapshot

    # -- groups --------------------------------------------------------------------------------------------------

    def ended(self) -> list[int]:
        """Groups whose replica ended, and whose state may not be gone; before groups are added."""
        return self.store.node.dropped

    def has_replica(self, group: int, founders: list[str]) -> bool:
        """Whether this node has a replica of a group that was founded with these voters; before groups are added."""
        if group in self.store.node.dropped:
            return False
        return self.node_id in founders if self.store.founding else self.store.has_replica(group)

    def add_group(self, group: int, members: list[str], machine: GroupMachine) -> None:
        """A replica of a group on this node. It starts with the host, once the cluster has formed, or in the next turn. `members` are
        the voters that the group was founded with; none for a replica that joins: it waits until a leader makes it a learner."""
        assert not members or self.node_id in members, f"group {group} has no replica on node {self.node_id}"
        assert not members or self.has_replica(group, members), f"group {group} was founded already, without node {self.node_id}"
        assert group not in self._pending, f"group {group} has a replica on node {self.node_id}"
        assert not self._started or group not in self.store.node.dropped, f"group {group} is still being dropped"
        self._pending[group] = (members, machine)
        if self._started:
            self._enqueue("", 0, lambda: self._start_group(group, members, machine))

    def drop_group(self, group: int, by: int, upto: int) -> None:
        """Ends a replica that is no member any more and may not have heard of it, or never became one, in the next turn; then
        `removed` is called. `by` is the index of a committed configuration without it, the last one up to entry `upto`, which is
        committed, too. A replica that goes by another one from up to there has heard of none since, or of one that its leader could not
        commit; one that goes by a configuration from behind it stays: it may be a member again, and is not removed before that counts."""
        def drop() -> None:
            replica = self.groups.get(group)
            if replica is None:
                return
            index = replica.membership.index
            if index <= upto and (index != by or self.node_id not in replica.configuration):
                self._drop_group(group)
        self._enqueue("", 0, drop)

    def _drop_group(self, group: int) -> None:
        del self.groups[group], self._pending[group]
        self.fetches.pop(group, None)
        if group in self._tasks:
            self._tasks[group].cancel()
        self.store.drop(group)
        self._leads.pop(group, None)
        self._claims_due = True
        self._notify(group)

    def propose_change(self, group: int, change: Change, done: Callable[[int | ChangeRefused], None]) -> None:
        """Changes the members of a group that this node leads, in the next turn: `done` gets the index of the entry, which takes
        effect for good when it is committed, or why not; see RaftGroup.propose_change."""
        def propose() -> None:
            replica = self.groups.get(group)
            try:
                if replica is None:
                    raise NotLeading(f"this node has no replica of group {group}")
                index = replica.propose_change(change)
            except ChangeRefused as error:
                done(error)
                return
            self._woken[group] = None
            done(index)
        self._enqueue("", 0, propose)

    def wake(self, group: int) -> None:
        """The group's machine has something to propose: a turn comes soon."""
        self._woken[group] = None
        if self._event is not None:
            self._event.set()

    def leader_of(self, group: int) -> tuple[str | None, int]:
        """(node id, term) of a group's leader as far as known: from the replica here; where there is none, or leaders announce a later
        term, or it knows no leader, from what they announce: it may be no member, and hear of nothing."""
        replica = self.groups.get(group)
        claimed = self._claims.leader(group)
        if replica is None or (claimed[0] is not None and (
                claimed[1] > replica.engine.term or (replica.leader is None and claimed[1] == replica.engine.term))):
            return claimed
        return replica.leader, replica.engine.term

    def on_leadership(self, callback: Callable[[int, str | None, int], None]) -> None:
        """Calls back with (group, node id or None, term) whenever `leader_of` changes; within a turn."""
        self._watchers.append(callback)

    def status(self) -> dict[int, GroupStatus]:
        """Every replica of this node."""
        return {number: _status(replica) for number, replica in self.groups.items()}

    def status_of(self, group: int) -> GroupStatus | None:
        """One replica of this node; None if it has none of the group."""
        replica = self.groups.get(group)
        return None if replica is None else _status(replica)

    @property
    def present(self) -> Set[str]:
        """Node ids of the peers that there is a connection to, and that are not about to stop."""
        return self._epochs.keys() - self._leaving

    def hello_of(self, peer: str) -> PeerHello | None:
        """What a peer that is connected said of itself; None of others."""
        return self._hellos[peer] if peer in self._epochs else None

    def in_touch(self, node_id: str) -> bool:
        """Whether this is that node, or is connected to it. A follower that cannot win an election goes on to name a leader that went."""
        return node_id == self.node_id or self.hello_of(node_id) is not None

    def transfer(self, group: int, to: str | None = None) -> bool:
        """Hands a group over to a follower; proposals pause meanwhile. False if it cannot now."""
        drive(self.clock.monotonic(), self.chance)
        replica = self.groups.get(group)
        done = replica is not None and replica.transfer(to, self._leaving)
        if done:
            self.wake(group)
        return done

    @property
    def recovering(self) -> bool:
        """This node has lost its disk, or joins, and has not caught up with all its groups."""
        return self.store.node.recovering

    @property
    def cluster_id(self) -> str:
        """Identity of the cluster, as noted; empty while it is not known."""
        return self.store.node.cluster_id

    def keep_cluster(self, cluster_id: str) -> None:
        """Notes which cluster this is, durably, in the next turn."""
        def keep() -> None:
            if self.store.node.cluster_id != cluster_id:
                self.store.change_node(cluster_id=cluster_id)
        self._enqueue("", 0, keep)

    def hello(self) -> Hello:
        """What this node says of itself when a connection begins."""
        node = self.store.node
        return Hello(node.node_id, node.incarnation, node.formed, node.founders, *self.features)

    def __repr__(self) -> str:
        leads = sum(g.serving for g in self.groups.values())
        return f"<raft host {self.node_id}: {len(self.groups)} groups, leads {leads}, peers {sorted(self._epochs)}>"

    # -- input ---------------------------------------------------------------------------------------------------

    def handlers(self) -> Handlers:
        """For the transport."""
        return Handlers(self._on_connected, self._on_frame, self._on_disconnected)

    def _enqueue(self, peer: str, epoch: int, action: Callable[[], None]) -> None:
        self._input.append((peer, epoch, action))
        if self._event is not None:
            self._event.set()

    def _on_connected(self, peer: str, epoch: int, hello: PeerHello) -> None:
        self._epochs[peer] = epoch
        self._hellos[peer] = hello
        self._enqueue("", 0, lambda: self._connect(peer, epoch))

    def _on_frame(self, peer: str, epoch: int, data: bytes) -> None:
        """Raises WireInvalid, before anything of the frame is delivered; the transport closes the connection."""
        if self._epochs.get(peer) == epoch:
            received = wire.decode_frame(data)
            self._enqueue(peer, epoch, lambda: self._deliver(peer, received))

    def _on_disconnected(self, peer: str, epoch: int) -> None:
        if self._epochs.get(peer) == epoch:
            del self._epochs[peer]
            self._enqueue("", 0, lambda: self._disconnect(peer))

    def _connect(self, peer: str, epoch: int) -> None:
        if self._epochs.get(peer) != epoch:
            return
        self._claims_due = True
        if not self._started:
            self._try_start()
            return
        for number, group in self.groups.items():
            group.connected(peer)
            self._woken[number] = None

    def _disconnect(self, peer: str) -> None:
        self._leaving.discard(peer)
        for number, group in self.groups.items():
            group.disconnected(peer)
            self._woken[number] = None
        self._changed_claims(self._claims.drop(peer))

    def _deliver(self, peer: str, received: wire.Frame) -> None:
        groups, woken = self.groups, self._woken
        for number, message in received.messages:
            group = groups.get(number)
            if group is not None:
                group.deliver(peer, message)
                woken[number] = None
        if received.complete:
            (self._leaving.add if received.leaving else self._leaving.discard)(peer)
        if received.claims or received.complete:
            self._changed_claims(self._claims.take(peer, received.claims, received.complete))

    # -- forming -------------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Starts the groups, if the cluster has formed; else that waits for the peers. Raises StoreRefused if logs and
        states do not fit together."""
        drive(now, self.chance)
        self._last_turn = self._last_tick = now
        self._try_start()

    def _try_start(self) -> None:
        node = self.store.node
        if not node.formed and not node.recovering:
            standing = Standing.LOST if self._joins else decide(self.node_id, node.incarnation, self.members, self._hellos)
            if standing is Standing.WAIT:
                return
            for group, (members, machine) in self._pending.items():
                check_fit(group, self.store.journal(group), machine.durable_index(), members)
            if self._joins:
                log.info("this node joins the cluster")
                self.store.change_node(recovering=True)
            elif standing is Standing.LOST:
                log.warning("this node's store is new, but its cluster is not: it recovers from the others")
                self.store.change_node(recovering=True)
        self._started = True
        for group in node.dropped:
            self.store.drop(group)  # again: the turn that should have may not have come about
        for number, (members, machine) in self._pending.items():
            self._start_group(number, members, machine)
        if self.store.founding and not self.store.node.recovering:
            founders = node.founders if node.formed else {
                self.node_id: node.incarnation, **{peer: hello.incarnation for peer, hello in self._hellos.items()}}
            self.store.write()  # no later than the row that says that it is there
            self.store.change_node(format=FORMAT, formed=True, founders=founders)
            self.store.synced()
        self._check_recovered()

    def _start_group(self, number: int, members: list[str], machine: GroupMachine) -> None:
        journal = self.store.journal(number, self.limits.tail, machine.durable_index())
        if journal.install_above is not None:
            # A snapshot was being installed. If it took effect, the log is still the one from before it.
            if self.snapshots is None:
                raise StoreRefused(f"group {number}: a snapshot was being installed, and there is no state store to ask")
            index, term = self.snapshots.applied(number)
            if index > journal.install_above:
                journal.found(Configuration.of(members))
                adopt_snapshot(journal, index, term, self.snapshots.configuration(number))
            else:
                journal.end_install()
        group = self.groups[number] = RaftGroup(number, self.node_id, members, machine, journal, self.timing, self.limits,
                                                self._send, self.clock, self._changed)
        node = self.store.node
        if journal.admitted != node.incarnation:
            if members and self.store.founding and not node.recovering:
                journal.admit(node.incarnation)
            else:  # it forgot what it knew, or it joins: who was a member before has forgotten, too
                group.recover(node.incarnation)
        for peer in self._epochs:
            group.connected(peer)
        self._woken[number] = None

    def _check_recovered(self) -> None:
        """All replicas are admitted, and that is on disk: the node is an ordinary one again."""
        if self._started and self.store.node.recovering and all(g.recovery is None for g in self.groups.values()):
            log.info("recovered: this node takes part again")
            self.store.change_node(recovering=False, formed=True)

    # -- the turn ------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> int:
        """The first phase, up to the write; returns the bytes that `sync` is to make durable. `now` is in seconds. Raises
        whatever is fatal."""
        drive(now, self.chance)
        groups = self.groups
        if now - self._last_turn > STALL_SECONDS:
            for group in groups.values():
                group.stalled(now - self._last_turn)
        self._last_turn = now
        waiting, epochs = self._input, self._epochs
        for _ in range(len(waiting)):
            peer, epoch, action = waiting.popleft()
            if not peer or epochs.get(peer) == epoch:  # R8: nothing of an older connection
                action()
        dirty, self._woken = self._woken, {}
        if now - self._last_tick >= TICK_SECONDS:
            self._last_tick = now
            keep = self.limits.keep // max(1, len(groups))
            for number, group in groups.items():
                group.tick()
                group.compact(keep)
                dirty[number] = None
        else:
            for number in dirty:
                if number in groups:
                    groups[number].tick()
        self.before_collect()
        if self._woken:
            dirty.update(self._woken)
            self._woken = {}
        for number in dirty:
            if number in groups:
                group = groups[number]
                # Alone in its group, a leader may commit as soon as this is synced.
                if (group.collect() and group.quorum == 1) or group.behind or group.journal.synced < group.engine.commit:
                    self._woken[number] = None
                if group.fetch_from is not None:
                    self.fetches[number] = group.fetch_from
                    group.fetch_from = None
                if group.membership.removed:
                    log.info("group %d: this node is no member any more; its replica ends", number)
                    self._drop_group(number)
        if self._claims_due or now - self._claims_at >= CLAIMS_SECONDS:
            self._announce(now)
        self._written = self.store.write()
        return self._written

    def sync(self) -> None:
        """The second phase; may run in a thread. Raises StorageFailed."""
        self.store.sync()

    def finish(self) -> None:
        """The third phase, on the loop: what was written is durable, so what depends on it leaves."""
        if self._written:
            self._written = 0
            self.store.synced()
            if self.store.node.recovering:
                self._check_recovered()
            if self.store.node.dropped:
                for group in self.store.node.dropped:
                    self.removed(group)
                self.store.change_node(dropped=[])
        if self._claims_frame:
            for peer, present in self._epochs.items():
                self.transport.send(peer, present, self._claims_frame)
            self._claims_frame = b""
        if self._out:
            out, self._out = self._out, {}
            for peer, messages in out.items():
                epoch = self._epochs.get(peer)
                if epoch is not None and epoch == self._out_epochs[peer]:
                    self._release(peer, epoch, messages)
        self.turned = self._last_turn

    def turn(self, now: float) -> None:
        """All three phases at once."""
        if self.begin(now):
            self.sync()
        self.finish()

    def _send(self, peer: str, group: int, term: int, message: Message) -> None:
        """A replica's message, kept until the turn is durable, for the connection that is up now."""
        epoch = self._epochs.get(peer)
        if epoch is None:
            return
        if self._out_epochs.get(peer) != epoch:
            self._out_epochs[peer] = epoch
            self._out.pop(peer, None)
        self._out.setdefault(peer, []).append(wire.encode(group, term, message))

    def _release(self, peer: str, epoch: int, messages: list[RaftGroupMessage]) -> None:
        size, part = 0, []
        for message in messages:
            part.append(message)
            size += message.ByteSize()
            if size >= wire.FRAME_BYTES_SOFT_MAX:
                self.transport.send(peer, epoch, RaftFrame(messages=part).SerializeToString())
                size, part = 0, []
        if part:
            self.transport.send(peer, epoch, RaftFrame(messages=part).SerializeToString())

    # -- who leads -----------------------------------------------------------------------------------------------

    def _changed(self, group: int) -> None:
        """A replica's role, term or leader changed."""
        replica = self.groups.get(group)
        if replica is not None and replica.serving != (group in self._leads):
            self._claims_due = True
        self._notify(group)

    def _changed_claims(self, groups: set[int]) -> None:
        for group in groups:
            self._notify(group)

    def _notify(self, group: int) -> None:
        leader = self.leader_of(group)
        if self._known.get(group, (None, 0)) != leader:
            self._known[group] = leader
            for watcher in self._watchers:
                watcher(group, *leader)

    def _announce(self, now: float) -> None:
        self._claims_due = False
        self._claims_at = now
        self._leads = {n: g.engine.term for n, g in self.groups.items() if g.serving}
        frame = RaftFrame(claims_complete=True, leaving=self._hands_over)
        for group, term in self._leads.items():
            frame.claims.add(group=group, term=term)
        self._claims_frame = frame.SerializeToString()

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def export(self, group: int, peer: str, position: Position | None) -> AsyncGenerator[bytes, None]:
        """The state of a group for a peer that fetches it, in chunks, from `position` on if possible. Nothing if there is no replica
        of it here, or while its own state is being replaced."""
        replica = self.groups.get(group)
        if replica is not None and self.snapshots is not None and not replica.installing and peer in replica.configuration:
            async with aclosing(self.snapshots.export(group, peer, position)) as chunks:
                async for chunk in chunks:
                    replica.exported(peer, len(chunk), moment_of(chunk))
                    self.snapshot_bytes_sent += len(chunk)
                    yield chunk

    def installed(self, group: int, index: int, term: int) -> None:
        """A snapshot took effect durably, and the machine was reloaded: the log follows in the next turn."""
        assert self.snapshots is not None
        configuration = self.snapshots.configuration(group)

        def tell() -> None:
            if (replica := self.groups.get(group)) is not None:
                replica.installed(index, term, configuration)
        self._enqueue("", 0, tell)
        self.wake(group)

    def fetch_failed(self, group: int) -> None:
        """A snapshot did not come about; the state is as it was."""
        def tell() -> None:
            if (replica := self.groups.get(group)) is not None:
                replica.fetch_failed()
        self._enqueue("", 0, tell)
        self.wake(group)

    async def _fetch(self, group: int, peer: str) -> None:
        replica = self.groups.get(group)
        try:
            if replica is None:
                return
            if self.snapshots is None:
                raise StoreRefused(f"group {group} needs a snapshot, and there is no state store to take it")
            log.info("group %d: fetches a snapshot from node %s", group, peer)
            index, term = await self.snapshots.install(
                group, peer, lambda position: self._chunks(peer, group, position), replica.engine.applied)
            # Nothing else of the loop runs between the end of `install` and this.
            replica.machine.reload()
        except (StoreRefused, StorageFailed) as error:
            self.fatal(error)
        except ClusterError as error:
            log.warning("group %d: the snapshot from node %s did not come about: %s", group, peer, error)
            self.fetch_failed(group)
        except Exception as error:
            self.fatal(error)
        else:
            log.info("group %d: installed a snapshot from node %s as of entry %d", group, peer, index)
            self.installed(group, index, term)

    async def _chunks(self, peer: str, group: int, position: Position | None) -> AsyncIterator[bytes]:
        async for chunk in self.transport.fetch_snapshot(peer, group, position):
            self.snapshot_bytes_received += len(chunk)
            yield chunk

    # -- running -------------------------------------------------------------------------------------------------

    def fatal(self, error: BaseException) -> None:
        """Ends the process, by way of the callback. No turn comes after it."""
        if self.failed is None:
            self.failed = error
            self._stopping = True
            if self._event is not None:
                self._event.set()
            self._fatal(error)

    async def run(self) -> None:
        """Turns until `stop`. Whatever is raised is fatal."""
        loop = asyncio.get_running_loop()
        event = self._event = asyncio.Event()
        now = self.clock.monotonic
        try:
            self.transport.start(self.handlers())
            self.start(now())
            while not self._stopping:
                if not self._woken and not self._input:
                    wait = self._last_tick + TICK_SECONDS - now()
                    if wait > 0:
                        timer = loop.call_later(wait, event.set)
                        await event.wait()
                        timer.cancel()
                event.clear()
                size = self.begin(now())
                if size > INLINE_SYNC_BYTES:
                    await loop.run_in_executor(None, self.sync)
                elif size:
                    self.sync()
                self.finish()
                while self.fetches:
                    self._start_fetch(*self.fetches.popitem())
                await asyncio.sleep(0)
        except Exception as error:
            self.fatal(error)

    def _start_fetch(self, group: int, peer: str) -> None:
        task = self._tasks[group] = asyncio.get_running_loop().create_task(self._fetch(group, peer))
        task.add_done_callback(lambda done: self._tasks.pop(group) if self._tasks.get(group) is done else None)

    async def hand_over(self, seconds: float = STOP_SECONDS) -> None:
        """Hands all leaderships over, for at most `seconds`; the replicas go on as followers, so that whoever waits here still learns
        who leads."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        self._hands_over = self._claims_due = True
        if self._event is not None:
            self._event.set()
        while self._epochs and not self._stopping and loop.time() < until:
            led = [n for n, g in self.groups.items() if g.serving and not g.alone]
            if not led:
                break
            for number in led:
                self.transfer(number)
            await asyncio.sleep(0.02)

    async def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Hands leaderships over, for at most `seconds`, then ends `run`. The transport and the store stay open."""
        await self.hand_over(seconds)
        self._stopping = True
        if self._event is not None:
            self._event.set()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
