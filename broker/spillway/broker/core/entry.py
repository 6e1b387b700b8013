"""The log entry of a shard: everything that was waiting for it in one turn of its leader.

One entry carries many operations, so that what an entry costs is shared by what it carries. Operations are
kept as flat tuples and parallel lists: building an object per message would cost more than applying it.

Order inside an entry: enqueues, settlements, expiries, gates, trims, purges, redrives, grants. A settlement that races
with the expiry of its lease wins; a grant sees what the entry's other operations left behind.

Whoever changes a shape here raises VERSION in the same commit and keeps decoding the old one.
"""
from __future__ import annotations

from typing import Annotated

import msgspec
from spillway.broker.core.bounds import Count, Time, Unsigned, version_of
from spillway.broker.core.errors import CorruptEntry, newer

VERSION = 2
VERSIONS_READ = (1, 2)  # 1 had no trims, purges, redrives, options, copies
_Version = Annotated[int, msgspec.Meta(ge=VERSIONS_READ[0], le=VERSIONS_READ[-1])]

# Settlement outcomes, as in the public protocol, and DISCARD: REJECT where dead letters are not kept.
ACK, RETRY, THROTTLED, DOWN, REJECT, RELEASE, EXTEND, DISCARD = range(1, 9)
EXPIRED = 9  # in no entry: how a lease ended whose time was over
# What an expiry does with the head, and a trim with what it removes. DONE: it counts as acknowledged.
KEEP, DEAD, GONE, DONE = range(4)

# (fencing token, position, sequence, outcome, argument, reason)
#   position: how many messages of the lease's run, from its start, are acknowledged once this is applied;
#   sequence: of the last of them (0 when position is 0);
#   argument: RETRY not before; THROTTLED, DOWN parked until; EXTEND new deadline; all milliseconds since 1970;
#   reason: RETRY, REJECT; for people.
Settle = tuple[int, int, int, int, int, str]
# (fencing token, KEEP to retry the head, DEAD to dead-letter it, GONE to discard it; not before, reason)
Expire = tuple[Unsigned, Annotated[int, msgspec.Meta(ge=KEEP, le=GONE)] | bool, Time, str]  # version 1 has false and true for KEEP and DEAD
# (queue, how many of its first messages, sequence of the last of them, DEAD, GONE or DONE, reason): their TTL has passed,
# or (DONE) the outbox has been copied that far
Trim = tuple[bytes, Unsigned, Unsigned, Annotated[int, msgspec.Meta(ge=DEAD, le=DONE)], str]
# (deliver not before, or 0; not after, or 0; digest of the dedup id, or empty; remember it until) in ms since 1970
Option = tuple[int, int, bytes, int]
# (scope, parked until in ms since 1970 or 0 to open, times in a row that it closed)
#   scope: destination, or destination NUL tenant
GateChange = tuple[bytes, Time, Count]
# (queue, messages, deadline in ms since 1970, index into Entry.consumers)
Grant = tuple[bytes, int, int, int]


class Enqueue(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """Messages of one producer, in order. `queues[i]` takes `bodies[i]`."""

    producer: str  # "" is nobody: no deduplication
    first: Unsigned  # producer sequence of the first; the others follow without a gap. Of copies: the number before the first
    queues: list[bytes]  # spillway.contract.hashing.queue_key
    bodies: list[bytes]  # serialized spillway.v1.Message, opaque here
    delays: dict[int, Time] | None = None  # version 1 only: position -> deliver not before
    options: dict[int, Option] | None = None  # by position; most messages have none
    copies: list[int] | None = None  # numbers of a route's copies: they grow, with gaps; see core.outbox
    epoch: Unsigned = 0  # of copies: the life of the copier that made them


class Entry(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """One log entry."""

    version: _Version
    now_ms: Time  # the leader's clock, milliseconds since 1970; apply never lets it go back
    enqueues: list[Enqueue] = []
    settles: list[Settle] = []
    expires: list[Expire] = []
    gates: list[GateChange] = []
    grants: list[Grant] = []
    consumers: list[str] = []  # names for people, shared by the grants
    trims: list[Trim] = []
    purges: list[bytes] = []  # queues that lose all messages and their lease
    redrives: list[bytes] = []  # rows of dead letters that go back to the head of their queues
    dead_purges: list[bytes] = []  # rows of dead letters that go
    overflows: list[tuple[bytes, Count]] = []  # (destination, copies that routes left out)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


def encode_entry(entry: Entry) -> bytes:
    """The entry as bytes for the log."""
    return _encode(entry)


def decode_entry(command: bytes) -> Entry:
    """The entry from the log. Raises CorruptEntry for what has not the shape of one; what its numbers and names cannot be,
    `Shard.apply` sees as it uses them."""
    try:
        entry = _decode(command)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        version = version_of(command)
        if version is not None and version not in VERSIONS_READ:
            raise CorruptEntry(f"a log entry has version {version}; this node reads {VERSIONS_READ}{newer(version, VERSION)}") from None
        raise CorruptEntry(f"a log entry of {len(command)} bytes does not decode: {e}") from e
    for batch in entry.enqueues:
        if len(batch.queues) != len(batch.bodies):
            raise CorruptEntry("an enqueue has another number of queues than of bodies")
        if batch.copies is not None and len(batch.copies) != len(batch.queues):
            raise CorruptEntry("an enqueue has another number of queues than of copies")
        if batch.delays:
            batch.options = {position: (until, 0, b"", 0) for position, until in batch.delays.items()}
    return entry
