"""Producers, consumers and endpoints around a scheduler, in simulated time: one unit is a millisecond."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from heapq import heappop, heappush

from spillway.broker.core.policy import Policy
from spillway.broker.core.scheduler import Consumer, Pick, Scheduler

Hold = Callable[[bytes, int], float]  # (queue, messages) -> milliseconds
Fails = Callable[[Pick], "bool | None"]  # asked when a lease begins; as `failed` of `Scheduler.settled`
Make = Callable[[Callable[[bytes], Policy]], Scheduler]
_PLAIN = Policy()
SWEEP_MS = 1000  # as a node does


def split(queue: bytes) -> tuple[bytes, bytes]:
    """(destination, tenant) of a queue."""
    destination, tenant, _ = queue.split(b"\0")
    return destination, tenant


class Simulation:
    """A lease takes `run_messages` of credit, delivers up to as many messages, and ends when `hold` says; then its messages
    are acknowledged, or, if `fails` said so at its beginning, its queue waits for `retry_ms` and is ready again."""

    def __init__(self, hold: Hold, run_messages: int = 4, make: Make = Scheduler) -> None:
        self.policies: dict[bytes, Policy] = {}
        self.scheduler = make(lambda name: self.policies.get(name, _PLAIN))
        self.hold = hold
        self.run_messages = run_messages
        self.fails: Fails = lambda pick: False
        self.ended: Callable[[Pick, bool | None], None] = lambda pick, failed: None  # after a lease
        self.retry_ms = 0.0
        self.now = 0.0
        self.backlog: Counter[bytes] = Counter()
        self.leased: set[bytes] = set()
        self.out: Counter[bytes] = Counter()  # leases, by destination and by destination NUL tenant
        self.peak: Counter[bytes] = Counter()  # most of them
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.waiting: dict[bytes, list[float]] = defaultdict(list)  # arrival times, only of those that ask for it
        self.waits: dict[bytes, list[float]] = defaultdict(list)
        self.latencies: dict[bytes, list[float]] = defaultdict(list)  # of messages, from arrival to the end of their lease
        self.delivered: list[tuple[bytes, int, float]] = []  # queue, messages, hold ms; by beginning
        self.done: list[tuple[float, bytes, int]] = []  # when, queue, messages; acknowledged, by end
        self.swept = 0  # when the scheduler was
        self._events = 0

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Something will happen."""
        self._events += 1
        heappush(self.events, (when, self._events, do))

    def arrive(self, queue: bytes, messages: int) -> None:
        """Messages for a queue."""
        if not self.backlog[queue]:
            self.scheduler.add(queue)
        self.backlog[queue] += messages
        self.waiting[queue].append(self.now)

    def consumer(self, slots: int, *patterns: str) -> Consumer:
        """Credit for so many leases."""
        consumer = Consumer("c")
        self.scheduler.subscribe(consumer, patterns)
        self.scheduler.credit(consumer, slots * self.run_messages, 1 << 40)
        return consumer

    def pick(self) -> None:
        """Hands out leases while there is credit and work; as a node does, which asks no subscription with an empty heap."""
        now = int(self.now)
        self.scheduler.wake_due(now)
        if now - self.swept >= SWEEP_MS:
            self.swept = now
            self.scheduler.sweep(now)
        for subscription in list(self.scheduler.subscriptions.values()):
            while subscription.heap and (pick := self.scheduler.pick(subscription, now)) is not None:
                queue = pick.queue
                assert queue not in self.leased
                assert pick.consumer.messages >= self.run_messages, "credits here are whole leases"
                messages = min(1 if pick.probe else self.run_messages, self.backlog[queue], pick.messages_max)
                self.scheduler.charge(pick, messages, 100 * messages, now)
                if messages != self.run_messages:
                    self.scheduler.credit(pick.consumer, messages - self.run_messages, 0)
                self.leased.add(queue)
                for scope in (split(queue)[0], queue[:queue.rindex(b"\0")]):
                    self.out[scope] += 1
                    if self.out[scope] > self.peak[scope]:
                        self.peak[scope] = self.out[scope]
                failed = self.fails(pick)
                hold = self.hold(queue, messages)
                self.delivered.append((queue, messages, hold))
                arrived = self.waiting.pop(queue, [])
                self.waits[queue] += [self.now - t for t in arrived]
                self.at(self.now + hold, lambda pick=pick, messages=messages, failed=failed, arrived=arrived:
                        self.settle(pick, messages, failed, arrived))

    def settle(self, pick: Pick, messages: int, failed: bool | None, arrived: list[float]) -> None:
        """A lease is over."""
        queue = pick.queue
        self.leased.discard(queue)
        for scope in (split(queue)[0], queue[:queue.rindex(b"\0")]):
            self.out[scope] -= 1
        self.scheduler.settled(pick, int(self.now), failed)
        self.scheduler.credit(pick.consumer, self.run_messages, 100 * messages)
        if failed:
            self.at(self.now + self.retry_ms, lambda: self.scheduler.add(queue))
        else:
            self.backlog[queue] -= messages
            self.done.append((self.now, queue, messages))
            self.latencies[queue] += [self.now - t for t in arrived]
            if self.backlog[queue]:
                self.scheduler.add(queue)
        self.ended(pick, failed)

    def run(self, until: float = float("inf"), deliveries: int = 1 << 60) -> None:
        """Until a time, or so many more messages are delivered."""
        goal = sum(d[1] for d in self.delivered) + deliveries
        done = goal - deliveries
        self.pick()
        while True:
            wake = self.scheduler.next_wake_ms()
            if wake is not None and (not self.events or wake < self.events[0][0]):
                if wake > until:
                    break
                self.now = max(self.now, float(wake))
            elif self.events and self.events[0][0] <= until:
                self.now, _, do = heappop(self.events)
                do()
            else:
                break
            seen = len(self.delivered)
            self.pick()
            done += sum(d[1] for d in self.delivered[seen:])
            if done >= goal:
                return
        self.now = max(self.now, min(until, 1e12))

    def share(self, of: Callable[[bytes], bytes], time: bool = False, since: int = 0) -> dict[bytes, float]:
        """What each got, in messages or in consumer time, as a part of all."""
        total: dict[bytes, float] = defaultdict(float)
        for queue, messages, hold in self.delivered[since:]:
            total[of(queue)] += hold if time else messages
        everything = sum(total.values())
        return {name: got / everything for name, got in total.items()}

    def served(self, of: Callable[[bytes], bytes], begin: float, end: float) -> Counter[bytes]:
        """Messages that were acknowledged in a span of time."""
        found: Counter[bytes] = Counter()
        for when, queue, messages in self.done:
            if begin <= when < end:
                found[of(queue)] += messages
        return found


def tenant_of(queue: bytes) -> bytes:
    """The tenant of a queue."""
    return split(queue)[1]


def destination_of(queue: bytes) -> bytes:
    """The destination of a queue."""
    return split(queue)[0]


def jain(shares: list[float]) -> float:
    """Jain's index: 1 is equal, 1/n is one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares))


def percentile(values: list[float], part: float) -> float:
    """The smallest value that at least this part of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(len(ordered) * part * 1000) // 1000) - 1)]


def ten_ms(_queue: bytes, _messages: int) -> float:
    """Every lease takes a consumer for 10 ms."""
    return 10.0
