"""Destinations, routes and their like between Python and the protocol."""
from __future__ import annotations

import enum
import re
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from spillway.client.errors import InternalError, InvalidArgument
from spillway.client.model import (
    AdaptiveLimit,
    DeadLetter,
    DeliveryPolicy,
    Destination,
    DestinationStats,
    Explanation,
    Gate,
    GateCause,
    HttpTarget,
    Limit,
    NackPolicy,
    PeekedMessage,
    Retention,
    Route,
    RouteTarget,
    StallCause,
    TenantPolicy,
    Token,
    TokenScope,
)
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1 import token_pb2

ACTIONS = {token_pb2.TOKEN_ACTION_PRODUCE: "produce", token_pb2.TOKEN_ACTION_LEASE: "lease", token_pb2.TOKEN_ACTION_ADMIN: "admin"}
DURATION_SECONDS_MAX = 315_576_000_000  # as google.protobuf.Duration has it

_NACK_POLICIES = frozenset(policy.value for policy in NackPolicy)  # later brokers may have others
E = TypeVar("E", bound=enum.Enum)

# The protocol's names of what is called or shaped otherwise in Python.
_NAMES = {"lease_duration": "lease_seconds", "lease_duration_max": "lease_seconds_max", "backoff.base": "backoff_base",
          "backoff.cap": "backoff_cap", "backoff.factor": "backoff_factor", "backoff.jitter": "backoff_jitter",
          "ordering": "ordered", "dead_letter_policy": "dead_letters_kept", "over_budget": "skip_over_budget"}


def python_field(field: str) -> str:
    """The path of a field of a request (`destination.policy.backoff.cap`) as Python has it (`destination.policy.backoff_cap`)."""
    parts = re.fullmatch(r"(destination\.policy\.|route\.targets\[\d+\]\.)(.+)", field)
    return field if parts is None else parts[1] + _NAMES.get(parts[2], parts[2])


# -- single values -----------------------------------------------------------------------------------------------


def duration(field: str, seconds: float) -> Duration:
    """Seconds as the protocol has them. Raises InvalidArgument."""
    if not isinstance(seconds, int | float):
        raise InvalidArgument(field, f"{seconds!r} is not a number of seconds")
    if not 0 <= seconds <= DURATION_SECONDS_MAX:  # nor NaN
        raise InvalidArgument(field, f"{seconds} s is negative" if seconds < 0 else f"{seconds} s is too long")
    out = Duration()
    out.FromMicroseconds(round(seconds * 1e6))
    return out


def count(field: str, value: int | None, bits: int = 32) -> int:
    """An unsigned number as the protocol has it, 0 for None. Raises InvalidArgument."""
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(field, f"{value!r} is not a whole number")
    if not 0 <= value < 1 << bits:
        raise InvalidArgument(field, f"{value} is negative" if value < 0 else f"{value} is too large")
    return value


def _number(field: str, value: float | None) -> float:
    if value is None:
        return 0.0
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidArgument(field, f"{value!r} is not a number")
    return float(value)


def moment(stamp: Timestamp) -> datetime:
    """A moment, in UTC. Raises InternalError for what is none."""
    try:
        return stamp.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise InternalError(f"the broker sent {stamp.seconds} s since 1970, which is no time") from None


def _moment_of(message: Any, name: str) -> datetime | None:
    return moment(getattr(message, name)) if message.HasField(name) else None


def _seconds_of(message: Any, name: str) -> float | None:
    if not message.HasField(name):
        return None
    found = getattr(message, name)
    return float(found.seconds + found.nanos / 1e9)


def _known(kind: type[E], value: int) -> E:
    """A value of an enumeration whose 0 stands for what later brokers send."""
    try:
        return kind(value)
    except ValueError:
        return kind(0)


# -- destinations ------------------------------------------------------------------------------------------------


def destination_to_pb(destination: Destination | str) -> pb.Destination:
    """What CreateDestination and UpdateDestination take. Raises InvalidArgument for what the protocol cannot carry; the
    broker checks ranges."""
    if isinstance(destination, str):
        return pb.Destination(name=destination)
    out = pb.Destination(name=destination.name, etag=destination.etag)
    _policy_to_pb(destination.policy, out.policy)
    if (http := destination.http) is not None:
        out.http.url = http.url
        out.http.concurrency_max = count("destination.http.concurrency_max", http.concurrency_max)
        out.http.headers.update(http.headers)
        out.http.signing_secrets.extend(http.signing_secrets)
        out.http.allow_private_addresses = http.allow_private_addresses
        out.http.redirects_max = count("destination.http.redirects_max", http.redirects_max)
        if http.timeout is not None:
            out.http.timeout.CopyFrom(duration("destination.http.timeout", http.timeout))
    return out


