"""One node without consensus: what clients may send never harms it, and what it holds for them stays bounded."""
from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from node_world import World, field
from spillway.broker.runtime import forward, shard
from spillway.cluster.errors import StorageFailed
from spillway.cluster.machine import ENTRY_BYTES_MAX, Role
from spillway.contract.hashing import queue_key, shard_of
from spillway.v1.message_pb2 import ERROR_CODE_INVALID_ARGUMENT, ERROR_CODE_UNAVAILABLE, Message
from spillway.v1.queue_service_pb2 import OUTCOME_ACK, OUTCOME_EXTEND, AckRequest, ProduceRecord, ProduceRequest, Settlement


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node that leads everything."""
    made = World(tmp_path)
    made.know("d")
    made.host.lead()
    yield made
    await made.forwarder.close()
    made.store.close()


@contextlib.contextmanager
def patched(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for a while."""
    old = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, old)


# -- what may be stored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [
    field(3, b"x") + field(15, bytes(3 << 20)),
    field(15, bytes(3 << 20)) + field(3, b"x"),
    b"".join(field(2, field(1, b"k") + field(2, b"v" * 1000)) for _ in range(3 << 10)),
], ids=["unknown field behind", "unknown field before", "one header over and over"])
async def test_a_message_is_as_long_as_its_bytes(world: World, body: bytes) -> None:
    """What a message carries beside payload, id and headers would be stored and delivered, too; an entry that it made too
    long for the log would end the node."""
    call = world.ingest(ProduceRecord(destination="d", message=Message(payload=b"first")),
                        ProduceRecord(destination="d").SerializeToString() + field(6, body))
    world.host.turn()
    assert [(e[0], e[1], e[2]) for e in call.errors] == [(1, ERROR_CODE_INVALID_ARGUMENT, "records[1].message")]
    assert call.done.done() and call.results[0] and not call.results[1]


@pytest.mark.parametrize(("body", "name"), [
    (field(3, b"x" * 9) + field(1, b"a\r\nb"), "id"),
    (field(3, b"x" * 900) + field(1, b"i" * 256), "id"),
    (field(3, b"x" * 20_000) + field(1, b"i" * 256), "id"),
    (field(3, b"") + field(2, field(1, b"k") + field(2, b"v" * (65 << 10))), "headers"),
    (field(3, b"x") + field(3, b"x" * 127) + field(1, b"a\0"), "id"),
])
async def test_limits_hold_in_whatever_order_fields_come(world: World, body: bytes, name: str) -> None:
    """Protobuf lets a writer put the payload first: id and headers behind it have their limits all the same."""
    call = world.ingest(ProduceRecord(destination="d").SerializeToString() + field(6, body))
    assert [(e[1], e[2]) for e in call.errors] == [(ERROR_CODE_INVALID_ARGUMENT, f"records[0].message.{name}")]


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 16_382, 16_383, 16_384, 20_000])
async def test_plain_payloads_are_taken_at_every_length(world: World, size: int) -> None:
    """The shortcut for messages that are a payload and nothing else agrees with the slow look at every varint's length."""
    call = world.ingest(ProduceRecord(destination="d", message=Message(payload=bytes(size))))
    world.host.turn()
    assert not call.errors and call.results[0]


async def test_long_names_count_when_an_entry_is_filled(world: World) -> None:
    """Thousands of records of long names and hardly a payload, before the largest message: the entry fits the log."""
    names = {"destination": "d", "tenant": "t" * 255, "key": "k" * 255}
    for _ in range(4):
        world.ingest(*[ProduceRecord(**names, message=Message(payload=b"x"))] * 4096)
    world.ingest(ProduceRecord(**names, message=Message(payload=bytes(1 << 20))))
    world.host.turn()
    assert world.host.largest < ENTRY_BYTES_MAX * 3 // 8


# -- producers ---------------------------------------------------------------------------------------------------


