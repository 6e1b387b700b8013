"""A node at work: its replicas, one scheduler over all shards that it leads, consumers, timers and upkeep.

Everything here runs on the node's one event loop. The Raft host calls the shards inside a turn; `before_collect` is
the moment between the applies of a turn and its proposals, when the scheduler hands out leases.
"""
from __future__ import annotations

import asyncio
import ctypes
import logging
import random
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from spillway.broker.config import NodeConfig, Peer, members_of, meta_founders
from spillway.broker.core import features
from spillway.broker.core import scheduler as sched
from spillway.broker.core.directory import Hold
from spillway.broker.core.outbox import OUTBOX
from spillway.broker.core.policy import Policy, park_ms
from spillway.broker.core.queue import Queue
from spillway.broker.core.scheduler import Pick, Scheduler
from spillway.broker.runtime.backup import Backups
from spillway.broker.runtime.balance import META_GROUP, Balance
from spillway.broker.runtime.calls import Batch, Call
from spillway.broker.runtime.consumers import LeaseStreams, Sink, is_over, stream_of
from spillway.broker.runtime.meta import MetaRuntime
from spillway.broker.runtime.shard import ShardRuntime
from spillway.broker.runtime.shares import Shares
from spillway.broker.runtime.timers import Timers
from spillway.broker.runtime.wire import run_parts
from spillway.cluster.clock import Clock, SystemClock
from spillway.cluster.errors import StoreRefused
from spillway.cluster.raft.host import RaftHost
from spillway.cluster.state_store import StateStore
from spillway.contract.hashing import shard_of
from spillway.contract.limits import FRAME_BYTES_SOFT_MAX
from spillway.v1.queue_service_pb2 import Settlement

if TYPE_CHECKING:
    from spillway.broker.runtime.forward import Forwarder
    from spillway.broker.telemetry.meters import Meters
    from spillway.broker.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

PICKS_PER_TURN_MAX = 512  # leases granted in one turn: a turn stays a few milliseconds
PICKS_IN_A_ROW = 16  # of them for one subscription before the next one gets some
TURN_BYTES = 128 << 10  # of messages that a turn takes in, over all shards: bounds what a flood adds to others' latency
REBUILD_PER_TURN = 2048  # queues that a new leader schedules per turn
FOLLOW_SECONDS, FOLLOW_REST = 0.002, 20  # telling the scheduler of changes takes longer: then it rests so many times as long
TICK_SECONDS = 0.005  # how late a timer may be
TIMERS_PER_TICK_MAX = 2048  # many may be due at one moment, midnight for one; the rest follows a tick later
CHECKPOINT_SECONDS = 5.0  # a shard with unsaved changes is saved at least this often
SYNC_SECONDS = 1.0
SAMPLE_SECONDS = 5.0
TRIM_SECONDS = 10.0
QUIET_SECONDS = 5.0  # without a checkpoint: then write buffers are given back, too
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; ctypes releases the GIL meanwhile


