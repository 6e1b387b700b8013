"""Numbers that processes share: each cell has one writer, everybody reads."""
from __future__ import annotations

import mmap
import os
import struct

CELLS = 16
# Cells.
SENT, PRODUCED, DELIVERED, SETTLED, REFUSED = range(5)
READY_PRODUCER, READY_CONSUMER, READY_BURST, GO, DUMPED, STOP, FINISH = range(5, 12)


class Counters:
    """A block of shared memory without a name: passed on as a file descriptor, gone with its last user."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("bench-counters", 0)
            os.ftruncate(fd, 8 * CELLS)
        self.fd = fd
        self._map = mmap.mmap(fd, 8 * CELLS)

    def __getitem__(self, cell: int) -> int:
        value: int = struct.unpack_from("=Q", self._map, 8 * cell)[0]
        return value

    def __setitem__(self, cell: int, value: int) -> None:
        struct.pack_into("=Q", self._map, 8 * cell, value)

    def close(self) -> None:
        """Lets go of it."""
        self._map.close()
        os.close(self.fd)
