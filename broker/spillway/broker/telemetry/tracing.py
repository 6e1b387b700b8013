"""Spans of sampled messages, on the node that leads their shard: append, wait, lease, settle.

Whether a message is sampled is said by the `traceparent` in its own bytes, which nobody changes; so it is known again after days
and for each attempt, and all spans are children of the one that created the message. Where the setting `trace_sample_ratio`
makes the broker begin traces, shard and sequence say it: the same on every node, without a byte more.

Spans are made when they are over, as plain data, and handed to the exporter's thread. Nothing is remembered but leases of
sampled messages, some thousands at most, and no more than SPANS_PER_SECOND_MAX spans are made: what comes beyond is counted.
"""
from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode
from spillway.broker.core import entry as e
from spillway.broker.core.shard import SettleStatus
from spillway.broker.telemetry.meters import OUTCOMES
from spillway.contract.hashing import PART
from spillway.contract.telemetry import names
from spillway.contract.telemetry.context import TraceContext, find, sampled
from spillway.contract.telemetry.otlp import SCOPE

if TYPE_CHECKING:
    from spillway.broker.core.entry import Entry
    from spillway.broker.core.queue import Message, Queue
    from spillway.broker.core.removals import Effects
    from spillway.broker.runtime.calls import Batch

SPANS_PER_SECOND_MAX = 1000  # with the exporter's work they take a few percent of a core
LEASES_MAX = 4096  # with sampled messages, out at a time
RETURNED_MAX = 8192  # sampled messages that came back and wait again
_MS = 1_000_000
_PLAIN = b"\x1a"  # how a message begins that has a payload and nothing else
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_OK, _ERROR = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
_FAILED = frozenset((e.RETRY, e.THROTTLED, e.DOWN, e.REJECT, e.DISCARD, e.EXPIRED))
_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring sequences get numbers far apart

_Held = tuple[int, TraceContext, int]  # sequence, context, attempt


class _Lease:
    """Sampled messages of one lease."""

    __slots__ = ("messages", "queue", "settling_ns", "since_ns")

    def __init__(self, queue: bytes, since_ns: int, messages: list[_Held]) -> None:
        self.queue = queue
        self.since_ns = since_ns
        self.messages = messages
        self.settling_ns = 0  # when the settlement under way came