def _policy_to_pb(policy: DeliveryPolicy, out: pb.DeliveryPolicy) -> None:
    for field in ("run_messages_max", "attempts_max", "message_bytes_max"):
        setattr(out, field, count(f"destination.policy.{field}", getattr(policy, field)))
    out.weight = _number("destination.policy.weight", policy.weight)
    if policy.nack_policy is not None:
        out.nack_policy = pb.NackPolicy.ValueType(policy.nack_policy.value)
    if policy.ordered is not None:
        out.ordering = pb.ORDERING_ORDERED if policy.ordered else pb.ORDERING_UNORDERED
    if policy.dead_letters_kept is not None:
        out.dead_letter_policy = pb.DEAD_LETTER_POLICY_KEEP if policy.dead_letters_kept else pb.DEAD_LETTER_POLICY_DISCARD
    for seconds, message, name in (
            (policy.lease_seconds, out, "lease_duration"), (policy.lease_seconds_max, out, "lease_duration_max"),
            (policy.backoff_base, out.backoff, "base"), (policy.backoff_cap, out.backoff, "cap"),
            (policy.age_max, out, "age_max"), (policy.ttl, out, "ttl"), (policy.dedup_window, out, "dedup_window")):
        if seconds is not None:
            path = python_field(f"destination.policy.{name}" if message is out else f"destination.policy.backoff.{name}")
            getattr(message, name).CopyFrom(duration(path, seconds))
    out.backoff.factor = _number("destination.policy.backoff_factor", policy.backoff_factor)
    if policy.backoff_jitter is not None:
        out.backoff.jitter = _number("destination.policy.backoff_jitter", policy.backoff_jitter)
    for field in ("limit", "tenant_limit"):
        if (limit := getattr(policy, field)) is not None:
            _limit_to_pb(f"destination.policy.{field}", limit, getattr(out, field))
    for field in ("retention", "tenant_retention"):
        if (retention := getattr(policy, field)) is not None:
            _retention_to_pb(f"destination.policy.{field}", retention, getattr(out, field))
    if (adaptive := policy.adaptive_limit) is not None:
        out.adaptive_limit.disabled = adaptive.disabled
        out.adaptive_limit.floor = count("destination.policy.adaptive_limit.floor", adaptive.floor)
        out.adaptive_limit.pinned = count("destination.policy.adaptive_limit.pinned", adaptive.pinned)
    for tenant, own in policy.tenants.items():
        path = f'destination.policy.tenants["{tenant}"]'
        entry = out.tenants[tenant]
        entry.weight = _number(f"{path}.weight", own.weight)
        if own.limit is not None:
            _limit_to_pb(f"{path}.limit", own.limit, entry.limit)
        if own.retention is not None:
            _retention_to_pb(f"{path}.retention", own.retention, entry.retention)


def _limit_to_pb(path: str, limit: Limit, out: pb.Limit) -> None:
    out.SetInParent()  # an unlimited one stands instead of the others', too
    out.messages_per_second = _number(f"{path}.messages_per_second", limit.messages_per_second)
    out.burst = count(f"{path}.burst", limit.burst)
    out.leases_max = count(f"{path}.leases_max", limit.leases_max)


def _retention_to_pb(path: str, retention: Retention, out: pb.Retention) -> None:
    out.SetInParent()
    out.bytes_max = count(f"{path}.bytes_max", retention.bytes_max, 64)
    if retention.age_max is not None:
        out.age_max.CopyFrom(duration(f"{path}.age_max", retention.age_max))


def destination_from_pb(found: pb.Destination) -> Destination:
    """A destination as the broker sent it."""
    http = None
    if found.HasField("http"):
        http = HttpTarget(
            found.http.url, _seconds_of(found.http, "timeout"), found.http.concurrency_max or None, dict(found.http.headers),
            tuple(found.http.signing_secrets), found.http.allow_private_addresses, found.http.redirects_max or None)
    return Destination(found.name, _policy_from_pb(found.policy), http, found.etag)


def _policy_from_pb(p: pb.DeliveryPolicy) -> DeliveryPolicy:
    return DeliveryPolicy(
        run_messages_max=p.run_messages_max or None,
        lease_seconds=_seconds_of(p, "lease_duration"),
        backoff_base=_seconds_of(p.backoff, "base"),
        backoff_cap=_seconds_of(p.backoff, "cap"),
        nack_policy=NackPolicy(p.nack_policy) if p.nack_policy in _NACK_POLICIES else None,
        attempts_max=p.attempts_max or None,
        age_max=_seconds_of(p, "age_max"),
        ordered=p.ordering == pb.ORDERING_ORDERED if p.ordering else None,
        lease_seconds_max=_seconds_of(p, "lease_duration_max"),
        dead_letters_kept=p.dead_letter_policy == pb.DEAD_LETTER_POLICY_KEEP if p.dead_letter_policy else None,
        ttl=_seconds_of(p, "ttl"),
        message_bytes_max=p.message_bytes_max or None,
        limit=_limit_from_pb(p, "limit"),
        tenant_limit=_limit_from_pb(p, "tenant_limit"),
        retention=_retention_from_pb(p, "retention"),
        tenant_retention=_retention_from_pb(p, "tenant_retention"),
        weight=p.weight or None,
        tenants={tenant: TenantPolicy(own.weight or None, _limit_from_pb(own, "limit"), _retention_from_pb(own, "retention"))
                 for tenant, own in sorted(p.tenants.items())},
        adaptive_limit=AdaptiveLimit(p.adaptive_limit.disabled, p.adaptive_limit.floor or None, p.adaptive_limit.pinned or None)
        if p.HasField("adaptive_limit") else None,
        dedup_window=_seconds_of(p, "dedup_window"),
        backoff_factor=p.backoff.factor or None,
        backoff_jitter=p.backoff.jitter if p.backoff.HasField("jitter") else None)


