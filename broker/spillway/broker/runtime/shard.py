"""One shard's replica on this node: the state machine under a Raft group, and, on its leader, the turn that fills log
entries and releases their effects.

While one entry is in flight the next fills (group commit): latency when idle, batches under load.
"""
from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from spillway.broker.core import entry as e
from spillway.broker.core.entry import Enqueue, Entry, Settle, decode_entry, encode_entry
from spillway.broker.core.outbox import OUTBOX
from spillway.broker.core.policy import backoff_ms, dead_reason
from spillway.broker.core.queue import Queue
from spillway.broker.core.scheduler import Pick
from spillway.broker.core.shard import Effects, SettleStatus, Shard, destination_of, tenant_scope_of
from spillway.broker.errors import Unavailable
from spillway.broker.runtime.calls import Batch, Call, Release
from spillway.broker.runtime.chores import Chores, Flight
from spillway.broker.runtime.copier import Copier
from spillway.cluster.errors import StorageFailed
from spillway.cluster.machine import Role
from spillway.cluster.state_store import GroupRows
from spillway.contract.limits import REASON_BYTES_MAX
from spillway.v1.message_pb2 import (
    ERROR_CODE_INVALID_ARGUMENT,
    ERROR_CODE_OUT_OF_SEQUENCE,
    ERROR_CODE_PERMISSION_DENIED,
    ERROR_CODE_STALE_TOKEN,
    ERROR_CODE_UNAVAILABLE,
)
from spillway.v1.queue_service_pb2 import (
    SETTLEMENT_RESULT_ALREADY_SETTLED,
    SETTLEMENT_RESULT_OK,
    SETTLEMENT_RESULT_REFUSED,
    Settlement,
)

if TYPE_CHECKING:
    from spillway.broker.runtime.node import Node
    from spillway.broker.telemetry.tracing import TracedLeases

log = logging.getLogger(__name__)

SETTLES_PER_ENTRY_BYTES = 256 << 10  # with their reasons
SETTLE_BYTES = 64  # without its reason
GRANTS_PER_ENTRY_MAX = 256  # with names at their limit, about 200 KiB
EXPIRES_PER_ENTRY_MAX = 4096
BEYOND = 1 << 20  # position of a settlement in a run that is not known: greater than any
UNSAVED_BYTES_MAX = 512 << 10  # a checkpoint is due: keeps memory bounded and one checkpoint a few milliseconds
UNSAVED_QUEUES_MAX = 1024
LOG_BYTES_MAX = 3 << 20  # log applied since the last checkpoint; bounds the replay at start
LEASES_OVER_MAX = 16_384  # kept by their deadline until it has passed, beyond as many as there are live ones
SAMPLES = 7  # of what was acknowledged, five seconds apart
STALE = "the lease is over: its fencing token is not current"


