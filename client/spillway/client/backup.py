"""The files of a backup while they come in; `contract.backup` has what they are. Nothing here asks the cluster for anything."""
from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

from spillway.client.errors import BackupError, InternalError, InvalidArgument, Unavailable
from spillway.client.model import BackupProgress
from spillway.contract import backup as format_
from spillway.contract.backup import LENGTH, META_GROUP, BackupInvalid, Chain, GroupFile, Manifest, encode_manifest, file_name
from spillway.contract.snapshot import ChunkInvalid
from spillway.v1 import cluster_service_pb2 as pb

SILENCE_SECONDS = 30.0  # a node waits up to 10 s for a leader and what it needs of it, then chunks follow each other


class BackupWriter:
    """A backup in a directory. Shards come first, and the meta group last: so every destination that a shard has messages of is known
    there."""

    def __init__(self, directory: Path, on_progress: Callable[[BackupProgress], None]) -> None:
        """Makes the directory. Raises InvalidArgument if there is something in it, BackupError."""
        self._directory = directory
        self._on_progress = on_progress
        self._begun = datetime.now(UTC)
        self._cluster: pb.BackupCluster | None = None
        self._groups: list[GroupFile] = []
        self._open: list[ChunkReader] = []
        with _translated(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds payloads and secrets
            if next(directory.iterdir(), None) is not None:
                raise InvalidArgument("directory", f"{directory} is not empty, and a backup never overwrites anything; name a new one")

    def next_group(self) -> int | None:
        """Which group to read next; None if all are there."""
        done = len(self._groups)
        if self._cluster is None or done < self._cluster.shard_count:
            return done + 1
        return META_GROUP if done == self._cluster.shard_count else None

    def reader(self, group: int) -> ChunkReader:
        """Takes in that group."""
        reader = ChunkReader(self, group)
        self._open.append(reader)
        return reader

    def open(self, group: int) -> IO[bytes]:
        """A file for a group, for nobody else's eyes. Raises BackupError."""
        path = self._directory / file_name(group)
        with _translated(path):
            return open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600))

    def belongs(self, cluster: pb.BackupCluster) -> None:
        """Whether a group is of the cluster whose others are here. Raises InternalError."""
        known = self._cluster
        if known is None:
            self._cluster = cluster
        elif (known.cluster, known.shard_count) != (cluster.cluster, cluster.shard_count):
            raise InternalError(f"the addresses are of two clusters: {known.cluster!r} and {cluster.cluster!r}")

    def wrote(self, bytes_: int) -> None:
        """So much of the present group is written."""
        groups = 0 if self._cluster is None else self._cluster.shard_count + 1
        self._on_progress(BackupProgress(len(self._groups), groups, sum(g.bytes for g in self._groups) + bytes_))

    def add(self, group: GroupFile) -> None:
        """A group is complete, and on the disk."""
        self._groups.append(group)
        self.wrote(0)

    def finish(self) -> Manifest:
        """Says that this is a backup; durable on return. Raises BackupError."""
        cluster = self._cluster
        assert cluster is not None and self.next_group() is None
        groups = tuple(sorted(self._groups, key=lambda g: g.group))
        manifest = Manifest(cluster.cluster, cluster.shard_count, cluster.replica_count, cluster.version, self._begun, datetime.now(UTC),
                            groups)
        file = self._directory / format_.FILE
        with _translated(file):
            temporary = file.with_suffix(".tmp")
            with temporary.open("w") as f:
                f.write(encode_manifest(manifest))
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(file)
            for folder in (self._directory, self._directory.absolute().parent):
                _sync_folder(folder)
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._open:
            reader.close()


class ChunkReader:
    """One group on its way into its file."""

    def __init__(self, writer: BackupWriter, group: int) -> None:
        self._writer = writer
        self._group = group
        self._file: IO[bytes] | None = None

    async def read(self, stub: Any) -> None:
        """Asks a node for the group and writes its file, from the beginning. Raises Unavailable if the stream broke or was damaged on its
        way: then another attempt may succeed. Raises BackupError, grpc.aio.AioRpcError."""
        self.close()
        file = self._file = self._writer.open(self._group)
        chain, digest, size = Chain(self._group), hashlib.sha256(), 0
        call: Any = stub.Backup(pb.BackupRequest(group=self._group))
        parts = aiter(call)
        try:
            while True:
                async with asyncio.timeout(SILENCE_SECONDS):
                    part: pb.BackupResponse | None = await anext(parts, None)
                if part is None:
                    break
                if part.WhichOneof("part") == "cluster":
                    self._writer.belongs(part.cluster)
                    continue
                chain.take(part.chunk)
                framed = LENGTH.pack(len(part.chunk)) + part.chunk
                digest.update(framed)
                size += len(framed)
                with _translated(Path(file.name)):
                    file.write(framed)
                self._writer.wrote(size)
            if not chain.complete:
                raise ChunkInvalid("it broke off")
        except ChunkInvalid as error:
            raise Unavailable(f"group {self._group} came damaged: {error}") from None
        except TimeoutError:
            raise Unavailable(f"group {self._group}: nothing came for {SILENCE_SECONDS:.0f} s") from None
        finally:
            call.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._sync, file)
        self._writer.add(GroupFile(self._group, chain.index, chain.term, chain.rows, size, digest.hexdigest()))

    def _sync(self, file: IO[bytes]) -> None:
        with _translated(Path(file.name)):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def close(self) -> None:
        """Releases the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written was told already
                self._file.close()


def verify_backup(directory: str | Path, on_progress: Callable[[BackupProgress], None] = lambda progress: None) -> Manifest:
    """Reads all of a backup and checks it; no cluster is needed. Raises BackupError with what is wrong."""
    try:
        manifest = format_.read_manifest(Path(directory))
        done = 0
        for number, group in enumerate(manifest.groups):
            for chunk in format_.read_chunks(Path(directory), group):
                done += LENGTH.size + len(chunk)
                on_progress(BackupProgress(number, len(manifest.groups), done))
    except BackupInvalid as error:
        raise BackupError(str(error)) from None
    return manifest


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackupError(f"{path} cannot be written: {error.strerror or error}") from None


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
