"""Routes on one node: what is produced to a source reaches every target, once and in order, or is refused as a whole."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from node_world import Problem, World, payloads
from spillway.broker.core import queue, state
from spillway.broker.core.directory import Target
from spillway.broker.core.outbox import OUTBOX
from spillway.broker.core.policy import Policy, Retention
from spillway.broker.runtime import copier
from spillway.broker.runtime.calls import Batch
from spillway.broker.runtime.shard import ShardRuntime
from spillway.cluster.machine import Role
from spillway.v1.message_pb2 import ERROR_CODE_OVER_BUDGET, ERROR_CODE_UNAVAILABLE, Message
from spillway.v1.queue_service_pb2 import OUTCOME_DOWN, ProduceRecord


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node that leads everything, with three destinations."""
    made = World(tmp_path)
    made.know("a", "b", "c")
    made.host.lead()
    yield made
    for runtime in made.node.shards.values():
        runtime.copier.stop()
    await made.forwarder.close()
    made.store.close()


async def settle_down(world: World) -> None:
    """Turns until nothing is left to copy."""
    for _ in range(50):
        world.host.turn()
        await asyncio.sleep(0)


def outboxes(world: World) -> int:
    """Messages that wait to be copied, or to be removed after it."""
    return sum(q.count for r in world.node.shards.values() if (q := r.state.open(OUTBOX)) is not None)


async def test_every_target_gets_a_copy_in_order(world: World) -> None:
    """Of the same tenant and key, in the order of the source's queue."""
    world.route("s", "a", "b")
    for i in range(20):
        await world.put("s", b"%d.0" % i, b"%d.1" % i, tenant="t", key=f"k{i % 3}")
    await settle_down(world)
    assert outboxes(world) == 0
    for name in ("a", "b"):
        runs = await world.take(world.consumer(1000, 1 << 20, name))
        got = {run.key: payloads([run]) for run in runs}
        assert got == {f"k{k}": [b"%d.%d" % (i, j) for i in range(k, 20, 3) for j in (0, 1)] for k in range(3)}
    assert world.totals("c").enqueued == 0


async def test_the_producer_is_told_when_the_copies_are_stored(world: World) -> None:
    """Not before: the shards of the targets commit nothing for a while."""
    world.route("s", "a")
    call = world.ingest(ProduceRecord(destination="s", message=Message(payload=b"x")))
    for _ in range(20):
        for machine in world.host.machines.values():
            if (command := machine.collect()) is not None:  # only the source's entry is committed
                if b"\2\0\0" in command:
                    world.host.indexes[number_of(world, machine)] += 1
                    machine.apply(world.host.indexes[number_of(world, machine)], 1, command)
                else:
                    break
        await asyncio.sleep(0)
    assert not call.done.done() and world.totals("a").enqueued == 0


def number_of(world: World, machine: object) -> int:
    """The group of a machine."""
    return next(n for n, m in world.host.machines.items() if m is machine)


async def test_filters_choose(world: World) -> None:
    """By headers, tenant, key and id; what no target wants is taken and gone."""
    world.route("s", Target("a", 'headers["kind"] == "order"'), Target("b", 'tenant == "t" && key.startsWith("k")'),
                Target("c", 'id == "7"'))
    call = world.ingest(
        ProduceRecord(destination="s", tenant="t", key="k1", message=Message(payload=b"1", headers={"kind": "order"})),
        ProduceRecord(destination="s", tenant="u", key="k1", message=Message(payload=b"2", headers={"kind": "order"})),
        ProduceRecord(destination="s", tenant="u", key="k1", message=Message(payload=b"3", id="7", headers={"kind": "x"})),
        ProduceRecord(destination="s", tenant="u", key="k1", message=Message(payload=b"4", headers={"kind": "x"})))
    await settle_down(world)
    assert call.done.done() and not call.errors and all(call.results)
    found = {}
    for name in ("a", "b", "c"):
        found[name] = sorted(payloads(await world.take(world.consumer(1000, 1 << 20, name))))
    assert found == {"a": [b"1", b"2"], "b": [b"1"], "c": [b"3"]}


