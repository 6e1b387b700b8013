"""A backup: a directory with one file for each group, and `backup.json`, which says what they are.

    meta.group        the meta group: destinations, routes, operators' gates
    shard-0001.group  a shard: queues, messages, leases, dead letters, producers
    backup.json       see Manifest; written last: a directory without it is no backup

A group's file holds its state as of one moment (see `snapshot`): chunks, each after its length (4 bytes, little-endian). Whoever
changes what the files mean raises FORMAT.
"""
from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spillway.contract.limits import SHARDS_MAX
from spillway.contract.snapshot import CHUNK_BYTES_MAX, ChunkInvalid, unpack_header, unpack_trailer, unseal

FORMAT = 1
FILE = "backup.json"
MANIFEST_BYTES_MAX = 1 << 20  # of 1025 groups, with room
META_GROUP = 0
NUMBER_MAX = 1 << 62  # of indexes and terms, as between nodes
REPLICAS_MAX = 7
LENGTH = struct.Struct("<I")
_DAMAGED = "take another backup; one whose checksums fit is whole"


class BackupInvalid(Exception):
    """A backup is incomplete, damaged, or of a newer version; says what to do."""


@dataclass(frozen=True, slots=True)
class GroupFile:
    """What is known of a group's file."""

    group: int
    """0: meta; else the shard."""
    index: int
    """Of the last log entry in it."""
    term: int
    """Of that entry."""
    rows: int
    bytes: int
    """Of the file."""
    sha256: str
    """Of the file, in hexadecimal."""

    @property
    def name(self) -> str:
        """Of the file."""
        return file_name(self.group)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `backup.json` says."""

    cluster: str
    shards: int
    replicas: int
    version: str
    """Of the software that the cluster ran."""
    begun: datetime
    """Everything acknowledged before is in it."""
    ended: datetime
    groups: tuple[GroupFile, ...]
    """By number: the meta group, then every shard."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(group.bytes for group in self.groups)

    @property
    def rows(self) -> int:
        """In all files."""
        return sum(group.rows for group in self.groups)


def file_name(group: int) -> str:
    """Of a group's file."""
    return "meta.group" if group == META_GROUP else f"shard-{group:04}.group"


def encode_manifest(manifest: Manifest) -> str:
    """The text of `backup.json`."""
    groups = [{"group": g.group, "file": g.name, **{k: v for k, v in asdict(g).items() if k != "group"}} for g in manifest.groups]
    return json.dumps({
        "format": FORMAT, "cluster": manifest.cluster, "shards": manifest.shards, "replicas": manifest.replicas,
        "version": manifest.version, "begun": manifest.begun.isoformat(), "ended": manifest.ended.isoformat(), "groups": groups,
    }, indent=1) + "\n"


def decode_manifest(text: bytes) -> Manifest:
    """The inverse of `encode_manifest`. Raises BackupInvalid."""
    try:
        found = json.loads(text)
        version = _number(found, "format")
        if version > FORMAT:
            raise BackupInvalid(f"{FILE} has format {version}, written by a newer Spillway; this one reads up to {FORMAT}: use the newer "
                                "version")
        shards = _number(found, "shards", 1, SHARDS_MAX)
        groups = tuple(_group(one) for one in _typed(found, "groups", list))
        if [g.group for g in groups] != list(range(shards + 1)):
            raise ValueError(f"it has {shards} shards, and not the files of exactly these")
        return Manifest(_typed(found, "cluster", str), shards, _number(found, "replicas", 1, REPLICAS_MAX), _typed(found, "version", str),
                        _time(found, "begun"), _time(found, "ended"), groups)
    except (ValueError, RecursionError) as error:
        raise BackupInvalid(f"{FILE} is damaged: {error}; {_DAMAGED}") from None


def _typed(found: Any, name: str, kind: type) -> Any:
    if not isinstance(found, dict) or type(found.get(name)) is not kind:
        raise ValueError(f"it has no {name}")
    return found[name]


