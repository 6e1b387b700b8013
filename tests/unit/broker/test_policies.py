"""Policies on one node: what a destination's policy makes of its messages, seen by producers, consumers and operators."""
from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from node_world import Problem, World, payloads
from spillway.broker.core.policy import Nack, Policy, Retention, TenantPolicy
from spillway.v1.message_pb2 import ERROR_CODE_INVALID_ARGUMENT, ERROR_CODE_OVER_BUDGET
from spillway.v1.queue_service_pb2 import OUTCOME_DOWN, OUTCOME_EXTEND, OUTCOME_REJECT, OUTCOME_RETRY

SECOND = 1000


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node that leads everything."""
    made = World(tmp_path)
    made.host.lead()
    yield made
    await made.forwarder.close()
    made.store.close()


def seconds(value: float) -> Duration:
    """A duration."""
    duration = Duration()
    duration.FromMilliseconds(int(value * 1000))
    return duration


# -- time to live, delay ---------------------------------------------------------------------------------------------------


async def test_a_message_past_the_policys_ttl_goes_to_the_dead_letters(world: World) -> None:
    """It is not delivered; the next one is, and says that something is missing before it."""
    world.know("d", policy=Policy(ttl_ms=10 * SECOND))
    first, = await world.put("d", b"old")
    world.now += 6 * SECOND
    await world.put("d", b"young")
    world.now += 5 * SECOND
    run, = await world.take(world.consumer(10))
    assert payloads([run]) == [b"young"]
    assert (run.gap.count, run.gap.first_sequence, run.gap.last_sequence) == (1, first, first)
    totals = world.totals("d")
    assert (totals.messages, totals.dead, totals.ttl_expired, totals.dead_lettered) == (1, 1, 1, 1)


async def test_a_message_has_a_ttl_of_its_own(world: World) -> None:
    """Where dead letters are not kept, it is discarded and counted."""
    world.know("d", policy=Policy(discard=True))
    await world.put("d", b"short", ttl=seconds(1))
    await world.put("d", b"long", ttl=seconds(100))
    world.now += 2 * SECOND
    runs = await world.take(world.consumer(10))
    assert payloads(runs) == [b"long"]
    totals = world.totals("d")
    assert (totals.dead, totals.discarded, totals.ttl_expired) == (0, 1, 1)


async def test_time_passes_behind_a_closed_gate_too(world: World) -> None:
    """A parked destination's messages go when their time has passed, though nobody picks them."""
    world.know("d", policy=Policy(ttl_ms=10 * SECOND))
    consumer = world.consumer(1)
    await world.put("d", b"probe", key="p")
    run, = await world.take(consumer)
    world.settle(run, OUTCOME_DOWN, delay=seconds(3600))
    for i in range(40):
        await world.put("d", b"x", key=f"k{i}")
    world.tick(11 * SECOND)
    assert (world.totals("d").messages, world.totals("d").ttl_expired) == (0, 41)


async def test_an_expired_head_does_not_hold_up_whom_it_hides(world: World) -> None:
    """1,500 expired messages of a queue, more than go at a time, and one that is well behind them."""
    world.know("d", policy=Policy(discard=True))
    for _ in range(3):
        await world.put("d", *[b"x"] * 500, ttl=seconds(1))
    await world.put("d", b"well")
    world.now += 2 * SECOND
    consumer = world.consumer(10)
    runs = await world.take(consumer) + await world.take(consumer)
    assert payloads(runs) == [b"well"] and world.totals("d").ttl_expired == 1500


async def test_a_run_ends_before_a_message_whose_time_has_passed(world: World) -> None:
    """It is not delivered for coming behind one that is well."""
    world.know("d")
    await world.put("d", b"long", b"also")
    await world.put("d", b"short", ttl=seconds(1))
    await world.put("d", b"last")
    world.now += 2 * SECOND
    consumer = world.consumer(10)
    run, = await world.take(consumer)
    assert payloads([run]) == [b"long", b"also"]
    world.settle(run)
    runs = await world.take(consumer)
    assert payloads(runs) == [b"last"] and runs[0].gap.count == 1


async def test_deliver_at_is_a_delay(world: World) -> None:
    """Not before that moment; the past is now; both at once is refused."""
    world.know("d")
    at = Timestamp()
    at.FromMilliseconds(world.now + 5 * SECOND)
    await world.put("d", b"later", deliver_at=at)
    consumer = world.consumer(10)
    assert not await world.take(consumer)
    world.tick(4900)
    assert not await world.take(consumer)
    world.tick(100)
    assert payloads(await world.take(consumer)) == [b"later"]
    at.FromMilliseconds(world.now - 1)
    await world.put("d", b"now", key="other", deliver_at=at)
    assert payloads(await world.take(consumer)) == [b"now"]
    with pytest.raises(Problem) as refused:
        await world.put("d", b"", deliver_at=at, delay=seconds(1))
    assert (refused.value.code, refused.value.field) == (ERROR_CODE_INVALID_ARGUMENT, "records[0].deliver_at")
    at.FromMilliseconds(world.now + 8 * 86_400 * SECOND)
    with pytest.raises(Problem) as refused:
        await world.put("d", b"", deliver_at=at)
    assert "more than 7 days" in refused.value.description


