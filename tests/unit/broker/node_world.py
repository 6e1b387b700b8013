"""One node without consensus, for tests: entries commit at once, time and turns are the test's."""
from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spillway.broker.config import NodeConfig
from spillway.broker.core.directory import Route, Target, destination
from spillway.broker.core.policy import Policy
from spillway.broker.core.queue import Counters
from spillway.broker.core.scheduler import Consumer
from spillway.broker.runtime.calls import Call
from spillway.broker.runtime.consumers import Sink
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.services.admin import AdminService
from spillway.broker.services.queue import QueueService
from spillway.cluster.machine import GroupMachine, Role
from spillway.cluster.state_store import StateStore
from spillway.contract.telemetry.metrics import Histogram
from spillway.v1.message_pb2 import Message
from spillway.v1.queue_service_pb2 import (
    OUTCOME_ACK,
    AckRequest,
    LeasedRun,
    LeaseResponse,
    ProduceRecord,
    ProduceRequest,
    Settlement,
)


class Host:
    """Commits at once whatever the machines propose."""

    def __init__(self) -> None:
        self.machines: dict[int, GroupMachine] = {}
        self.indexes: dict[int, int] = {}
        self.before_collect: Callable[[], None] = lambda: None
        self.largest = 0  # entry
        self.term: dict[int, int] = {}  # of groups whose leader has changed
        self.leader: str | None = None  # of the groups that this node does not lead
        self.watchers: list[Callable[[int, str | None, int], None]] = []
        self.cluster_id = ""
        self.recovering = False
        self.present: set[str] = set()
        self.snapshot_bytes_sent = self.snapshot_bytes_received = 0
        self.store = SimpleNamespace(syncs=Histogram())

    def status(self) -> dict[int, Any]:
        """As RaftHost."""
        return {number: SimpleNamespace(term=1, role=Role.LEADER if machine.leading else Role.FOLLOWER,  # type: ignore[attr-defined]
                                        commit_index=self.indexes[number], applied_index=self.indexes[number])
                for number, machine in self.machines.items()}

    def in_touch(self, node_id: str) -> bool:
        """As RaftHost."""
        return node_id == "n1" or node_id in self.present

    def fatal(self, error: BaseException) -> None:
        """As RaftHost."""
        raise error

    def ended(self) -> list[int]:
        """As RaftHost."""
        return []

    def has_replica(self, number: int, founders: list[str]) -> bool:
        """As RaftHost."""
        return "n1" in founders

    def add_group(self, number: int, nodes: list[str], machine: GroupMachine) -> None:
        """As RaftHost."""
        self.machines[number] = machine
        self.indexes[number] = 0

    def wake(self, number: int) -> None:
        """As RaftHost."""

    def on_leadership(self, callback: Callable[[int, str | None, int], None]) -> None:
        """As RaftHost."""
        self.watchers.append(callback)

    def leader_of(self, number: int) -> tuple[str | None, int]:
        """As RaftHost."""
        return self.leader, 1

    def lead(self, *numbers: int) -> None:
        """Makes this node the leader of groups; of all if none is named."""
        for number in numbers or self.machines:
            self.machines[number].role_changed(Role.LEADER, 1, "n1")

    def turn(self) -> None:
        """Picks, proposes, commits and applies."""
        self.before_collect()
        for number, machine in self.machines.items():
            while (command := machine.collect()) is not None:
                self.largest = max(self.largest, len(command))
                self.indexes[number] += 1
                machine.apply(self.indexes[number], self.term.get(number, 1), command)


