"""QueueService: Produce, Lease and Ack streams. Bytes in, bytes out: requests are parsed here, answers assembled here.

Each stream has one task that reads and one that writes. A reader stops while its stream, or the node, has too much
under way, and gRPC's flow control passes that on to the client.
"""
from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from spillway.broker.core import entry as e
from spillway.broker.core.scheduler import Consumer
from spillway.broker.errors import RequestError, Unavailable
from spillway.broker.runtime.calls import Batch, Call
from spillway.broker.runtime.consumers import Sink
from spillway.broker.runtime.forward import NOT_LEADER, Forwarder, LeaseProxy
from spillway.broker.runtime.node import Node
from spillway.broker.runtime.wire import LENGTHS
from spillway.broker.services.names import check_destination, check_name, duration_ms
from spillway.broker.services.status import abort
from spillway.contract.hashing import queue_key, shard_of
from spillway.contract.limits import (
    DELAY_MS_MAX,
    HEADERS_BYTES_MAX,
    LEASE_MS_MAX,
    LEASE_MS_MIN,
    NAME_BYTES_MAX,
    PRODUCER_ID_BYTES_MAX,
    RECORDS_PER_REQUEST_MAX,
    RUN_MESSAGES_MAX,
    SETTLEMENTS_PER_REQUEST_MAX,
    SUBSCRIBE_DESTINATIONS_MAX,
)
from spillway.peer.v1.queue_view_pb2 import ProduceRequestView
from spillway.v1.message_pb2 import (
    ERROR_CODE_DESTINATION_NOT_FOUND,
    ERROR_CODE_INVALID_ARGUMENT,
    ERROR_CODE_RESOURCE_EXHAUSTED,
    ERROR_CODE_UNAVAILABLE,
    ItemError,
    Message,
)
from spillway.v1.queue_service_pb2 import (
    SETTLEMENT_RESULT_REFUSED,
    AckRequest,
    AckResponse,
    LeaseRequest,
    LeaseResponse,
    ProduceRequest,
    ProduceResponse,
    Settlement,
)

STREAM_BYTES_MAX = 1 << 20  # of a Produce stream, accepted and not yet committed
BATCH_BYTES_MAX = 16 << 10  # of messages for one shard in one piece: entries are filled piece by piece, streams in turn
RECORD_BYTES = 48  # what a message takes in memory and log beside body and name, roughly
MESSAGE_EXTRA_BYTES_MAX = 4 * HEADERS_BYTES_MAX  # of a message beside its payload: id and headers with their framing
CREATIONS_MAX = 64  # of destinations at a time, for one request
STREAM_CALLS_MAX = 64  # requests of a stream under way
CREDIT_MESSAGES_MAX = 1 << 16  # most credit that a consumer can have
CREDIT_BYTES_MAX = 256 << 20
HEARTBEAT_SECONDS = 10.0
_HEARTBEAT = LeaseResponse().SerializeToString()
_DRAINING = LeaseResponse(draining=True).SerializeToString()
_Error = tuple[int, int, str, str]


def _garbage(kind: type) -> RequestError:
    return RequestError("request", f"does not parse as {kind.DESCRIPTOR.full_name}")  # type: ignore[attr-defined]


