"""What a node tells of itself: counts that are exact, a number of series that is bounded, a scrape that costs no more with more queues."""
from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from node_world import World
from spillway.broker.core.policy import Policy
from spillway.broker.telemetry import registry
from spillway.broker.telemetry.collect import Collector
from spillway.broker.telemetry.fairness import WINDOW_MS, jain
from spillway.broker.telemetry.walk import PAGE
from spillway.cluster.machine import Role
from spillway.contract.telemetry.metrics import Histogram, Value
from spillway.v1.queue_service_pb2 import OUTCOME_DOWN, OUTCOME_RETRY, OUTCOME_THROTTLED

Samples = dict[tuple[str, ...], Value]


class Metered(World):
    """A node that counts."""

    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path, **settings)
        self.collector = Collector(self.node)
        self.host.lead()

    async def scrape(self) -> Samples:
        """(metric, labels...) -> value."""
        return {(f.metric.name, *labels): value for f in await self.collector.collect() for labels, value in f.samples}

    async def told(self, name: str, *labels: str) -> Value:
        """One value."""
        return (await self.scrape())[name, *labels]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Metered]:
    """A node that leads everything."""
    made = Metered(tmp_path)
    made.know("d", "e")
    yield made
    for runtime in made.node.shards.values():
        runtime.copier.stop()
    await made.forwarder.close()
    made.store.close()


async def test_a_message_is_counted_at_each_step(world: Metered) -> None:
    """Stored, leased after 50 ms, failed, leased again, acknowledged after 100 ms more: totals, levels and durations say so."""
    await world.put("d", b"one", b"two")
    consumer = world.consumer(10)
    world.now += 50
    [run] = await world.take(consumer)
    found = await world.scrape()
    assert found["spillway_messages_enqueued_total", "d"] == found["spillway_messages_leased_total", "d"] == 2
    assert found["spillway_messages", "d", "leased"] == 2 and found["spillway_queues", "d", "leased"] == 1
    assert found["spillway_messages", "d", "waiting"] == 0
    world.settle(run, OUTCOME_RETRY, position=0, delay=Duration(seconds=1))
    found = await world.scrape()
    assert (found["spillway_queues", "d", "delayed"], found["spillway_messages", "d", "waiting"]) == (1, 2)
    world.tick(1000)
    [run] = await world.take(consumer)
    world.now += 100
    world.settle(run)
    found = await world.scrape()
    assert found["spillway_messages_retried_total", "d"] == found["spillway_messages_redelivered_total", "d"] == 1
    assert found["spillway_messages_leased_total", "d"] == 4 and found["spillway_messages_acked_total", "d"] == 2
    assert found["spillway_leases_ended_total", "d", "retry"] == found["spillway_leases_ended_total", "d", "ack"] == 1
    assert not any(found["spillway_messages", "d", state] for state in ("waiting", "leased", "parked", "dead"))
    wait, end = found["spillway_queue_wait_seconds", "d"], found["spillway_end_to_end_seconds", "d"]
    assert isinstance(wait, Histogram) and isinstance(end, Histogram)
    assert (wait.count, wait.total) == (4, 2 * 50 + 2 * 1050) and (end.count, end.total) == (2, 2 * 1150)
    assert found["spillway_messages_enqueued_total", "e"] == 0 if ("spillway_messages_enqueued_total", "e") in found else True


async def test_what_is_parked_is_told_from_what_waits(world: Metered) -> None:
    """A tenant's gate parks its messages, a destination's gate all of them, and seconds pass."""
    consumer = world.consumer(1)
    await world.put("d", b"1", b"2", tenant="a")
    await world.put("d", b"3", tenant="b")
    [run] = await world.take(consumer)
    assert run.tenant == "a"
    world.settle(run, OUTCOME_THROTTLED, delay=Duration(seconds=60))
    found = await world.scrape()
    assert (found["spillway_messages", "d", "parked"], found["spillway_messages", "d", "waiting"]) == (2, 1)
    assert (found["spillway_queues", "d", "parked"], found["spillway_queues", "d", "ready"]) == (1, 1)
    assert (found["spillway_parked", "d"], found["spillway_parked_tenants", "d"]) == (0, 1)
    world.node.scheduler.credit(consumer, 1, 1 << 20)
    [run] = await world.take(consumer)
    world.settle(run, OUTCOME_DOWN, delay=Duration(seconds=60))
    world.collector.ticked(1500)
    found = await world.scrape()
    assert (found["spillway_messages", "d", "parked"], found["spillway_messages", "d", "waiting"]) == (3, 0)
    assert found["spillway_queues", "d", "parked"] == 2
    assert (found["spillway_parked", "d"], found["spillway_parked_seconds_total", "d"]) == (1, 1.5)
    assert found["spillway_leases_ended_total", "d", "throttled"] == found["spillway_leases_ended_total", "d", "down"] == 1


