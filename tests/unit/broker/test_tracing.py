"""Spans of sampled messages: which there are, that there are not too many, and that nothing is kept for ever."""
from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from node_world import World
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans
from spillway.broker.core.directory import Target
from spillway.broker.telemetry import tracing
from spillway.broker.telemetry.tracing import Tracing
from spillway.cluster.machine import Role
from spillway.contract.telemetry.context import TraceContext, write
from spillway.v1.message_pb2 import Message
from spillway.v1.queue_service_pb2 import OUTCOME_REJECT, OUTCOME_RETRY, ProduceRecord

SAMPLED = TraceContext(0xABC, 0xDEF, True)


class Span:
    """One, as a collector reads it."""

    def __init__(self, data: bytes) -> None:
        [span] = ScopeSpans.FromString(data).spans
        self.name, self.failed = span.name, span.status.code == 2
        self.trace, self.id = int.from_bytes(span.trace_id, "big"), int.from_bytes(span.span_id, "big")
        self.parent = int.from_bytes(span.parent_span_id, "big")
        self.attributes: dict[str, Any] = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


class Traced(World):
    """A node that makes spans."""

    def __init__(self, path: Path, ratio: float = 0.0) -> None:
        super().__init__(path)
        self.spans: list[Span] = []
        self.seconds = 0.0
        self.tracing = self.node.tracing = Tracing(lambda data: self.spans.append(Span(data)), ratio, lambda: self.seconds)
        self.host.lead()
        self.know("d", "e")

    def send(self, count: int = 1, context: TraceContext | None = SAMPLED, payload: bytes = b"x", destination: str = "d",
             **fields: Any) -> None:
        """Stores messages, each with a context."""
        headers = {} if context is None else {"traceparent": write(context)}
        message = Message(headers=headers, payload=payload)
        call = self.ingest(*[ProduceRecord(destination=destination, tenant="t", key=f"k{i}", message=message, **fields)
                             for i in range(count)])
        self.host.turn()
        assert not call.errors

    @property
    def leases(self) -> list[int]:
        """What is remembered of leases."""
        return [token for runtime in self.node.shards.values() for token in runtime.traced]

    def told(self) -> list[tuple[str, int | None, str | None]]:
        """(operation, attempt, outcome) of the spans since the last call."""
        out: list[Any] = []
        for span in self.spans:
            out.append((span.attributes["messaging.operation.name"], span.attributes.get("spillway.attempt"),
                        span.attributes.get("spillway.outcome")))
        self.spans.clear()
        return out


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Traced]:
    """A node that leads everything."""
    made = Traced(tmp_path)
    yield made
    for runtime in made.node.shards.values():
        runtime.copier.stop()
    await made.forwarder.close()
    made.store.close()


async def test_an_attempt_that_expires_or_is_rejected_has_its_spans(world: Traced) -> None:
    """A lease that nobody settles ends as expired, without a settlement; a rejected message is not waited for again."""
    consumer = world.consumer(4)
    world.send()
    await world.take(consumer)
    assert world.told() == [("append", None, None), ("wait", 1, None)]
    world.tick(31_000)
    [run] = await world.take(consumer)
    assert world.told() == [("lease", 1, "expired"), ("wait", 2, None)]
    world.settle(run, OUTCOME_REJECT, position=0)
    assert world.told() == [("lease", 2, "reject"), ("settle", 2, "reject")]
    assert not world.leases and not world.tracing._returned


async def test_those_behind_a_failed_one_were_not_tried(world: Traced) -> None:
    """Of a run whose first message fails the others come back as released, and each is of its own trace."""
    for i in range(3):
        world.ingest(ProduceRecord(destination="d", tenant="t", key="k", message=Message(
            headers={"traceparent": write(SAMPLED._replace(trace_id=i + 1))}, payload=b"x")))
    world.host.turn()
    [run] = await world.take(world.consumer(10))
    world.told()
    world.settle(run, position=0)
    assert world.told() == [("lease", 1, "ack"), ("settle", 1, "ack")]
    world.settle(run, OUTCOME_RETRY, position=1, delay=Duration(seconds=1))
    spans = [(s.trace, s.attributes["spillway.outcome"]) for s in world.spans if s.name == "lease d"]
    assert spans == [(2, "retry"), (3, "release")]


