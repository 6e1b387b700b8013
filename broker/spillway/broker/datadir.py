"""The data directory: whose it is, and which format. Checked before anything in it is opened.

`node.json` is what makes a directory one of ours. A restore writes it last, and has a file of its own in the directory until then: what
a crash leaves of it is no data directory, `serve` says so, and the next restore begins anew. Its format is the feature level of what
is in it: a version that does not know that says so, before it takes a row for damage.
"""
from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spillway.broker.config import NodeConfig
from spillway.broker.core import features
from spillway.broker.errors import DataDirError

FILE = "node.json"
RESTORING = "restoring"  # locked while a restore is at work
_STORES = ("log", "log.synced", "state")


def claim(config: NodeConfig) -> Path:
    """Creates the directory or checks that it is this node's. Raises DataDirError with the remedy."""
    path = Path(config.data_dir)
    file = path / FILE
    mine = _settings(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if (path / RESTORING).exists():
                raise DataDirError(f"data_dir {path} is half of a restore that did not finish; run `spillway restore` again, or empty the "
                                   "directory to begin without the backup")
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
    if found["format"] > features.LEVEL_MAX:
        raise DataDirError(f"data_dir {path} has format {found['format']}, written by a newer Spillway; this one reads up "
                           f"to {features.LEVEL_MAX}: start the newer version, or name another directory")
    if why := features.refusal(found["format"], features.known(config.feature_level_max)):
        raise DataDirError(f"data_dir {path}: {why}")
    for setting, remedy in (("node_id", "start that node here, or name another directory"),
                            ("cluster", "a directory never changes clusters; name another one"),
                            ("shards", "it is fixed when a cluster is created; set it back"),
                            ("replicas", "it is fixed when a cluster is created; set it back")):
        if found.get(setting) != mine[setting]:
            raise DataDirError(f"data_dir {path} belongs to {setting} {found.get(setting)!r}, not {mine[setting]!r}; {remedy}")
    return path


@dataclass
class Restoring:
    """A directory that a restore fills."""

    path: Path
    level: int = features.LEVEL_MIN
    """The feature level of what is in it; whoever fills it says."""


@contextmanager
def restoring(config: NodeConfig) -> Iterator[Restoring]:
    """The directory, empty; it is the node's when the block ends without an error, durably. Raises DataDirError with the remedy if there
    is something in it."""
    path = Path(config.data_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _check_restorable(path)
        marker = (path / RESTORING).open("wb")
    except OSError as e:
        raise DataDirError(f"data_dir {path} cannot be used: {e.strerror}") from None
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_restorable(path)  # another one may just have finished
            for name in _STORES:
                if (path / name).is_dir():
                    shutil.rmtree(path / name)
                else:
                    (path / name).unlink(missing_ok=True)
        except BlockingIOError:
            raise DataDirError(f"another restore is at work in data_dir {path}; wait for it, or name another directory") from None
        except OSError as e:
            raise DataDirError(f"what an earlier restore left in data_dir {path} cannot be removed: {e.strerror}") from None
        filled = Restoring(path)
        yield filled
        try:
            _write(path / FILE, json.dumps({**_settings(config), "format": filled.level}, indent=1))
            (path / RESTORING).unlink()
            _sync_folder(path.absolute().parent)
        except OSError as e:
            raise DataDirError(f"data_dir {path} cannot be written: {e.strerror}") from None


def _check_restorable(path: Path) -> None:
    present = {p.name for p in path.iterdir()}
    if FILE in present:
        raise DataDirError(f"data_dir {path} has the data of a node, and a restore never replaces any; name another directory, or move "
                           "this one away if its cluster is gone")
    if present and RESTORING not in present:
        raise DataDirError(f"data_dir {path} is not empty; name an empty directory, or one that does not exist")


def _settings(config: NodeConfig) -> dict[str, Any]:
    """What a directory is of, for ever."""
    return {"format": features.LEVEL_MIN, "node_id": config.node_id, "cluster": config.cluster, "shards": config.shards,
            "replicas": config.replicas}


def raise_format(path: Path, level: int) -> None:
    """Notes the feature level of what is about to be written into a claimed directory. Raises OSError."""
    file = path / FILE
    found = json.loads(file.read_text())
    if found["format"] < level:
        _write(file, json.dumps({**found, "format": level}, indent=1))


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
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
