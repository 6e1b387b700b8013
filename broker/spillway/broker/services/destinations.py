"""Destinations as the protocol has them and as they are stored: what is filled in, what is refused and with which field."""
from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from spillway.broker.core import directory as d
from spillway.broker.core.policy import UNBOUNDED, UNLIMITED, Adaptive, Limit, Nack, Policy, Retention, TenantPolicy
from spillway.broker.errors import RequestError
from spillway.broker.services.names import check_destination, check_name, duration_ms
from spillway.contract.limits import (
    HEADERS_BYTES_MAX,
    LEASE_MS_MAX,
    LEASE_MS_MIN,
    PAYLOAD_BYTES_MAX,
    RUN_MESSAGES_MAX,
    TTL_MS_MAX,
)
from spillway.v1 import admin_service_pb2 as pb

SECOND_MS, HOUR_MS, DAY_MS = 1000, 3_600_000, 86_400_000
AGE_MS_MAX = TTL_MS_MAX
DEDUP_MS_MAX = 7 * DAY_MS  # each id costs a row for this long
ATTEMPTS_MAX = 1000
TENANTS_MAX = 1000  # a destination stays well below what one entry of the log takes
MESSAGE_OVERHEAD_MAX = HEADERS_BYTES_MAX + 1024  # of a message besides its payload: headers, id, framing
URL_BYTES_MAX = 2048
HEADERS_MAX, TARGET_HEADERS_BYTES_MAX = 64, 8 << 10
SECRETS_MAX = 4
SECRET_PREFIX = "whsec_"  # noqa: S105 - as Standard Webhooks has it, no secret by itself
# Names (lower case) that the dispatcher sets, or that concern the connection and would make requests ambiguous.
RESERVED_HEADERS = frozenset((
    "connection", "content-length", "content-type", "expect", "host", "http2-settings", "keep-alive", "proxy-authenticate",
    "proxy-authorization", "proxy-connection", "te", "trailer", "trailers", "transfer-encoding", "upgrade", "user-agent"))
RESERVED_PREFIXES = ("spillway-", "webhook-")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", re.ASCII)  # RFC 9110 5.6.2
_VALUE = re.compile(r"(?:[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?)?", re.ASCII)  # RFC 9110 5.5, without obs-text and tabs


def parse_destination(message: pb.Destination, payload_bytes_max: int = PAYLOAD_BYTES_MAX) -> d.Destination:
    """A destination as callers send it, defaults filled in. `payload_bytes_max` is the node's limit, which bounds
    `message_bytes_max`. Raises RequestError naming the field."""
    check_destination("destination.name", message.name)
    policy = _parse_policy("destination.policy", message.policy, payload_bytes_max + MESSAGE_OVERHEAD_MAX)
    return d.destination(message.name, policy,
                         _parse_http("destination.http", message.http) if message.HasField("http") else None)