async def test_a_producers_record_without_a_number_is_refused(world: World) -> None:
    """Numbers start at 1. A record without one was taken for a duplicate: acknowledged and not stored."""
    call = world.ingest(ProduceRecord(destination="d", message=Message(payload=b"x")),
                        ProduceRecord(destination="d", producer_sequence=1, message=Message(payload=b"y")), producer_id="p")
    world.host.turn()
    assert [(e[0], e[1], e[2]) for e in call.errors] == [
        (0, ERROR_CODE_INVALID_ARGUMENT, "records[0].producer_sequence")]
    assert call.results[0] == 0 and call.results[1] > 1
    await asyncio.wait_for(call.done, 1)


# -- streams -----------------------------------------------------------------------------------------------------


class Stream:
    """The server's side of a call whose client sends `requests` and reads answers while `reading` is set."""

    def __init__(self, requests: list[bytes]) -> None:
        self.requests = requests
        self.read = 0
        self.reading = asyncio.Event()
        self.answers: list[bytes] = []

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for request in self.requests:
            self.read += 1
            yield request
        await asyncio.Event().wait()

    async def write(self, data: bytes) -> None:
        """As grpc.aio's context."""
        await self.reading.wait()
        self.answers.append(data)


async def test_a_client_that_does_not_read_its_answers_costs_nothing(world: World) -> None:
    """Its stream waits; the loop was kept busy by asking again and again."""
    request = ProduceRequest(records=[ProduceRecord(destination="d", message=Message(payload=b"x"))]).SerializeToString()
    stream = Stream([request] * 200)
    task = asyncio.create_task(world.service.produce(aiter(stream), stream))
    for _ in range(5):
        await asyncio.sleep(0.01)
        world.host.turn()
    assert stream.read < 100
    used = time.process_time()
    await asyncio.sleep(0.3)
    assert time.process_time() - used < 0.1
    stream.reading.set()
    while len(stream.answers) < 200:
        await asyncio.sleep(0.001)
        world.host.turn()
    task.cancel()
    await asyncio.wait([task])


async def test_settlements_under_way_are_bounded_by_their_bytes(world: World) -> None:
    """A stream of large AckRequests is read no further than 1 MiB ahead of its answers, and at its own pace: what producers
    have under way does not hold back settlements."""
    world.ingest(ProduceRecord(destination="d", message=Message(payload=b"x")))
    world.host.turn()
    world.consumer(1)
    world.host.turn()
    (shard, token), = ((n, t) for n, r in world.node.shards.items() for t in r.state.leases)
    small = AckRequest(settlements=[Settlement(shard=shard, fencing_token=token, outcome=OUTCOME_EXTEND)])
    large = AckRequest(settlements=[*small.settlements] * 8000)
    for request, least, most in ((large, 1, 8), (small, 64, 66)):
        world.node.ingress_bytes = 1 << 30
        stream = Stream([request.SerializeToString()] * 200)
        task = asyncio.create_task(world.service.ack(aiter(stream), stream))
        await asyncio.sleep(0.2)
        assert least <= stream.read <= most
        task.cancel()
        await asyncio.wait([task])


async def test_a_producer_that_hangs_up_while_a_destination_is_created_leaves_nothing(world: World) -> None:
    """Its bytes are given back to the node's budget, which would shrink with each such call."""
    world.host.leader = None
    request = ProduceRequest(records=[ProduceRecord(destination="new", message=Message(payload=b"x"))])
    stream = Stream([request.SerializeToString()])
    for role in (Role.LEADER, Role.FOLLOWER):
        world.node.meta.role_changed(role, 1, None)
        task = asyncio.create_task(world.service.produce(aiter(stream), stream))
        await asyncio.sleep(0.05)
        assert world.node.ingress_bytes > 0
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.01)
        assert world.node.ingress_bytes == 0


