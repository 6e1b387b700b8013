"""An in-process cluster that keeps the protos' promises, and breaks on command.

`FakeCluster` holds the truth (queues, producers, leases) as if it were replicated; its nodes are real grpc.aio servers
that serve the shards they lead, refuse or forward the others, and can be cut off, made silent or drained.
"""
from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from spillway.contract import snapshot
from spillway.contract.hashing import queue_key, shard_of
from spillway.v1 import admin_service_pb2_grpc as admin_rpc
from spillway.v1 import cluster_service_pb2 as cluster
from spillway.v1 import cluster_service_pb2_grpc as cluster_rpc
from spillway.v1 import message_pb2 as m
from spillway.v1 import queue_service_pb2 as q
from spillway.v1 import queue_service_pb2_grpc as queue_rpc

from tests.unit.client.fake_admin import AdminState, FakeAdmin

Refuse = Callable[[q.ProduceRecord], m.ItemError | None]


class Lease:
    """One live lease."""

    def __init__(self, token: int, shard: int, queue: bytes, session: str, stream: int, sequences: list[int]) -> None:
        self.token = token
        self.shard = shard
        self.queue = queue
        self.session = session
        self.stream = stream
        self.sequences = sequences  # unsettled
        self.settled: list[int] = []


class Stream:
    """One Lease stream at a node."""

    def __init__(self, node: FakeNode, subscribe: q.Subscribe) -> None:
        self.node = node
        self.subscribe = subscribe
        self.messages = subscribe.credit.messages
        self.bytes = subscribe.credit.bytes
        self.messages_low = 0  # the lowest balance ever
        self.out: asyncio.Queue[q.LeaseResponse | None] = asyncio.Queue()
        self.held = set[tuple[int, int]]((h.shard, h.fencing_token) for h in subscribe.held)