def _parse_policy(field: str, p: pb.DeliveryPolicy, message_bytes_max: int) -> Policy:
    default = Policy()
    lease = _duration(field, p, "lease_duration", LEASE_MS_MIN, LEASE_MS_MAX, default.lease_ms)
    base = _duration(f"{field}.backoff", p.backoff, "base", 1, HOUR_MS, default.backoff_base_ms)
    nack = Nack(_choice(f"{field}.nack_policy", p.nack_policy, pb.NackPolicy, "a nack policy", Nack.BLOCK))
    attempts = _count(f"{field}.attempts_max", p.attempts_max, ATTEMPTS_MAX)
    age = _duration(field, p, "age_max", 1, AGE_MS_MAX, 0)
    if nack is Nack.BLOCK_UNTIL and not attempts and not age:
        raise RequestError(f"{field}.attempts_max", "BLOCK_UNTIL needs attempts_max or age_max")
    if nack is not Nack.BLOCK_UNTIL and (attempts or age):
        raise RequestError(f"{field}.nack_policy", "attempts_max and age_max are for BLOCK_UNTIL only")
    limit = _parse_limit(f"{field}.limit", p.limit)
    jitter = default.jitter
    if p.backoff.HasField("jitter"):
        jitter = _number(f"{field}.backoff.jitter", p.backoff.jitter, 0.0, 1.0)
    return Policy(
        run_messages_max=_count(f"{field}.run_messages_max", p.run_messages_max, RUN_MESSAGES_MAX) or default.run_messages_max,
        lease_ms=lease,
        backoff_base_ms=base,
        backoff_cap_ms=_duration(f"{field}.backoff", p.backoff, "cap", base, DAY_MS, max(base, default.backoff_cap_ms)),
        nack=nack,
        attempts_max=attempts,
        age_ms_max=age,
        backoff_factor=_number_or(f"{field}.backoff.factor", p.backoff.factor, 1.0, 10.0, default.backoff_factor),
        jitter=jitter,
        ordered=_choice(f"{field}.ordering", p.ordering, pb.Ordering, "an ordering",
                        pb.ORDERING_ORDERED) == pb.ORDERING_ORDERED,
        lease_ms_max=_duration(field, p, "lease_duration_max", lease, LEASE_MS_MAX, default.lease_ms_max),
        discard=_choice(f"{field}.dead_letter_policy", p.dead_letter_policy, pb.DeadLetterPolicy, "a dead letter policy",
                        pb.DEAD_LETTER_POLICY_KEEP) == pb.DEAD_LETTER_POLICY_DISCARD,
        ttl_ms=_duration(field, p, "ttl", SECOND_MS, TTL_MS_MAX, 0),
        message_bytes_max=_count(f"{field}.message_bytes_max", p.message_bytes_max, message_bytes_max),
        limit=limit,
        tenant_limit=_parse_limit(f"{field}.tenant_limit", p.tenant_limit),
        retention=_parse_retention(f"{field}.retention", p.retention),
        tenant_retention=_parse_retention(f"{field}.tenant_retention", p.tenant_retention),
        weight=_weight(f"{field}.weight", p.weight),
        tenants=_parse_tenants(f"{field}.tenants", p.tenants),
        adaptive=_parse_adaptive(f"{field}.adaptive_limit", p.adaptive_limit, limit),
        dedup_ms=_duration(field, p, "dedup_window", SECOND_MS, DEDUP_MS_MAX, default.dedup_ms))


def _parse_limit(field: str, limit: pb.Limit) -> Limit:
    rate = _number_or(f"{field}.messages_per_second", limit.messages_per_second, 0.01, 1_000_000.0, 0.0)
    if limit.burst and not rate:
        raise RequestError(f"{field}.burst", "needs messages_per_second")
    return Limit(rate, limit.burst, limit.leases_max)


def _parse_retention(field: str, retention: pb.Retention) -> Retention:
    return Retention(retention.bytes_max, _duration(field, retention, "age_max", SECOND_MS, AGE_MS_MAX, 0))


def _parse_tenants(field: str, tenants: Mapping[str, pb.TenantPolicy]) -> dict[str, TenantPolicy]:
    if len(tenants) > TENANTS_MAX:
        raise RequestError(field, f"has {len(tenants)} tenants; at most {TENANTS_MAX}")
    found = {}
    for name in sorted(tenants):  # a map has no order: so the same destination is always stored as the same bytes
        own = tenants[name]
        path = _entry(field, name)
        check_name(path, name, empty=True)
        found[name] = TenantPolicy(
            _weight(f"{path}.weight", own.weight),
            _parse_limit(f"{path}.limit", own.limit) if own.HasField("limit") else None,
            _parse_retention(f"{path}.retention", own.retention) if own.HasField("retention") else None)
    return found


def _parse_adaptive(field: str, adaptive: pb.AdaptiveLimit, limit: Limit) -> Adaptive:
    floor = _count(f"{field}.floor", adaptive.floor, 1024)
    most = limit.leases_max
    if adaptive.pinned and floor > adaptive.pinned:
        raise RequestError(f"{field}.floor", f"is {floor}, more than pinned ({adaptive.pinned})")
    if most and floor > most:
        raise RequestError(f"{field}.floor", f"is {floor}, more than limit.leases_max ({most})")
    if most and adaptive.pinned > most:
        raise RequestError(f"{field}.pinned", f"is {adaptive.pinned}, more than limit.leases_max ({most})")
    return Adaptive(adaptive.disabled, floor or Adaptive().floor, adaptive.pinned)


