"""Backups as the client writes and reads them."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from spillway.client import BackupError, BackupProgress, InternalError, InvalidArgument, Manifest, Unavailable, cluster, verify_backup
from spillway.contract import backup as b
from spillway.contract.backup import BackupInvalid, GroupFile, decode_manifest, encode_manifest, read_chunks, read_manifest

from tests.unit.client.fake_broker import chunks
from tests.unit.client.serving import serving

MOMENT = datetime(2026, 3, 1, 12, tzinfo=UTC)
MANIFEST = Manifest("c", 2, 3, "1.0", MOMENT, MOMENT + timedelta(minutes=2), tuple(GroupFile(g, 9, 2, 5, 100, "ab" * 32) for g in range(3)))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(cluster, "Backoff", lambda base, cap: type("Now", (), {"next": lambda self: 0.0})())


async def test_every_group_is_in_a_file_of_its_own(tmp_path: Path) -> None:
    """With what was sent, for nobody else's eyes, and progress on the way; the meta group is the last that is read."""
    steps: list[BackupProgress] = []
    async with serving(2) as (_, client):
        made = await client.cluster.back_up(tmp_path / "x" / "b", on_progress=steps.append)
    path = tmp_path / "x" / "b"
    assert made == read_manifest(path) == verify_backup(path)
    assert (made.cluster, made.shards, made.replicas, made.version, made.rows) == ("fake", 4, 1, "7", 10)
    assert sorted(p.name for p in path.iterdir()) == ["backup.json", "meta.group", *(f"shard-000{n}.group" for n in range(1, 5))]
    assert (path.stat().st_mode | (path / "meta.group").stat().st_mode) & 0o077 == 0
    for group in made.groups:
        assert list(read_chunks(path, group)) == chunks(group.group, (b"key", b"value"), (b"other", b"x" * 1000))
    assert steps[-1] == BackupProgress(5, 5, made.bytes) and steps == sorted(steps, key=lambda s: (s.groups_done, s.bytes))
    assert all((path / "meta.group").stat().st_mtime_ns >= p.stat().st_mtime_ns for p in path.glob("shard*"))


@pytest.mark.parametrize("kind", ["break_backups", "spoil_backups"])
async def test_a_group_whose_stream_breaks_is_begun_again(tmp_path: Path, kind: str) -> None:
    """A few times; then it is Unavailable, and what is there is no backup."""
    async with serving(1) as (fake, client):
        node = fake.nodes["n1"]
        setattr(node, kind, 3)
        await client.cluster.back_up(tmp_path / "b")
        verify_backup(tmp_path / "b")
        setattr(node, kind, 100)
        with pytest.raises(Unavailable, match=r"the leader changed|came damaged: chunk 3 instead of 2"):
            await client.cluster.back_up(tmp_path / "c")
    with pytest.raises(BackupError, match=r"is no backup, or one that did not finish: it has no backup\.json; name a whole one"):
        verify_backup(tmp_path / "c")


