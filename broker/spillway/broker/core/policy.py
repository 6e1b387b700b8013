"""Decisions that a destination's policy makes. The leader evaluates them and logs the result, so replicas never
need the policy: they apply what was decided."""
from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from spillway.broker.core.bounds import Count, Number, Rate, Time, Weight


class Nack(enum.IntEnum):
    """What happens to a message that was nacked; numbers as in the public protocol."""

    BLOCK = 1
    BLOCK_UNTIL = 2
    SKIP = 3


class Limit(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """How fast and how much at a time. Zeros: unlimited."""

    per_second: Rate = 0.0  # messages
    burst: Count = 0  # messages at once after a rest; 0: what a second gives, at least 1
    leases_max: Count = 0


class Retention(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What may wait before producers are pushed back. Zeros: unlimited."""

    bytes_max: Number = 0
    age_ms_max: Time = 0


class TenantPolicy(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A tenant that differs from the others of its destination."""

    weight: Weight = 1.0
    limit: Limit | None = None  # None: as all tenants
    retention: Retention | None = None


class Adaptive(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Bounds of the limit that follows how a destination fares."""

    disabled: bool = False
    floor: Count = 1
    pinned: Count = 0  # 0: adapts


UNLIMITED = Limit()
UNBOUNDED = Retention()


class Policy(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """How a destination's messages are kept, leased and retried. Times in milliseconds."""

    run_messages_max: Count = 64  # long enough to amortise a lease, short enough that a retry blocks little
    lease_ms: Time = 30_000
    backoff_base_ms: Time = 200
    backoff_cap_ms: Time = 60_000
    nack: Nack = Nack.BLOCK
    attempts_max: Count = 0  # BLOCK_UNTIL only; 0: no limit
    age_ms_max: Time = 0  # BLOCK_UNTIL only; 0: no limit
    backoff_factor: Annotated[float, msgspec.Meta(ge=1.0, le=1e9)] = 2.0
    jitter: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 1.0  # part of a waiting time that is drawn at random
    ordered: bool = True
    lease_ms_max: Time = 12 * 3_600_000
    discard: bool = False  # instead of keeping dead letters
    ttl_ms: Time = 0  # 0: for ever
    message_bytes_max: Count = 0  # 0: the node's
    limit: Limit = UNLIMITED
    tenant_limit: Limit = UNLIMITED
    retention: Retention = UNBOUNDED
    tenant_retention: Retention = UNBOUNDED
    weight: Weight = 1.0
    tenants: dict[str, TenantPolicy] = {}
    adaptive: Adaptive = Adaptive()
    dedup_ms: Time = 600_000


def _ceiling(policy: Policy, step: int) -> int:
    try:
        return min(policy.backoff_cap_ms, int(policy.backoff_base_ms * policy.backoff_factor ** min(step, 64)))
    except OverflowError:
        return policy.backoff_cap_ms


def backoff_ms(policy: Policy, step: int, random: float) -> int:
    """Exponential backoff with jitter (Brooker, AWS Architecture Blog 2015): min(cap, base * factor^step), of which the
    policy's jitter is drawn at random (1: uniform in [0, that]); at least 1 ms. `random` is in [0, 1), drawn by the caller."""
    return max(1, int(_ceiling(policy, step) * (1 - policy.jitter * (1 - random))))


def park_ms(policy: Policy, step: int, random: float) -> int:
    """How long a gate stays closed the `step`-th time in a row: growing, never below half of the ceiling, so
    that a dead destination is probed and not hammered."""
    return max(1, int(_ceiling(policy, step) * (1 + random) / 2))


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


def tenant_limit(policy: Policy, tenant: str) -> Limit:
    """The limit of one tenant."""
    own = policy.tenants.get(tenant)
    return own.limit if own is not None and own.limit is not None else policy.tenant_limit


def tenant_retention(policy: Policy, tenant: str) -> Retention:
    """The budget of one tenant."""
    own = policy.tenants.get(tenant)
    return own.retention if own is not None and own.retention is not None else policy.tenant_retention
