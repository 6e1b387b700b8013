"""Policy files: what they say, what is refused, and what their page tells."""
from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.client import (
    AdaptiveLimit,
    DeliveryPolicy,
    Destination,
    HttpTarget,
    InvalidArgument,
    Limit,
    NackPolicy,
    Retention,
    Route,
    RouteTarget,
    TenantPolicy,
)
from spillway.client.policy_file import (
    DEFAULT_HTTP,
    DEFAULT_POLICY,
    filled,
    in_file,
    load_destinations,
    load_routes,
    other_tables,
    parse_duration,
    parse_size,
)

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "policies.md").read_text()
EXAMPLE = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0]
KINDS = {"destination": Destination, "policy": DeliveryPolicy, "http": HttpTarget, "limit": Limit, "retention": Retention,
         "tenant": TenantPolicy, "adaptive": AdaptiveLimit, "route": Route, "target": RouteTarget}


def written(tmp_path: Path, text: str) -> Path:
    """A file with this text."""
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("text", "seconds"), [
    ("250ms", 0.25), ("30s", 30), ("5m", 300), ("1h", 3600), ("7d", 604_800), ("1h30m", 5400), ("1.5 h", 5400), (" 2 m 5 s ", 125),
    ("12", 12), (0.25, 0.25), (3, 3)])
def test_durations(text: Any, seconds: float) -> None:
    """With units, or numbers of seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "1w", "-1s", "1h x", "5 5", "nan", "inf", "1e9", "0x1", "٣s", True, None, []])
def test_what_is_no_duration_is_refused(text: Any) -> None:
    """With its text in the error."""
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_duration(text)


@given(st.integers(0, 10**12))
def test_milliseconds_are_exact(ms: int) -> None:
    """A duration is what is written, not a neighbour of it."""
    assert parse_duration(f"{ms}ms") == ms / 1000


@pytest.mark.parametrize(("text", "size"), [
    (7, 7), ("7", 7), ("10MiB", 10 << 20), ("1.5 GiB", 3 << 29), ("1GB", 10**9), ("2kb", 2000), ("3B", 3), ("1TiB", 1 << 40)])
def test_sizes(text: Any, size: int) -> None:
    """With units, or numbers of bytes."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "1 MiBs", "-1", "1e3", 1.5, True, None])
def test_what_is_no_size_is_refused(text: Any) -> None:
    """With its text in the error."""
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_size(text)


def test_the_example_of_the_page(tmp_path: Path) -> None:
    """It parses, and says what it seems to say."""
    billing, metrics = load_destinations(written(tmp_path, EXAMPLE)).values()
    assert billing == Destination("billing", DeliveryPolicy(
        run_messages_max=16, lease_seconds=30, backoff_base=0.25, backoff_cap=300, nack_policy=NackPolicy.BLOCK_UNTIL,
        attempts_max=20, age_max=86_400, ordered=True, lease_seconds_max=3600, dead_letters_kept=True, ttl=604_800,
        message_bytes_max=256 << 10, limit=Limit(500, 100, 64), tenant_limit=Limit(50, None, 4),
        retention=Retention(10 << 30, 259_200), tenant_retention=Retention(500_000_000), weight=2,
        tenants={"acme": TenantPolicy(5, Limit(200, None, 16), Retention(2 << 30, 259_200)),
                 "tenant with a strange name": TenantPolicy(0.5)},
        adaptive_limit=AdaptiveLimit(False, 4), dedup_window=3600, backoff_factor=2, backoff_jitter=1),
        HttpTarget("https://billing.example.com/events", 5, 32, {"Authorization": "Bearer of-this-example", "X-Team": "billing"},
                   ("whsec_c2VjcmV0IG9mIHRoaXMgZXhhbXBsZSwgbm90IHlvdXJz",), False, 1))
    assert metrics == Destination("metrics", DeliveryPolicy(
        ordered=False, nack_policy=NackPolicy.SKIP, dead_letters_kept=False, ttl=600))
    assert list(load_routes(written(tmp_path, EXAMPLE)).values()) == [Route("events", (
        RouteTarget("billing", 'headers["kind"] == "order" && tenant != "test"'),
        RouteTarget("metrics", skip_over_budget=True)))]


def test_the_example_has_every_key_of_a_policy() -> None:
    """But for one that its own field contradicts: a limit that is pinned does not adapt."""
    billing = tomllib.loads(EXAMPLE)["destination"][0]
    wanted = {f.name for f in dataclasses.fields(DeliveryPolicy)} | {"name", "http"}
    assert set(billing) == wanted
    assert set(billing["http"]) == {f.name for f in dataclasses.fields(HttpTarget)}


def test_the_page_tells_every_key() -> None:
    """Each field of what a file holds has its row, and each row is a field."""
    rows = set(re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE))
    fields = {f.name for kind in KINDS.values() for f in dataclasses.fields(kind)} - {"etag", "policy", "http"}
    assert {row.removeprefix("targets.") for row in rows} == fields


def test_the_page_tells_the_defaults() -> None:
    """Those that the command compares with."""
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", PAGE.replace(" min |", " m |"), re.MULTILINE))
    for default in (DEFAULT_POLICY, DEFAULT_HTTP):
        for field in dataclasses.fields(default):
            value = getattr(default, field.name)
            if isinstance(value, bool):
                assert told[field.name] == f"`{str(value).lower()}`"
            elif isinstance(value, int | float):
                number, _, unit = told[field.name].partition(" ")
                assert parse_duration(number + unit) == value, field.name


