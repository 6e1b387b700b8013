"""Snapshots of a group: out of one store, into another, whatever breaks in between."""
from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spillway.cluster import state_store
from spillway.cluster.errors import SnapshotBroken, SnapshotInvalid, StorageDamaged, StorageFailed
from spillway.cluster.snapshots import CHUNK_ROWS_MAX, Installer, Position
from spillway.cluster.state_store import StateStore
from spillway.contract.snapshot import CHUNK_BYTES_MAX

GROUP = 3
Rows = dict[bytes, bytes]
Fetch = Callable[[Position | None], AsyncIterator[bytes]]


def filled(path: Path, index: int = 10) -> tuple[StateStore, Rows]:
    """A store with a group of rows of all sizes, and what is in it."""
    random = Random(4)
    rows = {b"": b"empty key", b"\xff" * 12: b"last"}
    rows |= {b"small%05d" % n: random.randbytes(random.randrange(60)) for n in range(CHUNK_ROWS_MAX * 3)}
    rows |= {b"middle%03d" % n: random.randbytes(2_000) for n in range(200)}
    rows |= {b"large%d" % n: random.randbytes(CHUNK_BYTES_MAX * n) for n in range(4)}
    store = StateStore(path)
    store.group(GROUP).commit(index, 2, list(rows.items()), [], [])
    store.group(GROUP + 1).commit(1, 1, [(b"other", b"group")], [], [])
    return store, rows


def content(store: StateStore, group: int = GROUP) -> Rows:
    return dict(store.group(group).scan(b"", b"\xff" * 16))


async def chunks_of(store: StateStore, group: int = GROUP) -> list[bytes]:
    return [chunk async for chunk in store.export(group, "peer", None)]


def stream(chunks: Iterable[bytes], error: Exception | None = None) -> Fetch:
    """What a peer sends, wherever the receiver is; then perhaps an error."""
    async def fetch(position: Position | None) -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk
        if error is not None:
            raise error
    return fetch


def generations(store: StateStore) -> set[bytes]:
    """Prefixes of rows in the database."""
    return {key[:9] for key, _ in store.scan(b"R", b"S")}


async def test_a_snapshot_replaces_what_was_there(tmp_path: Path) -> None:
    """Rows, applied index and term are the exporter's; durable at once, and after a restart."""
    source, rows = filled(tmp_path / "a")
    target = StateStore(tmp_path / "b")
    target.group(GROUP).commit(4, 1, [(b"old", b"row"), (b"small00001", b"old")], [], [])
    target.group(GROUP + 1).commit(2, 1, [(b"other", b"one")], [], [])
    chunks = await chunks_of(source)
    assert max(map(len, chunks)) <= CHUNK_BYTES_MAX
    assert len(chunks) > 10
    assert await target.install(GROUP, "peer", stream(chunks), 4) == (10, 2)
    assert (target.applied(GROUP), target.group(GROUP).durable_index) == ((10, 2), 10)
    for _ in range(2):
        assert content(target) == rows
        assert content(target, GROUP + 1) == {b"other": b"one"}
        assert len(generations(target)) == 2, "the old rows are gone"
        target.close()
        target = StateStore(tmp_path / "b")
    target.group(GROUP).commit(11, 2, [(b"new", b"row")], [], [])
    assert content(target) == rows | {b"new": b"row"}
    target.close()
    source.close()


async def test_a_snapshot_shows_one_moment(tmp_path: Path) -> None:
    """Commits and replacements during an export don't show in it."""
    source, rows = filled(tmp_path / "a")
    target = StateStore(tmp_path / "b")
    exporter = source.exporter(GROUP)
    chunks = [next(exporter)]
    source.group(GROUP).commit(11, 2, [(b"zz", b"late"), (b"small00000", b"late")], [b"large1"], [(b"m", b"n")])
    chunks += exporter
    assert await target.install(GROUP, "peer", stream(chunks), 0) == (10, 2)
    assert content(target) == rows
    target.close()
    source.close()


async def test_an_empty_group_travels(tmp_path: Path) -> None:
    """No rows, but an applied index."""
    source, target = StateStore(tmp_path / "a"), StateStore(tmp_path / "b")
    source.group(GROUP).commit(5, 1, [], [], [])
    target.group(GROUP).commit(4, 1, [(b"a", b"1")], [], [])
    assert await target.install(GROUP, "peer", stream(source.exporter(GROUP)), 4) == (5, 1)
    assert content(target) == {}
    target.close()
    source.close()


