"""Damage to files of a node that is down, as bad disks and bad hands do it."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

FILES = {
    "node identity": "node.json",
    "log WAL": "log/*.log", "log table": "log/*.sst", "log MANIFEST": "log/MANIFEST-*", "log CURRENT": "log/CURRENT",
    "state WAL": "state/*.log", "state table": "state/*.sst", "state blobs": "state/*.blob", "state MANIFEST": "state/MANIFEST-*",
    "state CURRENT": "state/CURRENT",
}
WAYS = ("flip", "truncate", "tail", "zeros", "delete")
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Damage:
    """One file of a node's directory, and what is done to it."""

    what: str  # of FILES
    way: str  # of WAYS

    def inflict(self, data_dir: Path, chance: Random) -> str:
        """Damages the largest file of the kind; returns what was done, empty if there is no such file with anything in it."""
        found = [path for path in data_dir.glob(FILES[self.what]) if path.stat().st_size]
        if not found:
            return ""
        path = max(found, key=lambda one: (one.stat().st_size, one.name))
        size = path.stat().st_size
        at = chance.randrange(size)
        if self.way == "delete":
            path.unlink()
            return f"{path.name} of {size} bytes deleted"
        with path.open("r+b") as file:
            if self.way == "flip":
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes((byte ^ 1 << chance.randrange(8),)))
            elif self.way == "truncate":
                file.truncate(at)
            elif self.way == "tail":
                at = max(0, size - 1 - chance.randrange(64))
                file.truncate(at)
            else:
                at -= at % PAGE_BYTES
                file.seek(at)
                file.write(bytes(min(PAGE_BYTES, size - at)))
        return f"{path.name} of {size} bytes: {self.way} at {at}"