async def test_destinations_are_created_together(world: World) -> None:
    """A request to many new destinations waits for one round, not for one after the other: without a quorum of the meta
    group that would take hours."""
    world.node.meta.leading = False
    with patched(forward, "LEADER_WAIT_SECONDS", 0.1):
        began = time.monotonic()
        call = await world.service._intake.ingest(1, ProduceRequest(records=[
            ProduceRecord(destination=f"new{i}", message=Message(payload=b"x")) for i in range(50)]).SerializeToString())
        assert time.monotonic() - began < 2
    assert [e[1] for e in call.errors] == [ERROR_CODE_UNAVAILABLE] * 50 and call.done.done()


# -- picking -----------------------------------------------------------------------------------------------------


def fill(world: World, name: str, count: int, **fields: Any) -> None:
    """Many queues of one message each."""
    for first in range(0, count, 1000):
        call = world.ingest(*(ProduceRecord(destination=name, tenant="t", key=str(i), message=Message(payload=b"x"), **fields)
                              for i in range(first, min(first + 1000, count))))
        while not call.done.done():
            world.host.turn()
        assert not call.errors


def leased(world: World, name: str) -> int:
    """Messages of a destination under a lease."""
    counters = (r.state.counters.get(name.encode()) for r in world.node.shards.values())
    return sum(c.leased for c in counters if c is not None)


async def test_no_subscription_waits_for_another_ones_backlog(world: World) -> None:
    """A turn's picks are dealt out: whoever subscribed first does not take them all, turn after turn."""
    names = [f"d{i}" for i in range(8)]
    world.know(*names)
    for name in names:
        fill(world, name, 1000)
    for name in names:
        world.consumer(1 << 16, 1 << 20, name)
    world.host.turn()
    counts = [leased(world, name) for name in names]
    assert max(counts) < 2 * min(counts) and 500 < sum(counts) < 600
    for _ in range(20):
        world.host.turn()
    assert [leased(world, name) for name in names] == [1000] * 8


async def test_a_turn_looks_at_so_many_queues_and_no_more(world: World) -> None:
    """Queues that turn out not to be due count as well, or the first consumer after a burst of delayed messages would stop
    the loop until it has seen them all."""
    fill(world, "d", 3000, delay=Duration(seconds=3600))
    for i in range(3000):  # they were due when they were added, and are not any more
        world.node.scheduler.add(queue_key("d", "t", str(i)))
    looked: list[int] = []
    lease = world.node._lease
    with patched(world.node, "_lease", lambda pick, now: (looked.append(1), lease(pick, now))):
        world.consumer(10)
        world.host.turn()
        assert 0 < len(looked) < 600
        for _ in range(10):
            world.host.turn()
    assert len(looked) == 3000 and not leased(world, "d")


async def test_a_node_that_stops_grants_no_new_lease(world: World) -> None:
    """It has told its consumers so; what it would send them now they may never read."""
    fill(world, "d", 10)
    world.consumer(5)
    world.node.stopping = True
    world.host.turn()
    assert leased(world, "d") == 0


async def test_timers_of_one_moment_fire_in_slices(world: World) -> None:
    """A million messages may be due at midnight: the loop takes them as it can."""
    timers = world.node.timers
    for i in range(100):
        timers.add(7, 1, b"%d" % i)
    assert len(timers.pop_due(7, 60)) == 60 and len(timers.pop_due(7, 60)) == 40


async def test_a_shard_that_is_led_elsewhere_leaves_no_timers(world: World) -> None:
    """They would be added again with every change of leader, and stay until they are due."""
    fill(world, "d", 100, delay=Duration(seconds=3600))
    assert len(world.node.timers) >= 100
    for number, machine in world.host.machines.items():
        machine.role_changed(Role.FOLLOWER, 2, "n2")
        if number:
            assert all(timer[1] != number for timer in world.node.timers._heap)
    assert len(world.node.timers) == 0


# -- leases ------------------------------------------------------------------------------------------------------


