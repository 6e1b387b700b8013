"""Disks of nodes that can be full: file systems in memory, of their own, mounted where the node's directory is."""
from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

FILLER = "filler"
PIECE_BYTES = 1 << 20


class Disks:
    """A disk for each node; none, if the size is 0."""

    def __init__(self, directory: Path, size_mib: int) -> None:
        self._directory = directory
        self._size_mib = size_mib
        self._mounted: list[Path] = []

    @staticmethod
    def missing(directory: Path) -> str:
        """Why they cannot be used here; empty if they can."""
        directory.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], capture_output=True, text=True)
        if done.returncode:
            return f"mount is not permitted: {done.stderr.strip()}"
        subprocess.run(["umount", str(directory)], check=True)
        return ""

    def mount(self, node_id: str) -> None:
        """Makes a node's disk."""
        if self._size_mib:
            path = self._directory / node_id
            path.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self._size_mib}m", "tmpfs", str(path)], check=True)
            self._mounted.append(path)

    def fill(self, node_id: str, leave_bytes: int) -> None:
        """Takes all space but so much, whoever else takes some meanwhile."""
        path = self._directory / node_id
        with (path / FILLER).open("ab", buffering=0) as file:
            while (free := _free(path)) > leave_bytes:
                try:
                    file.write(bytes(min(PIECE_BYTES, free - leave_bytes)))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return

    def free(self, node_id: str) -> None:
        """Gives the space back."""
        (self._directory / node_id / FILLER).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmounts them."""
        for path in self._mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)
        self._mounted.clear()


def _free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
