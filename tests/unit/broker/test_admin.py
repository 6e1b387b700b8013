"""Destinations as callers send them: what is filled in, what is refused and with which field."""
from __future__ import annotations

import base64
import math
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from spillway.broker.core.policy import Adaptive, Limit, Nack, Policy, Retention, TenantPolicy
from spillway.broker.errors import RequestError
from spillway.broker.services.destinations import RESERVED_HEADERS, destination_proto, parse_destination
from spillway.broker.services.names import parse_etag
from spillway.client.dispatcher.headers import CONNECTION_HEADERS
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1.admin_service_pb2 import (
    DEAD_LETTER_POLICY_DISCARD,
    DEAD_LETTER_POLICY_KEEP,
    NACK_POLICY_BLOCK,
    NACK_POLICY_BLOCK_UNTIL,
    NACK_POLICY_SKIP,
    ORDERING_ORDERED,
    ORDERING_UNORDERED,
    AdaptiveLimit,
    Backoff,
    DeliveryPolicy,
    Destination,
    HttpTarget,
)

HOUR = 3600
DAY = 24 * HOUR
NAN, INF = math.nan, math.inf


def secret(size: int, fill: int = 0) -> str:
    """A signing secret of so many bytes."""
    return "whsec_" + base64.b64encode(bytes([fill]) * size).decode()


def ms(value: int) -> Duration:
    """A duration of milliseconds."""
    duration = Duration()
    duration.FromMilliseconds(value)
    return duration


def policy(**fields: Any) -> dict[str, Any]:
    """Fields of a destination with a policy."""
    return {"policy": DeliveryPolicy(**fields)}


def http(url: str = "http://host/", **fields: Any) -> dict[str, Any]:
    """Fields of a destination with an HTTP target."""
    return {"http": HttpTarget(url=url, **fields)}


def backoff(**fields: Any) -> dict[str, Any]:
    """Fields of a destination with a backoff."""
    return policy(backoff=Backoff(**fields))


def limit(**fields: Any) -> dict[str, Any]:
    """Fields of a destination with a limit."""
    return policy(limit=pb.Limit(**fields))


def tenant(name: str = "acme", **fields: Any) -> dict[str, Any]:
    """Fields of a destination with a tenant of its own."""
    return policy(tenants={name: pb.TenantPolicy(**fields)})


def header(name: str, value: str = "v", url: str = "http://host/") -> dict[str, Any]:
    """Fields of a destination with an HTTP target and a header."""
    return http(url, headers={name: value})


