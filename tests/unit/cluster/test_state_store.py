"""The rows of all groups in one database: commits, syncs, failures, what a crash leaves."""
from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rocksdict import Rdict
from spillway.cluster import state_store
from spillway.cluster.errors import StorageDamaged, StorageFailed, StoreRefused
from spillway.cluster.state_store import BLOB_BYTES_MIN, GroupRows, StateStore

ALL = b"", b"\xff" * 8


def rows_of(rows: GroupRows) -> dict[bytes, bytes]:
    return dict(rows.scan(*ALL))


class FailingDatabase:
    """A database in which one operation fails."""

    def __init__(self, db: Any, operation: str, text: str) -> None:
        self._db = db
        self._operation = operation
        self._text = text

    def __getattr__(self, name: str) -> Any:
        if name == self._operation:
            return self._fail
        return getattr(self._db, name)

    def _fail(self, *_: object) -> None:
        raise Exception(self._text)


def test_commits_are_there_after_a_restart(tmp_path: Path) -> None:
    """Rows, applied index and term of every group survive; groups don't see each other."""
    store = StateStore(tmp_path)
    store.group(1).commit(7, 2, [(b"a", b"1"), (b"b", b"2"), (b"\xff\xff", b"end")], [], [])
    store.group(2).commit(9, 3, [(b"a", b"other")], [], [])
    store.sync_now()
    store.close()
    store = StateStore(tmp_path)
    one, two, blank = store.group(1), store.group(2), store.group(3)
    assert rows_of(one) == {b"a": b"1", b"b": b"2", b"\xff\xff": b"end"}
    assert rows_of(two) == {b"a": b"other"}
    assert (one.applied_index, one.applied_term, one.durable_index) == (7, 2, 7)
    assert (store.applied(2), store.applied(3)) == ((9, 3), (0, 0))
    assert (blank.durable_index, rows_of(blank), blank.get(b"a")) == (0, {}, None)
    store.close()


def test_a_commit_takes_ranges_then_deletes_then_puts(tmp_path: Path) -> None:
    """What a commit puts is there, whatever it deletes; an empty or reversed range is none."""
    store = StateStore(tmp_path)
    rows = store.group(1)
    rows.commit(1, 1, [(bytes([c]), b"old") for c in b"abcdef"], [], [])
    rows.commit(2, 1, [(b"b", b"new"), (b"e", b"new")], [b"e", b"f"], [(b"a", b"d"), (b"d", b"d"), (b"z", b"a")])
    assert rows_of(rows) == {b"b": b"new", b"d": b"old", b"e": b"new"}
    assert rows.get_many([b"d", b"a", b"b"]) == [b"old", None, b"new"]
    assert list(rows.scan(b"b", b"e")) == [(b"b", b"new"), (b"d", b"old")]
    assert list(rows.scan(b"b", b"z", 2)) == [(b"b", b"new"), (b"d", b"old")]
    assert list(rows.scan(b"b", b"z", 0)) == []
    store.close()


def test_a_scan_shows_one_moment(tmp_path: Path) -> None:
    """Commits after a scan's first step don't show in it."""
    store = StateStore(tmp_path)
    rows = store.group(1)
    rows.commit(1, 1, [(b"a", b"1"), (b"b", b"1")], [], [])
    scan = rows.scan(*ALL)
    assert next(scan) == (b"a", b"1")
    rows.commit(2, 1, [(b"b", b"2"), (b"c", b"2")], [], [])
    assert list(scan) == [(b"b", b"1")]
    store.close()


def test_the_applied_index_never_goes_back(tmp_path: Path) -> None:
    """A commit below the applied index is a bug of the caller."""
    store = StateStore(tmp_path)
    rows = store.group(1)
    rows.commit(5, 1, [], [], [])
    rows.commit(5, 1, [(b"a", b"1")], [], [])
    with pytest.raises(AssertionError, match="applied index 5 back to 4"):
        rows.commit(4, 1, [], [], [])
    store.close()


