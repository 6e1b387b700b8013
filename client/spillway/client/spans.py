"""Spans of a producer and a consumer, for a program with a tracer provider. Needs OpenTelemetry (the extra `otel`); see `tracing`.

As the messaging conventions have it: `send` (PRODUCER) for one message, or `create` (PRODUCER) for each of many and `send` (CLIENT)
for all of them; `receive` (CLIENT) when messages are handed out, `process` (CONSUMER) around `async with message`, `ack` and
`nack` (CLIENT) for settlements, linked to the spans that created the messages. The context travels in the message's headers.

Head sampling: where the current span is not sampled, none is opened, and consumers open none for messages that are not sampled. A
message that has a `traceparent` already keeps it.
"""
from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TraceFlags, TraceState
from spillway.client.model import Receipt, Record
from spillway.client.settlements import ACK, EXTEND, Settlement
from spillway.contract.telemetry import names
from spillway.contract.telemetry.context import LENGTH, TRACEPARENT, TRACESTATE, is_sampled, of_headers, state_of_headers
from spillway.contract.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider
    from spillway.client.leases import LeasedMessage, LeasedRun

LINKS_MAX = 128  # what SDKs keep of a span


class Tracing:
    """Makes the spans of a client."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer(names.SCOPE, VERSION, schema_url=names.SCHEMA_URL)

    # -- producing -----------------------------------------------------------------------------------------------

    def sending(self, record: Record) -> Sending:
        """A record that is about to be sent by itself."""
        if record.headers and TRACEPARENT in record.headers:
            return Sending(None, record)
        return self._created("send", record)

    def creating(self, record: Record) -> tuple[Record, SpanContext | None]:
        """One of many records: with a context of its own, which is returned if it is sampled."""
        if record.headers and TRACEPARENT in record.headers:
            return record, None
        sending = self._created("create", record)
        if sending.span is None:
            return sending.record, None
        sending.span.end()
        return sending.record, sending.span.get_span_context()

    def sent_many(self, begin_ns: int, created: list[SpanContext], count: int, error: BaseException | None) -> None:
        """Many records were sent, some of them sampled."""
        span = self._tracer.start_span("send", kind=SpanKind.CLIENT, start_time=begin_ns, links=[Link(c) for c in created[:LINKS_MAX]],
                                       attributes={names.SYSTEM: names.SYSTEM_NAME, names.OPERATION_NAME: "send",
                                                   names.OPERATION_TYPE: "send", names.BATCH_COUNT: count})
        fail(span, error)
        span.end()

    def _created(self, what: str, record: Record) -> Sending:
        current = trace.get_current_span().get_span_context()
        if current.is_valid and not current.trace_flags.sampled:
            return Sending(None, _with_context(record, current))
        attributes: dict[str, str | int] = {
            names.SYSTEM: names.SYSTEM_NAME, names.OPERATION_NAME: what, names.OPERATION_TYPE: what, names.DESTINATION: record.destination,
            names.TENANT: record.tenant, names.BODY_SIZE: len(record.payload)}
        if record.id:
            attributes[names.MESSAGE_ID] = record.id
        span = self._tracer.start_span(f"{what} {record.destination}", kind=SpanKind.PRODUCER, attributes=attributes)
        context = span.get_span_context()
        record = _with_context(record, context) if context.is_valid else record
        return Sending(span if span.is_recording() else None, record)

    # -- consuming -----------------------------------------------------------------------------------------------

    def received(self, run: LeasedRun, name: str, begin_ns: int) -> None:
        """A run is handed to whoever handles it: notes which of its messages are sampled."""
        found: dict[int, SpanContext] = {}
        for i, message in enumerate(run.headers_of_messages()):
            context = remote(message)
            if context is not None:
                found[i] = context
        if not found:
            return
        run.traced = found
        attributes: dict[str, str | int] = {
            names.SYSTEM: names.SYSTEM_NAME, names.OPERATION_NAME: "receive", names.OPERATION_TYPE: "receive",
            names.DESTINATION: run.destination, names.PARTITION: str(run.shard), names.TENANT: run.tenant, names.BATCH_COUNT: run.count}
        if name:
            attributes[names.CLIENT_ID] = name
        messages = run.messages
        links = [Link(context, {names.SEQUENCE: messages[i].sequence, names.ATTEMPT: messages[i].attempt})
                 for i, context in found.items()]
        self._tracer.start_span(f"receive {run.destination}", _parent(list(found.values())), SpanKind.CLIENT, attributes, links[:LINKS_MAX],
                                start_time=begin_ns).end()

    def processing(self, message: LeasedMessage) -> Processing | None:
        """The handling of a message; None: it is not sampled."""
        traced = message.run.traced
        context = traced.get(message.position) if traced else None
        return None if context is None else self.process(message.run, message, context)

    def process(self, run: Any, message: Any, context: SpanContext) -> Processing:
        """The handling of a message of a run, whose span is current from now on."""
        attributes: dict[str, str | int] = {
            names.SYSTEM: names.SYSTEM_NAME, names.OPERATION_NAME: "process", names.OPERATION_TYPE: "process",
            names.DESTINATION: run.destination, names.PARTITION: str(run.shard), names.TENANT: run.tenant,
            names.SEQUENCE: message.sequence, names.ATTEMPT: message.attempt, names.BODY_SIZE: len(message.payload)}
        if message.id:
            attributes[names.MESSAGE_ID] = message.id
        return Processing(self._tracer.start_span(f"process {run.destination}", _parent([context]), SpanKind.CONSUMER, attributes,
                                                  [Link(context)]))

    @staticmethod
    def context_of(headers: Mapping[str, str]) -> SpanContext | None:
        """The context in a message's headers if it is sampled, else None."""
        return remote(headers)

    def request(self, host: str, port: int | None, attempt: int) -> Span:
        """An HTTP request that delivers a message; of the current span."""
        attributes: dict[str, str | int] = {names.METHOD: "POST", names.SERVER_ADDRESS: host, names.ATTEMPT: attempt}
        if port is not None:
            attributes[names.SERVER_PORT] = port
        return self._tracer.start_span("POST", kind=SpanKind.CLIENT, attributes=attributes)

    @staticmethod
    def header_of(span: Span) -> str:
        """The traceparent that makes a receiver's spans children of this one."""
        return _written(span.get_span_context())

    @staticmethod
    def failed(span: Span, error: BaseException | None, kind: str = "") -> None:
        """Notes what went wrong, if something did."""
        fail(span, error, kind)

    @staticmethod
    def ended(span: Span, error: BaseException | None) -> None:
        """Ends a span, with what went wrong."""
        fail(span, error)
        span.end()

    def settling(self, settlement: Settlement) -> Span | None:
        """A settlement is handed in; None: it is of no message that is sampled."""
        run, outcome = settlement.run, settlement.outcome
        traced = run.traced
        if not traced or outcome == EXTEND:
            return None
        told = [i for i in traced if i < settlement.upto and i not in run.told]
        if not told:
            return None
        run.told.update(told)
        what = "ack" if outcome == ACK else "nack"
        attributes: dict[str, str | int] = {
            names.SYSTEM: names.SYSTEM_NAME, names.OPERATION_NAME: what, names.OPERATION_TYPE: "settle",
            names.DESTINATION: run.destination, names.PARTITION: str(run.shard), names.TENANT: run.tenant,
            names.OUTCOME: names.OUTCOMES[outcome]}
        contexts = [traced[i] for i in told]
        messages = run.messages
        links = [Link(traced[i], {names.SEQUENCE: messages[i].sequence, names.ATTEMPT: messages[i].attempt}) for i in told]
        return self._tracer.start_span(f"{what} {run.destination}", _parent(contexts), SpanKind.CLIENT, attributes, links[:LINKS_MAX])


