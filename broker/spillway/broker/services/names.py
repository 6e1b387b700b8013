"""Checks of names and durations that callers send. Every error names the field."""
from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from spillway.broker.errors import RequestError
from spillway.contract.limits import NAME_BYTES_MAX


def check_name(field: str, name: str, empty: bool = False) -> None:
    """Raises RequestError unless it is a name: up to 255 bytes, no control characters."""
    if not name:
        if empty:
            return
        raise RequestError(field, "must not be empty")
    size = len(name.encode())
    if size > NAME_BYTES_MAX:
        raise RequestError(field, f"has {size} bytes; at most {NAME_BYTES_MAX}")
    for char in name:
        if char < " " or "\x7f" <= char <= "\x9f":
            raise RequestError(field, f"has the control character {char!r}")


def check_destination(field: str, name: str) -> None:
    """Raises RequestError unless it can name a destination."""
    check_name(field, name)
    if "*" in name:
        raise RequestError(field, "has a '*'; patterns are for Lease only")


def duration_ms(field: str, duration: Duration, minimum: int, maximum: int) -> int:
    """A duration in whole milliseconds, rounded up. Raises RequestError outside of the limits (milliseconds)."""
    if duration.seconds < 0 or duration.nanos < 0:
        raise RequestError(field, "must not be negative")
    value = duration.seconds * 1000 + -(-duration.nanos // 1_000_000)
    if not minimum <= value <= maximum:
        raise RequestError(field, f"is {value / 1000:g} s; it must be {minimum / 1000:g} s to {maximum / 1000:g} s")
    return value
