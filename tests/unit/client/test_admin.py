"""Admin calls: what goes out, what comes back, and what happens when nodes fail."""
from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from spillway.client import (
    AdaptiveLimit,
    AlreadyExists,
    Client,
    Conflict,
    DeliveryPolicy,
    Destination,
    DestinationNotFound,
    Explanation,
    Gate,
    GateCause,
    HttpTarget,
    InvalidArgument,
    Limit,
    NackPolicy,
    PeekedMessage,
    RedriveProgress,
    Retention,
    Route,
    RouteNotFound,
    RouteTarget,
    StallCause,
    TenantPolicy,
    TenantStats,
    Unavailable,
    sync,
)
from spillway.client import admin as admin_module
from spillway.client.admin_wire import python_field
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1 import message_pb2 as m

from tests.unit.client.serving import serving, until

FULL = Destination("full", DeliveryPolicy(
    run_messages_max=3, lease_seconds=1.5, backoff_base=0.25, backoff_cap=9.0, nack_policy=NackPolicy.BLOCK_UNTIL, attempts_max=4,
    age_max=60.0, ordered=False, lease_seconds_max=90.0, dead_letters_kept=False, ttl=3600.0, message_bytes_max=1 << 18,
    limit=Limit(2.5, 3, 4), tenant_limit=Limit(leases_max=1), retention=Retention(1 << 40, 7200.0),
    tenant_retention=Retention(age_max=1.0), weight=0.5,
    tenants={"acme": TenantPolicy(2.0, Limit(1.0), Retention(5)), "": TenantPolicy(limit=Limit(), retention=Retention()),
             "plain": TenantPolicy(weight=3.0)},
    adaptive_limit=AdaptiveLimit(True, 2, 5), dedup_window=30.0, backoff_factor=1.5, backoff_jitter=0.0),
    HttpTarget("https://x", 2.5, 7, {"X-Team": "billing"}, ("whsec_a", "whsec_b"), True, 3), "12")
STAMP = Timestamp(seconds=1_700_000_000)
MOMENT = datetime.fromtimestamp(1_700_000_000, UTC)


async def test_every_field_makes_the_round_trip() -> None:
    """Set and unset, and zeros where they mean something."""
    async with serving() as (_, client):
        assert await client.admin.update_destination(FULL, create=True) == FULL
        assert await client.admin.get_destination("full") == FULL
        assert await client.admin.update_destination("bare", create=True) == Destination("bare")
        unlimited = Destination("u", DeliveryPolicy(limit=Limit(), retention=Retention(), adaptive_limit=AdaptiveLimit(),
                                                    ordered=True, dead_letters_kept=True), HttpTarget("http://x"))
        assert await client.admin.create_destination(unlimited) == unlimited
        assert len({FULL, unlimited}) == 2  # they can be hashed
        assert "whsec" not in repr(FULL)


def test_no_field_of_the_protocol_is_forgotten() -> None:
    """Each field of a policy and of what it holds is set by the round trip above."""
    from spillway.client.admin_wire import destination_to_pb

    def unset(message: Any) -> list[str]:
        present = {field.name for field, _ in message.ListFields()}
        return [field.name for field in message.DESCRIPTOR.fields if field.name not in present]

    out = destination_to_pb(FULL)
    assert not [one for part in (out, out.policy, out.policy.backoff, out.policy.limit, out.policy.retention, out.http,
                                 out.policy.adaptive_limit, out.policy.tenants["acme"]) for one in unset(part)]


async def test_calls_stay_at_the_node_that_answered() -> None:
    """Another one may not know yet what was changed there."""
    async with serving(3) as (cluster, _), Client(cluster.nodes["n3"].address) as client:
        await client.admin.create_destination("d")
        await client.wait_ready()
        await client.admin.get_destination("d")
        assert [d.name async for d in client.admin.list_destinations()] == ["d"]
        assert cluster.admin.nodes_called == ["n3"] * 3
        await cluster.nodes["n3"].stop()
        for _ in range(3):
            await client.admin.get_destination("d")
        await cluster.nodes["n3"].start()
        await client.admin.get_destination("d")
        assert cluster.admin.nodes_called[3:] == cluster.admin.nodes_called[3:4] * 4 and "n3" not in cluster.admin.nodes_called[3:]


