"""Leases messages: one stream to every node, credit split over them, leases extended, settlements sent.

The broker sends only what there is credit for; credit comes back when a message is settled. Whatever breaks is opened
again, for ever, with jittered backoff; a reconnecting stream tells which leases it still has, so that what was lost on
the way is ready again at once instead of when its lease expires.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from spillway.client import wire
from spillway.client.connection import Channels
from spillway.client.errors import Closed, InvalidArgument, SpillwayError, Unavailable, from_rpc_error
from spillway.client.leases import LeasedMessage, LeasedRun
from spillway.client.retry import Backoff, is_final
from spillway.client.settlements import ACK, EXTEND, Settlement, Settler
from spillway.client.topology import Router, Topology
from spillway.contract.credits import CreditSplitter
from spillway.contract.limits import (
    CREDIT_BYTES_MAX,
    CREDIT_MESSAGES_MAX,
    LEASE_MS_MAX,
    LEASE_MS_MIN,
    RUN_MESSAGES_MAX,
    SUBSCRIBE_DESTINATIONS_MAX,
)
from spillway.v1 import queue_service_pb2 as pb

if TYPE_CHECKING:
    from spillway.client.spans import Tracing

log = logging.getLogger("spillway.client")

METHOD = "/spillway.v1.QueueService/Lease"
CREDIT_MESSAGES = 256
CREDIT_BYTES = 16 << 20
LEASE_TOTAL_SECONDS = 3600.0
SILENCE_SECONDS_MAX = 25.0  # heartbeats come every 10 s
WATCH_SECONDS = 1.0
OPENING_SECONDS = 0.05  # between looks whether a stream has connected
FORWARD_SECONDS = 2.0  # how long a leader may be unreachable before another node is asked to forward its messages
RESUBSCRIBE_SECONDS = 0.25  # after a shard moved to a node: for what its old leader granted and did not deliver
CLOSE_READ_SECONDS = 1.0  # how long a closing stream may still deliver
EXTEND_TICK_SECONDS = 0.25
EXTENSION_SECONDS_MIN = 1.0  # of a lease that was nearly over when it came
DRAINING_SECONDS = 1.0  # before a node that is stopping is asked again


_Call = grpc.aio.StreamStreamCall[Any, Any]


def _lease(channel: grpc.aio.Channel) -> _Call:
    return channel.stream_stream(METHOD, pb.LeaseRequest.SerializeToString, pb.LeaseResponse.FromString)()


class ConsumerState(enum.Enum):
    """How a consumer is doing."""

    CONNECTING = "connecting"  # some stream is not open yet
    CONSUMING = "consuming"  # streams to all nodes are open
    DEGRADED = "degraded"  # some stream is down and being opened again
    CLOSED = "closed"


class _Stream:
    """The Lease stream to one node, opened again whenever it ends."""

    def __init__(self, consumer: Consumer, node: str, address: str, local_only: bool) -> None:
        self.consumer = consumer
        self.node = node
        self.address = address
        self.local_only = local_only
        self.open = False
        self.number = 0  # of the call, in the session
        self.complete = True  # whatever was granted over the calls so far has come, or is known to be lost
        self.failing_since: float | None = None
        self.owed_messages = 0  # credit planned and not sent
        self.owed_bytes = 0
        self._credit = asyncio.Event()
        self._again = asyncio.Event()  # subscribe anew
        self._now = asyncio.Event()  # do not wait any longer before the next try
        self._closing = False
        self._call: _Call | None = None
        self._backoff = Backoff(0.05, 2.0)
        self._loop = asyncio.get_running_loop()
        consumer.credits.add(self, self._loop.time())  # at once, so that the first split sees all nodes
        self.task = asyncio.create_task(self._run(), name=f"spillway lease {address}")

    def __str__(self) -> str:
        return self.node

    def owe(self, messages: int, bytes: int) -> None:
        """Credit to send; negative takes back."""
        self.owed_messages += messages
        self.owed_bytes += bytes
        self._credit.set()

    def resubscribe(self) -> None:
        """Opens the stream anew. What the old call still brings is not taken."""
        self.consumer.delivering.discard(self.number)
        self._again.set()

    def hurry(self) -> None:
        """Tries again at once, as for the first time: the node leads something since a moment ago, so it is up, however often it could
        not be reached before."""
        if not self.open:
            if self.failing_since is not None:
                self.failing_since = self._loop.time()
            self._backoff.reset()
            self._now.set()

    async def close(self) -> None:
        """Takes what is still coming, for a moment, then ends the stream."""
        self._closing = True
        call = self._call
        if call is not None and self.open:
            try:
                async with asyncio.timeout(CLOSE_READ_SECONDS):
                    await call.done_writing()
                    await asyncio.wait((self.task,))
            except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def report(self) -> None:
        """Tells the node which leases have come, by subscribing once more, for nothing: those that were lost on the way need not expire
        then. To be called once nothing is delivered any more."""
        consumer = self.consumer
        subscribe = consumer.subscription(0, 0, self.local_only)
        call = _lease(consumer.channels.get(self.address, "lease"))
        try:
            async with asyncio.timeout(CLOSE_READ_SECONDS):
                await call.write(subscribe)
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the leases expire
        finally:
            consumer.delivering.discard(subscribe.subscribe.stream)
            call.cancel()

    async def _run(self) -> None:
        consumer, backoff = self.consumer, self._backoff
        while True:
            self._again.clear()
            started = self._loop.time()
            pause = 0.0
            try:
                ended = await self._serve()
            finally:
                self.open = False
                self._call = None
                self.owed_messages = self.owed_bytes = 0
                consumer.credits.remove(self)
                consumer.replan()
            if self._closing or consumer.failed:
                return
            if ended == "draining":
                pause = DRAINING_SECONDS
            elif isinstance(ended, SpillwayError):
                if self.failing_since is None:
                    backoff.reset()
                    self.failing_since = started
                consumer.stream_failed(self, ended)
                pause = backoff.next()
            if pause:
                self._now.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._now.wait()
            consumer.credits.add(self, self._loop.time())

    async def _serve(self) -> SpillwayError | str:
        """One call, until it ends. Returns why."""
        consumer = self.consumer
        channel = consumer.channels.get(self.address, "lease")
        token = consumer.channels.token()
        call = self._call = _lease(channel)
        self.complete = False
        consumer.replan_now()
        subscribe = consumer.subscription(self.owed_messages, self.owed_bytes, self.local_only)
        number = self.number = subscribe.subscribe.stream
        self.owed_messages = self.owed_bytes = 0
        started = self.heard_at = self._loop.time()
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._read(call, number)), asyncio.create_task(self._write(call, subscribe)),
            asyncio.create_task(self._again.wait())]
        try:
            while True:
                done, _ = await asyncio.wait(tasks, timeout=WATCH_SECONDS if self.open else OPENING_SECONDS,
                                             return_when=asyncio.FIRST_COMPLETED)
                if done:
                    break
                now = self._loop.time()
                if now - self.heard_at > SILENCE_SECONDS_MAX:
                    return Unavailable(f"{self.address} is silent")
                if not self.open:
                    if channel.get_state() is grpc.ChannelConnectivity.READY:
                        self.opened()
                    elif self.failing_since is None and now - started > FORWARD_SECONDS:
                        self.failing_since = started
                        consumer.stream_failed(self, Unavailable(f"{self.address} cannot be reached"))
        finally:
            consumer.delivering.discard(number)
            call.cancel()
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for result in ended:
            if isinstance(result, grpc.aio.AioRpcError):
                error = from_rpc_error(result)
                if is_final(result.code()) and consumer.channels.token() == token:  # a new one may be better
                    consumer.fail(error)
                return error
        for result in ended:
            if isinstance(result, Exception) and not isinstance(result, asyncio.InvalidStateError):
                raise result  # a bug
        if self._again.is_set():
            return "again"
        return "draining" if ended[0] is True else Unavailable(f"{self.address} ended the stream")

    def opened(self) -> None:
        """The stream works."""
        if not self.open:
            self.open = True
            self.failing_since = None
            self.consumer.stream_opened(self)

    async def _write(self, call: _Call, subscribe: pb.LeaseRequest) -> None:
        await call.write(subscribe)
        while True:
            await self._credit.wait()
            self._credit.clear()
            messages, bytes_ = self.owed_messages, self.owed_bytes
            if messages or bytes_:
                self.owed_messages = self.owed_bytes = 0
                await call.write(pb.LeaseRequest(credit=pb.Credit(messages=messages, bytes=bytes_)))

    async def _read(self, call: _Call, number: int) -> bool:
        """Returns whether the node is draining."""
        consumer = self.consumer
        while True:
            response: Any = await call.read()
            if number not in consumer.delivering:
                return False
            if response is grpc.aio.EOF:
                self.complete = True
                return False
            self.heard_at = self._loop.time()
            if not self.open:
                self.opened()
            if response.runs:
                consumer.delivered(self, response, self.heard_at)
            if response.draining:
                return True


class Consumer:
    """Leases messages of some destinations. Made by `Client.consumer`; use it as `async with`.

    Iterate over messages (`async for message in consumer`) or over runs (`async for run in consumer.runs()`), in one
    task or in several. Leaving gives back what was not handled and waits for the settlements.
    """

    def __init__(self, router: Router, channels: Channels, destinations: Sequence[str], *, name: str = "",
                 credit_messages: int = CREDIT_MESSAGES, credit_bytes: int = CREDIT_BYTES, run_messages_max: int = 0,
                 lease_seconds: float | None = None, lease_total_max: float = LEASE_TOTAL_SECONDS,
                 on_stale: Callable[[LeasedRun, SpillwayError], None] | None = None, close_timeout: float = 10.0,
                 tracing: Tracing | None = None) -> None:
        _check(destinations, name, credit_messages, credit_bytes, run_messages_max, lease_seconds)
        self.channels = channels
        self.destinations = tuple(destinations)
        self.name = name
        self.session = secrets.token_hex(16)
        self.credits: CreditSplitter[_Stream] = CreditSplitter(credit_messages, credit_bytes)
        self.delivering: set[int] = set()
        """Numbers of the calls whose deliveries are taken. Brokers are told of them with every new call: what comes over the
        others never becomes a lease that this consumer holds, so it may be given back."""
        self._calls = itertools.count(1)
        self.on_stale = on_stale
        self.tracing = tracing
        self._router = router
        self._run_messages_max = run_messages_max
        self._lease_seconds = lease_seconds
        self._lease_total_max = lease_total_max
        self._close_timeout = close_timeout
        self._loop = asyncio.get_running_loop()
        self.time = self._loop.time
        self._settler = Settler(router, channels, self._finished)
        self._streams: dict[str, _Stream] = {}
        self._forwarded: _Stream | None = None  # for what leaders have that cannot be reached from here
        self._forward_timer: asyncio.TimerHandle | None = None
        self._closing_streams: set[asyncio.Task[None]] = set()
        self._buffer: deque[LeasedRun] = deque()  # delivered, not handed out
        self._live: dict[LeasedRun, None] = {}  # delivered, not settled for certain; in the order in which they came
        self._doubtful: set[LeasedRun] = set()  # of these, not handed out before it is known that they are not over
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._partly: deque[LeasedMessage] = deque()  # of a run handed out in part, to iterators over messages
        self._replanning = False
        self._replan_timer: asyncio.TimerHandle | None = None
        self._extend_timer: asyncio.TimerHandle | None = None
        self._extend_due = 0.0
        self._resubscribe_timer: asyncio.TimerHandle | None = None
        self._moved: dict[str, None] = {}  # nodes that lead something new, or nothing that they led; in the order of that
        self._shortest_lease = lease_seconds or 30.0
        self._fatal: SpillwayError | None = None
        self._closed = False
        self._warned = False
        self._warned_lag = False
        router.watch.listen(self._topology_changed)
        if router.watch.current.shard_count:
            self._subscribe_everywhere(router.watch.current)

    def __repr__(self) -> str:
        return (f"<Consumer {self.name!r} of {', '.join(self.destinations)}: {self.state.value}, {len(self._live)} leases, "
                f"{self.credits!r}>")

    async def __aenter__(self) -> Consumer:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self.close()

    @property
    def state(self) -> ConsumerState:
        """How it is doing now."""
        if self._closed:
            return ConsumerState.CLOSED
        streams = self._streams.values()
        if any(stream.failing_since is not None for stream in streams):
            return ConsumerState.DEGRADED
        return ConsumerState.CONSUMING if streams and all(s.open for s in streams) else ConsumerState.CONNECTING

    @property
    def closed(self) -> bool:
        """Whether it delivers no more."""
        return self._closed

    # -- taking --------------------------------------------------------------------------------------------------

    async def next_run(self, timeout: float | None = None) -> LeasedRun | None:
        """The next run; None after `timeout` seconds without one. Raises Closed once the consumer is closed, and the
        broker's error if it refused the subscription for good."""
        if timeout is None:
            return await self._take()
        try:
            async with asyncio.timeout(timeout):
                return await self._take()
        except TimeoutError:
            return None

    async def next_message(self, timeout: float | None = None) -> LeasedMessage | None:
        """The next message; None after `timeout` seconds without one. Raises as `next_run`."""
        while True:
            while self._partly:
                message = self._partly.popleft()
                if not message.settled:
                    return message
            run = await self.next_run(timeout)
            if run is None:
                return None
            self._partly.extend(run.messages)

    def __aiter__(self) -> AsyncIterator[LeasedMessage]:
        return _Messages(self)

    def runs(self) -> AsyncIterator[LeasedRun]:
        """Iterates over runs: the fast path. Ends when the consumer is closed."""
        return _Runs(self)

    async def _take(self) -> LeasedRun:
        buffer = self._buffer
        while True:
            while buffer:
                run = buffer.popleft()
                if not run.ended:
                    if self.tracing is not None:
                        self.tracing.received(run, self.name, time.time_ns())
                    return run
            if self._fatal is not None:
                raise self._fatal
            if self._closed:
                raise Closed("the consumer is closed")
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif not waiter.cancelled():
                    self._wake(1)  # somebody else shall take it
                raise

    def _wake(self, count: int) -> None:
        waiters = self._waiters
        while waiters and count > 0:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    # -- streams -------------------------------------------------------------------------------------------------

    def subscription(self, messages: int, bytes: int, local_only: bool) -> pb.LeaseRequest:
        """The first request of a call, which delivers from now on."""
        subscribe = pb.Subscribe(destinations=self.destinations, consumer=self.name,
                                 credit=pb.Credit(messages=max(messages, 0), bytes=max(bytes, 0)),
                                 run_messages_max=self._run_messages_max, local_only=local_only, session=self.session,
                                 stream=next(self._calls), streams_open=self.delivering,
                                 held=[pb.HeldLease(shard=r.shard, fencing_token=r.fencing_token) for r in self._live])
        if self._lease_seconds is not None:
            subscribe.lease_duration.FromMilliseconds(round(self._lease_seconds * 1000))
        self.delivering.add(subscribe.stream)
        return pb.LeaseRequest(subscribe=subscribe)

    def _topology_changed(self, old: Topology, new: Topology) -> None:
        moves: dict[tuple[str, str], None] = {}
        if old.shard_count == new.shard_count:
            moves = dict.fromkeys(move for move in zip(old.leaders, new.leaders, strict=True) if move[0] != move[1])
        for _, after in moves:
            if after in self._streams:
                self._streams[after].hurry()
        self._subscribe_everywhere(new)
        # An election usually shows as leader, none, leader: the last step counts, whatever came before it.
        # The old leader's stream, too, begins anew: what is on its way there would be taken for lost, and come.
        self._moved.update(dict.fromkeys(node for move in moves for node in move if node in self._streams))
        self._resubscribe_soon()

    def _resubscribe_soon(self) -> None:
        if self._moved and self._resubscribe_timer is None and not self._closed:
            self._resubscribe_timer = self._loop.call_later(RESUBSCRIBE_SECONDS, self._resubscribe_moved)

    def _resubscribe_moved(self) -> None:
        self._resubscribe_timer = None
        moved, self._moved = self._moved, {}
        for node in moved:
            if node in self._streams:
                self._streams[node].resubscribe()

    def _subscribe_everywhere(self, topology: Topology) -> None:
        for node, stream in list(self._streams.items()):
            if topology.nodes.get(node) != stream.address:
                del self._streams[node]
                self._close_stream(stream)
        for node, address in topology.nodes.items():
            if node not in self._streams:
                self._streams[node] = _Stream(self, node, address, local_only=True)
        self._check_forwarding()
        self.replan()

    def _check_forwarding(self) -> None:
        """If leaders cannot be reached from here while others can, one of those forwards what they have."""
        if self._closed:
            return
        if self._forward_timer is not None:
            self._forward_timer.cancel()
            self._forward_timer = None
        now = self._loop.time()
        leaders = set(self._router.watch.current.leaders)
        failing = {s: now - s.failing_since for s in self._streams.values()
                   if s.node in leaders and s.failing_since is not None}
        unreachable = {s.address for s, seconds in failing.items() if seconds >= FORWARD_SECONDS}
        if unreachable and self._forwarded is None:
            health = self._router.health
            address = next((a for a in self._router.watch.addresses if a not in unreachable and health.is_up(a)), None)
            if address is not None:
                log.info("consumer %r leases through %s what %s lead", self.name, address, ", ".join(sorted(unreachable)))
                self._forwarded = _Stream(self, "forwarded", address, local_only=False)
        elif not unreachable and self._forwarded is not None:
            stream, self._forwarded = self._forwarded, None
            self._close_stream(stream).add_done_callback(self._stand_in_closed)
        if failing and self._forwarded is None:
            self._forward_timer = self._loop.call_later(FORWARD_SECONDS / 4, self._check_forwarding)

    def _stand_in_closed(self, _: asyncio.Task[None]) -> None:
        """What other nodes granted to the stand-in and it did not deliver is lost on the way: ask each for it anew."""
        self._moved.update(dict.fromkeys(self._streams))
        self._resubscribe_soon()

    def _close_stream(self, stream: _Stream) -> asyncio.Task[None]:
        self.credits.remove(stream)
        task = asyncio.create_task(stream.close())
        self._closing_streams.add(task)
        task.add_done_callback(self._closing_streams.discard)
        return task

    def stream_opened(self, stream: _Stream) -> None:
        """A stream works (again)."""
        self._check_forwarding()
        if self._warned and all(s.open for s in self._streams.values()):
            self._warned = False
            log.info("consumer %r is leasing from all nodes again", self.name)

    def stream_failed(self, stream: _Stream, error: SpillwayError) -> None:
        """A stream ended and will be opened again."""
        self._router.health.failed(stream.address)
        self._router.watch.suspect(stream.address)
        self._check_forwarding()
        if not self._warned:
            self._warned = True
            log.warning("consumer %r lost its stream to %s (%s); it keeps trying. Further failures are logged at DEBUG.",
                        self.name, stream.address, error)
        else:
            log.debug("consumer %r lost its stream to %s: %s", self.name, stream.address, error)

    @property
    def failed(self) -> bool:
        """Whether the broker refused the subscription for good."""
        return self._fatal is not None

    def fail(self, error: SpillwayError) -> None:
        """The broker refuses the subscription for good: whoever iterates gets the error."""
        self._fatal = error
        self._wake(len(self._waiters))

    # -- credit --------------------------------------------------------------------------------------------------

    def replan(self) -> None:
        """Splits the credit again, once in this turn of the loop."""
        if not self._replanning and not self._closed:
            self._replanning = True
            self._loop.call_soon(self.replan_now)

    def replan_now(self) -> None:
        """Splits the credit again."""
        self._replanning = False
        if self._closed:
            return
        now = self._loop.time()
        topology = self._router.watch.current
        leaders = set(topology.leaders)
        streams = self._streams.values()
        preferred = [s for s in streams if s.node in leaders] or list(streams)
        if self._forwarded is not None:
            preferred.append(self._forwarded)
        self.credits.prefer(preferred)
        for stream, messages, bytes_ in self.credits.plan(now):
            stream.owe(messages, bytes_)
        due = self.credits.wake_time(now)
        if self._replan_timer is not None:
            self._replan_timer.cancel()
        self._replan_timer = None if due is None else self._loop.call_at(due + 0.0005, self.replan_now)

    # -- leases --------------------------------------------------------------------------------------------------

    def delivered(self, stream: _Stream, response: pb.LeaseResponse, now: float) -> None:
        """A frame of new leases."""
        wall = time.time()
        live = self._live
        buffer = self._buffer
        lease = self._lease_seconds
        total = self._lease_total_max
        messages_all = bytes_all = 0
        runs: list[LeasedRun] = []
        doubtful: list[LeasedRun] = []
        for one in response.runs:
            messages = one.messages
            count = len(messages)
            if not count:
                continue  # no broker sends it; nothing of it could be settled
            size = messages[0].message.ByteSize() if count == 1 else sum([m.message.ByteSize() for m in messages])
            messages_all += count
            bytes_all += size
            left = one.expire_unix_ms / 1000 - wall
            seconds = lease or max(left, EXTENSION_SECONDS_MIN)
            run = LeasedRun(self, one, count, size, now, min(left, seconds), seconds, total)
            if seconds < self._shortest_lease:
                self._shortest_lease = seconds
            live[run] = None
            if left > 0:
                runs.append(run)
            else:
                doubtful.append(run)
        credits = self.credits
        credits.delivered(stream, messages_all, bytes_all, now)
        if credits.surplus > 0 or self._closed:
            kept = []
            surplus = credits.surplus
            for run in reversed(runs):
                if surplus > 0 or self._closed:
                    surplus -= run.count
                    run.release()
                else:
                    kept.append(run)
            runs = kept[::-1]
        buffer.extend(runs)
        if self._waiters:
            self._wake(len(runs))
        for run in doubtful:
            if self._closed:
                run.release()
            else:
                self._make_sure(run)
        if self._extend_timer is None:
            self._schedule_extend()
        self.replan()

    def _make_sure(self, run: LeasedRun) -> None:
        """A lease that seems to be over came late, or this clock is ahead of the broker's: an extension tells, and only then it is
        handed out."""
        self._doubtful.add(run)
        run.extend_at = float("inf")  # until it is answered
        self.submit(Settlement(run, EXTEND, 0, 0, run.lease_seconds, ""))

    def submit(self, settlement: Settlement) -> None:
        """Sends a settlement. For runs."""
        settlement.at = self._loop.time()
        if self.tracing is not None:
            settlement.span = self.tracing.settling(settlement)
        self._settler.submit(settlement)

    def _finished(self, settlement: Settlement, error: SpillwayError | None) -> None:
        if settlement.span is not None and self.tracing is not None:
            self.tracing.ended(settlement.span, error)
        run = settlement.run
        if error is None:
            if settlement.outcome == EXTEND:
                assert settlement.delay is not None
                now = self._loop.time()
                run.expire_at = max(run.expire_at, settlement.at + settlement.delay)  # the broker counts from then, or later
                run.extend_at = now + (run.expire_at - now) / 2
                if run in self._doubtful:
                    self._doubtful.discard(run)
                    self._buffer.append(run)
                    self._wake(1)
                return
            upto = settlement.upto if settlement.outcome == ACK else run.count
            count = upto - run.credited
            if count > 0:
                if upto == run.count:
                    size = run.bytes
                    self._live.pop(run, None)
                else:
                    size = run.prefix_bytes(upto)
                run.credited = upto
                run.bytes -= size
                self.credits.settled(count, size)
                if not self._replanning:
                    self.replan()
            return
        run.lost()
        if run.credited < run.count:
            self._live.pop(run, None)
            self.credits.settled(run.count - run.credited, run.bytes)
            run.credited, run.bytes = run.count, 0
            self.replan()
        if run in self._doubtful:
            self._doubtful.discard(run)  # nobody has it
        elif not settlement.awaited and not self._closed:
            self._report_stale(run, error)

    def _report_stale(self, run: LeasedRun, error: SpillwayError) -> None:
        if self.on_stale is None:
            log.warning("%r was lost: %s", run, error)
            return
        try:
            self.on_stale(run, error)
        except Exception:
            log.exception("on_stale failed")

    def _schedule_extend(self) -> None:
        tick = min(EXTEND_TICK_SECONDS, self._shortest_lease / 10)
        self._extend_due = self._loop.time() + tick
        self._extend_timer = self._loop.call_at(self._extend_due, self._extend)

    def _extend(self) -> None:
        """Extends the leases that are half over: one timer for all."""
        now = self._loop.time()
        lag = now - self._extend_due
        if lag > self._shortest_lease / 4 and not self._warned_lag:
            self._warned_lag = True
            log.warning("the event loop stood still for %.1f s: leases may expire; keep blocking work off it", lag)
        for run in self._live:
            if run.extend_at <= now and not run.ended:
                if now >= run.given_up_at:
                    run.extend_at = float("inf")
                    log.warning("%r has been held for lease_total_max; it will expire", run)
                    continue
                run.extend_at = float("inf")  # until it is answered; the settler retries
                self.submit(Settlement(run, EXTEND, 0, 0, run.lease_seconds, ""))
        self._extend_timer = None
        if self._live and not self._closed:
            self._schedule_extend()

    # -- the end -------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Stops taking, gives back what is not settled, waits for settlements (at most `close_timeout`)."""
        if self._closed:
            return
        self._closed = True
        self._router.watch.forget(self._topology_changed)
        for timer in (self._replan_timer, self._resubscribe_timer, self._forward_timer):
            if timer is not None:
                timer.cancel()
        self._wake(len(self._waiters))
        streams = [*self._streams.values(), *([self._forwarded] if self._forwarded is not None else [])]
        await asyncio.gather(*(stream.close() for stream in streams), *self._closing_streams, return_exceptions=True)
        if not self.failed:  # those of `_moved` were to subscribe anew
            await asyncio.gather(*(stream.report() for stream in streams if not stream.complete or stream.node in self._moved))
        if self._extend_timer is not None:
            self._extend_timer.cancel()
        self._buffer.clear()
        for run in list(self._live):
            if not run.ended:
                run.release()
        try:
            async with asyncio.timeout(self._close_timeout):
                await self._settler.drained()
        except TimeoutError:
            log.warning("%r closed with %d settlements uncertain", self, self._settler.unfinished)
        finally:
            await self._settler.close()


