"""Limits, the limit that adapts, and holds are kept, and cost nobody else anything. In simulated time."""
from __future__ import annotations

import pytest
from spillway.broker.core.limits import WINDOW_MIN, Bucket, Congestion
from spillway.broker.core.policy import Adaptive, Limit
from spillway.broker.core.scheduler import Consumer, Scheduler

from tests.properties import limits
from tests.properties.limits import Endpoint, limited

# -- checks, also of mutants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 7.0, 150.0])
def test_a_tenant_has_its_rate_and_the_others_the_rest(rate: float) -> None:
    """Within 2 %, in messages a second."""
    limits.a_tenant_has_its_rate_and_the_others_the_rest(Scheduler, rate)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_destination_has_its_rate_and_hides_nobody(share: float) -> None:
    """And the node's part of it."""
    limits.a_destination_has_its_rate_and_hides_nobody(Scheduler, share)


def test_a_burst_is_what_has_been_saved() -> None:
    """At once after a rest, and no more."""
    limits.a_burst_is_what_has_been_saved(Scheduler)


@pytest.mark.parametrize(("maximum", "share", "here"), [(5, 1.0, 5), (5, 0.5, 3), (4, 0.01, 1)])
def test_leases_never_exceed_their_limits(maximum: int, share: float, here: int) -> None:
    """Of destinations and tenants."""
    limits.leases_never_exceed_their_limits(Scheduler, maximum, share, here)


def test_a_changed_policy_is_kept_at_once() -> None:
    """With queues that wait already, and nothing is lost."""
    limits.a_changed_policy_is_kept_at_once(Scheduler)


@pytest.mark.parametrize("capacity", [2, 5, 10, 30])
def test_the_adaptive_limit_finds_what_an_endpoint_takes(capacity: int) -> None:
    """And forgets it when it takes everything."""
    limits.the_adaptive_limit_finds_what_an_endpoint_takes(Scheduler, capacity)


def test_the_floor_and_a_pinned_limit_hold() -> None:
    """However an endpoint fares."""
    limits.the_floor_and_a_pinned_limit_hold(Scheduler)


def test_poison_does_not_slow_a_healthy_destination() -> None:
    """One failure in twenty is no sign."""
    limits.poison_does_not_slow_a_healthy_destination(Scheduler)


@pytest.mark.parametrize("scope", [b"d", b"d\0t"])
def test_a_hold_ends_by_itself(scope: bytes) -> None:
    """Also across sweeps, and before it has any queue."""
    limits.a_hold_ends_by_itself(Scheduler, scope)


def test_a_hold_of_a_tenant_hides_nobody() -> None:
    """The others of its destination go on."""
    limits.a_hold_of_a_tenant_hides_nobody(Scheduler)

def test_probes_take_turns() -> None:
    """When they are bounded."""
    limits.probes_take_turns(Scheduler)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_debt_is_no_room() -> None:
    """Whoever leased more than there were tokens waits until they are earned."""
    bucket = Bucket(Limit(per_second=10, burst=1), 0)
    bucket.take(4)
    assert [bucket.available(now, 1.0) for now in (0, 200, 399, 400)] == [0, 0, 0, 1]

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
    endpoint = Endpoint(Scheduler, 1_000)
    endpoint.sim.fails = lambda pick: None
    endpoint.run(2)
    assert endpoint.sim.scheduler.leases_limit(b"d") == 0

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
