"""What a backup has of a shard, as the shard that a restored cluster would begin with."""
from __future__ import annotations

from pathlib import Path

from spillway.broker.core.shard import Checkpoint, Shard
from spillway.broker.core.view import MemoryView
from spillway.contract.backup import GroupFile, read_chunks
from spillway.contract.snapshot import ROW, unseal


def shard_in(directory: Path, group: GroupFile) -> Shard:
    """The shard of a group's file. Raises BackupInvalid."""
    found = Checkpoint()
    checksum, parts = 0, b""
    for number, chunk in enumerate(read_chunks(directory, group)):
        kind, body, checksum = unseal(chunk, number, checksum)
        if kind == b"P":
            parts += body
        elif kind == b"R":
            _take_rows(parts + body, found)
            parts = b""
    view = MemoryView()
    view.commit(found)
    return Shard(view)


def _take_rows(body: bytes, into: Checkpoint) -> None:
    at = 0
    while at < len(body):
        key, value = ROW.unpack_from(body, at)
        at += ROW.size
        into.puts.append((body[at:at + key], body[at + key:at + key + value]))
        at += key + value
