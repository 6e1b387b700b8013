"""The checks of limits and the model beside the scheduler can fail: each refuses schedulers that are wrong in one way."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from spillway.broker.core import flows
from spillway.broker.core import limits as core_limits
from spillway.broker.core import scheduler as sched
from spillway.broker.core.flows import Destination, Tenant
from spillway.broker.core.limits import Bucket, Congestion
from spillway.broker.core.scheduler import Pick, Scheduler
from spillway.broker.core.subscription import Subscription

from tests.properties import limits
from tests.properties.scheduler_model import at_random

Patch = Callable[[pytest.MonkeyPatch], None]


class Unshared(Scheduler):
    """Each node has the whole limit."""

    def set_share(self, name: bytes, share: float) -> None:
        """Nothing."""


class ChangesSilently(Scheduler):
    """A new policy is taken on, and who was blocked by the old one stays blocked."""

    def _unblock(self, who: Destination | Tenant) -> None:
        if not self._quiet:
            super()._unblock(who)

    _quiet = False

    def policy_changed(self, name: bytes) -> None:
        """Without waking anybody."""
        self._quiet = True
        super().policy_changed(name)
        self._quiet = False


class ChangesNothing(Scheduler):
    """Who is known keeps its first policy."""

    def policy_changed(self, name: bytes) -> None:
        """Nothing."""


class SweepsHolds(Scheduler):
    """Forgets operators' gates of what has nothing."""

    def sweep(self, now_ms: int = 0) -> None:
        """And those."""
        super().sweep(now_ms)
        self._holds = {scope: until for scope, until in self._holds.items() if scope.partition(b"\0")[0] in self.destinations}


class HoldsForEver(Scheduler):
    """A timed hold does not end by itself."""

    def _held_until(self, who: Destination | Tenant) -> int:
        return -1 if who.hold else 0


class HidesOthers(Scheduler):
    """While a destination has used up its limit, nobody else is asked."""

    def pick(self, subscription: Subscription, now_ms: int) -> Pick | None:
        """Nothing, while somebody is blocked."""
        return None if any(destination.blocked for destination in self.destinations.values()) else super().pick(subscription, now_ms)


class LosesProbers(Scheduler):
    """Destinations that wait with their probe are not asked again."""

    def _let_probe(self, subscription: Subscription) -> None:
        """Nobody."""


class NoTimer(Scheduler):
    """Who waits for a token is not woken by time."""

    def _sleep(self, who: Destination | Tenant, until: int) -> None:
        """Nothing."""


