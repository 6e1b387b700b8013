"""Nobody gets more than its share, and nobody less, whatever the others do. In simulated time."""
from __future__ import annotations

import pytest
from spillway.broker.core.scheduler import Consumer, Scheduler

from tests.properties import fairness

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


@pytest.mark.parametrize("where", ["tenant", "destination"])
@pytest.mark.parametrize(("hanging", "working", "slots"), [(1, 1, 16), (1, 1, 100), (3, 7, 40), (9, 1, 40), (19, 1, 100)])
def test_hanging_ones_have_no_more_than_their_share(where: str, hanging: int, working: int, slots: int) -> None:
    """The others keep at least 95 % of theirs."""
    fairness.hanging_ones_have_no_more_than_their_share(Scheduler, where, hanging, working, slots)


@pytest.mark.parametrize(("where", "slots", "hold", "hanging", "use", "seed"), [
    ("tenant", 16, 50.0, 1, 0.4, 5), ("tenant", 16, 50.0, 1, 0.4, 6), ("tenant", 8, 50.0, 1, 0.3, 6), ("tenant", 16, 200.0, 1, 0.4, 6),
    ("tenant", 100, 50.0, 1, 0.4, 7), ("tenant", 100, 500.0, 1, 0.4, 6), ("tenant", 100, 500.0, 3, 0.2, 7),
    ("destination", 16, 50.0, 1, 0.4, 6), ("destination", 8, 50.0, 1, 0.3, 5), ("destination", 100, 500.0, 3, 0.2, 7),
    ("tenant", 100, 500.0, 1, 0.02, 0), ("destination", 8, 50.0, 1, 0.3, 2), ("destination", 48, 50.0, 2, 0.05, 1)])
@pytest.mark.parametrize("run", [1, 16])
def test_hanging_ones_do_not_pile_up(where: str, slots: int, hold: float, hanging: int, use: float, seed: int, run: int) -> None:
    """Not even in the moments in which the others have nothing to give."""
    fairness.hanging_ones_do_not_pile_up(Scheduler, where, slots, hold, hanging, use, seed, run)


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
    """Half of a thousand go down; the others are served as if they had not."""
    fairness.dead_destinations_cost_the_others_nothing(Scheduler)


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
