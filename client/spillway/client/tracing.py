"""Whether a client traces. What it does then is in `spans`, which loads OpenTelemetry: only where there is something to trace to."""
from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from spillway.client.spans import Tracing


def tracing(provider: TracerProvider | None = None) -> Tracing | None:
    """Traces to a provider, or to the one that is configured for the process; None: there is none. Nobody has configured one in a process
    that has not loaded OpenTelemetry."""
    if provider is None:
        trace = sys.modules.get("opentelemetry.trace")
        if trace is None:
            return None
        provider = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
            return None
    assert provider is not None
    from spillway.client.spans import Tracing

    return Tracing(provider)
