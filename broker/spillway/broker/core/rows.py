"""Rows of a shard: key order and value encodings. Keys are unique to the shard; the store adds its own prefix.

    q <queue>               queue row
    m <queue> NUL <seq>     message row; sorts by destination, tenant, key, sequence
    l <token>               live lease -> its queue
    d <dest> NUL <tenant> NUL <seq>   dead letter
    p <producer>            last sequence of an idempotent producer
    c <copier>              where the copies that one shard's outbox sends have got to
    s <dest>                counters of a destination
    g <scope>               closed gate
    t <scope>               what a tenant has waiting
    u <digest>              a dedup id: the sequence of its message, and until when it is remembered
    v <minute> <digest>     the same by the minute in which it is forgotten
    x                       the shard's clock

Whoever changes a value's shape raises its version (the first byte or element) in the same commit.
"""
from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from spillway.broker.core.bounds import NUMBER_MAX, TIME_MS_MAX, Count, Number, Time, Unsigned, check_queue, version_of
from spillway.broker.core.errors import CorruptEntry, newer

if TYPE_CHECKING:
    from spillway.broker.core.queue import Message

QUEUE, MESSAGE, LEASE, DEAD, PRODUCER, STATS, GATE, CLOCK = b"q", b"m", b"l", b"d", b"p", b"s", b"g", b"x"
TENANT, DEDUP, DEDUP_DUE, COPIER = b"t", b"u", b"v", b"c"

_SEQUENCE = struct.Struct(">Q")
_MESSAGE = struct.Struct("<BQQ")  # version, enqueue ms, deliver not before ms; then the body
_MESSAGE_VERSION = 1
_MESSAGE_2 = struct.Struct("<BQQQ")  # as _MESSAGE, and deliver not after ms
_PAIR = struct.Struct(">QQ")
_MINUTE = struct.Struct(">I")
_pack_sequence = _SEQUENCE.pack
_pack_message = _MESSAGE.pack
_unpack_message = _MESSAGE.unpack_from
_unpack_message_2 = _MESSAGE_2.unpack_from
_MESSAGE_BYTES = _MESSAGE.size
_encode = msgspec.msgpack.Encoder().encode
VERSION = 1
_Version = Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]


class QueueRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A non-empty queue."""

    version: _Version
    count: Annotated[int, msgspec.Meta(ge=1, le=NUMBER_MAX)]  # messages, all of them in message rows
    floor: Number  # rows below this sequence are dead
    attempts: Count  # failed attempts of the head
    not_before: Time  # ms since 1970
    head_ms: Time  # enqueue time of the head, 0 if unknown
    token: int = 0  # fencing token of the live lease, 0: none
    lease_size: int = 0
    lease_acked: int = 0
    deadline: Time = 0
    consumer: str = ""
    gap: tuple[Number, Number, Number] | None = None  # see Queue.gap
    size: Number | None = None  # bytes of the messages; None: nobody knows, see ShardState.reload
    gap_since: int = 0


class StatsRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Counters of a destination in a shard; `queues` and `messages` are levels, the rest totals."""

    version: _Version
    queues: Number
    messages: Number
    dead: Number
    enqueued: Number
    acked: Number
    dead_lettered: Number
    retried: Number
    expired: Number
    size: Number | None = None  # bytes of the messages: a level; None: nobody knows
    ttl_expired: Number = 0
    purged: Number = 0
    redriven: Number = 0
    discarded: Number = 0
    deduplicated: Number = 0
    overflowed: Number = 0


class TenantRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What one tenant of a destination has waiting in a shard."""

    version: _Version
    messages: Number
    size: Number  # their bytes


class ProducerRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What is known of an idempotent producer."""

    version: _Version
    last: Number  # its last sequence stored
    used: Number  # the shard's sequence at its last use: the order in which producers are forgotten


class CopierRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What is known of the copier of another shard's outbox."""

    version: _Version
    epoch: Unsigned  # its life
    chain: Unsigned  # number of the last copy that came in it
    last: Unsigned  # highest number of a copy that is stored


class GateRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A closed gate."""

    version: _Version
    until: Time  # ms since 1970
    step: Count  # times in a row that it closed


class ClockRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The shard's clock: the highest time of its entries, so that it never goes back."""

    version: _Version
    now_ms: Time


class DeadRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A dead letter."""

    version: _Version
    queue: bytes
    attempts: Count
    reason: str
    enqueue_ms: Time
    dead_ms: Time
    body: bytes
    dead_at: Unsigned = 0  # index of the entry that made it one


Row = TypeVar("Row", QueueRow, StatsRow, TenantRow, ProducerRow, CopierRow, GateRow, ClockRow, DeadRow)
_decoders: dict[type, Callable[[bytes], Any]] = {
    kind: msgspec.msgpack.Decoder(kind).decode for kind in (
        QueueRow, StatsRow, TenantRow, ProducerRow, CopierRow, GateRow, ClockRow, DeadRow)}

_decode_queue = msgspec.msgpack.Decoder(QueueRow).decode


def encode_row(row: msgspec.Struct) -> bytes:
    """A row's value."""
    return _encode(row)


