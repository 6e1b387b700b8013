"""One destination's delivery: its own lease stream, its own slots, its own memory.

Order: the messages of a run are sent one after another, each only after the one before it was answered with
success; the lease keeps everybody else off the queue meanwhile. The first message that fails ends the run: what
was delivered is acknowledged, the failed message settled with its outcome, the rest goes back untouched.

A request starts only if the lease outlives its timeout (it is extended in time), so that a message is not sent
again elsewhere while it is still under way here. If the lease is lost all the same, nothing more of it is sent.

Slots: as many requests at a time as the target allows. A run that waits for a slot, or for its settlement, takes
none. Memory: the credit given to the broker bounds what is held, in messages and in bytes.
"""
from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from spillway.client.dispatcher.headers import request_headers, run_headers
from spillway.client.dispatcher.outcome import RELEASED, Action, Outcome, decide
from spillway.client.dispatcher.sender import Answer
from spillway.client.dispatcher.source import Broker, Message, Run, Target
from spillway.client.errors import SpillwayError, StaleLease
from spillway.contract.telemetry.context import TRACEPARENT
from spillway.contract.telemetry.metrics import Histogram
from spillway.contract.telemetry.names import STATUS
from yarl import URL

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext
    from spillway.client.spans import Tracing

log = logging.getLogger("spillway.dispatcher")

RUN_MESSAGES_MAX = 16  # short runs: a failure gives little back, and a tenant with one long queue takes one slot shortly
CREDIT_BYTES = 4 << 20  # of messages held per destination; the broker exceeds it by at most one message
CREDIT_MESSAGES_MAX = 8192
LEASE_SECONDS_MIN = 30.0
LEASE_MARGIN_SECONDS = 5.0  # beyond a request's timeout: for clocks, and for the settlement to arrive
ACK_SECONDS = 0.5  # how much delivered work of a run may at most stand unacknowledged while it goes on
SETTLE_SECONDS_MAX = 5.0  # how long a stopping lane waits for its last settlements
TENANTS_REMEMBERED_MAX = 1024  # throttled tenants
CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"  # a lane's circuit
RESUBSCRIBE_SECONDS = 1.0  # after a subscription ended with an error


class Sends(Protocol):
    """Sends one message; the real one is `Sender`."""

    async def post(self, payload: bytes, headers: dict[str, str]) -> Answer:
        """The receiver's answer, or a kind of failure."""


@dataclass(slots=True)
class Counts:
    """What a lane did since it started."""

    delivered: int = 0
    retried: int = 0
    throttled: int = 0
    down: int = 0
    rejected: int = 0
    spared: int = 0  # runs settled without a request, as the destination was down or the tenant throttled
    released: int = 0  # runs given back while stopping
    lost: int = 0  # runs whose lease ended before they were settled


@dataclass(slots=True)
class _Progress:
    """How far a run got."""

    sent: int = 0  # messages delivered
    acked: int = 0  # of these, acknowledged
    outcome: Outcome | None = None  # of the message after those; None: there is none


