"""What RocksDB complains of, by its words: it has no other way to tell."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def is_damage(text: str) -> bool:
    """Whether an error of RocksDB says that something on the disk is changed or gone."""
    return "Corruption" in text or "No such file or directory" in text


def close_database(db: Any, path: Path) -> None:
    """Closes a database. What it complains of then, such as damage that a compaction met, is logged and no more: whatever counts was synced
    before, and who closes a database because of an error has said what it is."""
    try:
        db.close()
    except Exception as error:
        log.warning("%s was closed, and RocksDB says: %s", path, error)