async def test_a_filter_that_fails_on_a_message_is_counted(world: World) -> None:
    """A header that is not there: that target gets no copy, the others do."""
    world.route("s", Target("a", 'headers["missing"] == "x"'), "b")
    await world.put("s", b"1")
    await settle_down(world)
    assert (world.totals("a").enqueued, world.totals("a").overflowed, world.totals("b").enqueued) == (0, 1, 1)


async def test_routes_of_routes_copy_once(world: World) -> None:
    """A destination that is reached on two ways gets one copy."""
    world.route("inner", "a", "b")
    world.route("s", "inner", "a", "c")
    await world.put("s", b"x")
    await settle_down(world)
    assert [world.totals(name).enqueued for name in ("a", "b", "c")] == [1, 1, 1]


async def test_a_producers_retry_makes_no_second_copy(world: World) -> None:
    """The same numbers again are acknowledged, and nothing more is stored anywhere."""
    world.route("s", "a", "b")
    records = [ProduceRecord(destination="s", key="k", producer_sequence=i + 1, message=Message(payload=b"%d" % i))
               for i in range(5)]
    for _ in range(3):
        call = world.ingest(*records, producer_id="p")
        await settle_down(world)
        assert call.done.done() and not call.errors
    assert [world.totals(name).enqueued for name in ("a", "b")] == [5, 5]


@pytest.mark.parametrize("lost", range(12))
async def test_a_change_of_leader_makes_no_second_copy_and_loses_none(world: World, lost: int) -> None:
    """Wherever the copier was when its node lost and regained the shard, every target has every copy once, in order."""
    world.route("s", "a", "b", "c")
    calls = [world.ingest(ProduceRecord(destination="s", tenant="t", key="k", producer_sequence=i + 1,
                                        message=Message(payload=b"%d" % i)), producer_id="p") for i in range(30)]
    shard = world.node.shard_of(b"s\0t\0k")
    for _ in range(lost):
        world.host.turn()
        await asyncio.sleep(0)
    world.host.machines[shard].role_changed(Role.FOLLOWER, 2, None)
    world.host.machines[shard].role_changed(Role.LEADER, 3, "n1")
    world.host.term[shard] = 3
    for _ in range(100):
        world.host.turn()
        await asyncio.sleep(0.001)
    # What had certainly not been stored, or may be repeated, was passed on; the rest of the calls ask again, as clients do.
    again = [world.ingest(ProduceRecord(destination="s", tenant="t", key="k", producer_sequence=i + 1,
                                        message=Message(payload=b"%d" % i)), producer_id="p") for i in range(30)]
    await settle_down(world)
    assert all(call.done.done() and not call.errors for call in again), [call.errors for call in calls + again]
    for name in ("a", "b", "c"):
        assert payloads(await world.take(world.consumer(1000, 1 << 20, name))) == [b"%d" % i for i in range(30)]


@pytest.mark.parametrize("lost", [{0}, {1}, {0, 2, 3}, {1, 2, 5, 8}])
async def test_pieces_that_are_lost_on_the_way_are_sent_again(world: World, monkeypatch: pytest.MonkeyPatch, lost: set[int]) -> None:
    """Those behind them may have arrived: they are not taken before the lost ones, and not twice."""
    monkeypatch.setattr(copier, "PIECE_BYTES", 200)
    monkeypatch.setattr(copier, "RETRY_SECONDS", 0.0)
    pieces = 0

    def lossy(runtime: ShardRuntime) -> Callable[[int, Batch], None]:
        deliver = runtime.enqueue

        def enqueue(stream: int, batch: Batch) -> None:
            nonlocal pieces
            if stream < 0:
                pieces += 1
                if pieces - 1 in lost:
                    batch.call.fail(0, ERROR_CODE_UNAVAILABLE, "", "lost on the way")
                    batch.call.release()
                    return
            deliver(stream, batch)
        return enqueue

    for runtime in world.node.shards.values():
        monkeypatch.setattr(runtime, "enqueue", lossy(runtime))
    world.route("s", "a", "b", "c")
    await world.put("s", *[b"%d" % i for i in range(30)])
    await settle_down(world)
    assert pieces > 10 and outboxes(world) == 0
    for name in ("a", "b", "c"):
        assert payloads(await world.take(world.consumer(1000, 1 << 20, name))) == [b"%d" % i for i in range(30)]


