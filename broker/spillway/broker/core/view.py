"""A View in memory, for simulation, property tests and users' fakes: the rows of a shard in a sorted list."""
from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from spillway.broker.core.shard import Checkpoint


class MemoryView:
    """Rows of one shard in memory; takes the same checkpoints as the store."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []

    def get(self, key: bytes) -> bytes | None:
        """The row's value or None."""
        return self.rows.get(key)

    def scan(self, start: bytes, end: bytes, limit: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Rows of [start, end) in key order as of now, at most `limit`."""
        keys = self._keys[bisect_left(self._keys, start):bisect_left(self._keys, end)]
        return iter([(k, self.rows[k]) for k in keys[:limit]])

    def commit(self, checkpoint: Checkpoint) -> None:
        """Ranges, then deletes, then puts."""
        for start, end in checkpoint.ranges:
            for key in self._keys[bisect_left(self._keys, start):bisect_left(self._keys, end)]:
                self._delete(key)
        for key in checkpoint.deletes:
            self._delete(key)
        for key, value in checkpoint.puts:
            if key not in self.rows:
                insort(self._keys, key)
            self.rows[key] = value

    def _delete(self, key: bytes) -> None:
        if self.rows.pop(key, None) is not None:
            del self._keys[bisect_left(self._keys, key)]
