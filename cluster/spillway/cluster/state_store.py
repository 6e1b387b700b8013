"""Rows of every replica of a node in one RocksDB. Knows nothing of queues.

    M <group>                      meta row: format, generation, applied index, applied term
    R <group> <generation> <key>   a row

A commit is one atomic batch of rows and the applied index that they describe; it is durable after the next sync. A
snapshot is written under the next generation and takes effect by one synced flip of the meta row: a crash in the middle
leaves the old state, and the unfinished generation is dropped at the next start.
"""
from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from rocksdict import BlockBasedOptions, Cache, DBRecoveryMode, Options, Rdict, ReadOptions, WriteBatch
from spillway.cluster.errors import SnapshotInvalid, StorageFailed, StoreRefused

FORMAT = 1
WRITE_BUFFER_BYTES = 16 << 20
BLOCK_CACHE_BYTES = 16 << 20
CHUNK_BYTES = 128 << 10  # of a snapshot
EXPORT_BYTES_PER_SECOND = 64 << 20  # leaves room for the traffic of the day
_META = struct.Struct("<BIQQ")
_PREFIX = struct.Struct(">cII")
_ROW = struct.Struct("<II")
_HEADER = struct.Struct("<4sBIQQ")  # magic, format, group, applied index, applied term
_TRAILER = struct.Struct("<4sQI")  # magic, rows, checksum of all chunks


class StateStore:
    """The database. One writer: the node's loop."""

    def __init__(self, path: Path) -> None:
        """Opens or creates it. Raises StoreRefused if it is damaged, locked, or of a newer version."""
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(WRITE_BUFFER_BYTES)
        options.set_max_write_buffer_number(2)
        options.set_max_background_jobs(2)
        options.set_keep_log_file_num(2)
        options.set_max_total_wal_size(128 << 20)
        options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
        table = BlockBasedOptions()
        table.set_block_cache(Cache(BLOCK_CACHE_BYTES))
        table.set_bloom_filter(10, False)
        options.set_block_based_table_factory(table)
        path.mkdir(parents=True, exist_ok=True)
        try:
            self.db = Rdict(str(path), options)
        except Exception as e:
            text = str(e)
            if "lock" in text.lower():
                raise StoreRefused(f"{path} is in use by another process; stop that one, or name another directory") from None
            raise StoreRefused(f"{path} cannot be opened: {text}. If the disk is sound, replace this node by an empty "
                               "one: the others will bring it up to date") from None
        self._groups: dict[int, GroupRows] = {}

    def group(self, group: int) -> GroupRows:
        """The rows of a replica. Raises StoreRefused for a newer format."""
        rows = self._groups.get(group)
        if rows is None:
            rows = self._groups[group] = GroupRows(self, group)
        return rows

    def applied(self, group: int) -> tuple[int, int]:
        """(index, term) of the last entry in a group's rows."""
        rows = self.group(group)
        return rows.applied_index, rows.applied_term

    async def sync(self) -> None:
        """Makes every commit so far durable, in a thread. Raises StorageFailed."""
        marks = [(rows, rows.applied_index) for rows in self._groups.values()]
        await asyncio.get_running_loop().run_in_executor(None, self._flush)
        for rows, index in marks:
            rows.durable_index = max(rows.durable_index, index)

    def sync_now(self) -> None:
        """Makes every commit so far durable, here. Raises StorageFailed."""
        self._flush()
        for rows in self._groups.values():
            rows.durable_index = rows.applied_index

    def rest(self) -> None:
        """Gives back the memory of write buffers; for quiet times, in a thread. Raises StorageFailed."""
        try:
            self.db.flush(True)
        except Exception as e:
            raise StorageFailed(f"the state cannot be written: {e}") from e

    def write(self, batch: WriteBatch) -> None:
        """Writes a batch, unsynced. Raises StorageFailed."""
        try:
            self.db.write(batch)
        except Exception as e:
            raise StorageFailed(f"the state cannot be written: {e}") from e

    def _flush(self) -> None:
        try:
            self.db.flush_wal(True)
        except Exception as e:
            raise StorageFailed(f"the state cannot be synced: {e}") from e

    def close(self) -> None:
        """Closes the database."""
        self.db.close()

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def export(self, group: int) -> AsyncIterator[bytes]:
        """A group's rows as of now: a header, chunks of rows, a trailer, each with a checksum. Memory stays flat."""
        rows = self.group(group)
        # The iterator reads from one RocksDB snapshot, whatever is committed meanwhile.
        read = ReadOptions()
        read.set_iterate_upper_bound(rows.prefix + b"\xff" * 8)
        it = self.db.iter(read)
        it.seek(rows.prefix)
        yield _sealed(_HEADER.pack(b"SWSH", FORMAT, group, rows.applied_index, rows.applied_term))
        cut = len(rows.prefix)
        count, total = 0, 0
        parts: list[bytes] = []
        size = 0
        while True:
            valid = it.valid()
            if valid:
                key, value = it.key()[cut:], it.value()
                parts += (_ROW.pack(len(key), len(value)), key, value)
                size += _ROW.size + len(key) + len(value)
                count += 1
                it.next()
            if parts and (not valid or size >= CHUNK_BYTES):
                chunk = _sealed(b"".join(parts))
                total = zlib.crc32(chunk, total)
                yield chunk
                await asyncio.sleep(size / EXPORT_BYTES_PER_SECOND)
                parts, size = [], 0
            if not valid:
                break
        yield _sealed(_TRAILER.pack(b"SWST", count, total))

    async def install(self, group: int, chunks: AsyncIterator[bytes], above: int) -> tuple[int, int]:
        """Replaces a group's rows by a snapshot, all or nothing; returns its applied index and term. Raises SnapshotInvalid
        (the old state stands) or StorageFailed."""
        rows = self.group(group)
        generation = rows.generation + 1
        prefix = _PREFIX.pack(b"R", group, generation)
        self._drop(group, generation)
        index = term = 0
        count = total = 0
        done = False
        async for chunk in chunks:
            body = _opened(chunk)
            if done:
                raise SnapshotInvalid("chunks after the trailer")
            if not index:
                if len(body) != _HEADER.size:
                    raise SnapshotInvalid("the first chunk is no header")
                magic, version, of, index, term = _HEADER.unpack(body)
                if magic != b"SWSH" or version != FORMAT or of != group:
                    raise SnapshotInvalid(f"a snapshot of group {of}, format {version}; wanted group {group}, format {FORMAT}")
                if index <= max(above, rows.applied_index):
                    raise SnapshotInvalid(f"as of entry {index}, but {max(above, rows.applied_index)} is applied here")
            elif len(body) == _TRAILER.size and body[:4] == b"SWST":
                _, rows_sent, digest = _TRAILER.unpack(body)
                if (rows_sent, digest) != (count, total):
                    raise SnapshotInvalid(f"{count} rows arrived of {rows_sent}, or in another order")
                done = True
            else:
                count += self._install_chunk(prefix, body)
                total = zlib.crc32(chunk, total)
                await asyncio.sleep(0)
        if not done:
            raise SnapshotInvalid("it broke off")
        await asyncio.get_running_loop().run_in_executor(None, self._flush)
        rows.flip(generation, index, term)
        return index, term

    def _install_chunk(self, prefix: bytes, body: bytes) -> int:
        batch = WriteBatch(raw_mode=True)
        at = count = 0
        while at < len(body):
            if at + _ROW.size > len(body):
                raise SnapshotInvalid("a row is cut")
            key_size, value_size = _ROW.unpack_from(body, at)
            at += _ROW.size
            end = at + key_size + value_size
            if end > len(body):
                raise SnapshotInvalid("a row is cut")
            batch.put(prefix + body[at:at + key_size], body[at + key_size:end])
            at = end
            count += 1
        self.write(batch)
        return count

    def _drop(self, group: int, generation: int) -> None:
        batch = WriteBatch(raw_mode=True)
        batch.delete_range(_PREFIX.pack(b"R", group, generation), _PREFIX.pack(b"R", group, generation + 1))
        self.write(batch)


