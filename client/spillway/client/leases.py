"""What a consumer gets: runs of messages under a lease, as light views of what came over the wire.

`LeasedRun` is the fast path: settle all of it, or a prefix, at once. `LeasedMessage` is one message of a run; its
outcome goes out when those of the messages before it have, so that messages of a run may be handled in any order.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spillway.client.errors import InternalError, StaleLease
from spillway.client.model import Gap
from spillway.client.outcomes import Down, Outcome, Reject, Release, Retry, Throttled
from spillway.client.settlements import ACK, DOWN, EXTEND, REJECT, RELEASE, RETRY, THROTTLED, Settlement
from spillway.v1 import queue_service_pb2 as pb

if TYPE_CHECKING:
    from spillway.client.consumer import Consumer
    from spillway.client.spans import Tracing

log = logging.getLogger("spillway.client")
_NOTHING: set[int] = set()  # of all runs without tracing; never changed


class LeasedRun:
    """An exclusive, expiring right to consecutive messages of one queue.

    Every settling method hands the settlement in at once and returns it; await that to know that it is committed
    (StaleLease: the lease was lost, nothing changed), or do not, and it is committed in the background. All but `ack`
    and `extend` end the lease: the rest of the run goes back to the head of its queue. The lease is extended by the
    consumer until the run is settled.
    """

    __slots__ = ("_consumer", "_later", "_messages", "_pb", "bytes", "count", "credited", "ended", "expire_at",
                 "extend_at", "fencing_token", "given_up_at", "lease_seconds", "settled", "shard", "told", "traced", "unsure")

    def __init__(self, consumer: Consumer, run: pb.LeasedRun, count: int, bytes: int, now: float, seconds_left: float,
                 lease_seconds: float, total_seconds: float) -> None:
        self._consumer = consumer
        self._pb = run
        self._messages: Sequence[LeasedMessage] | None = None
        self._later: dict[int, Settlement] | None = None  # position -> outcome that waits for those before it
        self.shard = run.shard
        self.fencing_token = run.fencing_token
        self.count = count
        self.bytes = bytes  # credit that it uses, of the messages not yet credited
        self.settled = 0  # how many messages have a settlement, sent or not
        self.credited = 0  # how many gave their credit back
        self.ended = False  # nothing more can be settled
        self.unsure = 0  # settlements sent whose outcome is not certain
        self.lease_seconds = lease_seconds  # of an extension
        self.expire_at = now + seconds_left  # by the loop's clock
        self.extend_at = now + seconds_left / 2
        self.given_up_at = now + total_seconds
        self.traced: dict[int, Any] | None = None  # by position: contexts of sampled messages; set when it is handed out
        self.told: set[int] = set() if consumer.tracing is not None else _NOTHING  # of these, those with a settlement

    def __repr__(self) -> str:
        return (f"<LeasedRun {self.destination!r} {self.tenant!r} {self.key!r} shard {self.shard} "
                f"lease {self.fencing_token}: {self.settled}/{self.count} settled{', ended' if self.ended else ''}>")

    def __len__(self) -> int:
        return self.count

    @property
    def tracing(self) -> Tracing | None:
        """Who makes spans; None: nobody."""
        return self._consumer.tracing

    @property
    def destination(self) -> str:
        """The queue's destination."""
        return self._pb.destination

    @property
    def tenant(self) -> str:
        """The queue's tenant."""
        return self._pb.tenant

    @property
    def key(self) -> str:
        """The queue's key."""
        return self._pb.key

    @property
    def gap(self) -> Gap | None:
        """Messages before this run that went to the dead letters since the last delivery."""
        if not self._pb.HasField("gap"):
            return None
        gap = self._pb.gap
        return Gap(gap.count, gap.first_sequence, gap.last_sequence)

    @property
    def messages(self) -> Sequence[LeasedMessage]:
        """The messages, oldest first."""
        messages = self._messages
        if messages is None:
            messages = self._messages = [LeasedMessage(self, i, m) for i, m in enumerate(self._pb.messages)]
        return messages

    @property
    def payloads(self) -> list[bytes]:
        """The payloads alone, oldest first: for handlers that need nothing else."""
        return [m.message.payload for m in self._pb.messages]

    def headers_of_messages(self) -> list[Mapping[str, str]]:
        """The headers alone, oldest first: for tracing."""
        return [m.message.headers for m in self._pb.messages]

    def seconds_left(self) -> float:
        """Seconds until the lease ends by this client's clock, extensions included; negative if it has ended."""
        return self.expire_at - self._consumer.time()

    # -- settling ------------------------------------------------------------------------------------------------

    def ack(self, upto: int | LeasedMessage | None = None) -> Settlement:
        """Done: all messages, or those up to and including `upto` (a message, or its sequence)."""
        if self.ended:
            return self._stale()
        if upto is None:
            position = self.count - 1
            sequence = self._pb.messages[position].sequence
        elif isinstance(upto, LeasedMessage):
            position, sequence = upto.position, upto.sequence
        else:
            sequence = upto
            position = self._position(upto)
        if position >= self.settled:
            self.settled = position + 1
        if self.settled == self.count:
            self.ended = True
        settlement = Settlement(self, ACK, position + 1, sequence, None, "")
        self._consumer.submit(settlement)
        return settlement

    def retry(self, delay: float | None = None, reason: str = "") -> Settlement:
        """The first unsettled message failed: counts an attempt, delivered again after `delay` seconds (None: the
        destination's backoff)."""
        return self._end(RETRY, delay, reason)

    def throttled(self, delay: float | None = None) -> Settlement:
        """The destination asked this tenant to slow down: no attempt counted, the tenant is parked for `delay`."""
        return self._end(THROTTLED, delay, "")

    def down(self, delay: float | None = None) -> Settlement:
        """The destination is down: no attempt counted, the destination is parked for `delay`."""
        return self._end(DOWN, delay, "")

    def reject(self, reason: str = "") -> Settlement:
        """The first unsettled message can never be delivered: to the dead letters, now."""
        return self._end(REJECT, None, reason)

    def release(self) -> Settlement:
        """Gives back what is unsettled: no attempt counted, ready at once."""
        return self._end(RELEASE, None, "")

    def extend(self, seconds: float | None = None) -> Settlement:
        """The lease shall last `seconds` from now (None: its usual duration)."""
        if self.ended:
            return self._stale()
        settlement = Settlement(self, EXTEND, 0, 0, self.lease_seconds if seconds is None else seconds, "")
        self._consumer.submit(settlement)
        return settlement

    def _end(self, outcome: int, delay: float | None, reason: str) -> Settlement:
        if self.ended:
            return self._stale()
        self.ended = True
        settlement = Settlement(self, outcome, self.count, self._pb.messages[self.settled].sequence, delay, reason)
        self._consumer.submit(settlement)
        if self._later:
            self._drop_later()
        return settlement

    def _position(self, sequence: int) -> int:
        for i, message in enumerate(self._pb.messages):
            if message.sequence == sequence:
                return i
        raise ValueError(f"message {sequence} is not of {self!r}")

    def _stale(self) -> Settlement:
        settlement = Settlement(self, RELEASE, 0, 0, None, "")
        settlement.finish(StaleLease(f"{self!r} is over"))
        return settlement

    # -- outcomes of single messages -----------------------------------------------------------------------------

    def settle_message(self, position: int, outcome: int, delay: float | None, reason: str) -> Settlement:
        """The outcome of one message. It goes out once the messages before it are settled; if one of those ends the
        lease, it comes to nothing (StaleLease), and the message is delivered again."""
        if self.ended or position < self.settled or (self._later and position in self._later):
            return self._stale()
        settlement = Settlement(self, outcome, position + 1 if outcome == ACK else self.count,
                                self._pb.messages[position].sequence, delay, reason)
        if position == self.settled:
            self._go(settlement, position)
            later = self._later
            while later and not self.ended and self.settled in later:
                self._go(later.pop(self.settled), self.settled)
        else:
            if self._later is None:
                self._later = {}
            self._later[position] = settlement
        return settlement

    def _go(self, settlement: Settlement, position: int) -> None:
        if settlement.outcome == ACK:
            self.settled = position + 1
            self.ended = self.settled == self.count
        else:
            self.ended = True
        self._consumer.submit(settlement)
        if self.ended and self._later:
            self._later.pop(position, None)
            self._drop_later()

    def _drop_later(self) -> None:
        later, self._later = self._later, None
        for settlement in (later or {}).values():
            settlement.finish(StaleLease(f"an earlier message ended the lease of {self!r}"))

    def prefix_bytes(self, upto: int) -> int:
        """Credit that the messages up to `upto` use and have not given back. For the consumer."""
        return sum([self._pb.messages[i].message.ByteSize() for i in range(self.credited, upto)])

    def lost(self) -> None:
        """The lease turned out to be over. For the consumer."""
        self.ended = True
        self._drop_later()


