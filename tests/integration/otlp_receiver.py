"""A collector: takes OTLP over HTTP, decodes the protobuf, and keeps what came."""
from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest, ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

SECONDS_MAX = 60.0  # for what must happen; a test that reaches it fails


class Span:
    """A span as it came."""

    def __init__(self, service: str, span: Any) -> None:
        self.service = service
        self.name: str = span.name
        self.kind = int(span.kind)
        self.trace = span.trace_id.hex()
        self.id = span.span_id.hex()
        self.parent = span.parent_span_id.hex()
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]
        self.attributes = _attributes(span.attributes)
        self.failed = span.status.code == 2
        self.begin, self.end = span.start_time_unix_nano, span.end_time_unix_nano

    def __repr__(self) -> str:
        return f"<{self.service}: {self.name} {self.id} of {self.parent or 'nobody'} {self.attributes}>"


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class Receiver:
    """Use `start` and `stop`; `endpoint` is the setting."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.metrics: dict[str, Any] = {}  # name -> the last that came
        self._came = asyncio.Event()
        application = web.Application(client_max_size=64 << 20)
        application.router.add_post("/v1/traces", self._traces)
        application.router.add_post("/v1/metrics", self._metrics)
        self._server = TestServer(application)

    async def start(self) -> None:
        await self._server.start_server()

    async def stop(self) -> None:
        await self._server.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    async def _traces(self, request: web.Request) -> web.Response:
        for resource in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            service = _attributes(resource.resource.attributes)["service.name"]
            self.spans += [Span(service, span) for scope in resource.scope_spans for span in scope.spans]
        self._came.set()
        return web.Response(body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf")

    async def _metrics(self, request: web.Request) -> web.Response:
        for resource in ExportMetricsServiceRequest.FromString(await request.read()).resource_metrics:
            self.metrics.update((m.name, m) for scope in resource.scope_metrics for m in scope.metrics)
        self._came.set()
        return web.Response(body=ExportMetricsServiceResponse().SerializeToString(), content_type="application/x-protobuf")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what must come."""
        try:
            async with asyncio.timeout(SECONDS_MAX):
                while not condition():
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise AssertionError(f"it did not come; there are {self.spans}") from None

    def of(self, trace: str, name: str = "") -> list[Span]:
        """The spans of a trace, by their begin; those of a name, or all."""
        return sorted((s for s in self.spans if s.trace == trace and s.name.startswith(name)), key=lambda s: s.begin)