class Node:
    """Composed by `app`; services call it."""

    def __init__(self, config: NodeConfig, store: StateStore, host: RaftHost, founded: dict[int, list[str]],
                 clock: Clock | None = None) -> None:
        """`founded`: where shards belong when the cluster is founded, shard -> node ids; empty for a node that joins."""
        self.config = config
        self.clock = clock or SystemClock()
        self.members: dict[str, Peer] = members_of(config)
        """All nodes, as far as this one knows; replaced, never changed."""
        self.own = self.members[config.node_id]
        self.store = store
        self.host = host
        self.founded = founded
        self.features = host.features = features.known(config.feature_level_max)
        self.scheduler = Scheduler(self.policy)
        self.timers = Timers()
        self.lease_streams = LeaseStreams()
        self.random: Callable[[], float] = random.random
        self.rebuilds: list[ShardRuntime] = []
        self.entry_bytes = TURN_BYTES  # of messages that one shard's entry takes in this turn
        self.gates: dict[bytes, tuple[int, int]] = {}  # scope -> (until, step), of all shards that it leads
        self.ingress_bytes = 0  # accepted from producers and not yet committed
        self.disk_full = False
        self.meters: Meters | None = None
        """What is counted for metrics; None: nobody asked for any."""
        self.tracing: Tracing | None = None
        """Who makes spans of sampled messages; None: nobody does."""
        self.stopping = False
        self.revision = 0  # of the topology
        self._topology_event = asyncio.Event()
        self._due_checkpoints: dict[ShardRuntime, None] = {}
        self._trimmed = self.clock.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self.meta = MetaRuntime(config.node_id, store.group(META_GROUP), lambda: host.wake(META_GROUP))
        self.meta.level_changed = self.check_level
        self.keep_level: Callable[[int], None] = lambda level: None
        """Notes the feature level where a version that does not know it looks first."""
        self.balance = Balance(self)
        self.backups = Backups(self)
        self._policies: dict[bytes, Policy] = {}  # those that the scheduler uses
        self._holds: dict[bytes, Hold] = {}  # operators' gates that the scheduler knows
        self._remote_holds: dict[bytes, int] = {}  # scope -> until, of gates that other nodes keep closed
        self.shares = Shares(self)
        host.add_group(META_GROUP, meta_founders(config), self.meta)
        self.shards: dict[int, ShardRuntime] = {}
        for number in host.ended():
            store.forget(number)
        for number in range(1, config.shards + 1):
            nodes = founded.get(number, [])
            if host.has_replica(number, nodes):
                self.add_replica(number, nodes if config.node_id in nodes else [])
        self.on_members: list[Callable[[], None]] = []
        """Called when `members` is another one."""
        self.on_tokens: Callable[[], None] = lambda: None
        """Called when tokens may have changed."""
        self._tokens_revision = self.meta.directory.tokens_revision
        self.on_removed: Callable[[], None] = lambda: None
        """Called when this node is none of the cluster any more."""
        host.removed = self._removed
        host.on_leadership(lambda group, leader, term: self.topology_changed())  # also of groups without a replica here
        host.before_collect = self.before_collect
        store.unreadable = host.fatal
        self.meta.changed = self._meta_changed
        self._meta_news = True  # destinations or operators' gates changed, and the scheduler does not know
        self._follow_after = 0.0  # it is told no sooner
        self._ttl_revision = -1
        self._ttl_destinations: list[bytes] = []
        # What becomes of work for a shard that this node no longer leads; the forwarder sets them.
        self.pass_on: Callable[[int, Batch], None]
        self.pass_on_settlement: Callable[[int, Call, int, Settlement], None]

    def add_replica(self, shard: int, founders: list[str]) -> ShardRuntime:
        """A replica of a shard on this node; see RaftHost.add_group."""
        runtime = self.shards[shard] = ShardRuntime(self, shard, self.store.group(shard))
        self.host.add_group(shard, founders, runtime)
        return runtime

    def _removed(self, shard: int) -> None:
        """This node is no member of a group any more: nothing is left of its state."""
        runtime = self.shards.pop(shard, None)
        if runtime is not None:
            runtime.ended()
            self._due_checkpoints.pop(runtime, None)
        self.store.forget(shard)
        self.topology_changed()
        if shard == META_GROUP:
            self.removed_from_cluster()

    def removed_from_cluster(self) -> None:
        """This node is none of the cluster any more, for good."""
        log.critical("this node was removed from the cluster: it ends, and its data directory is of no more use")
        self.on_removed()

    @property
    def cluster_id(self) -> str:
        """Identity of the cluster, which its name is not; empty while it is not known."""
        return self.meta.directory.cluster_id or self.host.cluster_id

    @property
    def placement(self) -> dict[int, list[str]]:
        """Where shards belong: shard -> node ids, the preferred leader first."""
        return self.balance.homes()

    @property
    def knows_members(self) -> bool:
        """Whether `members` is more than itself on a node that joins, or recovers what it lost."""
        return bool(self.meta.directory.members) or not (self.config.join or self.host.recovering)

    def members_changed(self) -> None:
        """`members` is another one."""
        for follow in list(self.on_members):
            follow()

    # -- feature levels ------------------------------------------------------------------------------------------

    def feature(self, level: int) -> bool:
        """Whether what came with a feature level may be written: every node of the cluster can read it. See core.features."""
        return self.meta.feature(level)

    def check_level(self, level: int) -> None:
        """The cluster is at a feature level. Raises StoreRefused if this node does not know it."""
        if why := features.refusal(level, self.features):
            raise StoreRefused(why)
        self.keep_level(level)

    # -- small things --------------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        """Milliseconds since 1970: the time that goes into log entries."""
        return self.clock.unix_ms()

    def shard_of(self, queue: bytes) -> int:
        """The shard of a queue."""
        return shard_of(queue, self.config.shards)

    def policy(self, destination: bytes) -> Policy:
        """The policy of a destination."""
        return self.meta.policy(destination)

    def leader_of(self, shard: int) -> str | None:
        """Node id of a group's leader, as far as known; this node only if it may serve."""
        runtime = self.shards.get(shard)
        if runtime is not None and runtime.leading:
            return self.config.node_id
        leader = self.host.leader_of(shard)[0]
        return None if leader == self.config.node_id else leader

    def leader_in_touch(self, shard: int) -> str | None:
        """As `leader_of`, but only a node that this one is in touch with."""
        leader = self.leader_of(shard)
        return leader if leader is not None and self.host.in_touch(leader) else None

    def topology_changed(self) -> None:
        """Wakes whoever watches the topology."""
        self.revision += 1
        self._topology_event.set()

    async def wait_topology(self, seen: int) -> int:
        """Waits until the revision differs from `seen`; returns it."""
        while self.revision == seen:
            self._topology_event.clear()
            await self._topology_event.wait()
        return self.revision

    def call_done(self, call: Call) -> None:
        """A produce call is answered: its bytes are free again."""
        self.ingress_bytes -= call.size

    # -- leases --------------------------------------------------------------------------------------------------

    def before_collect(self) -> None:
        """Between the applies and the proposals of a turn: schedules, then picks as long as there are credit and work."""
        if self._meta_news and self.clock.monotonic() > self._follow_after:
            self.follow_meta()
        if self.rebuilds:
            self._rebuild_some()
        filling = sum(runtime.leading and runtime.filling for runtime in self.shards.values())
        self.entry_bytes = TURN_BYTES // max(1, filling)
        if not self.stopping:  # consumers were told that no new lease will come
            self._pick_some()

    def _pick_some(self) -> None:
        """Some picks for each subscription in turn, up to what a turn may take. Picks that come to nothing count, too: after
        a burst of delayed messages there may be a million of them."""
        scheduler = self.scheduler
        subscriptions = scheduler.subscriptions
        now = self.now_ms()
        left = PICKS_PER_TURN_MAX
        scheduler.wake_due(now)
        waiting = [s for s in subscriptions.values() if s.round and s.heap]
        while waiting:
            hungry = []
            for subscription in waiting:
                if left <= 0:  # more next turn, then from here on
                    self.wake()
                    return
                for _ in range(PICKS_IN_A_ROW):
                    pick = scheduler.pick(subscription, now)
                    if pick is None:
                        break
                    left -= 1
                    self._lease(pick, now)
                else:
                    hungry.append(subscription)
                    subscriptions[subscription.patterns] = subscriptions.pop(subscription.patterns)
            waiting = hungry

    def _lease(self, pick: Pick, now: int) -> None:
        """Turns a pick into a grant, if the queue is still there for it."""
        name = pick.queue
        number = shard_of(name, self.config.shards)
        runtime = self.shards.get(number)
        if runtime is None or not runtime.leading:
            return
        state = runtime.state
        queue = state.open(name)
        if queue is None or queue.token or queue.granting:
            return
        consumer = pick.consumer
        policy = self.meta.policy(pick.tenant.destination.name)
        want = 1 if pick.probe else min(consumer.run_messages_max or policy.run_messages_max,
                                        policy.run_messages_max, consumer.messages, pick.messages_max)
        front = queue.front
        if len(front) < want and (queue.cold or not front):
            state.ensure(queue, want, FRAME_BYTES_SOFT_MAX)  # no run is longer
            front = queue.front
        if (policy.ttl_ms or front[0][4]) and runtime.chores.trim(queue, policy, now):
            self.host.wake(number)  # it is ready again once they are gone
            return
        due = max(queue.not_before, front[0][2])
        if due > now:
            self.timers.add(due, number, name)
            return
        size = len(front[0][3])
        messages = 1
        if want > 1 and len(front) > 1:
            budget = min(consumer.bytes, FRAME_BYTES_SOFT_MAX)
            if queue.gap is not None and front[0][0] < queue.gap[2]:  # the next run says what is missing before it
                want = min(want, bisect_left(front, (queue.gap[2],)))
            for message in front[1:want]:
                size += len(message[3])
                if size > budget or message[2] > now or 0 < message[4] <= now:
                    size -= len(message[3])
                    break
                messages += 1
        queue.granting = True
        self.scheduler.charge(pick, messages, size, now)
        runtime.grant(pick, messages, now + min(consumer.lease_ms or policy.lease_ms, policy.lease_ms_max))
        self.host.wake(number)

    def deliver(self, runtime: ShardRuntime, pick: Pick, queue: Queue) -> bool:
        """Hands a granted run to its consumer; false if that is gone, or may not be sent so much any more."""
        sink = pick.consumer.sink
        if not isinstance(sink, Sink) or sink.closed or (sink.admit is not None and not sink.admit(pick.messages, pick.bytes)):
            return False
        if len(queue.front) < queue.lease_size:
            runtime.state.ensure(queue, queue.lease_size)
        messages = queue.front[:queue.lease_size]
        sink.push(*run_parts(runtime.number, queue, messages))
        if self.meters is not None:
            self.meters.delivered(queue.counters, messages, queue.attempts, runtime.state.now_ms)
        if self.tracing is not None:
            self.tracing.delivered(runtime.number, runtime.traced, queue, messages)
        return True

    def return_credit(self, pick: Pick) -> None:
        """A pick came to nothing: undoes its charge."""
        self.scheduler.settled(pick, self.now_ms(), None)
        self.scheduler.credit(pick.consumer, pick.messages, pick.bytes)

    def release_lost(self, session: str, stream: int, open_: set[int], held: set[tuple[int, int]]) -> None:
        """Gives back leases of a session that its consumer does not have, and that nothing can bring to it any more: their
        stream is an earlier one than `stream`, and not among those that are open."""
        for runtime in self.shards.values():
            if runtime.leading:
                for token, queue in runtime.state.leases.items():
                    if (queue.consumer.startswith(session) and (runtime.number, token) not in held
                            and (of := stream_of(queue.consumer, session)) is not None and is_over(of, stream, open_)):
                        runtime.release_lease(token)
                        self.host.wake(runtime.number)

    def _rebuild_some(self) -> None:
        budget = REBUILD_PER_TURN
        now = self.now_ms()
        while self.rebuilds and budget:
            runtime = self.rebuilds[0]
            source = runtime.rebuild
            if source is None:
                self.rebuilds.pop(0)
                continue
            for name, not_before in source:
                if name == OUTBOX:
                    runtime.copier.wake()
                elif not_before > now:
                    self.timers.add(not_before, runtime.number, name)
                else:
                    self.scheduler.add(name)
                budget -= 1
                if not budget:
                    break
            else:
                runtime.rebuild = iter(())
                self.rebuilds.pop(0)
        if self.rebuilds:
            self.host.wake(self.rebuilds[0].number)

    # -- gates ---------------------------------------------------------------------------------------------------

    def park_until(self, scope: bytes, now: int, delay_ms: int) -> int:
        """Until when to park a scope that was throttled or down; `delay_ms` < 0 leaves it to the policy."""
        until, step = self.gates.get(scope, (0, 0))
        if delay_ms >= 0:
            return max(until, now + delay_ms)
        if until > now:
            return until
        return now + park_ms(self.policy(scope.split(b"\0")[0]), step, self.random())

    def gate_closed(self, scope: bytes, until: int, step: int) -> None:
        """A gate closed, here or on a shard that this node now leads."""
        known_until, known_step = self.gates.get(scope, (0, 0))
        self.gates[scope] = (max(until, known_until), max(step, known_step))
        self.scheduler.set_gate(scope, sched.CLOSED)
        self.timers.add(max(until, known_until), 0, scope)
        if self._remote_holds.get(scope):
            self.remote_hold(scope, 0)  # it is for this node, too, to probe now
        self.shares.wake()

    def forget_gates(self, scopes: Iterable[bytes]) -> None:
        """A shard with these gates is another node's now: opens those that no shard led here keeps closed, as nothing here
        would ever probe them."""
        for scope in scopes:
            if scope in self.gates and not any(r.leading and scope in r.state.gates for r in self.shards.values()):
                until, _ = self.gates.pop(scope)
                self.scheduler.set_gate(scope, sched.OPEN)
                if len(self.members) > 1:
                    self.shares.handed_over(scope, max(until, self.now_ms()))

    def _meta_changed(self) -> None:
        self._meta_news = True
        if self._tokens_revision != self.meta.directory.tokens_revision:
            self._tokens_revision = self.meta.directory.tokens_revision
            self.on_tokens()
        self.wake()

    def follow_meta(self) -> None:
        """Tells the scheduler which destinations' policies and which operators' gates have changed. Looks at all that it has,
        so with very many of them a storm of changes is not followed one by one."""
        self._meta_news = False
        begin = self.clock.monotonic()
        holds = self.meta.directory.holds
        for scope in self._holds.keys() | holds.keys():
            if self._holds.get(scope) != holds.get(scope):
                self._hold(scope)
        self._holds = dict(holds)
        policies = {}
        for name in self.scheduler.destinations:
            policy = policies[name] = self.policy(name)
            if self._policies.get(name) is not policy:
                self.scheduler.policy_changed(name)
        self._policies = policies
        now = self.clock.monotonic()
        self._follow_after = now + FOLLOW_REST * (now - begin) if now - begin > FOLLOW_SECONDS else 0.0

    def ttl_destinations(self) -> list[bytes]:
        """Destinations whose policy has a time to live."""
        if self._ttl_revision != self.meta.revision:
            self._ttl_revision = self.meta.revision
            self._ttl_destinations = [d.name.encode() for d in self.meta.directory.destinations.values() if d.policy.ttl_ms]
        return self._ttl_destinations

    def _hold(self, scope: bytes) -> None:
        hold = self.meta.directory.holds.get(scope)
        remote = self._remote_holds.get(scope, 0)
        self.scheduler.hold(scope, remote if hold is None else -1 if hold.paused is not None else max(hold.parked_until, remote))

    def closed_scopes(self) -> set[bytes]:
        """Destinations and tenants that failures, operators or other nodes keep closed, as far as this node knows."""
        now = self.now_ms()
        return {*self.gates, *self._remote_holds,
                *(scope for scope, hold in self.meta.directory.holds.items() if hold.paused is not None or hold.parked_until > now)}

    def remote_hold(self, scope: bytes, until: int) -> None:
        """Another node keeps a gate closed until then; 0: no longer."""
        if until == self._remote_holds.get(scope, 0):
            return
        if until:
            self._remote_holds[scope] = until
        else:
            del self._remote_holds[scope]
        self._hold(scope)
        self.wake()

    def wake(self) -> None:
        """There may be something to lease out: takes a turn."""
        if self.shards:
            self.host.wake(next(iter(self.shards)))

    def open_gates(self, scope: bytes) -> bool:
        """Opens a gate that THROTTLED or DOWN closed, on this node; false if it is open."""
        found = self.gates.pop(scope, None) is not None
        self.scheduler.set_gate(scope, sched.OPEN)
        for runtime in self.shards.values():
            if runtime.leading and scope in runtime.state.gates:
                runtime.open_gate(scope)
                self.host.wake(runtime.number)
        self.shares.opened(scope)
        self.wake()
        return found

    def probe_succeeded(self, pick: Pick) -> None:
        """A half-open gate's probe was acknowledged: opens it."""
        destination = pick.tenant.destination.name
        for scope in (destination, destination + b"\0" + pick.tenant.name):
            if scope in self.gates and self.scheduler.gate(scope) == sched.HALF_OPEN:
                self.open_gates(scope)

    # -- upkeep --------------------------------------------------------------------------------------------------

    def checkpoint_due(self, runtime: ShardRuntime) -> None:
        """A shard has enough unsaved changes; one is saved per tick, so that checkpoints do not pile up in a turn."""
        self._due_checkpoints[runtime] = None
        if runtime.state.unsaved_bytes > 8 << 20:
            self._checkpoint(runtime)

    def _checkpoint(self, runtime: ShardRuntime) -> None:
        self._due_checkpoints.pop(runtime, None)
        if runtime.needs_checkpoint():
            runtime.checkpoint()

    def start(self, forwarder: Forwarder) -> None:
        """Starts timers, upkeep and the exchange with the other nodes; the host runs by itself."""
        self._watch_disk()
        for one in (self._tick(), self._upkeep(), self.shares.watch_ages(), self.shares.run(forwarder), self.balance.run(forwarder)):
            task = asyncio.get_running_loop().create_task(one)
            task.add_done_callback(self.task_done)
            self._tasks.append(task)

    def task_done(self, task: asyncio.Task[None]) -> None:
        """A task ended: an error that nobody expected ends the node."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.host.fatal(error)

    async def _tick(self) -> None:
        """Timers, lease expiry, checkpoints that are due."""
        last_second = 0
        while True:
            await asyncio.sleep(TICK_SECONDS if self.timers or self._due_checkpoints or self.scheduler.next_wake_ms()
                                else TICK_SECONDS * 4)
            now = self.now_ms()
            self.fire_timers(now)
            wake_ms = self.scheduler.next_wake_ms()
            if self._meta_news or (wake_ms is not None and wake_ms <= now):
                self.wake()
            if self._due_checkpoints:
                self._checkpoint(next(iter(self._due_checkpoints)))
            if now // 1000 != last_second:
                last_second = now // 1000
                for runtime in self.shards.values():
                    if runtime.leading and (runtime.expire_due(now) | runtime.chores.sweep(now)):
                        self.host.wake(runtime.number)

    def fire_timers(self, now: int) -> None:
        """Queues and gates whose time has come, some of them."""
        for number, name in self.timers.pop_due(now, TIMERS_PER_TICK_MAX):
            if number == 0:
                self._gate_due(name, now)
                continue
            runtime = self.shards.get(number)
            if runtime is not None and runtime.leading:
                self.scheduler.add(name)
                self.host.wake(number)

    def _gate_due(self, scope: bytes, now: int) -> None:
        until, _ = self.gates.get(scope, (0, 0))
        if until and until <= now and self.scheduler.gate(scope) == sched.CLOSED:
            self.scheduler.set_gate(scope, sched.HALF_OPEN)
            self.wake()

    async def _upkeep(self) -> None:
        """Periodic checkpoints, syncs, sweeps, disk watermark."""
        last_checkpoint = last_sample = busy_at = self.clock.monotonic()
        rested = True
        committed = {n: r.rows.applied_index for n, r in self.shards.items()}
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            if self.clock.monotonic() - last_checkpoint > CHECKPOINT_SECONDS:
                last_checkpoint = self.clock.monotonic()
                for runtime in list(self.shards.values()):
                    if runtime.number in self.shards:
                        self._checkpoint(runtime)
                    await asyncio.sleep(0)
            if self.clock.monotonic() - last_sample > SAMPLE_SECONDS:
                last_sample = self.clock.monotonic()
                for runtime in list(self.shards.values()):
                    if runtime.leading:
                        runtime.sample(self.now_ms())
                        await asyncio.sleep(0)
            now = {n: r.rows.applied_index for n, r in self.shards.items()}
            if now != committed or self.meta.rows.applied_index != self.meta.rows.durable_index:
                await self.store.sync()
                committed = now
                busy_at = self.clock.monotonic()
                rested = False
            elif not rested and self.clock.monotonic() - busy_at > QUIET_SECONDS:
                rested = True
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(None, self.store.rest)
                await loop.run_in_executor(None, self.host.store.rest)
            self.scheduler.sweep(self.now_ms())
            self._watch_disk()
            await self._trim_memory()

    async def _trim_memory(self) -> None:
        """Gives memory that a burst left behind back to the system: the allocator alone keeps it for ever."""
        now = self.clock.monotonic()
        if _malloc_trim is not None and now - self._trimmed > TRIM_SECONDS:
            self._trimmed = now
            await asyncio.get_running_loop().run_in_executor(None, _malloc_trim, 0)

    def _watch_disk(self) -> None:
        free = shutil.disk_usage(Path(self.config.data_dir)).free
        full = free < self.config.disk_free_bytes_min
        if full != self.disk_full:
            log.warning("disk: %d MiB free; %s", free >> 20, "refusing Produce" if full else "accepting Produce again")
        self.disk_full = full

    async def stop(self) -> None:
        """Saves everything; the host is stopped already."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for runtime in self.shards.values():
            self._checkpoint(runtime)
        await self.store.sync()


