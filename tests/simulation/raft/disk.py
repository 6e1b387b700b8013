"""A disk that loses in a crash what was not synced, except for a prefix that chance lets survive."""
from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from spillway.cluster.errors import StorageFailed

Change = tuple[str, bytes, bytes]


class SimBatch:
    """Changes in order."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def put(self, key: bytes, value: bytes) -> None:
        """See Batch."""
        self.changes.append(("put", key, value))

    def delete(self, key: bytes) -> None:
        """See Batch."""
        self.changes.append(("delete", key, b""))

    def delete_range(self, begin: bytes, end: bytes) -> None:
        """See Batch."""
        self.changes.append(("range", begin, end))


def change(rows: dict[bytes, bytes], changes: list[Change]) -> None:
    """Applies changes to rows."""
    for kind, key, value in changes:
        if kind == "put":
            rows[key] = value
        elif kind == "delete":
            rows.pop(key, None)
        else:
            for k in [k for k in rows if key <= k < value]:
                del rows[k]


class SimDisk:
    """A Disk in memory."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}  # as this process sees them
        self.durable: dict[bytes, bytes] = {}
        self.unsynced: list[list[Change]] = []
        self.fails = False

    def batch(self) -> SimBatch:
        """See Disk."""
        return SimBatch()

    def write(self, batch: Any) -> None:
        """See Disk."""
        change(self.rows, batch.changes)
        self.unsynced.append(batch.changes)

    def sync(self) -> None:
        """See Disk."""
        if self.fails:
            raise StorageFailed("the simulated disk fails")
        for changes in self.unsynced:
            change(self.durable, changes)
        self.unsynced = []

    def crash(self, rnd: random.Random) -> None:
        """The process ends; some of the last writes reached the disk, in order, without anybody knowing."""
        for changes in self.unsynced[:rnd.randint(0, len(self.unsynced))]:
            change(self.durable, changes)
        self.unsynced = []
        self.rows = dict(self.durable)
        self.fails = False

    def rest(self) -> None:
        """See Disk."""

    def get(self, key: bytes) -> bytes | None:
        """See Disk."""
        return self.rows.get(key)

    def scan(self, begin: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """See Disk."""
        return iter([(k, self.rows[k]) for k in sorted(k for k in self.rows if begin <= k < end)])

    def close(self) -> None:
        """See Disk."""