def decode_row(kind: type[Row], value: bytes) -> Row:
    """A row from its value. Raises CorruptEntry."""
    try:
        row: Row = _decoders[kind](value)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise _refused(kind, value, e) from e
    return row


def decode_queue(value: bytes) -> QueueRow:
    """As `decode_row`, of the rows of which there are most."""
    try:
        return _decode_queue(value)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise _refused(QueueRow, value, e) from e


def _refused(kind: type, value: bytes, error: Exception) -> CorruptEntry:
    version = version_of(value)
    if version not in (None, VERSION):
        return CorruptEntry(f"a {kind.__name__} has version {version}; this node reads {VERSION}{newer(version, VERSION)}")
    return CorruptEntry(f"a {kind.__name__} of {len(value)} bytes does not decode: {error}")


def decode_dead(value: bytes) -> DeadRow:
    """The row of a dead letter, with a queue that can be one. Raises CorruptEntry."""
    row = decode_row(DeadRow, value)
    check_queue(row.queue)
    return row


def check_dead(key: bytes) -> None:
    """Raises CorruptEntry unless it can be a dead letter's key."""
    if key[:1] != DEAD:
        raise CorruptEntry(f"{key!r} is no row of a dead letter")


def queue_key(queue: bytes) -> bytes:
    """Key of a queue row."""
    return QUEUE + queue


def message_key(queue: bytes, sequence: int) -> bytes:
    """Key of a message row."""
    return MESSAGE + queue + b"\0" + _pack_sequence(sequence)


def message_end(queue: bytes) -> bytes:
    """The key after the last possible message row of a queue."""
    return MESSAGE + queue + b"\1"


def sequence_of(key: bytes) -> int:
    """The sequence at the end of a message or dead-letter key."""
    return int.from_bytes(key[-8:], "big")


def lease_key(token: int) -> bytes:
    """Key of a lease row; its value is the queue."""
    return LEASE + _pack_sequence(token)


def dead_prefix(destination: bytes, tenant: bytes | None = None) -> bytes:
    """Where the dead letters of a destination (and tenant) start; they end at the same with NUL as 0x01."""
    return DEAD + destination + b"\0" + (b"" if tenant is None else tenant + b"\0")


def encode_message(message: Message) -> bytes:
    """Value of a message row."""
    if message[4]:
        return _MESSAGE_2.pack(2, message[1], message[2], message[4]) + message[3]
    return _pack_message(_MESSAGE_VERSION, message[1], message[2]) + message[3]


def decode_message(key: bytes, value: bytes) -> Message:
    """The message of a row. Raises CorruptEntry."""
    sequence = int.from_bytes(key[-8:], "big")
    expire_ms = 0
    try:
        version, enqueue_ms, deliver_ms = _unpack_message(value)
        if version == _MESSAGE_VERSION:
            body = value[_MESSAGE_BYTES:]
        else:
            version, enqueue_ms, deliver_ms, expire_ms = _unpack_message_2(value)
            body = value[_MESSAGE_2.size:]
            if version != 2 or expire_ms > TIME_MS_MAX:
                version = 0
    except struct.error:
        version = 0
    if not version or sequence > NUMBER_MAX or enqueue_ms > TIME_MS_MAX or deliver_ms > TIME_MS_MAX:
        raise CorruptEntry(f"message row {key!r} of {len(value)} bytes has version {value[:1]!r}, or a number or a time beyond any; this "
                           "node reads versions 1 and 2")
    return (sequence, enqueue_ms, deliver_ms, body, expire_ms)


def dedup_row(sequence: int, until_ms: int) -> bytes:
    """Value of a dedup row."""
    return _PAIR.pack(sequence, until_ms)


def decode_dedup(value: bytes) -> tuple[int, int]:
    """(sequence, until ms) of a dedup row. Raises CorruptEntry."""
    if len(value) != _PAIR.size:
        raise CorruptEntry(f"a dedup row has {len(value)} bytes; it has {_PAIR.size}")
    sequence, until = _PAIR.unpack(value)
    if until > TIME_MS_MAX:
        raise CorruptEntry(f"a dedup row is for {until} ms, which is beyond any time")
    return sequence, until


def dedup_due(until_ms: int, digest: bytes = b"") -> bytes:
    """Key of a dedup id's row by the minute after which it may go."""
    return DEDUP_DUE + _MINUTE.pack(until_ms // 60_000) + digest