async def test_only_commits_before_a_sync_are_durable(tmp_path: Path) -> None:
    """What is committed while a sync is under way waits for the next one."""
    store = StateStore(tmp_path)
    rows = store.group(1)
    rows.commit(1, 1, [(b"a", b"1")], [], [])
    assert rows.durable_index == 0
    syncing = asyncio.ensure_future(store.sync())
    await asyncio.sleep(0)
    rows.commit(2, 1, [(b"a", b"2")], [], [])
    await syncing
    assert rows.durable_index == 1
    store.sync_now()
    assert rows.durable_index == 2
    store.close()


class WatchedStore(StateStore):
    """Knows how much of each write-ahead log is on disk for certain."""

    on_disk: dict[str, int]

    def logs(self) -> dict[str, int]:
        """Name -> size, oldest first."""
        sizes = {}
        for log in sorted(self.path.glob("*.log")):
            try:
                sizes[log.name] = log.stat().st_size
            except FileNotFoundError:  # its rows reached a file meanwhile
                pass
        return sizes

    def _flush_wal(self) -> None:
        sizes = self.logs()  # what is written during the sync does not count
        super()._flush_wal()
        self.on_disk = sizes


@pytest.mark.parametrize("seed", range(4))
async def test_a_power_cut_leaves_no_hole(tmp_path: Path, seed: int) -> None:
    """When a write-ahead log begins, its predecessor is on disk to the last byte: no commit survives without all earlier."""
    WatchedStore.on_disk = {}
    store = WatchedStore(tmp_path, write_buffer_bytes=256 << 10)
    random = Random(seed)
    rows = [store.group(n) for n in (1, 2)]
    begun = set(store.logs())
    for index in range(1, 300):
        random.choice(rows).commit(index, 1, [(random.randbytes(8), random.randbytes(random.choice((10, 2_000, 9_000))))
                                              for _ in range(random.randrange(6))], [], [])
        if random.random() < 0.02:
            await store.sync()
        if random.random() < 0.01:
            await asyncio.get_running_loop().run_in_executor(None, store.rest)
        begun |= set(store.logs())
        for name, size in list(store.logs().items())[:-1]:
            assert store.on_disk.get(name) == size, f"log {name} was not synced before its successor began"
    assert len(begun) > 10
    store.close()


def test_a_torn_last_write_is_accepted_and_damage_before_it_is_not(tmp_path: Path) -> None:
    """What was never synced may be missing; what was synced may not be missing silently."""
    store = StateStore(tmp_path / "running")
    for index in range(1, 101):
        store.group(1).commit(index, 1, [(b"%03d" % index, bytes(100))], [], [])
    store.sync_now()
    shutil.copytree(tmp_path / "running", tmp_path / "crashed")
    store.close()
    [log] = (tmp_path / "crashed").glob("*.log")
    whole = log.read_bytes()
    log.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:])
    with pytest.raises(StoreRefused, match=r"cannot be opened.*replace this node by an empty one"):
        StateStore(tmp_path / "crashed")
    log.write_bytes(whole[:-50])
    store = StateStore(tmp_path / "crashed")
    assert store.applied(1) == (99, 1)
    assert len(rows_of(store.group(1))) == 99
    store.close()


def test_damage_is_an_error_and_not_an_end(tmp_path: Path) -> None:
    """A block that cannot be read ends neither a scan nor a read as if there were no row; the owner hears of it each time."""
    store = StateStore(tmp_path)
    random = Random(1)
    keys = [b"%06d" % n for n in range(2_000)]
    store.group(1).commit(1, 1, [(key, random.randbytes(300)) for key in keys], [], [])
    store.db.flush(True)
    store.close()
    [file] = tmp_path.glob("*.sst")
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2:len(whole) // 2 + 64] = bytes(64)
    file.write_bytes(whole)
    store = StateStore(tmp_path)
    heard: list[StorageFailed] = []
    store.unreadable = heard.append
    with pytest.raises(StorageFailed, match="cannot be read"):
        rows_of(store.group(1))
    with pytest.raises(StorageFailed, match="cannot be read"):
        for key in keys:
            store.group(1).get(key)
    with pytest.raises(StorageFailed, match="cannot be read"):
        store.group(1).get_many(keys)
    assert len(heard) == 3
    store.close()


