"""Sends settlements: to the leader of each lease's shard, in batches, until the outcome is certain.

A settlement is retried across changes of leader until it is committed, found to be committed already, or refused.
It never waits for credit. Settlements of one lease keep their order: one that ends the lease waits until those before
it are certain.
"""
from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import grpc
from spillway.client import wire
from spillway.client.connection import Channels
from spillway.client.errors import Closed, SpillwayError, StaleLease, from_item_error
from spillway.client.retry import Backoff
from spillway.client.streams import Batch, BatchStream, check_answer
from spillway.client.topology import Router, Topology
from spillway.contract.limits import FRAME_BYTES_SOFT_MAX, SETTLEMENTS_PER_REQUEST_MAX
from spillway.v1 import message_pb2
from spillway.v1 import queue_service_pb2 as pb

if TYPE_CHECKING:
    from spillway.client.leases import LeasedRun

log = logging.getLogger("spillway.client")

METHOD = "/spillway.v1.QueueService/Ack"
EAGER_REQUESTS_MAX = 2  # in flight, however small the next one is
REQUESTS_MAX = 4
LARGE_SETTLEMENTS = 256  # from here on a request is worth its cost
RETRY_SECONDS_BASE = 0.02
RETRY_SECONDS_CAP = 1.0
ACK, RETRY, THROTTLED, DOWN, REJECT, RELEASE, EXTEND = range(1, 8)
_RETRIED = frozenset({message_pb2.ERROR_CODE_UNAVAILABLE, message_pb2.ERROR_CODE_RESOURCE_EXHAUSTED})


class Settlement:
    """A settlement on its way. Await it to know that it is committed: raises StaleLease if the lease was lost. Without
    an await it goes out all the same, and a lost lease is reported to the consumer's `on_stale`."""

    __slots__ = ("_error", "_waiters", "at", "delay", "done", "outcome", "reason", "run", "sequence", "span", "upto")

    def __init__(self, run: LeasedRun, outcome: int, upto: int, sequence: int, delay: float | None, reason: str) -> None:
        self.run = run
        self.outcome = outcome
        self.upto = upto  # ACK: how many messages of the run are settled with it
        self.sequence = sequence
        self.delay = delay
        self.reason = reason
        self.at = 0.0  # when it was handed in, by the loop's clock
        self.done = False
        self.span: Any = None  # of a trace, if it is of a sampled message
        self._error: SpillwayError | None = None
        self._waiters: list[asyncio.Future[None]] | None = None

    def __repr__(self) -> str:
        state = "on its way" if not self.done else repr(self._error) if self._error else "committed"
        outcome = pb.Outcome.Name(pb.Outcome.ValueType(self.outcome))
        return f"<Settlement {outcome} of shard {self.run.shard} lease {self.run.fencing_token}: {state}>"

    def __await__(self) -> Generator[Any, None, None]:
        if not self.done:
            waiter = asyncio.get_running_loop().create_future()
            if self._waiters is None:
                self._waiters = [waiter]
            else:
                self._waiters.append(waiter)
            yield from waiter
        if self._error is not None:
            raise self._error

    @property
    def awaited(self) -> bool:
        """Whether someone waits for the outcome."""
        return bool(self._waiters)

    def finish(self, error: SpillwayError | None) -> None:
        """The outcome is certain."""
        self.done = True
        self._error = error
        if self._waiters is not None:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)


class _Request(Batch):
    __slots__ = ("settlements",)

    def __init__(self, frame: bytes, settlements: list[Settlement]) -> None:
        super().__init__(frame)
        self.settlements = settlements


class _Stream(BatchStream[_Request]):
    """The Ack stream to one node."""

    def __init__(self, address: str, settler: Settler) -> None:
        self.settler = settler
        self.pending: deque[Settlement] = deque()
        super().__init__(address, settler._router.health)

    def channel(self) -> grpc.aio.Channel:
        return self.settler._channels.get(self.address, "ack")

    def open(self) -> grpc.aio.StreamStreamCall[Any, Any]:
        return self.channel().stream_stream(METHOD, None, pb.AckResponse.FromString)()

    def token(self) -> str:
        return self.settler._channels.token()

    def fill(self) -> _Request | None:
        pending = self.pending
        in_flight = len(self.in_flight)
        if not pending or (in_flight >= EAGER_REQUESTS_MAX and (
                in_flight >= REQUESTS_MAX or len(pending) < LARGE_SETTLEMENTS)):
            return None
        settlements: list[Settlement] = []
        pieces: list[bytes] = []
        room = FRAME_BYTES_SOFT_MAX
        encode = wire.settlement
        while pending and len(settlements) < SETTLEMENTS_PER_REQUEST_MAX and room > 0:
            one = pending.popleft()
            run = one.run
            outcome = one.outcome
            if outcome != EXTEND:
                if outcome != ACK and run.unsure:
                    self.settler.hold(one)
                    continue
                run.unsure += 1
            piece = encode(run.shard, run.fencing_token, one.sequence, outcome, one.delay, one.reason)
            settlements.append(one)
            pieces.append(piece)
            room -= len(piece)
        return _Request(b"".join(pieces), settlements) if settlements else None

    def check(self, batch: _Request, response: pb.AckResponse) -> None:
        check_answer(len(batch.settlements), len(response.results), response.errors)

    def answered(self, batch: _Request, response: pb.AckResponse) -> None:
        self.settler._answered(self, batch.settlements, response)

    def broken(self, batches: list[_Request], error: SpillwayError, final: bool) -> None:
        unanswered = [one for batch in batches for one in batch.settlements]
        waiting = list(self.pending)
        self.pending.clear()
        self.settler._broken(self, unanswered, waiting, error, final)

    def moved(self, batch: _Request) -> bool:
        router = self.settler._router
        return any(not router.is_leader(shard, self.address) for shard in {one.run.shard for one in batch.settlements})


