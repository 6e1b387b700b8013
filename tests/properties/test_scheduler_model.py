"""The scheduler beside a naive model, with policies, limits, holds and leases that hang, in any order of calls."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.broker.core.policy import Limit, Policy
from spillway.broker.core.scheduler import Consumer, Scheduler

from tests.properties.scheduler_model import PATTERNS, Modelled, at_random

STEP = st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))


@given(credits=st.tuples(st.integers(0, 20), st.integers(0, 20)),
       steps=st.sampled_from([10, 50, 150]).flatmap(lambda n: st.lists(STEP, min_size=n, max_size=n)))
def test_any_order_of_calls(credits: tuple[int, int], steps: list[tuple[int, int, int]]) -> None:
    """What is ready and not stopped is picked while there is credit, now or when a timer of the scheduler's fires; nothing
    passes a gate, a hold, a number of leases or, in any span of time, a rate; sums are right after each call; at the end
    everything that was added has come out and nothing is left."""
    modelled = Modelled()
    for consumer, messages in zip(modelled.consumers, credits, strict=False):
        modelled.scheduler.subscribe(consumer, PATTERNS[messages % 2])
        modelled.scheduler.credit(consumer, messages, 1 << 40)
    for kind, a, b in steps:
        modelled.step(kind, a, b)
    modelled.finish()


@pytest.mark.parametrize("seed", range(60))
def test_long_orders_of_calls(seed: int) -> None:
    """The same over 600 calls from a seed."""
    at_random(seed, 600)


def test_headroom_that_nobody_needs_ends_by_a_timer() -> None:
    """A second after the last lease of a tenant that comes and goes, the last eighth of the credit goes to who waits for it,
    also if nothing else happens: leases may take hours."""
    scheduler, consumer = Scheduler(), Consumer("c")
    scheduler.subscribe(consumer, ["d"])
    scheduler.credit(consumer, 16, 1 << 40)

    def take(now_ms: int) -> None:
        assert consumer.subscription is not None
        scheduler.wake_due(now_ms)
        while (pick := scheduler.pick(consumer.subscription, now_ms)) is not None:
            scheduler.charge(pick, 1, 0, now_ms)

    scheduler.add(b"d\0quiet\0")
    take(0)
    for key in range(30):
        scheduler.add(b"d\0busy\0%d" % key)
    take(1)
    assert consumer.messages == 2
    wake = scheduler.next_wake_ms()
    assert wake is not None and wake <= 1_100
    take(wake)
    assert consumer.messages == 0


@pytest.mark.parametrize("whose", ["destination", "tenant"])
@pytest.mark.parametrize("what", ["policy", "share"])
def test_tokens_come_at_the_rate_of_their_time(what: str, whose: str) -> None:
    """A higher rate counts from its beginning on, not for the time before; and a lower one had no part in that."""
    def policy(per_second: float) -> Policy:
        limit = Limit(per_second=per_second, burst=1_000)
        return Policy(limit=limit) if whose == "destination" else Policy(tenant_limit=limit)

    policies = {b"d": policy(100 if what == "share" else 1)}
    scheduler, consumer = Scheduler(policies.__getitem__), Consumer("c")
    scheduler.subscribe(consumer, ["d"])
    scheduler.credit(consumer, 1 << 20, 1 << 40)
    assert consumer.subscription is not None
    if what == "share":
        scheduler.set_share(b"d", 0.01)
    scheduler.add(b"d\0t\0")
    pick = scheduler.pick(consumer.subscription, 0)
    assert pick is not None
    scheduler.charge(pick, pick.messages_max, 0, 0)
    scheduler.wake_due(10_000)
    if what == "share":
        scheduler.set_share(b"d", 1.0)
    else:
        policies[b"d"] = policy(100)
        scheduler.policy_changed(b"d")
    scheduler.add(b"d\0t\0")
    pick = scheduler.pick(consumer.subscription, 10_500)
    assert pick is not None and pick.messages_max == 60
