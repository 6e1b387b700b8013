"""Logs: lines for people, or one JSON object a line for machines, with the trace that a line belongs to."""
from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from types import ModuleType
from typing import TextIO

FORMATS = ("text", "json")
TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; node if there is one; trace_id and span_id where a span is current; exception."""

    def __init__(self, node: str = "") -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        out: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if self._node:
            out["node"] = self._node
        out.update(_current())
        if record.exc_info:
            out["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            out["stack"] = self.formatStack(record.stack_info)
        return json.dumps(out, ensure_ascii=False)


def _current() -> dict[str, str]:
    trace: ModuleType | None = sys.modules.get("opentelemetry.trace")  # not loaded: there is no span
    if trace is None:
        return {}
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def configure(level: str, kind: str = "text", node: str = "", stream: TextIO | None = None, text: str = TEXT_FORMAT) -> None:
    """Sends the process's log to a stream (standard error) in one of FORMATS."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(node) if kind == "json" else logging.Formatter(text))
    logging.basicConfig(level=level.upper(), handlers=[handler])
