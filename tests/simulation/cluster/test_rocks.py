"""The simulated database behaves as RocksDB does, as far as the state store and the log use it."""
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import rocksdict
from rocksdict import Options

from tests.simulation.cluster import rocks


def _scan(database: Any, read: Any, end: bytes, start: bytes) -> list[tuple[bytes, bytes]]:
    read.set_iterate_upper_bound(end)
    return _rows(database.iter(read), start)


def _rows(rows: Any, start: bytes = b"") -> list[tuple[bytes, bytes]]:
    rows.seek(start)
    found = []
    while rows.valid():
        found.append((rows.key(), rows.value()))
        rows.next()
    rows.status()
    return found


def test_both_databases_behave_alike(tmp_path: Path) -> None:
    """Writes, deletes and range deletes in one batch, reads, scans of a moment, and a restart."""
    draw = random.Random(3)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    real: Any = rocksdict.Rdict(str(tmp_path / "db"), options)
    disk = rocks.Disk()
    twin: Any = rocks.Rdict(disk)
    keys = [bytes([a, b]) for a in range(8) for b in range(8)]
    for _ in range(300):
        batches: list[Any] = [rocksdict.WriteBatch(raw_mode=True), rocks.WriteBatch(raw_mode=True)]
        moments = [real.iter(rocksdict.ReadOptions()), twin.iter(rocks.ReadOptions())]
        before = _scan(twin, rocks.ReadOptions(), b"\xff", b"")
        for _ in range(draw.randrange(5)):
            what, key, other = draw.randrange(3), draw.choice(keys), draw.choice(keys)
            for batch in batches:
                if what == 0:
                    batch.put(key, other)
                elif what == 1:
                    batch.delete(key)
                elif key < other:
                    batch.delete_range(key, other)
        for database, batch in zip((real, twin), batches, strict=True):
            database.write(batch)
        start, end = sorted(draw.sample(keys, 2))
        assert _scan(real, rocksdict.ReadOptions(), end, start) == _scan(twin, rocks.ReadOptions(), end, start)
        some = draw.sample(keys, 5)
        assert real.get(some) == twin.get(some) and real.get(some[0]) == twin.get(some[0])
        assert _rows(moments[0]) == before == _rows(moments[1])
        del moments
    for database in (real, twin):
        database.flush_wal(True)
    disk.crash(draw)
    everything = _scan(real, rocksdict.ReadOptions(), b"\xff", b"")
    real.close()
    assert _scan(rocks.Rdict(disk), rocks.ReadOptions(), b"\xff", b"") == everything


def test_a_crash_keeps_a_prefix_of_what_was_not_synced() -> None:
    """Never a later batch without an earlier one, never less than what was synced."""
    kept = set()
    for seed in range(50):
        disk = rocks.Disk()
        database = rocks.Rdict(disk)
        for number in range(6):
            batch = rocks.WriteBatch()
            batch.put(b"%d" % number, b"")
            database.write(batch)
            if number == 2:
                database.flush_wal(True)
        disk.crash(random.Random(seed))
        assert sorted(disk.durable) == [b"%d" % n for n in range(len(disk.durable))]
        kept.add(len(disk.durable))
    assert kept == {3, 4, 5, 6}


def test_damage_is_found_when_it_is_read() -> None:
    """By `get`, by a scan's status, and not any more once the row was written anew."""
    disk = rocks.Disk()
    database = rocks.Rdict(disk)
    batch = rocks.WriteBatch()
    for number in range(4):
        batch.put(b"%d" % number, b"x")
    database.write(batch)
    disk.bad.add(b"2")
    for read in (lambda: database.get(b"2"), lambda: _scan(database, rocks.ReadOptions(), b"\xff", b"")):
        try:
            read()
        except OSError as error:
            assert "Corruption" in str(error)
        else:
            raise AssertionError("damage was not found")
    assert _scan(database, rocks.ReadOptions(), b"2", b"") == [(b"0", b"x"), (b"1", b"x")]
    database.write(batch)
    assert database.get(b"2") == b"x"
