"""The replicated state machine of one shard: queues, messages, leases, dead letters.

Pure: no I/O but reads of the View, no clock, no randomness. Every replica applies the same entries and ends in
the same state. What depends on time, chance or policy was decided by the leader and stands in the entry.

State is the store's rows as of the last checkpoint plus what changed since, in memory. The log replays what a
crash takes from memory, so a message that is enqueued and acknowledged between two checkpoints costs the store
nothing (the log is our write-ahead log, this is our memtable). `checkpoint` gives the rows to commit, atomically
with the applied index.
"""
from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from spillway.broker.core import rows
from spillway.broker.core.entry import ACK, DOWN, EXTEND, REJECT, RELEASE, RETRY, THROTTLED, Entry, Settle
from spillway.broker.core.queue import Counters, Message, Queue

SEQUENCE_SHIFT = 20  # sequence = log index << 20 | position: an entry holds fewer than 2^20 messages
PRODUCERS_MAX = 65_536  # idempotent producers remembered per shard; the longest idle is forgotten first
SETTLED_MAX = 4_096  # recent settled leases remembered, to tell "already settled" from "stale"
CACHE_BYTES_MAX = 1 << 20  # message bytes a shard keeps in memory across a checkpoint
SURPLUS_BYTES_MAX = 64 << 10  # of a leased queue behind its lease, likewise; and 64 messages
_ALL = (1 << 64) - 1  # Queue.persisted: every message has a row; the next enqueue lowers it


