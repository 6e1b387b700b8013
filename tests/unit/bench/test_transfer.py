"""The check of two stores sees every difference that matters."""
from __future__ import annotations

from pathlib import Path

import pytest
from spillway.cluster.snapshots import Installer
from spillway.cluster.state_store import StateStore

from bench.report import render
from bench.transfer import GROUP, digest, generations, tree_bytes

ROWS = [(b"m%03d" % n, b"body %d" % n) for n in range(50)] + [(b"qa", b"1"), (b"qb", b"2"), (b"x", b"clock")]


def stored(path: Path, rows: list[tuple[bytes, bytes]]) -> tuple[int, str]:
    """The digest of a store with these rows."""
    store = StateStore(path)
    store.group(GROUP).commit(7, 1, rows, [], [])
    store.close()
    return digest(path)


@pytest.mark.parametrize(("rows", "same"), [
    (ROWS, True), ([*ROWS, (b"x", b"later")], True),  # the clock goes on
    (ROWS[1:], False), ([*ROWS, (b"m999", b"")], False), ([*ROWS, (b"m001", b"body 2")], False), ([*ROWS, (b"qb", b"3")], False)],
    ids=["same", "another clock", "one missing", "one more", "another body", "another queue"])
def test_messages_and_queues_are_compared(tmp_path: Path, rows: list[tuple[bytes, bytes]], same: bool) -> None:
    """To the last byte, and nothing else is."""
    a, b = stored(tmp_path / "a", ROWS), stored(tmp_path / "b", rows)
    assert (a == b) is same
    assert a[0] == 52


def test_what_a_snapshot_left_behind_is_seen(tmp_path: Path) -> None:
    """A second generation of rows beside the state, until the store drops it."""
    source, target = StateStore(tmp_path / "a"), StateStore(tmp_path / "b")
    for store in (source, target):
        store.group(GROUP).commit(7, 1, ROWS, [], [])
    source.group(GROUP).commit(8, 1, [], [], [])
    installer = Installer(target, GROUP)
    exporter = source.exporter(GROUP)
    for _ in range(2):
        installer.feed(next(exporter))
    source.close()
    target.close()
    assert (generations(tmp_path / "a"), generations(tmp_path / "b")) == (1, 2)
    assert tree_bytes(tmp_path / "a") > 0 and digest(tmp_path / "b") == digest(tmp_path / "a")
    assert generations(tmp_path / "b") == 1


def test_a_move_is_reported() -> None:
    """Its growth is what is above the figure before, on each side, and a state that is not clean cannot be missed."""
    i = {"shard_bytes": 2 << 30, "messages": 1000, "seconds": 80.0, "megabytes_per_second": 26.8, "until_voter_seconds": 81.0,
         "receiver_bytes_at_kill": 1 << 30, "clean": False, "rss_fresh": 70_000_000, "sender_rss_before": 100_000_000,
         "sender_rss_peak": 105_000_000, "receiver_rss_peak": 121_000_000}
    limit = {"batch": 1, "messages_per_second": 1, "round_trip": {"p50_ms": 1, "p99_ms": 1}, "single_sync": {"p50_ms": 1, "p99_ms": 1}}
    machine = {"cores_usable": 2, "cpu": "c", "kernel": "k", "filesystem": "f", "python": "3", "commit": "abc",
               "uncommitted_changes": False, "load_average_before": 0.0}
    text = render({"machine": machine, "limits": {"grpc": limit, "rocksdb": limit}, "quick": False, "failed": {}, "i": i})
    assert "NOT CLEAN" in text and "2,147 MB" in text
    assert [line.split()[-1] for line in text.splitlines()[-2:]] == ["5.00", "51.00"]