class Lane:
    """Delivers one destination until `stop`.

    Its `circuit` is what requests say of the endpoint: closed while it can be reached; open since one found it down
    (the broker has parked the destination then, and lets one message through from time to time); half-open while such
    a message is under way.
    """

    def __init__(self, target: Target, broker: Broker, sender: Sends,
                 wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic,
                 tracing: Tracing | None = None) -> None:
        self.target = target
        self.counts = Counts()
        self.latency = Histogram()  # of requests, whatever came of them, in ms
        self._tracing = tracing
        self.last_failure = ""  # reason of the latest outcome that was no success
        self.last_failure_at: float | None = None  # seconds since 1970
        self.last_status: int | None = None  # of the latest answer
        self.failures_in_a_row = 0  # requests without success since the last that had it
        self._open = False
        self._probes = 0  # requests under way that began while the circuit was open
        self._broker = broker
        self._sender = sender
        self._wall = wall
        self._monotonic = monotonic
        self._slots = asyncio.Semaphore(target.concurrency_max)
        self._lease_seconds = max(LEASE_SECONDS_MIN, target.timeout + 2 * LEASE_MARGIN_SECONDS)
        self._lease_seconds_min = target.timeout + LEASE_MARGIN_SECONDS
        self._runs: dict[asyncio.Task[None], Run] = {}
        self._waiting: set[asyncio.Task[None]] = set()  # for a slot
        self._sending: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._reader: asyncio.Task[None] | None = None
        self._down: tuple[float, Outcome] | None = None  # when the destination was last found down
        self._throttled: dict[str, tuple[float, Outcome]] = {}  # per tenant, likewise

    def __repr__(self) -> str:
        return f"<Lane {self.target.destination!r}: {len(self._runs)} runs held, {self.counts}>"

    @property
    def circuit(self) -> str:
        """CLOSED, OPEN or HALF_OPEN."""
        return CLOSED if not self._open else HALF_OPEN if self._probes else OPEN

    @property
    def in_flight(self) -> int:
        """Runs that have a slot: each has one request under way, or is about to."""
        return len(self._sending)

    def throttled_until(self) -> dict[str, float | None]:
        """The tenants that are throttled, as far as requests showed: until when, in seconds since 1970; None: as the
        broker's backoff has it."""
        now, wall = self._monotonic(), self._wall()
        left = {tenant: outcome.delay and outcome.delay - (now - at) for tenant, (at, outcome) in self._throttled.items()}
        return {tenant: seconds and wall + seconds for tenant, seconds in left.items() if seconds is None or seconds > 0}

    def change(self, target: Target, sender: Sends) -> None:
        """Sends everything from now on to this target with this sender; what is under way goes on with the old one. Its
        timeout and concurrency_max must be as they were: leases and slots depend on them."""
        assert (target.timeout, target.concurrency_max) == (self.target.timeout, self.target.concurrency_max)
        self.target = target
        self._sender = sender
        self._down = None  # what was known was known of the old one
        self._throttled.clear()
        self._open = False

    async def run(self) -> None:
        """Delivers until `stop`; a subscription that ends is made again."""
        self._reader = asyncio.current_task()
        try:
            while not self._stopping:
                try:
                    await self._consume()
                except SpillwayError as e:
                    log.warning("destination=%s subscription ended: %s; trying again", self.target.destination, e)
                if not self._stopping:
                    await asyncio.sleep(RESUBSCRIBE_SECONDS)
        except asyncio.CancelledError:
            if not self._stopping:
                raise

    async def _consume(self) -> None:
        target = self.target
        credit = min(2 * target.concurrency_max * RUN_MESSAGES_MAX, CREDIT_MESSAGES_MAX)
        async with self._broker.consume(target.destination, credit, CREDIT_BYTES, RUN_MESSAGES_MAX,
                                        self._lease_seconds) as runs:
            try:
                async for run in runs:
                    task = asyncio.create_task(self._deliver(run, self._monotonic()))
                    self._runs[task] = run
                    task.add_done_callback(self._delivered)
            finally:
                # Settlements need the consumer: it is left after the last of them.
                await self._finish()

    async def _finish(self) -> None:
        """Waits for the runs that are held. While stopping, `stop` sees to it that this ends."""
        while self._runs:
            try:
                await asyncio.wait(list(self._runs))
            except asyncio.CancelledError:
                if not self._stopping:
                    for task in self._runs:
                        task.cancel()
                    raise

    async def stop(self, grace_seconds: float) -> None:
        """Takes no more, finishes the requests under way within `grace_seconds`, cancels what is left, and gives all
        undelivered messages back. Returns at the latest some seconds after the grace."""
        self._stopping = True
        reader = self._reader
        if reader is None or reader.done():
            return
        reader.cancel()
        for task in self._waiting:
            task.cancel()
        await asyncio.wait([reader], timeout=grace_seconds)
        for task in self._sending:
            task.cancel()
        await asyncio.wait([reader], timeout=SETTLE_SECONDS_MAX)
        for task in self._runs:
            task.cancel()
        await asyncio.wait([reader], timeout=SETTLE_SECONDS_MAX)

    def _delivered(self, task: asyncio.Task[None]) -> None:
        run = self._runs.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The lease ends by itself; the queue goes on then.
            log.error("destination=%s shard=%d token=%d: a run was dropped", run.destination, run.shard,
                      run.fencing_token, exc_info=error)

    # -- one run -------------------------------------------------------------------------------------------------

    async def _deliver(self, run: Run, received: float) -> None:
        progress = _Progress()
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            async with self._slots:
                self._waiting.discard(task)
                progress.outcome = self._known_outcome(run, received)
                if progress.outcome is None:
                    self._sending.add(task)
                    await self._send(run, progress)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            progress.outcome = RELEASED  # whether the receiver has the message under way is unknown: at least once
        except StaleLease:
            self.counts.lost += 1
            return
        except SpillwayError:
            progress.outcome = RELEASED  # no extension to be had: better not to send than to send without a lease
        finally:
            self._waiting.discard(task)
            self._sending.discard(task)
        try:
            await self._settle(run, progress)
        except StaleLease:
            self.counts.lost += 1
        except SpillwayError as e:
            self.counts.lost += 1
            log.warning("destination=%s shard=%d token=%d: settlement failed: %s", run.destination, run.shard,
                        run.fencing_token, e)

    def _known_outcome(self, run: Run, received: float) -> Outcome | None:
        """What is certain without a request: while the run waited for a slot, another one found the destination down
        or its tenant throttled, or the lane is stopping."""
        if self._stopping:
            return RELEASED
        if self._down is None and not self._throttled:
            return None
        for known in (self._down, self._throttled.get(run.tenant)):
            if known is not None and known[0] >= received:
                at, outcome = known
                left = None if outcome.delay is None else outcome.delay - (self._monotonic() - at)
                if left is None or left > 0:
                    self.counts.spared += 1
                    return Outcome(outcome.action, left, outcome.reason)
        return None

    async def _send(self, run: Run, progress: _Progress) -> None:
        """Sends message after message until one fails or all are delivered."""
        messages = run.messages
        shared = run_headers(run)
        gap = run.gap
        acked_at = self._monotonic()
        for message in messages:
            if self._stopping:
                progress.outcome = RELEASED
                return
            if run.seconds_left() < self._lease_seconds_min:
                await run.extend(self._lease_seconds)
            if run.ended:
                raise StaleLease("the lease was lost")
            headers = request_headers(shared, run.shard, message, gap)
            context = None if self._tracing is None else self._tracing.context_of(message.headers)
            if context is None:
                outcome = await self._request(run, message, headers)
            else:
                outcome = await self._traced(run, message, headers, context)
            gap = None
            if outcome.action is not Action.ACK:
                progress.outcome = outcome
                return
            progress.sent += 1
            now = self._monotonic()
            if now - acked_at > ACK_SECONDS and progress.sent < len(messages):
                acked_at = now
                self._ack(run, progress)

    async def _traced(self, run: Run, message: Message, headers: dict[str, str], context: SpanContext) -> Outcome:
        """As `_request`, of a message of a sampled trace: the receiver's spans become children of the request's."""
        assert self._tracing is not None
        processing = self._tracing.process(run, message, context)
        url = URL(self.target.url)
        span = self._tracing.request(url.host or "", url.port, message.attempt)
        headers[TRACEPARENT] = self._tracing.header_of(span)
        error: BaseException | None = None
        why = "cancelled"
        try:
            outcome = await self._request(run, message, headers, span)
            why = "" if outcome.action is Action.ACK else outcome.action.value
            return outcome
        except BaseException as e:
            error = e
            raise
        finally:
            self._tracing.ended(span, error)
            processing.end(None, why)

    async def _request(self, run: Run, message: Message, headers: dict[str, str], span: Span | None = None) -> Outcome:
        sender = self._sender
        begin = self._monotonic()
        probe = self._open
        self._probes += probe
        try:
            status, answered, failure, detail = await sender.post(message.payload, headers)
        finally:
            self._probes -= probe
            self.latency.add(int((self._monotonic() - begin) * 1000))
        outcome = decide(status, answered, failure, self._wall(), detail)
        action = outcome.action
        self._count(outcome, status or None)
        if span is not None and self._tracing is not None:
            if status:
                span.set_attribute(STATUS, status)
            if action is not Action.ACK:
                self._tracing.failed(span, None, str(status) if status else failure.value if failure is not None else action.value)
        if sender is not self._sender:
            return outcome  # it says nothing about the target as it is now
        self._open = action is Action.DOWN
        if action is Action.ACK:
            self._down = None
            if self._throttled:
                self._throttled.pop(run.tenant, None)
        elif action is Action.DOWN:
            self._down = (self._monotonic(), outcome)
        elif action is Action.THROTTLED:
            self._throttled.pop(run.tenant, None)
            if len(self._throttled) >= TENANTS_REMEMBERED_MAX:
                del self._throttled[next(iter(self._throttled))]  # the one throttled longest ago
            self._throttled[run.tenant] = (self._monotonic(), outcome)
        return outcome

    def _count(self, outcome: Outcome, status: int | None) -> None:
        counts, action = self.counts, outcome.action
        if status is not None:
            self.last_status = status
        if action is Action.ACK:
            counts.delivered += 1
            self.failures_in_a_row = 0
            return
        self.failures_in_a_row += 1
        self.last_failure = outcome.reason
        self.last_failure_at = self._wall()
        if action is Action.RETRY:
            counts.retried += 1
        elif action is Action.REJECT:
            counts.rejected += 1
        elif action is Action.DOWN:
            counts.down += 1
        elif action is Action.THROTTLED:
            counts.throttled += 1

    async def _settle(self, run: Run, progress: _Progress) -> None:
        """Acknowledges what was delivered, then settles the message behind it; returns once that is committed."""
        last: Awaitable[None] | None = None
        if progress.sent > progress.acked:
            last = self._ack(run, progress)
        outcome = progress.outcome
        if outcome is not None:
            action = outcome.action
            if action is Action.RETRY:
                last = run.retry(outcome.delay, outcome.reason)
            elif action is Action.THROTTLED:
                last = run.throttled(outcome.delay)
            elif action is Action.DOWN:
                last = run.down(outcome.delay)
            elif action is Action.REJECT:
                last = run.reject(outcome.reason)
            else:
                self.counts.released += 1
                last = run.release()
        if last is not None:
            await last

    def _ack(self, run: Run, progress: _Progress) -> Awaitable[None]:
        progress.acked = progress.sent
        return run.ack(run.messages[progress.sent - 1].sequence)
