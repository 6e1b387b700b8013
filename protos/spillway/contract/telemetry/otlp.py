"""How metrics and spans leave a process: OTLP over HTTP, by OpenTelemetry's own exporters, in threads of their own.

Nothing waits for a collector. What cannot be sent is dropped, queues are bounded, and a stop waits SHUTDOWN_SECONDS and not for a
collector that hangs (the exporters' own shutdown may take a minute). Headers, certificates and compression come from the usual
variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE, ...). Import this only where an endpoint is set: it loads
OpenTelemetry's SDK.
"""
from __future__ import annotations

import asyncio
import gzip
import http.client
import logging
import os
import queue
import ssl
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import unquote

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from spillway.contract.telemetry import names, span_wire
from spillway.contract.telemetry.metrics import COUNTER, Family, Histogram, Metric, Sample
from spillway.contract.version import VERSION

PUSH_SECONDS = 15.0
EXPORT_SECONDS = 5.0  # for one request
SHUTDOWN_SECONDS = 2.0
SPANS_WAITING_MAX = 4096
SPANS_DELAY_MS = 1000
SPANS_PER_REQUEST = 64  # of the SDK: encoding more in a row would hold the interpreter for milliseconds
SPANS_IN_ONE_MAX = 2048  # of those that are encoded already, some hundred bytes each
ANSWER_BYTES_MAX = 64 << 10
SCOPE = InstrumentationScope(names.SCOPE, VERSION, names.SCHEMA_URL)

logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # a collector that is away is not worth a line each second


def resource(service: str, instance: str, **attributes: str) -> Resource:
    """Who sends."""
    return Resource.create({"service.name": service, "service.version": VERSION, "service.instance.id": instance, **attributes})


def url(endpoint: str, signal: str) -> str:
    """Where a signal goes, below the setting's http://host:port."""
    return f"{endpoint.rstrip('/')}/v1/{signal}"


def span_processor(endpoint: str) -> BatchSpanProcessor:
    """Takes ended spans, and sends them from a thread of its own."""
    exporter = OTLPSpanExporter(url(endpoint, "traces"), timeout=EXPORT_SECONDS)
    return BatchSpanProcessor(exporter, SPANS_WAITING_MAX, SPANS_DELAY_MS, SPANS_PER_REQUEST)


def tracer_provider(endpoint: str, who: Resource) -> TracerProvider:
    """For a program that handles others' messages: it goes on with traces that are sampled, and begins none."""
    provider = TracerProvider(ParentBased(ALWAYS_OFF), who, shutdown_on_exit=False)
    provider.add_span_processor(span_processor(endpoint))
    return provider


async def within(seconds: float, stop: Callable[[], object]) -> bool:
    """Calls what may take long in a thread that nobody waits for after so many seconds; whether it was done by then."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def call() -> None:
        stop()
        try:
            loop.call_soon_threadsafe(done.set)
        except RuntimeError:
            pass  # the loop is closed: nobody waited

    threading.Thread(target=call, name="otlp stop", daemon=True).start()
    try:
        async with asyncio.timeout(seconds):
            await done.wait()
    except TimeoutError:
        return False
    return True


class SpanSender:
    """Takes spans as `span_wire` writes them, and sends them once a second from a thread of its own."""

    def __init__(self, endpoint: str, who: Resource) -> None:
        attributes = {key: str(value) for key, value in who.attributes.items()}
        self._around = span_wire.envelope(attributes, names.SCOPE, VERSION, names.SCHEMA_URL)
        self._url = url(endpoint, "traces")
        self._headers = {"Content-Type": "application/x-protobuf", "User-Agent": f"spillway/{VERSION}", **_headers()}
        self._gzip = os.environ.get("OTEL_EXPORTER_OTLP_COMPRESSION") == "gzip"
        if self._gzip:
            self._headers["Content-Encoding"] = "gzip"
        self._context = None
        if endpoint.startswith("https:"):
            self._context = ssl.create_default_context(cafile=os.environ.get("OTEL_EXPORTER_OTLP_CERTIFICATE"))
        self._waiting: deque[bytes] = deque()
        self._stopping = threading.Event()
        self.lost = 0
        """Spans that could not be sent, or that came while too many waited."""
        self._thread = threading.Thread(target=self._run, name="otlp spans", daemon=True)
        self._thread.start()

    def take(self, span: bytes) -> None:
        """One more. Never blocks."""
        if len(self._waiting) < SPANS_WAITING_MAX:
            self._waiting.append(span)
        else:
            self.lost += 1

    def stop(self) -> None:
        """Sends what waits. May take EXPORT_SECONDS for each request; see `within`."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stopping.wait(SPANS_DELAY_MS / 1000)
            while waiting := self._waiting:
                spans = [waiting.popleft() for _ in range(min(len(waiting), SPANS_IN_ONE_MAX))]
                try:
                    self._send(span_wire.request(self._around, spans))
                except (OSError, http.client.HTTPException):
                    self.lost += len(spans)

    def _send(self, body: bytes) -> None:
        if self._gzip:
            body = gzip.compress(body, 1)
        asked = urllib.request.Request(self._url, body, self._headers)  # noqa: S310 (the setting allows http and https only)
        with urllib.request.urlopen(asked, timeout=EXPORT_SECONDS, context=self._context) as answer:  # noqa: S310
            answer.read(ANSWER_BYTES_MAX)