@pytest.mark.parametrize(("fields", "field", "says"), [
    ({"name": ""}, "name", "must not be empty"),
    ({"name": "n" * 256}, "name", "at most 255"),
    ({"name": "a\tb"}, "name", "control character"),
    ({"name": "a*"}, "name", "patterns are for Lease only"),
    (policy(run_messages_max=1025), "policy.run_messages_max", "is 1025; at most 1024"),
    (policy(lease_duration=Duration()), "policy.lease_duration", "it must be 1 s to 43200 s"),
    (policy(lease_duration=ms(999)), "policy.lease_duration", "is 0.999 s"),
    (policy(lease_duration=Duration(seconds=12 * HOUR, nanos=1)), "policy.lease_duration", "to 43200 s"),
    (policy(lease_duration=Duration(seconds=-1)), "policy.lease_duration", "must not be negative"),
    (policy(backoff=Backoff(base=Duration())), "policy.backoff.base", "it must be 0.001 s to 3600 s"),
    (policy(backoff=Backoff(base=Duration(seconds=HOUR, nanos=1))), "policy.backoff.base", "to 3600 s"),
    (policy(backoff=Backoff(cap=ms(199))), "policy.backoff.cap", "it must be 0.2 s to 86400 s"),
    (policy(backoff=Backoff(base=ms(500), cap=ms(499))), "policy.backoff.cap", "it must be 0.5 s to 86400 s"),
    (policy(backoff=Backoff(cap=Duration(seconds=24 * HOUR + 1))), "policy.backoff.cap", "to 86400 s"),
    (policy(nack_policy=9), "policy.nack_policy", "9 is not a nack policy"),
    (policy(nack_policy=-1), "policy.nack_policy", "-1 is not a nack policy"),
    (policy(nack_policy=NACK_POLICY_BLOCK_UNTIL), "policy.attempts_max", "needs attempts_max or age_max"),
    (policy(nack_policy=NACK_POLICY_BLOCK_UNTIL, attempts_max=1001), "policy.attempts_max", "is 1001; at most 1000"),
    (policy(nack_policy=NACK_POLICY_BLOCK_UNTIL, age_max=Duration()), "policy.age_max", "it must be 0.001 s"),
    (policy(nack_policy=NACK_POLICY_BLOCK_UNTIL, age_max=Duration(seconds=367 * 24 * HOUR)), "policy.age_max", "s to"),
    (policy(attempts_max=3), "policy.nack_policy", "for BLOCK_UNTIL only"),
    (policy(nack_policy=NACK_POLICY_BLOCK, age_max=ms(1)), "policy.nack_policy", "for BLOCK_UNTIL only"),
    (policy(nack_policy=NACK_POLICY_SKIP, attempts_max=3), "policy.nack_policy", "for BLOCK_UNTIL only"),
    (http(""), "http.url", "is not an http:// or https:// URL"),
    (http("host/path"), "http.url", "is not an http:// or https:// URL"),
    (http("ftp://host/"), "http.url", "is not an http:// or https:// URL"),
    (http("http://"), "http.url", "is not an http:// or https:// URL"),
    (http("http://host:port/"), "http.url", "is not an http:// or https:// URL"),
    (http("http://host:65536/"), "http.url", "is not an http:// or https:// URL"),
    (http("http://host:0/"), "http.url", "is not an http:// or https:// URL"),
    (http("http://[::1/"), "http.url", "is not an http:// or https:// URL"),
    (http("http://host/a b"), "http.url", "is not an http:// or https:// URL"),
    (http("http://host/a\nb"), "http.url", "is not an http:// or https:// URL"),
    (http("http://host/" + "x" * 2048), "http.url", "more than 2048 bytes"),
    (http(timeout=ms(99)), "http.timeout", "it must be 0.1 s to 600 s"),
    (http(timeout=Duration(seconds=601)), "http.timeout", "is 601 s"),
    (http(concurrency_max=1025), "http.concurrency_max", "is 1025; at most 1024"),
    (policy(ordering=3), "policy.ordering", "3 is not an ordering"),
    (policy(ordering=-1), "policy.ordering", "-1 is not an ordering"),
    (policy(dead_letter_policy=3), "policy.dead_letter_policy", "3 is not a dead letter policy"),
    (policy(lease_duration_max=ms(29_999)), "policy.lease_duration_max", "is 29.999 s; it must be 30 s to 43200 s"),
    (policy(lease_duration=ms(2000), lease_duration_max=ms(1999)), "policy.lease_duration_max", "it must be 2 s to 43200 s"),
    (policy(lease_duration_max=Duration(seconds=12 * HOUR, nanos=1)), "policy.lease_duration_max", "to 43200 s"),
    (policy(ttl=ms(999)), "policy.ttl", "is 0.999 s; it must be 1 s to 31622400 s"),
    (policy(ttl=Duration(seconds=366 * DAY, nanos=1)), "policy.ttl", "it must be 1 s"),
    (policy(message_bytes_max=(1 << 20) + (64 << 10) + 1025), "policy.message_bytes_max", "at most 1115136"),
    (policy(weight=0.009), "policy.weight", "is 0.009; it must be 0.01 to 100, or 0 for 1"),
    (policy(weight=100.1), "policy.weight", "it must be 0.01 to 100"),
    (policy(weight=-1.0), "policy.weight", "is -1; it must be"),
    (policy(weight=NAN), "policy.weight", "is nan"),
    (policy(weight=INF), "policy.weight", "is inf"),
    (policy(dedup_window=ms(999)), "policy.dedup_window", "it must be 1 s to 604800 s"),
    (policy(dedup_window=Duration(seconds=7 * DAY, nanos=1)), "policy.dedup_window", "it must be 1 s to 604800 s"),
    (backoff(factor=0.99), "policy.backoff.factor", "is 0.99; it must be 1 to 10, or 0 for 2"),
    (backoff(factor=10.1), "policy.backoff.factor", "it must be 1 to 10"),
    (backoff(factor=NAN), "policy.backoff.factor", "is nan"),
    (backoff(factor=-INF), "policy.backoff.factor", "is -inf"),
    (backoff(jitter=-0.1), "policy.backoff.jitter", "is -0.1; it must be 0 to 1"),
    (backoff(jitter=1.1), "policy.backoff.jitter", "it must be 0 to 1"),
    (backoff(jitter=NAN), "policy.backoff.jitter", "is nan"),
    (limit(messages_per_second=0.009), "policy.limit.messages_per_second", "it must be 0.01 to 1000000, or 0"),
    (limit(messages_per_second=1_000_001), "policy.limit.messages_per_second", "it must be 0.01 to 1000000"),
    (limit(messages_per_second=-1), "policy.limit.messages_per_second", "is -1"),
    (limit(messages_per_second=NAN), "policy.limit.messages_per_second", "is nan"),
    (limit(messages_per_second=INF), "policy.limit.messages_per_second", "is inf"),
    (limit(burst=1), "policy.limit.burst", "needs messages_per_second"),
    (policy(tenant_limit=pb.Limit(burst=1)), "policy.tenant_limit.burst", "needs messages_per_second"),
    (policy(tenant_limit=pb.Limit(messages_per_second=NAN)), "policy.tenant_limit.messages_per_second", "is nan"),
    (policy(retention=pb.Retention(age_max=ms(999))), "policy.retention.age_max", "it must be 1 s"),
    (policy(retention=pb.Retention(age_max=Duration(seconds=-5))), "policy.retention.age_max", "must not be negative"),
    (policy(tenant_retention=pb.Retention(age_max=Duration(seconds=367 * DAY))), "policy.tenant_retention.age_max", "it must be"),
    (tenant(weight=0.001), 'policy.tenants["acme"].weight', "is 0.001; it must be 0.01 to 100"),
    (tenant(weight=NAN), 'policy.tenants["acme"].weight', "is nan"),
    (tenant(limit=pb.Limit(messages_per_second=2e6)), 'policy.tenants["acme"].limit.messages_per_second',
     "is 2e+06; it must be 0.01 to 1000000"),
    (tenant(limit=pb.Limit(burst=9)), 'policy.tenants["acme"].limit.burst', "needs messages_per_second"),
    (tenant(retention=pb.Retention(age_max=Duration())), 'policy.tenants["acme"].retention.age_max', "is 0 s"),
    (tenant('a"b', weight=-1), 'policy.tenants["a\\"b"].weight', "is -1"),
    (tenant("a\nb"), 'policy.tenants["a\\nb"]', "has the control character"),
    (tenant("n" * 256), f'policy.tenants["{"n" * 64}…"]', "has 256 bytes; at most 255"),
    (policy(tenants={str(i): pb.TenantPolicy() for i in range(1001)}), "policy.tenants", "has 1001 tenants; at most 1000"),
    (policy(adaptive_limit=AdaptiveLimit(floor=1025)), "policy.adaptive_limit.floor", "is 1025; at most 1024"),
    (policy(adaptive_limit=AdaptiveLimit(floor=3, pinned=2)), "policy.adaptive_limit.floor", "is 3, more than pinned (2)"),
    (policy(adaptive_limit=AdaptiveLimit(floor=3), limit=pb.Limit(leases_max=2)), "policy.adaptive_limit.floor",
     "is 3, more than limit.leases_max (2)"),
    (policy(adaptive_limit=AdaptiveLimit(pinned=3), limit=pb.Limit(leases_max=2)), "policy.adaptive_limit.pinned",
     "is 3, more than limit.leases_max (2)"),
    (header(""), 'http.headers[""]', "is not the name of an HTTP header"),
    (header("a b"), 'http.headers["a b"]', "is not the name of an HTTP header"),
    (header("a:"), 'http.headers["a:"]', "is not the name of an HTTP header"),
    (header("ä"), 'http.headers["ä"]', "is not the name of an HTTP header"),
    (header("a\r\nb"), 'http.headers["a\\r\\nb"]', "is not the name of an HTTP header"),
    *((header(name), f'http.headers["{name}"]', "is set by the dispatcher") for name in (
        "content-type", "Content-Length", "HOST", "Connection", "Transfer-Encoding", "TE", "trailer", "Upgrade", "Expect",
        "User-Agent", "Keep-Alive", "webhook-id", "Webhook-Signature", "Webhook-", "spillway-shard", "Spillway-Anything")),
    *((header("a", value), 'http.headers["a"]', "has a value that is not printable ASCII")
      for value in ("x\ry", "x\ny", "x\r\ny: z", "\0", "\t", "x\ty", "\x7f", "\x85", "ü", " x", "x ", "x\n")),
    (http(headers={"X-A": "1", "x-a": "2"}), 'http.headers["x-a"]', "is there twice: 'X-A' differs in case only"),
    (header("Authorization", "Bearer x", "http://me:pw@host/"), 'http.headers["Authorization"]', "contradicts the URL"),
    (http(headers={str(i): "" for i in range(65)}), "http.headers", "has 65 headers; at most 64"),
    (http(headers={"a": "x" * 8192}), "http.headers", "has 8193 bytes of names and values; at most 8192"),
    *((http(signing_secrets=[secret(24), value]), "http.signing_secrets[1]", "is not 'whsec_' and base64 of 24 to 64 bytes")
      for value in ("", "whsec_", secret(23), secret(65), secret(24)[6:], secret(24).upper(), secret(24) + "!", secret(24)[:-1],
                    "whsec_ " + secret(24)[6:], "whsec_" + "ü" * 32, "whsec_whsec_" + secret(24)[6:])),
    (http(signing_secrets=[secret(24), secret(24)]), "http.signing_secrets[1]", "is there twice"),
    (http(signing_secrets=[secret(24, i) for i in range(5)]), "http.signing_secrets", "has 5 secrets; at most 4"),
    (http(redirects_max=6), "http.redirects_max", "is 6; at most 5"),
])
def test_a_wrong_field_is_refused_by_its_path(fields: dict[str, Any], field: str, says: str) -> None:
    """Every limit that admin_service.proto states is kept, and the error names the field's path and the limit."""
    with pytest.raises(RequestError) as caught:
        parse_destination(Destination(**{"name": "d", **fields}))
    assert caught.value.field == f"destination.{field}"
    assert says in caught.value.description


