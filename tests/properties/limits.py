"""What limits, holds and changed policies do, as checks of any scheduler; see `fairness`."""
from __future__ import annotations

import random
from collections import Counter

from msgspec.structs import replace
from pytest import approx
from spillway.broker.core.policy import Adaptive, Limit, Policy, TenantPolicy
from spillway.broker.core.scheduler import CLOSED, HALF_OPEN, OPEN, Consumer, Pick

from tests.properties.fairness import BUSY, weighted
from tests.properties.scheduler_world import Make, Simulation, destination_of, ten_ms, tenant_of


def limited(limit: Limit = Limit(), tenant: Limit | None = None, name: str = "slow", **more: object) -> Policy:  # noqa: B008
    """A policy with a limit of its own, and one of a tenant."""
    return replace(Policy(), limit=limit, tenants={name: TenantPolicy(limit=tenant)} if tenant is not None else {}, **more)


def a_tenant_has_its_rate_and_the_others_the_rest(make: Make, rate: float) -> None:
    """Within 2 %: what is limited gets its messages a second, and the others what is left, so that no slot is idle."""
    sim = Simulation(ten_ms, 1, make)
    sim.policies[b"d"] = limited(tenant=Limit(per_second=rate))
    for key in range(20):
        sim.arrive(b"d\0slow\0%d" % key, BUSY)
        sim.arrive(b"d\0free\0%d" % key, BUSY)
    sim.consumer(4, "*")
    sim.run(until=10_000)  # the burst is over
    since, seconds = len(sim.delivered), max(20, int(50 / rate))
    sim.run(until=10_000 + seconds * 1_000.0)
    counts = Counter(tenant_of(queue) for queue, _, _ in sim.delivered[since:])
    assert counts[b"slow"] == approx(rate * seconds, rel=0.02, abs=1.5)
    assert sum(counts.values()) == approx(400 * seconds, rel=0.01)


def a_destination_has_its_rate_and_hides_nobody(make: Make, share: float) -> None:
    """The node's part of it, within 2 %, with messages leased four at a time; another destination has all the rest."""
    sim = Simulation(ten_ms, 4, make)
    sim.policies[b"d"] = limited(Limit(per_second=80, burst=8))
    sim.scheduler.set_share(b"d", share)
    for key in range(20):
        for tenant in range(3):
            sim.arrive(b"d\0%d\0%d" % (tenant, key), BUSY)
        sim.arrive(b"e\0t\0%d" % key, BUSY)
    sim.consumer(4, "*")
    sim.run(until=60_000)
    leased = Counter(destination_of(queue) for queue, _, _ in sim.delivered)
    messages = sum(count for queue, count, _ in sim.delivered if destination_of(queue) == b"d")
    assert messages == approx(80 * share * 60, rel=0.02, abs=8)
    assert leased[b"e"] == approx(400 * 60 - leased[b"d"], rel=0.01)


def a_burst_is_what_has_been_saved(make: Make) -> None:
    """After a rest as many messages as the burst go at once, by default what a second gives, and a pick tells how many may."""
    policies = {b"d": limited(Limit(per_second=10)), b"e": limited(Limit(per_second=10, burst=3))}
    scheduler = make(policies.__getitem__)
    consumer = Consumer("c")
    scheduler.subscribe(consumer, ["*"])
    scheduler.credit(consumer, 1 << 20, 1 << 40)
    assert consumer.subscription is not None
    for name, burst in ((b"d", 10), (b"e", 3)):
        scheduler.add(name + b"\0t\0" + b"1")
        scheduler.add(name + b"\0t\0" + b"2")
        pick = scheduler.pick(consumer.subscription, 0)
        assert pick is not None and pick.messages_max == burst
        scheduler.charge(pick, burst, 0, 0)
        assert scheduler.pick(consumer.subscription, 0) is None
        assert scheduler.waiting(name).rate_wait_until_ms == 100
        scheduler.hold(name, -1)
    scheduler.hold(b"e", 0)
    assert scheduler.next_wake_ms() == 100
    scheduler.wake_due(99)
    assert scheduler.pick(consumer.subscription, 99) is None
    scheduler.wake_due(100)
    pick = scheduler.pick(consumer.subscription, 100)
    assert pick is not None and pick.queue == b"e\0t\0" + b"2" and pick.messages_max == 1
    scheduler.discard(pick)
    scheduler.add(pick.queue)
    pick = scheduler.pick(consumer.subscription, 1_000_000)
    assert pick is not None and pick.messages_max == 3