@pytest.mark.parametrize("ttl", [0.0, 367 * 86_400.0])
async def test_a_wrong_ttl_is_refused(world: World, ttl: float) -> None:
    """The field is named and nothing is stored."""
    world.know("d")
    with pytest.raises(Problem) as refused:
        await world.put("d", b"", ttl=seconds(ttl))
    assert (refused.value.code, refused.value.field) == (ERROR_CODE_INVALID_ARGUMENT, "records[0].ttl")
    assert world.totals("d").enqueued == 0


# -- deduplication ---------------------------------------------------------------------------------------------------------


async def test_a_dedup_id_is_stored_once_within_its_window(world: World) -> None:
    """The second is acknowledged with the sequence of the first; another queue's id is another; after the window it counts
    as new."""
    world.know("d", policy=Policy(dedup_ms=60 * SECOND))
    first, = await world.put("d", b"1", dedup_id="x")
    again = await world.put("d", b"2", b"3", dedup_id="x")
    assert again == [first, first]
    await world.put("d", b"4", key="other", dedup_id="x")
    assert world.totals("d").enqueued == 2
    world.now += 60 * SECOND
    late, = await world.put("d", b"5", dedup_id="x")
    assert late != first
    totals = world.totals("d")
    assert (totals.enqueued, totals.deduplicated) == (3, 2)


async def test_a_dedup_id_outlives_its_message_and_a_checkpoint(world: World) -> None:
    """What was delivered long since is still not stored again."""
    world.know("d")
    first, = await world.put("d", b"1", dedup_id="x")
    run, = await world.take(world.consumer(1))
    world.settle(run)
    for runtime in world.node.shards.values():
        runtime.checkpoint()
        runtime.state.reload()
        runtime.rows.commit(runtime.applied, 1, [], [], [])
    assert await world.put("d", b"2", dedup_id="x") == [first]
    assert world.totals("d").messages == 0


# -- limits of size and budget ---------------------------------------------------------------------------------------------


async def test_a_destination_may_take_smaller_messages_only(world: World) -> None:
    """The limit is named."""
    world.know("d", policy=Policy(message_bytes_max=100))
    await world.put("d", bytes(98))
    with pytest.raises(Problem) as refused:
        await world.put("d", bytes(99))
    assert (refused.value.code, refused.value.field) == (ERROR_CODE_INVALID_ARGUMENT, "records[0].message")
    assert "message_bytes_max" in refused.value.description


async def test_a_destination_over_its_budget_pushes_back(world: World) -> None:
    """Produce is refused before anything is lost, naming the destination; other destinations go on; what is acknowledged
    makes room."""
    world.know("full", policy=Policy(retention=Retention(bytes_max=1000)))
    world.know("d")
    for i in range(9):
        await world.put("full", bytes(98), key=str(i))
    with pytest.raises(Problem) as refused:
        await world.put("full", bytes(200))
    assert (refused.value.code, refused.value.field) == (ERROR_CODE_OVER_BUDGET, "records[0].destination")
    assert "destination 'full' is over its retention budget" in refused.value.description
    await world.put("d", bytes(5000))
    consumer = world.consumer(2, 1 << 20, "full")
    for run in await world.take(consumer):
        world.settle(run)
    world.now += 100
    await world.put("full", bytes(198))


async def test_a_tenants_budget_is_its_own(world: World) -> None:
    """One tenant at its limit; another one, and one with a larger budget, go on."""
    world.know("d", policy=Policy(tenant_retention=Retention(bytes_max=100),
                                  tenants={"big": TenantPolicy(retention=Retention(bytes_max=1000))}))
    await world.put("d", bytes(90), tenant="a")
    with pytest.raises(Problem) as refused:
        await world.put("d", bytes(90), tenant="a")
    assert "tenant 'a' of destination 'd'" in refused.value.description
    await world.put("d", bytes(90), tenant="b")
    await world.put("d", bytes(900), tenant="big")


async def test_a_budget_holds_within_one_request(world: World) -> None:
    """Many records at once do not slip past it."""
    world.know("d", policy=Policy(retention=Retention(bytes_max=1000)))
    with pytest.raises(Problem) as refused:
        await world.put("d", *[bytes(98)] * 20)
    assert refused.value.index == 10 and world.totals("d").messages == 10