def _parse_http(field: str, http: pb.HttpTarget) -> d.HttpTarget:
    default = d.HttpTarget("")
    has_credentials = _check_url(f"{field}.url", http.url)
    timeout = _duration(field, http, "timeout", 100, 600_000, default.timeout_ms)
    concurrency = _count(f"{field}.concurrency_max", http.concurrency_max, 1024)
    headers = _parse_headers(f"{field}.headers", http.headers, has_credentials)
    secrets = _parse_secrets(f"{field}.signing_secrets", http.signing_secrets)
    return d.HttpTarget(http.url, timeout, concurrency or default.concurrency_max, headers, secrets,
                        http.allow_private_addresses, _count(f"{field}.redirects_max", http.redirects_max, 5))


def _check_url(field: str, url: str) -> bool:
    """Whether a URL has a user or password. Raises RequestError unless it can be called."""
    if len(url.encode()) > URL_BYTES_MAX:
        raise RequestError(field, f"has more than {URL_BYTES_MAX} bytes")
    try:
        parts = urlsplit(url)
        if (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
                and " " not in url):
            return "@" in parts.netloc
    except ValueError:
        pass
    shown = url if len(url) <= 100 else url[:100] + "…"  # an error must fit the trailers of an answer
    raise RequestError(field, f"{shown!r} is not an http:// or https:// URL")


def _parse_headers(field: str, headers: Mapping[str, str], has_credentials: bool) -> dict[str, str]:
    """Values may be secrets: no error repeats one."""
    if len(headers) > HEADERS_MAX:
        raise RequestError(field, f"has {len(headers)} headers; at most {HEADERS_MAX}")
    size = sum(len(name.encode()) + len(value.encode()) for name, value in headers.items())
    if size > TARGET_HEADERS_BYTES_MAX:
        raise RequestError(field, f"has {size} bytes of names and values; at most {TARGET_HEADERS_BYTES_MAX}")
    seen: dict[str, str] = {}
    for name in sorted(headers):
        path = _entry(field, name)
        lower = name.lower()
        if not _TOKEN.fullmatch(name):
            raise RequestError(path, "is not the name of an HTTP header: letters, digits and !#$%&'*+-.^_`|~")
        if lower in RESERVED_HEADERS or lower.startswith(RESERVED_PREFIXES):
            raise RequestError(path, "is set by the dispatcher")
        if lower in seen:
            raise RequestError(path, f"is there twice: {seen[lower]!r} differs in case only")
        if lower == "authorization" and has_credentials:
            raise RequestError(path, "contradicts the URL, which has credentials, too")
        if not _VALUE.fullmatch(headers[name]):
            raise RequestError(path, "has a value that is not printable ASCII, or that begins or ends with a space")
        seen[lower] = name
    return {name: headers[name] for name in sorted(headers)}


def _parse_secrets(field: str, secrets: Sequence[str]) -> tuple[str, ...]:
    """No error repeats a secret."""
    if len(secrets) > SECRETS_MAX:
        raise RequestError(field, f"has {len(secrets)} secrets; at most {SECRETS_MAX}")
    for number, secret in enumerate(secrets):
        path = f"{field}[{number}]"
        try:
            key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not secret.startswith(SECRET_PREFIX) or not 24 <= len(key) <= 64:
            raise RequestError(path, f"is not {SECRET_PREFIX!r} and base64 of 24 to 64 bytes")
        if secret in secrets[:number]:
            raise RequestError(path, "is there twice")
    return tuple(secrets)


def _entry(field: str, key: str) -> str:
    """The path of an entry of a map."""
    return f"{field}[{json.dumps(key if len(key) <= 255 else key[:64] + '…', ensure_ascii=False)}]"


def _count(field: str, value: int, most: int) -> int:
    if value > most:
        raise RequestError(field, f"is {value}; at most {most}")
    return value


def _number(field: str, value: float, least: float, most: float, or_zero: str = "") -> float:
    if not least <= value <= most:  # nor is NaN
        raise RequestError(field, f"is {value:g}; it must be {least:g} to {most:.15g}{or_zero}")
    return value


