"""What numbers and names in entries and rows may be. Whatever is written stays within, so what is outside is damage, or was
written by nobody. It is refused as it is decoded, or, where that would cost every message of every entry something, as it is
used for the first time: a shard that meets damage ends there, and what it had not saved is read again from the log.

The bounds are those of what uses a value: keys and frames of fixed width, and the times that the protocol can tell. Nothing
that a client may send is outside of them; what another node sends is checked as it comes in.
"""
from __future__ import annotations

from typing import Annotated

import msgspec
from spillway.broker.core.errors import CorruptEntry

TIME_MS_MAX = 253_402_300_799_999  # the end of the year 9999, the last one that a google.protobuf.Timestamp has
NUMBER_MAX = (1 << 63) - 1  # what comes after it, and all that counts on from it, has 64 bits, too
COUNT_MAX = (1 << 31) - 1
QUEUE_BYTES_MAX = 0x3FFF  # far beyond three names; what frames have lengths of two bytes for

Time = Annotated[int, msgspec.Meta(ge=0, le=TIME_MS_MAX)]  # ms since 1970, or of a duration
Number = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]  # a sequence, a token, a total, bytes
Unsigned = Annotated[int, msgspec.Meta(ge=0)]  # what clients choose; below 2^64, as msgpack has no more
Count = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
Name = Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[^\x00-\x1f\x7f-\x9f]+\Z")]  # of a destination
Rate = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]  # 0: no limit
Weight = Annotated[float, msgspec.Meta(gt=0.0, le=1e9)]


class _Versioned(msgspec.Struct, array_like=True):
    version: int


_decode_version = msgspec.msgpack.Decoder(_Versioned).decode


def version_of(value: bytes) -> int | None:
    """The version that an encoded array begins with, None if it does not: for what is said of an array that was refused."""
    try:
        return _decode_version(value).version
    except (msgspec.DecodeError, RecursionError):
        return None


def check_queue(name: bytes) -> None:
    """Raises CorruptEntry unless it can name a queue: three names in UTF-8 with NUL between them."""
    if name.count(b"\0") != 2 or len(name) > QUEUE_BYTES_MAX:
        raise CorruptEntry(f"what names a queue has not three parts, or too many bytes: {name[:100]!r}")
    if not name.isascii():
        decoded("the name of a queue", name)


def check_time(value: int) -> None:
    """Raises CorruptEntry unless it can be milliseconds since 1970."""
    if not 0 <= value <= TIME_MS_MAX:
        raise CorruptEntry(f"{value} ms since 1970 are no time")


def check_scope(scope: bytes) -> None:
    """Raises CorruptEntry unless it can be a gate's: a destination, or a destination, NUL and a tenant, in UTF-8."""
    if scope.count(b"\0") > 1:
        raise CorruptEntry(f"the scope {scope!r} has more than two parts")
    decoded("a scope", scope)


def decoded(what: str, name: bytes) -> str:
    """A name as text. Raises CorruptEntry."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise CorruptEntry(f"{what} is not UTF-8: {name!r}") from None
