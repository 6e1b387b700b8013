"""A shard's state in memory over its rows in the store: what is loaded, what changed since the last checkpoint, the
checkpoint itself, and reads for whoever asks. What entries do to it is in `shard`.

State is the store's rows as of the last checkpoint plus what changed since, in memory. The log replays what a
crash takes from memory, so a message that is enqueued and acknowledged between two checkpoints costs the store
nothing (the log is our write-ahead log, this is our memtable). `checkpoint` gives the rows to commit, atomically
with the applied index.
"""
from __future__ import annotations

import heapq
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from spillway.broker.core import rows
from spillway.broker.core.bounds import NUMBER_MAX, QUEUE_BYTES_MAX, check_queue, check_scope, decoded
from spillway.broker.core.errors import CorruptEntry
from spillway.broker.core.queue import Counters, Message, Queue, Tenant

CACHE_BYTES_MAX = 1 << 20  # message bytes a shard keeps in memory across a checkpoint
SURPLUS_BYTES_MAX = 64 << 10  # of a leased queue behind its lease, likewise; and 64 messages
DEDUPS_FORGOTTEN_MAX = 4096  # by one checkpoint, and two for each new one
ALL = (1 << 64) - 1  # Queue.persisted: every message has a row; the next enqueue lowers it


class View(Protocol):
    """Reads of the shard's committed rows."""

    def get(self, key: bytes) -> bytes | None:
        """The row's value or None."""

    def scan(self, start: bytes, end: bytes, limit: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Rows of [start, end) in key order, at most `limit`."""


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


class ShardState:
    """The state of one shard. `view` gives the rows of the last checkpoint."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.reload()

    def reload(self) -> None:
        """(Re)builds memory from the view: counters, producers, gates, live leases. Queues load when touched. Raises
        CorruptEntry, as does everything else here that reads rows."""
        view = self.view
        self.now_ms = 0
        self._index = 0  # of the entry that is or was applied last, since the start
        self.queues: dict[bytes, Queue] = {}
        self.leases: dict[int, Queue] = {}
        self.counters: dict[bytes, Counters] = {}
        self.producers: OrderedDict[str, tuple[int, int]] = OrderedDict()
        # Copiers of other shards' outboxes: (epoch, number of its last copy, highest number of all); as many as there are shards
        self.copiers: dict[str, tuple[int, int, int]] = {}
        self.gates: dict[bytes, tuple[int, int]] = {}
        self.tenants: dict[bytes, Tenant] = {}  # of the queues in memory, and those that changed
        # token -> (messages of the run that were acked, first sequence that was not); insertion order, volatile
        self.settled: dict[int, tuple[int, int]] = {}
        self.unsaved_bytes = 0  # of message bodies without a row
        self._stored_queues = 0
        self._dirty: dict[bytes, Queue] = {}
        self._dirty_producers: dict[str, None] = {}
        self._dirty_copiers: set[str] = set()
        self._dirty_gates: set[bytes] = set()
        self._dirty_counters: list[Counters] = []
        self._deletes: list[bytes] = []
        self._ranges: list[tuple[bytes, bytes]] = []
        self._dead_puts: dict[bytes, bytes] = {}
        self._dead_gone: set[bytes] = set()  # rows of dead letters that the next checkpoint deletes
        self._gone: set[bytes] = set()  # vanished queues whose rows the next checkpoint deletes
        self._dirty_tenants: list[Tenant] = []
        self._revived: dict[bytes, set[int]] = {}  # queue -> sequences of dead letters that are back and have no row yet
        self._dedups: dict[bytes, tuple[int, int]] = {}  # digest -> (sequence, until ms), not yet in the store
        clock = view.get(rows.CLOCK)
        if clock is not None:
            self.now_ms = rows.decode_row(rows.ClockRow, clock).now_ms
        for key, value in view.scan(rows.STATS, prefix_end(rows.STATS)):
            row = rows.decode_row(rows.StatsRow, value)
            decoded("a destination", key[1:])
            c = self.counters[key[1:]] = Counters(key[1:])
            c.queues, c.messages, c.dead, c.enqueued = row.queues, row.messages, row.dead, row.enqueued
            c.acked, c.dead_lettered, c.retried, c.expired = row.acked, row.dead_lettered, row.retried, row.expired
            c.ttl_expired, c.purged, c.redriven = row.ttl_expired, row.purged, row.redriven
            c.discarded, c.deduplicated, c.overflowed = row.discarded, row.deduplicated, row.overflowed
            self._stored_queues += c.queues
            if row.size is None:
                self._measure(c)
            else:
                c.size = row.size
        producers = [(rows.decode_row(rows.ProducerRow, v), k) for k, v in view.scan(rows.PRODUCER, prefix_end(rows.PRODUCER))]
        for producer, key in sorted(producers, key=lambda found: found[0].used):
            self.producers[decoded("a producer", key[1:])] = (producer.last, producer.used)
        for key, value in view.scan(rows.COPIER, prefix_end(rows.COPIER)):
            copier = rows.decode_row(rows.CopierRow, value)
            self.copiers[decoded("a copier", key[1:])] = (copier.epoch, copier.chain, copier.last)
        for key, value in view.scan(rows.GATE, prefix_end(rows.GATE)):
            gate = rows.decode_row(rows.GateRow, value)
            check_scope(key[1:])
            self.gates[key[1:]] = (gate.until, gate.step)
        for key, leased in view.scan(rows.LEASE, prefix_end(rows.LEASE)):
            found = view.get(rows.QUEUE + leased)
            queue = None if found is None else self._load(leased, found)
            if queue is None or key != rows.lease_key(queue.token):
                raise CorruptEntry(f"a lease row names {leased!r}, which does not have this lease")
            self.leases[queue.token] = queue
            queue.counters.leases += 1
            queue.counters.leased += queue.lease_size - queue.lease_acked

    def _measure(self, counters: Counters) -> None:
        """Finds out the size of a destination and what its tenants have: earlier versions did not write it down."""
        prefix = rows.MESSAGE + counters.name + b"\0"
        for key, value in self.view.scan(prefix, prefix_end(prefix)):
            end = key.find(b"\0", len(prefix))
            if end < 0:
                raise CorruptEntry(f"message row {key!r} is of no tenant")
            scope = key[1:end]
            tenant = self.tenants.get(scope)
            if tenant is None:
                tenant = self.tenants[scope] = Tenant(scope)
                tenant.dirty = True
                self._dirty_tenants.append(tenant)
            size = len(rows.decode_message(key, value)[3])
            tenant.messages += 1
            tenant.size += size
            counters.size += size
        if not counters.dirty:
            counters.dirty = True
            self._dirty_counters.append(counters)

    # -- reads ---------------------------------------------------------------------------------------------------

    def open(self, name: bytes) -> Queue | None:
        """The queue, loaded if need be; None if it is empty."""
        queue = self.queues.get(name)
        if queue is None and self._stored_queues and name not in self._gone:
            value = self.view.get(b"q" + name)
            if value is not None:
                queue = self._load(name, value)
                if queue.token:  # those that are leased are in memory
                    raise CorruptEntry(f"{queue!r} has no lease row")
        return queue

    def _load(self, name: bytes, value: bytes) -> Queue:
        row = rows.decode_queue(value)
        if row.token and not (0 < row.token <= NUMBER_MAX and 0 <= row.lease_acked < row.lease_size <= row.lease_acked + row.count):
            raise CorruptEntry(f"the lease {row.token} of {name!r} is of {row.lease_size} messages, of which {row.lease_acked} are "
                               f"acknowledged, and {row.count} are left")
        queue = self.queues[name] = self._queue(name)
        queue.cold = row.count
        queue.floor = row.floor
        queue.size = sum(len(m[3]) for m in self.messages(queue)) if row.size is None else row.size
        queue.persisted = ALL
        queue.attempts = row.attempts
        queue.not_before = row.not_before
        queue.token = queue.lease_row = row.token
        queue.lease_size = row.lease_size
        queue.lease_acked = row.lease_acked
        queue.deadline = row.deadline
        queue.consumer = row.consumer
        queue.gap = row.gap
        queue.gap_since = row.gap_since
        queue.stored = True
        return queue

    def _queue(self, name: bytes) -> Queue:
        """A queue without messages, as yet. Raises CorruptEntry."""
        try:
            destination, _, key = name.split(b"\0")
        except ValueError:
            check_queue(name)
            raise
        if len(name) > QUEUE_BYTES_MAX or not name.isascii():
            check_queue(name)
        scope = name[:-1 - len(key)]
        tenant = self.tenants.get(scope)
        if tenant is None:
            tenant = self._tenant(scope)
        return Queue(name, self._counters(destination), tenant)

    def _tenant(self, scope: bytes) -> Tenant:
        tenant = self.tenants[scope] = Tenant(scope)
        if self._stored_queues:
            value = self.view.get(rows.TENANT + scope)
            if value is not None:
                row = rows.decode_row(rows.TenantRow, value)
                tenant.messages, tenant.size, tenant.stored = row.messages, row.size, True
        return tenant

    def _weigh(self, queue: Queue, messages: int, size: int) -> None:
        """So many messages and bytes came to a queue or, negative, left it."""
        queue.size += size
        counters, tenant = queue.counters, queue.tenant
        counters.messages += messages
        counters.size += size
        tenant.messages += messages
        tenant.size += size
        if not tenant.dirty:
            tenant.dirty = True
            self._dirty_tenants.append(tenant)
        if not counters.dirty:
            counters.dirty = True
            self._dirty_counters.append(counters)

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
            if found < want and size <= size_max:
                raise CorruptEntry(f"{queue!r} lacks rows: {found} of {want}")
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
        for key, value in self.view.scan(rows.QUEUE, prefix_end(rows.QUEUE)):
            name = key[1:]
            if name in told or name in self._gone:
                continue
            queue = self.queues.get(name)  # loaded meanwhile: an enqueue to a waiting queue reports nothing
            if queue is None:
                row = rows.decode_queue(value)
                check_queue(name)
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
        for key, value in self.view.scan(rows.QUEUE + prefix, prefix_end(rows.QUEUE + prefix)):
            name = key[1:]
            if name not in self.queues and name not in self._gone:
                row = rows.decode_queue(value)
                head = row.head_ms or self._stored_head_ms(name, row.floor)
                if best is None or head < best[1]:
                    best = (name, head)
        return best

    def _head_ms(self, queue: Queue) -> int:
        return queue.front[0][1] if queue.front else self._stored_head_ms(queue.key, queue.floor)

    def _stored_head_ms(self, name: bytes, floor: int) -> int:
        for key, value in self.view.scan(rows.message_key(name, floor), rows.message_end(name), 1):
            return rows.decode_message(key, value)[1]
        raise CorruptEntry(f"queue {name!r} has no message row from {floor} on")

    def tenant(self, scope: bytes) -> tuple[int, int]:
        """(messages, bytes) that wait or are leased of `destination NUL tenant`."""
        tenant = self.tenants.get(scope)
        if tenant is None:
            if not self._stored_queues or (value := self.view.get(rows.TENANT + scope)) is None:
                return 0, 0
            row = rows.decode_row(rows.TenantRow, value)
            return row.messages, row.size
        return tenant.messages, tenant.size

    def top_tenants(self, destination: bytes, limit: int) -> list[tuple[int, int, bytes]]:
        """(messages, bytes, scope) of the destination's tenants with the most messages. Looks at every tenant."""
        prefix = destination + b"\0"
        found = {}
        for key, value in self.view.scan(rows.TENANT + prefix, prefix_end(rows.TENANT + prefix)):
            row = rows.decode_row(rows.TenantRow, value)
            found[key[1:]] = (row.messages, row.size, key[1:])
        for scope, tenant in self.tenants.items():
            if scope.startswith(prefix):
                found[scope] = (tenant.messages, tenant.size, scope)
        best = heapq.nlargest(limit, (f for f in found.values() if f[0]))
        for _, _, scope in best:
            check_scope(scope)
        return best

    def queue_names(self, prefix: bytes, start: bytes, limit: int) -> list[bytes]:
        """Up to `limit` names of queues that begin with `prefix`, from `start` on, sorted."""
        begin = max(prefix, start)
        end = prefix_end(prefix)
        stored = (k[1:] for k, _ in self.view.scan(rows.QUEUE + begin, rows.QUEUE + end))
        names = set(islice((name for name in stored if name not in self._gone), limit))
        names.update(name for name in self.queues if begin <= name < end)
        return sorted(names)[:limit]

    def head_ms(self, name: bytes) -> int:
        """Enqueue time of a queue's first message in ms; 0 if it is empty."""
        queue = self.queues.get(name)
        if queue is not None:
            return self._head_ms(queue)
        value = None if name in self._gone else self.view.get(rows.QUEUE + name)
        if value is None:
            return 0
        row = rows.decode_queue(value)
        return row.head_ms or self._stored_head_ms(name, row.floor)

    def waiting_head_ms(self, name: bytes, now: int) -> int:
        """Enqueue time of a queue's first message in ms if it may be leased now; 0 if the queue is empty or leased, or that has to
        wait. Loads nothing into memory."""
        queue = self.queues.get(name)
        if queue is None:
            value = None if name in self._gone else self.view.get(rows.QUEUE + name)
            if value is None:
                return 0
            row = rows.decode_queue(value)
            if row.token or row.not_before > now:
                return 0
            floor = row.floor
        elif queue.token or queue.not_before > now:
            return 0
        elif queue.front:
            return queue.front[0][1] if queue.front[0][2] <= now else 0
        else:
            floor = queue.floor
        for key, value in self.view.scan(rows.message_key(name, floor), rows.message_end(name), 1):
            _, enqueue_ms, deliver_ms, _, _ = rows.decode_message(key, value)
            return enqueue_ms if deliver_ms <= now else 0
        raise CorruptEntry(f"queue {name!r} has no message row from {floor} on")

    def holds_since(self, name: bytes, head_ms: int) -> bool:
        """Whether the queue's head still is from that time."""
        queue = self.open(name)
        return queue is not None and self._head_ms(queue) == head_ms

    # -- checkpoint ----------------------------------------------------------------------------------------------

    @property
    def unsaved(self) -> int:
        """How many queues differ from their rows."""
        return len(self._dirty) + len(self._dedups)

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
            revived = self._revived.get(name, ()) if self._revived else ()
            for message in (*queue.front, *queue.tail):
                if message[0] > persisted or message[0] in revived:
                    puts.append((rows.message_key(name, message[0]), rows.encode_message(message)))
            queue.persisted = ALL
            if queue.token != queue.lease_row:
                if queue.lease_row:
                    deletes.append(rows.lease_key(queue.lease_row))
                if queue.token:
                    puts.append((rows.lease_key(queue.token), name))
                queue.lease_row = queue.token
            puts.append((rows.QUEUE + name, rows.encode_row(rows.QueueRow(
                rows.VERSION, queue.count, queue.floor, queue.attempts, queue.not_before,
                queue.front[0][1] if queue.front else 0, queue.token, queue.lease_size, queue.lease_acked, queue.deadline,
                queue.consumer, queue.gap, queue.size, queue.gap_since))))
            if not queue.stored:
                queue.stored = True
                self._stored_queues += 1
            queue.dirty = False
        puts += self._dead_puts.items()
        deletes += sorted(self._dead_gone)
        for producer in self._dirty_producers:
            known = self.producers.get(producer)
            if known is None:
                deletes.append(rows.PRODUCER + producer.encode())
            else:
                puts.append((rows.PRODUCER + producer.encode(), rows.encode_row(rows.ProducerRow(rows.VERSION, *known))))
        for copier in sorted(self._dirty_copiers):
            puts.append((rows.COPIER + copier.encode(), rows.encode_row(rows.CopierRow(rows.VERSION, *self.copiers[copier]))))
        for scope in sorted(self._dirty_gates):
            gate = self.gates.get(scope)
            if gate is None:
                deletes.append(rows.GATE + scope)
            else:
                puts.append((rows.GATE + scope, rows.encode_row(rows.GateRow(rows.VERSION, *gate))))
        for c in self._dirty_counters:
            c.dirty = False
            puts.append((rows.STATS + c.name, rows.encode_row(rows.StatsRow(
                rows.VERSION, c.queues, c.messages, c.dead, c.enqueued, c.acked, c.dead_lettered, c.retried, c.expired,
                c.size, c.ttl_expired, c.purged, c.redriven, c.discarded, c.deduplicated, c.overflowed))))
        for tenant in self._dirty_tenants:
            tenant.dirty = False
            if tenant.messages:
                tenant.stored = True
                puts.append((rows.TENANT + tenant.scope, rows.encode_row(
                    rows.TenantRow(rows.VERSION, tenant.messages, tenant.size))))
            elif tenant.stored:
                tenant.stored = False
                deletes.append(rows.TENANT + tenant.scope)
        self._checkpoint_dedups(out)
        puts.append((rows.CLOCK, rows.encode_row(rows.ClockRow(rows.VERSION, self.now_ms))))
        self._deletes = []
        self._ranges = []
        self._gone = set()
        self._dead_puts = {}
        self._dead_gone = set()
        self._revived = {}
        self._dirty_producers.clear()
        self._dirty_copiers.clear()
        self._dirty_gates.clear()
        self._dirty_counters = []
        self._dirty_tenants = []
        self.unsaved_bytes = 0
        self._evict()
        self._dirty = {}
        return out

    def _checkpoint_dedups(self, out: Checkpoint) -> None:
        """Stores new dedup ids and forgets some whose time has passed. Which are still in the store is nobody's business:
        what counts is until when an id is remembered, and that is the same on every replica."""
        limit = DEDUPS_FORGOTTEN_MAX + 2 * len(self._dedups)  # forgets faster than new ones come, however many these are
        for key, _ in self.view.scan(rows.DEDUP_DUE, rows.dedup_due(self.now_ms), limit):
            out.deletes.append(key)
            row = rows.DEDUP + key[5:]
            value = self.view.get(row)
            if value is not None and rows.decode_dedup(value)[1] <= self.now_ms:
                out.deletes.append(row)
        for digest, (sequence, until) in self._dedups.items():
            if until <= self.now_ms:
                continue  # so is what the store may say about it
            out.puts.append((rows.DEDUP + digest, rows.dedup_row(sequence, until)))
            out.puts.append((rows.dedup_due(until, digest), b""))
        self._dedups = {}

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
        self.tenants = {queue.tenant.scope: queue.tenant for queue in self.queues.values()}
        if len(self.queues) < 1024:
            self.queues = dict(self.queues)  # a dict never shrinks by itself

    # -- proof ---------------------------------------------------------------------------------------------------

    def digest(self) -> int:
        """A checksum of the logical state, equal on replicas at the same applied index whatever they hold in
        memory. Scans everything: for tests and audits."""
        total = 0
        names = {k[1:] for k, _ in self.view.scan(rows.QUEUE, prefix_end(rows.QUEUE))} | set(self.queues)
        for name in sorted(names):
            queue = self.queues.get(name)
            if queue is None:
                if name in self._gone:
                    continue
                queue = self.open(name)
            if queue is None:
                raise CorruptEntry(f"the counters of a destination know nothing of {name!r}")
            messages = [(*m[:3], m[4], zlib.crc32(m[3])) for m in self.messages(queue)]
            total = zlib.crc32(repr((name, messages, queue.size, queue.attempts, queue.not_before, queue.token, queue.lease_size,
                                     queue.lease_acked, queue.deadline, queue.gap, queue.gap_since)).encode(), total)
        for c in sorted(self.counters.values(), key=lambda c: c.name):
            total = zlib.crc32(repr((c.name, c.queues, c.messages, c.leased, c.dead, c.enqueued, c.acked, c.dead_lettered,
                                     c.retried, c.expired, c.size, c.ttl_expired, c.purged, c.redriven, c.discarded,
                                     c.deduplicated, c.overflowed)).encode(), total)
            for messages_, size, scope in sorted(self.top_tenants(c.name, 1 << 30)):
                total = zlib.crc32(repr((messages_, size, scope)).encode(), total)
        ids = {k[1:]: rows.decode_dedup(v) for k, v in self.view.scan(rows.DEDUP, prefix_end(rows.DEDUP))} | self._dedups
        total = zlib.crc32(repr(sorted((k, v) for k, v in ids.items() if v[1] > self.now_ms)).encode(), total)
        return zlib.crc32(repr((sorted(self.producers.items()), sorted(self.copiers.items()), sorted(self.gates.items()),
                            self.now_ms)).encode(), total)

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
        end = prefix_end(prefix)
        found = dict(islice(((k, v) for k, v in self.view.scan(start, end) if k not in self._dead_gone), limit))
        found.update((k, v) for k, v in self._dead_puts.items() if start <= k < end)
        return [(k, rows.decode_dead(found[k])) for k in sorted(found)[:limit]]

    def dead_letter(self, key: bytes) -> rows.DeadRow | None:
        """A dead letter by its row's key; None if it is not there (any more)."""
        value = self._dead_puts.get(key)
        if value is None and key not in self._dead_gone:
            value = self.view.get(key)
        return None if value is None else rows.decode_dead(value)


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all that start with `prefix` (whose last byte is below 0xFF)."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))

