"""What a shard keeps of messages that were produced to the source of a route, until every target has its copy.

A producer's message is stored once, in the outbox of its queue's shard, with the targets that were decided when it was
accepted (a transactional outbox: Kleppmann, Designing Data-Intensive Applications, chapter 11). The shard's leader copies
from there, in the shard's order, and only then is the producer told. So a crash between two copies loses none, and
the copies' source sequences tell the target's shard which of them it has.
"""
from __future__ import annotations

import msgspec
from spillway.broker.core.bounds import Time, decoded
from spillway.broker.core.errors import CorruptEntry

DESTINATION = b"\2"  # no producer can name it
OUTBOX = b"\2\0\0"  # the queue; each shard has its own


class Promise(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """One message and who gets a copy."""

    targets: list[str]  # destinations
    overflowed: list[str]  # destinations that get none: over their budget when the message came
    rest: bytes  # tenant NUL key
    body: bytes  # serialized spillway.v1.Message
    deliver: Time = 0  # not before, ms since 1970
    expire: Time = 0  # not after, ms since 1970; 0: no limit


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Promise).decode


def encode_promise(promise: Promise) -> bytes:
    """As a message's body in the outbox."""
    return _encode(promise)


def decode_promise(body: bytes) -> Promise:
    """From a message's body in the outbox. Raises CorruptEntry."""
    try:
        promise = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise CorruptEntry(f"a promise of {len(body)} bytes does not decode: {e}") from e
    if promise.rest.count(b"\0") != 1:
        raise CorruptEntry(f"a promise is for {promise.rest!r}, which is no tenant and key")
    decoded("a promise's tenant and key", promise.rest)
    return promise


def copy_number(sequence: int, ordinal: int) -> int:
    """The number of a message's `ordinal`-th copy (below 1024): grows with the message's sequence and the ordinal, and stays
    below 2^64 for 2^40 log entries, as no entry holds 2^14 messages (sequences leave room for 2^20)."""
    return (sequence >> 20) << 24 | (sequence & 0x3FFF) << 10 | ordinal
