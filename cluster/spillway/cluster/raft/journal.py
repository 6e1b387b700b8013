"""The durable log: entries, term and vote of every group of a node in one store, one batch and one sync per turn.

    FF FF FF FF N             node row: format, cluster, node id, incarnation, formed, recovering, founders, cluster id (msgpack)
    FF FF FF FF W             number of the last write (8 bytes); see `SyncMark`
    <group> H                 hard state: term (8 bytes), vote
    <group> E <index>         entry: term (8 bytes), command
    <group> I                 a snapshot is being installed: the applied index before it (8 bytes)
    <group> C                 configuration as of the first entry: its index (8 bytes), Configuration.encode
    <group> A                 admitted: the incarnation that may vote and acknowledge (see `recovery`)

Additions accumulate in the store's batch. `write` hands it to the disk, `sync` makes it durable; nothing that depends on
it may leave the node before (see `host`). Whoever changes a row raises FORMAT.

The journal of a group refuses what would break Raft: a gap, a lower term, a second vote in a term, and the loss of an
entry that is committed or applied. These are bugs, so they raise LogViolation and the process ends.
"""
from __future__ import annotations

import bisect
import os
import secrets
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
from rocksdict import DBRecoveryMode, Options, Rdict, ReadOptions, WriteBatch
from spillway.cluster.errors import REPLACE_HINT, StorageDamaged, StorageFailed, StoreRefused
from spillway.cluster.raft.configuration import Configuration, decode_configuration
from spillway.cluster.raft.seam import CONFIGURATION, NO_OP, REGULAR, Journal
from spillway.cluster.raft.wire import NUMBER_MAX
from spillway.cluster.rocks import close_database, is_damage
from spillway.contract.telemetry.metrics import Histogram

FORMAT = 3  # 1: without configurations, 2: without admissions of founders; read, and raised when the host starts
WRITE_BUFFER_BYTES = 16 << 20  # most entries are compacted away before they leave the memtable
WAL_BYTES_MAX = 64 << 20  # a quiet group must not keep the write-ahead log of busy ones
ENTRY_OVERHEAD_BYTES = 64  # what an entry costs beside its command, roughly
NODE_KEY = b"\xff\xff\xff\xffN"
_WRITE_KEY = b"\xff\xff\xff\xffW"
_KEY = struct.Struct(">IcQ")
_TERM = struct.Struct("<Q")
_MARK = struct.Struct("<QI")
_INDEX_MAX = (1 << 64) - 1
_TYPES = (REGULAR, NO_OP, CONFIGURATION)

LogEntry = tuple[bytes, int, int]  # command with its type byte, index, term: the library's order


class LogViolation(AssertionError):
    """Something tried to break the log: a bug, here or in a peer. Fatal to the process."""


class Batch(Protocol):
    """Changes that take effect together."""

    def put(self, key: bytes, value: bytes) -> None:
        """Sets a row."""

    def delete(self, key: bytes) -> None:
        """Removes a row."""

    def delete_range(self, begin: bytes, end: bytes) -> None:
        """Removes the rows of [begin, end)."""


