"""Files that are read again when they change."""
from __future__ import annotations

from pathlib import Path


def stamp_of(path: str | Path) -> tuple[int, int, int]:
    """What differs once a file was written or replaced, by a symbolic link that points elsewhere, too. Raises OSError."""
    found = Path(path).stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
