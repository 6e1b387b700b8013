"""Rows of every replica of a node in one RocksDB. Knows nothing of queues.

    F                              format of the store
    M <group>                      meta row: format, generation, applied index, applied term
    R <group> <generation> <key>   a row

A commit is one atomic batch of rows and the applied index that they describe. It is durable after the next sync; a crash
keeps every commit up to some moment after the last sync and none beyond it. A snapshot is written under the next generation
and takes effect by one synced flip of the meta row (see `snapshots`): a crash in the middle leaves the old state, and the
unfinished generation is dropped at the next start. Whoever changes a row raises FORMAT.

That nothing is missing *before* a commit that survived needs care. RocksDB begins a new write-ahead log with every write
buffer. If the old one was not synced by then, a power cut can take its end and keep the beginning of the new one: later
commits without earlier ones, which no recovery mode notices when the cut falls between two records. So RocksDB never
chooses the moment here: its own limit is out of reach, and buffers are switched by `_switch`, right after a sync.
"""
from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from rocksdict import (
    BlockBasedIndexType,
    BlockBasedOptions,
    Cache,
    DataBlockIndexType,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
)
from spillway.cluster.errors import REPLACE_HINT, SnapshotBroken, StorageDamaged, StorageFailed, StoreRefused
from spillway.cluster.exports import SNAPSHOT_BYTES_PER_SECOND, Exports
from spillway.cluster.rocks import close_database, is_damage
from spillway.cluster.snapshots import RESUME_SECONDS, Exporter, Installer, Position, moment_of

FORMAT = 1
WRITE_BUFFER_BYTES = 16 << 20  # a message that is deleted before its buffer is full never reaches a file
BLOCK_CACHE_BYTES = 16 << 20
BLOB_BYTES_MIN = 16 << 10  # larger values are not rewritten by compactions
OPEN_FILES_MAX = 512
INSTALL_SYNC_BYTES = 8 << 20  # of a snapshot between two syncs, so that none is long
_BUFFERS_MAX = 4  # one is filled while others are written; only a disk that is too slow ever needs more than two
_BUFFER_BYTES_FACTOR = 4  # RocksDB's own limit of a buffer, in ours: out of reach
_FORMAT_KEY = b"F"
_GENERATION_MAX = 0xFFFF_FF00  # each snapshot that is installed takes one, and keys have room for those behind it
_META = struct.Struct("<BIQQ")
_META_KEY = struct.Struct(">cI")
_PREFIX = struct.Struct(">cII")
_INDEX = struct.Struct("<Q")
CONFIGURATION_KEY = b"\xff\xff\xff\xffC"  # beyond the keys of any state machine