async def test_a_change_of_leader_is_no_burst(world: Metered) -> None:
    """Counters go on where they were when a shard comes back: what others did with it is theirs, and nothing counts twice."""
    await world.put("d", b"1", b"2", key="x")
    shard = world.node.shard_of(b"d\0t\0x")
    runtime = world.node.shards[shard]
    world.host.machines[shard].role_changed(Role.FOLLOWER, 2, "n2")
    assert await world.told("spillway_messages_enqueued_total", "d") == 2
    runtime.state.counters[b"d"].enqueued += 1000  # applied as a follower
    world.host.term[shard] = 3
    world.host.machines[shard].role_changed(Role.LEADER, 3, "n1")
    assert await world.told("spillway_messages_enqueued_total", "d") == 2
    await world.put("d", b"3", key="x")
    assert await world.told("spillway_messages_enqueued_total", "d") == 3
    assert await world.told("spillway_messages_enqueued_total", "d") == 3


async def test_series_are_bounded(world: Metered) -> None:
    """With more destinations and tenants than may have a series, the rest counts as `other`, in sum; and the number of series stays
    where it is however many more come. What is deleted makes room."""
    names = [f"q{i}" for i in range(registry.DESTINATIONS_MAX + 40)]
    world.know(*names)
    for name in names:
        await world.put(name, b"x", tenant=f"t-{name}")
    await world.collector.walk.once()
    found = await world.scrape()
    series = len(found)
    told = {labels[1] for labels in found if labels[0] == "spillway_messages_enqueued_total"}
    assert len(told) == registry.DESTINATIONS_MAX + 1
    assert found["spillway_messages_enqueued_total", "other"] == 40 == found["spillway_metrics_destinations_folded",]
    assert found["spillway_messages", "other", "waiting"] == 40
    assert sum(v for k, v in found.items() if k[0] == "spillway_messages_enqueued_total") == len(names)
    assert sum(k[0] == "spillway_tenant_backlog_messages" for k in found) == registry.TENANTS_MAX
    for i in range(200):
        await world.put(f"more{i}", b"x", tenant=f"more{i}") if i % 2 else await world.put("q0", b"x", tenant=f"more{i}")
        world.know(f"more{i + 1}")
    await world.collector.walk.once()
    assert len(await world.scrape()) == series
    gone = names[:10]
    for name in gone:
        del world.node.meta.directory.destinations[name]
    await world.scrape()
    assert not {name.encode() for name in gone} & world.collector.meters.by_destination.keys()