@pytest.mark.parametrize(("text", "said"), [
    ("IO error: No space left on device: While appending", "the disk of .* is full; free space, then start again"),
    ("IO error: While fdatasync: Input/output error", "in .* cannot be .*Input/output error"),
])
@pytest.mark.parametrize("operation", ["write", "flush_wal", "flush"])
async def test_the_first_failure_is_for_good(tmp_path: Path, operation: str, text: str, said: str) -> None:
    """After one failed write or sync nothing is written or called durable any more."""
    store = StateStore(tmp_path)
    rows = store.group(1)
    rows.commit(1, 1, [(b"a", b"1")], [], [])
    whole: Any = store.db
    store.db = FailingDatabase(whole, operation, text)  # type: ignore[assignment]
    with pytest.raises(StorageFailed, match=said):
        if operation == "write":
            rows.commit(2, 1, [(b"a", b"2")], [], [])
        elif operation == "flush":
            store.rest()
        else:
            await store.sync()
    store.db = whole
    durable = rows.durable_index
    with pytest.raises(StorageFailed, match=said):
        rows.commit(2, 1, [(b"a", b"2")], [], [])
    with pytest.raises(StorageFailed, match=said):
        await store.sync()
    with pytest.raises(StorageFailed, match=said):
        store.sync_now()
    assert (rows.applied_index, rows.durable_index, rows.get(b"a")) == (1, durable, b"1")
    store.close()


def test_a_store_in_use_is_refused(tmp_path: Path) -> None:
    """One process owns a store; a directory that is merely called lock is no reason."""
    path = tmp_path / "lock"
    store = StateStore(path)
    with pytest.raises(StoreRefused, match="in use by another process"):
        StateStore(path)
    other = subprocess.run([sys.executable, "-c", "import sys; from pathlib import Path\n"
                            "from spillway.cluster.state_store import StateStore\nStateStore(Path(sys.argv[1]))", path],
                           capture_output=True, text=True, check=False)
    assert "StoreRefused" in other.stderr and "in use by another process" in other.stderr
    store.close()
    (path / "CURRENT").write_text("damaged")
    with pytest.raises(StoreRefused, match="cannot be opened"):
        StateStore(path)


