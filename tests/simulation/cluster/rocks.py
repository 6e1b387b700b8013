"""The part of rocksdict that the state store uses, in memory: a database whose unsynced end a crash takes.

A crash keeps a prefix of the batches that were not synced, as RocksDB's write-ahead log does. Damaged rows are found when they
are read, as checksums find them. `tests/simulation/cluster/test_rocks.py` runs the same steps on RocksDB and compares.
"""
from __future__ import annotations

import random
from bisect import bisect_left, insort
from typing import Any

Change = tuple[str, bytes, bytes]


class WriteBatch:
    """Changes that take effect together, in order."""

    def __init__(self, raw_mode: bool = True) -> None:
        self.changes: list[Change] = []

    def put(self, key: bytes, value: bytes) -> None:
        """Sets a row."""
        self.changes.append(("put", key, value))

    def delete(self, key: bytes) -> None:
        """Removes a row."""
        self.changes.append(("delete", key, b""))

    def delete_range(self, begin: bytes, end: bytes) -> None:
        """Removes the rows of [begin, end)."""
        self.changes.append(("range", begin, end))


class ReadOptions:
    """Up to where to read."""

    def __init__(self) -> None:
        self.end: bytes | None = None

    def set_iterate_upper_bound(self, end: bytes) -> None:
        """The first key that is not read."""
        self.end = end

    def fill_cache(self, yes: bool) -> None:
        """There is no cache."""

    def set_readahead_size(self, size: int) -> None:
        """There is nothing to read ahead."""


class Table:
    """Sorted rows. Whoever reads holds on to a version; the next change then makes another."""

    def __init__(self, rows: dict[bytes, bytes] | None = None) -> None:
        self.rows = dict(rows or {})
        self.keys = sorted(self.rows)
        self.shared = False

    def version(self) -> Table:
        """The rows as of now, for reading."""
        self.shared = True
        out = Table.__new__(Table)
        out.rows, out.keys, out.shared = self.rows, self.keys, True
        return out

    def apply(self, changes: list[Change]) -> None:
        """Changes rows."""
        if self.shared:
            self.rows, self.keys, self.shared = dict(self.rows), list(self.keys), False
        rows, keys = self.rows, self.keys
        for kind, key, value in changes:
            if kind == "put":
                if key not in rows:
                    insort(keys, key)
                rows[key] = value
            elif kind == "delete":
                if rows.pop(key, None) is not None:
                    del keys[bisect_left(keys, key)]
            else:
                begin, end = bisect_left(keys, key), bisect_left(keys, value)
                for k in keys[begin:end]:
                    del rows[k]
                del keys[begin:end]


class Cursor:
    """An iterator."""

    def __init__(self, table: Table, bad: set[bytes], end: bytes | None) -> None:
        self._table = table
        self._bad = bad
        self._end = len(table.keys) if end is None else bisect_left(table.keys, end)
        self._at = self._end
        self._broken = False

    def seek(self, key: bytes) -> None:
        """To the first row from a key on."""
        self._at = bisect_left(self._table.keys, key)
        self._look()

    def _look(self) -> None:
        if self._bad and self._at < self._end and self._table.keys[self._at] in self._bad:
            self._broken = True

    def valid(self) -> bool:
        """Whether there is a row, and it is sound."""
        return self._at < self._end and not self._broken

    def key(self) -> bytes:
        """The row's key."""
        return self._table.keys[self._at]

    def value(self) -> bytes:
        """The row's value."""
        return self._table.rows[self._table.keys[self._at]]

    def next(self) -> None:
        """To the next row."""
        self._at += 1
        self._look()

    def status(self) -> None:
        """Raises if the iterator stopped at damage."""
        if self._broken:
            raise OSError("Corruption: block checksum mismatch (simulated)")


class Disk:
    """What survives a process."""

    def __init__(self) -> None:
        self.durable: dict[bytes, bytes] = {}
        self.unsynced: list[list[Change]] = []
        self.bad: set[bytes] = set()
        """Keys of rows with a flipped bit."""
        self.full = False
        self.fails = False
        self.mark = 0
        """What the file beside the log says: see journal.SyncMark. Of the values of this life any may be the one that stays."""
        self.marks: list[int] = []

    def crash(self, rnd: random.Random) -> None:
        """The process ends, or the power fails: a prefix of what was not synced stays."""
        keep = rnd.randint(0, len(self.unsynced))
        table = Table(self.durable)
        for changes in self.unsynced[:keep]:
            table.apply(changes)
        self.durable = table.rows
        self.unsynced = []
        self.mark = rnd.choice([self.mark, *self.marks[-3:]])
        self.marks = []


class Rdict:
    """A database on a Disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._table = Table(disk.durable)
        self._closed = False

    def get(self, key: Any) -> Any:
        """A row, or a list of rows."""
        if isinstance(key, list):
            return [self.get(one) for one in key]
        if key in self._disk.bad and key in self._table.rows:
            raise OSError("Corruption: block checksum mismatch (simulated)")
        return self._table.rows.get(key)

    def write(self, batch: WriteBatch) -> None:
        """Applies a batch, unsynced."""
        if self._disk.full:
            raise OSError("IO error: No space left on device (simulated)")
        for kind, key, _ in batch.changes:
            if kind != "range":
                self._disk.bad.discard(key)
        self._table.apply(batch.changes)
        self._disk.unsynced.append(batch.changes)

    def iter(self, read: ReadOptions) -> Cursor:
        """An iterator as of now."""
        return Cursor(self._table.version(), self._disk.bad, read.end)

    def flush_wal(self, sync: bool) -> None:
        """Makes all batches durable."""
        disk = self._disk
        if disk.fails:
            raise OSError("IO error: Input/output error (simulated)")
        for changes in disk.unsynced:
            for kind, key, value in changes:
                if kind == "put":
                    disk.durable[key] = value
                elif kind == "delete":
                    disk.durable.pop(key, None)
                else:
                    for k in [k for k in disk.durable if key <= k < value]:
                        del disk.durable[k]
        disk.unsynced = []

    def flush(self, wait: bool) -> None:
        """A new write buffer: nothing changes."""

    def property_int_value(self, name: str) -> int:
        """Buffers are empty."""
        return 0

    def close(self) -> None:
        """The end of the process' use."""