class StateStore:
    """The database. One writer: the node's loop."""

    def __init__(self, path: Path, *, write_buffer_bytes: int = WRITE_BUFFER_BYTES,
                 snapshot_bytes_per_second: int = SNAPSHOT_BYTES_PER_SECOND) -> None:
        """Opens or creates it, and drops snapshots that were not finished. All exports together send
        `snapshot_bytes_per_second`. Raises StoreRefused if it is damaged, in use or of a newer format, or if there is no space."""
        self.path = path
        self._write_buffer_bytes = write_buffer_bytes
        self._write_lock = threading.Lock()  # `rest` runs beside the loop
        self._writes = 0
        self._writes_synced = 0
        self._failed: StorageFailed | None = None
        self._groups: dict[int, GroupRows] = {}
        self._exporters: WeakSet[Exporter] = WeakSet()
        self._exports = Exports(self.exporter, snapshot_bytes_per_second)
        self._staged: dict[int, tuple[Installer, asyncio.TimerHandle]] = {}  # by group: what came of snapshots whose transfer broke
        self.unreadable: Callable[[StorageFailed], None] = lambda error: None
        """Called when something cannot be read, before that is raised: whoever asked, a node must not go on with such a state."""
        self.installers: dict[int, Installer] = {}
        """Of groups whose state is being replaced."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.db = Rdict(str(path), _options(write_buffer_bytes))
        except Exception as error:
            raise StoreRefused(_why_not_opened(path, str(error))) from None
        try:
            self._check_format()
            self._drop_unfinished()
        except BaseException as error:
            close_database(self.db, self.path)
            if isinstance(error, (StorageFailed, struct.error, IndexError)) and not isinstance(error, StorageDamaged):
                raise StoreRefused(f"{path} is damaged: {error}. {REPLACE_HINT}") from None
            raise

    def group(self, group_id: int) -> GroupRows:
        """The rows of a replica; the same object each time. Raises StoreRefused for a newer or unreadable format."""
        rows = self._groups.get(group_id)
        if rows is None:
            rows = self._groups[group_id] = GroupRows(self, group_id, self.read(_META_KEY.pack(b"M", group_id)))
        return rows

    def applied(self, group_id: int) -> tuple[int, int]:
        """(index, term) of the last entry in a group's rows; (0, 0) when blank."""
        rows = self.group(group_id)
        return rows.applied_index, rows.applied_term

    def configuration(self, group_id: int) -> tuple[int, bytes] | None:
        """What `GroupRows.configure` stored last. Raises StorageFailed."""
        return self.group(group_id).configuration

    def forget(self, group_id: int) -> None:
        """Drops a replica; durable on return. Its GroupRows are not to be used any more. Raises StorageFailed."""
        batch = WriteBatch(raw_mode=True)
        batch.delete(_META_KEY.pack(b"M", group_id))
        batch.delete_range(_PREFIX.pack(b"R", group_id, 0), _PREFIX.pack(b"R", group_id + 1, 0))
        self.write(batch)
        self._groups.pop(group_id, None)
        self._take_staged(group_id)
        self.installers.pop(group_id, None)
        self.sync_now()

    async def sync(self) -> None:
        """Makes every commit before the call durable, in a thread. Raises StorageFailed."""
        marks, writes = self._marks(), self._writes
        await asyncio.get_running_loop().run_in_executor(None, self._flush_wal)
        self._synced(marks, writes)
        if self._buffered() >= self._write_buffer_bytes // 2:
            self._switch()  # while there is next to nothing left to sync

    def sync_now(self) -> None:
        """Makes every commit so far durable, here. Raises StorageFailed."""
        marks, writes = self._marks(), self._writes
        self._flush_wal()
        self._synced(marks, writes)

    def rest(self) -> None:
        """Gives back the memory of write buffers; for quiet times, in any thread. Raises StorageFailed."""
        self._switch()

    def close(self) -> None:
        """Releases the database. Scans must have ended: RocksDB stays open as long as one of its iterators lives."""
        self._exports.close()
        for _, timer in self._staged.values():
            timer.cancel()  # what came is dropped at the next start
        for exporter in list(self._exporters):
            exporter.close()
        close_database(self.db, self.path)

    def __repr__(self) -> str:
        return f"<state store {self.path}: {len(self._groups)} groups{', failed' if self._failed else ''}>"

    # -- snapshots -----------------------------------------------------------------------------------------------

    def exporter(self, group_id: int) -> Exporter:
        """A group's state as of now, in chunks."""
        rows = self.group(group_id)
        exporter = Exporter(self.db, rows.prefix, group_id, rows.applied_index, rows.applied_term, self.check)
        self._exporters.add(exporter)
        return exporter

    async def pace(self, size: int) -> None:
        """Waits until so many bytes of an exporter may be sent, at the rate that everything shares that sends states."""
        await self._exports.pace(size)

    def export(self, group_id: int, peer: str, position: Position | None) -> AsyncGenerator[bytes, None]:
        """A group's state for another node; see Exports.send."""
        return self._exports.send(group_id, peer, position)

    async def install(self, group_id: int, peer: str, fetch: Callable[[Position | None], AsyncIterator[bytes]],
                      above: int) -> tuple[int, int]:
        """Replaces a group's rows by a snapshot from a peer, all or nothing; returns its applied (index, term). It is durable then,
        and nothing else of the loop runs between the change and the return.

        `fetch(position)` gives the chunks from `position` on, or those of another snapshot from its first one on. After
        SnapshotBroken what came is kept for a while, and the next call for the same peer goes on with it. Raises SnapshotInvalid
        if it is damaged or not above entry `above`; whatever is raised, the old state stands. Raises StorageFailed."""
        installer = self._take_staged(group_id)
        if installer is None or installer.source != peer or installer.position.index <= above:
            installer = Installer(self, group_id, above, peer)
        installer.above = above
        position = installer.rewind()
        goes_on = position.number > 0
        try:
            unsynced = 0
            async for chunk in fetch(position if goes_on else None):
                if goes_on and moment_of(chunk) is not None:
                    installer = Installer(self, group_id, above, peer)
                goes_on = False
                installer.feed(chunk)
                unsynced += len(chunk)
                if unsynced > INSTALL_SYNC_BYTES:
                    unsynced = 0
                    await self.sync()
                else:
                    await asyncio.sleep(0)
            if not installer.complete:  # its sender has ended it, though it said no error: somebody else may have its place
                raise SnapshotBroken(f"the snapshot of group {group_id}: it broke off")
            await self.sync()
            return installer.finish()
        except SnapshotBroken:
            self._stage(installer)
            raise
        except BaseException:
            with suppress(StorageFailed):  # the first error counts
                installer.abort()
            raise

    def _stage(self, installer: Installer) -> None:
        """Keeps what came of a snapshot whose transfer broke."""
        def drop() -> None:
            if self._take_staged(group_id) is not None:
                with suppress(StorageFailed):  # whoever writes next is told
                    installer.abort()

        group_id = installer.group_id
        self._staged[group_id] = installer, asyncio.get_running_loop().call_later(RESUME_SECONDS, drop)

    def _take_staged(self, group_id: int) -> Installer | None:
        installer, timer = self._staged.pop(group_id, (None, None))
        if timer is not None:
            timer.cancel()
        return installer

    # -- for the groups and snapshots of this store ---------------------------------------------------------------

    def read(self, key: bytes) -> bytes | None:
        """A row by its full key. Raises StorageFailed."""
        try:
            value: bytes | None = self.db.get(key)
        except Exception as error:
            raise self._fail("read", error) from error
        return value

    def read_all(self, prefix: bytes, keys: list[bytes]) -> list[bytes | None]:
        """Rows by what follows the prefix in their keys. Raises StorageFailed."""
        try:
            found: Any = self.db.get([prefix + key for key in keys])
        except Exception as error:
            raise self._fail("read", error) from error
        values: list[bytes | None] = found
        return values

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Rows of full keys [start, end), as of the first step. Raises StorageFailed: damage is not an end."""
        read = ReadOptions()
        read.set_iterate_upper_bound(end)
        rows: Any = self.db.iter(read)
        rows.seek(start)
        while rows.valid():
            yield rows.key(), rows.value()
            rows.next()
        self.check(rows)

    def check(self, rows: Any) -> None:
        """Whether an iterator ended because there is no more. Raises StorageFailed."""
        try:
            rows.status()
        except Exception as error:
            raise self._fail("read", error) from error

    def write(self, batch: WriteBatch) -> None:
        """Writes a batch, unsynced. Raises StorageFailed."""
        if self._failed is not None:
            raise self._failed
        if self._buffered() >= self._write_buffer_bytes:
            self._switch()
        with self._write_lock:
            self._writes += 1
            try:
                self.db.write(batch)
            except Exception as error:
                raise self._fail("written", error) from error

    def drop(self, group_id: int, generation: int) -> None:
        """Removes all rows of a generation. Raises StorageFailed."""
        batch = WriteBatch(raw_mode=True)
        batch.delete_range(_PREFIX.pack(b"R", group_id, generation), _PREFIX.pack(b"R", group_id, generation + 1))
        self.write(batch)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _marks(self) -> list[tuple[GroupRows, int]]:
        return [(rows, rows.applied_index) for rows in self._groups.values()]

    def _synced(self, marks: list[tuple[GroupRows, int]], writes: int) -> None:
        self._writes_synced = max(self._writes_synced, writes)
        for rows, index in marks:
            rows.durable_index = max(rows.durable_index, index)

    def _flush_wal(self) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            self.db.flush_wal(True)
        except Exception as error:
            raise self._fail("synced", error) from error

    def _buffered(self) -> int:
        return self.db.property_int_value("rocksdb.cur-size-active-mem-table") or 0

    def _switch(self) -> None:
        """Begins a new write buffer and a new write-ahead log, at a moment when everything older is synced."""
        with self._write_lock:
            if self._writes != self._writes_synced:
                self._flush_wal()
                self._writes_synced = self._writes
            try:
                self.db.flush(False)
            except Exception as error:
                raise self._fail("written", error) from error

    def _fail(self, what: str, error: Exception) -> StorageFailed:
        """After one failed write or sync, later ones may succeed and still mean nothing: the first failure is for good."""
        text = str(error)
        if is_damage(text):
            failed: StorageFailed = StorageDamaged(f"the state in {self.path} cannot be {what}: {text}. {REPLACE_HINT}")
        elif _disk_full(text):
            failed = StorageFailed(f"the state cannot be {what}: the disk of {self.path} is full; free space, then start "
                                   f"again ({text})")
        else:
            failed = StorageFailed(f"the state in {self.path} cannot be {what}: {text}")
        if what == "read":
            self.unreadable(failed)
        elif self._failed is None:
            self._failed = failed
        return failed

    def _check_format(self) -> None:
        stored = self.read(_FORMAT_KEY)
        if stored is None:
            batch = WriteBatch(raw_mode=True)
            batch.put(_FORMAT_KEY, bytes([FORMAT]))
            self.write(batch)
        elif stored[0] > FORMAT:
            raise StoreRefused(f"{self.path} has format {stored[0]}, written by a newer Spillway; this one reads up to "
                               f"{FORMAT}: start the newer version")

    def _drop_unfinished(self) -> None:
        """Leftovers of installs that a crash ended. One seek for each generation."""
        current: dict[int, int] = {}
        for key, meta in list(self.scan(b"M", b"N")):
            group_id = _META_KEY.unpack(key)[1]
            current[group_id] = _unpack_meta(self.path, group_id, meta)[0]
        found: list[tuple[int, int]] = []
        read = ReadOptions()
        read.set_iterate_upper_bound(b"S")
        rows: Any = self.db.iter(read)
        rows.seek(b"R")
        while rows.valid():
            _, group_id, generation = _PREFIX.unpack_from(rows.key())
            found.append((group_id, generation))
            rows.seek(_PREFIX.pack(b"R", group_id, generation + 1))
        self.check(rows)
        for group_id, generation in found:
            if generation != current.get(group_id, 1):
                self.drop(group_id, generation)


class GroupRows:
    """The rows of one replica. For the node's loop only."""

    def __init__(self, store: StateStore, group_id: int, meta: bytes | None) -> None:
        """`meta` is the stored meta row; see StateStore.group."""
        self._store = store
        self._group_id = group_id
        self._meta_key = _META_KEY.pack(b"M", group_id)
        self.generation = 1
        self.applied_index = 0
        """Index of the last commit; 0 when blank."""
        self.applied_term = 0
        if meta is not None:
            self.generation, self.applied_index, self.applied_term = _unpack_meta(store.path, group_id, meta)
        self.durable_index = self.applied_index
        """Index of the last commit that a sync has covered."""
        self.prefix = _PREFIX.pack(b"R", group_id, self.generation)
        self._configuration: bytes | None = None  # not committed yet

    @property
    def configuration(self) -> tuple[int, bytes] | None:
        """The index of the last entry that said who the members are, and what it said. Raises StorageFailed, StorageDamaged."""
        row = self._configuration or self.get(CONFIGURATION_KEY)
        if row is not None and len(row) < _INDEX.size:
            raise StorageDamaged(f"the state of group {self._group_id} in {self._store.path} is damaged: its row of the configuration is "
                                 f"cut. {REPLACE_HINT}")
        return None if row is None else (_INDEX.unpack_from(row)[0], row[_INDEX.size:])

    def configure(self, index: int, configuration: bytes) -> None:
        """Stores, with the next commit, who the members are by entry `index`."""
        self._configuration = _INDEX.pack(index) + configuration

    def get(self, key: bytes) -> bytes | None:
        """A row's value, or None. Raises StorageFailed."""
        return self._store.read(self.prefix + key)

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """Values of rows, None where there is none, in the order of `keys`. Raises StorageFailed."""
        return self._store.read_all(self.prefix, keys)

    def scan(self, start: bytes, end: bytes, limit: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Rows of [start, end) in key order, at most `limit`, as of the first step. Raises StorageFailed."""
        prefix = self.prefix
        if limit is not None and limit <= 0:
            return
        read = ReadOptions()
        read.set_iterate_upper_bound(prefix + end)
        rows: Any = self._store.db.iter(read)
        rows.seek(prefix + start)
        valid, key, value, step = rows.valid, rows.key, rows.value, rows.next
        cut = len(prefix)
        left = -1 if limit is None else limit
        while valid():
            yield key()[cut:], value()
            left -= 1
            if not left:
                return
            step()
        self._store.check(rows)

    def commit(self, index: int, term: int, puts: list[tuple[bytes, bytes]], deletes: list[bytes],
               delete_ranges: list[tuple[bytes, bytes]]) -> None:
        """One atomic batch: ranges, then deletes, then puts, and the applied index. Durable after the store's next sync.
        `index` never goes back. Raises StorageFailed."""
        assert index >= self.applied_index, f"group {self._group_id}: applied index {self.applied_index} back to {index}"
        batch = WriteBatch(raw_mode=True)
        put, delete = batch.put, batch.delete
        prefix = self.prefix
        for start, end in delete_ranges:
            if start < end:  # RocksDB would fail the whole batch, and for good
                batch.delete_range(prefix + start, prefix + end)
        for key in deletes:
            delete(prefix + key)
        for key, value in puts:
            put(prefix + key, value)
        if self._configuration is not None:
            put(prefix + CONFIGURATION_KEY, self._configuration)
        put(self._meta_key, _META.pack(FORMAT, self.generation, index, term))
        self._store.write(batch)
        self._configuration = None
        self.applied_index, self.applied_term = index, term

    def flip(self, generation: int, index: int, term: int) -> None:
        """The rows of a complete generation become the state and the old ones go; durable on return. Raises
        StorageFailed."""
        batch = WriteBatch(raw_mode=True)
        batch.put(self._meta_key, _META.pack(FORMAT, generation, index, term))
        batch.delete_range(self.prefix, _PREFIX.pack(b"R", self._group_id, self.generation + 1))
        self._store.write(batch)
        self._configuration = None
        self.generation = generation
        self.prefix = _PREFIX.pack(b"R", self._group_id, generation)
        self.applied_index, self.applied_term = index, term
        self._store.sync_now()

    def __repr__(self) -> str:
        return (f"<rows of group {self._group_id}: applied {self.applied_index} of term {self.applied_term}, durable "
                f"{self.durable_index}, generation {self.generation}>")


def _options(write_buffer_bytes: int) -> Options:
    """Small and bounded memory, few threads, cheap scans after deletes."""
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    # The default forgets synced commits silently after a damaged one; this refuses, but accepts a torn last write.
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_write_buffer_size(write_buffer_bytes * _BUFFER_BYTES_FACTOR)
    options.set_max_write_buffer_number(_BUFFERS_MAX)
    options.set_wal_bytes_per_sync(1 << 20)  # starts writing early: a sync then waits for less
    options.set_bytes_per_sync(1 << 20)
    options.set_max_background_jobs(2)
    options.set_max_open_files(OPEN_FILES_MAX)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(4 << 20)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    # Young files are short-lived: compressing them would be work for nothing.
    options.set_compression_per_level([DBCompressionType.none(), DBCompressionType.none(), DBCompressionType.lz4()])
    options.set_level_compaction_dynamic_level_bytes(False)
    options.set_target_file_size_base(8 << 20)
    options.set_max_bytes_for_level_base(64 << 20)
    # A file that is mostly tombstones is compacted soon: scans over acknowledged messages stay cheap.
    options.add_compact_on_deletion_collector_factory(4096, 2048, 0.5)
    options.set_enable_blob_files(True)
    options.set_min_blob_size(BLOB_BYTES_MIN)
    options.set_blob_file_size(32 << 20)
    options.set_enable_blob_gc(True)
    options.set_blob_gc_age_cutoff(0.5)
    table = BlockBasedOptions()
    table.set_block_cache(Cache(BLOCK_CACHE_BYTES))
    table.set_bloom_filter(10, False)
    table.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
    # Indexes and filters live in the cache, in parts: memory does not grow with the backlog.
    table.set_index_type(BlockBasedIndexType.two_level_index_search())
    table.set_partition_filters(True)
    table.set_metadata_block_size(4096)
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_top_level_index_and_filter(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    table.set_format_version(5)
    options.set_block_based_table_factory(table)
    return options


def _unpack_meta(path: Path, group_id: int, meta: bytes) -> tuple[int, int, int]:
    """(generation, applied index, applied term). Raises StoreRefused."""
    if meta and meta[0] > FORMAT:
        raise StoreRefused(f"the state of group {group_id} in {path} has format {meta[0]}, written by a newer Spillway; this "
                           f"one reads up to {FORMAT}: start the newer version")
    if len(meta) != _META.size:
        raise StoreRefused(f"the state of group {group_id} in {path} is damaged: its meta row has {len(meta)} bytes. "
                           f"{REPLACE_HINT}")
    _, generation, index, term = _META.unpack(meta)
    if not 0 < generation <= _GENERATION_MAX:
        raise StoreRefused(f"the state of group {group_id} in {path} is damaged: there is no generation {generation}. {REPLACE_HINT}")
    return generation, index, term


def _disk_full(text: str) -> bool:
    return "No space left on device" in text or "Disk quota exceeded" in text


def _why_not_opened(path: Path, text: str) -> str:
    if "lock hold by current process" in text or "While lock file" in text:
        return f"{path} is in use by another process; stop that one, or name another directory"
    if _disk_full(text):
        return f"{path} cannot be opened: its disk is full; free space, then start again ({text})"
    return f"{path} cannot be opened: {text}. {REPLACE_HINT}"
