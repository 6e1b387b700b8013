"""What operators do to messages and what they are told, on one node."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from node_world import Refused, World, payloads
from spillway.broker.core.directory import Hold
from spillway.broker.core.policy import Policy
from spillway.broker.runtime import chores
from spillway.broker.services import operations
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1.queue_service_pb2 import OUTCOME_DOWN, OUTCOME_REJECT, OUTCOME_RETRY, OUTCOME_THROTTLED


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node that leads everything."""
    made = World(tmp_path)
    made.know("d", "other")
    made.host.lead()
    yield made
    await made.forwarder.close()
    made.store.close()


async def kill(world: World, name: str, *payloads_: bytes, tenant: str = "t", key: str = "k") -> None:
    """Messages that end as dead letters."""
    await world.put(name, *payloads_, tenant=tenant, key=key)
    consumer = world.consumer(1000, 1 << 20, name)
    for _ in payloads_:
        run, = await world.take(consumer)
        world.settle(run, OUTCOME_REJECT, 0, reason="bad")
    world.node.scheduler.unsubscribe(consumer)


# -- peek, purge -----------------------------------------------------------------------------------------------------------


async def test_peek_shows_the_first_messages_and_takes_none(world: World) -> None:
    """With attempts, lease, times; from memory or from the store."""
    await world.put("d", b"0", b"1", b"2", ttl=Duration(seconds=60))
    consumer = world.consumer(2)
    run, = await world.take(consumer)
    assert len(run.messages) == 2
    for checkpoint in (False, True):
        if checkpoint:
            for runtime in world.node.shards.values():
                runtime.checkpoint()
        answer = await world.admin("PeekMessages", pb.PeekMessagesRequest(destination="d", tenant="t", key="k"))
        assert [(m.message.payload, m.leased, m.attempts) for m in answer.messages] == [
            (b"0", True, 0), (b"1", True, 0), (b"2", False, 0)]
        assert answer.count == 3 and answer.messages[0].expire_time.ToMilliseconds() == world.now + 60_000
    world.settle(run, OUTCOME_RETRY, 0, delay=Duration(seconds=5))
    answer = await world.admin("PeekMessages", pb.PeekMessagesRequest(destination="d", tenant="t", key="k", limit=1))
    head, = answer.messages
    assert (head.attempts, head.leased, head.deliver_time.ToMilliseconds()) == (1, False, world.now + 5000)
    answer = await world.admin("PeekMessages", pb.PeekMessagesRequest(destination="d", tenant="t", key="none"))
    assert (len(answer.messages), answer.count) == (0, 0)


async def test_peek_into_an_unordered_queue(world: World) -> None:
    """Its messages stand under names of their own; for people they are one queue."""
    world.know("loose", policy=Policy(ordered=False))
    await world.put("loose", b"0", b"1", b"2")
    answer = await world.admin("PeekMessages", pb.PeekMessagesRequest(destination="loose", tenant="t", key="k"))
    assert sorted(m.message.payload for m in answer.messages) == [b"0", b"1", b"2"] and answer.count == 3


@pytest.mark.parametrize(("scope", "left"), [
    ({}, 0), ({"tenant": "a"}, 30), ({"tenant": "a", "key": "k1"}, 58), ({"tenant": "none"}, 60)])