MUTANTS: dict[str, tuple[type[Scheduler], Callable[..., None], tuple[Any, ...]]] = {
    "share, unshared rate": (Unshared, limits.a_destination_has_its_rate_and_hides_nobody, (0.25,)),
    "share, unshared leases": (Unshared, limits.leases_never_exceed_their_limits, (5, 0.5, 3)),
    "policies, silent": (ChangesSilently, limits.a_changed_policy_is_kept_at_once, ()),
    "policies, unchanged": (ChangesNothing, limits.a_changed_policy_is_kept_at_once, ()),
    "holds, swept": (SweepsHolds, limits.a_hold_ends_by_itself, (b"d\0t",)),
    "holds, for ever": (HoldsForEver, limits.a_hold_ends_by_itself, (b"d",)),
    "holds, without timer": (NoTimer, limits.a_hold_ends_by_itself, (b"d\0t",)),
    "rates, without timer": (NoTimer, limits.a_destination_has_its_rate_and_hides_nobody, (1.0,)),
    "gates, lost probes": (LosesProbers, limits.probes_take_turns, ()),
    "rates, hide others": (HidesOthers, limits.a_destination_has_its_rate_and_hides_nobody, (1.0,)),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_a_scheduler_that_keeps_no_limits_is_refused(what: str) -> None:
    """The check fails."""
    make, check, arguments = MUTANTS[what]
    with pytest.raises(AssertionError):
        check(make, *arguments)


def bucket_ignores_time(patch: pytest.MonkeyPatch) -> None:
    """What was taken never comes back."""
    patch.setattr(Bucket, "available", lambda self, now_ms, share: max(0, int(self.tokens)))


def bucket_never_empties(patch: pytest.MonkeyPatch) -> None:
    """Nothing is taken."""
    patch.setattr(Bucket, "take", lambda self, count: None)


def bucket_saves_without_bound(patch: pytest.MonkeyPatch) -> None:
    """A burst may be as large as the rest before was long."""
    begin = Bucket.__init__

    def init(self: Bucket, *arguments: Any) -> None:
        begin(self, *arguments)
        self.burst = 1e9

    patch.setattr(Bucket, "__init__", init)


def one_lease_more(patch: pytest.MonkeyPatch) -> None:
    """A limit of leases is off by one."""
    patch.setattr(flows, "slots", lambda limit, share: limit and core_limits.slots(limit, share) + 1)


def one_lease_less(patch: pytest.MonkeyPatch) -> None:
    """The last lease is never given."""
    patch.setattr(flows, "slots", lambda limit, share: limit and core_limits.slots(limit, share) - 1)


def never_increases(patch: pytest.MonkeyPatch) -> None:
    """A limit only shrinks."""
    settled = Congestion.settled

    def shrinks(self: Congestion, *arguments: Any) -> None:
        before = self.limit
        settled(self, *arguments)
        self.limit = min(self.limit, before)

    patch.setattr(Congestion, "settled", shrinks)


def never_decreases(patch: pytest.MonkeyPatch) -> None:
    """Failures mean nothing."""
    patch.setattr(core_limits, "FAILED_SHARE", 1.0)


def a_few_failures_are_trouble(patch: pytest.MonkeyPatch) -> None:
    """Poison makes a destination slow."""
    patch.setattr(core_limits, "FAILED_SHARE", 0.02)


def no_floor(patch: pytest.MonkeyPatch) -> None:
    """A limit shrinks below its floor."""
    patch.setattr(core_limits, "max", min, raising=False)


def pinned_is_ignored(patch: pytest.MonkeyPatch) -> None:
    """An operator's limit is not used."""
    patch.setattr(Congestion, "slots", lambda self, share: 0 if self.limit == float("inf") else max(1, int(self.limit)))


PARTS: list[tuple[Patch, Callable[..., None], tuple[Any, ...]]] = [
    (bucket_ignores_time, limits.a_tenant_has_its_rate_and_the_others_the_rest, (7.0,)),
    (bucket_ignores_time, limits.a_destination_has_its_rate_and_hides_nobody, (1.0,)),
    (bucket_never_empties, limits.a_tenant_has_its_rate_and_the_others_the_rest, (7.0,)),
    (bucket_saves_without_bound, limits.a_burst_is_what_has_been_saved, ()),
    (one_lease_more, limits.leases_never_exceed_their_limits, (5, 1.0, 5)),
    (one_lease_less, limits.leases_never_exceed_their_limits, (5, 1.0, 5)),
    (never_increases, limits.the_adaptive_limit_finds_what_an_endpoint_takes, (10,)),
    (never_decreases, limits.the_adaptive_limit_finds_what_an_endpoint_takes, (10,)),
    (a_few_failures_are_trouble, limits.poison_does_not_slow_a_healthy_destination, ()),
    (no_floor, limits.the_floor_and_a_pinned_limit_hold, ()),
    (pinned_is_ignored, limits.the_floor_and_a_pinned_limit_hold, ()),
]


@pytest.mark.parametrize(("part", "check", "arguments"), PARTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_part_is_refused(part: Patch, check: Callable[..., None], arguments: tuple[Any, ...],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails."""
    part(monkeypatch)
    with pytest.raises(AssertionError):
        check(Scheduler, *arguments)


# -- the model ----------------------------------------------------------------------------------------------------------


class ForgetsHeadroom(Scheduler):
    """No timer for the end of the headroom, as it was once."""

    def _sleep(self, who: Destination | Tenant, until: int) -> None:
        if who.blocked or until <= self._now_ms + sched.NAP_MS:
            super()._sleep(who, until)


class EndsOfLeasesWakeNobody(Scheduler):
    """Who has all its leases out stays away when one of them ends."""

    def settled(self, pick: Pick, now_ms: int, failed: bool | None = False) -> None:
        """Without waking anybody."""
        blocked = pick.tenant.blocked, pick.tenant.destination.blocked
        pick.tenant.blocked = pick.tenant.destination.blocked = False
        super().settled(pick, now_ms, failed)
        pick.tenant.blocked, pick.tenant.destination.blocked = blocked


class ForgetsWeights(Scheduler):
    """Sums of weights keep what has gone."""

    def sweep(self, now_ms: int = 0) -> None:
        """As if nothing had been removed."""
        before = {subscription: subscription.weights for subscription in self.subscriptions.values()}
        super().sweep(now_ms)
        for subscription, weights in before.items():
            subscription.weights = weights


class TakesNoTokens(Scheduler):
    """A lease of several messages takes one token."""

    def charge(self, pick: Pick, messages: int, size: int, now_ms: int) -> None:
        """And gives the others back."""
        super().charge(pick, messages, size, now_ms)
        for bucket in (pick.tenant.bucket, pick.tenant.destination.bucket):
            if bucket is not None:
                bucket.tokens += messages - 1


@pytest.mark.parametrize("make", [ForgetsHeadroom, EndsOfLeasesWakeNobody, ForgetsWeights, TakesNoTokens, Unshared,
                                  ChangesSilently, HoldsForEver, NoTimer, SweepsHolds])
def test_the_model_refuses(make: type[Scheduler]) -> None:
    """Within some random orders of calls."""
    with pytest.raises(AssertionError):
        for seed in range(60):
            at_random(seed, 600, make)
