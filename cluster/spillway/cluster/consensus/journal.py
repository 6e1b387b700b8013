"""The durable log: entries, term and vote of every group of a node in one RocksDB, one batch and one fsync per turn.

    N                 node row: format, cluster, node id, incarnation, formed, founders (msgpack)
    H <group>         hard state: term, vote
    E <group> <index> entry: term (8 bytes), command

Additions accumulate in the store's batch; `write` puts them into the write-ahead log, `sync` makes them durable. Nothing
that depends on them may leave the node before (see `host`).
"""
from __future__ import annotations

import secrets
import struct
from pathlib import Path
from typing import Any

import msgspec
from rocksdict import DBRecoveryMode, Options, Rdict, ReadOptions, WriteBatch
from spillway.cluster.consensus.seam import Journal
from spillway.cluster.errors import StorageFailed, StoreRefused

FORMAT = 1
WRITE_BUFFER_BYTES = 16 << 20  # most of the log is dropped before it leaves the memtable
_HARD = struct.Struct(">Q")
_KEY = struct.Struct(">cIQ")
_TERM = struct.Struct("<Q")


class NodeRow(msgspec.Struct):
    """Whose log this is."""

    format: int
    cluster: str
    node_id: str
    incarnation: str
    formed: bool = False
    founders: dict[str, str] = {}


class JournalStore:
    """The database. One writer, the host."""

    def __init__(self, path: Path, cluster: str, node_id: str) -> None:
        """Opens or creates it. Raises StoreRefused for another node's, a newer version's, a damaged or a locked one."""
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(WRITE_BUFFER_BYTES)
        options.set_max_write_buffer_number(2)
        options.set_max_background_jobs(2)
        options.set_keep_log_file_num(2)
        # The default silently forgets synced records after a damaged one.
        options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._db = Rdict(str(path), options)
        except Exception as e:
            text = str(e)
            if "lock" in text.lower():
                raise StoreRefused(f"{path} is in use by another process; stop that one, or name another directory") from None
            raise StoreRefused(f"{path} cannot be opened: {text}. If the disk is sound, replace this node by an empty one: "
                               "the others will bring it up to date") from None
        row = self._db.get(b"N")
        if row is None:
            self.node = NodeRow(FORMAT, cluster, node_id, secrets.token_hex(8))
            self._db.put(b"N", msgspec.msgpack.encode(self.node))
            self._flush()
        else:
            try:
                self.node = msgspec.msgpack.decode(row, type=NodeRow)
            except msgspec.MsgspecError:
                raise StoreRefused(f"{path}: the node row is damaged; replace this node by an empty one") from None
            if self.node.format > FORMAT:
                raise StoreRefused(f"{path} has format {self.node.format}, written by a newer Spillway; this one reads up to "
                                   f"{FORMAT}: start the newer version")
            if (self.node.cluster, self.node.node_id) != (cluster, node_id):
                raise StoreRefused(f"{path} belongs to node {self.node.node_id!r} of cluster {self.node.cluster!r}, not to "
                                   f"{node_id!r} of {cluster!r}; start that node, or name another directory")
        self._batch = WriteBatch(raw_mode=True)
        self.batch_bytes = 0

    def form(self, founders: dict[str, str]) -> None:
        """Marks that this store takes part in the cluster; durable on return."""
        self.node.formed = True
        self.node.founders = dict(founders)
        self._db.put(b"N", msgspec.msgpack.encode(self.node))
        self._flush()

    def journal(self, group: int) -> GroupJournal:
        """The log of a group."""
        return GroupJournal(self, group)

    def put(self, key: bytes, value: bytes) -> None:
        """Adds to the turn's batch."""
        self._batch.put(key, value)
        self.batch_bytes += len(value) + 32

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Adds to the turn's batch."""
        self._batch.delete_range(start, end)
        self.batch_bytes += 32

    def write(self) -> int:
        """Writes the turn's batch, unsynced; returns its bytes. Raises StorageFailed."""
        size = self.batch_bytes
        if size:
            batch, self._batch = self._batch, WriteBatch(raw_mode=True)
            self.batch_bytes = 0
            try:
                self._db.write(batch)
            except Exception as e:
                raise StorageFailed(f"the log cannot be written: {e}") from e
        return size

    def sync(self) -> None:
        """Makes everything written durable; releases the GIL. Raises StorageFailed."""
        self._flush()

    def rest(self) -> None:
        """Gives back the memory of write buffers; for quiet times, in a thread. Raises StorageFailed."""
        try:
            self._db.flush(True)
        except Exception as e:
            raise StorageFailed(f"the log cannot be written: {e}") from e

    def _flush(self) -> None:
        try:
            self._db.flush_wal(True)
        except Exception as e:
            raise StorageFailed(f"the log cannot be synced: {e}") from e

    def get(self, key: bytes) -> bytes | None:
        """A row."""
        value: bytes | None = self._db.get(key)
        return value

    def scan(self, start: bytes, end: bytes) -> list[tuple[bytes, bytes]]:
        """Rows of [start, end)."""
        read = ReadOptions()
        read.set_iterate_upper_bound(end)
        it = self._db.iter(read)
        it.seek(start)
        found = []
        while it.valid():
            found.append((it.key(), it.value()))
            it.next()
        return found

    def close(self) -> None:
        """Closes the database."""
        self._db.close()