class Disk(Protocol):
    """An ordered, durable map of bytes. A write survives a crash for certain only after `sync`."""

    def batch(self) -> Batch:
        """An empty batch."""

    def write(self, batch: Any) -> None:
        """Applies a batch, atomically, unsynced. Raises StorageFailed."""

    def sync(self) -> None:
        """Makes everything written durable; may run in another thread than `write`. Raises StorageFailed."""

    def rest(self) -> None:
        """Gives back the memory of write buffers; for quiet times, in a thread. Raises StorageFailed."""

    def get(self, key: bytes) -> bytes | None:
        """A row."""

    def scan(self, begin: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Rows of [begin, end), in order, as they are read."""

    def close(self) -> None:
        """Releases it."""


class SyncMark:
    """How many writes were synced, in a file beside the store.

    RocksDB takes a write-ahead log that ends early for one whose last write was torn by a crash, and forgets what is missing.
    What was synced was acknowledged, and no crash tears it: that is damage. The mark is written after each sync and not synced
    itself: it may be behind, after a power cut, but never ahead. One that cannot be read counts for nothing.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        raw = os.pread(self._fd, _MARK.size, 0)
        value, checksum = _MARK.unpack(raw) if len(raw) == _MARK.size else (0, 0)
        self.value: int = value if zlib.crc32(raw[:8]) == checksum else 0

    def set(self, value: int) -> None:
        """So many writes are synced. Raises OSError."""
        raw = value.to_bytes(8, "little")
        os.pwrite(self._fd, _MARK.pack(value, zlib.crc32(raw)), 0)

    def close(self) -> None:
        """Releases the file."""
        os.close(self._fd)


class RocksDisk:
    """A Disk on RocksDB."""

    def __init__(self, path: Path) -> None:
        """Opens or creates it. Raises StoreRefused if it is damaged or in use."""
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(WRITE_BUFFER_BYTES)
        options.set_max_write_buffer_number(3)
        options.set_max_total_wal_size(WAL_BYTES_MAX)
        options.set_max_background_jobs(2)
        options.set_keep_log_file_num(2)
        # The default forgets synced records silently after a damaged one; this refuses, but accepts a torn last write.
        options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._db = Rdict(str(path), options)
        except Exception as e:
            if "lock" in str(e).lower():
                raise StoreRefused(f"{path} is in use by another process; stop that one, or name another directory"
                                   ) from None
            if "No space left on device" in str(e):
                raise StoreRefused(f"{path} cannot be opened: its disk is full; free space, then start again ({e})") from None
            raise StoreRefused(f"{path} cannot be opened: {e}. {REPLACE_HINT}") from None
        self._path = path
        mark = path.with_name(f"{path.name}.synced")
        try:
            self._mark = SyncMark(mark)
        except OSError as e:
            close_database(self._db, self._path)
            raise StoreRefused(f"{mark} cannot be used: {e.strerror}") from None
        try:
            self._written = int.from_bytes(self.get(_WRITE_KEY) or b"", "little")
            if self._written < self._mark.value:
                raise StoreRefused(f"{path} has lost writes that were synced: it ends with number {self._written}, and "
                                   f"{self._mark.value} were synced. {REPLACE_HINT}")
        except StoreRefused:
            self.close()
            raise

    def batch(self) -> Any:
        """See Disk."""
        return WriteBatch(raw_mode=True)

    def write(self, batch: Any) -> None:
        """See Disk."""
        self._written += 1
        batch.put(_WRITE_KEY, self._written.to_bytes(8, "little"))
        try:
            self._db.write(batch)
        except Exception as e:
            raise StorageFailed(f"the log cannot be written: {e}") from e

    def sync(self) -> None:
        """See Disk. Releases the GIL, which `write` does not."""
        written = self._written
        try:
            self._db.flush_wal(True)
            self._mark.set(written)
        except Exception as e:
            raise StorageFailed(f"the log cannot be synced: {e}") from e

    def rest(self) -> None:
        """See Disk."""
        try:
            self._db.flush(True)
        except Exception as e:
            raise StorageFailed(f"the log cannot be written: {e}") from e

    def get(self, key: bytes) -> bytes | None:
        """See Disk. Raises StorageDamaged, StorageFailed."""
        try:
            value: bytes | None = self._db.get(key)
        except Exception as e:
            raise self._unreadable(e) from e
        return value

    def scan(self, begin: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """See Disk. Raises StorageDamaged, StorageFailed: damage is not an end."""
        read = ReadOptions()
        read.set_iterate_upper_bound(end)
        rows: Any = self._db.iter(read)
        rows.seek(begin)
        while rows.valid():
            yield rows.key(), rows.value()
            rows.next()
        try:
            rows.status()
        except Exception as e:
            raise self._unreadable(e) from e

    def _unreadable(self, error: Exception) -> StorageFailed:
        if is_damage(str(error)):
            return StorageDamaged(f"{self._path} cannot be read: {error}. {REPLACE_HINT}")
        return StorageFailed(f"{self._path} cannot be read: {error}")

    def close(self) -> None:
        """See Disk."""
        close_database(self._db, self._path)
        self._mark.close()


class NodeRow(msgspec.Struct, frozen=True):
    """Whose store this is, and what became of it."""

    format: int
    cluster: str
    node_id: str
    incarnation: str
    """Identity of this store: a node that lost its disk has a new one."""
    formed: bool = False
    """The node has taken part in the cluster with this store."""
    recovering: bool = False
    """The node took part with an earlier store that is lost; not all of its replicas are admitted again."""
    dropped: list[int] = []
    """Groups whose replica ended, and what is left of it may not all be gone."""
    founders: dict[str, str] = {}
    """Members' incarnations when the cluster formed; empty on a node that recovered."""
    cluster_id: str = ""
    """Identity of the cluster, which its name is not; empty: not known yet."""


class JournalStore:
    """The rows of all groups of a node. One writer: the host."""

    def __init__(self, source: Path | Disk, cluster: str, node_id: str,
                 incarnation: Callable[[], str] = lambda: secrets.token_hex(8)) -> None:
        """Opens the store at a path, or on a disk. Raises StoreRefused for another node's, a newer version's, a damaged or
        a locked one."""
        self.disk: Disk = RocksDisk(source) if isinstance(source, Path) else source
        self._batch = self.disk.batch()
        self.batch_bytes = 0
        self.syncs = Histogram()
        """How long they took, in microseconds."""
        self.groups: dict[int, GroupJournal] = {}
        self.founding = True
        """The replicas of this node are those that it is founded with; else those that it `has_replica` of."""
        row = self.disk.get(NODE_KEY)
        if row is None:
            self.node = NodeRow(FORMAT, cluster, node_id, incarnation())
            self._put_node()
            return
        try:
            self.node = msgspec.msgpack.decode(row, type=NodeRow)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._refuse("its node row is damaged; replace this node by an empty one")
        if self.node.format > FORMAT:
            self._refuse(f"it has format {self.node.format}, written by a newer Spillway, and this one reads up to "
                         f"{FORMAT}; start the newer version")
        if (self.node.cluster, self.node.node_id) != (cluster, node_id):
            self._refuse(f"it belongs to node {self.node.node_id!r} of cluster {self.node.cluster!r}, not to {node_id!r} of "
                         f"{cluster!r}; start that node, or name another directory")
        self.founding = not self.node.formed or self.node.format < FORMAT

    def _refuse(self, why: str) -> None:
        self.disk.close()
        raise StoreRefused(f"the Raft log of this directory is not usable: {why}")

    def _put_node(self) -> None:
        batch = self.disk.batch()
        batch.put(NODE_KEY, msgspec.msgpack.encode(self.node))
        self.disk.write(batch)
        self.disk.sync()

    def change_node(self, **changes: Any) -> None:
        """Changes fields of the node row; durable on return. Raises StorageFailed."""
        self.node = msgspec.structs.replace(self.node, **changes)
        self._put_node()

    def has_replica(self, group: int) -> bool:
        """Whether there is a log of a group, be it an empty one."""
        return group not in self.node.dropped and self.disk.get(group.to_bytes(4, "big") + b"C") is not None

    def journal(self, group: int, tail_bytes_max: int = 2 << 20, durable: int = 0) -> GroupJournal:
        """The log of a group, whose state has the effects of the entry `durable` on disk. Raises StoreRefused if entries are missing
        from it, or damaged."""
        journal = self.groups[group] = GroupJournal(self, group, tail_bytes_max, durable)
        return journal

    def drop(self, group: int) -> None:
        """Forgets a replica in the turn's batch, but for its term and vote: the node may become a member again. That it is to be
        forgotten is durable on return. Raises StorageFailed."""
        self.change_node(dropped=sorted({*self.node.dropped, group}))
        self.groups.pop(group, None)
        name = group.to_bytes(4, "big")
        self.delete_range(name + b"A", name + b"H")
        self.delete_range(name + b"I", name + b"J")

    def put(self, key: bytes, value: bytes) -> None:
        """Adds a row to the turn's batch."""
        self._batch.put(key, value)
        self.batch_bytes += len(value) + ENTRY_OVERHEAD_BYTES

    def delete(self, key: bytes) -> None:
        """Removes a row in the turn's batch."""
        self._batch.delete(key)
        self.batch_bytes += ENTRY_OVERHEAD_BYTES

    def delete_range(self, begin: bytes, end: bytes) -> None:
        """Removes the rows of [begin, end) in the turn's batch."""
        self._batch.delete_range(begin, end)
        self.batch_bytes += ENTRY_OVERHEAD_BYTES

    def write(self) -> int:
        """Hands the turn's batch to the disk, unsynced; returns its bytes, 0 if it was empty. Raises StorageFailed."""
        size = self.batch_bytes
        if size:
            batch, self._batch = self._batch, self.disk.batch()
            self.batch_bytes = 0
            self.disk.write(batch)
        return size

    def sync(self) -> None:
        """Makes everything written durable. May run in a thread. Raises StorageFailed."""
        begin = time.perf_counter_ns()
        self.disk.sync()
        self.syncs.add((time.perf_counter_ns() - begin) // 1000)

    def rest(self) -> None:
        """Gives back the memory of write buffers; for quiet times, in a thread. Raises StorageFailed."""
        self.disk.rest()

    def synced(self) -> None:
        """After `sync`, on the loop: what the logs hold is durable. No turn may have begun since `write`."""
        for journal in self.groups.values():
            if journal.synced != journal.last:
                journal.synced = journal.last
                if journal.tail_bytes > journal.tail_bytes_max:
                    journal.evict()

    def close(self) -> None:
        """Closes the disk."""
        self.disk.close()


class GroupJournal(Journal):  # type: ignore[misc]
    """One group's log as the library wants it: a sequence of entries without gaps, from index `first` to `last`.

    The newest `tail_bytes_max` bytes are in memory, and whatever is not applied and synced yet; older entries are read from
    the disk when they are asked for. Terms of all entries are in memory, as runs. A new log is empty, and `first` is 0."""

    def __init__(self, store: JournalStore, group: int, tail_bytes_max: int, durable: int = 0) -> None:
        self.store = store
        self.group = group
        self.tail_bytes_max = tail_bytes_max
        self.first = 0
        self.last = 0
        self.synced = 0  # entries up to here are durable
        self.commit = 0  # never cut at or below
        self.applied = 0  # nor here
        self.bytes = 0  # of all entries, in memory or not
        self.tail_bytes = 0  # of those in memory
        self._runs: list[tuple[int, int]] = []  # (index, term): from here on, this term
        self._sizes: deque[int] = deque()  # of every entry
        self._tail: list[LogEntry] = []
        self._tail_first = 0
        self._head: LogEntry | None = None
        self._configurations: list[tuple[int, Configuration]] = []  # as of the first entry, then those of later entries
        self._name = group.to_bytes(4, "big")
        self._load(durable)

    def _load(self, durable: int) -> None:
        disk = self.store.disk
        founded = disk.get(self._name + b"C")
        if founded is not None:
            if len(founded) < _TERM.size:
                raise self._damaged("its row of the configuration is cut")
            self._configurations.append((_TERM.unpack_from(founded)[0], self._decode(founded[_TERM.size:])))
        hard = disk.get(self._name + b"H")
        self._term, self._vote = self._unpack_hard(hard) if hard else (0, None)
        for key, value in disk.scan(self._key(0), self._key(_INDEX_MAX)):
            index = int.from_bytes(key[-8:], "big")
            if self.last and index != self.last + 1:
                raise StoreRefused(f"the log of group {self.group} lacks the entries {self.last + 1} to {index - 1}; "
                                   "replace this node by an empty one")
            if len(key) != _KEY.size or len(value) <= _TERM.size or value[_TERM.size:_TERM.size + 1] not in _TYPES:
                raise self._damaged(f"the row of entry {index} is none")
            term = _TERM.unpack_from(value)[0]
            if self._runs and term < self._runs[-1][1]:
                raise self._damaged(f"entry {index} has term {term}, after {self._runs[-1][1]}")
            self._append((value[8:], index, term))
            if self.tail_bytes > self.tail_bytes_max:
                self._evict(durable)  # a log that is kept for a replica that is behind may be long
        if self.last > 1 and not hard:
            raise StoreRefused(f"term and vote of group {self.group} are lost; replace this node by an empty one")
        if max(self._term, self.last, self._runs[-1][1] if self._runs else 0, *(at for at, _ in self._configurations)) > NUMBER_MAX:
            raise self._damaged("a term or an index is beyond any")
        self.synced = self.last
        intent = disk.get(self._name + b"I")
        if intent is not None and len(intent) != _TERM.size:
            raise self._damaged("what it says of a snapshot is nothing")
        self.install_above: int | None = None if intent is None else _TERM.unpack(intent)[0]
        admitted = disk.get(self._name + b"A")
        self.admitted: str | None = None if admitted is None else self._text(admitted)

    def _unpack_hard(self, hard: bytes) -> tuple[int, str | None]:
        if len(hard) < _TERM.size:
            raise self._damaged("its row of term and vote is cut")
        return _TERM.unpack_from(hard)[0], self._text(hard[_TERM.size:]) or None

    def _text(self, value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{value!r} is no name") from None

    def _damaged(self, why: str) -> StorageDamaged:
        return StorageDamaged(f"the log of group {self.group} is damaged: {why}. {REPLACE_HINT}")

    def _decode(self, data: bytes) -> Configuration:
        try:
            return decode_configuration(data)
        except ValueError as e:
            raise self._damaged(str(e)) from None

    def _key(self, index: int) -> bytes:
        return _KEY.pack(self.group, b"E", index)

    def _append(self, entry: LogEntry) -> None:
        size = len(entry[0]) + ENTRY_OVERHEAD_BYTES
        if not self._tail:
            self._tail_first = entry[1]
        if not self.first:
            self.first = entry[1]
        if not self._runs or self._runs[-1][1] != entry[2]:
            self._runs.append((entry[1], entry[2]))
        if entry[0][:1] == CONFIGURATION and (not self._configurations or entry[1] > self._configurations[-1][0]):
            self._configurations.append((entry[1], self._decode(entry[0][1:])))
        self.last = entry[1]
        self._tail.append(entry)
        self._sizes.append(size)
        self.bytes += size
        self.tail_bytes += size

    # -- what the library calls ----------------------------------------------------------------------------------

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Appends an entry. Raises LogViolation on a gap or a lower term."""
        if self.last and (idx != self.last + 1 or term < self._runs[-1][1]):
            raise LogViolation(f"group {self.group}: entry {idx} of term {term} after {self.last} of {self._runs[-1][1]}")
        self._append((command, idx, term))
        self.store.put(_KEY.pack(self.group, b"E", idx), _TERM.pack(term) + command)

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        """Drops the tail from a position on: it conflicts with the leader's log. Raises LogViolation if an entry is
        committed or applied."""
        index = self.first + entryFrom
        if index > self.last:
            return
        if index <= self.commit or index <= self.applied:
            raise LogViolation(f"group {self.group}: cut at {index}, committed {self.commit}, applied {self.applied}")
        self.store.delete_range(self._key(index), self._key(_INDEX_MAX))
        del self._tail[index - self._tail_first:]
        for _ in range(self.last - index + 1):
            size = self._sizes.pop()
            self.bytes -= size
            self.tail_bytes -= size
        while self._runs[-1][0] >= index:
            self._runs.pop()
        while self._configurations and self._configurations[-1][0] >= index:
            self._configurations.pop()
        self.last = index - 1
        self.synced = min(self.synced, self.last)

    def deleteEntriesTo(self, entryTo: int) -> None:
        """The library's own compaction is off."""
        raise LogViolation("compaction is the host's")

    def clear(self) -> None:
        """The library's own snapshots are off."""
        raise LogViolation("snapshots are the host's")

    def __getitem__(self, item: Any) -> Any:
        if item.__class__ is int:
            if item == -1:
                return self._tail[-1]
            if item == 0:
                return self._first_entry()
            return self.entries(self.first + item, self.first + item + 1)[0]
        start, stop, _ = item.indices(self.last - self.first + 1)
        return self.entries(self.first + start, self.first + stop)

    def __len__(self) -> int:
        return self.last - self.first + 1 if self.first else 0

    def _destroy(self) -> None:
        """The store is closed by its owner."""

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """The commit index, which bounds truncation. It need not be durable: it is known again after a majority answers."""
        if raftCommitIndex < self.commit:
            raise LogViolation(f"group {self.group}: the commit index goes back from {self.commit} to {raftCommitIndex}")
        self.commit = raftCommitIndex

    def getRaftCommitIndex(self) -> int:
        """At start: at least the first entry, which is the same everywhere."""
        return max(1, self.commit)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        """Term and vote. Raises LogViolation if the term goes back or a vote is changed."""
        if term < self._term or (term == self._term and self._vote is not None and self._vote != votedForNodeId):
            raise LogViolation(f"group {self.group}: term {self._term}, vote {self._vote} to {term}, {votedForNodeId}")
        self._term, self._vote = term, votedForNodeId
        self.store.put(self._name + b"H", _TERM.pack(term) + (votedForNodeId or "").encode())

    def getCurrentTerm(self) -> int:
        """As stored."""
        return self._term

    def getVotedForNodeId(self) -> str | None:
        """As stored."""
        return self._vote

    # -- ours ----------------------------------------------------------------------------------------------------

    def _first_entry(self) -> LogEntry:
        if self._tail_first == self.first:
            return self._tail[0]
        if self._head is None or self._head[1] != self.first:
            self._head = self._read(self.first, self.first + 1)[0]
        return self._head

    def _read(self, begin: int, end: int) -> list[LogEntry]:
        rows = list(self.store.disk.scan(self._key(begin), self._key(end)))
        if len(rows) != end - begin:
            raise StorageFailed(f"the log of group {self.group} lacks entries of {begin} to {end - 1} on disk")
        return [(value[8:], begin + i, _TERM.unpack_from(value)[0]) for i, (_, value) in enumerate(rows)]

    def entries(self, begin: int, end: int) -> list[LogEntry]:
        """The entries of [begin, end), from memory or disk; both ends must be within the log."""
        tail = self._tail_first
        if begin >= tail:
            return self._tail[begin - tail:end - tail]
        return self._read(begin, min(end, tail)) + self._tail[:max(0, end - tail)]

    def entries_up_to(self, begin: int, end: int, size_max: int) -> list[LogEntry]:
        """Entries of [begin, end), as many as fit into `size_max` bytes, but at least one."""
        sizes, at = self._sizes, begin - self.first
        size = sizes[at]
        stop = begin + 1
        while stop < end:
            at += 1
            size += sizes[at]
            if size > size_max:
                break
            stop += 1
        return self.entries(begin, stop)

    def term_at(self, index: int) -> int | None:
        """The term of an entry, None if the log does not have it."""
        if not self.first <= index <= self.last or not self.first:
            return None
        runs = self._runs
        if index >= runs[-1][0]:
            return runs[-1][1]
        return runs[bisect.bisect_right(runs, (index, _INDEX_MAX)) - 1][1]

    def term_start(self, index: int) -> int:
        """The first index of the run of entries that have the term of the entry at `index`."""
        return max(self.first, self._runs[bisect.bisect_right(self._runs, (index, _INDEX_MAX)) - 1][0])

    def evict(self) -> None:
        """Drops from memory the oldest entries that are applied and synced, down to three quarters of the bound."""
        self._evict(min(self.applied, self.synced))

    def _evict(self, upto: int) -> None:
        limit = min(upto, self.last) - self._tail_first  # that entry stays: all behind it may be cut, and the last one is in memory
        drop = 0
        while drop < limit and self.tail_bytes > self.tail_bytes_max * 3 // 4:
            self.tail_bytes -= len(self._tail[drop][0]) + ENTRY_OVERHEAD_BYTES
            drop += 1
        if drop:
            del self._tail[:drop]
            self._tail_first += drop

    def compact(self, upto: int, keep_bytes: int) -> int:
        """Drops entries below `upto`, which must be applied and durable in the state; keeps the newest `keep_bytes` for
        followers that are merely slow, and two entries for the library. Returns how many were dropped."""
        limit = min(upto, self.applied, self.commit, self.last - 1) - self.first  # the entry at `upto` stays
        drop, sizes = 0, self._sizes
        while drop < limit and self.bytes > keep_bytes:
            self.bytes -= sizes.popleft()
            drop += 1
        if drop:
            first = self.first + drop
            self.store.delete_range(self._key(self.first), self._key(first))
            inside = max(0, first - self._tail_first)
            for entry in self._tail[:inside]:
                self.tail_bytes -= len(entry[0]) + ENTRY_OVERHEAD_BYTES
            del self._tail[:inside]
            self._tail_first = max(self._tail_first, first)
            self.first = first
            runs = self._runs
            while len(runs) > 1 and runs[1][0] <= first:
                runs.pop(0)
            configurations = self._configurations
            if len(configurations) > 1 and configurations[1][0] <= first:
                while len(configurations) > 1 and configurations[1][0] <= first:
                    configurations.pop(0)
                self._put_base()
        return drop

    def restart(self, index: int, term: int, configuration: tuple[int, Configuration] | None) -> None:
        """After a snapshot as of the entry (index, term): the log is that entry alone. `configuration` is the snapshot's, with its
        index, None if it is still the one that the group was founded with."""
        if index <= self.applied:
            raise LogViolation(f"group {self.group}: a snapshot of {index}, but {self.applied} is applied")
        self.store.delete_range(self._key(0), self._key(_INDEX_MAX))
        self.first = self.last = self.synced = 0
        self.bytes = self.tail_bytes = 0
        self._runs, self._tail, self._head = [], [], None
        self._sizes.clear()
        self._configurations = self._configurations[:1] if configuration is None else [configuration]
        self._put_base()
        self.commit = self.applied = index
        self.add(NO_OP, index, term)

    def found(self, configuration: Configuration) -> None:
        """What the group is founded with, for this replica; unless its disk says otherwise."""
        if not self._configurations or self._configurations[0][0] > self.first:
            self._configurations.insert(0, (0, configuration))
            self._put_base()

    def _put_base(self) -> None:
        index, configuration = self._configurations[0]
        self.store.put(self._name + b"C", _TERM.pack(index) + configuration.encode())

    @property
    def configuration(self) -> Configuration:
        """The last one in the log, committed or not; the same object as long as it is that one."""
        return self._configurations[-1][1]

    @property
    def configuration_index(self) -> int:
        """Of the entry that has it; 0 for the one that the group was founded with."""
        return self._configurations[-1][0]

    @property
    def configuration_before(self) -> Configuration | None:
        """The one before that; None if it is not kept, and the last one is committed since long."""
        return self._configurations[-2][1] if len(self._configurations) > 1 else None

    def begin_install(self, applied: int) -> None:
        """A snapshot will replace the state, which is as of `applied`: the next start must look whether it did."""
        self.install_above = applied
        self.store.put(self._name + b"I", _TERM.pack(applied))

    def end_install(self) -> None:
        """State and log agree again."""
        self.install_above = None
        self.store.delete(self._name + b"I")

    def admit(self, incarnation: str) -> None:
        """This replica may vote and acknowledge."""
        self.admitted = incarnation
        self.store.put(self._name + b"A", incarnation.encode())