class FakeCluster:
    """The state that a real cluster would replicate."""

    def __init__(self, shards: int = 4) -> None:
        self.name = "fake"
        self.shard_count = shards
        self.nodes: dict[str, FakeNode] = {}
        self.leaders: dict[int, str] = {}
        self.terms: dict[int, int] = dict.fromkeys(range(1, shards + 1), 1)
        self.queues: dict[bytes, deque[tuple[int, m.Message, int]]] = {}  # name -> (sequence, message, attempts)
        self.log: dict[int, list[tuple[bytes, m.Message]]] = {s: [] for s in range(1, shards + 1)}  # everything stored
        self.producers: dict[tuple[int, str], int] = {}
        self.leases: dict[tuple[int, int], Lease] = {}
        self.over: set[tuple[int, int]] = set()  # leases that were settled to their end
        self.settlements: list[tuple[int, int, int]] = []  # (outcome, shard, sequence) that were committed
        self.refuse: Refuse = lambda record: None
        self.refuse_settlement: Callable[[q.Settlement], m.ItemError | None] = lambda settlement: None
        self.lease_ms = 30_000
        self.outstanding_high = 0
        self.admin = AdminState()
        self._numbers = itertools.count(1 << 20)
        self.changed = asyncio.Condition()
        self.revision = 0

    async def start(self, nodes: int = 1) -> FakeCluster:
        """Starts nodes n1.. that lead the shards in turn."""
        for i in range(1, nodes + 1):
            node = self.nodes[f"n{i}"] = FakeNode(self, f"n{i}")
            await node.start()
        names = list(self.nodes)
        for shard in range(1, self.shard_count + 1):
            self.leaders[shard] = names[(shard - 1) % nodes]
        return self

    async def stop(self) -> None:
        """Stops all nodes."""
        for node in self.nodes.values():
            await node.stop()

    @property
    def addresses(self) -> list[str]:
        """Of all nodes."""
        return [node.address for node in self.nodes.values()]

    def topology(self) -> cluster.Topology:
        """As everybody sees it."""
        out = cluster.Topology(cluster=self.name, shard_count=self.shard_count)
        for node in self.nodes.values():
            out.nodes.add(id=node.name, address=node.address)
        for shard, leader in self.leaders.items():
            out.shards.add(shard=shard, leader=leader, replicas=list(self.nodes), term=self.terms[shard])
        return out

    async def move(self, shard: int, leader: str) -> None:
        """Another node leads the shard."""
        self.leaders[shard] = leader
        self.terms[shard] += 1
        await self.tell()
        await self.pump()

    async def tell(self) -> None:
        """The topology changed."""
        async with self.changed:
            self.revision += 1
            self.changed.notify_all()

    def stored(self, destination: str, tenant: str = "", key: str = "") -> list[bytes]:
        """Payloads ever stored in a queue, in order."""
        name = queue_key(destination, tenant, key)
        return [message.payload for queue, message in self.log[shard_of(name, self.shard_count)] if queue == name]

    # -- the state machine ---------------------------------------------------------------------------------------

    def enqueue(self, producer: str, record: q.ProduceRecord) -> int | m.ItemError:
        """Stores one record; its sequence, or why not."""
        refusal = self.refuse(record)
        if refusal is not None:
            return refusal
        name = queue_key(record.destination, record.tenant, record.key)
        shard = shard_of(name, self.shard_count)
        if producer:
            last = self.producers.get((shard, producer), 0)
            if record.producer_sequence <= last:
                return 1
            if record.producer_sequence != last + 1:
                return m.ItemError(code=m.ERROR_CODE_OUT_OF_SEQUENCE, field="producer_sequence",
                                   description=f"{record.producer_sequence} after {last}")
            self.producers[shard, producer] = record.producer_sequence
        sequence = next(self._numbers)
        message = m.Message.FromString(record.message.SerializeToString())
        self.log[shard].append((name, message))
        self.queues.setdefault(name, deque()).append((sequence, message, 0))
        return sequence

    async def pump(self) -> None:
        """Hands out what there is credit for."""
        for name in list(self.queues):
            shard = shard_of(name, self.shard_count)
            leader = self.leaders.get(shard, "")
            queue = self.queues[name]
            if not queue or leader not in self.nodes or any(lease.queue == name for lease in self.leases.values()):
                continue
            destination, tenant, key = name.decode().split("\0")
            node = self.nodes[leader]
            proxies = [s for n in self.nodes.values() for s in n.streams if not s.subscribe.local_only]
            for stream in [*node.streams, *proxies]:
                if stream.messages <= 0 or stream.bytes <= 0 or node.draining or not any(
                        _matches(p, destination) for p in stream.subscribe.destinations):
                    continue
                limit = min(stream.messages, stream.subscribe.run_messages_max or 64)
                run = q.LeasedRun(shard=shard, fencing_token=next(self._numbers), destination=destination, tenant=tenant,
                                  key=key)
                lease_ms = stream.subscribe.lease_duration.ToMilliseconds() or self.lease_ms
                run.expire_unix_ms = int(time.time() * 1000) + lease_ms
                for sequence, message, attempts in list(queue)[:limit]:
                    if run.messages and stream.bytes <= 0:
                        break
                    run.messages.add(sequence=sequence, attempt=attempts + 1, enqueue_unix_ms=1, message=message)
                    stream.messages -= 1
                    stream.bytes -= message.ByteSize()
                self.leases[shard, run.fencing_token] = Lease(run.fencing_token, shard, name, stream.subscribe.session,
                                                              stream.subscribe.stream, [x.sequence for x in run.messages])
                self.outstanding_high = max(self.outstanding_high, sum(len(x.sequences) for x in self.leases.values()))
                stream.node.streams.remove(stream)
                stream.node.streams.append(stream)  # the next takes the next
                stream.out.put_nowait(q.LeaseResponse(runs=[run]))
                break

    def settle(self, s: q.Settlement) -> int | m.ItemError:
        """Applies one settlement; its result, or why not."""
        refusal = self.refuse_settlement(s)
        if refusal is not None:
            return refusal
        lease = self.leases.get((s.shard, s.fencing_token))
        if lease is None:
            if (s.shard, s.fencing_token) in self.over and s.outcome != q.OUTCOME_EXTEND:
                return q.SETTLEMENT_RESULT_ALREADY_SETTLED
            return m.ItemError(code=m.ERROR_CODE_STALE_TOKEN, description="stale")
        queue = self.queues[lease.queue]
        if s.outcome == q.OUTCOME_EXTEND:
            self.settlements.append((s.outcome, s.shard, s.fencing_token))
            return q.SETTLEMENT_RESULT_OK
        if s.outcome == q.OUTCOME_ACK:
            if s.sequence in lease.settled:
                return q.SETTLEMENT_RESULT_ALREADY_SETTLED
            if s.sequence not in lease.sequences:
                return m.ItemError(code=m.ERROR_CODE_INVALID_ARGUMENT, field="sequence", description="not of this lease")
            count = lease.sequences.index(s.sequence) + 1
            for _ in range(count):
                queue.popleft()
            lease.settled += lease.sequences[:count]
            del lease.sequences[:count]
            self.settlements.append((s.outcome, s.shard, s.sequence))
            if not lease.sequences:
                self._end(lease)
            return q.SETTLEMENT_RESULT_OK
        if not lease.sequences or s.sequence != lease.sequences[0]:
            return m.ItemError(code=m.ERROR_CODE_INVALID_ARGUMENT, field="sequence", description="not the first unsettled")
        sequence, message, attempts = queue[0]
        if s.outcome == q.OUTCOME_RETRY:
            queue[0] = (sequence, message, attempts + 1)
        elif s.outcome == q.OUTCOME_REJECT:
            queue.popleft()
        self.settlements.append((s.outcome, s.shard, s.sequence))
        self._end(lease)
        return q.SETTLEMENT_RESULT_OK

    def _end(self, lease: Lease) -> None:
        del self.leases[lease.shard, lease.token]
        self.over.add((lease.shard, lease.token))

    def expire(self) -> None:
        """All leases end."""
        for lease in list(self.leases.values()):
            del self.leases[lease.shard, lease.token]