def leases_never_exceed_their_limits(make: Make, maximum: int, share: float, here: int) -> None:
    """This node's part of them, at least one, of a destination and of each of its tenants; the limit is reached, too, and
    hides nobody."""
    draw = random.Random(2)
    sim = Simulation(lambda _queue, _messages: 1 + 30 * draw.random(), 1, make)
    sim.policies[b"d"] = limited(Limit(leases_max=2 * maximum))
    sim.policies[b"e"] = replace(Policy(), tenant_limit=Limit(leases_max=maximum),
                                 tenants={"two": TenantPolicy(limit=Limit(leases_max=2))})
    for name in (b"d", b"e"):
        sim.scheduler.set_share(name, share)
    for key in range(40):
        for tenant in (b"one", b"two"):
            for name in (b"d", b"e", b"f"):
                sim.arrive(name + b"\0" + tenant + b"\0%d" % key, BUSY)
    sim.consumer(60, "*")
    sim.run(until=5_000)
    assert sim.peak[b"d"] == max(1, int(2 * maximum * share + 0.5))
    assert sim.peak[b"e\0one"] == here
    assert sim.peak[b"e\0two"] == max(1, int(2 * share + 0.5))
    assert sum(sim.out.get(name, 0) for name in (b"d", b"e", b"f")) == 60  # f has what they leave
    waiting = sim.scheduler.waiting(b"d")
    assert waiting.leases_full and waiting.leases_max == waiting.held == sim.scheduler.leases_limit(b"d")


def a_changed_policy_is_kept_at_once(make: Make) -> None:
    """Weights, rates and numbers of leases of queues that wait already; nothing is lost and nothing comes twice."""
    sim = Simulation(ten_ms, 1, make)
    for key in range(40):
        for tenant in (b"slow", b"free"):
            sim.arrive(b"d\0" + tenant + b"\0%d" % key, BUSY)
    sim.consumer(8, "*")

    def change(policy: Policy, seconds: int) -> dict[bytes, float]:
        sim.policies[b"d"] = policy
        sim.scheduler.policy_changed(b"d")
        sim.run(until=sim.now + 500)  # what is out ends; the heaps' tags follow
        since = len(sim.delivered)
        sim.peak.clear()
        sim.run(until=sim.now + seconds * 1_000)
        counts = Counter(tenant_of(queue) for queue, _, _ in sim.delivered[since:])
        return {name: counts[name] / seconds for name in (b"slow", b"free")}

    assert change(weighted({b"slow": 1, b"free": 3}), 5)[b"free"] == approx(600, rel=0.02)
    assert change(limited(tenant=Limit(per_second=20, burst=1)), 10)[b"slow"] == approx(20, rel=0.02)
    assert sum(change(limited(Limit(leases_max=3)), 5).values()) == approx(300, rel=0.02)
    assert sim.peak[b"d"] == 3
    assert change(limited(tenant=Limit(leases_max=1)), 5)[b"slow"] == approx(100, rel=0.02)
    assert sum(change(limited(Limit(per_second=0.01, burst=1)), 5).values()) < 1
    assert change(Policy(), 5)[b"slow"] == approx(400, rel=0.02)


class Endpoint:
    """Takes `capacity` deliveries at a time, 50 ms each, and refuses more in 5 ms."""

    def __init__(self, make: Make, capacity: float, adaptive: Adaptive = Adaptive(), queues: int = 200) -> None:  # noqa: B008
        self.capacity = capacity
        self.taken: set[Pick] = set()
        self.sim = Simulation(lambda _queue, _messages: 5.0, 1, make)
        self.sim.hold = lambda queue, _: 5.0 if self.refused else 50.0
        self.refused = False
        self.sim.policies[b"d"] = replace(Policy(), adaptive=adaptive)
        self.sim.fails = self.asked
        self.sim.ended = lambda pick, failed: self.taken.discard(pick)
        self.sim.retry_ms = 100.0
        for key in range(queues):
            self.sim.arrive(b"d\0t\0%d" % key, BUSY)
        self.sim.consumer(64, "*")

    def asked(self, pick: Pick) -> bool:
        """Whether it refuses."""
        self.refused = len(self.taken) >= self.capacity
        if not self.refused:
            self.taken.add(pick)
        return self.refused

    def run(self, seconds: int) -> tuple[float, float]:
        """Mean of the limit and successes a second, over so many seconds from now on."""
        sim, limits = self.sim, []
        begin = sim.now
        while sim.now < begin + seconds * 1_000:
            sim.run(until=sim.now + 50)
            limits.append(sim.scheduler.leases_limit(b"d") or 64)
        return sum(limits) / len(limits), sum(sim.served(destination_of, begin, sim.now).values()) / seconds


def the_adaptive_limit_finds_what_an_endpoint_takes(make: Make, capacity: int) -> None:
    """Its mean is between 0.65 and 1.25 times (or within one of) what the endpoint takes at a time; the endpoint does at least
    65 % of what it can. Once it takes everything, the limit is gone."""
    endpoint = Endpoint(make, capacity)
    assert endpoint.sim.scheduler.leases_limit(b"d") == 0
    endpoint.run(10)
    limit, served = endpoint.run(30)
    assert min(0.65 * capacity, capacity - 1) <= limit <= max(1.25 * capacity, capacity + 1), limit
    assert served >= 0.65 * capacity * 20, served
    endpoint.capacity = 1_000
    endpoint.run(30)
    _, served = endpoint.run(10)
    assert served == approx(64 * 20, rel=0.02)