class QueueService:
    """The handlers. One instance serves clients, one (`peer` true) the other nodes."""

    def __init__(self, node: Node, forwarder: Forwarder, peer: bool = False) -> None:
        self.node = node
        self.forwarder = forwarder
        self.peer = peer
        self._loop = asyncio.get_running_loop()
        self._streams = itertools.count(1)
        self._known: set[str] = set()  # destinations whose name is valid and that exist
        self._known_revision = -1
        self._sinks: set[Sink] = set()
        self.open_streams = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """The service for `server.add_generic_rpc_handlers`; requests and responses are bytes."""
        methods: dict[str, Any] = {name: grpc.stream_stream_rpc_method_handler(method)
                   for name, method in (("Produce", self.produce), ("Lease", self.lease), ("Ack", self.ack))}
        return grpc.method_handlers_generic_handler("spillway.v1.QueueService", methods)

    def drain(self) -> None:
        """The node is stopping: tells consumers to go elsewhere."""
        for sink in self._sinks:
            sink.push_frame(_DRAINING)

    async def _admit(self, context: Any) -> None:
        if self.open_streams >= self.node.config.streams_max:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED,
                                f"this node has {self.open_streams} open streams, the most it takes (streams_max)")
        self.open_streams += 1

    # -- Produce -------------------------------------------------------------------------------------------------

    async def produce(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Reads requests ahead of their answers; answers in order."""
        await self._admit(context)
        stream = next(self._streams)
        config = self.node.config
        await self._pump(requests, context, lambda data: self._ingest(stream, data), _produce_response,
                         lambda: self.node.ingress_bytes > config.ingress_bytes_max)

    async def ack(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Reads requests ahead of their answers; answers in order."""
        await self._admit(context)
        await self._pump(requests, context, self._settle, _ack_response, lambda: False)

    async def _pump(self, requests: AsyncIterator[bytes], context: Any, start: Any, respond: Any,
                    full: Callable[[], bool]) -> None:
        calls: deque[Call] = deque()
        state = _Pump()

        async def read() -> None:
            try:
                async for data in requests:
                    while len(calls) >= STREAM_CALLS_MAX or (calls and (state.size + len(data) > STREAM_BYTES_MAX or full())):
                        state.taken.clear()
                        await state.taken.wait()
                    call = start(data)
                    if not isinstance(call, Call):
                        call = await call
                    state.size += call.size
                    calls.append(call)
                    state.some.set()
            except RequestError as error:
                state.error = error
            finally:
                state.ended = True
                state.some.set()

        reader = self._loop.create_task(read())
        try:
            while True:
                while calls:
                    call = calls[0]
                    if not call.done.done():
                        await call.done
                    calls.popleft()
                    state.size -= call.size
                    state.taken.set()
                    await context.write(respond(call))
                if state.ended:
                    break
                state.some.clear()
                await state.some.wait()
            if state.error is not None:
                await abort(context, state.error)
            await reader
        finally:
            self.open_streams -= 1
            reader.cancel()

    def _ingest(self, stream: int, data: bytes) -> Any:
        """One ProduceRequest: checks it, splits it by shard, hands the pieces to shards or other nodes. A Call, or an
        awaitable of one if a destination has to be created first. Raises RequestError if the whole request is bad."""
        try:
            request = ProduceRequest.FromString(data)  # checks the messages inside; its objects are not used
            view = ProduceRequestView.FromString(data)
        except DecodeError:
            raise _garbage(ProduceRequest) from None
        records = view.records
        count = len(records)
        if not 0 < count <= RECORDS_PER_REQUEST_MAX:
            raise RequestError("records", f"has {count} records; it must have 1 to {RECORDS_PER_REQUEST_MAX}")
        producer = view.producer_id
        if producer:
            check_name("producer_id", producer)
            if len(producer) > PRODUCER_ID_BYTES_MAX:
                raise RequestError("producer_id", f"has {len(producer)} bytes; at most {PRODUCER_ID_BYTES_MAX}")
        node = self.node
        call = Call(count, len(data), self._loop, node.call_done)
        node.ingress_bytes += len(data)
        if node.disk_full:
            for i in range(count):
                call.fail(i, ERROR_CODE_RESOURCE_EXHAUSTED, "",
                          "the disk of this node is nearly full (disk_free_bytes_min); nothing was stored")
            call.release()
            return call
        if self._known_revision != node.meta.revision:
            self._known.clear()
            self._known_revision = node.meta.revision
        known = self._known
        shard_count = node.config.shards
        batches: dict[int, Batch] = {}
        closed: list[tuple[int, Batch]] = []
        unknown: set[str] = set()
        payload_max = node.config.payload_bytes_max
        plain_max = min(payload_max, len(LENGTHS) + 2)
        now = 0
        for i, record in enumerate(records):
            destination, tenant, key = record.destination, record.tenant, record.key
            body = record.message
            # The common case costs one test: known destination, short printable names.
            if destination not in known or not (tenant + key).isprintable() or len(tenant) > 63 or len(key) > 63:
                try:
                    _check_names(destination, tenant, key, i)
                except RequestError as error:
                    call.fail(i, ERROR_CODE_INVALID_ARGUMENT, error.field, error.description)
                    continue
                if node.meta.get(destination) is None:
                    unknown.add(destination)
                else:
                    known.add(destination)
            size = len(body)
            # A payload and nothing else is known by its length. Anything else, or big: look inside.
            if size and (size > plain_max or body[0] != 0x1A
                         or not body.startswith(LENGTHS[size - 2 if size < 130 else size - 3], 1)):
                problem = _check_message(request.records[i].message, i, payload_max, size)
                if problem is not None:
                    call.fail(*problem)
                    continue
            name = queue_key(destination, tenant, key)
            shard = shard_of(name, shard_count)
            batch = batches.get(shard)
            if batch is None or batch.size > BATCH_BYTES_MAX or (
                    producer and record.producer_sequence != batch.first + len(batch.names)):
                first = record.producer_sequence if producer else 0
                if producer and not first:  # the shard would take it for a duplicate
                    call.fail(i, ERROR_CODE_INVALID_ARGUMENT, f"records[{i}].producer_sequence",
                              "is 0; with a producer id it counts from 1, per shard")
                    continue
                if batch is not None:
                    closed.append((shard, batch))
                batch = batches[shard] = Batch(call, producer, first)
            if record.HasField("delay"):
                try:
                    delay = duration_ms(f"records[{i}].delay", record.delay, 0, DELAY_MS_MAX)
                except RequestError as error:
                    call.fail(i, ERROR_CODE_INVALID_ARGUMENT, error.field, error.description)
                    continue
                now = now or node.now_ms()
                if batch.delays is None:
                    batch.delays = {}
                batch.delays[len(batch.names)] = now + delay
            batch.names.append(name)
            batch.bodies.append(body)
            batch.positions.append(i)
            batch.size += size + len(name) + RECORD_BYTES
        closed += batches.items()
        if unknown:
            return self._create_then_submit(stream, call, closed, unknown)
        self._submit(stream, call, closed)
        return call

    async def _create_then_submit(self, stream: int, call: Call, batches: list[tuple[int, Batch]], unknown: set[str]) -> Call:
        try:
            refused = await self._create(unknown)
        except BaseException:  # the client hung up: the call counts as done, or its bytes would never be free again
            call.release()
            raise
        if refused:
            kept = []
            for shard, batch in batches:
                # Records of a producer behind a refused one are refused by the shard as out of sequence.
                left = Batch(call, batch.producer, batch.first)
                for k, (name, body, position) in enumerate(zip(batch.names, batch.bodies, batch.positions, strict=True)):
                    why = refused.get(name[:name.index(b"\0")])
                    if why is not None:
                        call.fail(position, why[0], f"records[{position}].destination", why[1])
                        if batch.producer and left.names:
                            kept.append((shard, left))
                            left = Batch(call, batch.producer, batch.first + k + 1)
                        elif batch.producer:
                            left.first = batch.first + k + 1
                        continue
                    if batch.delays and k in batch.delays:
                        left.delays = left.delays or {}
                        left.delays[len(left.names)] = batch.delays[k]
                    left.names.append(name)
                    left.bodies.append(body)
                    left.positions.append(position)
                    left.size += len(body) + len(name) + RECORD_BYTES
                if left.names:
                    kept.append((shard, left))
            batches = kept
        self._submit(stream, call, batches)
        return call

    async def _create(self, unknown: set[str]) -> dict[bytes, tuple[int, str]]:
        """Creates destinations, some at a time; what became of those that could not be: (error code, description)."""
        refused: dict[bytes, tuple[int, str]] = {}
        names = iter(sorted(unknown))
        down = ""  # the meta group does not answer: said once, the other names do not wait for it again

        async def some() -> None:
            nonlocal down
            for name in names:
                if not self.node.config.auto_create:
                    refused[name.encode()] = (
                        ERROR_CODE_DESTINATION_NOT_FOUND,
                        f"destination {name!r} does not exist; create it first, or switch auto_create on")
                    continue
                code, why = ERROR_CODE_UNAVAILABLE, down
                if not down:
                    try:
                        await self.forwarder.ensure_destination(name)
                        continue
                    except RequestError as error:  # there are too many
                        code, why = ERROR_CODE_RESOURCE_EXHAUSTED, str(error)
                    except Unavailable as error:
                        why = down = str(error)
                refused[name.encode()] = (code, f"cannot create destination {name!r}: {why}")

        await asyncio.gather(*(some() for _ in range(min(len(unknown), CREATIONS_MAX))))
        return refused

    def _submit(self, stream: int, call: Call, batches: list[tuple[int, Batch]]) -> None:
        node = self.node
        for shard, batch in batches:
            if not batch.names:
                continue
            call.waiting += 1
            runtime = node.shards.get(shard)
            if runtime is not None and runtime.leading and not node.stopping:
                runtime.enqueue(stream, batch)
                node.host.wake(shard)
            elif self.peer:
                for position in batch.positions:
                    call.fail(position, ERROR_CODE_UNAVAILABLE, NOT_LEADER, f"this node does not lead shard {shard}")
                call.release()
            else:
                self.forwarder.produce(shard, batch)
        call.release()

    # -- Ack -----------------------------------------------------------------------------------------------------

    def _settle(self, data: bytes) -> Call:
        """One AckRequest. Raises RequestError if the whole request is bad."""
        try:
            settlements = AckRequest.FromString(data).settlements
        except DecodeError:
            raise _garbage(AckRequest) from None
        count = len(settlements)
        if not 0 < count <= SETTLEMENTS_PER_REQUEST_MAX:
            raise RequestError("settlements", f"has {count} settlements; it must have 1 to {SETTLEMENTS_PER_REQUEST_MAX}")
        call = Call(count, len(data), self._loop, self._ack_done)
        node = self.node
        shards = node.shards
        woken: set[int] = set()
        remote: dict[int, dict[int, Settlement]] = {}
        for i, s in enumerate(settlements):
            shard = s.shard
            outcome = s.outcome
            delay = -1
            reason = ""
            if outcome != e.ACK:
                problem = None
                if not e.ACK <= outcome <= e.EXTEND:
                    problem = RequestError(f"settlements[{i}].outcome", f"{outcome} is not an outcome")
                elif s.HasField("delay"):
                    try:
                        delay = duration_ms(f"settlements[{i}].delay", s.delay, 0, DELAY_MS_MAX)
                    except RequestError as error:
                        problem = error
                if problem is not None:
                    self._refuse(call, i, ERROR_CODE_INVALID_ARGUMENT, problem.field, problem.description)
                    continue
                reason = s.reason
            runtime = shards.get(shard)
            if runtime is not None and runtime.leading:
                runtime.settle(call, i, s.fencing_token, s.sequence, outcome, delay, reason)
                woken.add(shard)
            elif not 1 <= shard <= node.config.shards:
                self._refuse(call, i, ERROR_CODE_INVALID_ARGUMENT, f"settlements[{i}].shard",
                             f"there is no shard {shard}; they are 1 to {node.config.shards}")
            elif self.peer:
                self._refuse(call, i, ERROR_CODE_UNAVAILABLE, NOT_LEADER, f"this node does not lead shard {shard}")
            else:
                remote.setdefault(shard, {})[i] = s
        for shard in woken:
            node.host.wake(shard)
        for shard, chosen in remote.items():
            call.waiting += 1
            self.forwarder.ack(shard, call, chosen)
        call.release()
        return call

    @staticmethod
    def _refuse(call: Call, index: int, code: int, field: str, description: str) -> None:
        call.results[index] = SETTLEMENT_RESULT_REFUSED
        call.fail(index, code, field, description)

    def _ack_done(self, call: Call) -> None:
        """Settlements hold no ingress bytes."""

    # -- Lease ---------------------------------------------------------------------------------------------------

    async def lease(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Subscribes, then sends what the scheduler grants, within the consumer's credit."""
        await self._admit(context)
        consumer: Consumer | None = None
        sink: Sink | None = None
        proxy: LeaseProxy | None = None
        reader: asyncio.Task[None] | None = None
        try:
            try:
                first = await anext(requests)
            except StopAsyncIteration:
                return
            request = _parse_lease(first)
            if request.WhichOneof("request") != "subscribe":
                raise RequestError("subscribe", "must be the first request of a Lease stream")
            subscribe = request.subscribe
            patterns = _check_subscribe(subscribe)
            lease_ms = 0
            if subscribe.HasField("lease_duration"):
                lease_ms = duration_ms("subscribe.lease_duration", subscribe.lease_duration, LEASE_MS_MIN, LEASE_MS_MAX)
            session = subscribe.session or "~" + secrets.token_hex(8)
            consumer = Consumer(subscribe.consumer, subscribe.run_messages_max, lease_ms, session)
            sink = Sink(consumer)
            consumer.sink = sink
            self._sinks.add(sink)
            node = self.node
            if subscribe.session:
                node.release_lost(session, {(h.shard, h.fencing_token) for h in subscribe.held})
            if not subscribe.local_only and not self.peer and len(node.members) > 1:
                proxy = LeaseProxy(self.forwarder, subscribe, consumer, sink, self._credit)
                proxy.start()
            else:
                node.scheduler.subscribe(consumer, patterns)
                self._credit(consumer, subscribe.credit.messages, subscribe.credit.bytes)
            if node.stopping:
                sink.push_frame(_DRAINING)
            reader = self._loop.create_task(self._read_credit(requests, consumer, sink, proxy))
            while True:
                frames = await sink.frames(HEARTBEAT_SECONDS)
                for frame in frames or (_HEARTBEAT,):
                    await context.write(frame)
                if sink.closed:
                    break
            if reader.done():
                reader.result()
        except RequestError as error:
            await abort(context, error)
        finally:
            self.open_streams -= 1
            if reader is not None:
                reader.cancel()
            if proxy is not None:
                proxy.stop()
            if consumer is not None and sink is not None:
                sink.closed = True
                self._sinks.discard(sink)
                self.node.scheduler.unsubscribe(consumer)

    async def _read_credit(self, requests: AsyncIterator[bytes], consumer: Consumer, sink: Sink,
                           proxy: LeaseProxy | None) -> None:
        try:
            async for data in requests:
                request = _parse_lease(data)
                if request.WhichOneof("request") != "credit":
                    raise RequestError("credit", "must be what follows the first request of a Lease stream")
                if proxy is not None:
                    proxy.credit(request.credit.messages, request.credit.bytes)
                else:
                    self._credit(consumer, request.credit.messages, request.credit.bytes)
        finally:
            sink.close()

    def _credit(self, consumer: Consumer, messages: int, size: int) -> None:
        self.node.scheduler.credit(consumer, min(messages, CREDIT_MESSAGES_MAX - consumer.messages),
                                   min(size, CREDIT_BYTES_MAX - consumer.bytes))
        if messages > 0 and self.node.shards:
            self.node.host.wake(next(iter(self.node.shards)))


class _Pump:
    """What the two tasks of a stream share."""

    __slots__ = ("ended", "error", "size", "some", "taken")

    def __init__(self) -> None:
        self.size = 0
        self.ended = False
        self.error: RequestError | None = None
        self.some = asyncio.Event()  # the reader has added a call, or has ended
        self.taken = asyncio.Event()  # the writer has taken one away


def _check_names(destination: str, tenant: str, key: str, i: int) -> None:
    check_destination(f"records[{i}].destination", destination)
    check_name(f"records[{i}].tenant", tenant, empty=True)
    check_name(f"records[{i}].key", key, empty=True)


def _check_message(message: Message, i: int, payload_max: int, stored: int) -> _Error | None:
    """What is wrong with a message that takes `stored` bytes, fields included that this version does not know."""
    field = f"records[{i}].message"
    if len(message.payload) > payload_max:
        return (i, ERROR_CODE_INVALID_ARGUMENT, field + ".payload",
                f"has {len(message.payload)} bytes; at most {payload_max} (payload_bytes_max)")
    size = len(message.id.encode())
    if size > NAME_BYTES_MAX:
        return (i, ERROR_CODE_INVALID_ARGUMENT, field + ".id", f"has {size} bytes; at most {NAME_BYTES_MAX}")
    if not message.id.isprintable():
        try:
            check_name(field + ".id", message.id, empty=True)
        except RequestError as error:
            return (i, ERROR_CODE_INVALID_ARGUMENT, error.field, error.description)
    if message.headers:
        size = sum(len(k.encode()) + len(v.encode()) for k, v in message.headers.items())
        if size > HEADERS_BYTES_MAX:
            return (i, ERROR_CODE_INVALID_ARGUMENT, field + ".headers", f"have {size} bytes; at most {HEADERS_BYTES_MAX}")
    if stored > len(message.payload) + MESSAGE_EXTRA_BYTES_MAX:
        return (i, ERROR_CODE_INVALID_ARGUMENT, field,
                f"has {stored} bytes beside {len(message.payload)} of payload: repeated or unknown fields")
    return None


def _check_subscribe(subscribe: Any) -> list[str]:
    patterns = list(subscribe.destinations)
    if not 0 < len(patterns) <= SUBSCRIBE_DESTINATIONS_MAX:
        raise RequestError("subscribe.destinations",
                           f"has {len(patterns)} entries; it must have 1 to {SUBSCRIBE_DESTINATIONS_MAX}")
    for i, pattern in enumerate(patterns):
        check_name(f"subscribe.destinations[{i}]", pattern)
    check_name("subscribe.consumer", subscribe.consumer, empty=True)
    check_name("subscribe.session", subscribe.session, empty=True)
    if len(subscribe.session.encode()) > PRODUCER_ID_BYTES_MAX:
        raise RequestError("subscribe.session", f"has more than {PRODUCER_ID_BYTES_MAX} bytes")
    if subscribe.run_messages_max > RUN_MESSAGES_MAX:
        raise RequestError("subscribe.run_messages_max", f"is {subscribe.run_messages_max}; at most {RUN_MESSAGES_MAX}")
    if subscribe.credit.messages < 0 or subscribe.credit.bytes < 0:
        raise RequestError("subscribe.credit", "must not be negative")
    return patterns


def _parse_lease(data: bytes) -> LeaseRequest:
    try:
        return LeaseRequest.FromString(data)
    except DecodeError:
        raise _garbage(LeaseRequest) from None


def _errors(call: Call) -> list[ItemError]:
    return [ItemError(index=i, code=code, field=field, description=text)  # type: ignore[arg-type]
            for i, code, field, text in sorted(call.errors)]


def _produce_response(call: Call) -> bytes:
    return ProduceResponse(sequences=call.results, errors=_errors(call) if call.errors else ()).SerializeToString()


def _ack_response(call: Call) -> bytes:
    return AckResponse(results=call.results, errors=_errors(call) if call.errors else ()).SerializeToString()  # type: ignore[arg-type]