async def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Not even what an earlier backup left."""
    (tmp_path / "meta.group").write_text("mine")
    async with serving() as (_, client):
        with pytest.raises(InvalidArgument, match="is not empty, and a backup never overwrites anything; name a new one"):
            await client.cluster.back_up(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["meta.group"] and (tmp_path / "meta.group").read_text() == "mine"


async def test_addresses_of_two_clusters_are_no_cluster(tmp_path: Path) -> None:
    """Half of one and half of the other would look like a backup."""
    async with serving(1) as (fake, client):
        fake.nodes["n1"].break_backups = 1

        def rename(progress: BackupProgress) -> None:
            fake.name = "other"
        with pytest.raises(InternalError, match="of two clusters: 'fake' and 'other'"):
            await client.cluster.back_up(tmp_path / "b", on_progress=rename)


def test_what_a_backup_says_of_itself_makes_the_round_trip() -> None:
    """Also in another time zone."""
    assert decode_manifest(encode_manifest(MANIFEST).encode()) == MANIFEST
    elsewhere = replace(MANIFEST, begun=MOMENT.astimezone(timezone(timedelta(hours=5))))
    assert decode_manifest(encode_manifest(elsewhere).encode()) == MANIFEST
    assert (MANIFEST.bytes, MANIFEST.rows) == (300, 15)


def changed(**fields: Any) -> bytes:
    """The manifest with other fields; those of the first group are called g_..."""
    found = json.loads(encode_manifest(MANIFEST))
    for name, value in fields.items():
        (found["groups"][0] if name.startswith("g_") else found)[name.removeprefix("g_")] = value
    return json.dumps(found).encode()


@pytest.mark.parametrize(("text", "says"), [
    (changed(format=2), "format 2, written by a newer Spillway; this one reads up to 1: use the newer version"),
    (changed(format="1"), "it has no format"),
    (changed(shards=3), "it has 3 shards, and not the files of exactly these"),
    (changed(shards=True), "it has no shards"),
    (changed(shards=10**6), "shards is 1000000"),
    (changed(replicas=0), "replicas is 0"),
    (changed(begun="yesterday"), "Invalid isoformat string"),
    (changed(begun="2026-03-01T12:00:00"), "begun has no time zone"),
    (changed(ended="0001-01-01T00:00:00+23:00"), "ended is 0001"),
    (changed(cluster=None), "it has no cluster"),
    (changed(groups={}), "it has no groups"),
    (changed(g_group=1, g_file="shard-0001.group"), "not the files of exactly these"),
    (changed(g_file="../../etc/passwd"), "the file of group 0 is not meta.group"),
    (changed(g_sha256="x" * 64), "the sha256 of group 0 is none"),
    (changed(g_index=0), "index is 0"),
    (changed(g_bytes=-1), "bytes is -1"),
    (changed(g_rows=1.5), "it has no rows"),
    (b"[]", "it has no format"),
    (b"[" * 100_000, "damaged"),
    (b"\xff", "damaged"),
    (b"", "damaged"),
])
def test_a_damaged_manifest_says_what_is_wrong(text: bytes, says: str) -> None:
    """And no file is opened because of one."""
    with pytest.raises(BackupInvalid) as caught:
        decode_manifest(text)
    assert says in str(caught.value), caught.value


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda c: c[:40] + bytes([c[40] ^ 1]) + c[41:],
    "a bit of a length": lambda c: bytes([c[0] ^ 1]) + c[1:],
    "an absurd length": lambda c: b"\xff\xff\xff\x7f" + c[4:],
    "the end is lost": lambda c: c[:-21] + b"\0" * 21,
    "twice": lambda c: c[:len(c) // 2] * 2 + c[2 * (len(c) // 2):],
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    """Wherever it is, if the file is as long as before."""
    async with serving() as (_, client):
        await client.cluster.back_up(tmp_path / "b")
    file = tmp_path / "b" / "shard-0002.group"
    content = file.read_bytes()
    file.write_bytes(DAMAGES[damage](content))
    with pytest.raises(BackupError, match=r"shard-0002\.group is damaged: .*; take another backup"):
        verify_backup(tmp_path / "b")
    file.write_bytes(content[:-1])
    with pytest.raises(BackupError, match=r"shard-0002\.group has \d+ bytes, not \d+"):
        verify_backup(tmp_path / "b")
    file.unlink()
    with pytest.raises(BackupError, match=r"shard-0002\.group cannot be read: No such file"):
        verify_backup(tmp_path / "b")


async def test_a_file_of_another_backup_is_none_of_this_one(tmp_path: Path) -> None:
    """Though it is whole in itself."""
    async with serving() as (_, client):
        await client.cluster.back_up(tmp_path / "b")
    manifest = read_manifest(tmp_path / "b")
    other = tuple(replace(g, sha256="0" * 64) if g.group == 2 else g for g in manifest.groups)
    (tmp_path / "b" / b.FILE).write_text(encode_manifest(replace(manifest, groups=other)))
    with pytest.raises(BackupError, match=r"shard-0002\.group is damaged: it is not the one that backup\.json speaks of"):
        verify_backup(tmp_path / "b")
