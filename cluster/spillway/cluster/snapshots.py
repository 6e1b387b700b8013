"""A group's state on its way from one node to another: a stream of checked chunks, out of one store and into another.

`contract.snapshot` has what they look like. The state is that of one moment, whatever is committed meanwhile; memory stays
flat on both sides.
"""
from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rocksdict import ReadOptions, WriteBatch
from spillway.cluster.errors import SnapshotInvalid
from spillway.contract.snapshot import (
    BODY_BYTES_MAX,
    CHUNK_BYTES_MAX,
    FORMAT,
    FRAME,
    HEADER,
    ROW,
    TRAILER,
    ChunkInvalid,
    seal,
    unpack_header,
    unpack_trailer,
    unseal,
)

if TYPE_CHECKING:
    from spillway.cluster.state_store import StateStore

CHUNK_ROWS_MAX = 500  # many small rows would hold up the loop: 500 take about 1 ms
ROW_BYTES_MAX = 64 << 20  # what a receiver holds in memory at most
RESUME_SECONDS = 30.0  # after a broken transfer both sides keep what they have for so long
CHUNKS_MAX, ROWS_MAX = 1 << 31, 1 << 62  # beyond any; numbers of a position come from another node
_PREFIX = struct.Struct(">cII")


@dataclass(frozen=True, slots=True)
class Position:
    """Up to where a snapshot has come: from here an Exporter can go on."""

    index: int
    """Applied index of the snapshot."""
    number: int
    """Of the next chunk."""
    checksum: int
    """Of the last chunk."""
    rows: int
    last_key: bytes
    """Empty before the first row."""


class Exporter(Iterator[bytes]):
    """The chunks of one group's state as of one moment. It pins that moment's files until it ends or is closed. See `Exports` for the
    rate at which they are sent.

    One iterator reads all of it, also after `resume`: an iterator of RocksDB sees the moment of its making, and those that
    rocksdict makes of a snapshot do so, too, instead of that of the snapshot (0.3.29)."""

    def __init__(self, database: Any, prefix: bytes, group_id: int, index: int, term: int, check: Callable[[Any], None]) -> None:
        """See StateStore.exporter. The moment is now. `check(rows)` raises StorageFailed if the iterator ended because of an error."""
        self.group_id = group_id
        self.index = index
        self.term = term
        read: Any = ReadOptions()
        read.fill_cache(False)
        read.set_readahead_size(CHUNK_BYTES_MAX)
        read.set_iterate_upper_bound(_PREFIX.pack(b"R", group_id, _PREFIX.unpack(prefix)[2] + 1))
        self._read_options: Any = read  # the iterator borrows the bound in them: they must outlive it
        self._rows: Any = database.iter(read)
        self._begun = False
        self._prefix = prefix
        self._check = check
        self._number = 0
        self._checksum = 0
        self._count = 0
        self._ready: list[bytes] = []

    def resume(self, position: Position) -> None:
        """Goes on, or back, to where a receiver is: its transfer broke. Raises SnapshotInvalid if this is the state of
        another moment, or closed, or if there is no such position."""
        if self._rows is None or position.index != self.index:
            raise SnapshotInvalid(f"cannot go on at entry {position.index}: this snapshot is as of entry {self.index}"
                                  f"{' and closed' if self._rows is None else ''}")
        if not (position.number < CHUNKS_MAX and position.rows < ROWS_MAX and position.checksum < 1 << 32):
            raise SnapshotInvalid(f"cannot go on at chunk {position.number}: there is none")
        self._number, self._checksum, self._count = position.number, position.checksum, position.rows
        self._ready.clear()
        self._begun = position.number > 0
        if self._begun:
            self._seek(position.last_key if position.rows else None)

    def __next__(self) -> bytes:
        """The next chunk. Raises StorageFailed if the disk cannot be read."""
        if not self._ready:
            if self._rows is None:
                raise StopIteration
            self._read()
        return self._ready.pop(0)

    @property
    def ended(self) -> bool:
        """It cannot go on: all chunks were made, or it was closed."""
        return self._rows is None

    def close(self) -> None:
        """Releases the moment. The chunks end."""
        self._rows = self._read_options = None
        self._ready.clear()

    def __repr__(self) -> str:
        return f"<exporter of group {self.group_id} as of entry {self.index}: {self._count} rows, {self._number} chunks>"

    def _seek(self, after: bytes | None) -> None:
        """To the row after that of a key; None: to the first one."""
        start = self._prefix + (after or b"")
        self._rows.seek(start)
        if after is not None and self._rows.valid() and self._rows.key() == start:
            self._rows.next()

    def _read(self) -> None:
        """The chunks of the next rows."""
        rows = self._rows
        if not self._begun:
            self._begun = True
            self._add(b"H", HEADER.pack(FORMAT, self.group_id, self.index, self.term))
            self._seek(None)
            return
        cut = len(self._prefix)
        parts: list[bytes] = []
        size = count = 0
        while rows.valid():
            key, value = rows.key()[cut:], rows.value()
            row_bytes = ROW.size + len(key) + len(value)
            if count and size + row_bytes > BODY_BYTES_MAX:
                break
            parts += (ROW.pack(len(key), len(value)), key, value)
            size += row_bytes
            count += 1
            rows.next()
            if count == CHUNK_ROWS_MAX or size >= BODY_BYTES_MAX:
                break
        if count:
            body = b"".join(parts)
            for start in range(0, size, BODY_BYTES_MAX):
                end = start + BODY_BYTES_MAX
                self._add(b"R" if end >= size else b"P", body[start:end])
            self._count += count
            return
        self._check(rows)
        self._add(b"T", TRAILER.pack(self._count))
        self._rows = self._read_options = None

    def _add(self, kind: bytes, body: bytes) -> None:
        chunk, self._checksum = seal(kind, self._number, self._checksum, body)
        self._ready.append(chunk)
        self._number += 1