def _headers() -> dict[str, str]:
    """What the usual variable adds to each request."""
    pairs = (part.partition("=") for part in os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "").split(",") if "=" in part)
    return {unquote(name.strip()): unquote(value.strip()) for name, _, value in pairs}


class MetricsPush:
    """Sends what `collect` gives, every PUSH_SECONDS and once more at the end."""

    def __init__(self, endpoint: str, who: Resource, collect: Callable[[], Awaitable[list[Family]]]) -> None:
        self._who = who
        self._collect = collect
        self._exporter = OTLPMetricExporter(url(endpoint, "metrics"), timeout=EXPORT_SECONDS)
        self._waiting: queue.Queue[sdk.MetricsData | None] = queue.Queue(1)
        self._started_ns = time.time_ns()
        self._thread = threading.Thread(target=self._send, name="otlp metrics", daemon=True)
        self._thread.start()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(PUSH_SECONDS)
            await self.push()

    async def push(self) -> None:
        """Hands one collection over. If the one before has not left yet, this one is not sent: counters lose nothing."""
        data = metrics_data(await self._collect(), self._who, self._started_ns, time.time_ns())
        try:
            self._waiting.put_nowait(data)
        except queue.Full:
            pass

    async def stop(self) -> None:
        """A last push, for SHUTDOWN_SECONDS at most."""
        await self.push()
        await within(SHUTDOWN_SECONDS, self._end)

    def _end(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _send(self) -> None:
        while (data := self._waiting.get()) is not None:
            self._exporter.export(data, timeout_millis=EXPORT_SECONDS * 1000)


def metrics_data(families: Iterable[Family], who: Resource, started_ns: int, now_ns: int) -> sdk.MetricsData:
    """The families as OpenTelemetry has them: cumulative since the start."""
    metrics = [sdk.Metric(_name(f.metric), f.metric.help, f.metric.unit, _points(f.metric, f.samples, started_ns, now_ns))
               for f in families if f.samples]
    return sdk.MetricsData([sdk.ResourceMetrics(who, [sdk.ScopeMetrics(SCOPE, metrics, names.SCHEMA_URL)], names.SCHEMA_URL)])


def _name(metric: Metric) -> str:
    """Without `_total`, which a Prometheus behind a collector adds again; its unit is in the name already."""
    return metric.name.removesuffix("_total")


def _points(metric: Metric, samples: list[Sample], started_ns: int, now_ns: int) -> sdk.Sum | sdk.Gauge | sdk.Histogram:
    cumulative = sdk.AggregationTemporality.CUMULATIVE
    numbers, histograms = [], []
    for labels, value in samples:
        attributes = dict(zip(metric.labels, labels, strict=True))
        if isinstance(value, Histogram):
            counts = value.buckets(metric.powers)
            total = value.total / metric.per_second
            histograms.append(sdk.HistogramDataPoint(attributes, started_ns, now_ns, sum(counts), total, counts, metric.bounds,
                                                     float("inf"), float("-inf")))
        else:
            numbers.append(sdk.NumberDataPoint(attributes, started_ns, now_ns, value))
    if histograms:
        return sdk.Histogram(histograms, cumulative)
    return sdk.Sum(numbers, cumulative, True) if metric.kind == COUNTER else sdk.Gauge(numbers)
