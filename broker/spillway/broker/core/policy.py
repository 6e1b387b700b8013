"""Decisions that a destination's policy makes. The leader evaluates them and logs the result, so replicas never
need the policy: they apply what was decided."""
from __future__ import annotations

import enum
from dataclasses import dataclass


class Nack(enum.IntEnum):
    """What happens to a message that was nacked; numbers as in the public protocol."""

    BLOCK = 1
    BLOCK_UNTIL = 2
    SKIP = 3


@dataclass(frozen=True, slots=True)
class Policy:
    """How a destination's messages are leased and retried. Times in milliseconds."""

    run_messages_max: int = 64  # long enough to amortise a lease, short enough that a retry blocks little
    lease_ms: int = 30_000
    backoff_base_ms: int = 200
    backoff_cap_ms: int = 60_000
    nack: Nack = Nack.BLOCK
    attempts_max: int = 0  # BLOCK_UNTIL only; 0: no limit
    age_ms_max: int = 0  # BLOCK_UNTIL only; 0: no limit


def backoff_ms(policy: Policy, step: int, jitter: float) -> int:
    """Exponential backoff with full jitter (Brooker, AWS Architecture Blog 2015): uniform in
    [0, min(cap, base * 2^step)], at least 1 ms. `jitter` is in [0, 1), drawn by the caller."""
    ceiling = min(policy.backoff_cap_ms, policy.backoff_base_ms << min(step, 40))
    return max(1, int(ceiling * jitter))


def park_ms(policy: Policy, step: int, jitter: float) -> int:
    """How long a gate stays closed the `step`-th time in a row: doubling, never below half of the ceiling, so
    that a dead destination is probed and not hammered."""
    ceiling = min(policy.backoff_cap_ms, policy.backoff_base_ms << min(step, 40))
    return max(1, int(ceiling * (1 + jitter) / 2))


def dead_reason(policy: Policy, attempts: int, age_ms: int) -> str | None:
    """Why a message must go to the dead letters after its `attempts`-th failure, or None to retry it."""
    if policy.nack is Nack.SKIP:
        return "nack policy is skip"
    if policy.nack is Nack.BLOCK_UNTIL:
        if policy.attempts_max and attempts >= policy.attempts_max:
            return f"{attempts} attempts failed"
        if policy.age_ms_max and age_ms >= policy.age_ms_max:
            return f"older than {policy.age_ms_max} ms"
    return None