class Sending:
    """A record on its way, as a context manager; `record` is the one to send."""

    __slots__ = ("record", "span")

    def __init__(self, span: Span | None, record: Record) -> None:
        self.span = span
        self.record = record

    def __enter__(self) -> Sending:
        return self

    def stored(self, receipt: Receipt) -> None:
        """Where it is."""
        if self.span is not None:
            self.span.set_attribute(names.PARTITION, str(receipt.shard))
            self.span.set_attribute(names.SEQUENCE, receipt.sequence)

    def concluded(self, future: Any) -> None:
        """The future of its receipt is done."""
        error = None if future.cancelled() else future.exception()
        if error is None and not future.cancelled():
            self.stored(future.result())
        self.__exit__(None, error, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.span is not None:
            fail(self.span, error)
            self.span.end()


class Processing:
    """A message that is being handled. Its span is current until `end`."""

    __slots__ = ("_token", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self._token = otel_context.attach(trace.set_span_in_context(span))

    def end(self, error: BaseException | None = None, kind: str = "") -> None:
        """It was handled; `error` or the name of an error tells why not."""
        otel_context.detach(self._token)
        fail(self.span, error, kind)
        self.span.end()


def remote(headers: Mapping[str, str]) -> SpanContext | None:
    """The context in a message's headers if it is sampled, else None."""
    found = headers.get(TRACEPARENT)
    if found is None or len(found) != LENGTH or not is_sampled(found.encode("latin-1", "replace")):
        return None
    context = of_headers(headers)
    if context is None:
        return None
    state = state_of_headers(headers)
    return SpanContext(context.trace_id, context.span_id, True, TraceFlags(TraceFlags.SAMPLED),
                       TraceState.from_header([state]) if state else None)


def fail(span: Span, error: BaseException | None, kind: str = "") -> None:
    """Notes what went wrong, if something did."""
    if error is not None or kind:
        span.set_attribute(names.ERROR_TYPE, kind or type(error).__name__)
        span.set_status(StatusCode.ERROR)


def _written(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _with_context(record: Record, context: SpanContext) -> Record:
    headers = dict(record.headers) if record.headers else {}
    headers[TRACEPARENT] = _written(context)
    if context.trace_state:
        headers[TRACESTATE] = context.trace_state.to_header()
    return record._replace(headers=headers)


def _parent(contexts: list[SpanContext]) -> Any:
    """The span to be a child of: the current one, or, of a single message, the one that created it; of several there is none."""
    current = otel_context.get_current()
    if trace.get_current_span(current).get_span_context().is_valid or len(contexts) != 1:
        return current
    return trace.set_span_in_context(trace.NonRecordingSpan(contexts[0]), current)