class GroupRows:
    """The rows of one replica."""

    def __init__(self, store: StateStore, group: int) -> None:
        self._store = store
        self._db = store.db
        self._group = group
        self._meta = b"M" + group.to_bytes(4, "big")
        self.generation = 1
        self.applied_index = 0  # of the last commit
        self.applied_term = 0
        meta = self._db.get(self._meta)
        if meta is not None:
            version, self.generation, self.applied_index, self.applied_term = _META.unpack(meta)
            if version > FORMAT:
                raise StoreRefused(f"the state of group {group} has format {version}, written by a newer Spillway; this one "
                                   f"reads up to {FORMAT}: start the newer version")
            store._drop(group, self.generation + 1)
        self.durable_index = self.applied_index  # of the last commit that a sync covered
        self.prefix = _PREFIX.pack(b"R", group, self.generation)

    def get(self, key: bytes) -> bytes | None:
        """A row's value, or None."""
        value: bytes | None = self._db.get(self.prefix + key)
        return value

    def scan(self, start: bytes, end: bytes, limit: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Rows of [start, end) in key order, at most `limit`, as of the first step."""
        prefix = self.prefix
        read = ReadOptions()
        read.set_iterate_upper_bound(prefix + end)
        it: Any = self._db.iter(read)
        it.seek(prefix + start)
        cut = len(prefix)
        while (limit is None or limit > 0) and it.valid():
            yield it.key()[cut:], it.value()
            it.next()
            if limit is not None:
                limit -= 1

    def commit(self, index: int, term: int, puts: list[tuple[bytes, bytes]], deletes: list[bytes],
               delete_ranges: list[tuple[bytes, bytes]]) -> None:
        """One atomic batch: ranges, then deletes, then puts, and the applied index. Raises StorageFailed."""
        assert index >= self.applied_index, "the applied index goes back"
        batch = WriteBatch(raw_mode=True)
        prefix = self.prefix
        for start, end in delete_ranges:
            batch.delete_range(prefix + start, prefix + end)
        for key in deletes:
            batch.delete(prefix + key)
        for key, value in puts:
            batch.put(prefix + key, value)
        batch.put(self._meta, _META.pack(FORMAT, self.generation, index, term))
        self._store.write(batch)
        self.applied_index, self.applied_term = index, term

    def flip(self, generation: int, index: int, term: int) -> None:
        """The rows of a finished generation become the state; durable on return."""
        batch = WriteBatch(raw_mode=True)
        batch.put(self._meta, _META.pack(FORMAT, generation, index, term))
        batch.delete_range(self.prefix, _PREFIX.pack(b"R", self._group, generation))
        self._store.write(batch)
        self._store._flush()
        self.generation = generation
        self.prefix = _PREFIX.pack(b"R", self._group, generation)
        self.applied_index = self.durable_index = index
        self.applied_term = term


def _sealed(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(4, "little") + body


def _opened(chunk: bytes) -> bytes:
    if len(chunk) < 5 or zlib.crc32(chunk[4:]) != int.from_bytes(chunk[:4], "little"):
        raise SnapshotInvalid("a chunk's checksum is wrong")
    return chunk[4:]