async def test_leases_that_are_over_are_forgotten_before_their_deadline(world: World) -> None:
    """A lease may last twelve hours and be settled at once: it leaves nothing behind until then."""
    runtime = world.node.shards[1]
    with patched(shard, "LEASES_OVER_MAX", 100):
        consumer = world.consumer(1 << 30, 1 << 40)
        consumer.lease_ms = 12 * 3600 * 1000
        for n in range(1000):
            name = next(key for i in range(100) if shard_of(queue_key("d", "t", key := f"{n}.{i}"), 2) == 1)
            world.ingest(ProduceRecord(destination="d", tenant="t", key=name, message=Message(payload=b"x")))
            world.host.turn()
            world.host.turn()
            for token in runtime.state.leases:
                world.service._settle(AckRequest(settlements=[Settlement(
                    shard=1, fencing_token=token, sequence=runtime.state.leases[token].front[0][0],
                    outcome=OUTCOME_ACK)]).SerializeToString())
            assert sum(map(len, runtime.leases_by_second.values())) <= 103
    assert runtime.state.counters[b"d"].acked >= 999


async def test_every_position_of_a_run_is_found_and_nothing_else(world: World) -> None:
    """A settlement names its message by sequence, anywhere in the run; sequences between and behind are refused."""
    world.ingest(*(ProduceRecord(destination="d", key=str(i % 2), message=Message(payload=b"x")) for i in range(40)))
    world.host.turn()
    world.consumer(20)
    world.host.turn()
    (number, token, queue), = ((n, t, q) for n, r in world.node.shards.items() for t, q in r.state.leases.items())
    sequences = [m[0] for m in queue.front]
    assert len(sequences) == 20
    for sequence in sorted({*sequences, sequences[0] + 1, sequences[5] + 1, sequences[-1] + 1, 1}):
        call = world.service._settle(AckRequest(settlements=[Settlement(
            shard=number, fencing_token=token, sequence=sequence, outcome=OUTCOME_ACK)]).SerializeToString())
        world.host.turn()
        known = sequence in sequences or sequence == 1
        assert call.done.done() and (not call.errors) == known, sequence
    assert not world.node.shards[number].state.leases


async def test_a_backlog_of_large_messages_comes_into_memory_as_it_is_sent(world: World) -> None:
    """A run is at most about 1 MiB, whatever number of messages it may have: no more is read from the store for it, nor
    kept behind it."""
    for _ in range(40):
        world.ingest(ProduceRecord(destination="d", message=Message(payload=bytes(1 << 19))))
        world.host.turn()
    for runtime in world.node.shards.values():
        runtime.checkpoint()

    def held() -> int:
        return sum(len(m[3]) for r in world.node.shards.values() for q in r.state.queues.values() for m in (*q.front, *q.tail))

    world.consumer(64, 256 << 20)
    world.host.turn()
    assert leased(world, "d") in (1, 2) and held() < 3 << 20
    for _ in range(40):
        world.ingest(ProduceRecord(destination="d", message=Message(payload=bytes(1 << 19))))
        world.host.turn()
    for runtime in world.node.shards.values():
        runtime.checkpoint()
    assert held() < 3 << 20


async def test_a_checkpoint_that_cannot_be_stored_ends_the_node_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory has let go of what the store was to hold: not a turn may come before the node ends, whoever asked for the checkpoint."""
    ended: list[BaseException] = []
    world.know("d")
    await world.put("d", b"1")
    (runtime,) = (r for r in world.node.shards.values() if b"d" in r.state.counters)

    def full(*args: Any) -> None:
        raise StorageFailed("no space is left")
    monkeypatch.setattr(runtime.rows, "commit", full)
    monkeypatch.setattr(world.host, "fatal", ended.append)
    with pytest.raises(StorageFailed):
        runtime.checkpoint()
    assert [str(error) for error in ended] == ["no space is left"]