def _number_or(field: str, value: float, least: float, most: float, default: float) -> float:
    """A number of which 0 takes the default."""
    return _number(field, value, least, most, f", or 0 for {default:g}" if default else ", or 0") if value else default


def _weight(field: str, value: float) -> float:
    return _number_or(field, value, 0.01, 100.0, 1.0)


def _duration(field: str, message: Any, name: str, least: int, most: int, default: int) -> int:
    """A duration of a message in milliseconds, the default if it is unset."""
    return duration_ms(f"{field}.{name}", getattr(message, name), least, most) if message.HasField(name) else default


def _choice(field: str, value: int, choices: Any, what: str, default: int) -> int:
    """A value of an enumeration, of which 0 takes the default."""
    if value not in choices.values():
        raise RequestError(field, f"{value} is not {what}")
    return value or default


def destination_proto(stored: d.Destination, secrets: bool = True) -> pb.Destination:
    """A stored destination as the protocol's message, with or without its signing secrets."""
    message = pb.Destination(name=stored.name, etag=str(stored.revision), policy=_policy_proto(stored.policy))
    if (http := stored.http) is not None:
        message.http.url = http.url
        message.http.timeout.FromMilliseconds(http.timeout_ms)
        message.http.concurrency_max = http.concurrency_max
        message.http.headers.update(http.headers)
        if secrets:
            message.http.signing_secrets.extend(http.signing_secrets)
        message.http.allow_private_addresses = http.allow_private_addresses
        message.http.redirects_max = http.redirects_max
    return message


def _policy_proto(policy: Policy) -> pb.DeliveryPolicy:
    p = pb.DeliveryPolicy(
        run_messages_max=policy.run_messages_max,
        nack_policy=policy.nack,  # type: ignore[arg-type]
        attempts_max=policy.attempts_max,
        ordering=pb.ORDERING_ORDERED if policy.ordered else pb.ORDERING_UNORDERED,
        dead_letter_policy=pb.DEAD_LETTER_POLICY_DISCARD if policy.discard else pb.DEAD_LETTER_POLICY_KEEP,
        message_bytes_max=policy.message_bytes_max,
        weight=policy.weight,
        backoff=pb.Backoff(factor=policy.backoff_factor, jitter=policy.jitter),
        adaptive_limit=pb.AdaptiveLimit(
            disabled=policy.adaptive.disabled, floor=policy.adaptive.floor, pinned=policy.adaptive.pinned))
    p.lease_duration.FromMilliseconds(policy.lease_ms)
    p.lease_duration_max.FromMilliseconds(policy.lease_ms_max)
    p.backoff.base.FromMilliseconds(policy.backoff_base_ms)
    p.backoff.cap.FromMilliseconds(policy.backoff_cap_ms)
    p.dedup_window.FromMilliseconds(policy.dedup_ms)
    if policy.age_ms_max:
        p.age_max.FromMilliseconds(policy.age_ms_max)
    if policy.ttl_ms:
        p.ttl.FromMilliseconds(policy.ttl_ms)
    for limit, to in ((policy.limit, p.limit), (policy.tenant_limit, p.tenant_limit)):
        if limit != UNLIMITED:
            to.CopyFrom(_limit_proto(limit))
    for retention, into in ((policy.retention, p.retention), (policy.tenant_retention, p.tenant_retention)):
        if retention != UNBOUNDED:
            into.CopyFrom(_retention_proto(retention))
    for name, own in policy.tenants.items():
        entry = p.tenants[name]
        entry.weight = own.weight
        if own.limit is not None:  # an unlimited one differs from none: it stands instead of the others'
            entry.limit.CopyFrom(_limit_proto(own.limit))
        if own.retention is not None:
            entry.retention.CopyFrom(_retention_proto(own.retention))
    return p


def _limit_proto(limit: Limit) -> pb.Limit:
    return pb.Limit(messages_per_second=limit.per_second, burst=limit.burst, leases_max=limit.leases_max)


def _retention_proto(retention: Retention) -> pb.Retention:
    message = pb.Retention(bytes_max=retention.bytes_max)
    if retention.age_ms_max:
        message.age_max.FromMilliseconds(retention.age_ms_max)
    return message
