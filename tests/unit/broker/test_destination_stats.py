"""What is counted of a destination, on one node and over several, and dead letters of unordered queues."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from node_world import Context, World
from several_nodes import Peer, PeersContext, finish, service
from spillway.broker.core.directory import Target
from spillway.broker.core.policy import Adaptive, Limit, Policy, Retention
from spillway.broker.services import admin, pages
from spillway.broker.services.admin import AdminService
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1.queue_service_pb2 import OUTCOME_DOWN, OUTCOME_REJECT, OUTCOME_RETRY


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node that leads everything."""
    made = World(tmp_path)
    made.know("d", "da")
    made.host.lead()
    yield made
    for runtime in made.node.shards.values():
        runtime.copier.stop()
    await made.forwarder.close()
    made.store.close()


async def stats(world: World, name: str = "d") -> pb.DestinationStats:
    """The counts of a destination."""
    answer = await world.admin("GetDestinationStats", pb.GetDestinationStatsRequest(name=name))
    assert not answer.shards_missing
    found: pb.DestinationStats = answer.stats
    return found


async def test_what_became_of_messages_is_counted(world: World) -> None:
    """Bytes while they are there; totals of what expired, was purged, discarded, put back, recognised, left out."""
    await world.put("d", bytes(1000), key="a", dedup_id="x")
    await world.put("d", bytes(1000), key="a", dedup_id="x")
    await world.put("d", bytes(500), key="b", ttl=Duration(seconds=1))
    now = await stats(world)
    assert (now.messages, now.queues, now.deduplicated_total) == (2, 2, 1)
    assert 1500 <= now.message_bytes < 1600
    world.tick(1001)
    now = await stats(world)
    assert (now.messages, now.ttl_expired_total, now.dead_lettered_total, now.dead_letters) == (1, 1, 1, 1)
    world.clock_runs = True
    await world.admin("RedriveDeadLetters", pb.RedriveDeadLettersRequest(destination="d"))
    world.clock_runs = False
    assert (await stats(world)).redriven_total == 1
    before = (await stats(world)).messages
    await world.admin("PurgeMessages", pb.PurgeMessagesRequest(destination="d"))
    now = await stats(world)
    assert (now.messages, now.message_bytes, now.purged_total) == (0, 0, before)
    world.know("gone", policy=Policy(discard=True, ttl_ms=1000))
    await world.put("gone", b"x")
    world.tick(1001)
    now = await stats(world, "gone")
    assert (now.discarded_total, now.ttl_expired_total, now.dead_letters) == (1, 1, 0)
    world.know("full", policy=Policy(retention=Retention(bytes_max=1)))
    world.route("s", Target("full", "", True), "d")
    await world.put("s", b"much")
    for _ in range(50):
        world.host.turn()
        await asyncio.sleep(0)
    assert (await stats(world, "full")).overflowed_total == 1
    assert (await stats(world, "da")) == pb.DestinationStats()


async def test_queues_are_leased_ready_or_waiting(world: World) -> None:
    """Each in one of these; leases and consumers as they come and go."""
    for key in "abcde":
        await world.put("d", b"1", b"2", key=key)
    await world.put("da", b"of another", key="f")
    for _ in range(3):
        world.host.turn()
    now = await stats(world)
    assert (now.queues, now.queues_ready, now.queues_leased, now.queues_waiting, now.consumers) == (5, 5, 0, 0, 0)
    consumer = world.consumer(4)
    world.consumer(0)
    runs = await world.take(consumer)
    now = await stats(world)
    assert (len(runs), now.queues_leased, now.queues_ready, now.queues_waiting, now.consumers) == (2, 2, 3, 0, 2)
    world.settle(runs[0], OUTCOME_RETRY, 0, delay=Duration(seconds=60))
    now = await stats(world)
    assert (now.queues_leased, now.queues_waiting, now.queues_ready + now.queues_leased) == (now.queues_leased, 1, 4)
    assert now.queues == 5 and now.leases_limit == 0


async def test_limits_and_rates_are_told(world: World) -> None:
    """Leases that may be out; messages acknowledged per second since the oldest sample."""
    world.know("d", policy=Policy(limit=Limit(leases_max=7), adaptive=Adaptive(disabled=True)))
    await world.put("d", *[b"x"] * 20)
    assert (await stats(world)).leases_limit == 7
    for runtime in world.node.shards.values():
        runtime.sample(world.now)
    consumer = world.consumer(100)
    for run in await world.take(consumer):
        world.settle(run)
    world.now += 5000
    now = await stats(world)
    assert now.acked_total == 20 and now.acked_per_second == pytest.approx(4.0)