def test_no_error_repeats_a_secret_nor_outgrows_an_answer() -> None:
    """Values of headers and secrets stay out of errors, and what callers sent is cut where it is long."""
    for fields in (header("a", "pass\nword"), http(signing_secrets=["whsec_password"])):
        with pytest.raises(RequestError) as caught:
            parse_destination(Destination(name="d", **fields))
        assert "pass" not in str(caught.value)
    for fields in (http("ü" * 1024), tenant("ü" * 100_000), header("ü" * 4000)):
        with pytest.raises(RequestError) as caught:
            parse_destination(Destination(name="d", **fields))
        assert len(str(caught.value).encode()) < 1024


def test_headers_of_a_connection_are_reserved() -> None:
    """What the dispatcher takes out of messages, no target may set either."""
    assert CONNECTION_HEADERS <= RESERVED_HEADERS


@pytest.mark.parametrize("given", [
    DeliveryPolicy(), DeliveryPolicy(backoff=Backoff(), limit=pb.Limit(), tenant_limit=pb.Limit(), retention=pb.Retention(),
                                     tenant_retention=pb.Retention(), adaptive_limit=AdaptiveLimit()),
], ids=["nothing", "empty parts"])
def test_an_empty_policy_is_the_default_one(given: DeliveryPolicy) -> None:
    """Every setting is the default, and there is no HTTP target. What is answered has the defaults, and gives the same again."""
    stored = parse_destination(Destination(name="d", policy=given))
    assert stored.policy == Policy() and stored.http is None
    shown = destination_proto(stored)
    p = shown.policy
    assert (p.run_messages_max, p.lease_duration.seconds, p.backoff.cap.seconds, p.nack_policy, p.ordering,
            p.lease_duration_max.seconds, p.dead_letter_policy, p.weight, p.adaptive_limit.floor, p.dedup_window.seconds,
            p.backoff.factor, p.backoff.jitter) == (
        64, 30, 60, NACK_POLICY_BLOCK, ORDERING_ORDERED, 12 * HOUR, DEAD_LETTER_POLICY_KEEP, 1.0, 1, 600, 2.0, 1.0)
    assert not any(p.HasField(name) for name in ("age_max", "ttl", "limit", "tenant_limit", "retention", "tenant_retention"))
    assert parse_destination(shown).policy == Policy()


