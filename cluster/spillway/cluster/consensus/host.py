"""All Raft groups of a node, driven together.

One turn: deliver what peers sent; tick the groups concerned (commit, apply); let the broker's scheduler run; take new
commands into the logs; write one batch and sync it once; only then send what the turn produced. So no vote, no answer
and no leader's own entry ever counts before it is on disk: the next tick comes after the sync. While the sync runs,
input collects for the next turn.
"""
from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from spillway.cluster.consensus import wire
from spillway.cluster.consensus.journal import JournalStore
from spillway.cluster.consensus.peers import Handlers, PeerHello, PeerTransport
from spillway.cluster.consensus.replica import Replica
from spillway.cluster.consensus.seam import Timing, library
from spillway.cluster.errors import ClusterError, WireInvalid
from spillway.cluster.machine import GroupMachine, Role
from spillway.peer.v1.consensus_pb2 import Frame, RaftMessage

log = logging.getLogger(__name__)

INLINE_SYNC_BYTES = 128 << 10  # below, a sync takes less than the switch to a thread and back
TICK_SECONDS = 0.05  # idle groups are ticked this often
STALL_SECONDS = 0.4  # a longer gap between turns was ours, not the leader's
CLAIMS_SECONDS = 1.0
EXIT_FATAL = 70  # EX_SOFTWARE: a write, sync or apply failed; the log is right, start again


class SnapshotStore(Protocol):
    """The state store's part in snapshots."""

    def export(self, group: int) -> AsyncIterator[bytes]:
        """Chunks of the group's rows as of now."""

    async def install(self, group: int, chunks: AsyncIterator[bytes], above: int) -> tuple[int, int]:
        """Replaces the group's rows, all or nothing; returns (applied index, its term), which is above `above`.
        Raises SnapshotInvalid."""


@dataclass(slots=True)
class GroupStatus:
    """One replica's state, for people and metrics."""

    role: Role
    leader: str | None
    term: int
    commit_index: int
    applied_index: int
    durable_index: int
    log_first_index: int
    log_last_index: int


def _die(error: BaseException) -> None:
    log.critical("fatal: %s; the process ends, what it acknowledged is safe", error, exc_info=error)
    logging.shutdown()
    os._exit(EXIT_FATAL)


