"""A naive model beside a scheduler: what may be picked now, found by looking at everything, and sums that are counted anew."""
from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

from msgspec.structs import replace
from spillway.broker.core.policy import Adaptive, Limit, Policy, TenantPolicy, tenant_limit
from spillway.broker.core.scheduler import CLOSED, HALF_OPEN, OPEN, PROBING, Consumer, Pick, Scheduler, Subscription

from tests.properties.scheduler_world import Make, split

QUEUES = [b"%s\0%s\0%d" % (name, tenant, key) for name in (b"d", b"e", b"de") for tenant in (b"a", b"b", b"c") for key in range(3)]
SCOPES = sorted({q.split(b"\0")[0] for q in QUEUES} | {q[:q.rindex(b"\0")] for q in QUEUES})
PATTERNS = [["*"], ["d"], ["d*"], ["e", "d"]]
SHARES = (1.0, 0.5, 0.25, 0.01)
PATIENCE_MS = 300_000  # by then what a flow with hanging leases leaves to others is nobody's any more


def _tenants(**own: TenantPolicy) -> Policy:
    return replace(Policy(), tenants=own)


POLICIES = [
    Policy(), Policy(), replace(Policy(), weight=9.0), _tenants(a=TenantPolicy(weight=5.5), b=TenantPolicy(weight=0.3)),
    replace(Policy(), limit=Limit(per_second=50, burst=3)), replace(Policy(), limit=Limit(per_second=2, burst=40)),
    replace(Policy(), limit=Limit(per_second=200, burst=40), weight=0.7), replace(Policy(), limit=Limit(leases_max=2)),
    replace(Policy(), limit=Limit(per_second=20, leases_max=5), tenant_limit=Limit(leases_max=1)),
    replace(Policy(), tenant_limit=Limit(per_second=1, burst=30)), replace(Policy(), tenant_limit=Limit(per_second=300, burst=30)),
    _tenants(a=TenantPolicy(limit=Limit(leases_max=3)), b=TenantPolicy(limit=Limit(per_second=0.5), weight=3.0)),
    replace(Policy(), adaptive=Adaptive(pinned=3)), replace(Policy(), adaptive=Adaptive(floor=2)),
    replace(Policy(), adaptive=Adaptive(disabled=True))]


class Tokens:
    """A limit of a scope: never more tokens than the scheduler has, and everything that was taken, to be judged at the end."""

    def __init__(self) -> None:
        self.rate, self.full = Fraction(0), Fraction(0)  # a millisecond's; 0: unlimited
        self.left = Fraction(0)
        self.at = 0
        self.past: list[tuple[int, Fraction, Fraction]] = []  # (since when, rate, full)
        self.taken: list[tuple[int, int]] = []  # (when, messages) since there is a limit

    def follow(self, limit: Limit, share: float, now: int) -> None:
        """Another limit, or part of it."""
        self.pass_to(now)
        was = self.rate
        part = Fraction(share)
        burst = max(Fraction(1), Fraction(limit.burst or max(1.0, limit.per_second)) * part)
        self.rate, self.full = Fraction(limit.per_second) * part / 1000, burst
        if not was:
            self.check()
            self.past, self.taken, self.left = [], [], burst
        self.left = min(self.left, burst)
        self.past.append((now, self.rate, burst))

    def pass_to(self, now: int) -> None:
        """Time goes by."""
        self.left = min(self.full, self.left + (now - self.at) * self.rate)
        self.at = now

    def take(self, messages: int, now: int) -> None:
        """So many were leased."""
        if self.rate:
            self.pass_to(now)
            self.left -= messages
            self.taken.append((now, messages))

    def open(self, now: int) -> bool:
        """Whether a message may be leased for sure."""
        self.pass_to(now)
        return not self.rate or self.left >= 1

    def earned(self, begin: int, end: int) -> Fraction:
        """Tokens that came in a span of time."""
        spans = zip(self.past, [*self.past[1:], (end, Fraction(0), Fraction(0))], strict=True)
        return sum((max(0, min(end, until) - max(begin, since)) * rate for (since, rate, _), (until, _, _) in spans), Fraction(0))

    def check(self) -> None:
        """In no span of time more was taken than a full bucket and what came in."""
        for first, (begin, _) in enumerate(self.taken):
            total = 0
            for end, messages in self.taken[first:]:
                total += messages
                full = max(full for number, (since, _, full) in enumerate(self.past)
                           if since <= end and (number + 1 == len(self.past) or self.past[number + 1][0] >= begin))
                assert total <= full + self.earned(begin, end) + Fraction(1, 10**6), (begin, end, total, full)


