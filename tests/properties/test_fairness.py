"""Nobody gets more than its share, and nobody less, whatever the others do; limits are kept. In simulated time."""
from __future__ import annotations

import random
from collections import Counter

import pytest
from msgspec.structs import replace
from spillway.broker.core.limits import WINDOW_MIN, Bucket, Congestion
from spillway.broker.core.policy import Adaptive, Limit, Policy, TenantPolicy
from spillway.broker.core.scheduler import CLOSED, HALF_OPEN, OPEN, Consumer, Pick, Scheduler

from tests.properties import fairness
from tests.properties.fairness import BUSY
from tests.properties.scheduler_world import Simulation, destination_of, ten_ms, tenant_of

# -- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize(("tenants", "weights"), [(2, [1.0]), (100, [1.0]), (4, [1.0, 2.0, 3.0, 10.0]), (100, [1.0, 2.0, 3.0, 4.0])])
def test_tenants_get_their_weights(tenants: int, weights: list[float], slots: int) -> None:
    """Every window of 5,000 deliveries is divided by the weights."""
    fairness.tenants_get_their_weights(Scheduler, tenants, weights, slots)


def test_a_hundred_thousand_tenants_take_turns() -> None:
    """Nobody is served twice before everybody was served once."""
    fairness.a_hundred_thousand_tenants_take_turns(Scheduler)


def test_a_hundred_thousand_tenants_have_weights() -> None:
    """A turn of everybody is divided by the weights."""
    fairness.a_hundred_thousand_tenants_have_weights(Scheduler)


def test_consumer_time_is_shared() -> None:
    """Not the number of deliveries."""
    fairness.consumer_time_is_shared(Scheduler)


@pytest.mark.parametrize("slots", [1, 2])
def test_keys_are_no_advantage(slots: int) -> None:
    """A hundred thousand keys get what one key gets."""
    fairness.keys_are_no_advantage(Scheduler, slots)


# -- others' trouble --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hanging", "working", "slots", "adaptive"), [
    (1, 1, 16, True), (1, 1, 100, True), (3, 7, 40, True), (9, 1, 40, False)])
def test_hanging_tenants_have_no_more_than_their_share(hanging: int, working: int, slots: int, adaptive: bool) -> None:
    """The others keep at least 95 % of theirs."""
    fairness.hanging_tenants_have_no_more_than_their_share(Scheduler, hanging, working, slots, adaptive)


@pytest.mark.parametrize(("hanging", "working", "slots"), [(1, 1, 16), (1, 1, 100), (3, 7, 40), (9, 1, 40)])
def test_hanging_destinations_have_no_more_than_their_share(hanging: int, working: int, slots: int) -> None:
    """The others keep at least 95 % of theirs, among destinations, too."""
    fairness.hanging_destinations_have_no_more_than_their_share(Scheduler, hanging, working, slots)


def test_hanging_tenants_do_not_pile_up() -> None:
    """Not even in the moments in which the others have nothing to give."""
    fairness.hanging_tenants_do_not_pile_up(Scheduler)


def test_what_was_taken_alone_comes_back() -> None:
    """A tenant that hangs takes everything while it is alone, and no longer than its leases last."""
    fairness.what_was_taken_alone_comes_back(Scheduler)


def test_a_tenant_among_idle_ones_gets_everything() -> None:
    """What is kept for others is kept for those that are there."""
    fairness.a_tenant_among_idle_ones_gets_everything(Scheduler)


def test_a_burst_does_not_delay_others() -> None:
    """p99 of a quiet tenant is at most 1.2 times what it is alone."""
    fairness.a_burst_does_not_delay_others(Scheduler)


def test_dead_destinations_cost_the_others_nothing() -> None:
    """A thousand destinations ask for 90 % of the consumers' time; then half of them go down: each lease fails after 100 ms and
    closes the gate, and a probe is let through after one second, then two, four... The others are served at least 98 % as
    much as in a world in which nobody goes down, in every five seconds from the second one on."""
    slots, hold, seconds = 50, 50.0, 32

    def served(down: bool) -> Simulation:
        sim = Simulation(lambda queue, _: 100.0 if dead(queue) else hold, 1)
        steps: Counter[bytes] = Counter()

        def dead(queue: bytes) -> bool:
            return down and queue.startswith(b"down") and sim.now >= 1_000

        def ended(pick: Pick, failed: bool | None) -> None:
            name = pick.tenant.destination.name
            if failed:
                if sim.scheduler.gate(name) != CLOSED:
                    sim.scheduler.set_gate(name, CLOSED)
                    sim.at(sim.now + min(60_000.0, 1_000.0 * 2 ** steps[name]), lambda: sim.scheduler.set_gate(name, HALF_OPEN))
                    steps[name] += 1
            elif pick.probe:
                sim.scheduler.set_gate(name, OPEN)

        sim.fails = lambda pick: dead(pick.queue)
        sim.ended = ended
        draw = random.Random(11)
        when, key = 0.0, 0
        while when < seconds * 1_000:
            when += draw.expovariate(0.9 * slots / hold)
            key += 1
            queue = b"%s%d\0t\0%d" % (draw.choice((b"up", b"down")), draw.randrange(500), key)
            sim.at(when, lambda queue=queue: sim.arrive(queue, 1))
        sim.consumer(slots, "*")
        sim.run(until=seconds * 1_000.0)
        return sim

    well, ill = served(False), served(True)
    for begin in range(2_000, seconds * 1_000, 5_000):
        before, now = (sum(count for name, count in sim.served(destination_of, begin, begin + 5_000).items() if name.startswith(b"up"))
                       for sim in (well, ill))
        assert now >= 0.98 * before, (begin, now, before)