def the_floor_and_a_pinned_limit_hold(make: Make) -> None:
    """However an endpoint fares: never less than the floor, and with a pinned limit exactly that, or this node's part of it,
    also if it must not adapt."""
    endpoint = Endpoint(make, 0, Adaptive(floor=7))
    endpoint.run(20)
    assert endpoint.sim.scheduler.leases_limit(b"d") == 7
    for disabled in (False, True):
        endpoint = Endpoint(make, 3, Adaptive(pinned=12, disabled=disabled))
        endpoint.run(3)
        assert endpoint.sim.peak[b"d"] == 12 and endpoint.sim.scheduler.waiting(b"d").adaptive == 12
        endpoint.sim.scheduler.set_share(b"d", 0.25)
        assert endpoint.sim.scheduler.leases_limit(b"d") == 3
    endpoint = Endpoint(make, 3, Adaptive(disabled=True))
    endpoint.run(3)
    assert endpoint.sim.scheduler.leases_limit(b"d") == 0


def poison_does_not_slow_a_healthy_destination(make: Make) -> None:
    """With one delivery in twenty retried it is served at least 97 % as much as if the limit could not adapt."""
    def served(adaptive: Adaptive) -> float:
        draw = random.Random(9)
        sim = Simulation(ten_ms, 1, make)
        sim.policies[b"d"] = replace(Policy(), adaptive=adaptive)
        sim.fails = lambda pick: draw.random() < 0.05
        for key in range(100):
            sim.arrive(b"d\0t\0%d" % key, BUSY)
        sim.consumer(16, "*")
        sim.run(until=60_000)
        return sum(sim.served(destination_of, 0, 60_000).values())

    assert served(Adaptive()) >= 0.97 * served(Adaptive(disabled=True))


def a_hold_ends_by_itself(make: Make, scope: bytes) -> None:
    """An operator's gate closes a destination or a tenant beside the other gate, before it has any queue and across sweeps,
    and is over when its time has come. For ever means until it is lifted."""
    scheduler = make(lambda name: Policy())
    consumer = Consumer("c")
    scheduler.subscribe(consumer, ["*"])
    scheduler.credit(consumer, 100, 1 << 40)
    subscription = consumer.subscription
    assert subscription is not None

    def pick(now_ms: int) -> bool:
        scheduler.wake_due(now_ms)
        found = scheduler.pick(subscription, now_ms)
        if found is not None:
            scheduler.charge(found, 1, 0, now_ms)
            scheduler.settled(found, now_ms)
            scheduler.add(found.queue)
        return found is not None

    scheduler.hold(scope, 5_000)
    scheduler.sweep(0)
    scheduler.add(b"d\0t\0")
    scheduler.sweep(0)
    assert not pick(10) and scheduler.next_wake_ms() == 5_000 and scheduler.waiting(scope).hold_until == 5_000
    assert not pick(4_999) and pick(5_000) and scheduler.waiting(scope).hold_until == 0
    scheduler.hold(scope, -1)
    assert not pick(6_000) and scheduler.waiting(scope).hold_until == -1
    scheduler.sweep(10_000)
    scheduler.set_gate(scope, CLOSED)
    scheduler.hold(scope, 0)
    assert not pick(10_001)
    scheduler.hold(scope, -1)
    scheduler.set_gate(scope, OPEN)
    assert not pick(10_002)
    scheduler.hold(scope, 0)
    assert pick(10_003)
    scheduler.hold(scope, 20_000)
    assert not pick(10_004)
    scheduler.hold(scope, 12_000)  # sooner than the timer that stands for it
    assert not pick(11_999) and pick(12_000)


def a_hold_of_a_tenant_hides_nobody(make: Make) -> None:
    """The others of its destination go on."""
    sim = Simulation(ten_ms, 1, make)
    for key in range(5):
        for tenant in (b"held", b"free"):
            sim.arrive(b"d\0" + tenant + b"\0%d" % key, BUSY)
    sim.scheduler.hold(b"d\0held", -1)
    sim.consumer(4, "*")
    sim.run(until=1_000)
    assert {tenant_of(queue) for queue, _, _ in sim.delivered} == {b"free"} and len(sim.delivered) == 404


def probes_take_turns(make: Make) -> None:
    """Of many destinations that are half open each has its probe, also if only some probes may be out at a time: an eighth of
    the credit, or what is free beside them."""
    scheduler = make(lambda name: Policy())
    consumer = Consumer("c")
    scheduler.subscribe(consumer, ["*"])
    scheduler.credit(consumer, 8, 1 << 40)
    assert consumer.subscription is not None
    for number in range(20):
        scheduler.set_gate(b"d%d" % number, CLOSED)
        for key in range(3):
            scheduler.add(b"d%d\0t\0%d" % (number, key))
        scheduler.set_gate(b"d%d" % number, HALF_OPEN)
    probed: Counter[bytes] = Counter()
    for now in range(30):
        out = []
        while (pick := scheduler.pick(consumer.subscription, now)) is not None:
            assert pick.probe
            scheduler.charge(pick, 1, 0, now)
            out.append(pick)
        assert len(out) == (4 if sum(probed.values()) < 60 else 0)
        for pick in out:
            probed[pick.tenant.destination.name] += 1
            scheduler.settled(pick, now)
            scheduler.credit(consumer, 1, 0)
        if now == 9:
            assert len(probed) == 20
    assert set(probed.values()) == {3}
