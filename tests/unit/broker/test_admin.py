"""Destinations as callers send them: what is filled in, what is refused and with which field."""
from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from spillway.broker.core.policy import Nack, Policy
from spillway.broker.errors import RequestError
from spillway.broker.services.admin import destination_proto, parse_destination, parse_etag
from spillway.v1.admin_service_pb2 import (
    NACK_POLICY_BLOCK,
    NACK_POLICY_BLOCK_UNTIL,
    NACK_POLICY_SKIP,
    Backoff,
    DeliveryPolicy,
    Destination,
    HttpTarget,
)

HOUR = 3600


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
])
def test_a_wrong_field_is_refused_by_its_path(fields: dict[str, Any], field: str, says: str) -> None:
    """Every limit that admin_service.proto states is kept, and the error names the field's path and the limit."""
    with pytest.raises(RequestError) as caught:
        parse_destination(Destination(**{"name": "d", **fields}))
    assert caught.value.field == f"destination.{field}"
    assert says in caught.value.description


def test_an_empty_policy_is_the_default_one() -> None:
    """Only a name: every setting is the default, and there is no HTTP target."""
    stored = parse_destination(Destination(name="d"))
    default = Policy()
    assert (stored.run_messages_max, stored.lease_ms, stored.backoff_base_ms, stored.backoff_cap_ms) == (
        default.run_messages_max, default.lease_ms, default.backoff_base_ms, default.backoff_cap_ms) == (
        64, 30_000, 200, 60_000)
    assert stored.nack == Nack.BLOCK and stored.http is None


def test_a_base_above_the_default_cap_raises_the_cap() -> None:
    """Who asks for a first wait of ten minutes need not say that later ones are no shorter."""
    stored = parse_destination(Destination(name="d", **policy(backoff=Backoff(base=Duration(seconds=600)))))
    assert (stored.backoff_base_ms, stored.backoff_cap_ms) == (600_000, 600_000)


@pytest.mark.parametrize("message", [
    Destination(name="low", policy=DeliveryPolicy(
        run_messages_max=1, lease_duration=ms(1000), backoff=Backoff(base=ms(1), cap=ms(1)),
        nack_policy=NACK_POLICY_SKIP), http=HttpTarget(url="http://h", timeout=ms(100), concurrency_max=1)),
    Destination(name="high", policy=DeliveryPolicy(
        run_messages_max=1024, lease_duration=Duration(seconds=12 * HOUR),
        backoff=Backoff(base=Duration(seconds=HOUR), cap=Duration(seconds=24 * HOUR)), attempts_max=1000,
        nack_policy=NACK_POLICY_BLOCK_UNTIL, age_max=Duration(seconds=366 * 24 * HOUR)),
        http=HttpTarget(url="https://[::1]:65535/p?q=ü#f", timeout=Duration(seconds=600), concurrency_max=1024)),
    Destination(name="age", policy=DeliveryPolicy(
        run_messages_max=2, lease_duration=ms(1001), backoff=Backoff(base=ms(2), cap=ms(3)),
        nack_policy=NACK_POLICY_BLOCK_UNTIL, age_max=ms(1))),
], ids=lambda m: m.name)
def test_what_is_taken_at_its_limits_reads_back_the_same(message: Destination) -> None:
    """Both ends of every range pass, and a stored destination answers with what was sent."""
    back = destination_proto(parse_destination(message))
    back.ClearField("etag")
    assert back == message


def test_the_etag_that_was_read_is_taken_back() -> None:
    """A destination's etag stands for its revision; none stands for no condition."""
    assert [parse_etag(e) for e in ("", "1", "42", "9" * 19)] == [0, 1, 42, int("9" * 19)]


@pytest.mark.parametrize("etag", ["0", "00", "-1", "x", "1 ", "²", "٣", "1" * 20, "1" * 5000])
def test_an_etag_of_something_else_is_refused(etag: str) -> None:
    """Whatever no destination was ever given is an error of the caller's, neither ignored nor a failure of the node."""
    with pytest.raises(RequestError, match=r"^destination.etag: .* is not an etag of this cluster$"):
        parse_etag(etag)
