"""Checks of names and durations that callers send. Every error names the field."""
from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from spillway.broker.errors import RequestError
from spillway.contract.limits import NAME_BYTES_MAX, REASON_BYTES_MAX


def check_name(field: str, name: str, empty: bool = False) -> None:
    """Raises RequestError unless it is a name: up to 255 bytes, no control characters."""
    if not name:
        if empty:
            return
        raise RequestError(field, "must not be empty")
    size = len(name.encode())
    if size > NAME_BYTES_MAX:
        raise RequestError(field, f"has {size} bytes; at most {NAME_BYTES_MAX}")
    _check_characters(field, name)


def _check_characters(field: str, text: str) -> None:
    for char in text:
        if char < " " or "\x7f" <= char <= "\x9f":
            raise RequestError(field, f"has the control character {char!r}")


def check_destination(field: str, name: str) -> None:
    """Raises RequestError unless it can name a destination."""
    check_name(field, name)
    if "*" in name:
        raise RequestError(field, "has a '*'; patterns are for Lease only")


def check_reason(field: str, text: str) -> None:
    """Raises RequestError unless it is a reason: up to REASON_BYTES_MAX bytes, no control characters."""
    size = len(text.encode())
    if size > REASON_BYTES_MAX:
        raise RequestError(field, f"has {size} bytes; at most {REASON_BYTES_MAX}")
    _check_characters(field, text)


def duration_ms(field: str, duration: Duration, minimum: int, maximum: int) -> int:
    """A duration in whole milliseconds, rounded up. Raises RequestError outside of the limits (milliseconds)."""
    if duration.seconds < 0 or duration.nanos < 0:
        raise RequestError(field, "must not be negative")
    value = duration.seconds * 1000 + -(-duration.nanos // 1_000_000)
    if not minimum <= value <= maximum:
        raise RequestError(field, f"is {value / 1000:.15g} s; it must be {minimum / 1000:g} s to {maximum / 1000:.15g} s")
    return value


def parse_etag(field: str, etag: str) -> int:
    """The revision that an etag stands for; 0 for none. Raises RequestError."""
    if not etag:
        return 0
    if not (etag.isascii() and etag.isdigit() and len(etag) < 20 and int(etag)):
        raise RequestError(field, f"{etag[:64]!r} is not an etag of this cluster")
    return int(etag)