@pytest.mark.parametrize(("policy", "field"), [
    ({"ttl": -1}, "ttl"), ({"lease_seconds": float("nan")}, "lease_seconds"), ({"lease_seconds_max": "1h"}, "lease_seconds_max"),
    ({"backoff_base": -0.5}, "backoff_base"), ({"run_messages_max": -1}, "run_messages_max"),
    ({"run_messages_max": 1 << 32}, "run_messages_max"), ({"attempts_max": 1.5}, "attempts_max"), ({"weight": "x"}, "weight"),
    ({"limit": Limit(burst=-1)}, "limit.burst"), ({"retention": Retention(bytes_max=1 << 64)}, "retention.bytes_max"),
    ({"tenants": {"a": TenantPolicy(limit=Limit(leases_max=-1))}}, 'tenants["a"].limit.leases_max'),
    ({"tenants": {"a": TenantPolicy(retention=Retention(age_max=-1))}}, 'tenants["a"].retention.age_max'),
    ({"adaptive_limit": AdaptiveLimit(floor=-1)}, "adaptive_limit.floor")])
async def test_what_the_protocol_cannot_carry_is_refused_by_name(policy: dict[str, Any], field: str) -> None:
    """Before anything goes out."""
    async with serving() as (cluster, client):
        with pytest.raises(InvalidArgument) as error:
            await client.admin.update_destination(Destination("d", DeliveryPolicy(**policy)), create=True)
        assert error.value.field == f"destination.policy.{field}" and not cluster.admin.calls


async def test_refusals_name_fields_as_python_does() -> None:
    """The protocol's names of durations and choices are not the client's."""
    async with serving() as (cluster, client):
        cluster.admin.check = lambda _: "destination.policy.backoff.cap: it is too long"
        with pytest.raises(InvalidArgument) as error:
            await client.admin.update_destination("d", create=True)
        assert str(error.value) == "destination.policy.backoff_cap: it is too long"
    for given, expected in (("destination.policy.lease_duration", "destination.policy.lease_seconds"),
                            ("route.targets[3].over_budget", "route.targets[3].skip_over_budget"),
                            ("destination.policy.limit.burst", "destination.policy.limit.burst"), ("", ""), ("tenant", "tenant")):
        assert python_field(given) == expected


async def test_all_counts_are_read() -> None:
    """Each number of the protocol has its field."""
    async with serving() as (cluster, client):
        numbers = [f for f in pb.DestinationStats.DESCRIPTOR.fields if f.message_type is None]
        cluster.admin.stats.stats.CopyFrom(pb.DestinationStats(
            **{f.name: i + 2 for i, f in enumerate(numbers) if f.name != "paused"}, paused=True,
            oldest_enqueue_time=STAMP, parked_until_time=STAMP))
        cluster.admin.stats.shards_missing.extend([2, 3])
        found = await client.admin.destination_stats("d")
        for i, field in enumerate(numbers):
            if field.name not in ("paused", "messages"):
                assert getattr(found, field.name) == i + 2, field.name
        assert found.paused and found.oldest_enqueue_time == found.parked_until_time == MOMENT
        assert found.shards_missing == (2, 3)


async def test_routes_are_created_changed_listed_and_deleted() -> None:
    """Every field makes the round trip; what is missing, wrong or changed meanwhile has its error."""
    async with serving() as (_, client):
        admin = client.admin
        route = Route("s", (RouteTarget("a"), RouteTarget("b", 'headers["kind"] == "order"', True)), "1")
        assert await admin.create_route(route) == route
        assert await admin.get_route("s") == route
        for source in ("r", "q"):
            await admin.update_route(Route(source, (RouteTarget("a"),)), create=True)
        assert [r.source async for r in admin.list_routes()] == ["q", "r", "s"]
        await admin.delete_route("s", etag="1")
        with pytest.raises(RouteNotFound):
            await admin.get_route("s")
        with pytest.raises(RouteNotFound):
            await admin.delete_route("s")
        with pytest.raises(RouteNotFound):
            await admin.update_route(Route("s", ()))
        with pytest.raises(AlreadyExists):
            await admin.create_route(Route("q", ()))
        with pytest.raises(Conflict):
            await admin.delete_route("q", etag="old")
        with pytest.raises(Conflict):
            await admin.update_route(Route("q", (), "old"))
        with pytest.raises(InvalidArgument) as error:
            await admin.create_route(Route("new", (RouteTarget("a", "wrong"),)))
        assert error.value.field == "route.targets[0].filter"