class _Runs:
    __slots__ = ("_consumer",)

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def __aiter__(self) -> _Runs:
        return self

    async def __anext__(self) -> LeasedRun:
        try:
            return await self._consumer._take()
        except Closed:
            raise StopAsyncIteration from None


class _Messages:
    __slots__ = ("_consumer",)

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> LeasedMessage:
        try:
            message = await self._consumer.next_message()
        except Closed:
            raise StopAsyncIteration from None
        assert message is not None
        return message


def _check(destinations: Sequence[str], name: str, credit_messages: int, credit_bytes: int, run_messages_max: int,
           lease_seconds: float | None) -> None:
    if not 1 <= len(destinations) <= SUBSCRIBE_DESTINATIONS_MAX:
        raise InvalidArgument("destinations", f"there are {len(destinations)}; it must be 1 to {SUBSCRIBE_DESTINATIONS_MAX}")
    for i, destination in enumerate(destinations):
        if not wire.name_bytes(f"destinations[{i}]", destination):
            raise InvalidArgument(f"destinations[{i}]", "it is empty")
    wire.name_bytes("name", name)
    if not 1 <= credit_messages <= CREDIT_MESSAGES_MAX:
        raise InvalidArgument("credit_messages", f"{credit_messages}; it must be 1 to {CREDIT_MESSAGES_MAX}")
    if not 1 <= credit_bytes <= CREDIT_BYTES_MAX:
        raise InvalidArgument("credit_bytes", f"{credit_bytes}; it must be 1 to {CREDIT_BYTES_MAX}")
    if not 0 <= run_messages_max <= RUN_MESSAGES_MAX:
        raise InvalidArgument("run_messages_max", f"{run_messages_max}; it must be 0 to {RUN_MESSAGES_MAX}")
    if lease_seconds is not None and not LEASE_MS_MIN <= lease_seconds * 1000 <= LEASE_MS_MAX:
        raise InvalidArgument("lease_seconds",
                              f"{lease_seconds}; it must be {LEASE_MS_MIN // 1000} to {LEASE_MS_MAX // 1000}")
