"""What operators pause and park: what it does to deliveries, what is listed, and what is refused without a change."""
from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from node_world import Context, Refused, World, payloads
from several_nodes import Peer, PeersContext, finish, service
from spillway.broker.core import directory as d
from spillway.broker.services import gates, operations
from spillway.broker.services.admin import AdminService
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1.queue_service_pb2 import OUTCOME_DOWN, OUTCOME_THROTTLED


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node that leads everything."""
    made = World(tmp_path)
    made.know("d", "da", "other")
    made.host.lead()
    yield made
    await made.forwarder.close()
    made.store.close()


async def listed(world: World, **fields: Any) -> list[tuple[str | None, int, int, str]]:
    """Gates as (tenant, cause, until in ms from now or 0, reason)."""
    answer = await world.admin("ListGates", pb.ListGatesRequest(destination="d", **fields))
    return [(g.tenant if g.HasField("tenant") else None, g.cause,
             g.until_time.ToMilliseconds() - world.now if g.HasField("until_time") else 0, g.reason) for g in answer.gates]


async def test_a_pause_stops_deliveries_until_it_is_resumed(world: World) -> None:
    """Of the whole destination; leases that are out run on, and producing goes on."""
    await world.put("d", b"0", b"1", key="a")
    consumer = world.consumer(100)
    run, = await world.take(consumer)
    await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="d", reason="they asked for it"))
    await world.put("d", b"2", key="b")
    assert await world.take(consumer) == []
    world.settle(run)
    world.tick(3_600_000)
    assert await world.take(consumer) == []
    assert await listed(world) == [(None, pb.GATE_CAUSE_PAUSED, 0, "they asked for it")]
    await world.admin("ResumeDelivery", pb.ResumeDeliveryRequest(destination="d"))
    assert payloads(await world.take(consumer)) == [b"2"]
    assert await listed(world) == [] and not world.node.meta.directory.holds


@pytest.mark.parametrize("tenant", ["t", ""])
async def test_a_tenants_pause_stops_no_other(world: World, tenant: str) -> None:
    """The empty name is a tenant's, too."""
    await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="d", tenant=tenant))
    await world.put("d", b"held", tenant=tenant)
    await world.put("d", b"free", tenant="u")
    consumer = world.consumer(100)
    assert payloads(await world.take(consumer)) == [b"free"]
    assert await listed(world) == [(tenant, pb.GATE_CAUSE_PAUSED, 0, "")]
    await world.admin("ResumeDelivery", pb.ResumeDeliveryRequest(destination="d"))  # the destination's is another one
    assert await world.take(consumer) == []
    await world.admin("ResumeDelivery", pb.ResumeDeliveryRequest(destination="d", tenant=tenant))
    assert payloads(await world.take(consumer)) == [b"held"]


async def test_a_parking_ends_by_itself_or_by_hand(world: World) -> None:
    """By hand at once; a later parking replaces an earlier one."""
    consumer = world.consumer(100)
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=Duration(seconds=3600)))
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=Duration(seconds=5), reason="short"))
    await world.put("d", b"1")
    assert await world.take(consumer) == []
    assert await listed(world) == [(None, pb.GATE_CAUSE_PARKED, 5000, "short")]
    world.tick(5001)
    assert payloads(await world.take(consumer)) == [b"1"]
    assert await listed(world) == []
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=Duration(seconds=604_800)))
    await world.put("d", b"2", key="other")
    assert await world.take(consumer) == []
    await world.admin("UnparkDelivery", pb.UnparkDeliveryRequest(destination="d"))
    assert payloads(await world.take(consumer)) == [b"2"]


async def test_what_failures_closed_can_be_opened(world: World) -> None:
    """After THROTTLED for the tenant, after DOWN for the destination: at once, without a probe."""
    consumer = world.consumer(100)
    for outcome, fields in ((OUTCOME_THROTTLED, {"tenant": "t"}), (OUTCOME_DOWN, {})):
        await world.put("d", *[b"%d" % i for i in range(3)])
        run, = await world.take(consumer)
        world.settle(run, outcome, 0, delay=Duration(seconds=3600))
        await world.put("d", b"more", key="x")
        assert await world.take(consumer) == []
        assert await listed(world) == [(fields.get("tenant"), pb.GATE_CAUSE_FAILURES, 3_600_000, "")]
        await world.admin("UnparkDelivery", pb.UnparkDeliveryRequest(destination="d", **fields))
        assert await listed(world) == [] and not world.node.gates
        world.tick(1)
        for run in await world.take(consumer):
            world.settle(run)
        world.tick(3_600_001)
        for run in await world.take(consumer):
            world.settle(run)
        assert world.totals("d").messages == 0