def moment_of(chunk: bytes) -> int | None:
    """Of the first chunk of a snapshot, the index that it is as of; None for others."""
    begins = chunk[4:5] == b"H" and len(chunk) == FRAME.size + HEADER.size
    return HEADER.unpack_from(chunk, FRAME.size)[2] if begins else None


class Installer:
    """Takes the chunks of a snapshot, beside the present state, which stands until `finish`.

    A later installer of the same group ends an earlier one."""

    def __init__(self, store: StateStore, group_id: int, above: int = 0, source: str = "") -> None:
        """`above`: only a state as of a later entry is taken. `source` is who sends it. Raises StorageFailed."""
        self.group_id = group_id
        self.source = source
        self.position = Position(0, 0, 0, 0, b"")
        """Where to go on after a refused chunk or a broken transfer; grows with whole rows only."""
        self._store = store
        self._rows = store.group(group_id)
        self.above = above
        self._term = 0
        self._number = 0
        self._checksum = 0
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self.complete = False
        """The last chunk has come."""
        self._generation = self._rows.generation + 1
        self._prefix = _PREFIX.pack(b"R", group_id, self._generation)
        store.installers[group_id] = self
        store.drop(group_id, self._generation)

    def feed(self, chunk: bytes) -> None:
        """The next chunk. Raises SnapshotInvalid if it is damaged, not the next one, or of an older state; it changed
        nothing then. Raises StorageFailed."""
        self._check_present()
        if self.complete:
            raise self._invalid("a chunk after the last one")
        try:
            kind, body, checksum = unseal(chunk, self._number, self._checksum)
            if kind == b"H":
                self._take_header(body)
            elif kind == b"P":
                self._take_part(body)
            elif kind == b"R":
                self._take_rows(b"".join((*self._parts, body)) if self._parts else body)
            else:
                self._take_trailer(body)
        except ChunkInvalid as error:
            raise self._invalid(str(error)) from None
        self._number, self._checksum = self._number + 1, checksum
        if kind != b"P":
            self.position = Position(self.position.index, self._number, checksum, self.position.rows, self.position.last_key)

    def rewind(self) -> Position:
        """Forgets parts of a row that is not complete; returns where to go on."""
        self._parts, self._parts_bytes = [], 0
        self._number, self._checksum = self.position.number, self.position.checksum
        return self.position

    def finish(self) -> tuple[int, int]:
        """Makes the snapshot the group's state, durably; returns its applied (index, term). Sync the store before, so that
        little is left to be synced here. Raises SnapshotInvalid if it is not complete or no longer newer than the state."""
        self._check_present()
        if not self.complete:
            raise self._invalid("it broke off")
        index = self.position.index
        self._check_newer(index)
        self._rows.flip(self._generation, index, self._term)
        del self._store.installers[self.group_id]
        return index, self._term

    def abort(self) -> None:
        """Drops what came, unless it was finished. Raises StorageFailed."""
        if self._store.installers.get(self.group_id) is self:
            del self._store.installers[self.group_id]
            self._store.drop(self.group_id, self._generation)

    def __repr__(self) -> str:
        return f"<installer of group {self.group_id} as of entry {self.position.index}: {self.position.rows} rows>"

    def _check_present(self) -> None:
        if self._store.installers.get(self.group_id) is not self:
            raise self._invalid("it was ended, or another one was begun")

    def _check_newer(self, index: int) -> None:
        applied = max(self.above, self._rows.applied_index)
        if index <= applied:
            raise self._invalid(f"as of entry {index}, but {applied} is applied here")

    def _take_header(self, body: bytes) -> None:
        header = unpack_header(body)
        if header.group != self.group_id:
            raise self._invalid(f"of group {header.group}")
        self._check_newer(header.index)
        self._term = header.term
        self.position = Position(header.index, 0, 0, 0, b"")

    def _take_part(self, body: bytes) -> None:
        if self._parts_bytes + len(body) > ROW_BYTES_MAX:
            raise self._invalid(f"a row of more than {ROW_BYTES_MAX} bytes")
        self._parts.append(body)
        self._parts_bytes += len(body)

    def _take_rows(self, body: bytes) -> None:
        batch = WriteBatch(raw_mode=True)
        put, prefix, last = batch.put, self._prefix, self.position.last_key
        first = not self.position.rows
        at = count = 0
        while at < len(body):
            if at + ROW.size > len(body):
                raise self._invalid("a row is cut")
            key_bytes, value_bytes = ROW.unpack_from(body, at)
            at += ROW.size
            middle = at + key_bytes
            end = middle + value_bytes
            if end > len(body):
                raise self._invalid("a row is cut")
            key = body[at:middle]
            if key <= last and not first:
                raise self._invalid("rows are not in order")
            put(prefix + key, body[middle:end])
            first, last, at = False, key, end
            count += 1
        self._store.write(batch)
        self._parts, self._parts_bytes = [], 0
        self.position = Position(self.position.index, self._number, self._checksum, self.position.rows + count, last)

    def _take_trailer(self, body: bytes) -> None:
        if unpack_trailer(body) != self.position.rows or self._parts:
            raise self._invalid(f"{self.position.rows} rows came, but not all there are")
        self.complete = True

    def _invalid(self, why: str) -> SnapshotInvalid:
        return SnapshotInvalid(f"the snapshot of group {self.group_id}: {why}")
