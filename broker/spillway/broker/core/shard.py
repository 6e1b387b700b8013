"""The replicated state machine of one shard: what entries do to queues, messages, leases, dead letters.

Pure: no I/O but reads of the View, no clock, no randomness. Every replica applies the same entries and ends in
the same state. What depends on time, chance or policy was decided by the leader and stands in the entry.
"""
from __future__ import annotations

from bisect import bisect_right

from spillway.broker.core import rows
from spillway.broker.core.bounds import TIME_MS_MAX, check_queue, check_scope, check_time
from spillway.broker.core.entry import (
    ACK,
    DEAD,
    DISCARD,
    DOWN,
    EXPIRED,
    EXTEND,
    GONE,
    KEEP,
    REJECT,
    RELEASE,
    RETRY,
    THROTTLED,
    Enqueue,
    Entry,
    Option,
    Settle,
)
from spillway.broker.core.errors import CorruptEntry
from spillway.broker.core.queue import Queue
from spillway.broker.core.removals import Effects, Removals
from spillway.broker.core.state import Checkpoint, View, destination_of, tenant_scope_of
from spillway.contract.hashing import PART

SEQUENCE_SHIFT = 20  # sequence = log index << 20 | position: an entry holds fewer than 2^20 messages
PRODUCERS_MAX = 65_536  # idempotent producers remembered per shard; the longest idle is forgotten first
SETTLED_MAX = 4_096  # recent settled leases remembered, to tell "already settled" from "stale"
_NO_OPTION: Option = (0, 0, b"", 0)


class SettleStatus:
    """Result of one settlement (ints, not an enum: one per message)."""

    OK = 1
    ALREADY = 2
    STALE = 3
    NOT_FIRST = 4  # a nack of a message that is not the lease's first unsettled one