async def test_unparking_leaves_a_pause_and_resuming_a_parking(world: World) -> None:
    """Each undoes its own; both succeed where there is nothing to undo."""
    for _ in range(2):
        await world.admin("ResumeDelivery", pb.ResumeDeliveryRequest(destination="d"))
        await world.admin("UnparkDelivery", pb.UnparkDeliveryRequest(destination="d"))
    await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="d", reason="p"))
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=Duration(seconds=9), reason="q"))
    paused, parked = (None, pb.GATE_CAUSE_PAUSED, 0, "p"), (None, pb.GATE_CAUSE_PARKED, 9000, "q")
    assert await listed(world) == [paused, parked]
    await world.admin("UnparkDelivery", pb.UnparkDeliveryRequest(destination="d"))
    assert await listed(world) == [paused]
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=Duration(seconds=9), reason="q"))
    await world.admin("ResumeDelivery", pb.ResumeDeliveryRequest(destination="d"))
    assert await listed(world) == [parked]


@pytest.mark.parametrize(("method", "fields", "says"), [
    *((method, fields, says) for method in ("PauseDelivery", "ResumeDelivery", "ParkDelivery", "UnparkDelivery") for fields, says in (
        ({"destination": ""}, "INVALID_ARGUMENT: destination: must not be empty"),
        ({"destination": "*"}, "INVALID_ARGUMENT: destination: has a '*'"),
        ({"destination": "none"}, "NOT_FOUND: destination: destination 'none' does not exist"),
        ({"destination": "d", "tenant": "a\0"}, "INVALID_ARGUMENT: tenant: has the control character"),
        ({"destination": "d", "tenant": "t" * 256}, "INVALID_ARGUMENT: tenant: has 256 bytes"))),
    *((method, {"destination": "d", "reason": reason}, says) for method in ("PauseDelivery", "ParkDelivery") for reason, says in (
        ("x" * 1025, "INVALID_ARGUMENT: reason: has 1025 bytes; at most 1024"),
        ("ü" * 513, "INVALID_ARGUMENT: reason: has 1026 bytes; at most 1024"),
        ("a\nb", "INVALID_ARGUMENT: reason: has the control character '\\n'"),
        ("\x1b[2J", "INVALID_ARGUMENT: reason: has the control character '\\x1b'"))),
    ("ParkDelivery", {"destination": "d", "duration": None}, "INVALID_ARGUMENT: duration: is 0 s; it must be 0.001 s to 604800 s"),
    ("ParkDelivery", {"destination": "d", "duration": Duration()}, "INVALID_ARGUMENT: duration: is 0 s"),
    ("ParkDelivery", {"destination": "d", "duration": Duration(seconds=-1)}, "INVALID_ARGUMENT: duration: must not be negative"),
    ("ParkDelivery", {"destination": "d", "duration": Duration(seconds=604_800, nanos=1)}, "INVALID_ARGUMENT: duration: is 604800.001 s"),
    ("ListGates", {"destination": "none"}, "NOT_FOUND: destination"),
    ("ListGates", {"destination": "d", "page_size": 1001}, "INVALID_ARGUMENT: page_size: is 1001; it must be 0 to 1000"),
    ("ListGates", {"destination": "d", "page_size": -1}, "INVALID_ARGUMENT: page_size"),
    *(("ListGates", {"destination": "d", "page_token": token}, "INVALID_ARGUMENT: page_token")
      for token in ("%", "AA==", "AgEA", "AAH_")),
], ids=lambda value: str(value)[:40])
async def test_a_refusal_names_the_field_and_changes_nothing(world: World, method: str, fields: dict[str, Any], says: str) -> None:
    """What is paused and parked stays so, and nothing else becomes it."""
    await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="d"))
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=Duration(seconds=9)))
    before = dict(world.node.meta.directory.holds)
    if method == "ParkDelivery":
        fields = {"duration": Duration(seconds=1), **fields}
    with pytest.raises(Refused) as refused:
        await world.admin(method, getattr(pb, method + "Request")(**fields))
    assert str(refused.value).startswith(says)
    assert world.node.meta.directory.holds == before


async def test_both_ends_of_what_a_parking_takes(world: World) -> None:
    """A millisecond and a week, with a reason as long as it may be."""
    for duration, ms in ((Duration(nanos=1_000_000), 1), (Duration(seconds=604_800), 604_800_000)):
        await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=duration, reason="r" * 1024))
        assert await listed(world) == [(None, pb.GATE_CAUSE_PARKED, ms, "r" * 1024)]