def test_one_destination_or_route_may_be_the_file(tmp_path: Path) -> None:
    """Without a table around it."""
    assert load_destinations(written(tmp_path, 'name = "d"\nttl = 5\n[limit]\nburst = 3')) == {
        "": Destination("d", DeliveryPolicy(ttl=5, limit=Limit(burst=3)))}
    assert load_routes(written(tmp_path, 'source = "s"\ntargets = []')) == {"": Route("s", ())}


@pytest.mark.parametrize(("text", "where"), [
    ('name = "d"\nwhat = 1', "what: not known"), ("ttl = 5", "name: missing"), ("name = 5", "name: 5 is not a string"),
    ('name = "d"\nlimit = 5', "limit: 5 is not a table"), ('name = "d"\nlimit.rate = 5', "limit.rate: not known"),
    ('name = "d"\nlimit.burst = 1.5', "limit.burst: 1.5 is not a whole"), ('name = "d"\nattempts_max = true', "attempts_max: True"),
    ('name = "d"\nweight = "1"', "weight: '1' is not a number"), ('name = "d"\nordered = 1', "ordered: 1 is not true or false"),
    ('name = "d"\nttl = "soon"', "ttl: 'soon' is not a duration"), ('name = "d"\nnack_policy = "no"', "nack_policy: 'no'"),
    ('name = "d"\nretention.bytes_max = "much"', "retention.bytes_max: 'much' is not a size"),
    ('name = "d"\n[tenants."a b".limit]\nx = 1', 'tenants."a b".limit.x: not known'), ('name = "d"\nhttp = {}', "http.url: missing"),
    ('name = "d"\nhttp = {url = "u", headers = {A = 1}}', "http.headers.A: 1 is not a string"),
    ('name = "d"\nhttp = {url = "u", signing_secrets = "x"}', "http.signing_secrets: 'x' is not a list"),
    ('name = "d"\nhttp = {url = "u", signing_secrets = [1]}', "http.signing_secrets[0]: 1 is not a string"),
    ("[[destination]]\nttl = 5", "destination[0].name: missing"), ("destination = 5", "destination: it must be tables"),
    ('[[destination]]\nname = "d"\n[[destination]]\nname = "d"', "destination[1].name: 'd' is destination[0]'s, too"),
    ('[[destination]]\nname = "d"\n[other]', "other: not known"), ("[[route]]", "there is no [[destination]] in it"),
    ("", "name: missing"), ("x = ", "it is not TOML")])
def test_what_is_wrong_is_named(tmp_path: Path, text: str, where: str) -> None:
    """By file and key."""
    path = written(tmp_path, text)
    with pytest.raises(InvalidArgument) as error:
        load_destinations(path)
    assert str(error.value).startswith(f"{path}: {where}")


@pytest.mark.parametrize(("text", "where"), [
    ('source = "s"', "targets: missing"), ('source = "s"\ntargets = "a"', "targets: 'a' is not a list"),
    ('source = "s"\ntargets = [{}]', "targets[0].destination: missing"),
    ('[[route]]\nsource = "s"\ntargets = [{destination = "a", what = 1}]', "route[0].targets[0].what: not known")])
def test_what_is_wrong_with_a_route_is_named(tmp_path: Path, text: str, where: str) -> None:
    """By file and key."""
    path = written(tmp_path, text)
    with pytest.raises(InvalidArgument) as error:
        load_routes(path)
    assert str(error.value).startswith(f"{path}: {where}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, a folder, no text."""
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InvalidArgument):
            load_destinations(path)
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidArgument, match="it is not TOML"):
        load_routes(path)


def test_a_brokers_refusal_is_placed_in_the_file() -> None:
    """Its field is the request's; the file has other paths."""
    for field, where, expected in (("destination.policy.limit.burst", "destination[2]", "f: destination[2].limit.burst"),
                                   ("destination.http.url", "", "f: http.url"), ("", "", "f"),
                                   ("route.targets[1].filter", "route[0]", "f: route[0].targets[1].filter")):
        assert in_file(Path("f"), where, InvalidArgument(field, "why")).field == expected


def test_defaults_are_filled_in_as_the_broker_does() -> None:
    """Zeros and empty limits are how the protocol has what is not given."""
    assert filled(Destination("d")) == Destination("d", DEFAULT_POLICY)
    assert filled(Destination("d", DeliveryPolicy(limit=Limit(), retention=Retention(0), attempts_max=0, weight=0))) == filled(
        Destination("d"))
    own = Destination("d", DeliveryPolicy(backoff_base=90, backoff_jitter=0, limit=Limit(burst=0, leases_max=2), ordered=False,
                                          adaptive_limit=AdaptiveLimit(pinned=3), tenants={"t": TenantPolicy(limit=Limit())}),
                      HttpTarget("http://x", concurrency_max=3))
    policy = filled(own).policy
    assert (policy.backoff_cap, policy.backoff_jitter, policy.limit, policy.ordered) == (90, 0, Limit(leases_max=2), False)
    assert policy.adaptive_limit == AdaptiveLimit(False, 1, 3) and policy.tenants == {"t": TenantPolicy(1.0, Limit())}
    assert filled(own).http == HttpTarget("http://x", 10.0, 3) and filled(filled(own)) == filled(own)


def test_targets_may_be_names(tmp_path: Path) -> None:
    """Where there is nothing else to say of them."""
    path = tmp_path / "routes.toml"
    path.write_text('[[route]]\nsource = "s"\ntargets = ["a", { destination = "b", skip_over_budget = true }]\n')
    assert load_routes(path) == {"route[0]": Route("s", (RouteTarget("a"), RouteTarget("b", skip_over_budget=True)))}
    assert other_tables(path, "destination") and not other_tables(path, "route")