async def test_what_a_scrape_reads_does_not_depend_on_queues(world: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    """With twenty times the queues, in the store and in memory, a scrape reads exactly as many rows and looks at as many counters."""
    reads = 0

    def counted(method: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal reads
            reads += 1
            return method(*arguments, **more)
        return call

    async def cost() -> int:
        nonlocal reads
        await world.collector.walk.once()
        for runtime in world.node.shards.values():
            runtime.checkpoint()
        reads = 0
        await world.scrape()
        return reads

    for i in range(2 * PAGE):
        await world.put("d", b"x", key=str(i))
    for runtime in world.node.shards.values():
        monkeypatch.setattr(runtime.rows, "get", counted(runtime.rows.get))
        monkeypatch.setattr(runtime.rows, "scan", counted(runtime.rows.scan))
    few = await cost()
    for i in range(40 * PAGE):
        await world.put("d", b"x", key=f"more{i}")
    assert await cost() <= few


async def test_a_walk_finds_who_waits_longest(world: Metered) -> None:
    """The oldest message and the oldest that is ready, also in the store; what has gone since is not told of, nor what is delayed."""
    await world.put("d", b"delayed", key="delayed", delay=Duration(seconds=3600))
    world.now += 10_000
    await world.put("d", b"old", key="old")
    world.now += 10_000
    for i in range(3 * PAGE):
        await world.put("d", b"x", key=str(i), tenant="big")
    for runtime in world.node.shards.values():
        runtime.checkpoint()
        runtime.state.reload()
    for runtime in world.node.shards.values():
        runtime._take_over()
    await world.collector.walk.once()
    world.now += 500
    found = await world.scrape()
    assert found["spillway_oldest_message_seconds", "d", "unsettled"] == 20.5
    assert found["spillway_oldest_message_seconds", "d", "ready"] == 10.5
    assert found["spillway_tenant_backlog_messages", "d", "big"] == 3 * PAGE and found["spillway_tenant_backlog_messages", "d", "t"] == 2
    purged = world.node.shards[world.node.shard_of(b"d\0t\0old")].chores.purge(b"d\0t\0old")
    world.host.turn()
    assert purged.result() == 1
    assert await world.told("spillway_oldest_message_seconds", "d", "ready") == 0.5


async def test_refusals_are_counted_by_their_reason(world: Metered) -> None:
    """Producers' repetitions, settlements of leases that are over, messages that were not stored."""
    world.know("small", policy=Policy(message_bytes_max=10))
    call = world.ingest(*[world_record("small", bytes(100))])
    world.host.turn()
    world.service._produced(call)
    assert await world.told("spillway_produce_refused_total", "invalid_argument") == 1
    consumer = world.consumer(1)
    await world.put("d", b"1")
    [run] = await world.take(consumer)
    world.settle(run)
    world.settle(run, OUTCOME_RETRY, position=0)
    run.fencing_token += 1
    world.settle(run)
    assert await world.told("spillway_stale_settlements_total") == 1
    for _ in range(2):
        world.ingest(world_record("d", b"1", 1), producer_id="p")
        world.host.turn()
    assert await world.told("spillway_duplicates_refused_total") == 1


def world_record(destination: str, payload: bytes, sequence: int = 0) -> Any:
    """A record of a ProduceRequest."""
    from spillway.v1.message_pb2 import Message
    from spillway.v1.queue_service_pb2 import ProduceRecord

    return ProduceRecord(destination=destination, tenant="t", key="k", message=Message(payload=payload), producer_sequence=sequence)


async def test_fairness_is_told_of_tenants_that_wanted_more(world: Metered) -> None:
    """Two tenants with a backlog that get the same are 1; one that gets all makes it a half."""
    assert jain([1.0, 1.0]) == 1.0 and jain([3.0, 0.0]) == 0.5 and jain([]) == 1.0 and jain([0.0]) == 1.0
    for key in range(20):
        await world.put("d", b"x", tenant="a", key=str(key))
        await world.put("d", b"x", tenant="b", key=str(key))
    world.now += WINDOW_MS
    world.collector.ticked(1)
    consumer = world.consumer(10)
    for run in await world.take(consumer):
        world.settle(run)
    world.now += WINDOW_MS
    world.collector.ticked(1)
    assert 0.9 < float(await world.told("spillway_fairness_index", "d")) <= 1  # type: ignore[arg-type]
    world.collector.fairness._begun[b"d"] = {
        t.name: t.start - (100.0 if t.name == b"a" else 0.0) for t in world.node.scheduler.destinations[b"d"].tenants.values()}
    world.now += WINDOW_MS
    world.collector.ticked(1)
    assert await world.told("spillway_fairness_index", "d") == 0.5


async def test_nothing_is_counted_where_nobody_asks(tmp_path: Path) -> None:
    """Without a setting that asks for metrics there is nothing to count with."""
    world = World(tmp_path)
    world.know("d")
    world.host.lead()
    await world.put("d", b"x")
    [run] = await world.take(world.consumer(1))
    world.settle(run)
    assert world.node.meters is None and world.node.tracing is None
    await world.forwarder.close()
    world.store.close()