class Shard(Removals):
    """The state of one shard, and what entries do to it."""

    # -- writes --------------------------------------------------------------------------------------------------

    def apply(self, index: int, entry: Entry, effects: Effects | None = None) -> None:
        """Applies a committed entry. Never raises on what an entry asks: refusals are results in `effects`. Raises CorruptEntry,
        half way through, if it names or counts what nothing can be: then the state must not be used any more."""
        now = self.now_ms = max(self.now_ms, entry.now_ms)
        base = index << SEQUENCE_SHIFT
        if effects is None:
            effects = Effects()
        effects.base = base
        self._index = index
        for batch in entry.enqueues:
            base = self._enqueue(batch, base, now, effects)
        for settle in entry.settles:
            effects.settled.append(self._settle(settle, now, effects))
        for token, fate, not_before, reason in entry.expires:
            queue = self.leases.get(token)
            if queue is not None and queue.deadline <= now:
                self._expire(queue, fate, not_before, reason, now, effects)
        for scope, until, step in entry.gates:
            check_scope(scope)
            self._gate(scope, until, step, effects)
        for trim in entry.trims:
            effects.trimmed.append(self._trim(*trim, now, effects))
        for name in entry.purges:
            effects.purged.append(self._purge(name, effects))
        if entry.redrives:
            self._redrive(entry.redrives, effects)
        for key in entry.dead_purges:
            rows.check_dead(key)
            self._purge_dead(key)
        for name, copies in entry.overflows:
            check_scope(name)
            self._counters(name).overflowed += copies
        token = index << SEQUENCE_SHIFT
        for name, messages, deadline, consumer in entry.grants:
            token += 1
            try:
                who = entry.consumers[consumer]
            except IndexError:
                raise CorruptEntry(f"a grant is for consumer {consumer} of {len(entry.consumers)}") from None
            effects.granted.append(self._grant(name, messages, deadline, who, token))

    def _enqueue(self, batch: Enqueue, base: int, now: int, effects: Effects) -> int:
        """Appends a batch's messages from sequence `base` on; returns the sequence after the last."""
        names, bodies, options = batch.queues, batch.bodies, batch.options
        producer, first = batch.producer, batch.first
        skip = 0
        end = base + len(names)
        if batch.copies is not None:
            skip = self._follow(batch, batch.copies)
            if skip < 0:
                effects.enqueued.append(-1)
                return end
        elif producer:
            known = self.producers.get(producer)
            last = known[0] if known else 0
            if first > last + 1:
                effects.enqueued.append(-1)
                return end
            skip = min(last + 1 - first, len(names))
            if names:  # an empty batch has no sequence of its own: restarted, it would rank elsewhere
                self._remember_producer(producer, max(last, first + len(names) - 1), base)
        effects.enqueued.append(skip)
        if options:
            for i in range(skip, len(names)):
                self._enqueue_one(names[i], bodies[i], base + i, options.get(i, _NO_OPTION), now, effects)
            return end
        if skip:
            names, bodies = names[skip:], bodies[skip:]
            base += skip
        queues = self.queues
        ready = effects.ready
        dirty = self._dirty
        unsaved = self.unsaved_bytes
        sequence = base
        for name, body in zip(names, bodies, strict=True):
            queue = queues.get(name)
            if queue is None:
                if name[-1:] == PART:
                    name += b"%x" % sequence
                elif self._stored_queues:
                    queue = self.open(name)
            if queue is None:
                queue = queues[name] = self._queue(name)
                queue.counters.queues += 1
                queue.front.append((sequence, now, 0, body, 0))
                queue.dirty = True
                dirty[name] = queue
                ready.append(name)
            else:
                if queue.persisted >= sequence:
                    queue.persisted = sequence - 1
                (queue.tail if queue.cold else queue.front).append((sequence, now, 0, body, 0))
                if not queue.dirty:
                    queue.dirty = True
                    dirty[name] = queue
            size = len(body)
            queue.size += size
            counters = queue.counters
            counters.enqueued += 1
            counters.messages += 1
            counters.size += size
            if not counters.dirty:
                counters.dirty = True
                self._dirty_counters.append(counters)
            tenant = queue.tenant
            tenant.messages += 1
            tenant.size += size
            if not tenant.dirty:
                tenant.dirty = True
                self._dirty_tenants.append(tenant)
            unsaved += size
            sequence += 1
        self.unsaved_bytes = unsaved
        return end

    def _enqueue_one(self, name: bytes, body: bytes, sequence: int, option: Option, now: int, effects: Effects) -> None:
        """A message with a delay, a time to live or a dedup id; as the loop of `_enqueue`, one at a time."""
        deliver, expire, digest, until = option
        check_queue(name)
        if not (0 <= deliver <= TIME_MS_MAX and 0 <= expire <= TIME_MS_MAX and 0 <= until <= TIME_MS_MAX):
            raise CorruptEntry(f"a message has the times {deliver}, {expire} and {until}, of which one is beyond any")
        if digest:
            first = self._deduplicate(digest, sequence, until, now)
            if first:
                effects.duplicates[sequence] = first
                self._counters(destination_of(name)).deduplicated += 1
                return
        if name[-1:] == PART:
            name += b"%x" % sequence
        queue = self.open(name)
        message = (sequence, now, deliver, body, expire)
        if queue is None:
            queue = self.queues[name] = self._queue(name)
            queue.counters.queues += 1
            queue.front.append(message)
            self._touch(queue)
            self._head_changed(queue, effects)
        else:
            if queue.persisted >= sequence:
                queue.persisted = sequence - 1
            (queue.tail if queue.cold else queue.front).append(message)
            self._touch(queue)
        queue.counters.enqueued += 1
        self._weigh(queue, 1, len(body))
        self.unsaved_bytes += len(body)

    def _deduplicate(self, digest: bytes, sequence: int, until: int, now: int) -> int:
        """The sequence of the message that has this dedup id, 0 if there is none: then it is this one's from now on."""
        known = self._dedups.get(digest)
        if known is None and (value := self.view.get(rows.DEDUP + digest)) is not None:
            known = rows.decode_dedup(value)
        if known is not None and known[1] > now:
            return known[0]
        self._dedups[digest] = (sequence, until)
        return 0

    def _follow(self, batch: Enqueue, copies: list[int]) -> int:
        """How many of a route's copies are here already; -1 if they do not follow those before them, or come from an earlier
        life of their copier: then what lies between may be lost, or is still on its way."""
        epoch, chain, last = self.copiers.get(batch.producer, (0, 0, 0))
        if batch.epoch > epoch:
            epoch, chain = batch.epoch, 0
        if batch.epoch < epoch or batch.first > chain:
            return -1
        if copies:
            self.copiers[batch.producer] = (epoch, max(chain, copies[-1]), max(last, copies[-1]))
            self._dirty_copiers.add(batch.producer)
        return bisect_right(copies, last)

    def _remember_producer(self, producer: str, last: int, used: int) -> None:
        self.producers[producer] = (last, used)
        self.producers.move_to_end(producer)
        self._dirty_producers[producer] = None
        if len(self.producers) > PRODUCERS_MAX:
            forgotten, _ = self.producers.popitem(last=False)
            self._dirty_producers[forgotten] = None

    def _grant(self, name: bytes, messages: int, deadline: int, consumer: str, token: int) -> Queue | None:
        queue = self.open(name)
        if queue is None:
            return None
        queue.granting = False
        check_time(deadline)
        if queue.token or messages < 1 or messages > queue.count:
            return None
        queue.token = token
        queue.lease_size = messages
        queue.lease_acked = 0
        queue.deadline = deadline
        queue.consumer = consumer
        self.leases[token] = queue
        queue.counters.leased += messages
        queue.counters.leases += 1
        self._touch(queue)
        return queue

    def _settle(self, settle: Settle, now: int, effects: Effects) -> int:
        token, position, _, outcome, argument, reason = settle
        queue = self.leases.get(token)
        if queue is None:
            done = self.settled.get(token)
            if done is None or position > done[0] or outcome == EXTEND:
                return SettleStatus.STALE
            return SettleStatus.ALREADY
        if position > queue.lease_acked:
            if outcome != ACK or position > queue.lease_size:
                return SettleStatus.NOT_FIRST
            self._ack(queue, position - queue.lease_acked, effects)
            return SettleStatus.OK
        if outcome == ACK:
            return SettleStatus.ALREADY
        check_time(argument)
        if outcome == EXTEND:
            queue.deadline = max(queue.deadline, argument)
            self._touch(queue)
            return SettleStatus.OK
        if position < queue.lease_acked:
            return SettleStatus.NOT_FIRST
        if outcome == RETRY:
            queue.attempts += 1
            queue.counters.retried += 1
            queue.not_before = argument
        elif outcome == THROTTLED:
            self._close_gate(tenant_scope_of(queue.key), argument, now, effects)
        elif outcome == DOWN:
            self._close_gate(destination_of(queue.key), argument, now, effects)
        elif outcome in (REJECT, DISCARD):
            self._drop_head(queue, DEAD if outcome == REJECT else GONE, queue.attempts + 1, reason, now)
        elif outcome != RELEASE:
            raise CorruptEntry(f"a settlement has the outcome {outcome}")
        self._remember_settled(token, queue)
        self._end_lease(queue, outcome, effects)
        return SettleStatus.OK

    def _ack(self, queue: Queue, count: int, effects: Effects) -> None:
        """The first `count` messages are done."""
        counters = queue.counters
        counters.acked += count
        counters.leased -= count
        if not counters.dirty:
            counters.dirty = True
            self._dirty_counters.append(counters)
        queue.lease_acked += count
        meter = counters.meter
        if meter is not None:
            now = self.now_ms
            if count == 1:
                self.ensure(queue, 1)
                meter.end_to_end.add(now - queue.front[0][1])
            else:
                self.ensure(queue, count)
                times = [m[1] for m in queue.front[:count]]
                meter.end_to_end.add_run(now - times[0], now - times[-1], now * count - sum(times), count)
        self._head_done(queue, self._remove_head(queue, count))
        if queue.lease_acked == queue.lease_size:
            self._remember_settled(queue.token, queue)
            self._end_lease(queue, ACK, effects)
        elif not queue.dirty:
            queue.dirty = True
            self._dirty[queue.key] = queue

    def _end_lease(self, queue: Queue, outcome: int, effects: Effects) -> None:
        """The lease is over: what is left of the queue becomes ready, now or later, or the queue vanishes."""
        token = queue.token
        del self.leases[token]
        counters = queue.counters
        counters.leases -= 1
        counters.leased -= queue.lease_size - queue.lease_acked
        if counters.meter is not None:
            counters.meter.outcomes[outcome] += 1
        effects.released.append((token, queue.key, outcome))
        queue.token = 0
        if not queue.front and not queue.cold:
            self._vanish(queue)
            return
        self._touch(queue)
        self._head_changed(queue, effects)

    def settled_before(self, token: int, sequence: int, outcome: int) -> bool:
        """Whether a settlement repeats one that ended its lease, or acknowledges what that lease acknowledged."""
        done = self.settled.get(token)
        if done is None or outcome == EXTEND:
            return False
        return sequence < done[1] if outcome == ACK else sequence >= done[1] - 1

    def _remember_settled(self, token: int, queue: Queue) -> None:
        settled = self.settled
        settled[token] = (queue.lease_acked, queue.floor)
        if len(settled) > SETTLED_MAX:
            del settled[next(iter(settled))]

    def _expire(self, queue: Queue, fate: int, not_before: int, reason: str, now: int, effects: Effects) -> None:
        counters = queue.counters
        counters.expired += 1
        counters.retried += 1
        if fate == KEEP:
            queue.attempts += 1
            queue.not_before = not_before
        else:
            self._drop_head(queue, fate, queue.attempts + 1, reason, now)
        self._end_lease(queue, EXPIRED, effects)

    def _close_gate(self, scope: bytes, until: int, now: int, effects: Effects) -> None:
        """Parks a scope. Leases that were out when it closed may report the same trouble: only the first of them
        counts as a step of the doubling."""
        known, step = self.gates.get(scope, (0, 0))
        if known > now:
            self._gate(scope, max(known, until), step, effects)
        else:
            self._gate(scope, until, step + 1, effects)

    def _gate(self, scope: bytes, until: int, step: int, effects: Effects) -> None:
        if until:
            self.gates[scope] = (until, step)
        else:
            self.gates.pop(scope, None)
        self._dirty_gates.add(scope)
        effects.gates.append((scope, until, step))


__all__ = ["ACK", "DOWN", "EXTEND", "REJECT", "RELEASE", "RETRY", "SEQUENCE_SHIFT", "THROTTLED", "Checkpoint", "Effects",
           "SettleStatus", "Shard", "View", "destination_of", "tenant_scope_of"]