class GroupJournal(Journal):  # type: ignore[misc]
    """One group's log as pysyncobj wants it: a list of (command, index, term), the first entry at index `first`. The whole
    of it is in memory; the host's compaction bounds it. Refuses what would break Raft, as an assertion: it is a bug."""

    def __init__(self, store: JournalStore, group: int) -> None:
        self._store = store
        self._group = group
        self._entries: list[tuple[bytes, int, int]] = []
        self._bytes = 0
        self.keep = 0  # committed or applied up to here: never truncated
        self._term, self._vote = 0, None
        hard = store.get(b"H" + group.to_bytes(4, "big"))
        if hard is not None:
            (self._term,) = _HARD.unpack_from(hard)
            self._vote = hard[8:].decode() or None
        for key, value in store.scan(self._key(0), self._key((1 << 64) - 1)):
            index = int.from_bytes(key[-8:], "big")
            if self._entries and index != self._entries[-1][1] + 1:
                raise StoreRefused(f"the log of group {group} lacks entries before {index}; replace this node by an empty one")
            self._entries.append((value[8:], index, _TERM.unpack_from(value)[0]))
            self._bytes += len(value)

    def _key(self, index: int) -> bytes:
        return _KEY.pack(b"E", self._group, index)

    # -- what pysyncobj calls ------------------------------------------------------------------------------------

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Appends an entry."""
        entries = self._entries
        assert not entries or (idx == entries[-1][1] + 1 and term >= entries[-1][2]), "a gap, or a lower term"
        entries.append((command, idx, term))
        self._bytes += len(command) + 8
        self._store.put(_KEY.pack(b"E", self._group, idx), _TERM.pack(term) + command)

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        """Drops the tail from a position on, for a conflict with the leader."""
        if entryFrom >= len(self._entries):
            return
        index = self._entries[entryFrom][1]
        assert index > self.keep, f"group {self._group}: truncation at {index}, committed up to {self.keep}"
        self._bytes -= sum(len(e[0]) + 8 for e in self._entries[entryFrom:])
        del self._entries[entryFrom:]
        self._store.delete_range(self._key(index), self._key((1 << 64) - 1))

    def deleteEntriesTo(self, entryTo: int) -> None:
        """pysyncobj's own compaction, which is switched off."""
        raise AssertionError("compaction is the host's")

    def clear(self) -> None:
        """pysyncobj's own snapshots, which are never used."""
        raise AssertionError("snapshots are the host's")

    def __getitem__(self, item: Any) -> Any:
        return self._entries[item]

    def __len__(self) -> int:
        return len(self._entries)

    def _destroy(self) -> None:
        """The store is closed by its owner."""

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """The commit index need not be durable; it bounds truncation."""
        if raftCommitIndex > self.keep:
            self.keep = raftCommitIndex

    def getRaftCommitIndex(self) -> int:
        """At start: what the state machine has applied is committed."""
        return max(1, self.keep)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        """Term and vote."""
        assert term >= self._term, "the term goes back"
        self._term, self._vote = term, votedForNodeId
        self._store.put(b"H" + self._group.to_bytes(4, "big"), _HARD.pack(term) + (votedForNodeId or "").encode())

    def getCurrentTerm(self) -> int:
        """As stored."""
        return self._term

    def getVotedForNodeId(self) -> str | None:
        """As stored."""
        return self._vote

    # -- ours ----------------------------------------------------------------------------------------------------

    @property
    def first(self) -> int:
        """Index of the first entry."""
        return self._entries[0][1] if self._entries else 0

    @property
    def last(self) -> int:
        """Index of the last entry."""
        return self._entries[-1][1] if self._entries else 0

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return self._bytes

    def term_at(self, index: int) -> int | None:
        """Term of an entry that the log has."""
        position = index - self.first
        return self._entries[position][2] if 0 <= position < len(self._entries) else None

    def compact(self, upto: int, keep_bytes: int) -> None:
        """Drops entries up to and including `upto`, whose effects are durable elsewhere, but keeps at least the last
        `keep_bytes` of the log for slow followers, and two entries for pysyncobj."""
        entries = self._entries
        limit = min(upto, self.keep) - self.first  # the entry at `upto` itself stays: appends refer to it
        drop = 0
        size = self._bytes
        while drop < limit and len(entries) - drop > 2 and size > keep_bytes:
            size -= len(entries[drop][0]) + 8
            drop += 1
        if drop:
            self._store.delete_range(self._key(0), self._key(entries[drop][1]))
            del entries[:drop]
            self._bytes = size

    def restart(self, index: int, term: int) -> None:
        """After a snapshot: the log is one entry that stands for it."""
        self._store.delete_range(self._key(0), self._key((1 << 64) - 1))
        self._entries = []
        self._bytes = 0
        self.keep = index
        self.add(b"\1", index, term)
