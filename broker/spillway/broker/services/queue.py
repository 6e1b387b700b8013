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
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from spillway.broker.core import entry as e
from spillway.broker.core.access import LEASE, PRODUCE, Grants, of_patterns
from spillway.broker.core.scheduler import Consumer
from spillway.broker.errors import PermissionDenied, RequestError
from spillway.broker.runtime.calls import Call
from spillway.broker.runtime.consumers import Sink, session_of
from spillway.broker.runtime.forward import NOT_LEADER, Forwarder, LeaseProxy
from spillway.broker.runtime.node import Node
from spillway.broker.services.access import denied
from spillway.broker.services.audit import Audit
from spillway.broker.services.names import check_name, duration_ms
from spillway.broker.services.principal import current
from spillway.broker.services.produce import Intake
from spillway.broker.services.quotas import current_quota
from spillway.broker.services.status import abort
from spillway.contract.limits import (
    CREDIT_BYTES_MAX,
    CREDIT_MESSAGES_MAX,
    DELAY_MS_MAX,
    LEASE_MS_MAX,
    LEASE_MS_MIN,
    PRODUCER_ID_BYTES_MAX,
    RUN_MESSAGES_MAX,
    SETTLEMENTS_PER_REQUEST_MAX,
    SUBSCRIBE_DESTINATIONS_MAX,
)
from spillway.peer.v1.queue_view_pb2 import AckScope
from spillway.v1.message_pb2 import (
    ERROR_CODE_INVALID_ARGUMENT,
    ERROR_CODE_PERMISSION_DENIED,
    ERROR_CODE_UNAVAILABLE,
    ItemError,
)
from spillway.v1.queue_service_pb2 import (
    SETTLEMENT_RESULT_REFUSED,
    AckRequest,
    AckResponse,
    LeaseRequest,
    LeaseResponse,
    ProduceResponse,
    Settlement,
)

STREAM_BYTES_MAX = 1 << 20  # of a Produce stream, accepted and not yet committed
STREAM_CALLS_MAX = 64  # requests of a stream under way
SCOPED = b"\x7a"  # how a request of another node begins that has a peer.v1.AckScope in it
RUNS_PER_TURN = 256  # of those that are given back
HEARTBEAT_SECONDS = 10.0
_HEARTBEAT = LeaseResponse().SerializeToString()
_DRAINING = LeaseResponse(draining=True).SerializeToString()


def _garbage(kind: type) -> RequestError:
    return RequestError("request", f"does not parse as {kind.DESCRIPTOR.full_name}")  # type: ignore[attr-defined]