def _limit_from_pb(message: pb.DeliveryPolicy | pb.TenantPolicy, name: Any) -> Limit | None:
    if not message.HasField(name):
        return None
    found: pb.Limit = getattr(message, name)
    return Limit(found.messages_per_second or None, found.burst or None, found.leases_max or None)


def _retention_from_pb(message: pb.DeliveryPolicy | pb.TenantPolicy, name: Any) -> Retention | None:
    if not message.HasField(name):
        return None
    found: pb.Retention = getattr(message, name)
    return Retention(found.bytes_max or None, _seconds_of(found, "age_max"))


# -- routes ------------------------------------------------------------------------------------------------------


def route_to_pb(route: Route) -> pb.Route:
    """What CreateRoute and UpdateRoute take."""
    return pb.Route(source=route.source, etag=route.etag, targets=[
        pb.RouteTarget(destination=target.destination, filter=target.filter,
                       over_budget=pb.OVER_BUDGET_SKIP if target.skip_over_budget else pb.OVER_BUDGET_REFUSE)
        for target in route.targets])


def token_from_pb(token: token_pb2.Token) -> Token:
    """A token."""
    scopes = tuple(TokenScope(ACTIONS.get(s.action, str(s.action)), s.destinations, s.tenants) for s in token.scopes)
    limits = token.limits
    return Token(token.token_id, token.name, scopes, token.create_time.ToDatetime(UTC),
                       token.expire_time.ToDatetime(UTC) if token.HasField("expire_time") else None,
                       limits.streams_max, limits.messages_per_second, limits.bytes_in_flight_max)


def scope_to_pb(scope: TokenScope) -> token_pb2.TokenScope:
    """A scope. Raises InvalidArgument for an action that is none."""
    action = next((number for number, name in ACTIONS.items() if name == scope.action), None)
    if action is None:
        raise InvalidArgument("scopes", f"{scope.action!r} is none of {', '.join(ACTIONS.values())}")
    tenants = None if scope.tenants == "*" else scope.tenants
    return token_pb2.TokenScope(action=action, destinations=scope.destinations, tenants=tenants)


def route_from_pb(found: pb.Route) -> Route:
    """A route as the broker sent it."""
    return Route(found.source, tuple(
        RouteTarget(target.destination, target.filter, target.over_budget == pb.OVER_BUDGET_SKIP)
        for target in found.targets), found.etag)


# -- what is only read -------------------------------------------------------------------------------------------


def stats_from_pb(response: pb.GetDestinationStatsResponse) -> DestinationStats:
    """Counts as the broker sent them."""
    stats = response.stats
    plain = {field.name: getattr(stats, field.name) for field in stats.DESCRIPTOR.fields
             if field.message_type is None and field.name in DestinationStats.__dataclass_fields__}
    return DestinationStats(**plain, oldest_enqueue_time=_moment_of(stats, "oldest_enqueue_time"),
                            parked_until_time=_moment_of(stats, "parked_until_time"),
                            shards_missing=tuple(response.shards_missing))


def dead_letter_from_pb(one: pb.DeadLetter) -> DeadLetter:
    """A dead letter as the broker sent it."""
    return DeadLetter(
        shard=one.shard, sequence=one.sequence, destination=one.destination, tenant=one.tenant, key=one.key,
        attempts=one.attempts, reason=one.reason, enqueue_time=moment(one.enqueue_time), dead_time=moment(one.dead_time),
        id=one.message.id, headers=dict(one.message.headers), payload=one.message.payload)


def gate_from_pb(one: pb.Gate) -> Gate:
    """A closed gate as the broker sent it."""
    return Gate(one.tenant if one.HasField("tenant") else None, _known(GateCause, one.cause), _moment_of(one, "until_time"),
                one.step, one.reason)


def explanation_from_pb(one: pb.ExplainResponse) -> Explanation:
    """An explanation as the broker sent it."""
    return Explanation(one.sentence, _known(StallCause, one.cause), _moment_of(one, "until_time"), one.messages,
                       _moment_of(one, "drain_time"))


def peeked_from_pb(one: pb.PeekedMessage) -> PeekedMessage:
    """A waiting message as the broker sent it."""
    return PeekedMessage(one.sequence, moment(one.enqueue_time), _moment_of(one, "deliver_time"),
                         _moment_of(one, "expire_time"), one.attempts, one.leased, one.message.id,
                         dict(one.message.headers), one.message.payload)