@pytest.mark.parametrize("what", ["table", "blob", "missing blob"])
def test_damage_that_shows_when_it_is_read_is_a_reason_to_look(tmp_path: Path, what: str) -> None:
    """Starting again would end the same way: it is refused, with the remedy, and not merely fatal."""
    store = StateStore(tmp_path)
    size = 200 if what == "table" else BLOB_BYTES_MIN
    store.group(1).commit(7, 2, [(b"%03d" % n, Random(n).randbytes(size)) for n in range(400)], [], [])
    store.rest()
    store.close()
    file = max(tmp_path.glob("*.sst" if what == "table" else "*.blob"), key=lambda f: f.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    if what == "missing blob":
        file.unlink()
    else:
        file.write_bytes(raw)

    def read() -> None:
        store = StateStore(tmp_path)
        try:
            rows = store.group(1)
            with pytest.raises(StorageDamaged):
                rows.get_many([b"%03d" % n for n in range(400)])
            rows_of(rows)
        finally:
            store.close()

    with pytest.raises(StorageDamaged, match=r"cannot be read.*replace this node by an empty one") as raised:
        read()
    assert isinstance(raised.value, StoreRefused) and isinstance(raised.value, StorageFailed)


def test_what_a_database_says_when_it_is_closed_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    """A compaction met damage, too: it is said of the store what was found first, and one that is closed is closed."""
    store = StateStore(tmp_path / "newer")
    store.db[b"F"] = b"\x02"
    store.close()
    opened: list[Rdict] = []

    def failing(*arguments: Any) -> FailingDatabase:
        opened.append(Rdict(*arguments))
        return FailingDatabase(opened[-1], "close", "Corruption: block checksum mismatch")
    monkeypatch.setattr(state_store, "Rdict", failing)
    with pytest.raises(StoreRefused, match="format 2"):
        StateStore(tmp_path / "newer")
    StateStore(tmp_path / "other").close()
    assert f"{tmp_path / 'other'} was closed, and RocksDB says: Corruption: block checksum mismatch" in caplog.text
    for db in opened:
        db.close()


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    """An operator's mistake, not a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreRefused, match="cannot be opened"):
        StateStore(tmp_path / "file")


@pytest.mark.parametrize(("key", "value", "said"), [
    (b"F", b"\x02", "format 2, written by a newer Spillway; this one reads up to 1: start the newer version"),
    (b"M\0\0\0\x01", b"\x02", "group 1 in .* has format 2, written by a newer Spillway"),
    (b"M\0\0\0\x01", b"\x01\0", "group 1 in .* is damaged: its meta row has 2 bytes"),
    (b"M\0\0\0\x01", b"", "group 1 in .* is damaged: its meta row has 0 bytes"),
    (b"F", b"", "damaged"),
    (b"M\0", b"\x01", "damaged"),
    (b"R\0", b"", "damaged"),
])
def test_a_store_that_cannot_be_read_is_refused(tmp_path: Path, key: bytes, value: bytes, said: str) -> None:
    """Before anything is changed, and naming the remedy."""
    store = StateStore(tmp_path)
    store.group(1).commit(1, 1, [], [], [])
    store.db[key] = value
    store.close()
    for _ in range(2):  # the refused store was closed
        with pytest.raises(StoreRefused, match=said):
            StateStore(tmp_path)


def test_large_values_are_rows_as_others(tmp_path: Path) -> None:
    """Values that live in files of their own are read, replaced and deleted."""
    store = StateStore(tmp_path)
    rows = store.group(1)
    large = Random(2).randbytes(100_000)
    rows.commit(1, 1, [(b"a", large), (b"b", large[::-1]), (b"c", large)], [], [])
    store.db.flush(True)
    assert list(tmp_path.glob("*.blob"))
    rows.commit(2, 1, [(b"b", b"small")], [b"c"], [])
    store.sync_now()
    store.close()
    store = StateStore(tmp_path)
    assert rows_of(store.group(1)) == {b"a": large, b"b": b"small"}
    store.close()


def test_resting_gives_memory_back(tmp_path: Path) -> None:
    """A quiet store buffers next to nothing."""
    store = StateStore(tmp_path)
    store.group(1).commit(1, 1, [(b"%d" % n, bytes(1000)) for n in range(3000)], [], [])
    assert store.db.property_int_value("rocksdb.cur-size-active-mem-table") > 3_000_000
    store.rest()
    assert store.db.property_int_value("rocksdb.cur-size-active-mem-table") < 100_000
    assert repr(store.group(1)) == "<rows of group 1: applied 1 of term 1, durable 0, generation 1>"
    store.sync_now()
    assert store.group(1).durable_index == 1
    store.close()


def test_the_configuration_goes_with_the_next_commit(tmp_path: Path) -> None:
    """Atomically with the entry that it is of, and beside the state machine's rows."""
    store = StateStore(tmp_path)
    rows = store.group(1)
    assert store.configuration(1) is None
    rows.commit(4, 1, [(b"k", b"v")], [], [])
    rows.configure(7, b"members")
    assert store.configuration(1) == (7, b"members") and store.configuration(2) is None
    store.close()
    store = StateStore(tmp_path)
    assert store.configuration(1) is None, "it was not committed"
    rows = store.group(1)
    rows.configure(7, b"members")
    rows.commit(9, 1, [], [], [])
    store.close()
    store = StateStore(tmp_path)
    assert store.configuration(1) == (7, b"members") and store.applied(1) == (9, 1)
    assert list(store.group(1).scan(b"", b"\xff\xff\xff\xff")) == [(b"k", b"v")]
    store.close()


def test_a_replica_is_forgotten_for_good(tmp_path: Path) -> None:
    """All its rows of all generations, and nobody else's; it may come again, blank."""
    store = StateStore(tmp_path)
    for group in (1, 2):
        store.group(group).commit(4, 1, [(b"k", b"v")], [], [])
    store.forget(1)
    assert store.applied(1) == (0, 0) and rows_of(store.group(1)) == {}
    store.close()
    store = StateStore(tmp_path)
    assert store.applied(1) == (0, 0) and rows_of(store.group(1)) == {}
    assert store.applied(2) == (4, 1) and rows_of(store.group(2)) == {b"k": b"v"}
    store.close()