class Modelled:
    """Calls of a scheduler, each followed by a look at everything."""

    def __init__(self, make: Make = Scheduler) -> None:
        self.policies = dict.fromkeys((s for s in SCOPES if b"\0" not in s), POLICIES[0])
        self.scheduler = make(self.policies.__getitem__)
        self.shares: dict[bytes, float] = dict.fromkeys(self.policies, 1.0)
        self.tokens = {scope: Tokens() for scope in SCOPES}
        self.ready: Counter[bytes] = Counter()
        self.gates: dict[bytes, int] = {}
        self.probes: dict[bytes, Pick] = {}  # scope -> the probe that is out
        self.begun: list[tuple[bytes, Pick]] = []  # probes that are out, also of gates that changed since
        self.holds: dict[bytes, int] = {}
        self.out: list[Pick] = []
        self.consumers = [Consumer(f"c{number}") for number in range(4)]
        self.now = 1_000_000

    # -- what may be -------------------------------------------------------------------------------------------------

    def limit(self, scope: bytes) -> Limit:
        """Of a destination or a tenant."""
        name, separator, tenant = scope.partition(b"\0")
        return tenant_limit(self.policies[name], tenant.decode()) if separator else self.policies[name].limit

    def slots(self, scope: bytes) -> int:
        """Leases that may be out; the limit that adapts is the scheduler's."""
        name, separator, _ = scope.partition(b"\0")
        maximum = self.limit(scope).leases_max
        slots = max(1, int(maximum * self.shares[name] + 0.5)) if maximum else 1 << 30
        if not separator and name in self.scheduler.destinations:
            destination = self.scheduler.destinations[name]
            adaptive = destination.congestion.slots(destination.share)
            if self.policies[name].adaptive.pinned:
                assert adaptive == max(1, int(self.policies[name].adaptive.pinned * self.shares[name] + 0.5))
            if self.policies[name].adaptive.disabled:
                assert not adaptive
            slots = min(slots, adaptive or 1 << 30)
            assert (self.scheduler.leases_limit(name) or 1 << 30) == slots
        return slots

    def held(self, scope: bytes) -> int:
        """Leases that are out."""
        return sum((p.queue + b"\0").startswith(scope + b"\0") for p in self.out)

    def state(self, scope: bytes) -> int:
        """Of a gate."""
        return PROBING if scope in self.probes else self.gates.get(scope, OPEN)

    def is_shut(self, scope: bytes) -> bool:
        """Whether a gate, a hold or a number of leases stops a scope; of these the model knows everything."""
        hold = self.holds.get(scope, 0)
        return self.state(scope) not in (OPEN, HALF_OPEN) or hold == -1 or hold > self.now or self.held(scope) >= self.slots(scope)

    def allowed(self, subscription: Subscription) -> set[bytes]:
        """Queues that are ready and that nothing stops but what they are kept from for others."""
        probes = sum(p.subscription is subscription and b"\0" not in s for s, p in self.begun)
        enough = probes >= subscription.free and probes * 8 >= subscription.free + subscription.taken
        return {queue for queue in +self.ready if subscription.matches(split(queue)[0]) and not any(
            self.is_shut(scope) or not self.tokens[scope].open(self.now) for scope in scopes_of(queue)) and not (
            enough and self.state(split(queue)[0]) == HALF_OPEN)}

    # -- calls ---------------------------------------------------------------------------------------------------------

    def step(self, kind: int, a: int, b: int) -> None:
        """One call."""
        scheduler = self.scheduler
        self.pass_time((0, 0, 0, 1, 2, 7, 50, 900, 4_000, 31_000)[(a + b) % 10] if kind % 3 == 0 else 0)
        consumer = self.consumers[a % len(self.consumers)]
        scope = SCOPES[a % len(SCOPES)]
        name = scope.partition(b"\0")[0]
        match kind % 20:
            case 0 | 1 | 2 | 3:
                for queue in QUEUES[a % len(QUEUES)::9 if b % 4 else 30]:
                    self.ready[queue] += 1
                    scheduler.add(queue)
            case 4 | 5 | 6 | 7:
                if scheduler.subscriptions:
                    self.pick(list(scheduler.subscriptions.values())[a % len(scheduler.subscriptions)], b)
            case 8 | 9 | 10:
                if self.out:
                    self.settle(a % len(self.out), (False, False, True, None)[b % 4])
            case 11:
                state = (OPEN, OPEN, CLOSED, HALF_OPEN)[b % 4]
                scheduler.set_gate(scope, state)
                self.gates[scope] = state
                self.probes.pop(scope, None)
            case 12:
                if consumer.subscription is None:
                    scheduler.subscribe(consumer, PATTERNS[b % len(PATTERNS)])
                    scheduler.credit(consumer, b % 17, 1 << 40)
                elif b % 3 == 0:
                    scheduler.unsubscribe(consumer)
            case 13 | 14:
                if consumer.subscription is not None:
                    scheduler.credit(consumer, b % 9 if b % 8 else -1, 1 << 30)
            case 15:
                scheduler.sweep(self.now)
            case 16:
                self.policies[name] = POLICIES[b % len(POLICIES)]
                scheduler.policy_changed(name)
                self.follow(name)
            case 17:
                self.holds[scope] = (0, -1, self.now + 1 + b, self.now + 1 + b * 100)[b % 4]
                scheduler.hold(scope, self.holds[scope])
            case 18:
                self.shares[name] = SHARES[b % len(SHARES)]
                scheduler.set_share(name, self.shares[name])
                self.follow(name)
            case 19:
                if b % 6 == 0:
                    scheduler.remove_shard({a % 3}, lambda queue: QUEUES.index(queue) % 3)
                    for queue in QUEUES[a % 3::3]:
                        del self.ready[queue]
        self.check()

    def follow(self, name: bytes) -> None:
        """The limits of a destination and its tenants changed."""
        for scope in SCOPES:
            if scope.partition(b"\0")[0] == name:
                self.tokens[scope].follow(self.limit(scope), self.shares[name], self.now)

    def pass_time(self, ms: int) -> None:
        """Later; timers fire in between."""
        until = self.now + ms
        while (wake := self.scheduler.next_wake_ms()) is not None and wake < until:
            self.now = max(self.now, wake)
            self.scheduler.wake_due(self.now)
        self.now = until
        self.scheduler.wake_due(until)
        wake = self.scheduler.next_wake_ms()
        assert wake is None or wake > until

    def pick(self, subscription: Subscription, b: int) -> bool:
        """One pick; what it may and must be."""
        scheduler = self.scheduler
        able = {c for c in subscription.consumers if c.messages > 0 and c.bytes > 0}
        pick = self.ask(subscription)
        deadline = self.now + PATIENCE_MS
        while pick is None and able and self.allowed(subscription):
            # What is kept for others is not kept for ever, and a timer stands for its end: nobody else will ask.
            wake = scheduler.next_wake_ms()
            assert wake is not None, (self.allowed(subscription), "forgotten")
            assert wake <= deadline, (self.allowed(subscription), "kept waiting")
            self.pass_time(wake - self.now)
            pick = self.ask(subscription)
        if pick is None:
            return False
        queue = pick.queue
        assert pick.consumer in able, "a consumer without credit was picked"
        assert self.ready[queue] > 0, "a queue was picked that was not added"
        assert subscription.matches(split(queue)[0])
        assert not any(self.is_shut(scope) for scope in scopes_of(queue)), "a gate, a hold or a number of leases was passed"
        half_open = [s for s in scopes_of(queue) if self.state(s) == HALF_OPEN]
        assert pick.probe == bool(half_open)
        assert pick.messages_max >= 1
        self.ready[queue] -= 1
        if b % 8 == 7:
            scheduler.discard(pick)
            return True
        messages = 1 if pick.probe else min(1 + b % pick.consumer.messages, pick.messages_max)
        scheduler.charge(pick, messages, 10 * b, self.now)
        self.out.append(pick)
        self.probes.update(dict.fromkeys(half_open, pick))
        self.begun += [(scope, pick) for scope in half_open]
        for scope in scopes_of(queue):
            self.tokens[scope].take(messages, self.now)
        return True

    def ask(self, subscription: Subscription) -> Pick | None:
        """As a node does, which does not ask while a heap is empty: whatever fills it wakes the node."""
        return self.scheduler.pick(subscription, self.now) if subscription.heap else None

    def settle(self, number: int, failed: bool | None) -> None:
        """A lease is over."""
        pick = self.out.pop(number)
        self.scheduler.settled(pick, self.now, failed)
        self.scheduler.credit(pick.consumer, pick.messages if pick.consumer.subscription is pick.subscription else 0, pick.bytes)
        for scope in [s for s, p in self.probes.items() if p is pick]:
            del self.probes[scope]
        self.begun = [(s, p) for s, p in self.begun if p is not pick]

    # -- what must be ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Sums that the scheduler keeps are what they are sums of, and its heaps hold each entry once."""
        scheduler = self.scheduler
        for scope in SCOPES:
            assert scheduler.gate(scope) == self.state(scope), scope
            assert scheduler.waiting(scope).held == self.held(scope)
        known = +self.ready
        assert sum(d.ready for d in scheduler.destinations.values()) == sum(known.values())
        for name, destination in scheduler.destinations.items():
            tenants = list(destination.tenants.values())
            assert destination.ready == sum(len(t.ready) for t in tenants)
            assert abs(destination.weights - sum(t.weight for t in tenants)) < 1e-6
            assert destination.weight == self.policies[name].weight and destination.share == self.shares[name]
            in_heap = Counter(id(t) for _, _, t in destination.heap)
            for tenant in tenants:
                own = [p for p in self.out if p.tenant is tenant]
                assert (tenant.held, tenant.taken, tenant.due_sum) == total(own)
                assert in_heap.pop(id(tenant), 0) == tenant.queued
                assert not (tenant.queued and tenant.blocked)
            assert not in_heap
        for subscription in scheduler.subscriptions.values():
            assert subscription.free == sum(c.messages for c in subscription.consumers)
            assert subscription.probes == sum(p.subscription is subscription and b"\0" not in s for s, p in self.begun)
            assert subscription.taken == sum(p.messages for p in self.out if p.subscription is subscription)
            assert abs(subscription.weights - sum(d.weight for d in subscription.shares)) < 1e-6
            assert set(subscription.shares) <= set(scheduler.destinations.values())
            assert Counter(d for _, _, d in subscription.heap) == Counter(subscription.queued)
            for destination, share in subscription.shares.items():
                own = [p for p in self.out if p.tenant.destination is destination and p.subscription is subscription]
                assert (share.held, share.taken, share.due_sum) == total(own)

    def finish(self) -> None:
        """When everything is open again all that was added comes out, and nothing is left."""
        scheduler = self.scheduler
        for tokens in self.tokens.values():
            tokens.check()
        for scope in SCOPES:
            scheduler.set_gate(scope, OPEN)
            self.holds[scope] = 0
            scheduler.hold(scope, 0)
            if b"\0" not in scope:
                self.policies[scope] = POLICIES[0]
                scheduler.policy_changed(scope)
                self.follow(scope)
        self.gates.clear()
        self.probes.clear()
        last = Consumer("last")
        scheduler.subscribe(last, ["last", "*"])
        scheduler.credit(last, 1 << 30, 1 << 40)
        assert last.subscription is not None
        while self.pick(last.subscription, 0) or self.out:
            self.pass_time(10)
            for _ in range(len(self.out) // 2 + 1):
                if self.out:
                    self.settle(0, False)
        self.check()
        assert not +self.ready, "lost"
        for consumer in [*self.consumers, last]:
            scheduler.unsubscribe(consumer)
        scheduler.sweep(self.now + 120_000)
        assert scheduler.destinations == {} and scheduler.subscriptions == {}


def scopes_of(queue: bytes) -> tuple[bytes, bytes]:
    """Destination, and destination NUL tenant, of a queue."""
    return split(queue)[0], queue[:queue.rindex(b"\0")]


def total(picks: list[Pick]) -> tuple[int, int, int]:
    """Leases, messages and the sum of the times until which they are paid for."""
    return len(picks), sum(p.messages for p in picks), sum(p.due_ms for p in picks)


def at_random(seed: int, steps: int, make: Make = Scheduler) -> None:
    """So many calls from a seed, and the end."""
    draw, modelled = random.Random(seed), Modelled(make)
    for consumer in modelled.consumers[:2]:
        modelled.scheduler.subscribe(consumer, PATTERNS[seed % 2])
        modelled.scheduler.credit(consumer, draw.randrange(20), 1 << 40)
    for _ in range(steps):
        modelled.step(draw.randrange(256), draw.randrange(256), draw.randrange(256))
    modelled.finish()