async def test_gates_close_and_open() -> None:
    """Of a destination and of single tenants, for a time or until resumed."""
    async with serving() as (cluster, client):
        admin = client.admin
        await admin.pause("d", reason="maintenance")
        await admin.park("d", "", seconds=90.25)
        await admin.park("d", "t", seconds=60, reason="too loud")
        assert [g async for g in admin.list_gates("d")] == [
            Gate("", GateCause.PARKED, datetime.fromtimestamp(90, UTC), 0, ""), Gate(None, GateCause.PAUSED, None, 0, "maintenance"),
            Gate("t", GateCause.PARKED, datetime.fromtimestamp(60, UTC), 0, "too loud")]
        parked = next(c for c in cluster.admin.calls if isinstance(c, pb.ParkDeliveryRequest))
        assert parked.HasField("tenant") and (parked.duration.seconds, parked.duration.nanos) == (90, 250_000_000)
        await admin.unpark("d", "t")
        await admin.unpark("d", "")
        await admin.resume("d")
        assert not [g async for g in admin.list_gates("d")]
        cluster.admin.gates["*"] = pb.Gate(cause=99, step=4, until_time=STAMP)  # type: ignore[arg-type]
        assert [g async for g in admin.list_gates("d")] == [Gate(None, GateCause.UNKNOWN, MOMENT, 4, "")]
        with pytest.raises(InvalidArgument):
            await admin.park("d", seconds=-1)


async def test_looking_and_purging() -> None:
    """Explain, peek, purge and the top tenants."""
    async with serving() as (cluster, client):
        admin, state = client.admin, cluster.admin
        state.explanation = pb.ExplainResponse(sentence="It is parked.", cause=pb.STALL_CAUSE_PARKED, until_time=STAMP, messages=5)
        assert await admin.explain("d", "t", "k") == Explanation("It is parked.", StallCause.PARKED, MOMENT, 5, None)
        state.explanation = pb.ExplainResponse(cause=1000, drain_time=STAMP)  # type: ignore[arg-type]
        found = await admin.explain("d")
        assert (found.cause, found.drain_time) == (StallCause.UNKNOWN, MOMENT)
        assert not state.calls[-1].HasField("tenant") and state.calls[-2].key == "k"
        state.peeked = pb.PeekMessagesResponse(messages=[pb.PeekedMessage(
            sequence=9, enqueue_time=STAMP, expire_time=STAMP, attempts=2, leased=True,
            message=m.Message(id="i", headers={"a": "b"}, payload=b"p"))], count=7)
        assert await admin.peek("d", "", "k", 3) == (
            (PeekedMessage(9, MOMENT, None, MOMENT, 2, True, "i", {"a": "b"}, b"p"),), 7)
        assert state.calls[-1].limit == 3
        assert await admin.purge("d", "t", "k", dry_run=True) == (3, 2) and state.calls[-1].validate_only
        assert await admin.purge("d") == (3, 2) and not state.calls[-1].validate_only
        assert await admin.purge_dead_letters("d", "t", dry_run=True) == 1 and await admin.purge_dead_letters("d") == 1
        state.top = pb.ListTopTenantsResponse(tenants=[pb.TenantStats(tenant="t", messages=2, message_bytes=5)], shards_missing=[4])
        assert await admin.top_tenants("d", 5) == ((TenantStats("t", 2, 5),), (4,))
        for call in (admin.purge("d", key="k"), admin.explain("d", key="k"), admin.top_tenants("d", 0), admin.peek("d", "", "", -1)):
            with pytest.raises(InvalidArgument):
                await call


def progress(redriven: int, done: bool = False) -> pb.RedriveDeadLettersResponse:
    """One answer."""
    return pb.RedriveDeadLettersResponse(redriven=redriven, done=done)


async def test_a_redrive_says_how_far_it_is() -> None:
    """And carries what it was asked."""
    async with serving() as (cluster, client):
        cluster.admin.redrives = [([progress(2), progress(3), progress(3, True)], None)]
        got = [p async for p in client.admin.redrive_dead_letters("d", "t", "k", messages_per_second=7)]
        assert got == [(2, False), (3, False), RedriveProgress(3, True)]
        request = cluster.admin.calls[-1]
        assert (request.tenant, request.key, request.messages_per_second) == ("t", "k", 7)
        cluster.admin.redrives = [([progress(9, True)], None)]
        assert [p async for p in client.admin.redrive_dead_letters("d", dry_run=True)] == [(9, True)]
        assert cluster.admin.calls[-1].validate_only