def _number(found: Any, name: str, least: int = 0, most: int = NUMBER_MAX) -> int:
    number: int = _typed(found, name, int)
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}")
    return number


def _time(found: Any, name: str) -> datetime:
    moment = datetime.fromisoformat(_typed(found, name, str))
    if moment.tzinfo is None:
        raise ValueError(f"{name} has no time zone")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{name} is {moment}") from None


def _group(found: Any) -> GroupFile:
    group = _number(found, "group", 0, SHARDS_MAX)
    if _typed(found, "file", str) != file_name(group):  # no other file is ever opened
        raise ValueError(f"the file of group {group} is not {file_name(group)}")
    digest: str = _typed(found, "sha256", str)
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ValueError(f"the sha256 of group {group} is none")
    return GroupFile(group, _number(found, "index", 1), _number(found, "term"), _number(found, "rows"), _number(found, "bytes"), digest)


def read_manifest(directory: Path) -> Manifest:
    """What a backup says of itself. Raises BackupInvalid, also if it is none, or files are missing or of another size."""
    file = directory / FILE
    try:
        with file.open("rb") as f:
            text = f.read(MANIFEST_BYTES_MAX)
    except FileNotFoundError:
        raise BackupInvalid(f"{directory} is no backup, or one that did not finish: it has no {FILE}; name a whole one") from None
    except OSError as error:
        raise BackupInvalid(f"{file} cannot be read: {error.strerror}") from None
    try:
        manifest = decode_manifest(text)
    except BackupInvalid as error:
        raise BackupInvalid(f"{directory}: {error}") from None
    for group in manifest.groups:
        try:
            size = (directory / group.name).stat().st_size
        except OSError as error:
            raise BackupInvalid(f"{directory / group.name} cannot be read: {error.strerror}; {_DAMAGED}") from None
        if size != group.bytes:
            raise BackupInvalid(f"{directory / group.name} has {size} bytes, not {group.bytes}; {_DAMAGED}")
    return manifest


class Chain:
    """Checks the chunks of one group's state as they come."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.index = 0
        self.term = 0
        self.rows = 0
        self.complete = False
        self._number = 0
        self._checksum = 0

    def take(self, chunk: bytes) -> None:
        """The next chunk. Raises ChunkInvalid."""
        if self.complete:
            raise ChunkInvalid("a chunk after the last one")
        kind, body, self._checksum = unseal(chunk, self._number, self._checksum)
        self._number += 1
        if kind == b"H":
            header = unpack_header(body)
            if header.group != self.group:
                raise ChunkInvalid(f"of group {header.group}")
            self.index, self.term = header.index, header.term
        elif kind == b"T":
            self.rows = unpack_trailer(body)
            self.complete = True


def read_chunks(directory: Path, group: GroupFile) -> Iterator[bytes]:
    """The chunks of a group's file. Raises BackupInvalid as soon as something is not as the manifest says, at the latest at the end."""
    path = directory / group.name
    chain = Chain(group.group)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while head := file.read(LENGTH.size):
                if len(head) < LENGTH.size or (size := LENGTH.unpack(head)[0]) > CHUNK_BYTES_MAX:
                    raise ChunkInvalid("the length of a chunk is none")
                chunk = file.read(size)
                digest.update(head)
                digest.update(chunk)
                chain.take(chunk)
                yield chunk
        if not chain.complete:
            raise ChunkInvalid("it breaks off")
        if (chain.index, chain.term, chain.rows, digest.hexdigest()) != (group.index, group.term, group.rows, group.sha256):
            raise ChunkInvalid(f"it is not the one that {FILE} speaks of")
    except ChunkInvalid as error:
        raise BackupInvalid(f"{path} is damaged: {error}; {_DAMAGED}") from None
    except OSError as error:
        raise BackupInvalid(f"{path} cannot be read: {error.strerror}") from None

