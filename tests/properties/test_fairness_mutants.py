"""The checks of fairness can fail: each refuses schedulers that are unfair in the way that it is for."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from spillway.broker.core import index
from spillway.broker.core import scheduler as sched
from spillway.broker.core.flows import Destination, Share, Tenant
from spillway.broker.core.scheduler import HALF_OPEN, OPEN, Pick, Scheduler
from spillway.broker.core.subscription import Subscription

from tests.properties import fairness

NEVER_MS = 1 << 50


class FirstComeFirstServed(Scheduler):
    """One line for all tenants of a destination."""

    def add(self, queue: bytes) -> None:
        """As if all queues were one tenant's."""
        destination = self._destination(queue[:queue.index(b"\0")])
        tenant = self._tenant(destination, b"all")
        tenant.ready.append(queue)
        destination.ready += 1
        if not tenant.queued:
            self._queue_tenant(tenant)


class TurnsOfKeys(Scheduler):
    """Each key is a tenant of its own."""

    def add(self, queue: bytes) -> None:
        """As if the key were the tenant."""
        destination = self._destination(queue[:queue.index(b"\0")])
        tenant = self._tenant(destination, queue)
        tenant.ready.append(queue)
        destination.ready += 1
        if not tenant.queued:
            self._queue_tenant(tenant)


class ChargesMessages(Scheduler):
    """Consumer time costs nothing."""

    def settled(self, pick: Pick, now_ms: int, failed: bool | None = False) -> None:
        """As if no time had passed."""
        super().settled(pick, pick.since_ms, failed)


class WithoutWeights(Scheduler):
    """All tenants weigh the same."""

    def _tenant(self, destination: Destination, name: bytes) -> Tenant:
        tenant = super()._tenant(destination, name)
        tenant.weight = 1.0
        return tenant


class ChargesAtTheEnd(Scheduler):
    """What a lease lasts longer than expected is charged when it ends, and nothing holds it back before."""

    def charge(self, pick: Pick, messages: int, size: int, now_ms: int) -> None:
        """As if it had been paid for for ever."""
        super().charge(pick, messages, size, now_ms)
        pick.due_ms += NEVER_MS
        pick.tenant.due_sum += NEVER_MS
        pick.share.due_sum += NEVER_MS

    def _hangs(self, flow: Share, usual_ms: float, others: bool, subscription: Subscription) -> bool:
        return False


class LetsThemPileUp(Scheduler):
    """Leases that hang are charged, but their tenants take whatever is free."""

    def _hangs(self, flow: Share, usual_ms: float, others: bool, subscription: Subscription) -> bool:
        return False


class ForgetsThatTheyHung(Scheduler):
    """Only leases that are out are looked at."""

    def _hangs(self, flow: Share, usual_ms: float, others: bool, subscription: Subscription) -> bool:
        known, flow.proven, flow.hold_ms = (flow.proven, flow.hold_ms), True, 0.0
        hangs = super()._hangs(flow, usual_ms, others, subscription)
        flow.proven, flow.hold_ms = known
        return hangs


class HoldsBackForEver(Scheduler):
    """Nobody gets more than its share, also who is alone."""

    def _hangs(self, flow: Share, usual_ms: float, others: bool, subscription: Subscription) -> bool:
        return True


class ClosesNothing(Scheduler):
    """Destinations that are down are tried again and again."""

    def set_gate(self, scope: bytes, state: int) -> None:
        """No gate."""


class ProbesWithAll(Scheduler):
    """A half-open gate lets everything through."""

    def set_gate(self, scope: bytes, state: int) -> None:
        """Open instead."""
        super().set_gate(scope, OPEN if state == HALF_OPEN else state)