def test_a_restrained_tenant_hides_nobody() -> None:
    """The last eighth of the credit is there for a light tenant also if heavy ones, that must not have it, are before it."""
    scheduler = Scheduler()
    consumer = Consumer("c")
    scheduler.subscribe(consumer, ["d"])
    scheduler.credit(consumer, 16, 1 << 40)
    assert consumer.subscription is not None
    scheduler.add(b"d\0light\0" + b"0")
    first = scheduler.pick(consumer.subscription, 0)
    assert first is not None
    scheduler.charge(first, 1, 1 << 30, 0)  # it paid much, so its tag is behind the others'
    for key in range(20):
        scheduler.add(b"d\0heavy\0%d" % key)
    while (pick := scheduler.pick(consumer.subscription, 1)) is not None:
        scheduler.charge(pick, 1, 0, 1)
    assert consumer.messages == 2
    scheduler.add(b"d\0light\0" + b"1")
    scheduler.add(b"d\0other\0")
    scheduler.destinations[b"d"].tenants[b"other"].start = 1e9
    pick = scheduler.pick(consumer.subscription, 2)
    assert pick is not None and pick.tenant.name in (b"light", b"other")


# -- limits -----------------------------------------------------------------------------------------------------------


def limited(limit: Limit = Limit(), tenant: Limit | None = None, name: str = "slow", **more: object) -> Policy:  # noqa: B008
    """A policy with a limit of its own, and one of a tenant."""
    return replace(Policy(), limit=limit, tenants={name: TenantPolicy(limit=tenant)} if tenant is not None else {}, **more)


@pytest.mark.parametrize("rate", [0.5, 7.0, 150.0])
def test_a_tenant_has_its_rate_and_the_others_the_rest(rate: float) -> None:
    """Within 2 %: what is limited gets its messages a second, and the others what is left, so that no slot is idle."""
    sim = Simulation(ten_ms, 1)
    sim.policies[b"d"] = limited(tenant=Limit(per_second=rate))
    for key in range(20):
        sim.arrive(b"d\0slow\0%d" % key, BUSY)
        sim.arrive(b"d\0free\0%d" % key, BUSY)
    sim.consumer(4, "*")
    sim.run(until=10_000)  # the burst is over
    since, seconds = len(sim.delivered), max(20, int(50 / rate))
    sim.run(until=10_000 + seconds * 1_000.0)
    counts = Counter(tenant_of(queue) for queue, _, _ in sim.delivered[since:])
    assert counts[b"slow"] == pytest.approx(rate * seconds, rel=0.02, abs=1.5)
    assert sum(counts.values()) == pytest.approx(400 * seconds, rel=0.01)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_destination_has_its_rate_and_hides_nobody(share: float) -> None:
    """The node's part of it, within 2 %, with messages leased four at a time; another destination has all the rest."""
    sim = Simulation(ten_ms, 4)
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
    assert messages == pytest.approx(80 * share * 60, rel=0.02, abs=8)
    assert leased[b"e"] == pytest.approx(400 * 60 - leased[b"d"], rel=0.01)


def test_a_debt_is_no_room() -> None:
    """Whoever leased more than there were tokens waits until they are earned."""
    bucket = Bucket(Limit(per_second=10, burst=1), 0)
    bucket.take(4)
    assert [bucket.available(now, 1.0) for now in (0, 200, 399, 400)] == [0, 0, 0, 1]


def test_a_burst_is_what_has_been_saved() -> None:
    """After a rest as many messages as the burst go at once, by default what a second gives, and a pick tells how many may."""
    policies = {b"d": limited(Limit(per_second=10)), b"e": limited(Limit(per_second=10, burst=3))}
    scheduler = Scheduler(policies.__getitem__)
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