async def test_nothing_is_made_of_messages_that_are_not_sampled(world: Traced) -> None:
    """Without a context, with the flag off, with a context that is none or is in the payload."""
    wrong = Message(headers={"traceparent": write(SAMPLED)}).SerializeToString()
    world.send(context=None)
    world.send(context=None, payload=wrong)
    world.send(context=SAMPLED._replace(sampled=False))
    world.send(context=SAMPLED._replace(trace_id=0))
    for run in await world.take(world.consumer(10)):
        world.settle(run)
    assert world.told() == [] and not world.leases and world.tracing.made == 0


async def test_copies_of_a_route_are_of_its_trace(world: Traced) -> None:
    """What is produced to a route's source is told of there, and so is each copy where it goes."""
    world.route("s", Target("d"))
    world.send(destination="s")
    [(what, _, _)] = world.told()
    assert what == "append" and world.tracing.made == 1


async def test_spans_are_limited_by_the_second(world: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit they are counted and not made; a second later there is room again. A message's last three are made, or none."""
    monkeypatch.setattr(tracing, "SPANS_PER_SECOND_MAX", 10)
    world.tracing._room = 10.0
    world.send(8)
    assert len(world.told()) == 8
    runs = await world.take(world.consumer(100))
    assert (world.told(), world.tracing.dropped) == ([], 3 * 8)
    for run in runs:
        world.settle(run)
    assert world.told() == []
    world.seconds += 0.5
    world.send(8)
    assert len(world.told()) == 7 and world.tracing.dropped == 3 * 8 + 1  # two were left
    world.seconds += 100.0
    world.send(20)
    assert len(world.told()) == 10


async def test_leases_that_are_remembered_are_limited(world: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest out are forgotten first; a node that does not lead any more forgets all of them."""
    monkeypatch.setattr(tracing, "LEASES_MAX", 5)
    monkeypatch.setattr(tracing, "RETURNED_MAX", 3)
    world.send(20)
    runs = await world.take(world.consumer(100))
    assert len(runs) == 20 and max(len(r.traced) for r in world.node.shards.values()) == 5
    for run in runs:
        world.settle(run, OUTCOME_RETRY, position=0, delay=Duration(seconds=60))
    assert not world.leases and len(world.tracing._returned) == 3
    world.send(4)
    world.node.scheduler.credit(next(iter(next(iter(world.node.scheduler.subscriptions.values())).consumers)), 10, 1 << 20)
    world.host.turn()
    for number, machine in world.host.machines.items():
        if number:
            machine.role_changed(Role.FOLLOWER, 2, "n2")
    assert not world.leases


async def test_the_broker_begins_traces_for_a_part_of_the_messages(tmp_path: Path) -> None:
    """As many as the ratio says, the same ones when they are leased as when they were stored, and none that came with a context."""
    world = Traced(tmp_path, ratio=0.25)
    try:
        for i in range(40):
            world.seconds += 10
            world.send(50, context=None if i % 2 else SAMPLED._replace(sampled=False))
        roots = {s.trace: s for s in world.spans}
        assert 150 < len(roots) < 350  # of 1000, a quarter: twelve standard deviations at most
        assert {s.name for s in world.spans} == {"append d"} and {s.parent for s in world.spans} == {0}
        world.spans.clear()
        consumer = world.consumer(10_000)
        for _ in range(100):
            world.seconds += 10
            for run in await world.take(consumer):
                world.seconds += 10
                world.settle(run)
        leased = [s for s in world.spans if s.name == "lease d"]
        assert {s.trace for s in leased} == roots.keys() and len(leased) == len(roots)
        for span in leased:
            assert span.parent == roots[span.trace].id
    finally:
        for runtime in world.node.shards.values():
            runtime.copier.stop()
        await world.forwarder.close()
        world.store.close()