async def test_what_is_closed_is_told(world: World) -> None:
    """By operators and by failures alike."""
    await world.put("d", b"1")
    await world.put("d", b"1", tenant="u")
    assert not (await stats(world)).paused and not (await stats(world)).HasField("parked_until_time")
    for tenant in ("x", "y"):
        await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="d", tenant=tenant))
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", tenant="y", duration=Duration(seconds=9)))
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", tenant="z", duration=Duration(seconds=2)))
    await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="da"))
    now = await stats(world)
    assert (now.parked_tenants, now.paused, now.HasField("parked_until_time")) == (3, False, False)
    assert (await stats(world, "da")).paused
    world.now += 3000
    assert (await stats(world)).parked_tenants == 2
    await world.admin("ParkDelivery", pb.ParkDeliveryRequest(destination="d", duration=Duration(seconds=60)))
    await world.admin("PauseDelivery", pb.PauseDeliveryRequest(destination="d"))
    now = await stats(world)
    assert now.paused and now.parked_until_time.ToMilliseconds() == world.now + 60_000
    await world.admin("ResumeDelivery", pb.ResumeDeliveryRequest(destination="d"))
    await world.admin("UnparkDelivery", pb.UnparkDeliveryRequest(destination="d"))
    run = (await world.take(world.consumer(1)))[0]
    world.settle(run, OUTCOME_DOWN, delay=Duration(seconds=100))
    now = await stats(world)
    assert not now.paused and now.parked_until_time.ToMilliseconds() == world.now + 100_000


def answer(missing: tuple[int, ...] = (), **fields: Any) -> Peer:
    """A node that counts so."""
    made = pb.DestinationStats(**fields)
    return Peer({"GetDestinationStats": pb.GetDestinationStatsResponse(stats=made, shards_missing=missing)})


async def test_the_counts_of_all_nodes_are_added(world: World) -> None:
    """Each shard is counted once, by the node that leads it; consumers are connected to every node, so they are not added."""
    await world.put("d", b"1", b"2")
    total = pb.DestinationStats.DESCRIPTOR.fields
    other = {f.name: f.number * 100 for f in total if f.message_type is None and f.name != "paused"}
    n2 = answer(paused=True, **other)
    n2.answers["GetDestinationStats"].stats.oldest_enqueue_time.FromMilliseconds(5)
    n2.answers["GetDestinationStats"].stats.parked_until_time.FromMilliseconds(world.now + 7)
    own = await stats(world)
    shard = world.node.shard_of(b"d\0t\0k")
    world.node.shards[3 - shard].leading = False
    world.consumer(0)
    asked = service(world, {shard: "n1", 3 - shard: "n2"}, {"n2": n2})
    found = await finish(world, asked.GetDestinationStats(pb.GetDestinationStatsRequest(name="d"), Context()))
    assert n2.calls[0][2] == (("spillway-shards", str(3 - shard)),) and not found.shards_missing
    for field, value in other.items():
        mine = getattr(own, field)
        assert getattr(found.stats, field) == (max(1 if field == "consumers" else 0, value) if field in (
            "consumers", "parked_tenants") else mine + value), field
    assert found.stats.paused and found.stats.oldest_enqueue_time.ToMilliseconds() == 5
    assert found.stats.parked_until_time.ToMilliseconds() == world.now + 7


async def test_shards_that_are_not_counted_are_named(world: World) -> None:
    """Without a leader, of a node that does not answer, or that is not the leader any more."""
    gone = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone")
    for runtime in world.node.shards.values():
        runtime.leading = False
    for leaders, peers, missing in (
            ({1: None, 2: "n2"}, {"n2": answer()}, [1]),
            ({1: None, 2: "n2"}, {"n2": Peer({"GetDestinationStats": gone})}, [1, 2]),
            ({1: "n2", 2: "n2"}, {"n2": answer((2,))}, [2]),
            ({1: "n1", 2: "n2"}, {"n2": answer()}, [1])):
        asked = service(world, leaders, peers)  # type: ignore[arg-type]
        found = await finish(world, asked.GetDestinationStats(pb.GetDestinationStatsRequest(name="d"), Context()))
        assert list(found.shards_missing) == missing
    await world.forwarder.close()  # this node stops: no way leads to another one
    asked = AdminService(world.node, world.forwarder)
    world.node.leader_of = {1: "n2", 2: "n2"}.get  # type: ignore[method-assign, assignment]
    found = await finish(world, asked.GetDestinationStats(pb.GetDestinationStatsRequest(name="d"), Context()))
    assert list(found.shards_missing) == [1, 2]
    found = await finish(world, asked.ListTopTenants(pb.ListTopTenantsRequest(destination="d"), Context()))
    assert list(found.shards_missing) == [1, 2]