async def test_a_redrive_goes_on_at_another_node() -> None:
    """Counts go on from where the first node stopped, whose rest is all that the second finds."""
    async with serving(2) as (cluster, client):
        gone = grpc.StatusCode.UNAVAILABLE
        cluster.admin.redrives = [([progress(5)], gone), ([], gone), ([progress(2)], None), ([progress(1), progress(4, True)], None)]
        got = [p async for p in client.admin.redrive_dead_letters("d")]
        assert got == [(5, False), (7, False), (8, False), (11, True)]
        assert {"n1", "n2"} <= set(cluster.admin.nodes_called)
        # The first node had put back the last one, and could not say so.
        cluster.admin.redrives = [([progress(5)], gone), ([], grpc.StatusCode.NOT_FOUND)]
        assert [p async for p in client.admin.redrive_dead_letters("d")] == [(5, False), (5, True)]


async def test_a_redrive_leaves_a_node_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stays open. One that only has nothing to say yet is waited for."""
    monkeypatch.setattr(admin_module, "SILENCE_SECONDS_MAX", 0.05)
    monkeypatch.setattr(admin_module, "QUESTION_SECONDS_MAX", 0.2)
    async with serving(2) as (cluster, client):
        for node in cluster.nodes.values():
            node.patience = 0.3
        cluster.admin.redrives = [([progress(5), progress(6)], None), ([progress(7, True)], None)]
        got = []
        async for one in client.admin.redrive_dead_letters("d"):
            got.append(one)
            if one.redriven == 5:
                cluster.nodes[cluster.admin.nodes_called[0]].answers.clear()
        assert got == [(5, False), (12, True)] and len({*cluster.admin.nodes_called}) == 2
        for node in cluster.nodes.values():
            node.answers.set()
        cluster.admin.redrives = [([progress(1), progress(2, True)], None)]
        assert [p async for p in client.admin.redrive_dead_letters("d")] == [(1, False), (2, True)]
        assert len(cluster.admin.nodes_called) == 3


async def test_a_redrive_that_cannot_be_done_raises() -> None:
    """At once for the caller's fault, after a time without an answer for the cluster's."""
    async with serving() as (cluster, client):
        admin = client.admin
        cluster.admin.redrives = [([], grpc.StatusCode.NOT_FOUND)]
        with pytest.raises(DestinationNotFound):
            await anext(admin.redrive_dead_letters("d"))
        cluster.admin.redrives = [([], grpc.StatusCode.UNAVAILABLE)]
        with pytest.raises(Unavailable):
            await anext(admin.redrive_dead_letters("d", timeout=0.1))
        with pytest.raises(InvalidArgument):
            await anext(admin.redrive_dead_letters("d", messages_per_second=0))
        with pytest.raises(InvalidArgument):
            await anext(admin.redrive_dead_letters("d", key="k"))


async def test_closing_a_redrive_stops_it() -> None:
    """The broker hears that nobody listens any more."""
    async with serving() as (cluster, client):
        cluster.admin.redrives = [([progress(n) for n in range(100_000)], None)]
        steps = client.admin.redrive_dead_letters("d")
        assert await anext(steps) == (0, False)
        await steps.aclose()  # type: ignore[attr-defined]
        await until(lambda: cluster.admin.redrives_cancelled)
        assert len(cluster.admin.calls) == 1


async def test_the_same_for_threads() -> None:
    """Lists are complete, redrives are iterators that can be left."""
    async with serving(2) as (cluster, _):
        cluster.admin.redrives = [([progress(2), progress(3, True)], None)]
        cluster.admin.peeked.count = 3

        def work() -> None:
            with sync.Client(cluster.addresses) as client:
                admin = client.admin
                assert admin.update_destination(FULL, create=True) == admin.get_destination("full")
                assert admin.create_route(Route("s", (RouteTarget("a"),))) == admin.get_route("s")
                admin.update_route(Route("r", (RouteTarget("a"),)), create=True)
                assert [r.source for r in admin.list_routes()] == ["r", "s"]
                admin.delete_route("s")
                admin.pause("d")
                admin.park("d", "t", seconds=1)
                assert len(admin.list_gates("d")) == 2
                admin.resume("d")
                admin.unpark("d", "t")
                assert admin.explain("d").cause is StallCause.NONE and admin.peek("d", "t", "k").total == 3
                assert admin.purge("d").messages == 3 and admin.top_tenants("d").tenants == ()
                assert list(admin.redrive_dead_letters("d")) == [(2, False), (3, True)]
                for step in admin.redrive_dead_letters("d"):
                    assert not step.done
                    break
                assert admin.purge_dead_letters("d") == 1

        await asyncio.to_thread(work)