class Refused(Exception):
    """A call was ended with a status."""

    def __init__(self, code: Any, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class Context:
    """As gRPC's, for handlers."""

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        """Ends the call."""
        raise Refused(code, details)


class World:
    """A node, its service and its host. `now` is the time in ms; `turn` takes the node's turns."""

    def __init__(self, path: Path, **settings: Any) -> None:
        config = NodeConfig(data_dir=str(path), shards=2, replicas=1, **settings)
        self.store = StateStore(path / "state")
        self.host = Host()
        self.now = 1_000_000_000_000
        self.node = Node(config, self.store, self.host, {1: ["n1"], 2: ["n1"]}, clock=self)  # type: ignore[arg-type]
        self.node.random = lambda: 0.5
        self.forwarder = Forwarder(self.node)
        self.service = QueueService(self.node, self.forwarder)
        QueueService(self.node, self.forwarder, peer=True)
        self.clock_runs = False  # whether calls may wait for real time

    def monotonic(self) -> float:
        """See Clock: what a busy machine makes slow is not seen."""
        return self.now / 1000

    def unix_ms(self) -> int:
        """See Clock."""
        return self.now

    def know(self, *names: str, policy: Policy | None = None) -> None:
        """Destinations that exist, with a policy."""
        for name in names:
            self.node.meta.directory.destinations[name] = destination(name, policy or Policy())
        self._meta_changed()

    def route(self, source: str, *targets: str | Target) -> None:
        """A route."""
        self.node.meta.directory.routes[source] = Route(
            source, 1, tuple(t if isinstance(t, Target) else Target(t) for t in targets))
        self._meta_changed()

    def _meta_changed(self) -> None:
        meta = self.node.meta
        meta.revision += 1
        meta._policies.clear()
        meta.changed()
        self.node.follow_meta()

    def ingest(self, *records: ProduceRecord | bytes, producer_id: str = "") -> Call:
        """One ProduceRequest to destinations that exist."""
        request = ProduceRequest(producer_id=producer_id).SerializeToString()
        for record in records:
            data = record if isinstance(record, bytes) else record.SerializeToString()
            request += b"\x12" + varint(len(data)) + data
        call = self.service._intake.ingest(1, request)
        assert isinstance(call, Call)
        return call

    def consumer(self, messages: int, size: int = 1 << 20, *patterns: str) -> Consumer:
        """A consumer with credit."""
        consumer = Consumer("c")
        consumer.sink = Sink(consumer)
        self.node.scheduler.subscribe(consumer, patterns or ["d"])
        self.node.scheduler.credit(consumer, messages, size)
        return consumer

    async def admin(self, method: str, request: Any) -> Any:
        """A call of AdminService, with turns while it lasts; a list if it streams."""
        service = AdminService(self.node, self.forwarder)
        answers = getattr(service, method)(request, Context())

        async def collect() -> list[Any]:
            return [one async for one in answers]

        task = asyncio.ensure_future(collect() if hasattr(answers, "__aiter__") else answers)
        for _ in range(10_000):
            await asyncio.sleep(0)
            if task.done():
                return task.result()
            self.host.turn()
            if self.clock_runs:
                await asyncio.sleep(0.001)
        raise TimeoutError(method)

    async def put(self, name: str, *payloads: bytes, tenant: str = "t", key: str = "k", **fields: Any) -> list[int]:
        """Stores messages; returns their sequences. Raises Refused with the first error."""
        call = self.ingest(*(ProduceRecord(destination=name, tenant=tenant, key=key, message=Message(payload=p), **fields)
                             for p in payloads))
        for _ in range(1000):
            if call.done.done():
                break
            self.host.turn()
            await asyncio.sleep(0)
        if call.errors:
            raise Problem(call.errors[0])
        return call.results

    def tick(self, ms: int) -> None:
        """Time goes on, and what is due happens."""
        self.now += ms
        node = self.node
        node.fire_timers(self.now)
        for runtime in node.shards.values():
            if runtime.leading:
                runtime.expire_due(self.now)
                runtime.chores.sweep(self.now)
        self.host.turn()
        self.host.turn()

    async def take(self, consumer: Consumer) -> list[LeasedRun]:
        """The runs that a consumer has got since it was last asked, after some turns."""
        for _ in range(4):
            self.host.turn()
            await asyncio.sleep(0)
        sink = consumer.sink
        assert isinstance(sink, Sink)
        return [run for frame in await sink.frames(0.001) for run in LeaseResponse.FromString(frame).runs]

    def settle(self, run: LeasedRun, outcome: int = OUTCOME_ACK, position: int = -1, **fields: Any) -> Call:
        """Settles a run's message: the last one, or that at a position."""
        call = self.service._settle(AckRequest(settlements=[Settlement(
            shard=run.shard, fencing_token=run.fencing_token, sequence=run.messages[position].sequence,
            outcome=outcome, **fields)]).SerializeToString())  # type: ignore[arg-type]
        self.host.turn()
        self.host.turn()
        return call

    def totals(self, name: str) -> Counters:
        """The counters of a destination, over all shards."""
        total = Counters(name.encode())
        for runtime in self.node.shards.values():
            if (c := runtime.state.counters.get(name.encode())) is not None:
                for field in Counters.__slots__:
                    if field not in ("name", "dirty", "meter"):
                        setattr(total, field, getattr(total, field) + getattr(c, field))
        return total


def varint(value: int) -> bytes:
    """A protobuf length."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


class Problem(Exception):
    """A record was refused: (index, code, field, description)."""

    def __init__(self, error: tuple[int, int, str, str]) -> None:
        super().__init__(error)
        self.index, self.code, self.field, self.description = error


def payloads(runs: list[LeasedRun]) -> list[bytes]:
    """What was delivered."""
    return [m.message.payload for run in runs for m in run.messages]