class FakeNode(queue_rpc.QueueServiceServicer, cluster_rpc.ClusterServiceServicer, FakeAdmin):
    """One broker process."""

    def __init__(self, cluster_: FakeCluster, name: str) -> None:
        self.cluster = cluster_
        self.admin = cluster_.admin
        self.name = name
        self.port = 0
        self.server: grpc.aio.Server | None = None
        self.streams: list[Stream] = []
        self.draining = False
        self.forwards = True  # what it does not lead; else UNAVAILABLE
        self.swallow_answers = 0  # this many Produce answers are lost with their stream
        self.swallow_acks = 0
        self.spoil_answers = 0  # this many answers of either kind say nothing of what was asked
        self.hang = asyncio.Event()  # clear: Produce waits
        self.received = 0  # requests to Produce, before it waits
        self.hang.set()
        self.joined = True  # else it tells of no topology first
        self.answers = asyncio.Event()  # clear: it tells none from now on
        self.answers.set()
        self.greets = True  # else a Lease stream says nothing before the first run
        self.flowing = asyncio.Event()  # clear: what is leased stays on its way
        self.flowing.set()
        self.requests: list[q.ProduceRequest] = []
        self.subscriptions: list[q.Subscribe] = []
        self.ack_requests = 0
        self.refuse_lease: tuple[grpc.StatusCode, str] | None = None
        self.break_backups = 0  # this many streams of a backup break after their second chunk
        self.spoil_backups = 0  # this many lose their third

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listens, on the same port as before if it was stopped."""
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        queue_rpc.add_QueueServiceServicer_to_server(self, self.server)
        cluster_rpc.add_ClusterServiceServicer_to_server(self, self.server)
        admin_rpc.add_AdminServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def stop(self) -> None:
        """As kill -9."""
        if self.server is not None:
            server, self.server = self.server, None
            await server.stop(None)
        self.streams.clear()

    async def drain(self) -> None:
        """Tells consumers to go elsewhere."""
        self.draining = True
        for stream in self.streams:
            stream.out.put_nowait(q.LeaseResponse(draining=True))

    def _serves(self, shard: int) -> bool:
        return self.forwards or self.cluster.leaders.get(shard) == self.name

    async def Produce(self, requests: AsyncIterator[q.ProduceRequest], context: Any) -> None:
        async for request in requests:
            self.received += 1
            await self.hang.wait()
            self.requests.append(request)
            response = q.ProduceResponse()
            for i, record in enumerate(request.records):
                shard = shard_of(queue_key(record.destination, record.tenant, record.key), self.cluster.shard_count)
                if self._serves(shard) and self.cluster.leaders.get(shard):
                    result = self.cluster.enqueue(request.producer_id, record)
                else:
                    result = m.ItemError(code=m.ERROR_CODE_UNAVAILABLE, description=f"{self.name} does not lead {shard}")
                if isinstance(result, int):
                    response.sequences.append(result)
                else:
                    response.sequences.append(0)
                    result.index = i
                    response.errors.append(result)
            await self.cluster.pump()
            if self.swallow_answers:
                self.swallow_answers -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
            if self.spoil_answers:
                self.spoil_answers -= 1
                response.Clear()
            await context.write(response)

    async def Ack(self, requests: AsyncIterator[q.AckRequest], context: Any) -> None:
        async for request in requests:
            self.ack_requests += 1
            response = q.AckResponse()
            for i, settlement in enumerate(request.settlements):
                if self._serves(settlement.shard) and self.cluster.leaders.get(settlement.shard):
                    result = self.cluster.settle(settlement)
                else:
                    result = m.ItemError(code=m.ERROR_CODE_UNAVAILABLE, description="not the leader")
                if isinstance(result, int):
                    response.results.append(result)  # type: ignore[arg-type]
                else:
                    response.results.append(q.SETTLEMENT_RESULT_REFUSED)
                    result.index = i
                    response.errors.append(result)
            await self.cluster.pump()
            if self.swallow_acks:
                self.swallow_acks -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
            if self.spoil_answers:
                self.spoil_answers -= 1
                response.Clear()
            await context.write(response)

    async def Lease(self, requests: AsyncIterator[q.LeaseRequest], context: Any) -> None:
        if self.refuse_lease is not None:
            await context.abort(*self.refuse_lease)
        first = await anext(requests)
        assert first.WhichOneof("request") == "subscribe"
        stream = Stream(self, first.subscribe)
        self.subscriptions.append(first.subscribe)
        cluster_ = self.cluster
        for (shard, token), lease in list(cluster_.leases.items()):
            if lease.session == stream.subscribe.session and cluster_.leaders.get(shard) == self.name and (
                    shard, token) not in stream.held and (not stream.subscribe.stream or (
                    lease.stream < stream.subscribe.stream and lease.stream not in stream.subscribe.streams_open)):
                del cluster_.leases[shard, token]
        self.streams.append(stream)

        async def read() -> None:
            async for request in requests:
                stream.messages += request.credit.messages
                stream.bytes += request.credit.bytes
                stream.messages_low = min(stream.messages_low, stream.messages)
                await cluster_.pump()
            stream.out.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            if self.greets:
                await context.write(q.LeaseResponse())
            await cluster_.pump()
            while (response := await stream.out.get()) is not None:
                await self.flowing.wait()
                await context.write(response)
        finally:
            reader.cancel()
            if stream in self.streams:
                self.streams.remove(stream)

    async def GetTopology(self, request: cluster.GetTopologyRequest, context: Any) -> cluster.GetTopologyResponse:
        await self.answers.wait()
        return cluster.GetTopologyResponse(topology=self.cluster.topology())

    async def WatchTopology(self, request: cluster.WatchTopologyRequest,
                            context: Any) -> AsyncIterator[cluster.WatchTopologyResponse]:
        if not self.joined:
            yield cluster.WatchTopologyResponse(topology=cluster.Topology(cluster=self.cluster.name))
        await self.answers.wait()
        while True:
            revision = self.cluster.revision
            yield cluster.WatchTopologyResponse(topology=self.cluster.topology())
            async with self.cluster.changed:
                await self.cluster.changed.wait_for(lambda seen=revision: self.cluster.revision != seen)  # type: ignore[misc]

    async def Backup(self, request: cluster.BackupRequest, context: Any) -> AsyncIterator[cluster.BackupResponse]:
        yield cluster.BackupResponse(cluster=cluster.BackupCluster(
            cluster=self.cluster.name, shard_count=self.cluster.shard_count, replica_count=1, version="7"))
        for number, chunk in enumerate(chunks(request.group, (b"key", b"value"), (b"other", b"x" * 1000))):
            if number == 2 and self.spoil_backups:
                self.spoil_backups -= 1
                continue
            if number == 2 and self.break_backups:
                self.break_backups -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the leader changed")
            yield cluster.BackupResponse(chunk=chunk)

    def waiting(self, destination: str) -> int:
        """Messages of a destination."""
        return sum(len(v) for k, v in self.cluster.queues.items() if k.startswith(destination.encode() + b"\0"))


def chunks(group: int, *rows: tuple[bytes, bytes]) -> list[bytes]:
    """A group's state as of entry 9 of term 2, a row in each chunk."""
    bodies = [(b"H", snapshot.HEADER.pack(snapshot.FORMAT, group, 9, 2)),
              *((b"R", snapshot.ROW.pack(len(key), len(value)) + key + value) for key, value in rows),
              (b"T", snapshot.TRAILER.pack(len(rows)))]
    found, checksum = [], 0
    for number, (kind, body) in enumerate(bodies):
        chunk, checksum = snapshot.seal(kind, number, checksum, body)
        found.append(chunk)
    return found


def _matches(pattern: str, name: str) -> bool:
    parts = pattern.split("*")
    if len(parts) == 1:
        return pattern == name
    return name.startswith(parts[0]) and name.endswith(parts[-1])
