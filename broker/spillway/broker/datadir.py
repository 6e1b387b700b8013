"""The data directory: whose it is, and which format. Checked before anything in it is opened."""
from __future__ import annotations

import json
import os
from pathlib import Path

from spillway.broker.config import NodeConfig
from spillway.broker.errors import DataDirError

FORMAT = 1  # raised when a directory of this version cannot be read by the previous one
FILE = "node.json"


def claim(config: NodeConfig) -> Path:
    """Creates the directory or checks that it is this node's. Raises DataDirError with the remedy."""
    path = Path(config.data_dir)
    file = path / FILE
    mine = {"format": FORMAT, "node_id": config.node_id, "cluster": config.cluster, "shards": config.shards,
            "replicas": config.replicas}
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(p != _temporary(file) for p in path.iterdir()):  # that one: a first start that was cut short
                raise DataDirError(f"data_dir {path} is not empty and not a Spillway directory; name an empty one")
            _write(file, json.dumps(mine, indent=1))
            return path
        found = json.loads(file.read_text())
    except OSError as e:
        raise DataDirError(f"data_dir {path} cannot be used: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise DataDirError(f"{file} is damaged; restore it from a backup, or replace this node by an empty one") from None
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise DataDirError(f"{file} is damaged; restore it from a backup, or replace this node by an empty one")
    if found["format"] > FORMAT:
        raise DataDirError(f"data_dir {path} has format {found['format']}, written by a newer Spillway; this one reads up "
                           f"to {FORMAT}: start the newer version, or name another directory")
    for setting, remedy in (("node_id", "start that node here, or name another directory"),
                            ("cluster", "a directory never changes clusters; name another one"),
                            ("shards", "it is fixed when a cluster is created; set it back"),
                            ("replicas", "it is fixed when a cluster is created; set it back")):
        if found.get(setting) != mine[setting]:
            raise DataDirError(f"data_dir {path} belongs to {setting} {found.get(setting)!r}, not {mine[setting]!r}; {remedy}")
    return path


def _temporary(file: Path) -> Path:
    return file.with_suffix(".tmp")


def _write(file: Path, text: str) -> None:
    """Whole or not at all, also after a crash."""
    temporary = _temporary(file)
    with temporary.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(file)
    fd = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
