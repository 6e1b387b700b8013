"""Spans of sampled messages, on the node that leads their shard: append, wait, lease, settle.

Whether a message is sampled is said by the `traceparent` in its own bytes, which nobody changes; so it is known again after days
and for each attempt, and all spans are children of the one that created the message. Where the setting `trace_sample_ratio`
makes the broker begin traces, shard and sequence say it: the same on every node, without a byte more.

Spans are made when they are over, as plain data, and handed to the exporter's thread. Nothing is remembered but leases of
sampled messages, some hundreds a shard at most, and no more than SPANS_PER_SECOND_MAX spans are made: what comes beyond is counted.
"""
from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from spillway.broker.core import entry as e
from spillway.broker.core.meter import OUTCOMES
from spillway.broker.core.shard import SettleStatus
from spillway.contract.hashing import PART
from spillway.contract.telemetry import names
from spillway.contract.telemetry.context import find, ids_of, sampled
from spillway.contract.telemetry.span_wire import Attribute, named, span

if TYPE_CHECKING:
    from spillway.broker.core.entry import Entry
    from spillway.broker.core.queue import Message, Queue
    from spillway.broker.core.removals import Effects
    from spillway.broker.runtime.calls import Batch

SPANS_PER_SECOND_MAX = 1000  # with the exporter's work they take a few percent of a core
LEASES_MAX = 512  # of a shard, with sampled messages, out at a time
RETURNED_MAX = 8192  # sampled messages that came back and wait again
KNOWN_MAX = 4096  # queues and kinds of span whose attributes are kept encoded
_MS = 1_000_000
_PLAIN = b"\x1a"  # how a message begins that has a payload and nothing else
_SEQUENCE, _BODY_SIZE, _ATTEMPT = Attribute(names.SEQUENCE), Attribute(names.BODY_SIZE), Attribute(names.ATTEMPT)
_DESTINATION, _TENANT, _KEY, _PARTITION = (Attribute(name) for name in (names.DESTINATION, names.TENANT, names.KEY, names.PARTITION))
_SYSTEM, _OPERATION = Attribute(names.SYSTEM).text(names.SYSTEM_NAME), Attribute(names.OPERATION_NAME)
_KINDS = {what: _SYSTEM + _OPERATION.text(what) for what in ("append", "wait", "lease", "settle")}
_OUTCOME = [Attribute(names.OUTCOME).text(outcome) for outcome in OUTCOMES]
_REASON = [Attribute(names.WAIT_REASON).text(outcome) for outcome in OUTCOMES]
_ERROR_TYPE = [Attribute(names.ERROR_TYPE).text(outcome) for outcome in OUTCOMES]
_FAILED = frozenset((e.RETRY, e.THROTTLED, e.DOWN, e.REJECT, e.DISCARD, e.EXPIRED))
_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring sequences get numbers far apart

_Context = tuple[bytes, bytes]  # ids of the trace, and of the span that created the message
_Held = tuple[int, _Context, int]  # sequence, context, attempt
_NONE = b""


class TracedLease:
    """Sampled messages of one lease."""

    __slots__ = ("messages", "queue", "settling_ns", "since_ns")

    def __init__(self, queue: bytes, since_ns: int, messages: list[_Held]) -> None:
        self.queue = queue
        self.since_ns = since_ns
        self.messages = messages
        self.settling_ns = 0  # when the settlement under way came


TracedLeases = dict[int, TracedLease]
"""By token, of one shard, the longest out first."""


