"""A first-in first-out list of names in a few large buffers.

The scheduler keeps the name of every queue that waits, and there may be millions. As objects of their own they would cost
three times their bytes, and, freed in another order than they were made, would leave the interpreter's arenas half empty:
memory that a process never gives back. Buffers go back whole."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

CHUNK_BYTES = 128 << 10  # of a buffer; beyond it the next one begins
_LENGTH_BYTES = 2


class NameQueue:
    """Names of up to 65,535 bytes, in the order in which they were appended."""

    __slots__ = ("_at", "_count", "_first", "_last", "_more")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._first: bytes | bytearray = bytearray()  # read from `_at` on
        self._at = 0
        self._more: deque[bytes] | None = None  # full buffers between first and last
        self._last: bytearray = self._first  # appended to; may be the first one itself
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, name: bytes) -> None:
        """Adds a name at the end."""
        last = self._last
        last += len(name).to_bytes(_LENGTH_BYTES)
        last += name
        self._count += 1
        if len(last) > CHUNK_BYTES:
            if self._first is last:
                self._first = bytes(last)
            else:
                if self._more is None:
                    self._more = deque()
                self._more.append(bytes(last))
            self._last = bytearray()

    def popleft(self) -> bytes:
        """Takes the first name. IndexError if there is none."""
        first, at = self._first, self._at
        start = at + _LENGTH_BYTES
        end = start + (first[at] << 8 | first[at + 1])
        name = bytes(first[start:end])
        self._at = end
        self._count -= 1
        if end == len(first):
            self._advance()
        elif end > CHUNK_BYTES >> 2 and first is self._last:  # a list that never empties must not grow for ever
            del self._last[:end]
            self._at = 0
        return name

    def _advance(self) -> None:
        """The first buffer is read to its end."""
        if self._more:
            self._first = self._more.popleft()
            self._at = 0
        elif self._count:
            self._first, self._at = self._last, 0
        else:
            self._clear()

    def __iter__(self) -> Iterator[bytes]:
        at = self._at
        for buffer in (self._first, *(self._more or ()), *(() if self._last is self._first else (self._last,))):
            while at < len(buffer):
                start = at + _LENGTH_BYTES
                at = start + (buffer[at] << 8 | buffer[at + 1])
                yield bytes(buffer[start:at])
            at = 0

    def retain(self, wanted: Callable[[bytes], bool]) -> None:
        """Drops the names that are not wanted. Linear."""
        kept = NameQueue()
        for name in self:
            if wanted(name):
                kept.append(name)
        self._first, self._at, self._more, self._last, self._count = kept._first, kept._at, kept._more, kept._last, kept._count