@pytest.mark.parametrize(("maximum", "share", "here"), [(5, 1.0, 5), (5, 0.5, 3), (4, 0.01, 1)])
def test_leases_never_exceed_their_limits(maximum: int, share: float, here: int) -> None:
    """This node's part of them, at least one, of a destination and of each of its tenants; the limit is reached, too, and
    hides nobody."""
    draw = random.Random(2)
    sim = Simulation(lambda _queue, _messages: 1 + 30 * draw.random(), 1)
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


def test_a_changed_policy_is_kept_at_once() -> None:
    """Weights, rates and numbers of leases of queues that wait already; nothing is lost and nothing comes twice."""
    sim = Simulation(ten_ms, 1)
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
        return {name: share * (len(sim.delivered) - since) / seconds for name, share in sim.share(tenant_of, since=since).items()}

    assert change(fairness.weighted({b"slow": 1, b"free": 3}), 5)[b"free"] == pytest.approx(600, rel=0.02)
    assert change(limited(tenant=Limit(per_second=20, burst=1)), 10)[b"slow"] == pytest.approx(20, rel=0.02)
    assert sum(change(limited(Limit(leases_max=3)), 5).values()) == pytest.approx(300, rel=0.02)
    assert sim.peak[b"d"] == 3
    assert change(limited(tenant=Limit(leases_max=1)), 5)[b"slow"] == pytest.approx(100, rel=0.02)
    assert sum(change(limited(Limit(per_second=0.01, burst=1)), 5).values()) < 1
    assert change(Policy(), 5)[b"slow"] == pytest.approx(400, rel=0.02)


# -- the adaptive limit -----------------------------------------------------------------------------------------------


class Endpoint:
    """Takes `capacity` deliveries at a time, 50 ms each, and refuses more in 5 ms."""

    def __init__(self, capacity: float, adaptive: Adaptive = Adaptive(), queues: int = 200) -> None:  # noqa: B008
        self.capacity = capacity
        self.taken: set[Pick] = set()
        self.sim = Simulation(lambda _queue, _messages: 5.0, 1)
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


@pytest.mark.parametrize("capacity", [2, 5, 10, 30])
def test_the_adaptive_limit_finds_what_an_endpoint_takes(capacity: int) -> None:
    """Its mean is between 0.65 and 1.25 times (or within one of) what the endpoint takes at a time; the endpoint does at least
    65 % of what it can. Once it takes everything, the limit is gone."""
    endpoint = Endpoint(capacity)
    assert endpoint.sim.scheduler.leases_limit(b"d") == 0
    endpoint.run(10)
    limit, served = endpoint.run(30)
    assert min(0.65 * capacity, capacity - 1) <= limit <= max(1.25 * capacity, capacity + 1), limit
    assert served >= 0.65 * capacity * 20, served
    endpoint.capacity = 1_000
    endpoint.run(30)
    _, served = endpoint.run(10)
    assert served == pytest.approx(64 * 20, rel=0.02)


def test_the_floor_and_a_pinned_limit_hold() -> None:
    """However an endpoint fares: never less than the floor, and with a pinned limit exactly that, or this node's part of it,
    also if it must not adapt."""
    endpoint = Endpoint(0, Adaptive(floor=7))
    endpoint.run(20)
    assert endpoint.sim.scheduler.leases_limit(b"d") == 7
    for disabled in (False, True):
        endpoint = Endpoint(3, Adaptive(pinned=12, disabled=disabled))
        endpoint.run(3)
        assert endpoint.sim.peak[b"d"] == 12 and endpoint.sim.scheduler.waiting(b"d").adaptive == 12
        endpoint.sim.scheduler.set_share(b"d", 0.25)
        assert endpoint.sim.scheduler.leases_limit(b"d") == 3
    endpoint = Endpoint(3, Adaptive(disabled=True))
    endpoint.run(3)
    assert endpoint.sim.scheduler.leases_limit(b"d") == 0


def test_poison_does_not_slow_a_healthy_destination() -> None:
    """With one delivery in twenty retried it is served at least 97 % as much as if the limit could not adapt."""
    def served(adaptive: Adaptive) -> float:
        draw = random.Random(9)
        sim = Simulation(ten_ms, 1)
        sim.policies[b"d"] = replace(Policy(), adaptive=adaptive)
        sim.fails = lambda pick: draw.random() < 0.05
        for key in range(100):
            sim.arrive(b"d\0t\0%d" % key, BUSY)
        sim.consumer(16, "*")
        sim.run(until=60_000)
        return sum(sim.served(destination_of, 0, 60_000).values())

    assert served(Adaptive()) >= 0.97 * served(Adaptive(disabled=True))