def _changed(chunk: bytes, at: int) -> bytes:
    return chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1:]


def _sealed(kind: bytes, number: int, body: bytes, checksum: int = 0) -> bytes:
    head = kind + number.to_bytes(4, "little")
    return zlib.crc32(head + body, checksum).to_bytes(4, "little") + head + body


BREAKS: dict[str, tuple[Any, str]] = {
    "nothing": (lambda c: [], "it broke off"),
    "no end": (lambda c: c[:-1], "it broke off"),
    "no beginning": (lambda c: c[1:], "chunk 1 instead of 0"),
    "one missing": (lambda c: c[:5] + c[6:], "chunk 6 instead of 5"),
    "one twice": (lambda c: c[:5] + c[4:], "chunk 4 instead of 5"),
    "two swapped": (lambda c: [*c[:3], c[4], c[3], *c[5:]], "chunk 4 instead of 3"),
    "more": (lambda c: [*c, c[-1]], "a chunk after the last one"),
    "a bit of the checksum": (lambda c: [*c[:3], _changed(c[3], 0), *c[4:]], "checksum of chunk 3"),
    "a bit of a row": (lambda c: [*c[:3], _changed(c[3], len(c[3]) - 1), *c[4:]], "checksum of chunk 3"),
    "a bit of the kind": (lambda c: [*c[:3], _changed(c[3], 4), *c[4:]], "checksum of chunk 3"),
    "a bit of the end": (lambda c: [*c[:-1], _changed(c[-1], 12)], "checksum"),
    "a short chunk": (lambda c: [b"12345678"], "a chunk of 8 bytes"),
    "a long chunk": (lambda c: [bytes(CHUNK_BYTES_MAX + 1)], f"a chunk of {CHUNK_BYTES_MAX + 1} bytes"),
    "rows first": (lambda c: [_sealed(b"R", 0, b"")], "chunk 0 is of kind b'R'"),
    "another format": (lambda c: [_sealed(b"H", 0, b"\x09" + c[0][10:])], "of format 9; this version takes 2"),
    "an empty header": (lambda c: [_sealed(b"H", 0, b"")], "of format 0"),
    "an unknown kind": (lambda c: [c[0], _sealed(b"X", 1, b"", zlib.crc32(c[0][4:]))], "chunk 1 is of kind b'X'"),
    "a second header": (lambda c: [c[0], _sealed(b"H", 1, c[0][9:], zlib.crc32(c[0][4:]))], "chunk 1 is of kind b'H'"),
    "a cut row": (lambda c: [c[0], _sealed(b"R", 1, b"\4\0\0\0\1\0\0\0keys", zlib.crc32(c[0][4:]))], "a row is cut"),
    "a cut row head": (lambda c: [c[0], _sealed(b"R", 1, b"\4\0\0\0", zlib.crc32(c[0][4:]))], "a row is cut"),
    "keys out of order": (lambda c: [c[0], _sealed(b"R", 1, b"\1\0\0\0\0\0\0\0b\1\0\0\0\0\0\0\0b", zlib.crc32(c[0][4:]))],
                          "rows are not in order"),
    "an end too early": (lambda c: [c[0], _sealed(b"T", 1, b"\1" + bytes(7), zlib.crc32(c[0][4:]))],
                         "0 rows came, but not all there are"),
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The chunks of a filled group."""
    source, _ = filled(tmp_path_factory.mktemp("source"))
    chunks = asyncio.run(chunks_of(source))
    source.close()
    return chunks


@pytest.mark.parametrize("name", BREAKS)
async def test_a_broken_snapshot_changes_nothing(tmp_path: Path, snapshot: list[bytes], name: str) -> None:
    """It is refused with its reason, and leaves no rows behind; unless it only ended early, which a next fetch may make good."""
    make, said = BREAKS[name]
    store = StateStore(tmp_path)
    store.group(GROUP).commit(4, 1, [(b"a", b"1")], [], [])
    with pytest.raises(SnapshotInvalid, match=said) as caught:
        await store.install(GROUP, "peer", stream(make(snapshot)), 4)
    kept = name == "no end"
    assert isinstance(caught.value, SnapshotBroken) is (kept or name == "nothing")
    assert (content(store), store.applied(GROUP), len(generations(store))) == ({b"a": b"1"}, (4, 1), 1 + kept)
    assert await store.install(GROUP, "peer", stream(snapshot), 4) == (10, 2)
    store.close()


@pytest.mark.parametrize(("applied", "above"), [(10, 0), (11, 0), (4, 10), (4, 11)])
async def test_an_older_snapshot_is_refused(tmp_path: Path, snapshot: list[bytes], applied: int, above: int) -> None:
    """At or below what is applied here, or what the caller knows to be applied."""
    store = StateStore(tmp_path)
    store.group(GROUP).commit(applied, 1, [(b"a", b"1")], [], [])
    with pytest.raises(SnapshotInvalid, match=f"as of entry 10, but {max(applied, above)} is applied here"):
        await store.install(GROUP, "peer", stream(snapshot), above)
    with pytest.raises(SnapshotInvalid, match=f"of group {GROUP + 1}: of group {GROUP}"):
        await store.install(GROUP + 1, "peer", stream(snapshot), 0)
    assert content(store) == {b"a": b"1"}
    store.close()


async def test_a_state_that_overtakes_a_snapshot_stays(tmp_path: Path, snapshot: list[bytes]) -> None:
    """What was committed during the transfer is not replaced by something older."""
    store = StateStore(tmp_path)
    installer = Installer(store, GROUP)
    for chunk in snapshot:
        installer.feed(chunk)
    store.group(GROUP).commit(10, 2, [(b"a", b"1")], [], [])
    with pytest.raises(SnapshotInvalid, match="10 is applied here"):
        installer.finish()
    installer.abort()
    assert content(store) == {b"a": b"1"}
    store.close()


@pytest.mark.parametrize("came", [0, 1, 7, -1, None])
@pytest.mark.parametrize("blank", [True, False])
async def test_a_crash_before_the_end_leaves_the_old_state(tmp_path: Path, snapshot: list[bytes], came: int | None,
                                                           blank: bool) -> None:
    """Even when every chunk had come; the next start drops the leftovers."""
    old = {} if blank else {b"a": b"1"}
    store = StateStore(tmp_path)
    if not blank:
        store.group(GROUP).commit(4, 1, list(old.items()), [], [])
    installer = Installer(store, GROUP)
    for chunk in snapshot[:came]:
        installer.feed(chunk)
    store.sync_now()
    store.close()
    store = StateStore(tmp_path)
    assert (content(store), store.applied(GROUP)) == (old, (0, 0) if blank else (4, 1))
    assert len(generations(store)) == len(old)
    assert await store.install(GROUP, "peer", stream(snapshot), 0) == (10, 2)
    assert b"large3" in content(store)
    store.close()


async def test_a_transfer_goes_on_where_it_broke(tmp_path: Path) -> None:
    """After each refused or lost chunk, from the receiver's position, with nothing sent twice in vain and nothing of what was
    committed meanwhile."""
    source, rows = filled(tmp_path / "a")
    target = StateStore(tmp_path / "b")
    exporter = source.exporter(GROUP)
    installer = Installer(target, GROUP)
    random = Random(5)
    sent = 0
    for chunk in exporter:
        sent += 1
        source.group(GROUP).commit(10 + sent, 2, [(b"late%d" % sent, b"x"), (b"large1", b"x")], [b"small00001"], [])
        if random.random() < 0.2:
            exporter.resume(installer.rewind())  # this chunk was lost, and whatever was under way
            continue
        if random.random() < 0.2:
            with pytest.raises(SnapshotInvalid):
                installer.feed(_changed(chunk, len(chunk) // 2))
        installer.feed(chunk)
    assert sent > installer.position.number + 5
    assert (installer.position.index, installer.position.rows) == (10, len(rows))
    assert installer.finish() == (10, 2)
    assert content(target) == rows
    with pytest.raises(SnapshotInvalid, match="closed"):
        exporter.resume(installer.position)
    with pytest.raises(SnapshotInvalid, match=f"as of entry {10 + sent}"):
        source.exporter(GROUP).resume(installer.position)
    target.close()
    source.close()


async def test_an_empty_key_is_a_position_like_any_other(tmp_path: Path) -> None:
    """A transfer that broke right behind the row without a key does not send it again."""
    source, target = StateStore(tmp_path / "a"), StateStore(tmp_path / "b")
    rows = {b"": b"empty key", b"large": bytes(CHUNK_BYTES_MAX)}
    source.group(GROUP).commit(10, 2, list(rows.items()), [], [])
    exporter, installer = source.exporter(GROUP), Installer(target, GROUP)
    for _ in range(2):
        installer.feed(next(exporter))
    assert (installer.position.rows, installer.position.last_key) == (1, b"")
    exporter.resume(installer.rewind())
    for chunk in exporter:
        installer.feed(chunk)
    assert installer.finish() == (10, 2)
    assert content(target) == rows
    target.close()
    source.close()


@pytest.mark.parametrize("position", [
    Position(10, 1 << 32, 0, 0, b""), Position(10, 1, 1 << 32, 0, b""), Position(10, 1, 0, 1 << 63, b""), Position(9, 1, 0, 0, b"")])
async def test_a_position_that_cannot_be_is_refused(tmp_path: Path, position: Position) -> None:
    """It comes from another node."""
    source, _ = filled(tmp_path)
    with pytest.raises(SnapshotInvalid, match="cannot go on at"):
        source.exporter(GROUP).resume(position)
    source.close()


async def test_what_came_of_a_broken_transfer_is_kept(tmp_path: Path) -> None:
    """The next fetch from the same peer says where to go on, and the rest of the chunks is enough; with the old state standing
    meanwhile, also as that of a later entry."""
    source, rows = filled(tmp_path / "a")
    store = StateStore(tmp_path / "b")
    store.group(GROUP).commit(4, 1, [(b"a", b"1")], [], [])
    exporter = source.exporter(GROUP)
    asked: list[Position | None] = []

    def some(count: int) -> Fetch:
        async def fetch(position: Position | None) -> AsyncIterator[bytes]:
            asked.append(position)
            if position is not None:
                exporter.resume(position)
            for _ in range(count):
                yield next(exporter)
            raise SnapshotBroken("the stream broke")
        return fetch

    for attempt in range(3):
        with pytest.raises(SnapshotBroken):
            await store.install(GROUP, "peer", some(4), 4)
        store.group(GROUP).commit(5 + attempt, 1, [(b"a", b"1")], [], [])
        assert content(store) == {b"a": b"1"}

    async def rest(position: Position | None) -> AsyncIterator[bytes]:
        asked.append(position)
        assert position is not None
        exporter.resume(position)
        for chunk in exporter:
            yield chunk

    assert await store.install(GROUP, "peer", rest, 7) == (10, 2)
    assert content(store) == rows and len(generations(store)) == 1
    numbers = [p and p.number for p in asked]
    assert numbers[0] is None and numbers[1] == 4 and numbers[1:] == sorted(set(numbers[1:]), key=lambda n: n or 0)
    store.close()
    source.close()


@pytest.mark.parametrize(("peer", "above", "sleep", "forgotten"), [
    ("other", 4, 0, False), ("peer", 10, 0, False), ("peer", 4, 1, False), ("peer", 4, 0, True)],
    ids=["another peer", "overtaken by the log", "too late", "the replica is gone"])
async def test_what_came_is_no_good_any_more(tmp_path: Path, snapshot: list[bytes], monkeypatch: pytest.MonkeyPatch, peer: str,
                                             above: int, sleep: float, forgotten: bool) -> None:
    """Then the fetch begins anew, and nothing is left of what came."""
    monkeypatch.setattr(state_store, "RESUME_SECONDS", 0.01 if sleep else 60)
    store = StateStore(tmp_path)
    with pytest.raises(SnapshotBroken):
        await store.install(GROUP, "peer", stream(snapshot[:5], SnapshotBroken("the stream broke")), 4)
    assert len(generations(store)) == 1
    if forgotten:
        store.forget(GROUP)
    async with asyncio.timeout(60):
        while sleep and store.installers:
            await asyncio.sleep(0.001)
    assert len(generations(store)) == (not sleep and not forgotten)

    async def fetch(position: Position | None) -> AsyncIterator[bytes]:
        assert position is None
        raise SnapshotInvalid("asked")
        yield b""

    with pytest.raises(SnapshotInvalid, match="asked"):
        await store.install(GROUP, peer, fetch, above)
    assert not generations(store)
    store.close()


async def test_a_sender_may_begin_anew(tmp_path: Path, snapshot: list[bytes]) -> None:
    """Its first chunk says so: what came of the other snapshot is dropped. A chunk that fits neither is refused, and nothing of it
    stays."""
    store = StateStore(tmp_path)
    broken = stream(snapshot[:5], SnapshotBroken("the stream broke"))
    with pytest.raises(SnapshotBroken):
        await store.install(GROUP, "peer", broken, 4)
    with pytest.raises(SnapshotInvalid, match="chunk 7 instead of 4"):
        await store.install(GROUP, "peer", stream(snapshot[7:]), 4)
    assert not generations(store)
    with pytest.raises(SnapshotBroken):
        await store.install(GROUP, "peer", broken, 4)
    assert await store.install(GROUP, "peer", stream(snapshot), 4) == (10, 2)
    assert len(generations(store)) == 1
    store.close()


async def test_the_last_installer_of_a_group_counts(tmp_path: Path, snapshot: list[bytes]) -> None:
    """An earlier one can neither write among its rows nor finish."""
    store = StateStore(tmp_path)
    first = Installer(store, GROUP)
    first.feed(snapshot[0])
    second = Installer(store, GROUP)
    with pytest.raises(SnapshotInvalid, match="another one was begun"):
        first.feed(snapshot[1])
    for chunk in snapshot:
        second.feed(chunk)
    first.abort()
    assert second.finish() == (10, 2)
    with pytest.raises(SnapshotInvalid, match="it was ended"):
        second.finish()
    assert b"large3" in content(store)
    store.close()


async def test_closing_a_store_ends_its_exports(tmp_path: Path) -> None:
    """They would keep the database open."""
    source, _ = filled(tmp_path)
    exporters = [source.exporter(GROUP) for _ in range(2)]
    next(exporters[0])
    next(exporters[0])
    source.close()
    assert list(exporters[0]) == list(exporters[1]) == []
    StateStore(tmp_path).close()


async def test_a_failing_disk_ends_an_install(tmp_path: Path, snapshot: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """As StorageFailed, which is fatal to the caller; the old state stands on disk."""
    store = StateStore(tmp_path)
    store.group(GROUP).commit(4, 1, [(b"a", b"1")], [], [])
    store.sync_now()

    def fail() -> None:
        raise store._fail("synced", OSError("Input/output error"))

    monkeypatch.setattr(store, "_flush_wal", fail)
    with pytest.raises(StorageFailed, match="Input/output error"):
        await store.install(GROUP, "peer", stream(snapshot), 4)
    store.close()
    store = StateStore(tmp_path)
    assert (content(store), store.applied(GROUP)) == ({b"a": b"1"}, (4, 1))
    store.close()


async def test_damage_under_an_export_is_an_error(tmp_path: Path) -> None:
    """A block that cannot be read does not end the snapshot as if it were complete, and the node is told."""
    source = StateStore(tmp_path)
    source.group(GROUP).commit(1, 1, [(b"%05d" % n, Random(n).randbytes(300)) for n in range(2_000)], [], [])
    source.db.flush(True)
    source.close()
    [file] = tmp_path.glob("*.sst")
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2:len(whole) // 2 + 64] = bytes(64)
    file.write_bytes(whole)
    source = StateStore(tmp_path)
    told: list[StorageFailed] = []
    source.unreadable = told.append
    with pytest.raises(StorageFailed, match="cannot be read"):
        await chunks_of(source)
    assert [type(error) for error in told] == [StorageDamaged]
    source.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateStore]:
    """A store that takes many snapshots."""
    store = StateStore(tmp_path_factory.mktemp("target"))
    yield store
    store.close()


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(st.lists(st.tuples(st.sampled_from(b"HPRTX"), st.binary(max_size=40)), max_size=6), st.binary(max_size=30))
def test_whatever_comes_is_taken_or_refused(target: StateStore, bodies: list[tuple[int, bytes]], raw: bytes) -> None:
    """Chunks of any content with correct checksums, and plain noise: SnapshotInvalid, never another error."""
    installer = Installer(target, GROUP)
    checksum = 0
    header = b"\2" + GROUP.to_bytes(4, "little") + (7).to_bytes(8, "little") + bytes(8)
    try:
        for number, (kind, body) in enumerate([(ord("H"), header), *bodies]):
            chunk = _sealed(bytes([kind]), number, body, checksum)
            checksum = int.from_bytes(chunk[:4], "little")
            installer.feed(chunk)
        installer.feed(raw)
    except SnapshotInvalid:
        pass
    installer.abort()
    assert generations(target) == set()