async def test_purge_removes_what_it_names_and_nothing_else(world: World, scope: dict[str, str], left: int) -> None:
    """Leased or not, in memory or not; first counted, then done."""
    await world.put("other", b"stays")
    for tenant in ("a", "b"):
        for i in range(15):
            await world.put("d", b"x", b"y", tenant=tenant, key=f"k{i}")
        for runtime in world.node.shards.values():
            runtime.checkpoint()
    runs = await world.take(world.consumer(7))
    assert runs
    counted = await world.admin("PurgeMessages", pb.PurgeMessagesRequest(destination="d", validate_only=True, **scope))
    assert counted.messages == 60 - left and world.totals("d").messages == 60
    done = await world.admin("PurgeMessages", pb.PurgeMessagesRequest(destination="d", **scope))
    assert (done.messages, done.queues) == (60 - left, (60 - left) // 2)
    totals = world.totals("d")
    assert (totals.messages, totals.purged, totals.queues) == (left, 60 - left, left // 2)
    assert world.totals("other").messages == 1
    refused = [bool(world.settle(run).errors) for run in runs]
    assert all(refused) == (not scope) or scope


async def test_purge_of_more_queues_than_an_entry_holds(world: World) -> None:
    """In slices."""
    for first in range(0, 1000, 250):
        for i in range(first, first + 250):
            await world.put("d", b"x", key=str(i))
    done = await world.admin("PurgeMessages", pb.PurgeMessagesRequest(destination="d"))
    assert done.messages == 1000 > chores.PURGES_PER_ENTRY_MAX


async def test_what_does_not_exist_is_not_found(world: World) -> None:
    """The field is named."""
    for method, request in (
            ("PeekMessages", pb.PeekMessagesRequest(destination="nope")),
            ("PurgeMessages", pb.PurgeMessagesRequest(destination="nope")),
            ("PurgeDeadLetters", pb.PurgeDeadLettersRequest(destination="nope")),
            ("RedriveDeadLetters", pb.RedriveDeadLettersRequest(destination="nope")),
            ("Explain", pb.ExplainRequest(destination="nope")),
            ("ListTopTenants", pb.ListTopTenantsRequest(destination="nope")),
            ("RedriveDeadLetters", pb.RedriveDeadLettersRequest(destination="d")),
            ("RedriveDeadLetters", pb.RedriveDeadLettersRequest(destination="d", tenant="t"))):
        with pytest.raises(Refused) as refused:
            await world.admin(method, request)
        assert refused.value.code.name == "NOT_FOUND"
        assert refused.value.details.startswith("tenant: " if request.destination == "d" and request.HasField("tenant") else "dest")


@pytest.mark.parametrize(("method", "request_", "field"), [
    ("PeekMessages", pb.PeekMessagesRequest(destination="d", limit=101), "limit"),
    ("PeekMessages", pb.PeekMessagesRequest(destination="d", key="a\tb"), "key"),
    ("PurgeMessages", pb.PurgeMessagesRequest(destination="d", key="k"), "tenant"),
    ("PurgeMessages", pb.PurgeMessagesRequest(destination="d*"), "destination"),
    ("RedriveDeadLetters", pb.RedriveDeadLettersRequest(destination="d", messages_per_second=0.01), "messages_per_second"),
    ("RedriveDeadLetters", pb.RedriveDeadLettersRequest(destination="d", messages_per_second=float("nan")), "messages_per_second"),
    ("Explain", pb.ExplainRequest(destination="d", key="k"), "tenant"),
    ("ListTopTenants", pb.ListTopTenantsRequest(destination="d", limit=1001), "limit"),
])
async def test_wrong_requests_are_refused_by_field(world: World, method: str, request_: object, field: str) -> None:
    """INVALID_ARGUMENT."""
    with pytest.raises(Refused) as refused:
        await world.admin(method, request_)
    assert refused.value.code.name == "INVALID_ARGUMENT" and refused.value.details.startswith(field + ":")


# -- dead letters ----------------------------------------------------------------------------------------------------------


async def test_redrive_puts_dead_letters_ahead_of_later_messages(world: World) -> None:
    """In their original order; the gap that they left is closed."""
    await kill(world, "d", b"0", b"1", b"2")
    await world.put("d", b"3", b"4")
    answers = await world.admin("RedriveDeadLetters", pb.RedriveDeadLettersRequest(destination="d", messages_per_second=1e5))
    assert answers[-1].done and answers[-1].redriven == 3
    run, = await world.take(world.consumer(10))
    assert payloads([run]) == [b"0", b"1", b"2", b"3", b"4"] and not run.HasField("gap")
    totals = world.totals("d")
    assert (totals.dead, totals.redriven) == (0, 3)


async def test_a_run_ends_before_what_is_still_missing(world: World) -> None:
    """Of three dead letters the first comes back; its run holds nothing from behind the others, and the next one tells."""
    await world.put("d", b"0", b"1", b"2", b"3")
    consumer = world.consumer(100)
    for _ in range(3):
        run, = await world.take(consumer)
        world.settle(run, OUTCOME_REJECT, 0)
    run, = await world.take(consumer)
    world.settle(run, OUTCOME_RETRY, 0, delay=Duration(seconds=1))
    runtime, = [r for r in world.node.shards.values() if r.state.counters.get(b"d")]
    (key, row), *_ = runtime.state.dead_letters(b"d", None, b"", 3)
    back = runtime.chores.redrive(key, len(row.body))
    world.host.turn()
    assert await back
    run, = await world.take(consumer)
    assert payloads([run]) == [b"0"] and not run.HasField("gap")
    world.settle(run)
    run, = await world.take(consumer)
    assert payloads([run]) == [b"3"] and run.gap.count == 2


async def test_redrive_of_one_queue_or_tenant_leaves_the_others(world: World) -> None:
    """And counting changes nothing."""
    await kill(world, "d", b"0", b"1", tenant="a", key="x")
    await kill(world, "d", b"2", tenant="a", key="y")
    await kill(world, "d", b"3", tenant="b")
    counted, = await world.admin("RedriveDeadLetters", pb.RedriveDeadLettersRequest(
        destination="d", tenant="a", validate_only=True))
    assert (counted.redriven, counted.done, world.totals("d").dead) == (3, True, 4)
    await world.admin("RedriveDeadLetters", pb.RedriveDeadLettersRequest(
        destination="d", tenant="a", key="x", messages_per_second=1e5))
    assert (world.totals("d").dead, world.totals("d").messages) == (2, 2)


async def test_redrive_waits_for_a_leased_queue_and_keeps_its_order(world: World) -> None:
    """The other queues do not wait for it."""
    world.clock_runs = True
    await kill(world, "d", b"0", b"1", b"2", key="busy")
    await kill(world, "d", b"9", key="free")
    await world.put("d", b"3", b"4", key="busy")
    consumer = world.consumer(1)
    run, = await world.take(consumer)
    assert payloads([run]) == [b"3"]
    redrive = asyncio.ensure_future(world.admin("RedriveDeadLetters", pb.RedriveDeadLettersRequest(
        destination="d", messages_per_second=1e5)))
    for _ in range(50):
        await asyncio.sleep(0.002)
    assert not redrive.done() and world.totals("d").dead == 3
    world.settle(run)
    answers = await redrive
    assert answers[-1].redriven == 4
    runs = await world.take(world.consumer(10))
    assert {r.key: payloads([r]) for r in runs} == {"busy": [b"0", b"1", b"2", b"4"], "free": [b"9"]}


async def test_redrive_keeps_the_order_of_a_queue_that_was_leased_for_a_moment(world: World) -> None:
    """Its first dead letter is refused for the lease, which ends at once: the second one waits for the first all the same."""
    world.clock_runs = True
    await kill(world, "d", b"0", b"1", b"2", key="busy")
    await world.put("d", b"3", key="busy")
    consumer = world.consumer(1)
    run, = await world.take(consumer)
    redrive = asyncio.ensure_future(world.admin("RedriveDeadLetters", pb.RedriveDeadLettersRequest(
        destination="d", messages_per_second=20)))  # one at a time
    await asyncio.sleep(0.02)
    world.settle(run)
    got = []
    for _ in range(300):
        world.node.scheduler.credit(consumer, 1 - consumer.messages, 1 << 20)
        for run in await world.take(consumer):
            got += payloads([run])
            world.settle(run)
        if redrive.done():
            break
    await redrive
    got += payloads(await world.take(world.consumer(10)))
    assert got == [b"0", b"1", b"2"]


async def test_redrive_keeps_its_rate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ten a second, three tenths of a second bring four back at most."""
    monkeypatch.setattr(operations, "REDRIVE_SLICE_SECONDS", 0.01)
    world.clock_runs = True
    await kill(world, "d", *[b"%d" % i for i in range(20)])
    redrive = asyncio.ensure_future(world.admin("RedriveDeadLetters", pb.RedriveDeadLettersRequest(
        destination="d", messages_per_second=10)))
    await asyncio.sleep(0.3)
    assert 1 <= world.totals("d").redriven <= 4
    redrive.cancel()
    await asyncio.gather(redrive, return_exceptions=True)
    before = world.totals("d").redriven
    await asyncio.sleep(0.2)
    world.host.turn()
    assert world.totals("d").redriven <= before + 1


async def test_purge_of_dead_letters(world: World) -> None:
    """Of a tenant, or all; first counted."""
    await kill(world, "d", *[b"x"] * 30, tenant="a")
    await kill(world, "d", b"y", tenant="b")
    for runtime in world.node.shards.values():
        runtime.checkpoint()
    counted = await world.admin("PurgeDeadLetters", pb.PurgeDeadLettersRequest(destination="d", validate_only=True))
    assert (counted.dead_letters, world.totals("d").dead) == (31, 31)
    done = await world.admin("PurgeDeadLetters", pb.PurgeDeadLettersRequest(destination="d", tenant="a"))
    assert (done.dead_letters, world.totals("d").dead) == (30, 1)


# -- explain ---------------------------------------------------------------------------------------------------------------


async def explain(world: World, destination: str = "d", **scope: str) -> pb.ExplainResponse:
    """The answer; its sentence is one."""
    answer: pb.ExplainResponse = await world.admin("Explain", pb.ExplainRequest(destination=destination, **scope))
    assert answer.sentence.endswith(".") and "\n" not in answer.sentence
    return answer


async def test_explain_says_what_a_queue_waits_for(world: World) -> None:
    """Every cause in turn, with its time and a sentence for people."""
    queue = {"tenant": "t", "key": "k"}
    assert (await explain(world, **queue)).cause == pb.STALL_CAUSE_EMPTY
    await world.put("d", b"0", b"1")
    told = await explain(world, **queue)
    assert told.cause == pb.STALL_CAUSE_NO_CONSUMER and "no consumer subscribes" in told.sentence and told.messages == 2
    consumer = world.consumer(0)
    assert (await explain(world, **queue)).cause == pb.STALL_CAUSE_NO_CREDIT
    world.node.scheduler.credit(consumer, 10, 1 << 20)
    run, = await world.take(consumer)
    told = await explain(world, **queue)
    assert told.cause == pb.STALL_CAUSE_LEASED and "leased by 'c' until" in told.sentence
    assert told.until_time.ToMilliseconds() == run.expire_unix_ms
    world.settle(run, OUTCOME_RETRY, 0, delay=Duration(seconds=7))
    told = await explain(world, **queue)
    assert told.cause == pb.STALL_CAUSE_BACKOFF and "failed 1 times" in told.sentence
    assert told.until_time.ToMilliseconds() == world.now + 7000
    world.tick(7000)
    run, = await world.take(consumer)
    world.settle(run, OUTCOME_THROTTLED, 0, delay=Duration(seconds=9))
    told = await explain(world, **queue)
    assert told.cause == pb.STALL_CAUSE_PARKED and "the tenant is parked until" in told.sentence
    assert told.until_time.ToMilliseconds() == world.now + 9000
    world.tick(9000)
    run, = await world.take(consumer)
    world.settle(run, OUTCOME_DOWN, 0, delay=Duration(seconds=9))
    told = await explain(world, **queue)
    assert told.cause == pb.STALL_CAUSE_PARKED and "the destination is parked until" in told.sentence


async def test_explain_tells_of_delays_and_pauses(world: World) -> None:
    """A pause comes first."""
    await world.put("d", b"0", delay=Duration(seconds=60))
    world.consumer(10)
    told = await explain(world, tenant="t", key="k")
    assert told.cause == pb.STALL_CAUSE_DELAYED and told.until_time.ToMilliseconds() == world.now + 60_000
    world.node.meta.directory.holds[b"d"] = Hold(b"d", "maintenance", 0, "")
    world._meta_changed()
    told = await explain(world, tenant="t", key="k")
    assert told.cause == pb.STALL_CAUSE_PAUSED and "paused by an operator (maintenance)" in told.sentence


async def test_explain_says_when_a_destination_will_have_drained(world: World) -> None:
    """At the pace of the last half minute."""
    await world.put("d", *[b"x"] * 100)
    consumer = world.consumer(40)
    run, = await world.take(consumer)
    world.settle(run)
    world.now += 10_000
    told = await explain(world)
    assert told.messages == 60 and "will be delivered in about 15 s" in told.sentence
    assert told.drain_time.ToMilliseconds() == world.now + 15_000


# -- tenants ---------------------------------------------------------------------------------------------------------------


async def test_top_tenants_over_all_shards(world: World) -> None:
    """By messages, with their bytes."""
    for i, tenant in enumerate(("small", "middle", "big")):
        for j in range(5 * (i + 1)):
            await world.put("d", b"12345678", tenant=tenant, key=str(j))
    answer = await world.admin("ListTopTenants", pb.ListTopTenantsRequest(destination="d", limit=2))
    assert [(t.tenant, t.messages, t.message_bytes) for t in answer.tenants] == [("big", 15, 150), ("middle", 10, 100)]