class QueueService:
    """The handlers. One instance serves clients, one (`peer` true) the other nodes."""

    def __init__(self, node: Node, forwarder: Forwarder, peer: bool = False, audit: Audit | None = None) -> None:
        self.node = node
        self.forwarder = forwarder
        self.peer = peer
        self._loop = asyncio.get_running_loop()
        self._audit = audit or Audit()
        self._streams = itertools.count(1)
        self._intake = Intake(node, forwarder, peer)
        if peer:
            forwarder.local = self._intake.ingest
        self._sinks: dict[Sink, None] = {}  # in the order of their streams, as all that a simulation shall do twice
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
        grants = _restricted(PRODUCE)

        def respond(call: Call) -> bytes:
            self._note_denied(call, context, "Produce")
            return self._produced(call)

        await self._pump(requests, context, lambda data: self._intake.ingest(stream, data, grants),
                         self._produced if grants is None else respond, lambda: self.node.ingress_bytes > config.ingress_bytes_max,
                         produces=True)

    async def ack(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Reads requests ahead of their answers; answers in order."""
        await self._admit(context)
        grants = _restricted(LEASE)

        def respond(call: Call) -> bytes:
            self._note_denied(call, context, "Ack")
            return _ack_response(call)

        await self._pump(requests, context, lambda data: self._settle(data, grants), _ack_response if grants is None else respond,
                         lambda: False)

    def _note_denied(self, call: Call, context: Any, method: str) -> None:
        """What was refused for want of a scope is in the audit log."""
        for _, code, _, why in call.errors:
            if code == ERROR_CODE_PERMISSION_DENIED:
                self._audit.refused(current().name, context, "QueueService/" + method, "", "PERMISSION_DENIED", why)
                return

    def _produced(self, call: Call) -> bytes:
        meters = self.node.meters
        if call.errors and meters is not None and not self.peer:  # another node's are told of there
            for error in call.errors:
                meters.refused[error[1]] = meters.refused.get(error[1], 0) + 1
        return _produce_response(call)

    async def _pump(self, requests: AsyncIterator[bytes], context: Any, start: Any, respond: Any,
                    full: Callable[[], bool], produces: bool = False) -> None:
        calls: deque[Call] = deque()
        state = _Pump()
        quota = current_quota() if produces else None

        async def read() -> None:
            try:
                async for data in requests:
                    while len(calls) >= STREAM_CALLS_MAX or (calls and (state.size + len(data) > STREAM_BYTES_MAX or full())):
                        state.taken.clear()
                        await state.taken.wait()
                    if quota is not None:
                        await quota.wait_for_bytes(len(data))
                        quota.hold(len(data))
                    call = start(data)
                    if not isinstance(call, Call):
                        call = await call
                    state.size += call.size
                    calls.append(call)
                    state.some.set()
                    if quota is not None and (wait := quota.spend(len(call.results))):
                        await asyncio.sleep(wait)
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
                    if quota is not None:
                        quota.hold(-call.size)
                    state.taken.set()
                    await context.write(respond(call))
                if state.ended:
                    break
                state.some.clear()
                await state.some.wait()
            if state.error is not None:
                error, state.error = state.error, None  # whose traceback leads to `state`: a cycle
                await abort(context, error)
            await reader
        finally:
            self.open_streams -= 1
            reader.cancel()

    # -- Ack -----------------------------------------------------------------------------------------------------

    def _settle(self, data: bytes, grants: Grants | None = None) -> Call:
        """One AckRequest. `grants`: what may be settled; None: everything. Raises RequestError if the whole request is bad."""
        try:
            settlements = AckRequest.FromString(data).settlements
            if self.peer and data.startswith(SCOPED):
                grants = of_patterns(AckScope.FromString(data).destinations)
        except DecodeError:
            raise _garbage(AckRequest) from None
        count = len(settlements)
        if not 0 < count <= SETTLEMENTS_PER_REQUEST_MAX:
            raise RequestError("settlements", f"has {count} settlements; it must have 1 to {SETTLEMENTS_PER_REQUEST_MAX}")
        call = Call(count, len(data), self._loop, self._ack_done, self.peer, grants)
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
        sink: Sink | None = None
        proxy: LeaseProxy | None = None
        reader: asyncio.Task[None] | None = None
        unsent: deque[bytes] = deque()
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
            if (grants := _restricted(LEASE)) is not None:
                for pattern in patterns:
                    if not grants.allows(LEASE, pattern):
                        raise denied(current(), "lease", pattern)
            lease_ms = 0
            if subscribe.HasField("lease_duration"):
                lease_ms = duration_ms("subscribe.lease_duration", subscribe.lease_duration, LEASE_MS_MIN, LEASE_MS_MAX)
            node = self.node
            numbered = bool(subscribe.stream)
            if subscribe.session and not numbered:
                subscribe.stream = node.now_ms()
            session = session_of(subscribe.session, subscribe.stream) if subscribe.session else "~" + secrets.token_hex(8)
            consumer = Consumer(subscribe.consumer, subscribe.run_messages_max, lease_ms, session)
            sink = Sink(consumer)
            consumer.sink = sink
            self._sinks[sink] = None
            if not subscribe.local_only and not self.peer:
                proxy = LeaseProxy(self.forwarder, subscribe, numbered, consumer, sink, self._credit)
            sink.on_close = partial(self._end, consumer, proxy)
            if subscribe.session:
                open_ = set(subscribe.streams_open)
                node.lease_streams.begun(subscribe.session, subscribe.stream, open_, sink)
                node.release_lost(subscribe.session, subscribe.stream, open_, {(h.shard, h.fencing_token) for h in subscribe.held})
            if proxy is not None:
                proxy.start()
            else:
                node.scheduler.subscribe(consumer, patterns)
                self._credit(consumer, subscribe.credit.messages, subscribe.credit.bytes)
            if node.stopping:
                sink.push_frame(_DRAINING)
            reader = self._loop.create_task(self._read_credit(requests, consumer, sink, proxy))
            while True:
                unsent.extend(await sink.frames(HEARTBEAT_SECONDS) or (() if sink.closed else (_HEARTBEAT,)))
                if not unsent:
                    break
                while unsent:
                    await context.write(unsent.popleft())
            if reader.done():
                reader.result()
        except RequestError as error:
            await abort(context, error)
        except PermissionDenied as error:
            self._audit.refused(current().name, context, "QueueService/Lease", "", "PERMISSION_DENIED", str(error))
            await abort(context, error)
        finally:
            self.open_streams -= 1
            if reader is not None:
                reader.cancel()
            if sink is not None:
                sink.close()
                self._sinks.pop(sink, None)
                self.node.lease_streams.ended(subscribe.session, subscribe.stream, sink)
                unsent.extend(sink.rest())
                if unsent:
                    self.forwarder.start(self._give_back(unsent))

    def _end(self, consumer: Consumer, proxy: LeaseProxy | None) -> None:
        """No more leases for a consumer."""
        if proxy is not None:
            proxy.stop()
        self.node.scheduler.unsubscribe(consumer)

    async def _give_back(self, unsent: deque[bytes]) -> None:
        """Whatever a consumer that is gone was not sent is ready again. It may be much: others get their turns meanwhile."""
        while unsent:
            runs = LeaseResponse.FromString(unsent.popleft()).runs
            for i in range(0, len(runs), RUNS_PER_TURN):
                self.forwarder.give_back(runs[i:i + RUNS_PER_TURN])
                await asyncio.sleep(0)

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


def _restricted(action: int) -> Grants | None:
    """What the caller's grants are to be asked for; None if it may do this everywhere."""
    grants = current().grants
    return None if grants is None or grants.everything[action] else grants


class _Pump:
    """What the two tasks of a stream share."""

    __slots__ = ("ended", "error", "size", "some", "taken")

    def __init__(self) -> None:
        self.size = 0
        self.ended = False
        self.error: RequestError | None = None
        self.some = asyncio.Event()  # the reader has added a call, or has ended
        self.taken = asyncio.Event()  # the writer has taken one away


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