class ShardRuntime:
    """A GroupMachine (see spillway.cluster.machine) that owns one `Shard`."""

    def __init__(self, node: Node, number: int, rows: GroupRows) -> None:
        self.node = node
        self.number = number
        self.rows = rows
        self.state = Shard(rows)
        self.applied = rows.applied_index
        self.applied_term = rows.applied_term
        self.log_bytes = 0  # applied since the last checkpoint
        self.leading = False
        self.term = 0
        self.leases_by_second: dict[int, list[int]] = {}  # deadline -> tokens, also of leases that are over
        self._leases_listed = 0  # tokens in there, at most
        self.picks: dict[int, Pick] = {}  # token -> what the scheduler charged for it
        self.rebuild: Iterator[tuple[bytes, int]] | None = None
        self._oldest: dict[bytes, tuple[bytes, int, int]] = {}  # destination -> (queue, enqueue ms, looked up ms)
        self.led_since_ms = 0
        self._samples: deque[tuple[int, dict[bytes, int]]] = deque(maxlen=SAMPLES)
        self.chores = Chores(self)
        self.copier = Copier(node, self)
        self._barriers: list[asyncio.Future[None]] = []
        self._barriers_in_flight: list[asyncio.Future[None]] = []
        self._in_flight: deque[tuple[Entry, list[Batch], list[tuple[Call, int]], list[Pick], Flight]] = deque()
        self.traced: TracedLeases = {}  # leases of sampled messages, if anybody makes spans
        self._proposed_at = 0.0  # when the entry in flight was made; only for metrics
        self._clear_pending()

    def _clear_pending(self) -> None:
        self._batches: OrderedDict[int, deque[Batch]] = OrderedDict()  # per stream, round robin
        self._settles: list[Settle] = []
        self._settle_calls: list[tuple[Call, int]] = []
        self._expires: list[e.Expire] = []
        self._gates: list[e.GateChange] = []
        self._grants: list[tuple[Pick, int, int]] = []  # pick, messages, deadline

    # -- what waits for the next entry ---------------------------------------------------------------------------

    def enqueue(self, stream: int, batch: Batch) -> None:
        """Messages of a producer's stream; streams take turns."""
        waiting = self._batches.get(stream)
        if waiting is None:
            waiting = self._batches[stream] = deque()
        waiting.append(batch)

    def settle(self, call: Call, index: int, token: int, sequence: int, outcome: int, delay_ms: int, reason: str) -> None:
        """One settlement; `delay_ms` < 0 is unset. Answers through the call, at once where the answer is certain."""
        state = self.state
        queue = state.leases.get(token)
        if queue is None:
            if state.settled_before(token, sequence, outcome):
                call.results[index] = SETTLEMENT_RESULT_ALREADY_SETTLED
            elif token in state.settled:
                call.results[index] = SETTLEMENT_RESULT_REFUSED
                call.fail(index, ERROR_CODE_STALE_TOKEN, f"settlements[{index}].fencing_token", STALE)
                if self.node.meters is not None and call.asked:
                    self.node.meters.stale += 1
            else:
                # Perhaps another node leads, and granted it, and this one does not know yet. The log tells.
                call.waiting += 1
                until = self.node.now_ms() + delay_ms if delay_ms >= 0 else 0
                self._settles.append((token, BEYOND, sequence, outcome, until, reason))
                self._settle_calls.append((call, index))
            return
        if call.grants is not None and not call.grants.settles(queue.key):
            call.results[index] = SETTLEMENT_RESULT_REFUSED
            call.fail(index, ERROR_CODE_PERMISSION_DENIED, f"settlements[{index}].fencing_token",
                      "is a lease from a destination that the token has no lease scope for")
            return
        position = 0
        if outcome != e.EXTEND:
            remaining = queue.lease_size - queue.lease_acked
            front = queue.front
            if len(front) < remaining:
                state.ensure(queue, remaining)
            if front[0][0] == sequence:
                position = queue.lease_acked + 1
            else:
                i = bisect_left(front, (sequence,), 0, remaining)
                if i < remaining and front[i][0] == sequence:
                    position = queue.lease_acked + i + 1
                else:
                    if sequence < front[0][0] and outcome == e.ACK:
                        call.results[index] = SETTLEMENT_RESULT_ALREADY_SETTLED
                    else:
                        call.results[index] = SETTLEMENT_RESULT_REFUSED
                        call.fail(index, ERROR_CODE_INVALID_ARGUMENT, f"settlements[{index}].sequence",
                                  f"{sequence} is not an unsettled message of this lease")
                    return
        argument = 0
        if outcome == e.EXTEND:
            until = self._extended(token, queue, delay_ms)
            if not until:
                call.results[index] = SETTLEMENT_RESULT_REFUSED
                call.fail(index, ERROR_CODE_INVALID_ARGUMENT, f"settlements[{index}].delay",
                          "the lease would last longer than the destination's policy allows (lease_duration_max)")
                return
            argument, reason = until, ""
        elif outcome != e.ACK:
            outcome, position, argument, reason = self._decide(queue, position, outcome, delay_ms, reason)
        call.waiting += 1
        self._settles.append((token, position, sequence, outcome, argument, reason))
        self._settle_calls.append((call, index))
        if self.traced and (lease := self.traced.get(token)) is not None:
            lease.settling_ns = time.time_ns()

    def _extended(self, token: int, queue: Queue, delay_ms: int) -> int:
        """Until when EXTEND makes a lease last; 0 if that is longer than it may."""
        node = self.node
        policy = node.policy(destination_of(queue.key))
        until = node.now_ms() + (delay_ms if delay_ms > 0 else policy.lease_ms)
        pick = self.picks.get(token)
        return until if until <= (pick.since_ms if pick is not None else self.led_since_ms) + policy.lease_ms_max else 0

    def _decide(self, queue: Queue, position: int, outcome: int, delay_ms: int, reason: str) -> tuple[int, int, int, str]:
        """What the policy makes of an outcome other than ACK and EXTEND: (outcome, position, argument, reason)."""
        node = self.node
        now = node.now_ms()
        position -= 1  # what must be acknowledged before it
        reason = reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore")
        if outcome == e.RETRY:
            policy = node.policy(destination_of(queue.key))
            at_head = position == queue.lease_acked
            attempts = queue.attempts + 1 if at_head else 1
            dead = dead_reason(policy, attempts, now - queue.front[position - queue.lease_acked][1])
            if dead is not None:
                return (e.DISCARD if policy.discard else e.REJECT), position, 0, f"{dead}: {reason}" if reason else dead
            wait = delay_ms if delay_ms >= 0 else backoff_ms(policy, attempts - 1, node.random())
            return outcome, position, now + wait, ""
        if outcome in (e.THROTTLED, e.DOWN):
            scope = tenant_scope_of(queue.key) if outcome == e.THROTTLED else destination_of(queue.key)
            return outcome, position, node.park_until(scope, now, delay_ms), ""
        if outcome == e.REJECT and node.policy(destination_of(queue.key)).discard:
            outcome = e.DISCARD
        return outcome, position, 0, reason

    def release_lease(self, token: int) -> None:
        """Gives back a lease whose consumer never got it; counts no attempt."""
        queue = self.state.leases.get(token)
        if queue is not None:
            self.state.ensure(queue, 1)
            # Whoever leads next is told, too.
            self.settle(Release(1, asyncio.get_running_loop()), 0, token, queue.front[0][0], e.RELEASE, -1, "")

    def grant(self, pick: Pick, messages: int, deadline: int) -> None:
        """A lease that the scheduler chose."""
        self._grants.append((pick, messages, deadline))

    def open_gate(self, scope: bytes) -> None:
        """Forgets a closed gate."""
        self._gates.append((scope, 0, 0))

    async def barrier(self) -> None:
        """Returns when an entry that is proposed after the call is applied here: everything that any leader acknowledged before the
        call is in the state then. Raises Unavailable if this node does not lead, or not for long enough."""
        if not self.leading:
            raise Unavailable(f"this node does not lead shard {self.number}")
        passed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers.append(passed)
        self.node.host.wake(self.number)
        await passed

    def expire_due(self, now: int) -> bool:
        """Proposes the end of leases whose time is over; true if there are any."""
        second = now // 1000
        found = False
        for bucket in [b for b in self.leases_by_second if b < second]:
            for token in self.leases_by_second.pop(bucket):
                queue = self.state.leases.get(token)
                if queue is None:
                    continue
                if queue.deadline > now:
                    self.leases_by_second.setdefault(queue.deadline // 1000, []).append(token)
                    continue
                policy = self.node.policy(destination_of(queue.key))
                self.state.ensure(queue, 1)
                dead = dead_reason(policy, queue.attempts + 1, now - queue.front[0][1])
                fate = e.KEEP if dead is None else e.GONE if policy.discard else e.DEAD
                self._expires.append((token, fate, 0, dead or ""))
                self.leases_by_second.setdefault(second + 1, []).append(token)  # until it is seen to be gone
                found = True
        return found

    @property
    def filling(self) -> bool:
        """Whether messages wait for an entry."""
        return bool(self._batches)

    @property
    def waiting(self) -> bool:
        """Whether something waits for an entry."""
        return bool(self._batches or self._settles or self._grants or self._expires or self._gates or self._barriers
                    or self.chores.waiting)

    # -- GroupMachine --------------------------------------------------------------------------------------------

    def durable_index(self) -> int:
        """See GroupMachine."""
        return self.rows.durable_index

    def collect(self) -> bytes | None:
        """See GroupMachine. One entry in flight: a second one would only make both smaller."""
        if self._in_flight or not self.waiting:
            return None
        batches: list[Batch] = []
        size = 0
        budget = self.node.entry_bytes  # beyond it, an entry takes no further batch
        while self._batches and size < budget:
            stream, waiting = next(iter(self._batches.items()))
            batch = waiting.popleft()
            batches.append(batch)
            size += batch.size
            if waiting:
                self._batches.move_to_end(stream)
            else:
                del self._batches[stream]
        settles, calls = self._settles, self._settle_calls
        size = taken = 0
        for settle in settles:
            size += SETTLE_BYTES + len(settle[5])
            if size > SETTLES_PER_ENTRY_BYTES:
                break
            taken += 1
        self._settles, self._settle_calls = settles[taken:], calls[taken:]
        settles, calls = settles[:taken], calls[:taken]
        grants: list[e.Grant] = []
        consumers: dict[str, int] = {}
        picks: list[Pick] = []
        for pick, messages, deadline in self._grants[:GRANTS_PER_ENTRY_MAX]:
            session = pick.consumer.session
            grants.append((pick.queue, messages, deadline, consumers.setdefault(session, len(consumers))))
            picks.append(pick)
        enqueues = [Enqueue(b.producer, b.first, b.names, b.bodies, None, b.options, b.copies, b.epoch) for b in batches]
        made = Entry(e.VERSION, self.node.now_ms(), enqueues,
                     settles, self._expires[:EXPIRES_PER_ENTRY_MAX], self._gates, grants, list(consumers))
        del self._grants[:GRANTS_PER_ENTRY_MAX], self._expires[:EXPIRES_PER_ENTRY_MAX]
        self._gates = []
        self._barriers, self._barriers_in_flight = [], self._barriers
        self._in_flight.append((made, batches, calls, picks, self.chores.fill(made)))
        if self.node.meters is not None:
            self._proposed_at = self.node.clock.monotonic()
        return encode_entry(made)

    def apply(self, index: int, term: int, command: bytes) -> None:
        """See GroupMachine."""
        self.applied = index
        self.applied_term = term
        self.log_bytes += len(command)
        if self.leading and term == self.term and self._in_flight:
            made, batches, calls, picks, flight = self._in_flight.popleft()
            effects = Effects()
            self.state.apply(index, made, effects)
            meters = self.node.meters
            if meters is not None:
                meters.commits.add(int((self.node.clock.monotonic() - self._proposed_at) * 1e6))
            self._answer(effects, batches, calls)
            tracing = self.node.tracing
            if tracing is not None:
                for batch, skipped in zip(batches, effects.enqueued, strict=True):
                    if skipped >= 0:
                        tracing.stored(self.number, batch, skipped, made.now_ms)
                if self.traced:
                    tracing.applied(self.number, self.traced, made, effects)
            if made.trims or flight.purges or flight.redrives or flight.dead_purges:
                self.chores.applied(made, flight, effects)
            self._schedule(effects, picks)
            for passed in self._barriers_in_flight:
                if not passed.done():
                    passed.set_result(None)
        else:
            self.state.apply(index, decode_entry(command))
        if (self.state.unsaved_bytes > UNSAVED_BYTES_MAX or self.log_bytes > LOG_BYTES_MAX
                or self.state.unsaved > UNSAVED_QUEUES_MAX):
            self.node.checkpoint_due(self)

    def configured(self, index: int, term: int, configuration: bytes) -> None:
        """See GroupMachine."""
        self.applied, self.applied_term = index, term
        self.rows.configure(index, configuration)
        self.node.checkpoint_due(self)

    def role_changed(self, role: Role, term: int, leader: str | None) -> None:
        """See GroupMachine."""
        was = self.leading
        self.leading = role is Role.LEADER
        if was and (not self.leading or term != self.term):
            self._resign()
        self.term = term
        if self.leading and (not was or self.rebuild is None):
            self._take_over()
        self.node.topology_changed()

    def ended(self) -> None:
        """The replica is gone."""
        self.leading = False
        self._resign()

    def reload(self) -> None:
        """See GroupMachine."""
        self._resign()
        self.state.reload()
        self.applied, self.applied_term = self.rows.applied_index, self.rows.applied_term
        self.log_bytes = 0

    # -- leader --------------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Starts scheduling: gates and leases now, ready queues in slices (see Node.rebuild_some)."""
        node = self.node
        self.picks.clear()
        self._list_leases()
        for queue in self.state.queues.values():
            queue.granting = False
        for scope, (until, step) in self.state.gates.items():
            node.gate_closed(scope, until, step)
        self.rebuild = self.state.ready_queues()
        node.rebuilds.append(self)
        self.led_since_ms = node.now_ms()
        self._samples.clear()
        self.sample(self.led_since_ms)
        self.copier.start(self.term)
        if node.meters is not None:
            node.meters.took_over(self)

    def _list_leases(self) -> None:
        """Live leases by their deadline."""
        self.leases_by_second.clear()
        self._leases_listed = len(self.state.leases)
        for token, queue in self.state.leases.items():
            self.leases_by_second.setdefault(queue.deadline // 1000, []).append(token)

    def _resign(self) -> None:
        """Stops leading: what was proposed may still commit, what was not never will; the callers retry."""
        node = self.node
        if node.meters is not None:
            node.meters.resigned(self)
        self.traced.clear()  # another node will see how they end
        self.rebuild = None
        for made, batches, calls, picks, flight in self._in_flight:
            self.chores.lost(flight)
            for batch in batches:
                if batch.producer:  # a repetition is recognised
                    node.pass_on(self.number, batch)
                else:
                    self._fail_batch(batch, "the leader changed; the outcome is unknown")
            self._pass_on_settles(made.settles, calls)
            for pick in picks:
                node.return_credit(pick)
        self._in_flight.clear()
        for passed in (*self._barriers_in_flight, *self._barriers):
            if not passed.done():
                passed.set_exception(Unavailable(f"shard {self.number}: the leader changed"))
        self._barriers, self._barriers_in_flight = [], []
        for waiting in self._batches.values():
            for batch in waiting:
                node.pass_on(self.number, batch)
        self._pass_on_settles(self._settles, self._settle_calls)
        for pick, _, _ in self._grants:
            node.return_credit(pick)
        for pick in self.picks.values():
            node.scheduler.settled(pick, node.now_ms(), None)
        self.picks.clear()
        self._clear_pending()
        self.chores.clear()
        self.copier.stop()
        for queue in self.state.queues.values():
            queue.granting = False
        node.scheduler.remove_shard({self.number}, node.shard_of)
        if not self.leading:
            node.forget_gates(self.state.gates)
        node.timers.remove_shard(self.number)

    def _fail_batch(self, batch: Batch, why: str) -> None:
        call = batch.call
        for position in batch.positions:
            call.fail(position, ERROR_CODE_UNAVAILABLE, "", f"shard {self.number}: {why}")
        call.release()

    def _pass_on_settles(self, settles: list[Settle], calls: list[tuple[Call, int]]) -> None:
        """Settlements may be repeated: the new leader tells what became of them."""
        now = self.node.now_ms()
        for (token, _, sequence, outcome, argument, reason), item in zip(settles, calls, strict=True):
            again = Settlement(shard=self.number, fencing_token=token, sequence=sequence, reason=reason)
            again.outcome = e.REJECT if outcome == e.DISCARD else outcome  # type: ignore[assignment]
            if argument:
                again.delay.FromMilliseconds(max(0, argument - now))
            self.node.pass_on_settlement(self.number, *item, again)

    def _answer(self, effects: Effects, batches: list[Batch], calls: list[tuple[Call, int]]) -> None:
        sequence = effects.base
        for batch, skipped in zip(batches, effects.enqueued, strict=True):
            call = batch.call
            if skipped < 0:
                for position in batch.positions:
                    call.fail(position, ERROR_CODE_OUT_OF_SEQUENCE, f"records[{position}].producer_sequence",
                              f"shard {self.number}: an earlier record of producer {batch.producer!r} is missing")
            else:
                results = call.results
                for position in batch.positions:
                    results[position] = sequence
                    sequence += 1
                if skipped:
                    if self.node.meters is not None:
                        self.node.meters.duplicates += skipped
                    for position in batch.positions[:skipped]:
                        results[position] = 1
                sequence -= len(batch.positions)
                if batch.options:
                    for i, option in batch.options.items():
                        if option[2] and (first := effects.duplicates.get(sequence + i)):
                            results[batch.positions[i]] = first
                        elif option[1]:
                            self.chores.note(batch.names[i])
            sequence += len(batch.positions)
            if batch.promised and skipped >= 0:
                self.copier.wait(sequence, batch)
            else:
                call.release()
        for item, status in zip(calls, effects.settled, strict=True):
            call, index = item
            if status == SettleStatus.OK:
                call.results[index] = SETTLEMENT_RESULT_OK
            elif status == SettleStatus.ALREADY:
                call.results[index] = SETTLEMENT_RESULT_ALREADY_SETTLED
            else:
                call.results[index] = SETTLEMENT_RESULT_REFUSED
                if status == SettleStatus.STALE:
                    if self.node.meters is not None and call.asked:
                        self.node.meters.stale += 1
                    call.fail(index, ERROR_CODE_STALE_TOKEN, f"settlements[{index}].fencing_token", STALE)
                else:
                    call.fail(index, ERROR_CODE_INVALID_ARGUMENT, f"settlements[{index}].sequence",
                              "not the lease's first unsettled message: acknowledge the ones before it")
            call.release()

    def _schedule(self, effects: Effects, picks: list[Pick]) -> None:
        node = self.node
        scheduler = node.scheduler
        now = node.now_ms()
        for queue, pick in zip(effects.granted, picks, strict=True):
            if queue is None:
                node.return_credit(pick)
                continue
            token = queue.token
            self.picks[token] = pick
            second = queue.deadline // 1000
            bucket = self.leases_by_second.get(second)
            if bucket is None:
                self.leases_by_second[second] = [token]
            else:
                bucket.append(token)
            self._leases_listed += 1
            if not node.deliver(self, pick, queue):
                self.release_lease(token)
        if self._leases_listed > 2 * len(self.state.leases) + LEASES_OVER_MAX:
            self._list_leases()  # a lease may run for hours, and be over in a millisecond
        for token, _, outcome in effects.released:
            pick_or_none = self.picks.pop(token, None)
            if pick_or_none is not None:
                scheduler.settled(pick_or_none, now, _failed(outcome))
                if pick_or_none.probe and outcome == e.ACK:
                    node.probe_succeeded(pick_or_none)
        for scope, until, step in effects.gates:
            if until:
                node.gate_closed(scope, until, step)
        for name in effects.ready:
            if name == OUTBOX:
                self.copier.wake()
            else:
                scheduler.add(name)
        for due, name in effects.delayed:
            node.timers.add(due, self.number, name)

    # -- upkeep --------------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Commits the state as of the applied index to the store; durable once the store is synced. Raises StorageFailed; the node ends
        then, and no turn comes before that: memory has let go of what the store was to hold."""
        made = self.state.checkpoint()
        try:
            self.rows.commit(self.applied, self.applied_term, made.puts, made.deletes, made.ranges)
        except StorageFailed as error:
            self.node.host.fatal(error)
            raise
        self.log_bytes = 0

    def oldest_ms(self, destination: bytes) -> int:
        """Enqueue time of the destination's oldest message here, 0 if there is none. While that message is there
        nothing can be older, so the search is repeated only after it has gone, and at most once a second."""
        now = self.node.now_ms()
        known = self._oldest.get(destination)
        if known is not None and (now - known[2] < 1000 or self.state.holds_since(known[0], known[1])):
            return known[1]
        found = self.state.oldest(destination)
        if found is None:
            self._oldest.pop(destination, None)
            return 0
        self._oldest[destination] = (*found, now)
        return found[1]

    def sample(self, now: int) -> None:
        """Remembers how many messages were acknowledged so far, for `acked_per_second`."""
        self._samples.append((now, {name: c.acked for name, c in self.state.counters.items()}))

    def acked_per_second(self, destination: bytes) -> float:
        """Messages of a destination acknowledged per second, over the last half minute or as long as this node leads."""
        counters = self.state.counters.get(destination)
        if counters is None or not self._samples:
            return 0.0
        since, acked = self._samples[0]
        return (counters.acked - acked.get(destination, 0)) * 1000 / max(1000, self.node.now_ms() - since)

    def needs_checkpoint(self) -> bool:
        """Whether something was applied since the last one."""
        return self.applied > self.rows.applied_index


def _failed(outcome: int) -> bool | None:
    """What the outcome that ended a lease says about its destination; None: nothing."""
    if outcome in (e.RETRY, e.THROTTLED, e.DOWN):
        return True
    return None if outcome in (e.RELEASE, e.EXPIRED) else False  # whose lease expires may be a consumer that is gone
