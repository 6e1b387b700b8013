"""What the client does about traces without a broker: whether it traces at all, and what it puts into headers."""
from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from spillway.client import Record
from spillway.client.spans import Tracing, remote
from spillway.client.tracing import tracing


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """Where spans go."""
    return InMemorySpanExporter()


@pytest.fixture
def traced(exporter: InMemorySpanExporter) -> Tracing:
    """A client's tracing."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    made = tracing(provider)
    assert made is not None
    return made


def test_without_a_provider_there_is_nothing() -> None:
    """No provider is configured: no tracing."""
    assert tracing() is None


def test_without_opentelemetry_there_is_nothing() -> None:
    """Clients are made where OpenTelemetry is not installed."""
    code = ("import sys; sys.modules['opentelemetry'] = None\n"
            "import spillway.client, spillway.client.sync, spillway.client.tracing as t\n"
            "spillway.client.Client(); spillway.client.sync.Client(); assert t.tracing() is None")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_opentelemetry_is_not_loaded_for_nothing() -> None:
    """It takes longer than the rest of the client."""
    code = ("import sys, spillway.client, spillway.client.sync, spillway.client.cli\n"
            "spillway.client.Client()\n"
            "assert not [m for m in sys.modules if m.startswith('opentelemetry')]")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_what_is_in_the_headers_already_stays(traced: Tracing, exporter: InMemorySpanExporter) -> None:
    """Another program's context is its own affair."""
    record = Record("d", b"x", headers={"traceparent": "theirs"})
    with traced.sending(record) as sending:
        assert sending.record is record
    assert traced.creating(record) == (record, None)
    assert not exporter.get_finished_spans()


def test_a_trace_that_is_not_sampled_costs_a_header(traced: Tracing, exporter: InMemorySpanExporter) -> None:
    """Whoever gets the message knows that it is not; vendors' state goes along."""
    context = trace.SpanContext(1, 2, False, trace.TraceFlags(0), trace.TraceState([("v", "1")]))
    with trace.use_span(trace.NonRecordingSpan(context)), traced.sending(Record("d", b"x", headers={"a": "b"})) as sending:
        assert sending.span is None
        assert sending.record.headers == {"a": "b", "traceparent": f"00-{1:032x}-{2:016x}-00", "tracestate": "v=1"}
    assert not exporter.get_finished_spans() and remote(sending.record.headers) is None


def test_a_sampler_that_says_no_is_heard(exporter: InMemorySpanExporter) -> None:
    """Without a current span the provider's sampler decides, and what it says travels."""
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    made = tracing(provider)
    assert made is not None
    record, context = made.creating(Record("d", b"x"))
    assert context is None and record.headers is not None and "traceparent" in record.headers and remote(record.headers) is None
    assert not exporter.get_finished_spans()


def test_a_failed_send_says_why(traced: Tracing, exporter: InMemorySpanExporter) -> None:
    """The kind of error is an attribute, as conventions have it."""
    with pytest.raises(ValueError), traced.sending(Record("d", b"x", "t")) as sending:
        assert remote(sending.record.headers or {}) is not None
        raise ValueError("no")
    [span] = exporter.get_finished_spans()
    assert span.name == "send d" and span.attributes is not None and span.attributes["error.type"] == "ValueError"
    assert span.status.status_code is trace.StatusCode.ERROR
