"""Decisions of a destination's policy, as tables."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.broker.core.policy import Nack, Policy, backoff_ms, dead_reason, park_ms

POLICY = Policy(backoff_base_ms=200, backoff_cap_ms=60_000)
ALMOST_ONE = 1 - 2**-53
POLICIES = st.builds(Policy, backoff_base_ms=st.integers(1, 10**6), backoff_cap_ms=st.integers(1, 10**9))
STEP = st.integers(0, 10_000)
JITTER = st.floats(0, ALMOST_ONE)


@pytest.mark.parametrize(("nack", "attempts_max", "age_ms_max", "attempts", "age_ms", "dead"), [
    (Nack.BLOCK, 0, 0, 10**6, 10**12, False),
    (Nack.BLOCK, 1, 1, 10**6, 10**12, False),  # limits belong to BLOCK_UNTIL
    (Nack.SKIP, 0, 0, 1, 0, True),
    (Nack.BLOCK_UNTIL, 0, 0, 10**6, 10**12, False),
    (Nack.BLOCK_UNTIL, 3, 0, 2, 10**12, False),
    (Nack.BLOCK_UNTIL, 3, 0, 3, 0, True),
    (Nack.BLOCK_UNTIL, 3, 0, 4, 0, True),
    (Nack.BLOCK_UNTIL, 0, 1_000, 10**6, 999, False),
    (Nack.BLOCK_UNTIL, 0, 1_000, 1, 1_000, True),
    (Nack.BLOCK_UNTIL, 3, 1_000, 2, 999, False),
    (Nack.BLOCK_UNTIL, 3, 1_000, 2, 1_000, True),
    (Nack.BLOCK_UNTIL, 3, 1_000, 3, 999, True),
])
def test_when_a_message_is_dead(nack: Nack, attempts_max: int, age_ms_max: int, attempts: int, age_ms: int,
                                dead: bool) -> None:
    """Blocking never gives up, skipping does at once, and blocking until a limit does exactly at the limit."""
    policy = Policy(nack=nack, attempts_max=attempts_max, age_ms_max=age_ms_max)
    assert (dead_reason(policy, attempts, age_ms) is not None) == dead


def test_the_reason_is_told() -> None:
    """The dead letter says which limit it met."""
    assert dead_reason(Policy(nack=Nack.SKIP), 1, 0) == "nack policy is skip"
    assert dead_reason(Policy(nack=Nack.BLOCK_UNTIL, attempts_max=3), 3, 0) == "3 attempts failed"
    assert dead_reason(Policy(nack=Nack.BLOCK_UNTIL, age_ms_max=5), 1, 7) == "older than 5 ms"


@pytest.mark.parametrize(("step", "ceiling"), [(0, 200), (1, 400), (2, 800), (8, 51_200), (9, 60_000), (10_000, 60_000)])
def test_backoff_doubles_up_to_its_cap(step: int, ceiling: int) -> None:
    """The ceiling doubles with every failure until the cap, for retries and for parking."""
    assert backoff_ms(POLICY, step, 0.0) == 1
    assert backoff_ms(POLICY, step, 0.5) == ceiling // 2
    assert backoff_ms(POLICY, step, ALMOST_ONE) in (ceiling - 1, ceiling)
    assert park_ms(POLICY, step, 0.0) == ceiling // 2
    assert park_ms(POLICY, step, ALMOST_ONE) in (ceiling - 1, ceiling)


@given(policy=POLICIES, step=STEP, jitter=JITTER)
def test_backoff_has_bounds(policy: Policy, step: int, jitter: float) -> None:
    """Whatever the step and the jitter, a wait is between 1 ms and the cap, and parking at least half of its ceiling."""
    ceiling = min(policy.backoff_cap_ms, policy.backoff_base_ms * 2**min(step, 64))
    assert 1 <= backoff_ms(policy, step, jitter) <= max(1, ceiling)
    assert max(1, ceiling // 2) <= park_ms(policy, step, jitter) <= max(1, ceiling)


@given(policy=POLICIES, step=STEP, low=JITTER, high=JITTER)
def test_more_jitter_never_waits_less(policy: Policy, step: int, low: float, high: float) -> None:
    """A wait grows with the jitter, so the waits of a uniform jitter are spread over the whole interval."""
    low, high = sorted((low, high))
    assert backoff_ms(policy, step, low) <= backoff_ms(policy, step, high)
    assert park_ms(policy, step, low) <= park_ms(policy, step, high)


def test_numbers_are_those_of_the_protocol() -> None:
    """Outcomes and nack policies have the numbers of the public protocol: both are written to disk."""
    from spillway.broker.core import entry
    from spillway.v1 import admin_service_pb2, queue_service_pb2
    for name in ("ACK", "RETRY", "THROTTLED", "DOWN", "REJECT", "RELEASE", "EXTEND"):
        assert queue_service_pb2.Outcome.Value(f"OUTCOME_{name}") == getattr(entry, name)
    for nack in Nack:
        assert admin_service_pb2.NackPolicy.Value(f"NACK_POLICY_{nack.name}") == nack