def test_a_base_above_the_default_cap_raises_the_cap() -> None:
    """Who asks for a first wait of ten minutes need not say that later ones are no shorter."""
    stored = parse_destination(Destination(name="d", **policy(backoff=Backoff(base=Duration(seconds=600)))))
    assert (stored.policy.backoff_base_ms, stored.policy.backoff_cap_ms) == (600_000, 600_000)


def test_every_field_arrives_where_it_belongs() -> None:
    """Each with a value of its own: no two are mixed up."""
    stored = parse_destination(Destination(name="d", policy=DeliveryPolicy(
        run_messages_max=7, lease_duration=ms(11_000), lease_duration_max=ms(12_000),
        backoff=Backoff(base=ms(13), cap=ms(14), factor=1.5, jitter=0.0),
        nack_policy=NACK_POLICY_BLOCK_UNTIL, attempts_max=15, age_max=ms(16), ordering=ORDERING_UNORDERED,
        dead_letter_policy=DEAD_LETTER_POLICY_DISCARD, ttl=ms(17_000), message_bytes_max=18,
        limit=pb.Limit(messages_per_second=19, burst=20, leases_max=21), tenant_limit=pb.Limit(leases_max=22),
        retention=pb.Retention(bytes_max=23, age_max=ms(24_000)), tenant_retention=pb.Retention(bytes_max=(1 << 64) - 1),
        weight=0.5, tenants={
            "": pb.TenantPolicy(weight=2, limit=pb.Limit()), "t": pb.TenantPolicy(retention=pb.Retention(bytes_max=25))},
        adaptive_limit=AdaptiveLimit(disabled=True, floor=3, pinned=4), dedup_window=ms(26_000)), http=HttpTarget(
            url="https://u:p@h/", timeout=ms(200), concurrency_max=2, headers={"X-B": "", "X-A": "a b"},
            signing_secrets=[secret(24), secret(64)], allow_private_addresses=True, redirects_max=5)))
    assert stored.policy == Policy(
        run_messages_max=7, lease_ms=11_000, backoff_base_ms=13, backoff_cap_ms=14, nack=Nack.BLOCK_UNTIL, attempts_max=15,
        age_ms_max=16, backoff_factor=1.5, jitter=0.0, ordered=False, lease_ms_max=12_000, discard=True, ttl_ms=17_000,
        message_bytes_max=18, limit=Limit(19.0, 20, 21), tenant_limit=Limit(leases_max=22), retention=Retention(23, 24_000),
        tenant_retention=Retention((1 << 64) - 1), weight=0.5,
        tenants={"": TenantPolicy(2.0, Limit()), "t": TenantPolicy(1.0, None, Retention(25))},
        adaptive=Adaptive(True, 3, 4), dedup_ms=26_000)
    target = stored.http
    assert target is not None
    assert (target.url, target.timeout_ms, target.concurrency_max, target.headers, target.signing_secrets,
            target.allow_private_addresses, target.redirects_max) == (
        "https://u:p@h/", 200, 2, {"X-A": "a b", "X-B": ""}, (secret(24), secret(64)), True, 5)
    shown = destination_proto(stored, secrets=False)
    assert not shown.http.signing_secrets and shown.http.headers == {"X-A": "a b", "X-B": ""}


