"""Disks of nodes that can be full: file systems in memory, of their own, mounted where the node's directory is."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

FILLER = "filler"


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
        """Takes all space but so much."""
        path = self._directory / node_id
        free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
        with (path / FILLER).open("ab") as file:
            size = file.tell() + max(0, free - leave_bytes)
            if size:
                os.posix_fallocate(file.fileno(), 0, size)

    def free(self, node_id: str) -> None:
        """Gives the space back."""
        (self._directory / node_id / FILLER).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmounts them."""
        for path in self._mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)
        self._mounted.clear()
