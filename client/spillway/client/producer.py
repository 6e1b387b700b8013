"""Sends records: straight to the leader of each shard, in batches, in order, exactly once.

While nothing is in flight a record goes out at once; while a request is in flight the next one fills. Numbers and
retries are `sequencing.Lane`'s; this module moves bytes and reports outcomes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from spillway.client import wire
from spillway.client.connection import Channels
from spillway.client.errors import (
    BufferFull,
    Closed,
    InvalidArgument,
    OutcomeUnknown,
    PartialFailure,
    SendTimeout,
    SpillwayError,
    Unavailable,
    from_item_error,
)
from spillway.client.model import Receipt, Record
from spillway.client.retry import Backoff, Verdict, verdict_of
from spillway.client.sequencing import Entry, Lane, Refusal
from spillway.client.streams import Batch, BatchStream, check_answer
from spillway.client.topology import Router, Topology
from spillway.contract.limits import FRAME_BYTES_SOFT_MAX, PRODUCER_ID_BYTES_MAX, RECORDS_PER_REQUEST_MAX
from spillway.v1 import queue_service_pb2 as pb

if TYPE_CHECKING:
    from spillway.client.spans import Tracing

log = logging.getLogger("spillway.client")

METHOD = "/spillway.v1.QueueService/Produce"
IN_FLIGHT_BYTES_MAX = 64 << 20
EAGER_REQUESTS_MAX = 2  # in flight, whatever the next one's size: one commits while the other travels
REQUESTS_MAX = 8  # in flight, if the next one is large
LARGE_BYTES = 128 << 10  # from here on the cost of a frame is the cost of its bytes
ENTRY_BYTES = 160  # what a waiting record costs beside its bytes
NAMES_MAX = 65_536  # queue names kept encoded
RETRY_SECONDS_BASE = 0.02
RETRY_SECONDS_CAP = 2.0
_SUFFIX_BYTES = 17  # of a producer id that the caller began


class _One:
    """Outcome of a single send."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[Receipt]) -> None:
        self.future = future

    def stored(self, position: int, receipt: Receipt) -> None:
        if not self.future.done():
            self.future.set_result(receipt)

    def failed(self, position: int, error: SpillwayError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Many:
    """Outcomes of a batch: one future for all."""

    __slots__ = ("errors", "future", "receipts", "remaining")

    def __init__(self, count: int, future: asyncio.Future[None]) -> None:
        self.receipts: list[Receipt | None] = [None] * count
        self.errors: dict[int, SpillwayError] = {}
        self.remaining = count
        self.future = future

    def stored(self, position: int, receipt: Receipt) -> None:
        self.receipts[position] = receipt
        self.remaining -= 1
        if not self.remaining and not self.future.done():
            self.future.set_result(None)

    def failed(self, position: int, error: SpillwayError) -> None:
        self.errors[position] = error
        self.remaining -= 1
        if not self.remaining and not self.future.done():
            self.future.set_result(None)


class _Request(Batch):
    __slots__ = ("parts",)

    def __init__(self, frame: bytes, parts: list[tuple[_Lane, list[Entry]]]) -> None:
        super().__init__(frame)
        self.parts = parts


class _Lane(Lane):
    """A lane and where it goes."""

    __slots__ = ("backoff", "queued", "stream", "timer")

    def __init__(self, shard: int, producer_id: str, fresh: Callable[[], str]) -> None:
        super().__init__(shard, producer_id, fresh)
        self.stream: _Stream | None = None  # where its batches in flight are, and the next go
        self.queued = False  # in its stream's `ready`
        self.timer: asyncio.TimerHandle | None = None  # until it resumes
        self.backoff = Backoff(RETRY_SECONDS_BASE, RETRY_SECONDS_CAP)


class _Stream(BatchStream[_Request]):
    """The Produce stream to one node."""

    def __init__(self, address: str, producer: Producer) -> None:
        self.producer = producer
        self.ready: deque[_Lane] = deque()
        self.first_at: float | None = None  # when the oldest of `ready` became so; for linger
        self.alarm = 0.0  # when a timer will wake the stream; for linger
        super().__init__(address, producer._router.health)

    def channel(self) -> grpc.aio.Channel:
        return self.producer._channels.get(self.address, "produce")

    def open(self) -> grpc.aio.StreamStreamCall[Any, Any]:
        return self.channel().stream_stream(METHOD, None, pb.ProduceResponse.FromString)()

    def token(self) -> str:
        return self.producer._channels.token()

    def offer(self, lane: _Lane) -> None:
        """The lane has something to send."""
        lane.queued = True
        self.ready.append(lane)
        if self.first_at is None:
            self.first_at = self._loop.time()
        self.wake()

    def fill(self) -> _Request | None:
        ready = self.ready
        if not ready:
            return None
        in_flight = len(self.in_flight)
        if in_flight >= EAGER_REQUESTS_MAX and (in_flight >= REQUESTS_MAX or self._waiting() < LARGE_BYTES):
            return None
        if self.producer.linger and not self.producer._hurry:
            assert self.first_at is not None
            due = self.first_at + self.producer.linger
            if due > self._loop.time() and self._waiting() < FRAME_BYTES_SOFT_MAX:
                if due != self.alarm:
                    self.alarm = due
                    self._loop.call_at(due, self.wake)
                return None
        return self._build()

    def _waiting(self) -> int:
        return sum(lane.pending_bytes for lane in self.ready)

    def _build(self) -> _Request | None:
        ready = self.ready
        producer_id = next((lane.producer_id for lane in ready if lane.sendable), ready[0].producer_id)
        head = wire.produce_head(producer_id)
        pieces = [head]
        parts: list[tuple[_Lane, list[Entry]]] = []
        records = RECORDS_PER_REQUEST_MAX
        room = FRAME_BYTES_SOFT_MAX - len(head)
        number = wire.number
        for _ in range(len(ready)):
            lane = ready.popleft()
            if lane.producer_id != producer_id or not lane.sendable:
                if lane.sendable:
                    ready.append(lane)
                else:
                    lane.queued = False
                continue
            entries, size = lane.take(records, room - wire.NUMBER_BYTES, oversize=not parts)
            if entries:
                parts.append((lane, entries))
                for entry in entries:
                    pieces.append(entry.body)
                    pieces.append(number(entry.number))
                room -= size + wire.NUMBER_BYTES * len(entries)
                records -= len(entries)
            if lane.sendable:
                ready.append(lane)
            else:
                lane.queued = False
            if room <= wire.NUMBER_BYTES or not records:
                break
        self.first_at = self._loop.time() if ready else None
        return _Request(b"".join(pieces), parts) if parts else None

    def check(self, batch: _Request, response: pb.ProduceResponse) -> None:
        check_answer(sum([len(entries) for _, entries in batch.parts]), len(response.sequences), response.errors)

    def answered(self, batch: _Request, response: pb.ProduceResponse) -> None:
        self.producer._answered(self, batch, response)

    def broken(self, batches: list[_Request], error: SpillwayError, final: bool) -> None:
        self.producer._broken(self, batches, error, final)

    def moved(self, batch: _Request) -> bool:
        router = self.producer._router
        return any(not router.is_leader(lane.shard, self.address) for lane, _ in batch.parts)


class Producer:
    """Sends records. Made by `Client.producer`; use it as `async with`.

    Records of one queue are stored in the order in which they were handed in, each exactly once, across retries and
    changes of leader, while the producer lives.
    """

    def __init__(self, router: Router, channels: Channels, *, linger: float = 0.0,
                 in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX, producer_id: str | None = None,
                 payload_bytes_max: int, close_timeout: float = 30.0, tracing: Tracing | None = None) -> None:
        self.linger = linger
        self.payload_bytes_max = payload_bytes_max
        self._name = producer_id
        if producer_id is not None and not 0 < len(wire.name_bytes("producer_id", producer_id)) <= (
                PRODUCER_ID_BYTES_MAX - _SUFFIX_BYTES):
            raise InvalidArgument("producer_id", f"it must have 1 to {PRODUCER_ID_BYTES_MAX - _SUFFIX_BYTES} bytes")
        self.producer_id = self._fresh_id()
        self._router = router
        self._channels = channels
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[int, _Lane] = {}
        self._streams: dict[str, _Stream] = {}
        self._names: dict[tuple[str, str, str], tuple[_Lane, wire.QueueName]] = {}
        self._room = in_flight_bytes_max
        self._room_max = in_flight_bytes_max
        self._line = asyncio.Lock()  # where sends wait for room, in the order of their calls; the first one holds it
        self._in_line = 0  # how many do: nobody may overtake them
        self._vacancy: asyncio.Future[None] | None = None  # what the first of them waits for
        self._early = 0  # sends that came before the first topology and have not gone on yet
        self._entrance = asyncio.Lock()  # where they wait, in the order of their calls
        self._flushes: list[tuple[dict[_Lane, int], asyncio.Future[None]]] = []
        self._hurry = 0  # flushes under way: nothing lingers
        self._closed = False
        self._ending: asyncio.Future[None] = self._loop.create_future()  # done once closed
        self._warned = False
        self._close_timeout = close_timeout
        self._tracing = tracing
        router.watch.listen(self._topology_changed)

    def __repr__(self) -> str:
        waiting = sum(lane.accepted - lane.resolved for lane in self._lanes.values())
        return f"<Producer {self.producer_id}: {waiting} records unacknowledged, {self._room_max - self._room} bytes>"

    async def __aenter__(self) -> Producer:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self.close(flush=not isinstance(error, asyncio.CancelledError))

    @property
    def closed(self) -> bool:
        """Whether it takes no more records."""
        return self._closed

    # -- sending -------------------------------------------------------------------------------------------------

    async def send(self, destination: str, payload: bytes, *, tenant: str = "", key: str = "",
                   headers: Mapping[str, str] | None = None, id: str = "", delay: float | None = None,
                   deliver_at: datetime | None = None, ttl: float | None = None, dedup_id: str = "",
                   timeout: float | None = None) -> Receipt:
        """Stores one message; returns when a majority of its shard has it on disk.

        `delay`, `deliver_at`, `ttl` and `dedup_id` as in `Record`. `timeout` is seconds; without one it waits as long as the
        cluster is away. Waits while `in_flight_bytes_max` is reached. Raises InvalidArgument, DestinationNotFound,
        OverBudget or PermissionDenied (it is not stored), SendTimeout (see its `outcome_unknown`), OutcomeUnknown, Closed. If cancelled, a
        record that did not go out yet is forgotten; one that did may be stored.
        """
        record = Record(destination, payload, tenant, key, headers, id, delay, deliver_at, ttl, dedup_id)
        if self._tracing is None:
            return await self._send(record, timeout)
        with self._tracing.sending(record) as sending:
            receipt = await self._send(sending.record, timeout)
            sending.stored(receipt)
            return receipt

    async def _send(self, record: Record, timeout: float | None) -> Receipt:
        deadline = None if timeout is None else self._loop.time() + timeout
        await self._ready(deadline)
        lane, body = self._encode(record)
        future: asyncio.Future[Receipt] = self._loop.create_future()
        sink = _One(future)
        if self._take_room(len(body) + ENTRY_BYTES):
            entry = self._accept(lane, body, sink, 0)
        else:
            try:
                async with asyncio.timeout_at(deadline), self._turn():
                    await self._room_for(len(body) + ENTRY_BYTES)
                    entry = self._accept(lane, body, sink, 0)
            except TimeoutError:
                raise SendTimeout("the buffer stayed full", outcome_unknown=False) from None
        if deadline is None:
            try:
                return await future
            except asyncio.CancelledError:
                self._forget(lane, entry)
                raise
        try:
            async with asyncio.timeout_at(deadline):
                return await future
        except TimeoutError:
            raise self._timed_out(self._forget(lane, entry)) from None
        except asyncio.CancelledError:
            self._forget(lane, entry)
            raise

    def send_nowait(self, destination: str, payload: bytes, *, tenant: str = "", key: str = "",
                    headers: Mapping[str, str] | None = None, id: str = "", delay: float | None = None,
                    deliver_at: datetime | None = None, ttl: float | None = None, dedup_id: str = "") -> asyncio.Future[Receipt]:
        """As `send`, but returns a future of the receipt at once. Raises BufferFull instead of waiting, and Unavailable
        until the first topology arrived (`Client.wait_ready`) and sends that waited for it have gone on."""
        if self._closed:
            raise Closed("the producer is closed")
        if not self._router.watch.current.shard_count:
            raise Unavailable("the topology is not known yet; await Client.wait_ready() first")
        if self._early:
            raise Unavailable("sends that waited for the topology are about to go on, and must not be overtaken; try again in a moment")
        record = Record(destination, payload, tenant, key, headers, id, delay, deliver_at, ttl, dedup_id)
        if self._tracing is None:
            return self._send_nowait(record)
        sending = self._tracing.sending(record)
        try:
            future = self._send_nowait(sending.record)
        except BaseException as error:
            sending.__exit__(type(error), error, error.__traceback__)
            raise
        if sending.span is not None:
            future.add_done_callback(sending.concluded)
        return future

    def _send_nowait(self, record: Record) -> asyncio.Future[Receipt]:
        lane, body = self._encode(record)
        if not self._take_room(len(body) + ENTRY_BYTES):
            raise BufferFull(f"{self._room_max - self._room} bytes are unacknowledged; the limit is {self._room_max}")
        future: asyncio.Future[Receipt] = self._loop.create_future()
        self._accept(lane, body, _One(future), 0)
        return future

    async def send_many(self, records: Iterable[Record], *, timeout: float | None = None) -> list[Receipt]:
        """Stores many messages; returns their receipts in order. The fast path: one future for all.

        All records are checked before the first one is sent: InvalidArgument names `records[i].field`, and nothing
        is stored. If records fail later, raises PartialFailure once every outcome is known. Waits while
        `in_flight_bytes_max` is reached.
        """
        if self._tracing is None:
            return await self._send_many(records, timeout)
        begin = time.time_ns()
        traced = [self._tracing.creating(record) for record in records]
        created = [context for _, context in traced if context is not None]
        failed: BaseException | None = None
        try:
            return await self._send_many([record for record, _ in traced], timeout)
        except BaseException as error:
            failed = error
            raise
        finally:
            if created:
                self._tracing.sent_many(begin, created, len(traced), failed)

    async def _send_many(self, records: Iterable[Record], timeout: float | None) -> list[Receipt]:
        deadline = None if timeout is None else self._loop.time() + timeout
        await self._ready(deadline)
        encode = self._encode
        encoded: list[tuple[_Lane, bytes]] = []
        try:
            for record in records:
                encoded.append(encode(record))
        except InvalidArgument as error:
            raise InvalidArgument(f"records[{len(encoded)}].{error.field}", str(error).partition(": ")[2]) from None
        if not encoded:
            return []
        many = _Many(len(encoded), self._loop.create_future())
        entries: list[Entry] = []
        try:
            async with asyncio.timeout_at(deadline):
                try:
                    await self._accept_many(encoded, many, entries)
                except Closed as closed:
                    if not entries:
                        raise
                    for i in range(len(entries), len(encoded)):  # those before have outcomes of their own
                        many.failed(i, closed)
                await many.future
        except TimeoutError:
            forgotten = self._forget_many(encoded, entries)
            for i in range(len(encoded)):
                if i >= len(entries) or i in forgotten:
                    many.errors[i] = self._timed_out(never_sent=True)
                elif many.receipts[i] is None and i not in many.errors:
                    many.errors[i] = self._timed_out(never_sent=False)
        except asyncio.CancelledError:
            self._forget_many(encoded, entries)
            raise
        if many.errors:
            raise PartialFailure(list(many.receipts), dict(sorted(many.errors.items())))
        return many.receipts  # type: ignore[return-value] # none is None

    async def flush(self) -> None:
        """Waits until the outcome of every record handed in before is known. Reports none: the sends do."""
        targets = {lane: lane.accepted for lane in self._lanes.values() if not lane.idle}
        if not targets:
            return
        future: asyncio.Future[None] = self._loop.create_future()
        self._flushes.append((targets, future))
        self._hurry += 1
        for stream in self._streams.values():
            stream.wake()
        try:
            await future
        finally:
            self._hurry -= 1

    async def close(self, *, flush: bool = True) -> None:
        """Waits for what is unacknowledged (at most `close_timeout`), then ends the streams. Records still without an
        outcome fail: with OutcomeUnknown if they went out, else with Closed."""
        if self._closed:
            return
        self._closed = True
        self._ending.set_result(None)
        self._vacated()  # whoever is in line is turned away
        try:
            if flush:
                async with asyncio.timeout(self._close_timeout):
                    await self.flush()
        except TimeoutError:
            log.warning("%r closed with records unacknowledged", self)
        finally:
            self._router.watch.forget(self._topology_changed)
            for lane in self._lanes.values():
                if lane.timer is not None:
                    lane.timer.cancel()
            streams = list(self._streams.values())
            await asyncio.gather(*(stream.close() for stream in streams))
            for stream in streams:
                for batch in stream.in_flight:
                    for lane, entries in batch.parts:
                        lane.broken(entries)
            for lane in self._lanes.values():
                lane.fail_all(_closed_error)

    # -- inner: accepting ----------------------------------------------------------------------------------------

    def _fresh_id(self) -> str:
        """A producer id that no other producer has, ever: numbers restart at 1 with it."""
        return secrets.token_hex(16) if self._name is None else f"{self._name}-{secrets.token_hex(8)}"

    async def _ready(self, deadline: float | None) -> None:
        """Returns when a topology is known, to callers in the order of their calls. Raises Closed or SendTimeout."""
        if not self._closed and (self._early or not self._router.watch.current.shard_count):
            self._early += 1
            try:
                async with asyncio.timeout_at(deadline), self._entrance:
                    if not self._closed:
                        await self._known()
            except TimeoutError:
                raise SendTimeout("no node could be reached in time", outcome_unknown=False) from None
            finally:
                self._early -= 1
        if self._closed:
            raise Closed("the producer is closed")

    async def _known(self) -> None:
        """Returns when a topology is known, or the producer closed."""
        known = asyncio.ensure_future(self._router.watch.known())
        try:
            await asyncio.wait((known, self._ending), return_when=asyncio.FIRST_COMPLETED)
            if known.done():
                known.result()  # raises what says that nodes refuse this client
        finally:
            known.cancel()

    def _encode(self, record: Record) -> tuple[_Lane, bytes]:
        destination, payload, tenant, key, headers, id, delay, deliver_at, ttl, dedup_id = record
        options = b""
        if delay is not None or deliver_at is not None or ttl is not None or dedup_id:
            options = wire.record_options(delay, deliver_at, ttl, dedup_id)
        try:
            lane, name = self._names[destination, tenant, key]
        except KeyError:
            lane, name = self._name_of(destination, tenant, key)
        return lane, wire.record(name, payload, headers, id, options, self.payload_bytes_max)

    def _name_of(self, destination: str, tenant: str, key: str) -> tuple[_Lane, wire.QueueName]:
        name = wire.queue_name(destination, tenant, key, self._router.watch.current.shard_count)
        lane = self._lanes.get(name.shard)
        if lane is None:
            lane = self._lanes[name.shard] = _Lane(name.shard, self.producer_id, self._fresh_id)
        if len(self._names) >= NAMES_MAX:
            self._names.clear()
        found = self._names[destination, tenant, key] = (lane, name)
        return found

    def _accept(self, lane: _Lane, body: bytes, sink: _One | _Many, position: int) -> Entry:
        entry = Entry(body, sink, position)
        lane.add(entry)
        if not lane.queued:
            self._offer(lane)
        return entry

    async def _accept_many(self, encoded: list[tuple[_Lane, bytes]], many: _Many, entries: list[Entry]) -> None:
        """Accepts them as there is room, with nobody's in between."""
        accept = self._accept
        for lane, body in encoded:
            if not self._take_room(len(body) + ENTRY_BYTES):
                break
            entries.append(accept(lane, body, many, len(entries)))
        if len(entries) < len(encoded):
            async with self._turn():
                for lane, body in encoded[len(entries):]:
                    await self._room_for(len(body) + ENTRY_BYTES)
                    entries.append(accept(lane, body, many, len(entries)))

    def _forget_many(self, encoded: list[tuple[_Lane, bytes]], entries: list[Entry]) -> set[int]:
        """Drops those that never went out; returns their positions."""
        return {entry.position for (lane, _), entry in zip(encoded, entries, strict=False) if self._forget(lane, entry)}

    def _forget(self, lane: _Lane, entry: Entry) -> bool:
        """Drops a record if it never went out; returns whether it did not."""
        size = len(entry.body) + ENTRY_BYTES
        dropped = lane.drop(entry, Closed("nobody waits for it any more"))
        if dropped:
            self._room += size
            self._vacated()
            self._check_flushes()
        return dropped

    @staticmethod
    def _timed_out(never_sent: bool) -> SendTimeout:
        if never_sent:
            return SendTimeout("the record was not sent in time, and is forgotten", outcome_unknown=False)
        return SendTimeout("the record was sent but not acknowledged in time; it may be, or still become, stored",
                           outcome_unknown=True)

    def _take_room(self, size: int) -> bool:
        """Takes `size` bytes of the buffer if they are free and nobody waits for some; a record larger than the buffer goes alone."""
        if self._in_line or not self._fits(size):
            return False
        self._room -= size
        return True

    def _fits(self, size: int) -> bool:
        return size <= self._room or self._room >= self._room_max

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Waits in line; inside, it is this send's turn."""
        self._in_line += 1
        try:
            async with self._line:
                yield
        finally:
            self._in_line -= 1

    async def _room_for(self, size: int) -> None:
        """In its turn: waits until `size` bytes are free, and takes them. Raises Closed."""
        while not self._closed and not self._fits(size):
            self._vacancy = self._loop.create_future()
            try:
                await self._vacancy
            finally:
                self._vacancy = None
        if self._closed:
            raise Closed("the producer is closed")
        self._room -= size

    def _vacated(self) -> None:
        """There is more room: the first in line looks whether it is enough."""
        if self._vacancy is not None and not self._vacancy.done():
            self._vacancy.set_result(None)

    # -- inner: routing ------------------------------------------------------------------------------------------

    def _offer(self, lane: _Lane) -> None:
        """Puts a lane with something to send before its stream: the leader's, unless batches of it are still in
        flight elsewhere (then it waits for their answers, to keep its order)."""
        if lane.queued or not lane.sendable:
            return
        stream = lane.stream
        if stream is None or not lane.in_flight:
            stream = lane.stream = self._stream(self._router.route(lane.shard))
        elif stream.address != self._router.route(lane.shard):
            return
        stream.offer(lane)

    def _stream(self, address: str) -> _Stream:
        stream = self._streams.get(address)
        if stream is None:
            stream = self._streams[address] = _Stream(address, self)
        return stream

    def _topology_changed(self, old: Topology, new: Topology) -> None:
        if old.shard_count and old.shard_count != new.shard_count:
            log.error("the number of shards changed from %d to %d: this is another cluster",
                      old.shard_count, new.shard_count)
        for lane in self._lanes.values():
            if lane.queued and lane.stream is not None and lane.stream.address != self._router.route(lane.shard):
                lane.stream.ready.remove(lane)
                lane.queued = False
            if lane.timer is not None and old.leader_of(lane.shard) != new.leader_of(lane.shard):
                lane.timer.cancel()
                self._resume(lane)  # the new leader is known: no reason to wait longer
            else:
                self._offer(lane)

    # -- inner: answers ------------------------------------------------------------------------------------------

    def _answered(self, stream: _Stream, batch: _Request, response: pb.ProduceResponse) -> None:
        sequences = list(response.sequences)
        errors = response.errors
        start = 0
        if not errors:
            for lane, entries in batch.parts:
                end = start + len(entries)
                with _Freed(self, lane):
                    lane.stored(entries, sequences[start:end])
                lane.backoff.reset()
                start = end
                if lane.blocked:
                    self._blocked(lane)
                elif not lane.queued:
                    self._offer(lane)
        else:
            refusals = {item.index: Refusal(verdict_of(item.code), from_item_error(item)) for item in errors}
            self._warn(next(iter(refusals.values())).error)
            if any(refusal.verdict is Verdict.UNKNOWN for refusal in refusals.values()):
                self._router.watch.suspect(stream.address, alive=True)  # somebody may know of another leader
            for lane, entries in batch.parts:
                end = start + len(entries)
                refused = {i - start: refusals[i] for i in range(start, end) if i in refusals}
                with _Freed(self, lane):
                    if refused:
                        lane.mixed(entries, sequences[start:end], refused)
                    else:
                        lane.stored(entries, sequences[start:end])
                start = end
                if lane.blocked:
                    self._blocked(lane)
                else:
                    self._offer(lane)
        if self._vacancy is not None:
            self._vacated()
        if self._flushes:
            self._check_flushes()

    def _broken(self, stream: _Stream, batches: list[_Request], error: SpillwayError, final: bool) -> None:
        if batches or stream.ready:
            self._warn(error)
        self._router.watch.suspect(stream.address)
        stranded = list(stream.ready)
        stream.ready.clear()
        stream.first_at = None
        touched: dict[_Lane, None] = {}
        for batch in batches:
            for lane, entries in batch.parts:
                with _Freed(self, lane):
                    if final:
                        lane.abort(entries, error)
                    else:
                        lane.broken(entries)
                touched[lane] = None
        for lane in stranded:
            lane.queued = False
            touched[lane] = None
        for lane in touched:
            if lane.blocked:
                self._blocked(lane)
            else:
                self._offer(lane)
        self._vacated()
        self._check_flushes()

    def _blocked(self, lane: _Lane) -> None:
        """A lane failed: once all its batches are answered, resume it, after a pause if that may help."""
        if not lane.stuck or lane.timer is not None:
            return
        if lane.impatient and lane.backoff.failures < 3:
            lane.backoff.next()
            self._resume(lane)
        else:
            lane.timer = self._loop.call_later(lane.backoff.next(), self._resume, lane)

    def _resume(self, lane: _Lane) -> None:
        lane.timer = None
        with _Freed(self, lane):
            lane.resume()
        if lane.blocked:
            self._blocked(lane)
        else:
            self._offer(lane)
        self._vacated()
        self._check_flushes()

    def _check_flushes(self) -> None:
        if not self._flushes:
            return
        waiting = []
        for targets, future in self._flushes:
            if all(lane.resolved >= target for lane, target in targets.items()):
                if not future.done():
                    future.set_result(None)
            else:
                waiting.append((targets, future))
        self._flushes = waiting

    def _warn(self, error: SpillwayError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("a produce request failed (%s); what may still succeed is sent again, other sends raise. Further failures of this "
                        "producer are logged at DEBUG.", error)
        else:
            log.debug("a produce request failed: %s", error)


class _Freed:
    """Gives the buffer back what a lane resolves inside the block."""

    __slots__ = ("bytes", "count", "lane", "producer")

    def __init__(self, producer: Producer, lane: _Lane) -> None:
        self.producer = producer
        self.lane = lane

    def __enter__(self) -> None:
        self.bytes = self.lane.resolved_bytes
        self.count = self.lane.resolved

    def __exit__(self, *_: object) -> None:
        lane = self.lane
        self.producer._room += lane.resolved_bytes - self.bytes + ENTRY_BYTES * (lane.resolved - self.count)


def _closed_error(sent: bool) -> SpillwayError:
    if sent:
        return OutcomeUnknown("the producer was closed before the record was acknowledged")
    return Closed("the producer was closed before the record was sent")


__all__: Sequence[str] = ["IN_FLIGHT_BYTES_MAX", "Producer"]