def test_a_node_that_takes_larger_messages_takes_a_larger_limit() -> None:
    """message_bytes_max goes up to what the node takes, headers included."""
    message = Destination(name="d", policy=DeliveryPolicy(message_bytes_max=2_000_000))
    assert parse_destination(message, 2 << 20).policy.message_bytes_max == 2_000_000
    with pytest.raises(RequestError, match=r"^destination\.policy\.message_bytes_max: is 2000000; at most 1115136$"):
        parse_destination(message, 1 << 20)


def durations(least: int, most: int) -> st.SearchStrategy[Duration]:
    """Durations of whole milliseconds."""
    return st.integers(least, most).map(ms)


names = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=60)
weights = st.floats(0.01, 100)
limits = st.one_of(
    st.builds(pb.Limit, messages_per_second=st.floats(0.01, 1e6), burst=st.integers(0, (1 << 32) - 1),
              leases_max=st.integers(0, (1 << 32) - 1)),
    st.builds(pb.Limit, leases_max=st.integers(1, (1 << 32) - 1)))
retentions = st.one_of(st.builds(pb.Retention, bytes_max=st.integers(0, (1 << 64) - 1), age_max=durations(1000, 366 * DAY * 1000)),
                       st.builds(pb.Retention, bytes_max=st.integers(1, (1 << 64) - 1)))