MUTANTS: dict[str, tuple[type[Scheduler], Callable[..., None], tuple[Any, ...]]] = {
    "a, first come first served": (FirstComeFirstServed, fairness.tenants_get_their_weights, (100, [1.0], 16)),
    "a, without weights": (WithoutWeights, fairness.tenants_get_their_weights, (4, [1.0, 2.0, 3.0, 10.0], 16)),
    "a, first come first served among many": (FirstComeFirstServed, fairness.a_hundred_thousand_tenants_take_turns, ()),
    "a, messages instead of time": (ChargesMessages, fairness.consumer_time_is_shared, ()),
    "b, first come first served": (FirstComeFirstServed, fairness.keys_are_no_advantage, (1,)),
    "b, turns of keys": (TurnsOfKeys, fairness.keys_are_no_advantage, (2,)),
    "c, first come first served": (FirstComeFirstServed, fairness.hanging_ones_have_no_more_than_their_share, ("tenant", 1, 1, 16)),
    "c, charged at the end": (ChargesAtTheEnd, fairness.hanging_ones_have_no_more_than_their_share, ("tenant", 1, 1, 16)),
    "c, pile up": (LetsThemPileUp, fairness.hanging_ones_do_not_pile_up, ()),
    "c, destinations pile up": (LetsThemPileUp, fairness.hanging_ones_have_no_more_than_their_share, ("destination", 1, 1, 16)),
    "c, forgotten": (ForgetsThatTheyHung, fairness.hanging_ones_do_not_pile_up, ()),
    "work is conserved, held back for ever": (HoldsBackForEver, fairness.a_tenant_among_idle_ones_gets_everything, ()),
    "d, nothing is closed": (ClosesNothing, fairness.dead_destinations_cost_the_others_nothing, ()),
    "d, probes with all": (ProbesWithAll, fairness.dead_destinations_cost_the_others_nothing, ()),
    "e, first come first served": (FirstComeFirstServed, fairness.a_burst_does_not_delay_others, ()),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_an_unfair_scheduler_is_refused(what: str) -> None:
    """The check fails."""
    make, check, arguments = MUTANTS[what]
    with pytest.raises(AssertionError):
        check(make, *arguments)


def test_a_scheduler_without_headroom_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """e: a burst that takes every slot makes the next one wait."""
    monkeypatch.setattr(sched, "HEADROOM", 1 << 40)
    with pytest.raises(AssertionError):
        fairness.a_burst_does_not_delay_others(Scheduler)


def test_a_scheduler_without_a_bound_of_probes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """d: hundreds of probes that take long to fail keep the others waiting."""
    monkeypatch.setattr(Subscription, "probes_enough", lambda self: False)
    with pytest.raises(AssertionError):
        fairness.dead_destinations_cost_the_others_nothing(Scheduler)


def test_a_scheduler_in_which_each_lease_tells_what_is_usual_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """c: fifty leases that hang and end at once would make that usual."""
    monkeypatch.setattr(sched, "VOTE_MS", 0)
    monkeypatch.setattr(sched, "USUAL_UP", 1.1)
    monkeypatch.setattr(sched, "USUAL_DOWN", 1.1)
    with pytest.raises(AssertionError):
        fairness.hanging_ones_do_not_pile_up(Scheduler, "tenant", 100, 500.0, 3, 0.2, 7)


def test_a_scheduler_in_which_most_tell_what_is_usual_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """c: if most of them hang, nothing hangs."""
    monkeypatch.setattr(sched, "USUAL_UP", sched.USUAL_DOWN)
    with pytest.raises(AssertionError):
        fairness.hanging_ones_have_no_more_than_their_share(Scheduler, "tenant", 19, 1, 100)


def test_a_scheduler_that_leaves_what_is_used_on_average_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """c: whoever comes and goes needs more now and then."""
    monkeypatch.setattr(sched, "sqrt", lambda use: 0.0)
    with pytest.raises(AssertionError):
        fairness.hanging_ones_do_not_pile_up(Scheduler, "tenant", 8, 50.0, 1, 0.3, 6)


@pytest.mark.parametrize("where", ["tenant", "destination"])
def test_a_scheduler_that_forgets_who_has_nothing_at_once_is_refused(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """c: in that moment, the share of those that hang grows."""
    monkeypatch.setattr(index, "LINGER_MS", 0)
    with pytest.raises(AssertionError):
        fairness.hanging_ones_do_not_pile_up(Scheduler, where, 8, 50.0, 1, 0.3, 2)
