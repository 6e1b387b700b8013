"""Spans as OTLP has them, written by hand: opentelemetry.proto.trace.v1.Span and what is around it.

A span object of OpenTelemetry's SDK and its encoding cost thirty times as much, and the exporter's thread takes that time from the
event loop. The layout must follow trace.proto; a test reads every shape with the generated code.
"""
from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from spillway.contract.varint import varint

INTERNAL = 1  # Span.kind
_TIMES = struct.Struct("<BQBQ")  # start_time_unix_nano = 7, end_time_unix_nano = 8
_times = _TIMES.pack
_ROOT, _CHILD = struct.pack("<BBI", 0x85, 0x01, 0x101), struct.pack("<BBI", 0x85, 0x01, 0x301)  # flags = 16; sampled, parent elsewhere
_ERROR = b"\x7a\x02\x18\x02"  # status = 15 { code = 3: ERROR }


_VARINTS = [varint(i) for i in range(0x1000)]


def _sized(tag: bytes, data: bytes) -> bytes:
    size = len(data)
    return tag + (_VARINTS[size] if size < 0x1000 else varint(size)) + data


class Attribute:
    """One key, encoded once. Calling it gives `attributes` of a Resource or, with tag 9, of a Span."""

    __slots__ = ("_key", "_tag")

    def __init__(self, key: str, tag: bytes = b"\x4a") -> None:
        self._tag = tag
        self._key = _sized(b"\x0a", key.encode())

    def text(self, value: str) -> bytes:
        """With a string."""
        return _sized(self._tag, self._key + _sized(b"\x12", _sized(b"\x0a", value.encode())))

    def number(self, value: int) -> bytes:
        """With a number >= 0."""
        return _sized(self._tag, self._key + _sized(b"\x12", b"\x18" + varint(value)))


def named(name: str) -> bytes:
    """Name and kind of a span."""
    return _sized(b"\x2a", name.encode()) + bytes((0x30, INTERNAL))


def span(trace_id: bytes, span_id: bytes, parent_id: bytes, what: bytes, begin_ns: int, end_ns: int, failed: bool) -> bytes:
    """`spans = 2` of a ScopeSpans. `parent_id` is empty if it has none; a parent came from elsewhere. `what` is `named`, and attributes."""
    body = b"\x0a\x10" + trace_id + b"\x12\x08" + span_id
    if parent_id:
        body += b"\x22\x08" + parent_id + what + _times(0x39, begin_ns, 0x41, end_ns) + _CHILD
    else:
        body += what + _times(0x39, begin_ns, 0x41, end_ns) + _ROOT
    if failed:
        body += _ERROR
    size = len(body)
    return b"\x12" + (_VARINTS[size] if size < 0x1000 else varint(size)) + body


def envelope(who: Mapping[str, str], scope: str, version: str, schema_url: str) -> tuple[bytes, bytes, bytes]:
    """What is around the spans of a request, for `request`: the resource, the scope, and the schema."""
    resource = _sized(b"\x0a", b"".join(Attribute(key, b"\x0a").text(value) for key, value in who.items()))
    return (resource, _sized(b"\x0a", _sized(b"\x0a", scope.encode()) + _sized(b"\x12", version.encode())),
            _sized(b"\x1a", schema_url.encode()))


def request(around: tuple[bytes, bytes, bytes], spans: Iterable[bytes]) -> bytes:
    """An ExportTraceServiceRequest."""
    resource, scope, schema = around
    return _sized(b"\x0a", resource + _sized(b"\x12", scope + b"".join(spans) + schema) + schema)