tokens = st.from_regex(r"[!#$%&'*+.^_`|~0-9a-z-]{1,20}", fullmatch=True).filter(
    lambda n: n not in RESERVED_HEADERS and not n.startswith(("spillway-", "webhook-")) and n != "authorization")
values = st.from_regex(r"([!-~]([ -~]{0,20}[!-~])?)?", fullmatch=True)
targets = st.builds(
    HttpTarget, url=st.just("https://h/p?q=ü"), timeout=durations(100, 600_000), concurrency_max=st.integers(1, 1024),
    headers=st.dictionaries(tokens, values, max_size=5), allow_private_addresses=st.booleans(), redirects_max=st.integers(0, 5),
    signing_secrets=st.lists(st.binary(min_size=24, max_size=64).map(lambda b: "whsec_" + base64.b64encode(b).decode()),
                             max_size=4, unique=True))


@st.composite
def complete_policies(draw: st.DrawFn) -> DeliveryPolicy:
    """Policies with every field that has a default set, and the others or not."""
    lease = draw(st.integers(1000, 12 * HOUR * 1000))
    base = draw(st.integers(1, HOUR * 1000))
    p = DeliveryPolicy(
        run_messages_max=draw(st.integers(1, 1024)), lease_duration=ms(lease),
        lease_duration_max=draw(durations(lease, 12 * HOUR * 1000)),
        backoff=Backoff(base=ms(base), cap=draw(durations(base, DAY * 1000)), factor=draw(st.floats(1, 10)),
                        jitter=draw(st.floats(0, 1))),
        nack_policy=draw(st.sampled_from([1, 2, 3])), ordering=draw(st.sampled_from([1, 2])),
        dead_letter_policy=draw(st.sampled_from([1, 2])), message_bytes_max=draw(st.integers(0, 1 << 20)),
        weight=draw(weights), dedup_window=draw(durations(1000, 7 * DAY * 1000)))
    if p.nack_policy == NACK_POLICY_BLOCK_UNTIL:
        p.attempts_max = draw(st.integers(1, 1000))
    for name, some in (("limit", limits), ("tenant_limit", limits), ("retention", retentions), ("tenant_retention", retentions),
                       ("ttl", durations(1000, 366 * DAY * 1000))):
        if draw(st.booleans()):
            getattr(p, name).CopyFrom(draw(some))
    for name, own in draw(st.dictionaries(names, st.tuples(weights, st.none() | limits, st.none() | retentions), max_size=4)).items():
        p.tenants[name].weight = own[0]
        if own[1] is not None:
            p.tenants[name].limit.CopyFrom(own[1])
        if own[2] is not None:
            p.tenants[name].retention.CopyFrom(own[2])
    most = min(p.limit.leases_max or 1024, 1024)
    p.adaptive_limit.floor = draw(st.integers(1, most))
    p.adaptive_limit.pinned = draw(st.just(0) | st.integers(p.adaptive_limit.floor, most))
    p.adaptive_limit.disabled = draw(st.booleans())
    return p