class Tracing:
    """Of one node. `emit` takes ended spans and must not block."""

    def __init__(self, emit: Callable[[ReadableSpan], None], who: Resource, ratio: float = 0.0,
                 monotonic: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._who = who
        self._threshold = int(ratio * (1 << 32))
        self._monotonic = monotonic
        self.leases: OrderedDict[tuple[int, int], _Lease] = OrderedDict()  # (shard, token)
        self._returned: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()  # (shard, sequence) -> when (ns), outcome
        self.made = self.dropped = 0
        self._room = float(SPANS_PER_SECOND_MAX)
        self._room_at = monotonic()

    # -- which messages ------------------------------------------------------------------------------------------


    def _own(self, shard: int, sequence: int, body: bytes) -> TraceContext | None:
        """The context of a trace that the broker begins for a message; None: it is not sampled, or came with a context."""
        mixed = (sequence * 1024 + shard) * _MIX & 0xFFFF_FFFF_FFFF_FFFF
        if mixed >> 32 >= self._threshold or (body[:1] != _PLAIN and find(body) is not None):
            return None
        return TraceContext((mixed << 64 | sequence) or 1, mixed | 1, True)

    # -- what happens to them ------------------------------------------------------------------------------------

    def stored(self, shard: int, batch: Batch, skipped: int, entry_ms: int) -> None:
        """A batch is committed; its call knows which messages are sampled."""
        call = batch.call
        contexts = call.traced
        if not contexts and not self._threshold:
            return
        now = time.time_ns()
        begin = call.traced_ns or entry_ms * _MS
        for k in range(skipped, len(batch.names)):
            position = batch.positions[k]
            context = contexts.get(position) if contexts else None
            parent = context
            sequence = call.results[position]
            promised = batch.promised.get(k) if batch.promised else None
            name, body = promised if promised is not None else (batch.names[k], batch.bodies[k])
            if context is None and self._threshold:
                context = self._own(shard, sequence, body)
            if context is not None and self._allowed(1):
                attributes: dict[str, str | int] = {names.SEQUENCE: sequence, names.BODY_SIZE: len(body)}
                self._make("append", context, parent is None, name, shard, begin, now, attributes)

    def delivered(self, shard: int, queue: Queue, messages: list[Message]) -> None:
        """A run went to a consumer."""
        held: list[_Held] = []
        attempt = queue.attempts + 1
        for sequence, _, _, body, _ in messages:
            context = None if body[:1] == _PLAIN else sampled(body)
            if context is None and self._threshold:
                context = self._own(shard, sequence, body)
            if context is not None:
                held.append((sequence, context, attempt))
            attempt = 1  # only the head has been tried before
        if held:
            self._leased(shard, queue, messages, held)

    def _leased(self, shard: int, queue: Queue, messages: list[Message], held: list[_Held]) -> None:
        now = time.time_ns()
        enqueued = {m[0]: m[1] * _MS for m in messages}
        kept = []
        for one in held:
            sequence, context, attempt = one
            if not self._allowed(3):  # with those of its lease and its settlement
                continue
            kept.append(one)
            begin, reason = self._returned.pop((shard, sequence), (enqueued[sequence], 0))
            if attempt > 1 and not reason:  # another node saw it come back
                begin, reason = max(begin, queue.not_before * _MS), e.RETRY
            attributes: dict[str, str | int] = {names.SEQUENCE: sequence, names.ATTEMPT: attempt}
            if reason:
                attributes[names.WAIT_REASON] = OUTCOMES[reason]
            self._make("wait", context, False, queue.key, shard, begin, now, attributes)
        if kept:
            if len(self.leases) >= LEASES_MAX:
                self.leases.popitem(last=False)
            self.leases[shard, queue.token] = _Lease(queue.key, now, kept)

    def settling(self, shard: int, token: int) -> None:
        """A settlement of a lease came."""
        lease = self.leases.get((shard, token))
        if lease is not None:
            lease.settling_ns = time.time_ns()

    def applied(self, shard: int, made: Entry, effects: Effects) -> None:
        """An entry is applied on the leader. Call only while there are `leases`."""
        leases = self.leases
        for (token, _, sequence, outcome, _, _), status in zip(made.settles, effects.settled, strict=True):
            lease = leases.get((shard, token))
            if lease is None or status != SettleStatus.OK or outcome == e.EXTEND:
                continue
            if outcome == e.ACK:
                while lease.messages and lease.messages[0][0] <= sequence:
                    self._ended(shard, lease, lease.messages.pop(0), e.ACK, True)
                if not lease.messages:
                    del leases[shard, token]
            else:
                del leases[shard, token]
                for one in lease.messages:  # the first of the run that was unsettled failed; those behind it were not tried
                    self._ended(shard, lease, one, outcome if one[0] == sequence or not sequence else e.RELEASE, one[0] == sequence)
        for token, _, outcome in effects.released:
            lease = leases.pop((shard, token), None)
            if lease is not None:
                for i, one in enumerate(lease.messages):
                    self._ended(shard, lease, one, e.RELEASE if i else outcome, False)

    def _ended(self, shard: int, lease: _Lease, one: _Held, outcome: int, settled: bool) -> None:
        sequence, context, attempt = one
        now = time.time_ns()
        attributes: dict[str, str | int] = {names.SEQUENCE: sequence, names.ATTEMPT: attempt, names.OUTCOME: OUTCOMES[outcome]}
        failed = outcome in _FAILED
        if failed:
            attributes[names.ERROR_TYPE] = OUTCOMES[outcome]
        self._make("lease", context, False, lease.queue, shard, lease.since_ns, now, attributes, failed)
        if settled:
            self._make("settle", context, False, lease.queue, shard, lease.settling_ns or now, now,
                       {names.SEQUENCE: sequence, names.ATTEMPT: attempt, names.OUTCOME: OUTCOMES[outcome]})
        if outcome not in (e.ACK, e.REJECT, e.DISCARD):
            if len(self._returned) >= RETURNED_MAX:
                self._returned.popitem(last=False)
            self._returned[shard, sequence] = (now, outcome)

    def resigned(self, shard: int) -> None:
        """This node does not lead a shard any more: another one will see how its leases end."""
        for key in [key for key in self.leases if key[0] == shard]:
            del self.leases[key]

    # -- spans ---------------------------------------------------------------------------------------------------

    def _allowed(self, spans: int) -> bool:
        now = self._monotonic()
        self._room = min(SPANS_PER_SECOND_MAX, self._room + (now - self._room_at) * SPANS_PER_SECOND_MAX)
        self._room_at = now
        if self._room < spans:
            self.dropped += spans
            return False
        self._room -= spans
        return True

    def _make(self, what: str, context: TraceContext, root: bool, queue: bytes, shard: int, begin: int, end: int,
              attributes: dict[str, str | int], failed: bool = False) -> None:
        destination, tenant, key = queue.partition(PART)[0].decode().split("\0")
        attributes |= {names.SYSTEM: names.SYSTEM_NAME, names.OPERATION_NAME: what, names.DESTINATION: destination,
                       names.PARTITION: str(shard), names.TENANT: tenant}
        if key:
            attributes[names.KEY] = key
        parent = SpanContext(context.trace_id, context.span_id, True, _SAMPLED)
        own = SpanContext(context.trace_id, context.span_id if root else random.getrandbits(64) or 1, False, _SAMPLED)
        self.made += 1
        self._emit(ReadableSpan(
            f"{what} {destination}", own, None if root else parent, self._who, attributes, kind=SpanKind.INTERNAL,
            status=_ERROR if failed else _OK, start_time=min(begin, end), end_time=end, instrumentation_scope=SCOPE))