async def test_a_changed_policy_takes_effect_on_what_waits(world: World) -> None:
    """Shorter runs, another nack policy: from the next lease on."""
    world.know("d", policy=Policy(run_messages_max=3))
    await world.put("d", *[b"%d" % i for i in range(9)])
    consumer = world.consumer(100)
    run, = await world.take(consumer)
    assert len(run.messages) == 3
    world.know("d", policy=Policy(run_messages_max=2, nack=Nack.SKIP))
    world.settle(run)
    run, = await world.take(consumer)
    assert payloads([run]) == [b"3", b"4"]
    world.settle(run, OUTCOME_RETRY, 0, reason="no")
    run, = await world.take(consumer)
    assert payloads([run]) == [b"4", b"5"] and run.gap.count == 1


# -- outcomes --------------------------------------------------------------------------------------------------------------


async def test_where_dead_letters_are_not_kept_rejects_are_counted(world: World) -> None:
    """The successor still says that something is missing."""
    world.know("d", policy=Policy(discard=True))
    await world.put("d", b"bad", b"good")
    consumer = world.consumer(10)
    run, = await world.take(consumer)
    world.settle(run, OUTCOME_REJECT, 0)
    run, = await world.take(consumer)
    assert payloads([run]) == [b"good"] and run.gap.count == 1
    totals = world.totals("d")
    assert (totals.dead, totals.discarded, totals.dead_lettered) == (0, 1, 0)


async def test_no_consumer_leases_for_longer_than_the_policy_allows(world: World) -> None:
    """Whatever it asked for."""
    world.know("d", policy=Policy(lease_ms=10 * SECOND, lease_ms_max=30 * SECOND))
    await world.put("d", b"x")
    consumer = world.consumer(1)
    consumer.lease_ms = 3600 * SECOND
    run, = await world.take(consumer)
    assert run.expire_unix_ms == world.now + 30 * SECOND


async def test_a_lease_is_extended_up_to_its_maximum(world: World) -> None:
    """Counted from the grant; what is beyond is refused and leaves the lease as it is."""
    world.know("d", policy=Policy(lease_ms=10 * SECOND, lease_ms_max=30 * SECOND))
    await world.put("d", b"x")
    run, = await world.take(world.consumer(1))
    world.now += 9 * SECOND
    assert not world.settle(run, OUTCOME_EXTEND, delay=seconds(20)).errors
    error, = world.settle(run, OUTCOME_EXTEND, delay=seconds(22)).errors
    assert error[2] == "settlements[0].delay" and "lease_duration_max" in error[3]
    world.now += 19 * SECOND
    assert not world.settle(run).errors


# -- unordered -------------------------------------------------------------------------------------------------------------


async def test_an_unordered_destination_leases_every_message_on_its_own(world: World) -> None:
    """A failing one holds up none; names come without the number."""
    world.know("d", policy=Policy(ordered=False))
    sequences = await world.put("d", *[b"%d" % i for i in range(5)])
    consumer = world.consumer(100)
    runs = await world.take(consumer)
    assert sorted(payloads(runs)) == [b"0", b"1", b"2", b"3", b"4"]
    assert {(run.destination, run.tenant, run.key, len(run.messages)) for run in runs} == {("d", "t", "k", 1)}
    assert {run.messages[0].sequence for run in runs} == set(sequences)
    by_payload = {payloads([run])[0]: run for run in runs}
    world.settle(by_payload[b"0"], OUTCOME_RETRY, delay=seconds(5))
    for i in range(1, 5):
        assert not world.settle(by_payload[b"%d" % i]).errors
    assert world.totals("d").messages == 1
    world.tick(5 * SECOND)
    run, = await world.take(consumer)
    assert (payloads([run]), run.messages[0].attempt) == ([b"0"], 2)


async def test_a_destination_becomes_unordered_with_what_it_has(world: World) -> None:
    """What was stored in order is delivered in order, what comes later is not held up by it."""
    world.know("d")
    await world.put("d", b"old 1", b"old 2")
    world.know("d", policy=Policy(ordered=False))
    await world.put("d", b"new")
    consumer = world.consumer(100)
    runs = await world.take(consumer)
    assert sorted(payloads([run]) for run in runs) == [[b"new"], [b"old 1", b"old 2"]]


def test_policies_of_an_older_row_are_read() -> None:
    """A policy with fewer fields takes the defaults for the rest."""
    old = msgspec.msgpack.encode((64, 30_000, 200, 60_000, 1, 0, 0))
    assert msgspec.msgpack.decode(old, type=Policy) == Policy()