class LeasedMessage:
    """One message under a lease. `async with message:` settles it by how the block ends: ack if it succeeds; by the
    outcome raised (`Retry`, `Throttled`, `Down`, `Reject`, `Release`); retry with the exception's text, which is logged,
    if it raises anything else; release if it is cancelled. No exception but cancellation and the like leaves the block.
    A message settled inside the block is left as it is. The settlement is committed in the background."""

    __slots__ = ("_pb", "position", "processing", "run")

    def __init__(self, run: LeasedRun, position: int, message: pb.LeasedMessage) -> None:
        self.run = run
        self.position = position  # in the run
        self._pb = message
        self.processing: Any = None  # its span, while it is handled

    def __repr__(self) -> str:
        return f"<LeasedMessage {self.sequence} of {self.run!r}>"

    @property
    def destination(self) -> str:
        """The queue's destination."""
        return self.run.destination

    @property
    def tenant(self) -> str:
        """The queue's tenant."""
        return self.run.tenant

    @property
    def key(self) -> str:
        """The queue's key."""
        return self.run.key

    @property
    def shard(self) -> int:
        """The queue's shard."""
        return self.run.shard

    @property
    def fencing_token(self) -> int:
        """Names the lease; only grows per queue. Pass it on to receivers that can refuse stale duplicates."""
        return self.run.fencing_token

    @property
    def sequence(self) -> int:
        """Its place in the shard; with the shard it names the message."""
        return self._pb.sequence

    @property
    def attempt(self) -> int:
        """1 for the first delivery."""
        return self._pb.attempt

    @property
    def enqueue_time(self) -> datetime:
        """When the broker accepted it. Raises InternalError for what is no time."""
        try:
            return datetime.fromtimestamp(self._pb.enqueue_unix_ms / 1000, UTC)
        except (ValueError, OverflowError, OSError):
            raise InternalError(f"the broker sent {self._pb.enqueue_unix_ms} ms since 1970, which is no time") from None

    @property
    def enqueue_unix_ms(self) -> int:
        """The same in milliseconds since 1970."""
        return self._pb.enqueue_unix_ms

    @property
    def id(self) -> str:
        """The producer's own id of the event; may be empty."""
        return self._pb.message.id

    @property
    def headers(self) -> Mapping[str, str]:
        """As produced."""
        return self._pb.message.headers

    @property
    def payload(self) -> bytes:
        """As produced."""
        return self._pb.message.payload

    @property
    def gap(self) -> Gap | None:
        """Messages right before this one that went to the dead letters."""
        return self.run.gap if not self.position else None

    @property
    def settled(self) -> bool:
        """Whether an outcome was chosen, or the lease ended."""
        run = self.run
        return run.ended or self.position < run.settled or bool(run._later and self.position in run._later)

    def ack(self) -> Settlement:
        """Done: never delivered again."""
        return self.run.settle_message(self.position, ACK, None, "")

    def retry(self, delay: float | None = None, reason: str = "") -> Settlement:
        """It failed; see `LeasedRun.retry`. The rest of its run is delivered again after it."""
        return self.run.settle_message(self.position, RETRY, delay, reason)

    def throttled(self, delay: float | None = None) -> Settlement:
        """See `LeasedRun.throttled`."""
        return self.run.settle_message(self.position, THROTTLED, delay, "")

    def down(self, delay: float | None = None) -> Settlement:
        """See `LeasedRun.down`."""
        return self.run.settle_message(self.position, DOWN, delay, "")

    def reject(self, reason: str = "") -> Settlement:
        """See `LeasedRun.reject`."""
        return self.run.settle_message(self.position, REJECT, None, reason)

    def release(self) -> Settlement:
        """See `LeasedRun.release`."""
        return self.run.settle_message(self.position, RELEASE, None, "")

    def extend(self, seconds: float | None = None) -> Settlement:
        """See `LeasedRun.extend`."""
        return self.run.extend(seconds)

    def begin(self) -> None:
        """Its handling begins: with tracing, its span is the current one until `conclude`. `async with` does this."""
        tracing = self.run.tracing
        if tracing is not None:
            self.processing = tracing.processing(self)

    async def __aenter__(self) -> LeasedMessage:
        self.begin()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> bool:
        return self.conclude(error)

    def conclude(self, error: BaseException | None) -> bool:
        """Settles it by how its handler ended; returns whether the exception is dealt with."""
        processing, self.processing = self.processing, None
        try:
            return self.settle_by(error)
        finally:
            if processing is not None:
                processing.end(error)

    def settle_by(self, error: BaseException | None) -> bool:
        """The settlement alone: whoever began a span ends it, in the thread where it began."""
        if self.settled:
            if self.run.ended and error is None:
                return True
        elif error is None:
            self.ack()
        elif isinstance(error, Outcome):
            match error:
                case Throttled():
                    self.throttled(error.delay)
                case Down():
                    self.down(error.delay)
                case Reject():
                    self.reject(error.reason)
                case Release():
                    self.release()
                case Retry() | _:
                    self.retry(error.delay, error.reason)
        elif isinstance(error, Exception):
            self.retry(None, f"{type(error).__name__}: {error}")
        else:
            self.release()
        if isinstance(error, Exception) and not isinstance(error, Outcome):
            log.error("handling %r failed; it will be delivered again", self, exc_info=error)
        return error is None or isinstance(error, Exception)
