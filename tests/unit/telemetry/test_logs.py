"""Logs as JSON."""
from __future__ import annotations

import json
import logging
import sys

from opentelemetry import trace
from spillway.contract.telemetry.context import TraceContext, write
from spillway.contract.telemetry.logs import JsonFormatter


def line(formatter: JsonFormatter, message: str, *arguments: object, error: bool = False) -> dict[str, str]:
    """A record, formatted and read again."""
    record = logging.LogRecord("a.b", logging.WARNING, __file__, 1, message, arguments, sys.exc_info() if error else None)
    text = formatter.format(record)
    assert "\n" not in text
    found: dict[str, str] = json.loads(text)
    return found


def test_a_line_is_an_object() -> None:
    """With a time in UTC, level, logger, message and node; an exception is in the same line."""
    found = line(JsonFormatter("n1"), "x %s\n\"", "y")
    assert found.pop("time").endswith("Z")
    assert found == {"level": "warning", "logger": "a.b", "message": 'x y\n"', "node": "n1"}
    try:
        raise ValueError("no")
    except ValueError:
        assert "ValueError: no" in line(JsonFormatter(), "x", error=True)["exception"]


def test_a_line_within_a_span_tells_its_trace() -> None:
    """The ids of the current span, as traces have them."""
    context = trace.SpanContext(0xABC, 0x12, False, trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        found = line(JsonFormatter(), "x")
    assert f"00-{found['trace_id']}-{found['span_id']}-01" == write(TraceContext(0xABC, 0x12, True))
    assert "trace_id" not in line(JsonFormatter(), "x")