def test_what_fails_together_is_one_sign() -> None:
    """A hundred leases that fail in the same moment are one decrease, and what was out with them says nothing more."""
    congestion = Congestion()
    for _ in range(300):
        congestion.settled(0, 10, 100, True)
    assert congestion.slots(1.0) == 70
    for _ in range(WINDOW_MIN):  # successes of before the decrease are no sign either
        congestion.settled(5, 20, 60, False)
    assert congestion.slots(1.0) == 70


def test_releases_say_nothing_about_a_destination() -> None:
    """A lease that its consumer gave back is no failure."""
    endpoint = Endpoint(1_000)
    endpoint.sim.fails = lambda pick: None
    endpoint.run(2)
    assert endpoint.sim.scheduler.leases_limit(b"d") == 0


# -- holds, internal subscriptions, what they look like ---------------------------------------------------------------


@pytest.mark.parametrize("scope", [b"d", b"d\0t"])
def test_a_hold_ends_by_itself(scope: bytes) -> None:
    """An operator's gate closes a destination or a tenant beside the other gate, before it has any queue and across sweeps,
    and is over when its time has come. For ever means until it is lifted."""
    scheduler = Scheduler()
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


def test_a_hold_of_a_tenant_hides_nobody() -> None:
    """The others of its destination go on."""
    sim = Simulation(ten_ms, 1)
    for key in range(5):
        for tenant in (b"held", b"free"):
            sim.arrive(b"d\0" + tenant + b"\0%d" % key, BUSY)
    sim.scheduler.hold(b"d\0held", -1)
    sim.consumer(4, "*")
    sim.run(until=1_000)
    assert {tenant_of(queue) for queue, _, _ in sim.delivered} == {b"free"} and len(sim.delivered) == 404


def test_only_internal_subscriptions_see_internal_names() -> None:
    """No pattern or name of a consumer's stands for one; an internal subscription has exactly its names, stars included, and
    what it settles does not move the adaptive limit."""
    scheduler = Scheduler()
    for patterns in (["*"], ["\2"], ["\2*"]):
        scheduler.subscribe(consumer := Consumer("public"), patterns)
        scheduler.credit(consumer, 100, 1 << 40)
    inner = Consumer("inner")
    scheduler.subscribe(inner, ["\2", "*", "d"], internal=True)
    scheduler.credit(inner, 1_000, 1 << 40)
    for name in (b"\2", b"d", b"e"):
        scheduler.add(name + b"\0t\0")
    assert inner.subscription is not None and inner.subscription.matches(b"*") and not inner.subscription.matches(b"e")
    seen = set()
    for subscription in list(scheduler.subscriptions.values()):
        while subscription is not inner.subscription and (pick := scheduler.pick(subscription, 0)) is not None:
            seen.add(pick.queue)
            scheduler.charge(pick, 1, 0, 0)
            scheduler.settled(pick, 0)
    assert seen == {b"d\0t\0", b"e\0t\0"}
    scheduler.add(b"d\0t\0")
    for now in range(200):
        pick = scheduler.pick(inner.subscription, now)
        assert pick is not None and pick.queue in (b"\2\0t\0", b"d\0t\0")
        scheduler.charge(pick, 1, 0, now)
        scheduler.settled(pick, now, True)
        scheduler.credit(inner, 1, 0)
        scheduler.add(pick.queue)
    assert scheduler.leases_limit(b"\2") == scheduler.leases_limit(b"d") == 0
    scheduler.unsubscribe(inner)
    assert inner.subscription is None and len(scheduler.subscriptions) == 3


def test_waiting_tells_what_stops_it() -> None:
    """Queues, leases, limits, consumers and their credit; also of what has nothing here."""
    scheduler = Scheduler(lambda name: limited(Limit(leases_max=2), adaptive=Adaptive(pinned=4)))
    consumer = Consumer("c")
    scheduler.subscribe(consumer, ["d*"])
    scheduler.credit(consumer, 10, 1 << 40)
    nothing = scheduler.waiting(b"d")
    assert (nothing.ready, nothing.consumers, nothing.credit) == (0, 1, 10)
    assert scheduler.waiting(b"x").consumers == 0 and scheduler.demand(b"d") == 0
    for key in range(5):
        scheduler.add(b"d\0t\0%d" % key)
    assert consumer.subscription is not None
    while (pick := scheduler.pick(consumer.subscription, 0)) is not None:
        scheduler.charge(pick, 1, 0, 0)
    waiting = scheduler.waiting(b"d")
    assert (waiting.ready, waiting.held, waiting.leases_max, waiting.leases_full, waiting.adaptive) == (3, 2, 2, True, 4)
    assert waiting.credit == 8 and scheduler.demand(b"d") == 5
    tenant = scheduler.waiting(b"d\0t")
    assert (tenant.ready, tenant.held, tenant.leases_max, tenant.leases_full, tenant.adaptive) == (3, 2, 0, False, 0)
    assert scheduler.waiting(b"d\0u").ready == 0