class View(Protocol):
    """Reads of the shard's committed rows."""

    def get(self, key: bytes) -> bytes | None:
        """The row's value or None."""

    def scan(self, start: bytes, end: bytes, limit: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Rows of [start, end) in key order, at most `limit`."""


class SettleStatus:
    """Result of one settlement (ints, not an enum: one per message)."""

    OK = 1
    ALREADY = 2
    STALE = 3
    NOT_FIRST = 4  # a nack of a message that is not the lease's first unsettled one


class Effects:
    """What an entry did, for the leader. Released only after the entry is committed (which `apply` implies)."""

    __slots__ = ("base", "delayed", "enqueued", "gates", "granted", "ready", "released", "settled")

    def __init__(self) -> None:
        self.base = 0  # sequence of the entry's first message
        self.enqueued: list[int] = []  # per Enqueue: messages skipped as duplicates, or -1 out of sequence
        self.settled: list[int] = []  # per Settle: SettleStatus
        self.ready: list[bytes] = []  # queues that may be leased now
        self.delayed: list[tuple[int, bytes]] = []  # (ms since 1970, queue): ready then
        self.granted: list[Queue | None] = []  # per Grant: the queue, freshly leased; None if refused
        self.released: list[tuple[int, bytes, int]] = []  # (token, queue, outcome) of leases that ended
        self.gates: list[tuple[bytes, int, int]] = []  # (scope, until, step) that changed


class Checkpoint:
    """Rows that bring the store to the applied index, in one atomic commit: ranges, then deletes, then puts (a
    queue that vanished and came back is in both)."""

    __slots__ = ("deletes", "puts", "ranges")

    def __init__(self) -> None:
        self.puts: list[tuple[bytes, bytes]] = []
        self.deletes: list[bytes] = []
        self.ranges: list[tuple[bytes, bytes]] = []


def destination_of(queue: bytes) -> bytes:
    """The destination of a queue's name."""
    return queue[:queue.index(b"\0")]


def tenant_scope_of(queue: bytes) -> bytes:
    """`destination NUL tenant` of a queue's name."""
    return queue[:queue.index(b"\0", queue.index(b"\0") + 1)]


class Shard:
    """The state of one shard. `view` gives the rows of the last checkpoint."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.reload()

    def reload(self) -> None:
        """(Re)builds memory from the view: counters, producers, gates, live leases. Queues load when touched."""
        view = self.view
        self.now_ms = 0
        self.queues: dict[bytes, Queue] = {}
        self.leases: dict[int, Queue] = {}
        self.counters: dict[bytes, Counters] = {}
        self.producers: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self.gates: dict[bytes, tuple[int, int]] = {}
        # token -> (messages of the run that were acked, first sequence that was not); insertion order, volatile
        self.settled: dict[int, tuple[int, int]] = {}
        self.unsaved_bytes = 0  # of message bodies without a row
        self._stored_queues = 0
        self._dirty: dict[bytes, Queue] = {}
        self._dirty_producers: dict[str, None] = {}
        self._dirty_gates: set[bytes] = set()
        self._dirty_counters: list[Counters] = []
        self._deletes: list[bytes] = []
        self._ranges: list[tuple[bytes, bytes]] = []
        self._dead_puts: dict[bytes, bytes] = {}
        self._gone: set[bytes] = set()  # vanished queues whose rows the next checkpoint deletes
        clock = view.get(rows.CLOCK)
        if clock is not None:
            self.now_ms = rows.decode_row(rows.ClockRow, clock).now_ms
        for key, value in view.scan(rows.STATS, _after(rows.STATS)):
            row = rows.decode_row(rows.StatsRow, value)
            c = self.counters[key[1:]] = Counters(key[1:])
            c.queues, c.messages, c.dead, c.enqueued = row.queues, row.messages, row.dead, row.enqueued
            c.acked, c.dead_lettered, c.retried, c.expired = row.acked, row.dead_lettered, row.retried, row.expired
            self._stored_queues += c.queues
        producers = [(rows.decode_row(rows.ProducerRow, v), k) for k, v in view.scan(rows.PRODUCER, _after(rows.PRODUCER))]
        for producer, key in sorted(producers, key=lambda found: found[0].used):
            self.producers[key[1:].decode()] = (producer.last, producer.used)
        for key, value in view.scan(rows.GATE, _after(rows.GATE)):
            gate = rows.decode_row(rows.GateRow, value)
            self.gates[key[1:]] = (gate.until, gate.step)
        for _, name in view.scan(rows.LEASE, _after(rows.LEASE)):
            queue = self.open(name)
            assert queue is not None and queue.token, f"a lease row names {name!r}, which is not leased"
            self.leases[queue.token] = queue
            queue.counters.leased += queue.lease_size - queue.lease_acked

    # -- reads ---------------------------------------------------------------------------------------------------

    def open(self, name: bytes) -> Queue | None:
        """The queue, loaded if need be; None if it is empty."""
        queue = self.queues.get(name)
        if queue is None and self._stored_queues and name not in self._gone:
            value = self.view.get(b"q" + name)
            if value is not None:
                queue = self._load(name, value)
        return queue

    def _load(self, name: bytes, value: bytes) -> Queue:
        row = rows.decode_row(rows.QueueRow, value)
        queue = self.queues[name] = Queue(name, self._counters(destination_of(name)))
        queue.cold = row.count
        queue.floor = row.floor
        queue.persisted = _ALL
        queue.attempts = row.attempts
        queue.not_before = row.not_before
        queue.token = queue.lease_row = row.token
        queue.lease_size = row.lease_size
        queue.lease_acked = row.lease_acked
        queue.deadline = row.deadline
        queue.consumer = row.consumer
        queue.gap = row.gap
        queue.stored = True
        return queue

    def _counters(self, destination: bytes) -> Counters:
        counters = self.counters.get(destination)
        if counters is None:
            counters = self.counters[destination] = Counters(destination)
        if not counters.dirty:
            counters.dirty = True
            self._dirty_counters.append(counters)
        return counters

    def ensure(self, queue: Queue, messages: int, size_max: int = 1 << 62) -> None:
        """Brings at least `messages` of the queue's head into memory, or all there are, or, if that is less, what passes
        `size_max` bytes: a bounded seek to an exact key, never a scan over what was deleted."""
        front = queue.front
        if queue.cold and len(front) < messages:
            start = rows.message_key(queue.key, front[-1][0] + 1 if front else queue.floor)
            want = min(queue.cold, max(messages - len(front), 16))
            found = size = 0
            for key, value in self.view.scan(start, rows.message_end(queue.key), want):
                front.append(rows.decode_message(key, value))
                found += 1
                size += len(value)
                if size > size_max:
                    break
            assert found == want or size > size_max, f"{queue!r} lacks rows: {found} of {want}"
            queue.cold -= found
        if not queue.cold and queue.tail:
            front += queue.tail
            queue.tail = []

    def ready_queues(self) -> Iterator[tuple[bytes, int]]:
        """(name, not before) of every queue that has messages and no lease: what a new leader schedules. Safe to
        resume between entries: queues that become ready meanwhile are reported by `apply` itself."""
        hot = [(q.key, q.not_before) for q in self.queues.values() if not q.token and not q.granting]
        told = set(self.queues)
        yield from hot
        for key, value in self.view.scan(rows.QUEUE, _after(rows.QUEUE)):
            name = key[1:]
            if name in told or name in self._gone:
                continue
            queue = self.queues.get(name)  # loaded meanwhile: an enqueue to a waiting queue reports nothing
            if queue is None:
                row = rows.decode_row(rows.QueueRow, value)
                if not row.token:
                    yield name, row.not_before
            elif not queue.token and not queue.granting:
                yield name, queue.not_before

    def oldest(self, destination: bytes) -> tuple[bytes, int] | None:
        """(queue, enqueue time in ms) of a destination's oldest message, None if it has none. Looks at every queue of
        the destination, at one row each: not for hot paths."""
        best: tuple[bytes, int] | None = None
        prefix = destination + b"\0"
        for name, queue in self.queues.items():
            if name.startswith(prefix):
                head = self._head_ms(queue)
                if best is None or head < best[1]:
                    best = (name, head)
        for key, value in self.view.scan(rows.QUEUE + prefix, _after(rows.QUEUE + prefix)):
            name = key[1:]
            if name not in self.queues and name not in self._gone:
                row = rows.decode_row(rows.QueueRow, value)
                head = row.head_ms or self._stored_head_ms(name, row.floor)
                if best is None or head < best[1]:
                    best = (name, head)
        return best

    def _head_ms(self, queue: Queue) -> int:
        return queue.front[0][1] if queue.front else self._stored_head_ms(queue.key, queue.floor)

    def _stored_head_ms(self, name: bytes, floor: int) -> int:
        for key, value in self.view.scan(rows.message_key(name, floor), rows.message_end(name), 1):
            return rows.decode_message(key, value)[1]
        raise AssertionError(f"queue {name!r} has no message row from {floor} on")

    def holds_since(self, name: bytes, head_ms: int) -> bool:
        """Whether the queue's head still is from that time."""
        queue = self.open(name)
        return queue is not None and self._head_ms(queue) == head_ms

    # -- writes --------------------------------------------------------------------------------------------------

    def apply(self, index: int, entry: Entry, effects: Effects | None = None) -> None:
        """Applies a committed entry. Never raises on what an entry asks: refusals are results in `effects`."""
        now = self.now_ms = max(self.now_ms, entry.now_ms)
        base = index << SEQUENCE_SHIFT
        if effects is None:
            effects = Effects()
        effects.base = base
        for batch in entry.enqueues:
            base = self._enqueue(batch.producer, batch.first, batch.queues, batch.bodies, batch.delays, base, now, effects)
        for settle in entry.settles:
            effects.settled.append(self._settle(settle, now, effects))
        for token, dead, not_before, reason in entry.expires:
            queue = self.leases.get(token)
            if queue is not None and queue.deadline <= now:
                self._expire(queue, dead, not_before, reason, now, effects)
        for scope, until, step in entry.gates:
            self._gate(scope, until, step, effects)
        token = index << SEQUENCE_SHIFT
        for name, messages, deadline, consumer in entry.grants:
            token += 1
            effects.granted.append(self._grant(name, messages, deadline, entry.consumers[consumer], token))

    def _enqueue(self, producer: str, first: int, names: list[bytes], bodies: list[bytes], delays: dict[int, int] | None,
                 base: int, now: int, effects: Effects) -> int:
        skip = 0
        if producer:
            known = self.producers.get(producer)
            last = known[0] if known else 0
            if first > last + 1:
                effects.enqueued.append(-1)
                return base + len(names)
            skip = min(last + 1 - first, len(names))
            if names:  # an empty batch has no sequence of its own: restarted, it would rank elsewhere
                self._remember_producer(producer, max(last, first + len(names) - 1), base)
        effects.enqueued.append(skip)
        end = base + len(names)
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
            if queue is None and self._stored_queues:
                queue = self.open(name)
            if queue is None:
                queue = queues[name] = Queue(name, self._counters(name[:name.index(b"\0")]))
                queue.counters.queues += 1
                queue.front.append((sequence, now, 0, body))
                queue.dirty = True
                dirty[name] = queue
                ready.append(name)
            else:
                if queue.persisted >= sequence:
                    queue.persisted = sequence - 1
                (queue.tail if queue.cold else queue.front).append((sequence, now, 0, body))
                if not queue.dirty:
                    queue.dirty = True
                    dirty[name] = queue
            counters = queue.counters
            counters.enqueued += 1
            counters.messages += 1
            if not counters.dirty:
                counters.dirty = True
                self._dirty_counters.append(counters)
            unsaved += len(body)
            sequence += 1
        self.unsaved_bytes = unsaved
        if delays:
            for position, until in delays.items():
                if skip <= position < skip + len(names):
                    self._delay(names[position - skip], base + position - skip, until, effects)
        return end

    def _delay(self, name: bytes, sequence: int, until: int, effects: Effects) -> None:
        """Marks a message of this entry as not deliverable before `until`; at the head it holds back its queue."""
        queue = self.queues[name]
        part = queue.tail if queue.cold else queue.front
        for i in range(len(part) - 1, -1, -1):
            if part[i][0] == sequence:
                part[i] = (sequence, part[i][1], until, part[i][3])
                if i == 0 and part is queue.front:
                    self._head_changed(queue, effects)
                return

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
        if queue.token or messages < 1 or messages > queue.count:
            return None
        queue.token = token
        queue.lease_size = messages
        queue.lease_acked = 0
        queue.deadline = deadline
        queue.consumer = consumer
        self.leases[token] = queue
        queue.counters.leased += messages
        self._touch(queue)
        return queue

    def _settle(self, settle: Settle, now: int, effects: Effects) -> int:
        token, position, sequence, outcome, argument, reason = settle
        queue = self.leases.get(token)
        if queue is None:
            done = self.settled.get(token)
            if done is None or position > done[0] or outcome == EXTEND:
                return SettleStatus.STALE
            return SettleStatus.ALREADY
        if position > queue.lease_acked:
            if outcome != ACK or position > queue.lease_size:
                return SettleStatus.NOT_FIRST
            self._ack(queue, position - queue.lease_acked, sequence, effects)
            return SettleStatus.OK
        if outcome == ACK:
            return SettleStatus.ALREADY
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
        elif outcome == REJECT:
            self._dead_letter(queue, queue.attempts + 1, reason, now)
        self._remember_settled(token, queue)
        self._end_lease(queue, outcome, effects)
        return SettleStatus.OK

    def _ack(self, queue: Queue, count: int, sequence: int, effects: Effects) -> None:
        """The first `count` messages are done; the last of them is `sequence`."""
        counters = queue.counters
        counters.acked += count
        counters.messages -= count
        counters.leased -= count
        if not counters.dirty:
            counters.dirty = True
            self._dirty_counters.append(counters)
        queue.lease_acked += count
        self._remove_head(queue, count, sequence)
        queue.attempts = 0
        queue.gap = None
        queue.not_before = 0
        if queue.lease_acked == queue.lease_size:
            self._remember_settled(queue.token, queue)
            self._end_lease(queue, ACK, effects)
        elif not queue.dirty:
            queue.dirty = True
            self._dirty[queue.key] = queue

    def _remove_head(self, queue: Queue, count: int, sequence: int) -> None:
        front = queue.front
        persisted = queue.persisted
        if len(front) >= count:
            if front[0][0] <= persisted:
                self._deletes += [rows.message_key(queue.key, m[0]) for m in front[:count] if m[0] <= persisted]
            for m in front[:count]:
                if m[0] > persisted:
                    self.unsaved_bytes -= len(m[3])
            del front[:count]
        else:
            if count == 1:
                self._deletes.append(rows.message_key(queue.key, sequence))
            else:
                self._ranges.append((rows.message_key(queue.key, 0), rows.message_key(queue.key, sequence + 1)))
            count -= len(front)
            for m in front:
                if m[0] > persisted:
                    self.unsaved_bytes -= len(m[3])
            front.clear()
            from_cold = min(count, queue.cold)
            queue.cold -= from_cold
            count -= from_cold
            if count:
                for m in queue.tail[:count]:
                    if m[0] > persisted:
                        self.unsaved_bytes -= len(m[3])
                del queue.tail[:count]
        queue.floor = sequence + 1
        if not queue.cold and queue.tail:
            front += queue.tail
            queue.tail = []

    def _end_lease(self, queue: Queue, outcome: int, effects: Effects) -> None:
        """The lease is over: what is left of the queue becomes ready, now or later, or the queue vanishes."""
        token = queue.token
        del self.leases[token]
        queue.counters.leased -= queue.lease_size - queue.lease_acked
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

    def _head_changed(self, queue: Queue, effects: Effects) -> None:
        """Reports when the queue may be leased; called whenever it has no lease and its head or time changed. A head
        that is not in memory is taken as due: whoever picks the queue loads it and looks again."""
        if queue.token:
            return
        front = queue.front
        due = max(queue.not_before, front[0][2]) if front else queue.not_before
        if due > self.now_ms:
            effects.delayed.append((due, queue.key))
        else:
            effects.ready.append(queue.key)

    def _vanish(self, queue: Queue) -> None:
        """An empty queue costs nothing: no row, no memory."""
        del self.queues[queue.key]
        self._dirty.pop(queue.key, None)
        counters = queue.counters
        counters.queues -= 1
        if not counters.dirty:
            counters.dirty = True
            self._dirty_counters.append(counters)
        if queue.stored:
            self._gone.add(queue.key)
            self._stored_queues -= 1
        if queue.lease_row:
            self._deletes.append(rows.lease_key(queue.lease_row))

    def _expire(self, queue: Queue, dead: bool, not_before: int, reason: str, now: int, effects: Effects) -> None:
        counters = queue.counters
        counters.expired += 1
        counters.retried += 1
        if dead:
            self._dead_letter(queue, queue.attempts + 1, reason, now)
        else:
            queue.attempts += 1
            queue.not_before = not_before
        self._end_lease(queue, RETRY, effects)

    def _dead_letter(self, queue: Queue, attempts: int, reason: str, now: int) -> None:
        """The head goes to the dead letters; its successor will say that something is missing before it."""
        self.ensure(queue, 1)
        sequence, enqueue_ms, _, body = queue.front[0]
        self._dead_puts[rows.DEAD + tenant_scope_of(queue.key) + b"\0" + sequence.to_bytes(8, "big")] = rows.encode_row(
            rows.DeadRow(rows.VERSION, queue.key, attempts, reason, enqueue_ms, now, body))
        counters = queue.counters
        counters.dead += 1
        counters.dead_lettered += 1
        counters.messages -= 1
        counters.leased -= 1
        queue.lease_acked += 1  # it is out of the lease, as an acknowledged message is
        gap = queue.gap
        queue.gap = (1, sequence, sequence) if gap is None else (gap[0] + 1, gap[1], sequence)
        self._remove_head(queue, 1, sequence)
        queue.attempts = 0
        queue.not_before = 0

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

    def _touch(self, queue: Queue) -> None:
        if not queue.dirty:
            queue.dirty = True
            self._dirty[queue.key] = queue
        counters = queue.counters
        if not counters.dirty:
            counters.dirty = True
            self._dirty_counters.append(counters)

    # -- checkpoint ----------------------------------------------------------------------------------------------

    @property
    def unsaved(self) -> int:
        """How many queues differ from their rows."""
        return len(self._dirty)

    def checkpoint(self) -> Checkpoint:
        """The rows to commit with the applied index. They are taken as committed when this returns: the caller
        commits them before the next `apply` or read, or stops the process."""
        out = Checkpoint()
        puts, deletes = out.puts, out.deletes
        deletes += self._deletes
        deletes += [rows.QUEUE + name for name in sorted(self._gone)]
        out.ranges += self._ranges
        for name, queue in self._dirty.items():
            persisted = queue.persisted
            for message in (*queue.front, *queue.tail):
                if message[0] > persisted:
                    puts.append((rows.message_key(name, message[0]), rows.encode_message(message)))
            queue.persisted = _ALL
            if queue.token != queue.lease_row:
                if queue.lease_row:
                    deletes.append(rows.lease_key(queue.lease_row))
                if queue.token:
                    puts.append((rows.lease_key(queue.token), name))
                queue.lease_row = queue.token
            puts.append((rows.QUEUE + name, rows.encode_row(rows.QueueRow(
                rows.VERSION, queue.count, queue.floor, queue.attempts, queue.not_before,
                queue.front[0][1] if queue.front else 0, queue.token, queue.lease_size, queue.lease_acked, queue.deadline,
                queue.consumer, queue.gap))))
            if not queue.stored:
                queue.stored = True
                self._stored_queues += 1
            queue.dirty = False
        puts += self._dead_puts.items()
        for producer in self._dirty_producers:
            known = self.producers.get(producer)
            if known is None:
                deletes.append(rows.PRODUCER + producer.encode())
            else:
                puts.append((rows.PRODUCER + producer.encode(), rows.encode_row(rows.ProducerRow(rows.VERSION, *known))))
        for scope in sorted(self._dirty_gates):
            gate = self.gates.get(scope)
            if gate is None:
                deletes.append(rows.GATE + scope)
            else:
                puts.append((rows.GATE + scope, rows.encode_row(rows.GateRow(rows.VERSION, *gate))))
        for c in self._dirty_counters:
            c.dirty = False
            puts.append((rows.STATS + c.name, rows.encode_row(rows.StatsRow(
                rows.VERSION, c.queues, c.messages, c.dead, c.enqueued, c.acked, c.dead_lettered, c.retried, c.expired))))
        puts.append((rows.CLOCK, rows.encode_row(rows.ClockRow(rows.VERSION, self.now_ms))))
        self._deletes = []
        self._ranges = []
        self._gone = set()
        self._dead_puts = {}
        self._dirty_producers.clear()
        self._dirty_gates.clear()
        self._dirty_counters = []
        self.unsaved_bytes = 0
        self._evict()
        self._dirty = {}
        return out

    def _evict(self) -> None:
        """Forgets what the rows now hold: whole queues that are not leased, beyond the cache also the messages behind
        the lease of those that are."""
        kept = 0
        for queue in list(self.queues.values()):
            if queue.granting:
                continue
            if not queue.token:
                kept += sum(len(m[3]) for m in queue.front) + sum(len(m[3]) for m in queue.tail) + 512
                if kept > CACHE_BYTES_MAX:
                    del self.queues[queue.key]
            else:
                held = queue.lease_size - queue.lease_acked
                surplus = len(queue.front) - held
                if surplus > 64 or (surplus > 0 and sum([len(m[3]) for m in queue.front[held:]]) > SURPLUS_BYTES_MAX):
                    del queue.front[held:]
                    queue.cold += surplus + len(queue.tail)
                    queue.tail = []
                elif queue.cold:
                    queue.cold += len(queue.tail)
                    queue.tail = []
        if len(self.queues) < 1024:
            self.queues = dict(self.queues)  # a dict never shrinks by itself

    # -- proof ---------------------------------------------------------------------------------------------------

    def digest(self) -> int:
        """A checksum of the logical state, equal on replicas at the same applied index whatever they hold in
        memory. Scans everything: for tests and audits."""
        total = 0
        names = {k[1:] for k, _ in self.view.scan(rows.QUEUE, _after(rows.QUEUE))} | set(self.queues)
        for name in sorted(names):
            queue = self.queues.get(name)
            if queue is None:
                if name in self._gone:
                    continue
                queue = self.open(name)
            assert queue is not None
            messages = [(*m[:3], zlib.crc32(m[3])) for m in self.messages(queue)]
            total = zlib.crc32(repr((name, messages, queue.attempts, queue.not_before, queue.token, queue.lease_size,
                                     queue.lease_acked, queue.deadline, queue.gap)).encode(), total)
        for c in sorted(self.counters.values(), key=lambda c: c.name):
            total = zlib.crc32(repr((c.name, c.queues, c.messages, c.leased, c.dead, c.enqueued, c.acked, c.dead_lettered,
                                     c.retried, c.expired)).encode(), total)
        return zlib.crc32(repr((sorted(self.producers.items()), sorted(self.gates.items()), self.now_ms)).encode(), total)

    def messages(self, queue: Queue) -> list[Message]:
        """All messages of a queue, oldest first. For tests, audits and small queues."""
        found = list(queue.front)
        if queue.cold:
            start = rows.message_key(queue.key, found[-1][0] + 1 if found else queue.floor)
            found += [rows.decode_message(k, v)
                      for k, v in self.view.scan(start, rows.message_end(queue.key), queue.cold)]
        return found + queue.tail

    def dead_letters(self, destination: bytes, tenant: bytes | None, after: bytes,
                     limit: int) -> list[tuple[bytes, rows.DeadRow]]:
        """Up to `limit` dead letters with row keys above `after` (empty: from the start), by tenant and sequence."""
        prefix = rows.dead_prefix(destination, tenant)
        start = max(prefix, after + b"\0") if after else prefix
        end = _after(prefix)
        found = dict(self.view.scan(start, end, limit))
        found.update((k, v) for k, v in self._dead_puts.items() if start <= k < end)
        return [(k, rows.decode_row(rows.DeadRow, found[k])) for k in sorted(found)[:limit]]


def _after(prefix: bytes) -> bytes:
    """The first key after all that start with `prefix` (whose last byte is below 0xFF)."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


__all__ = ["ACK", "DOWN", "EXTEND", "REJECT", "RELEASE", "RETRY", "SEQUENCE_SHIFT", "THROTTLED", "Checkpoint", "Effects",
           "SettleStatus", "Shard", "View", "destination_of", "tenant_scope_of"]
