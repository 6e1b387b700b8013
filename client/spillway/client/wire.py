"""Frames of the Produce and Ack streams, written by hand.

A protobuf message may be written as its fields one after the other, so a record is encoded once, when it is accepted,
and a frame is a join of such pieces: no protobuf object per record, no copy into a request, and a retry costs nothing.
The record's number stands last, as it is known only when the frame is built and may change. The layout must follow
queue_service.proto; a test parses every shape with the generated code.
"""
from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from spillway.client.errors import InvalidArgument
from spillway.contract.hashing import queue_key, shard_of
from spillway.contract.limits import (
    DELAY_MS_MAX,
    FRAME_BYTES_MAX,
    HEADERS_BYTES_MAX,
    NAME_BYTES_MAX,
    REASON_BYTES_MAX,
    TTL_MS_MAX,
)
from spillway.contract.varint import varint
from spillway.v1 import message_pb2

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
RECORD_BYTES_MAX = FRAME_BYTES_MAX - 1024  # a frame with one record and a producer id must pass

_NUMBER = struct.Struct("<BQ")  # producer_sequence = 4, fixed64
NUMBER_BYTES = _NUMBER.size
_SETTLEMENT = struct.Struct("<BIBQBQBB")  # shard = 1, fencing_token = 2, sequence = 3, outcome = 4
# The same inside `settlements = 1`, for those that have no more fields.
_PLAIN = struct.Struct("<BBBIBQBQBB")
_pack_plain = _PLAIN.pack


_VARINTS = [varint(i) for i in range(0x1000)]


def _varint(value: int) -> bytes:
    return _VARINTS[value] if value < 0x1000 else varint(value)


class QueueName(NamedTuple):
    """Where records of one queue go, and the start of their encoding."""

    shard: int
    fields: bytes  # destination = 1, tenant = 2, key = 3 of a ProduceRecord


def queue_name(destination: str, tenant: str, key: str, shard_count: int) -> QueueName:
    """Checks and encodes a queue's name. Raises InvalidArgument naming the field."""
    if not destination:
        raise InvalidArgument("destination", "it is empty; name the destination")
    if "*" in destination:
        raise InvalidArgument("destination", f"{destination!r} has a '*', which only patterns have")
    fields = []
    for tag, field, text in ((b"\x0a", "destination", destination), (b"\x12", "tenant", tenant), (b"\x1a", "key", key)):
        name = name_bytes(field, text)
        if name:
            fields.append(tag + _VARINTS[len(name)] + name)
    return QueueName(shard_of(queue_key(destination, tenant, key), shard_count), b"".join(fields))


def name_bytes(field: str, text: str) -> bytes:
    """A name in UTF-8. Raises InvalidArgument naming the field if it is too long or has control characters."""
    try:
        encoded = text.encode()
    except (UnicodeEncodeError, AttributeError):
        raise InvalidArgument(field, f"{text!r} is not text that UTF-8 can encode") from None
    if len(encoded) > NAME_BYTES_MAX:
        raise InvalidArgument(field, f"it has {len(encoded)} bytes; the limit is {NAME_BYTES_MAX}")
    if _CONTROL.search(text):
        raise InvalidArgument(field, f"{text!r} has a control character; remove it")
    return encoded


def duration(field: str, seconds: float, ms_max: int = DELAY_MS_MAX) -> bytes:
    """A google.protobuf.Duration. Raises InvalidArgument naming the field unless it is 0 to 7 days, or another limit."""
    if not 0 <= seconds * 1000 <= ms_max:
        raise InvalidArgument(field, f"{seconds} s; it must be 0 to {ms_max // 1000} s")
    whole = int(seconds)
    nanos = round((seconds - whole) * 1e9)
    if nanos == 1_000_000_000:
        whole, nanos = whole + 1, 0
    return (b"\x08" + varint(whole) if whole else b"") + (b"\x10" + varint(nanos) if nanos else b"")