class RaftHost:
    """Owns the journal store and the transport."""

    def __init__(self, node_id: str, members: list[str], store: JournalStore, transport: PeerTransport,
                 snapshots: SnapshotStore, timing: Timing | None = None,
                 fatal: Callable[[BaseException], None] = _die) -> None:
        self.node_id = node_id
        self.members = members
        self.store = store
        self.transport = transport
        self.snapshots = snapshots
        self.timing = timing or Timing()
        self.fatal = fatal
        self.before_collect: Callable[[], None] = lambda: None
        self.replicas: dict[int, Replica] = {}
        self.formed = store.node.formed
        self._machines: dict[int, tuple[list[str], GroupMachine]] = {}
        self._hellos: dict[str, PeerHello] = {}
        self._epochs: dict[str, int] = {}
        self._inbox: list[tuple[str, int, Frame]] = []
        self._woken: dict[int, None] = {}
        self._out: dict[tuple[str, int], list[RaftMessage]] = {}
        self._claims: dict[int, dict[str, int]] = {}  # group -> node -> term
        self._leads: dict[int, int] = {}  # group -> term, as told to peers
        self._claims_due = False
        self._claimed_at = 0.0
        self._last_turn = 0.0
        self._last_tick = 0.0
        self._event: asyncio.Event | None = None
        self._stopping = False
        self._fetches: dict[int, asyncio.Task[None]] = {}

    # -- groups --------------------------------------------------------------------------------------------------

    def add_group(self, group: int, members: list[str], machine: GroupMachine) -> None:
        """A replica of a group on this node; it starts when the cluster has formed."""
        self._machines[group] = (members, machine)

    def wake(self, group: int) -> None:
        """The group's machine has something to propose: a turn comes soon."""
        self._woken[group] = None
        if self._event is not None:
            self._event.set()

    def leader_of(self, group: int) -> tuple[str | None, int]:
        """(node id, term) of a group's leader: from the replica here, else from what leaders claim."""
        replica = self.replicas.get(group)
        if replica is not None:
            return replica.leader, replica.term
        claims = self._claims.get(group)
        if not claims:
            return None, 0
        node = max(claims, key=lambda n: claims[n])
        return node, claims[node]

    def status(self) -> dict[int, GroupStatus]:
        """State of every replica here."""
        return {g: GroupStatus(r.role, r.leader, r.term, r.raftCommitIndex, r.applied, r.machine.durable_index(),
                               r.journal.first, r.journal.last) for g, r in self.replicas.items()}

    def transfer(self, group: int, peer: str) -> bool:
        """Asks a follower to take over a group; false if it cannot now."""
        replica = self.replicas.get(group)
        return replica is not None and replica.transfer(peer)

    # -- connections ---------------------------------------------------------------------------------------------

    def handlers(self) -> Handlers:
        """For the transport."""
        return Handlers(self._connected, self._frame, self._disconnected)

    def _connected(self, peer: str, epoch: int, hello: PeerHello) -> None:
        if peer in self._epochs:
            self._disconnected(peer, self._epochs[peer])
        self._epochs[peer] = epoch
        self._hellos[peer] = hello
        self._claims_due = True
        if not self.formed:
            self._try_form()
        for replica in self.replicas.values():
            if peer in replica._nodes:
                replica.connect(peer)
        self._wake_all()

    def _disconnected(self, peer: str, epoch: int) -> None:
        if self._epochs.get(peer) != epoch:
            return
        del self._epochs[peer]
        self._inbox = [item for item in self._inbox if item[0] != peer]
        for claims in self._claims.values():
            claims.pop(peer, None)
        for replica in self.replicas.values():
            if peer in replica._nodes:
                replica.disconnect(peer)
                replica.tell_role()
        self._wake_all()

    def _frame(self, peer: str, epoch: int, data: bytes) -> None:
        """A frame came in; raises WireInvalid for one of unknown shape, and the transport closes the connection."""
        if self._epochs.get(peer) != epoch:
            return
        self._inbox.append((peer, epoch, wire.decode_frame(data)))
        if self._event is not None:
            self._event.set()

    def _wake_all(self) -> None:
        for group in self.replicas:
            self._woken[group] = None
        if self._event is not None:
            self._event.set()

    # -- forming -------------------------------------------------------------------------------------------------

    def _try_form(self) -> None:
        """A store that never took part starts the cluster together with the others, or recovers into it.

        It is fresh if every other member is connected and is fresh, or formed with exactly this incarnation of us. It has
        lost its disk if some member formed with another incarnation of us: then its replicas recover."""
        mine = self.store.node.incarnation
        others = [m for m in self.members if m != self.node_id]
        founders = {self.node_id: mine}
        lost = False
        for peer in others:
            hello: Any = self._hellos.get(peer)
            if hello is None:
                if not lost:
                    continue
            elif hello.formed and hello.founders.get(self.node_id) != mine:
                lost = True
            if hello is not None:
                founders[peer] = hello.incarnation
        if not lost and len(founders) < len(self.members):
            return
        if lost:
            log.warning("this node's store is new, but its cluster is not: recovering from the other nodes")
        else:
            self.store.form(founders)
        self.formed = True
        self._start_groups(recovering=lost)

    def _start_groups(self, recovering: bool) -> None:
        for group, (members, machine) in self._machines.items():
            replica = self.replicas[group] = Replica(
                group, self.node_id, members, machine, self.store.journal(group), self.timing, self._send)
            if recovering and len(members) > 1:
                replica.recover(self.store.node.incarnation)
            for peer in self._epochs:
                if peer in replica._nodes:
                    replica.connect(peer)
        self._recovering = recovering
        self._wake_all()

    def _send(self, peer: str, group: int, term: int, message: dict[str, Any]) -> None:
        epoch = self._epochs.get(peer)
        if epoch is not None:
            self._out.setdefault((peer, epoch), []).append(wire.encode(group, term, message))

    # -- the turn ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the groups of a node that has formed before, or of a cluster of one."""
        self._last_turn = self._last_tick = library.monotonicTime()
        if self.formed:
            self._start_groups(recovering=False)
        elif len(self.members) == 1:
            self._try_form()

    def turn(self) -> int:
        """Everything up to the write; returns the bytes written. `sync` and `release` must follow."""
        now = library.monotonicTime()
        if now - self._last_turn > STALL_SECONDS:
            for replica in self.replicas.values():
                replica.stalled(now - self._last_turn)
        self._last_turn = now
        replicas = self.replicas
        dirty, self._woken = self._woken, {}
        inbox, self._inbox = self._inbox, []
        for peer, epoch, frame in inbox:
            if self._epochs.get(peer) != epoch:
                continue
            self._take_claims(peer, frame)
            for message in frame.messages:
                receiver = replicas.get(message.group)
                if receiver is not None:
                    self._deliver(receiver, peer, message)
                    dirty[message.group] = None
        if now - self._last_tick >= TICK_SECONDS:
            self._last_tick = now
            for replica in replicas.values():
                replica.tick()
                replica.compact()
        else:
            for group in dirty:
                if group in replicas:
                    replicas[group].tick()
        self.before_collect()
        if self._woken:
            dirty.update(self._woken)
            self._woken = {}
        for group in dirty:
            proposer = replicas.get(group)
            if proposer is not None and ((proposer.propose() and not proposer._nodes) or proposer.behind):
                self._woken[group] = None  # after the sync it can commit, or there is more to apply
        if self._claims_due or now - self._claimed_at > CLAIMS_SECONDS:
            self._claim(now)
        return self.store.write()

    def release(self) -> None:
        """Sends what the turn produced; everything that it depends on is durable."""
        out, self._out = self._out, {}
        for (peer, epoch), messages in out.items():
            self.transport.send(peer, epoch, Frame(messages=messages).SerializeToString())

    def _deliver(self, replica: Replica, peer: str, message: RaftMessage) -> None:
        try:
            decoded = wire.decode(message)
        except WireInvalid as error:
            log.warning("node %s: %s", peer, error)
            return
        if decoded["type"] == "snapshot_offer":
            self._fetch(replica, peer)
            return
        replica.deliver(peer, decoded)

    # -- claims --------------------------------------------------------------------------------------------------

    def _take_claims(self, peer: str, frame: Frame) -> None:
        if frame.claims_complete:
            for claims in self._claims.values():
                claims.pop(peer, None)
        for claim in frame.claims:
            if claim.term:
                self._claims.setdefault(claim.group, {})[peer] = claim.term

    def _claim(self, now: float) -> None:
        """Tells peers which groups this node leads."""
        self._claims_due = False
        self._claimed_at = now
        frame = Frame(claims_complete=True)
        for group, replica in self.replicas.items():
            if replica.serving:
                frame.claims.add(group=group, term=replica.term)
        data = frame.SerializeToString()
        for peer, epoch in self._epochs.items():
            self.transport.send(peer, epoch, data)

    # -- snapshots -----------------------------------------------------------------------------------------------

    def _fetch(self, replica: Replica, peer: str) -> None:
        if replica.group in self._fetches or self._event is None:
            return
        task = asyncio.get_running_loop().create_task(self._fetch_snapshot(replica, peer))
        self._fetches[replica.group] = task
        task.add_done_callback(lambda _: self._fetches.pop(replica.group, None))

    async def _fetch_snapshot(self, replica: Replica, peer: str) -> None:
        try:
            chunks = self.transport.fetch_snapshot(peer, replica.group)
            index, term = await self.snapshots.install(replica.group, chunks, replica.applied)
        except ClusterError as error:
            log.warning("group %d: snapshot from %s: %s", replica.group, peer, error)
            return
        except Exception as error:
            self.fatal(error)
            return
        log.info("group %d: installed a snapshot from %s as of entry %d", replica.group, peer, index)
        replica.installed(index, term)
        self._send(peer, replica.group, replica.term, {"type": "snapshot_done", "index": index})
        self.wake(replica.group)

    async def export(self, group: int, peer: str) -> AsyncIterator[bytes]:
        """A snapshot for a peer."""
        replica = self.replicas.get(group)
        async for chunk in self.snapshots.export(group):
            if replica is not None:
                replica.snapshot_progress(peer)
            yield chunk

    # -- running -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Turns until `stop`. Any failure is fatal: the process ends."""
        loop = asyncio.get_running_loop()
        event = self._event = asyncio.Event()
        timer: asyncio.TimerHandle | None = None
        try:
            self.transport.start(self.handlers())
            self.start()
            while not self._stopping:
                if not self._woken and not self._inbox:
                    timer = loop.call_later(TICK_SECONDS, event.set)
                    await event.wait()
                    timer.cancel()
                event.clear()
                size = self.turn()
                if size > INLINE_SYNC_BYTES:
                    await loop.run_in_executor(None, self.store.sync)
                elif size:
                    self.store.sync()
                self.release()
                if self.formed and self.store.node.formed is False and not any(
                        r.recovering for r in self.replicas.values()):
                    self.store.form({n: h.incarnation for n, h in self._hellos.items()})
                    log.info("recovered: this node takes part again")
                await asyncio.sleep(0)
        except Exception as error:
            self.fatal(error)
        finally:
            if timer is not None:
                timer.cancel()

    async def stop(self, seconds: float = 3.0) -> None:
        """Hands leaderships over, within a bound, then ends `run`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while len(self._epochs) and loop.time() < deadline:
            led = [r for r in self.replicas.values() if r.serving and r._nodes]
            if not led:
                break
            for replica in led:
                peers = [p for p in replica._nodes if replica.connected(p)]
                if peers:
                    replica.transfer(max(peers, key=replica.matched))
            self._wake_all()
            await asyncio.sleep(0.02)
        self._stopping = True
        if self._event is not None:
            self._event.set()
        for task in list(self._fetches.values()):
            task.cancel()
