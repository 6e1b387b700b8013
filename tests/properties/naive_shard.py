"""A naive shard, to compare the real one with: whole lists, nothing cold, nothing evicted, nothing saved.

A queue is the list of all that was ever stored in it, and the list of what is left.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from spillway.broker.core.entry import (
    ACK,
    DEAD,
    DISCARD,
    DONE,
    DOWN,
    EXPIRED,
    EXTEND,
    GONE,
    REJECT,
    RELEASE,
    RETRY,
    THROTTLED,
    Enqueue,
    Entry,
)

OK, ALREADY, STALE, NOT_FIRST = 1, 2, 3, 4

Message = tuple[int, int, int, bytes, int]  # sequence, enqueue ms, not before ms, body, not after ms


@dataclass
class NaiveLease:
    """A live lease; `acked` of its `run` are finished."""

    queue: bytes
    token: int
    run: list[int]  # sequences
    deadline: int
    consumer: str
    acked: int = 0


@dataclass
class NaiveQueue:
    """See the module."""

    produced: list[Message] = field(default_factory=list)
    left: list[Message] = field(default_factory=list)  # what is not finished, by sequence
    attempts: int = 0
    not_before: int = 0
    missing: set[int] = field(default_factory=set)  # dropped since a message behind all of them was finished
    between: tuple[int, int] = (0, 0)  # all that is missing is between these, both included
    lease: NaiveLease | None = None

    def due(self) -> int:
        """When the head may be delivered."""
        return max(self.not_before, self.left[0][2])

    def gap(self) -> tuple[int, int, int] | None:
        """What the next consumer is told."""
        return (len(self.missing), *self.between) if self.missing else None

    def drop(self) -> Message:
        """The head goes, and is missing."""
        head = self.left.pop(0)
        self.between = (min(self.between[0], head[0]), max(self.between[1], head[0])) if self.missing else (head[0], head[0])
        self.missing.add(head[0])
        self.attempts = self.not_before = 0
        return head


@dataclass
class Outcome:
    """What an entry did."""

    enqueued: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    granted: list[NaiveQueue | None] = field(default_factory=list)
    released: list[tuple[int, bytes, int]] = field(default_factory=list)
    gates: list[tuple[bytes, int, int]] = field(default_factory=list)
    duplicates: dict[int, int] = field(default_factory=dict)
    trimmed: list[bool] = field(default_factory=list)
    purged: list[int] = field(default_factory=list)
    redriven: list[bool] = field(default_factory=list)


class NaiveShard:
    """See the module."""

    def __init__(self, producers_max: int = 1 << 30) -> None:
        self.now = 0
        self.queues: dict[bytes, NaiveQueue] = {}
        self.leases: dict[int, NaiveLease] = {}  # all there ever were, by token
        self.copies: dict[str, list[tuple[int, int]]] = {}  # copier -> (epoch, number) of all that came, as they came
        self.producers: dict[str, int] = {}  # last used last
        self.producers_max = producers_max
        self.gates: dict[bytes, tuple[int, int]] = {}
        self.remembered: dict[int, tuple[int, int]] = {}  # token -> finished messages, index at which it was settled
        # row -> queue, message, attempts, reason, ms, index of the entry
        self.dead: dict[bytes, tuple[bytes, Message, int, str, int, int]] = {}
        self.index = 0
        self.ids: dict[bytes, tuple[int, int]] = {}  # dedup digest -> sequence, until
        self.excused: set[int] = set()  # sequences that were dead once: redriven, they come later than they were produced
        self.totals: Counter[tuple[bytes, str]] = Counter()  # (destination, counter)

    def nonempty(self) -> list[bytes]:
        """Names of queues with messages."""
        return [name for name, queue in self.queues.items() if queue.left]

    def live(self) -> list[NaiveLease]:
        """Leases that run."""
        return [queue.lease for queue in self.queues.values() if queue.lease]

    def apply(self, index: int, entry: Entry) -> Outcome:
        """What the real shard must do."""
        out = Outcome()
        self.now = max(self.now, entry.now_ms)
        self.index = index
        sequence = index << 20
        for batch in entry.enqueues:
            self._enqueue(batch, sequence, out)
            sequence += len(batch.queues)
        for token, position, _, outcome, argument, reason in entry.settles:
            out.settled.append(self._settle(index, token, position, outcome, argument, reason, out))
        for token, fate, not_before, reason in entry.expires:
            lease = self._lease(token)
            if lease and lease.deadline <= self.now:
                queue = self.queues[lease.queue]
                self._count(lease.queue, "expired")
                self._count(lease.queue, "retried")
                if fate:
                    self._bury_leased(lease, fate, reason)
                else:
                    queue.attempts += 1
                    queue.not_before = not_before
                self._end(lease, EXPIRED, out)
        for scope, until, step in entry.gates:
            self._gate(scope, until, step, out)
        for name, count, last, fate, reason in entry.trims:
            out.trimmed.append(self._trim(name, count, last, fate, reason))
        for name in entry.purges:
            out.purged.append(self._purge(name, out))
        back: dict[bytes, set[int]] = {}
        out.redriven += [self._redrive(key, back) for key in entry.redrives]
        for name, found in back.items():
            self._narrow(self.queues[name], found)
        for key in entry.dead_purges:
            if self.dead.pop(key, None) is not None:
                self._count(key[1:], "purged letters")
        for name, copies in entry.overflows:
            self._count(name, "overflowed", copies)
        for number, (name, messages, deadline, consumer) in enumerate(entry.grants):
            out.granted.append(self._grant(name, messages, deadline, entry.consumers[consumer], (index << 20) + number + 1))
        return out

    def _count(self, name: bytes, counter: str, by: int = 1) -> None:
        self.totals[name.split(b"\0")[0], counter] += by

    def _lease(self, token: int) -> NaiveLease | None:
        lease = self.leases.get(token)
        return lease if lease and self.queues[lease.queue].lease is lease else None

    def _enqueue(self, batch: Enqueue, sequence: int, out: Outcome) -> None:
        producer, first = batch.producer, batch.first
        records = list(zip(batch.queues, batch.bodies, strict=True))
        skip = 0
        if batch.copies is not None:
            came = self.copies.setdefault(producer, [])  # every copy in the order in which it came, with its epoch
            epoch = max([life for life, _ in came], default=0)
            if batch.epoch < epoch or first > max([number for life, number in came if life == batch.epoch], default=0):
                out.enqueued.append(-1)
                return
            skip = sum(copy <= max([number for _, number in came], default=0) for copy in batch.copies)
            came += [(batch.epoch, copy) for copy in batch.copies]
        elif producer:
            last = self.producers.get(producer, 0)
            if first > last + 1:
                out.enqueued.append(-1)
                return
            skip = min(len(records), last + 1 - first)
            newest = max(last, first + len(records) - 1)
            self.producers.pop(producer, None)
            self.producers[producer] = newest
            if len(self.producers) > self.producers_max:
                del self.producers[next(iter(self.producers))]
        out.enqueued.append(skip)
        for position, (name, body) in enumerate(records):
            if position < skip:
                continue
            deliver, expire, digest, until = (batch.options or {}).get(position, (0, 0, b"", 0))
            if digest:
                known = self.ids.get(digest)
                if known and known[1] > self.now:
                    out.duplicates[sequence + position] = known[0]
                    self._count(name, "deduplicated")
                    continue
                self.ids[digest] = (sequence + position, until)
            if name.endswith(b"\1"):
                name += b"%x" % (sequence + position)
            queue = self.queues.setdefault(name, NaiveQueue())
            message = (sequence + position, self.now, deliver, body, expire)
            queue.produced.append(message)
            queue.left.append(message)
            self._count(name, "enqueued")

    def _grant(self, name: bytes, messages: int, deadline: int, consumer: str, token: int) -> NaiveQueue | None:
        queue = self.queues.get(name)
        if queue is None or queue.lease or not 1 <= messages <= len(queue.left):
            return None
        queue.lease = self.leases[token] = NaiveLease(name, token, [m[0] for m in queue.left[:messages]], deadline, consumer)
        return queue

    def _settle(self, index: int, token: int, position: int, outcome: int, argument: int, reason: str, out: Outcome) -> int:
        lease = self._lease(token)
        if lease is None:
            known = self.remembered.get(token)
            return ALREADY if known and position <= known[0] and outcome != EXTEND else STALE
        queue = self.queues[lease.queue]
        if outcome == EXTEND and position <= lease.acked:
            lease.deadline = max(lease.deadline, argument)
            return OK
        if outcome == ACK:
            if position > len(lease.run):
                return NOT_FIRST
            if position <= lease.acked:
                return ALREADY
            self._count(lease.queue, "acked", position - lease.acked)
            self._finish(queue, position - lease.acked)
            lease.acked = position
            if position < len(lease.run):
                return OK
        else:
            if position != lease.acked:
                return NOT_FIRST
            destination, tenant, _ = lease.queue.split(b"\0")
            if outcome == RETRY:
                queue.attempts += 1
                queue.not_before = argument
                self._count(lease.queue, "retried")
            elif outcome in (THROTTLED, DOWN):
                scope = destination if outcome == DOWN else destination + b"\0" + tenant
                until, step = self.gates.get(scope, (0, 0))
                if until > self.now:  # it is closed already: the same trouble, told by another lease
                    self._gate(scope, max(until, argument), step, out)
                else:
                    self._gate(scope, argument, step + 1, out)
            elif outcome in (REJECT, DISCARD):
                self._bury_leased(lease, DEAD if outcome == REJECT else GONE, reason)
        self.remembered[token] = (lease.acked, index)
        self._end(lease, outcome, out)
        return OK

    @staticmethod
    def _finish(queue: NaiveQueue, count: int) -> None:
        last = queue.left[count - 1][0]
        del queue.left[:count]
        queue.attempts = queue.not_before = 0
        if last > queue.between[1]:
            queue.missing.clear()

    def _bury_leased(self, lease: NaiveLease, fate: int, reason: str) -> None:
        self._bury(lease.queue, fate, self.queues[lease.queue].attempts + 1, reason)
        lease.acked += 1

    def _bury(self, name: bytes, fate: int, attempts: int, reason: str) -> None:
        head = self.queues[name].drop()
        if fate == DEAD:
            self.dead[b"d" + b"\0".join(name.split(b"\0")[:2]) + b"\0" + head[0].to_bytes(8, "big")] = (
                name, head, attempts, reason, self.now, self.index)
        self._count(name, "dead" if fate == DEAD else "discarded")
        self.excused.add(head[0])

    def _trim(self, name: bytes, count: int, last: int, fate: int, reason: str) -> bool:
        queue = self.queues.get(name)
        if queue is None or queue.lease or count > len(queue.left) or queue.left[count - 1][0] != last:
            return False
        if fate == DONE:
            self.excused.update(m[0] for m in queue.left[:count])
            self._finish(queue, count)
            self._count(name, "acked", count)
            self._tidy(queue)
            return True
        attempts = queue.attempts
        for _ in range(count):
            self._bury(name, fate, attempts, reason)
            self._count(name, "ttl")
            attempts = 0
        self._tidy(queue)
        return True

    def _purge(self, name: bytes, out: Outcome) -> int:
        queue = self.queues.get(name)
        if queue is None or not queue.left:
            return 0
        count = len(queue.left)
        self._count(name, "purged", count)
        queue.left.clear()
        if queue.lease:
            self._end(queue.lease, RELEASE, out)
        self._tidy(queue)
        return count

    def _redrive(self, key: bytes, back: dict[bytes, set[int]]) -> bool:
        found = self.dead.get(key)
        if found is None or self.queues[found[0]].lease:
            return False
        name, message, *_ = self.dead.pop(key)
        queue = self.queues[name]
        queue.left = sorted([(message[0], self.now, 0, message[3], 0), *queue.left])
        if queue.left[0][0] == message[0]:
            queue.attempts = queue.not_before = 0
        if message[0] in queue.missing:
            queue.missing.remove(message[0])
            back.setdefault(name, set()).add(message[0])
        self._count(name, "redriven")
        return True

    @staticmethod
    def _narrow(queue: NaiveQueue, back: set[int]) -> None:
        first, last = queue.between
        while first in back:
            first += 1
        while last in back:
            last -= 1
        queue.between = first, last

    def _end(self, lease: NaiveLease, outcome: int, out: Outcome) -> None:
        queue = self.queues[lease.queue]
        queue.lease = None
        out.released.append((lease.token, lease.queue, outcome))
        self._tidy(queue)

    def _tidy(self, queue: NaiveQueue) -> None:
        if not queue.left:  # an empty queue is nothing: it keeps neither attempts nor a gap
            queue.attempts, queue.not_before = 0, 0
            queue.missing.clear()

    def _gate(self, scope: bytes, until: int, step: int, out: Outcome) -> None:
        self.gates.pop(scope, None)
        if until:
            self.gates[scope] = (until, step)
        out.gates.append((scope, until, step))