async def test_gates_are_listed_in_pages(world: World) -> None:
    """The destination's own first, then by tenant; of one scope by cause; none of another destination."""
    for name in ("d", "da"):
        for tenant in (None, "b", "a", ""):
            await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination=name, tenant=tenant))
            await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination=name, tenant=tenant, duration=Duration(seconds=60)))
    for scope in (b"d", b"d\0a", b"da", b"da\0a"):
        world.node.gates[scope] = (world.now + 5000, 2)
    both = (pb.GATE_CAUSE_PAUSED, pb.GATE_CAUSE_PARKED)
    expected = [(None, c) for c in (*both, pb.GATE_CAUSE_FAILURES)] + [("", c) for c in both] + [
        ("a", c) for c in (*both, pb.GATE_CAUSE_FAILURES)] + [("b", c) for c in both]
    assert [g[:2] for g in await listed(world)] == expected
    for size in range(1, 12):
        found: list[tuple[str | None, int]] = []
        token = ""
        while True:
            answer = await world.admin("ListGates", pb.ListGatesRequest(destination="d", page_size=size, page_token=token))
            found += [(g.tenant if g.HasField("tenant") else None, g.cause) for g in answer.gates]
            assert len(answer.gates) <= size
            if not (token := answer.next_page_token):
                break
        assert found == expected


async def test_parkings_that_are_over_make_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody ends them by hand; there are only so many."""
    monkeypatch.setattr(gates, "HOLDS_MAX", 3)
    monkeypatch.setattr(d, "HOLDS_MAX", 3)
    for tenant in ("a", "b"):
        await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", tenant=tenant, duration=Duration(seconds=1)))
    await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="d", tenant="c"))
    with pytest.raises(Refused, match=r"INVALID_ARGUMENT: tenant: .* the most that a cluster keeps"):
        await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="d", tenant="d"))
    world.now += 1001
    await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="d", tenant="d"))
    assert set(world.node.meta.directory.holds) == {b"d\0c", b"d\0d"}


# -- several nodes ---------------------------------------------------------------------------------------------------------


async def test_changes_go_to_the_meta_groups_leader(world: World) -> None:
    """As they are, and nothing changes here; a call is passed on once only."""
    n2 = Peer()
    asked = service(world, {1: "n1", 2: "n1"}, {"n2": n2}, "n2")
    requests: list[tuple[str, Any]] = [
        ("PauseDelivery", pb.PauseDeliveryRequest(destination="d")), ("ResumeDelivery", pb.ResumeDeliveryRequest(destination="d")),
        ("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=Duration(seconds=1))),
        ("UnparkDelivery", pb.UnparkDeliveryRequest(destination="d"))]
    for method, request in requests:
        await finish(world, getattr(asked, method)(request, Context()))
    assert [call[:2] for call in n2.calls] == requests and not world.node.meta.directory.holds
    peer = AdminService(world.node, asked.forwarder, peer=True)
    for method, request in requests:
        with pytest.raises(Refused, match="does not lead the meta group"):
            await finish(world, getattr(peer, method)(request, PeersContext()))


async def test_unparking_opens_the_gates_of_every_leader(world: World) -> None:
    """The parking is ended once, by the meta group's leader; each leader of shards opens what it keeps closed."""
    n2, n3 = Peer(), Peer()
    asked = service(world, {1: "n2", 2: "n3"}, {"n2": n2, "n3": n3}, "n3")
    request = pb.UnparkDeliveryRequest(destination="d", tenant="t")
    world.node.gates[b"d\0t"] = (world.now + 5000, 1)
    await finish(world, asked.UnparkDelivery(request, Context()))
    assert n2.calls == [("UnparkDelivery", request, (("spillway-shards", "1"),))]
    assert n3.calls == [("UnparkDelivery", request, None), ("UnparkDelivery", request, (("spillway-shards", "2"),))]
    assert not world.node.gates


async def test_a_peer_opens_its_gates_or_ends_the_parking(world: World) -> None:
    """By whether the call names shards; which it must lead, so that no gate is overlooked while leaders change."""
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=Duration(seconds=1)))
    world.node.gates[b"d"] = (world.now + 5000, 1)
    peer = AdminService(world.node, service(world, {1: "n1", 2: "n1"}, {}).forwarder, peer=True)
    request = pb.UnparkDeliveryRequest(destination="d")
    world.node.shards[2].leading = False
    with pytest.raises(Refused, match="does not lead shard 2"):
        await finish(world, peer.UnparkDelivery(request, PeersContext(("spillway-shards", "1,2"))))
    assert world.node.gates
    await finish(world, peer.UnparkDelivery(request, PeersContext(("spillway-shards", "1"))))
    assert not world.node.gates and world.node.meta.directory.holds
    world.node.gates[b"d"] = (world.now + 5000, 1)
    context = PeersContext(("other", "x"))
    await finish(world, peer.UnparkDelivery(request, context))
    assert world.node.gates and not world.node.meta.directory.holds
    assert context.trailing == (("spillway-meta-index", str(world.node.meta.rows.applied_index)),)