@given(complete_policies(), st.none() | targets)
def test_what_is_taken_reads_back_the_same(given_policy: DeliveryPolicy, target: HttpTarget | None) -> None:
    """A stored destination answers with what was sent, to the last bit of every number."""
    message = Destination(name="d", policy=given_policy, http=target)
    back = destination_proto(parse_destination(message))
    back.ClearField("etag")
    assert back == message


@pytest.mark.parametrize("fields", [
    policy(run_messages_max=1, lease_duration=ms(1000), lease_duration_max=ms(1000), nack_policy=NACK_POLICY_SKIP,
           backoff=Backoff(base=ms(1), cap=ms(1), factor=1, jitter=0), weight=0.01, ttl=ms(1000), dedup_window=ms(1000),
           message_bytes_max=1, limit=pb.Limit(messages_per_second=0.01, burst=1, leases_max=1),
           retention=pb.Retention(bytes_max=1, age_max=ms(1000)), adaptive_limit=AdaptiveLimit(floor=1, pinned=1)),
    policy(run_messages_max=1024, lease_duration=Duration(seconds=12 * HOUR), lease_duration_max=Duration(seconds=12 * HOUR),
           backoff=Backoff(base=Duration(seconds=HOUR), cap=Duration(seconds=DAY), factor=10, jitter=1), attempts_max=1000,
           nack_policy=NACK_POLICY_BLOCK_UNTIL, age_max=Duration(seconds=366 * DAY), ttl=Duration(seconds=366 * DAY),
           weight=100, message_bytes_max=1_115_136, limit=pb.Limit(messages_per_second=1e6), adaptive_limit=AdaptiveLimit(floor=1024),
           dedup_window=Duration(seconds=7 * DAY), tenants={f"{i:0255}": pb.TenantPolicy(weight=100) for i in range(1000)}),
    policy(nack_policy=NACK_POLICY_BLOCK_UNTIL, age_max=ms(1)),
    http("http://h", timeout=ms(100), concurrency_max=1),
    http("https://[::1]:65535/p?q=ü#f", timeout=Duration(seconds=600), concurrency_max=1024, redirects_max=5,
         headers={"a": "x" * 8191}, signing_secrets=[secret(24 + i * 10) for i in range(4)]),
    http("http://h/" + "x" * 2039, headers={f"x{i}": "" for i in range(64)}, signing_secrets=[secret(64), secret(24)]),
], ids=["low", "high", "age", "low http", "high http", "many headers"])
def test_both_ends_of_every_range_pass(fields: dict[str, Any]) -> None:
    """What is at its limit is taken, and reads back the same."""
    message = Destination(name="d", **fields)
    back = destination_proto(parse_destination(message))
    assert parse_destination(back) == parse_destination(message)
    for part in ("policy", "http"):
        for descriptor, value in getattr(message, part).ListFields():
            shown = getattr(getattr(back, part), descriptor.name)
            assert shown == value or descriptor.name in ("backoff", "adaptive_limit", "tenants"), descriptor.name


def test_the_etag_that_was_read_is_taken_back() -> None:
    """A destination's etag stands for its revision; none stands for no condition."""
    assert [parse_etag("destination.etag", e) for e in ("", "1", "42", "9" * 19)] == [0, 1, 42, int("9" * 19)]


@pytest.mark.parametrize("etag", ["0", "00", "-1", "x", "1 ", "²", "٣", "1" * 20, "1" * 5000])
def test_an_etag_of_something_else_is_refused(etag: str) -> None:
    """Whatever no destination was ever given is an error of the caller's, neither ignored nor a failure of the node."""
    with pytest.raises(RequestError, match=r"^destination.etag: .* is not an etag of this cluster$"):
        parse_etag("destination.etag", etag)
