"""A naive shard, to compare the real one with: whole lists, nothing cold, nothing evicted, nothing saved.

A queue is the list of all that was ever stored in it and the number of messages, from the first, that are finished.
Because messages finish in order only, this one number says what is delivered next, what never again, and what is left.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from spillway.broker.core.entry import ACK, DOWN, EXTEND, REJECT, RETRY, THROTTLED, Entry

OK, ALREADY, STALE, NOT_FIRST = 1, 2, 3, 4

Message = tuple[int, int, int, bytes]  # sequence, enqueue ms, not before ms, body


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
    done: int = 0
    attempts: int = 0
    not_before: int = 0
    gap: tuple[int, int, int] | None = None
    lease: NaiveLease | None = None

    @property
    def left(self) -> list[Message]:
        """What is not finished."""
        return self.produced[self.done:]

    def due(self) -> int:
        """When the head may be delivered."""
        return max(self.not_before, self.produced[self.done][2])


@dataclass
class Outcome:
    """What an entry did."""

    enqueued: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    granted: list[NaiveQueue | None] = field(default_factory=list)
    released: list[tuple[int, bytes, int]] = field(default_factory=list)
    gates: list[tuple[bytes, int, int]] = field(default_factory=list)


class NaiveShard:
    """See the module."""

    def __init__(self, producers_max: int = 1 << 30) -> None:
        self.now = 0
        self.queues: dict[bytes, NaiveQueue] = {}
        self.leases: dict[int, NaiveLease] = {}  # all there ever were, by token
        self.producers: dict[str, int] = {}  # last used last
        self.producers_max = producers_max
        self.gates: dict[bytes, tuple[int, int]] = {}
        self.remembered: dict[int, tuple[int, int]] = {}  # token -> finished messages, index at which it was settled
        self.dead: list[tuple[bytes, Message, int, str, int]] = []  # queue, message, attempts, reason, ms
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
        sequence = index << 20
        for batch in entry.enqueues:
            self._enqueue(batch.producer, batch.first, list(zip(batch.queues, batch.bodies, strict=True)),
                          batch.delays or {}, sequence, out)
            sequence += len(batch.queues)
        for token, position, _, outcome, argument, reason in entry.settles:
            out.settled.append(self._settle(index, token, position, outcome, argument, reason, out))
        for token, dead, not_before, reason in entry.expires:
            lease = self._lease(token)
            if lease and lease.deadline <= self.now:
                queue = self.queues[lease.queue]
                self._count(lease.queue, "expired")
                self._count(lease.queue, "retried")
                if dead:
                    self._bury(lease, reason)
                else:
                    queue.attempts += 1
                    queue.not_before = not_before
                self._end(lease, RETRY, out)
        for scope, until, step in entry.gates:
            self._gate(scope, until, step, out)
        for number, (name, messages, deadline, consumer) in enumerate(entry.grants):
            out.granted.append(self._grant(name, messages, deadline, entry.consumers[consumer], (index << 20) + number + 1))
        return out

    def _count(self, name: bytes, counter: str, by: int = 1) -> None:
        self.totals[name.split(b"\0")[0], counter] += by

    def _lease(self, token: int) -> NaiveLease | None:
        lease = self.leases.get(token)
        return lease if lease and self.queues[lease.queue].lease is lease else None

    def _enqueue(self, producer: str, first: int, records: list[tuple[bytes, bytes]], delays: dict[int, int],
                 sequence: int, out: Outcome) -> None:
        skip = 0
        if producer:
            last = self.producers.get(producer, 0)
            if first > last + 1:
                out.enqueued.append(-1)
                return
            skip = min(len(records), last + 1 - first)
            self.producers.pop(producer, None)
            self.producers[producer] = max(last, first + len(records) - 1)
            if len(self.producers) > self.producers_max:
                del self.producers[next(iter(self.producers))]
        out.enqueued.append(skip)
        for position, (name, body) in enumerate(records):
            if position >= skip:
                self.queues.setdefault(name, NaiveQueue()).produced.append(
                    (sequence + position, self.now, delays.get(position, 0), body))
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
            queue.done += position - lease.acked
            lease.acked = position
            queue.attempts, queue.not_before, queue.gap = 0, 0, None
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
            elif outcome == REJECT:
                self._bury(lease, reason)
        self.remembered[token] = (lease.acked, index)
        self._end(lease, outcome, out)
        return OK

    def _bury(self, lease: NaiveLease, reason: str) -> None:
        queue = self.queues[lease.queue]
        head = queue.left[0]
        self.dead.append((lease.queue, head, queue.attempts + 1, reason, self.now))
        self._count(lease.queue, "dead")
        count, first, _ = queue.gap or (0, head[0], 0)
        queue.gap = (count + 1, first, head[0])
        queue.attempts, queue.not_before = 0, 0
        queue.done += 1
        lease.acked += 1

    def _end(self, lease: NaiveLease, outcome: int, out: Outcome) -> None:
        queue = self.queues[lease.queue]
        queue.lease = None
        out.released.append((lease.token, lease.queue, outcome))
        if not queue.left:  # an empty queue is nothing: it keeps neither attempts nor a gap
            queue.attempts, queue.not_before, queue.gap = 0, 0, None

    def _gate(self, scope: bytes, until: int, step: int, out: Outcome) -> None:
        self.gates.pop(scope, None)
        if until:
            self.gates[scope] = (until, step)
        out.gates.append((scope, until, step))