class Tracing:
    """Of one node. `emit` takes ended spans, as `span_wire` has them, and must not block."""

    def __init__(self, emit: Callable[[bytes], None], ratio: float = 0.0, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._threshold = int(ratio * (1 << 32))
        self._monotonic = monotonic
        self._returned: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()  # (shard, sequence) -> when (ns), outcome
        self._known: dict[tuple[str, bytes], bytes] = {}
        self.made = self.dropped = 0
        self._room = float(SPANS_PER_SECOND_MAX)
        self._room_at = monotonic()

    def _own(self, shard: int, sequence: int, body: bytes) -> _Context | None:
        """The context of a trace that the broker begins for a message; None: it is not sampled, or came with a context."""
        mixed = (sequence * 1024 + shard) * _MIX & 0xFFFF_FFFF_FFFF_FFFF
        if mixed >> 32 >= self._threshold or (body[:1] != _PLAIN and find(body) is not None):
            return None
        return (mixed << 64 | sequence).to_bytes(16, "big"), (mixed | 1).to_bytes(8, "big")

    # -- what happens to them ------------------------------------------------------------------------------------

    def stored(self, shard: int, batch: Batch, skipped: int, entry_ms: int) -> None:
        """A batch is committed; its call knows which messages are sampled."""
        call = batch.call
        contexts = call.traced
        if not self._threshold and (not contexts or contexts.keys().isdisjoint(batch.positions)):
            return
        now = time.time_ns()
        begin = call.traced_ns or entry_ms * _MS
        contexts = contexts or {}
        for k, position in enumerate(batch.positions):
            traceparent = contexts.get(position)
            if k < skipped or (traceparent is None and not self._threshold):
                continue
            sequence = call.results[position]
            promised = batch.promised.get(k) if batch.promised else None
            name, body = promised if promised is not None else (batch.names[k], batch.bodies[k])
            context = ids_of(traceparent) if traceparent is not None else self._own(shard, sequence, body)
            if context is not None and self._allowed(1):
                self._make("append", context, traceparent is None, name, shard, begin, now,
                           _SEQUENCE.number(sequence) + _BODY_SIZE.number(len(body)))

    def delivered(self, shard: int, leases: TracedLeases, queue: Queue, messages: list[Message]) -> None:
        """A run went to a consumer; `leases` are the shard's with sampled messages."""
        held: list[_Held] | None = None
        threshold = self._threshold
        for i, message in enumerate(messages):
            body = message[3]
            if body[:1] != _PLAIN and (traceparent := sampled(body)) is not None:
                context: _Context | None = ids_of(traceparent)
            elif threshold:
                context = self._own(shard, message[0], body)
            else:
                continue
            if context is not None:
                held = held or []
                held.append((message[0], context, 1 if i else queue.attempts + 1))  # only the head has been tried before
        if held is not None:
            self._leased(shard, leases, queue, messages, held)

    def _leased(self, shard: int, leases: TracedLeases, queue: Queue, messages: list[Message], held: list[_Held]) -> None:
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
            attributes = _SEQUENCE.number(sequence) + _ATTEMPT.number(attempt)
            if reason:
                attributes += _REASON[reason]
            self._make("wait", context, False, queue.key, shard, begin, now, attributes)
        if kept:
            if len(leases) >= LEASES_MAX:
                del leases[next(iter(leases))]
            leases[queue.token] = TracedLease(queue.key, now, kept)

    def applied(self, shard: int, leases: TracedLeases, made: Entry, effects: Effects) -> None:
        """An entry is applied on the leader. Call only while there are any `leases`."""
        for i, settle in enumerate(made.settles):
            if settle[0] not in leases:
                continue
            token, _, sequence, outcome, _, _ = settle
            if effects.settled[i] != SettleStatus.OK or outcome == e.EXTEND:
                continue
            lease = leases[token]
            if outcome == e.ACK:
                while lease.messages and lease.messages[0][0] <= sequence:
                    self._ended(shard, lease, lease.messages.pop(0), e.ACK, True)
                if not lease.messages:
                    del leases[token]
            else:
                del leases[token]
                for one in lease.messages:  # the first of the run that was unsettled failed; those behind it were not tried
                    self._ended(shard, lease, one, outcome if one[0] == sequence or not sequence else e.RELEASE, one[0] == sequence)
        for token, _, outcome in effects.released if leases else ():
            ended = leases.pop(token, None)
            if ended is not None:
                for i, one in enumerate(ended.messages):
                    self._ended(shard, ended, one, e.RELEASE if i else outcome, False)

    def _ended(self, shard: int, lease: TracedLease, one: _Held, outcome: int, settled: bool) -> None:
        sequence, context, attempt = one
        now = time.time_ns()
        attributes = _SEQUENCE.number(sequence) + _ATTEMPT.number(attempt) + _OUTCOME[outcome]
        failed = outcome in _FAILED
        self._make("lease", context, False, lease.queue, shard, lease.since_ns, now,
                   attributes + _ERROR_TYPE[outcome] if failed else attributes, failed)
        if settled:
            self._make("settle", context, False, lease.queue, shard, lease.settling_ns or now, now, attributes)
        if outcome not in (e.ACK, e.REJECT, e.DISCARD):
            if len(self._returned) >= RETURNED_MAX:
                self._returned.popitem(last=False)
            self._returned[shard, sequence] = (now, outcome)

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

    def _make(self, what: str, context: _Context, root: bool, queue: bytes, shard: int, begin: int, end: int, attributes: bytes,
              failed: bool = False) -> None:
        queue = queue.partition(PART)[0]
        known = self._known.get((what, queue))
        if known is None:
            known = self._know(what, queue, shard)
        self.made += 1
        trace_id, created = context
        own = created if root else (random.getrandbits(64) or 1).to_bytes(8, "big")
        self._emit(span(trace_id, own, _NONE if root else created, known + attributes, begin if begin < end else end, end, failed))

    def _know(self, what: str, queue: bytes, shard: int) -> bytes:
        """What all spans of a kind and a queue have."""
        destination, tenant, key = queue.decode().split("\0")
        known = (named(f"{what} {destination}") + _KINDS[what] + _DESTINATION.text(destination) + _TENANT.text(tenant)
                 + _PARTITION.text(str(shard)) + (_KEY.text(key) if key else b""))
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known[what, queue] = known
        return known
