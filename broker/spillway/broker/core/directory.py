"""The replicated state of the meta group: destinations and their policy. Pure; small enough to be kept whole.

A command is one change with the time and the identity of whoever asked; `apply` answers with a Change that tells
what became of it, so that the node that asked can tell its caller.
"""
from __future__ import annotations

from collections.abc import Iterator

import msgspec
from spillway.broker.core.errors import CorruptEntry
from spillway.broker.core.policy import Nack, Policy

VERSION = 1
DESTINATIONS_MAX = 100_000  # each costs about 1 KiB on every node
OK, EXISTS, MISSING, ETAG, FULL = range(5)  # outcomes of a change


class HttpTarget(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Where the HTTP dispatcher sends a destination's messages."""

    url: str
    timeout_ms: int = 10_000
    concurrency_max: int = 16


class Destination(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A destination as stored."""

    version: int
    name: str
    revision: int  # log index of its last change: its etag
    run_messages_max: int
    lease_ms: int
    backoff_base_ms: int
    backoff_cap_ms: int
    nack: int
    attempts_max: int
    age_ms_max: int
    http: HttpTarget | None = None

    def policy(self) -> Policy:
        """As the core's decisions take it."""
        return Policy(self.run_messages_max, self.lease_ms, self.backoff_base_ms, self.backoff_cap_ms,
                      Nack(self.nack), self.attempts_max, self.age_ms_max)


def destination(name: str, policy: Policy, http: HttpTarget | None = None) -> Destination:
    """A destination not yet stored."""
    return Destination(VERSION, name, 0, policy.run_messages_max, policy.lease_ms, policy.backoff_base_ms,
                       policy.backoff_cap_ms, int(policy.nack), policy.attempts_max, policy.age_ms_max, http)


class Put(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Creates or replaces a destination."""

    version: int
    origin: str  # node that proposed it
    number: int  # that node's own number of the request
    destination: Destination
    create: bool  # may create
    replace: bool  # may replace
    etag: int  # if not 0: only if this is the revision now


_encode = msgspec.msgpack.Encoder().encode
_decode_put = msgspec.msgpack.Decoder(list[Put]).decode
_decode_row = msgspec.msgpack.Decoder(Destination).decode


def encode_command(puts: list[Put]) -> bytes:
    """A log entry of the meta group."""
    return _encode(puts)


class Change(msgspec.Struct):
    """What became of a Put."""

    origin: str
    number: int
    outcome: int
    destination: Destination | None  # as it is now


class Directory:
    """All destinations."""

    def __init__(self) -> None:
        self.destinations: dict[str, Destination] = {}

    def load(self, rows: Iterator[tuple[bytes, bytes]]) -> None:
        """Replaces everything by stored rows. Raises CorruptEntry."""
        self.destinations = {}
        for _, value in rows:
            try:
                row = _decode_row(value)
            except (msgspec.DecodeError, UnicodeDecodeError) as e:
                raise CorruptEntry(f"a destination's row does not decode: {e}") from e
            if row.version != VERSION:
                raise CorruptEntry(f"a destination's row has version {row.version}; this node reads {VERSION}")
            self.destinations[row.name] = row

    def apply(self, index: int, command: bytes) -> tuple[list[Change], list[tuple[bytes, bytes]]]:
        """Applies a committed command: the changes, and rows to put. Raises CorruptEntry for bytes of another kind."""
        try:
            puts = _decode_put(command)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise CorruptEntry(f"a meta entry of {len(command)} bytes does not decode: {e}") from e
        for put in puts:
            if put.version != VERSION or put.destination.version != VERSION:
                raise CorruptEntry(f"a meta entry has versions {put.version} and {put.destination.version}; "
                                   f"this node reads {VERSION}")
        changes, rows = [], []
        for put in puts:
            name = put.destination.name
            old = self.destinations.get(name)
            outcome = OK
            if old is not None and not put.replace:
                outcome = EXISTS
            elif old is None and not put.create:
                outcome = MISSING
            elif put.etag and (old is None or old.revision != put.etag):
                outcome = ETAG
            elif old is None and len(self.destinations) >= DESTINATIONS_MAX:
                outcome = FULL
            else:
                old = self.destinations[name] = msgspec.structs.replace(put.destination, revision=index)
                rows.append((name.encode(), _encode(old)))
            changes.append(Change(put.origin, put.number, outcome, old))
        return changes, rows