class Settler:
    """Settles the leases of one consumer. `finished(settlement, error)` is told every outcome."""

    def __init__(self, router: Router, channels: Channels,
                 finished: Callable[[Settlement, SpillwayError | None], None]) -> None:
        self._router = router
        self._channels = channels
        self._finished = finished
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, _Stream] = {}
        self._by_shard: dict[int, _Stream] = {}
        self._retry: list[Settlement] = []  # refused for now; in order
        self._held: dict[LeasedRun, list[Settlement]] = {}  # these end leases of which something is not certain yet
        self._backoff = Backoff(RETRY_SECONDS_BASE, RETRY_SECONDS_CAP)
        self._timer: asyncio.TimerHandle | None = None
        self._drained: list[asyncio.Future[None]] = []
        self._closed = False
        self.unfinished = 0
        router.watch.listen(self._topology_changed)

    def submit(self, settlement: Settlement) -> None:
        """Sends a settlement, in this turn of the loop or as soon as its shard can take it."""
        if self._closed:
            raise Closed("the consumer is closed")
        self.unfinished += 1
        self._send(settlement)

    def _send(self, settlement: Settlement) -> None:
        shard = settlement.run.shard
        stream = self._by_shard.get(shard)
        if stream is None:
            stream = self._by_shard[shard] = self._stream(self._router.route(shard))
        stream.pending.append(settlement)
        stream.wake()

    def hold(self, settlement: Settlement) -> None:
        """Sends a settlement again once those of its lease that are under way are certain."""
        self._held.setdefault(settlement.run, []).append(settlement)

    def _unhold(self, run: LeasedRun) -> None:
        for one in self._held.pop(run, ()):
            self._send(one)

    def _stream(self, address: str) -> _Stream:
        stream = self._streams.get(address)
        if stream is None:
            stream = self._streams[address] = _Stream(address, self)
        return stream

    def _topology_changed(self, old: Topology, new: Topology) -> None:
        self._by_shard.clear()
        if self._timer is not None and old.leaders != new.leaders:
            self._timer.cancel()
            self._resend()

    def _answered(self, stream: _Stream, settlements: list[Settlement], response: pb.AckResponse) -> None:
        finished = self._finished
        if not response.errors:
            for one in settlements:
                if one.outcome != EXTEND:
                    one.run.unsure -= 1
                one.finish(None)
                finished(one, None)
                if self._held:
                    self._unhold(one.run)
            self.unfinished -= len(settlements)
            self._backoff.reset()
        else:
            errors = {item.index: item for item in response.errors}
            for i, one in enumerate(settlements):
                item = errors.get(i)
                if item is None:
                    self._finish(one, None)
                elif item.code in _RETRIED:
                    self._retry.append(one)
                else:
                    self._finish(one, from_item_error(item))
            if self._retry:
                self._router.watch.suspect(stream.address, alive=True)  # somebody may know of another leader
                self._retry_later()
        if not self.unfinished and self._drained:
            self._tell_drained()

    def _finish(self, one: Settlement, error: SpillwayError | None) -> None:
        if one.outcome != EXTEND:
            one.run.unsure -= 1
        self.unfinished -= 1
        one.finish(error)
        self._finished(one, error)
        self._unhold(one.run)

    def _broken(self, stream: _Stream, unanswered: list[Settlement], waiting: list[Settlement], error: SpillwayError,
                final: bool) -> None:
        self._by_shard.clear()
        self._router.watch.suspect(stream.address)
        if final:
            for one in unanswered:
                self._finish(one, error)
        else:
            self._retry += unanswered
        for one in waiting:
            self._send(one)
        self._retry_later()
        self._tell_drained()

    def _retry_later(self) -> None:
        if self._retry and self._timer is None:
            self._timer = self._loop.call_later(self._backoff.next(), self._resend)

    def _resend(self) -> None:
        self._timer = None
        again, self._retry = self._retry, []
        for one in again:
            if one.outcome != EXTEND:
                one.run.unsure -= 1
            self._send(one)

    def _tell_drained(self) -> None:
        if not self.unfinished:
            for waiter in self._drained:
                if not waiter.done():
                    waiter.set_result(None)
            self._drained.clear()

    async def drained(self) -> None:
        """Waits until every settlement handed in has its outcome."""
        if self.unfinished:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._drained.append(waiter)
            await waiter

    async def close(self) -> None:
        """Ends the streams. Settlements without an outcome fail with Closed; they may be committed."""
        self._closed = True
        self._router.watch.forget(self._topology_changed)
        if self._timer is not None:
            self._timer.cancel()
        streams = list(self._streams.values())
        await asyncio.gather(*(stream.close() for stream in streams))
        left = list(self._retry)
        for stream in streams:
            left += [one for batch in stream.in_flight for one in batch.settlements]
            left += stream.pending
        left += [one for held in self._held.values() for one in held]
        for one in left:
            one.finish(Closed("the consumer was closed before the settlement was certain"))
        self.unfinished = 0
        self._tell_drained()


__all__ = ["ACK", "DOWN", "EXTEND", "REJECT", "RELEASE", "RETRY", "THROTTLED", "Settlement", "Settler", "StaleLease"]