async def test_a_node_counts_for_another_what_it_is_asked_for(world: World) -> None:
    """So that no shard counts twice when leaders change; what it does not lead is missing."""
    for key in "abcdefgh":
        await world.put("d", b"1", key=key)
    peer = AdminService(world.node, world.forwarder, peer=True)
    request = pb.GetDestinationStatsRequest(name="d")
    parts = [await finish(world, peer.GetDestinationStats(request, PeersContext(("spillway-shards", n)))) for n in "12"]
    assert [p.stats.messages for p in parts] == [
        sum(world.node.shard_of(b"d\0t\0" + k.encode()) == n for k in "abcdefgh") for n in (1, 2)]
    world.node.shards[2].leading = False
    part = await finish(world, peer.GetDestinationStats(request, PeersContext(("spillway-shards", "1,2"))))
    assert part.stats.messages == parts[0].stats.messages and list(part.shards_missing) == [2]


async def test_dead_letters_have_the_key_that_was_produced(world: World) -> None:
    """In an unordered destination, too, where each message is a queue of its own."""
    world.know("loose", policy=Policy(ordered=False))
    await world.put("loose", b"1", b"2", tenant="t", key="k")
    for run in await world.take(world.consumer(10, 1 << 20, "loose")):
        world.settle(run, OUTCOME_REJECT, reason="bad")
    found = await world.admin("ListDeadLetters", pb.ListDeadLettersRequest(destination="loose"))
    assert sorted((x.tenant, x.key, x.message.payload) for x in found.dead_letters) == [("t", "k", b"1"), ("t", "k", b"2")]


@pytest.mark.parametrize("size", [1, 5, 16, 17, 1000])
async def test_pages_of_dead_letters_fit_an_answer(world: World, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each letter once and in order of its shard; large ones are fewer to a page."""
    world.know("d", policy=Policy(run_messages_max=100))
    sent = {f"k{k}": [b"%d.%d." % (k, i) + bytes(1000) for i in range(20)] for k in range(3)}
    for key, payloads_ in sent.items():
        await world.put("d", *payloads_, key=key)
    consumer = world.consumer(1000)
    for _ in range(60):
        for run in await world.take(consumer):
            world.settle(run, OUTCOME_REJECT, 0, reason="bad")
    assert world.totals("d").dead == 60
    monkeypatch.setattr(admin, "PAGE_BYTES_MAX", 7500)
    found: dict[str, list[bytes]] = {}
    token, count = "", 0
    while True:
        page = await world.admin("ListDeadLetters", pb.ListDeadLettersRequest(destination="d", page_size=size, page_token=token))
        assert len(page.dead_letters) <= min(size, 8)
        for letter in page.dead_letters:
            found.setdefault(letter.key, []).append(letter.message.payload)
            count += 1
        if not (token := page.next_page_token):
            break
    assert found == sent and count == 60


async def test_destinations_are_listed_without_secrets_and_in_pages(world: World) -> None:
    """By name; large ones are fewer to a page."""
    names = [f"n{i:03}" for i in range(20)]
    secret = "whsec_" + "A" * 32
    for name in names:
        await world.admin("CreateDestination", pb.CreateDestinationRequest(destination=pb.Destination(
            name=name, http=pb.HttpTarget(url="https://h/", signing_secrets=[secret]),
            policy=pb.DeliveryPolicy(tenants={f"{i:0250}": pb.TenantPolicy(weight=2) for i in range(700)}))))
    found, sizes, token = [], [], ""
    while True:
        page = await world.admin("ListDestinations", pb.ListDestinationsRequest(page_size=15, page_token=token))
        found += [x.name for x in page.destinations]
        assert not any(x.http.signing_secrets for x in page.destinations)
        assert page.ByteSize() < pages.PAGE_BYTES_MAX + (400 << 10)
        sizes.append(len(page.destinations))
        if not (token := page.next_page_token):
            break
    assert found == ["d", "da", *names] and max(sizes) < 15
    one = await world.admin("GetDestination", pb.GetDestinationRequest(name="n000"))
    assert one.destination.http.signing_secrets == [secret]


async def test_many_large_destinations_at_once_fit_the_log(world: World) -> None:
    """An entry of the log stays small, however many changes wait."""
    requests = [pb.CreateDestinationRequest(destination=pb.Destination(name=f"n{i}", policy=pb.DeliveryPolicy(
        tenants={f"{i:0250}": pb.TenantPolicy(weight=2) for i in range(1000)}))) for i in range(20)]
    calls = [asyncio.ensure_future(AdminService(world.node, world.forwarder).CreateDestination(r, Context())) for r in requests]
    for _ in range(30):
        await asyncio.sleep(0)
        world.host.turn()
    await asyncio.gather(*calls)
    assert len(world.node.meta.directory.destinations) == 22 and world.host.largest <= (1 << 20) + 1024