async def test_a_parked_target_holds_up_nobody(world: World) -> None:
    """Its copies wait in its own queues."""
    world.route("s", "a", "b")
    await world.put("s", b"0")
    run, = await world.take(world.consumer(1, 1 << 20, "a"))
    world.settle(run, OUTCOME_DOWN, delay=Duration(seconds=3600))
    for i in range(1, 10):
        await world.put("s", b"%d" % i)
    assert len(payloads(await world.take(world.consumer(100, 1 << 20, "b")))) == 10
    assert world.totals("a").messages == 10


async def test_a_target_over_budget_refuses_or_is_left_out_by_its_rule(world: World) -> None:
    """REFUSE refuses the record for all targets; SKIP leaves that one out and counts it."""
    world.know("full", policy=Policy(retention=Retention(bytes_max=10)))
    world.route("strict", "a", "full")
    world.route("lax", "a", Target("full", "", True))
    with pytest.raises(Problem) as refused:
        await world.put("strict", bytes(100))
    assert refused.value.code == ERROR_CODE_OVER_BUDGET
    assert "'full' is over its retention budget" in refused.value.description
    await world.put("lax", bytes(100))
    await settle_down(world)
    assert (world.totals("a").enqueued, world.totals("full").enqueued, world.totals("full").overflowed) == (1, 0, 1)


async def test_copies_keep_their_time(world: World) -> None:
    """A delay holds back the copies, not the copying; a time to live counts from the producer's send."""
    world.route("s", "a")
    await world.put("s", b"later", delay=Duration(seconds=5))
    await world.put("s", b"short", key="other", ttl=Duration(seconds=3))
    consumer = world.consumer(100, 1 << 20, "a")
    world.now += 4000
    assert not payloads(await world.take(consumer))
    world.tick(1000)
    assert payloads(await world.take(consumer)) == [b"later"]
    assert world.totals("a").ttl_expired == 1


async def test_an_unordered_target_gets_messages_of_their_own(world: World) -> None:
    """The target's policy decides, not the source."""
    world.know("loose", policy=Policy(ordered=False))
    world.route("s", "loose", "a")
    await world.put("s", b"1", b"2", b"3")
    await settle_down(world)
    assert len(await world.take(world.consumer(100, 1 << 20, "loose"))) == 3
    assert len(await world.take(world.consumer(100, 1 << 20, "a"))) == 1


async def test_many_messages_to_many_targets_keep_entries_small(world: World) -> None:
    """What counts is what the outbox stores: a small message with the names of a thousand targets is not small."""
    names = [f"{i:04d}" + "x" * 200 for i in range(1000)]
    world.know(*names)
    world.route("s", *names)
    call = world.ingest(*(ProduceRecord(destination="s", message=Message(payload=b"x")) for _ in range(30)))
    world.host.turn()
    assert world.host.largest < 1 << 20
    for _ in range(400):
        world.host.turn()
        await asyncio.sleep(0)
    assert call.done.done() and not call.errors and world.totals(names[-1]).enqueued == 30


async def test_large_messages_to_many_targets_are_copied_piece_by_piece(world: World) -> None:
    """More copies than fit a chunk: no target is left out, and memory stays bounded."""
    names = [f"t{i}" for i in range(100)]
    world.know(*names)
    world.route("s", *names)
    for i in range(3):
        await world.put("s", b"%d" % i * 100_000)
    await settle_down(world)
    assert {world.totals(name).enqueued for name in names} == {3} and outboxes(world) == 0
    assert world.host.largest < 2 << 20


async def test_an_outbox_that_was_put_away_is_still_emptied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint between the copies and their removal takes the outbox out of memory."""
    monkeypatch.setattr(state, "CACHE_BYTES_MAX", 0)
    world.route("s", "a", "b")
    copy = copier.Copier._copy

    async def then_save(self: copier.Copier, messages: list[queue.Message]) -> bool:
        done = await copy(self, messages)
        for runtime in world.node.shards.values():
            runtime.checkpoint()
        return done
    monkeypatch.setattr(copier.Copier, "_copy", then_save)
    call = world.ingest(ProduceRecord(destination="s", message=Message(payload=b"x")))
    await settle_down(world)
    assert call.done.done() and outboxes(world) == 0
