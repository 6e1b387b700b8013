"""The log entry of a shard: everything that was waiting for it in one turn of its leader.

One entry carries many operations, so that what an entry costs is shared by what it carries. Operations are
kept as flat tuples and parallel lists: building an object per message would cost more than applying it.

Order inside an entry: enqueues, settlements, expiries, gates, grants. A settlement that races with the
expiry of its lease wins; a grant sees what the entry's settlements left behind.

Whoever changes a shape here raises VERSION in the same commit and keeps decoding the old one.
"""
from __future__ import annotations

import msgspec
from spillway.broker.core.errors import CorruptEntry

VERSION = 1

# Settlement outcomes, as in the public protocol.
ACK, RETRY, THROTTLED, DOWN, REJECT, RELEASE, EXTEND = range(1, 8)

# (fencing token, position, sequence, outcome, argument, reason)
#   position: how many messages of the lease's run, from its start, are acknowledged once this is applied;
#   sequence: of the last of them (0 when position is 0);
#   argument: RETRY not before; THROTTLED, DOWN parked until; EXTEND new deadline; all milliseconds since 1970;
#   reason: RETRY, REJECT; for people.
Settle = tuple[int, int, int, int, int, str]
# (fencing token, dead-letter the head instead of retrying, not before, reason)
Expire = tuple[int, bool, int, str]
# (scope, parked until in ms since 1970 or 0 to open, times in a row that it closed)
#   scope: destination, or destination NUL tenant
GateChange = tuple[bytes, int, int]
# (queue, messages, deadline in ms since 1970, index into Entry.consumers)
Grant = tuple[bytes, int, int, int]


class Enqueue(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """Messages of one producer, in order. `queues[i]` takes `bodies[i]`."""

    producer: str  # "" is nobody: no deduplication
    first: int  # producer sequence of the first; the others follow without a gap
    queues: list[bytes]  # spillway.contract.hashing.queue_key
    bodies: list[bytes]  # serialized spillway.v1.Message, opaque here
    delays: dict[int, int] | None = None  # position -> deliver not before, ms since 1970


class Entry(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """One log entry."""

    version: int
    now_ms: int  # the leader's clock, milliseconds since 1970; apply never lets it go back
    enqueues: list[Enqueue] = []
    settles: list[Settle] = []
    expires: list[Expire] = []
    gates: list[GateChange] = []
    grants: list[Grant] = []
    consumers: list[str] = []  # names for people, shared by the grants


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


def encode_entry(entry: Entry) -> bytes:
    """The entry as bytes for the log."""
    return _encode(entry)


def decode_entry(command: bytes) -> Entry:
    """The entry from the log. Raises CorruptEntry for anything that `encode_entry` did not make."""
    try:
        entry = _decode(command)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise CorruptEntry(f"a log entry of {len(command)} bytes does not decode: {e}") from e
    if entry.version != VERSION:
        raise CorruptEntry(f"a log entry has version {entry.version}; this node reads {VERSION}")
    for batch in entry.enqueues:
        if len(batch.queues) != len(batch.bodies):
            raise CorruptEntry("an enqueue has another number of queues than of bodies")
    return entry