async def test_a_shard_without_a_leader_keeps_no_other_gate_closed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be reached opens; the caller is told that there is more."""
    monkeypatch.setattr(operations, "RETRY_SECONDS_MAX", 0.0)
    n2 = Peer()
    asked = service(world, {1: None, 2: "n2"}, {"n2": n2})
    world.node.gates[b"d"] = (world.now + 5000, 1)
    with pytest.raises(Refused, match=r"UNAVAILABLE: shards \[1\] have no leader"):
        await finish(world, asked.UnparkDelivery(pb.UnparkDeliveryRequest(destination="d"), Context()))
    assert len(n2.calls) == 1 and not world.node.gates


def failures(*tenants: str | None, until: int = 1, step: int = 1) -> list[pb.Gate]:
    """Gates that failures closed."""
    made = []
    for tenant in tenants:
        gate = pb.Gate(tenant=tenant, cause=pb.GATE_CAUSE_FAILURES, step=step)
        gate.until_time.FromMilliseconds(until)
        made.append(gate)
    return made


async def test_the_gates_of_all_nodes_are_listed_once(world: World) -> None:
    """The latest end and the most failures of those that several nodes keep; operators' gates are not counted twice."""
    n2 = Peer({"ListGates": pb.ListGatesResponse(gates=failures(None, "a", until=world.now + 9000, step=1))})
    world.node.gates = {b"d": (world.now + 5000, 4), b"d\0b": (world.now + 7000, 2)}
    asked = service(world, {1: "n1", 2: "n2"}, {"n2": n2})
    await finish(world, asked.PauseDelivery(pb.PauseDeliveryRequest(destination="d", tenant="a"), Context()))
    answer = await finish(world, asked.ListGates(pb.ListGatesRequest(destination="d"), Context()))
    assert [(g.tenant, g.cause, g.until_time.ToMilliseconds() and g.until_time.ToMilliseconds() - world.now, g.step)
            for g in answer.gates] == [
        ("", pb.GATE_CAUSE_FAILURES, 9000, 4), ("a", pb.GATE_CAUSE_PAUSED, 0, 0), ("a", pb.GATE_CAUSE_FAILURES, 9000, 1),
        ("b", pb.GATE_CAUSE_FAILURES, 7000, 2)]
    peer = AdminService(world.node, asked.forwarder, peer=True)
    own = await finish(world, peer.ListGates(pb.ListGatesRequest(destination="d"), PeersContext()))
    assert [(g.tenant, g.cause) for g in own.gates] == [("", pb.GATE_CAUSE_FAILURES), ("b", pb.GATE_CAUSE_FAILURES)]


async def test_pages_of_several_nodes_leave_nothing_out(world: World) -> None:
    """Even where a node's page ends early: what lies behind its end waits for the next page."""
    tenants = [f"{i:02}" for i in range(20)]
    theirs, ours = tenants[::2], tenants[::3]
    world.node.gates = {b"d\0" + t.encode(): (world.now, 1) for t in ours}

    def page(request: pb.ListGatesRequest) -> pb.ListGatesResponse:
        after = gates._key_of_token(request.page_token)
        rest = [g for g in failures(*theirs) if after is None or gates._key(g) > after]
        size = min(2, request.page_size)
        return pb.ListGatesResponse(gates=rest[:size], next_page_token="more" if rest[size:] else "")

    asked = service(world, {1: "n1", 2: "n2"}, {"n2": Peer({"ListGates": page})})
    for size in (1, 3, 7, 1000):
        found, token = [], ""
        while True:
            answer = await finish(world, asked.ListGates(
                pb.ListGatesRequest(destination="d", page_size=size, page_token=token), Context()))
            found += [g.tenant for g in answer.gates]
            if not (token := answer.next_page_token):
                break
        assert found == sorted({*theirs, *ours})


async def test_a_node_that_does_not_answer_is_not_passed_over(world: World) -> None:
    """A list without its gates would be wrong."""
    gone = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone")
    asked = service(world, {1: "n1", 2: "n2"}, {"n2": Peer({"ListGates": gone})})
    with pytest.raises(Refused, match="UNAVAILABLE: gone"):
        await finish(world, asked.ListGates(pb.ListGatesRequest(destination="d"), Context()))