def record(name: QueueName, payload: bytes, headers: Mapping[str, str] | None, id: str, options: bytes,
           payload_bytes_max: int) -> bytes:
    """One record of a ProduceRequest but for its number; `options` as of `record_options`. Raises InvalidArgument naming
    the field."""
    if not isinstance(payload, bytes | bytearray):
        raise InvalidArgument("payload", f"it is {type(payload).__name__}, not bytes")
    size = len(payload)
    if size > payload_bytes_max:
        raise InvalidArgument("payload", f"it has {size} bytes; the limit is {payload_bytes_max}")
    if not headers and not id:  # the common case: the payload alone
        message = b"\x1a" + _varint(size)
        total = len(message) + size
        head = name.fields + options + b"\x32" + _varint(total) + message
        return b"\x12" + _varint(len(head) + size + NUMBER_BYTES) + head + payload
    body = _message(payload, headers, id)
    head = name.fields + options + b"\x32" + _varint(len(body))
    total = len(head) + len(body) + NUMBER_BYTES
    if total > RECORD_BYTES_MAX:
        raise InvalidArgument("payload", f"the record has {total} bytes; the limit is {RECORD_BYTES_MAX}")
    return b"\x12" + _varint(total) + head + body


def record_options(delay: float | None, deliver_at: datetime | None, ttl: float | None, dedup_id: str) -> bytes:
    """delay = 5, ttl = 7, dedup_id = 8, deliver_at = 9 of a ProduceRecord. Raises InvalidArgument naming the field."""
    parts = []
    if delay is not None:
        encoded = duration("delay", delay)
        parts.append(b"\x2a" + _VARINTS[len(encoded)] + encoded)
    if ttl is not None:
        if not ttl * 1000 >= 1:
            raise InvalidArgument("ttl", f"{ttl} s; it must be at least 0.001 s")
        encoded = duration("ttl", ttl, TTL_MS_MAX)
        parts.append(b"\x3a" + _VARINTS[len(encoded)] + encoded)
    if dedup_id:
        name = name_bytes("dedup_id", dedup_id)
        parts.append(b"\x42" + _VARINTS[len(name)] + name)
    if deliver_at is not None:
        if delay is not None:
            raise InvalidArgument("deliver_at", "it is given together with delay; give one of them")
        if deliver_at.tzinfo is None:
            raise InvalidArgument("deliver_at", "it has no time zone; give an aware datetime")
        at = max(0.0, deliver_at.timestamp())  # before 1970 is as good as now
        encoded = duration("deliver_at", at, 1 << 60)  # a Timestamp is encoded as a Duration since 1970
        parts.append(b"\x4a" + _VARINTS[len(encoded)] + encoded)
    return b"".join(parts)


def _message(payload: bytes, headers: Mapping[str, str] | None, id: str) -> bytes:
    if id:
        name_bytes("id", id)
    if headers:
        try:
            total = sum(len(k.encode()) + len(v.encode()) for k, v in headers.items())
        except (UnicodeEncodeError, AttributeError):
            raise InvalidArgument("headers", "a name or value is not text that UTF-8 can encode") from None
        if total > HEADERS_BYTES_MAX:
            raise InvalidArgument("headers", f"they have {total} bytes in all; the limit is {HEADERS_BYTES_MAX}")
    return message_pb2.Message(id=id, headers=headers, payload=payload).SerializeToString()


def produce_head(producer_id: str) -> bytes:
    """producer_id = 1 of a ProduceRequest."""
    encoded = producer_id.encode()
    return b"\x0a" + _VARINTS[len(encoded)] + encoded


def number(value: int) -> bytes:
    """producer_sequence = 4 of a ProduceRecord: what `record` left out."""
    return _NUMBER.pack(0x21, value)


def settlement(shard: int, token: int, sequence: int, outcome: int, delay: float | None, reason: str) -> bytes:
    """One settlement of an AckRequest."""
    if delay is None and not reason:
        return _pack_plain(0x0A, 25, 0x0D, shard, 0x11, token, 0x19, sequence, 0x20, outcome)
    fields = _SETTLEMENT.pack(0x0D, shard, 0x11, token, 0x19, sequence, 0x20, outcome)
    if delay is not None:
        encoded = duration("delay", delay)
        fields += b"\x2a" + _VARINTS[len(encoded)] + encoded
    if reason:
        text = reason.encode(errors="replace")[:REASON_BYTES_MAX]
        text = text.decode(errors="ignore").encode()  # cut between characters
        fields += b"\x32" + _VARINTS[len(text)] + text
    return b"\x0a" + _varint(len(fields)) + fields
