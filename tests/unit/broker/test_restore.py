"""`spillway restore`: a data directory from a backup, whole or not at all, and never over anything."""
from __future__ import annotations

import asyncio
import fcntl
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from node_world import World
from spillway.broker import main, restore
from spillway.broker.config import NodeConfig, load
from spillway.broker.core.directory import Home, Member, Settle, encode_command
from spillway.broker.core.shard import Shard
from spillway.broker.datadir import FILE, RESTORING, claim
from spillway.broker.errors import DataDirError
from spillway.broker.runtime.meta import MetaRuntime
from spillway.client.backup import BackupWriter
from spillway.cluster.errors import StorageFailed, StoreRefused
from spillway.cluster.raft import restored
from spillway.cluster.raft.configuration import Configuration, decode_configuration
from spillway.cluster.raft.journal import JournalStore
from spillway.cluster.state_store import StateStore
from spillway.contract import backup as format_
from spillway.v1 import cluster_service_pb2 as pb

DAYS = 3


class Stub:
    """ClusterService of a World."""

    def __init__(self, world: World) -> None:
        self._world = world

    def Backup(self, request: pb.BackupRequest) -> Any:
        """As gRPC's."""
        read = self._world.node.backups.read(request.group)

        class Call:
            def __aiter__(self) -> AsyncIterator[pb.BackupResponse]:
                return read

            def cancel(self) -> None:
                pass
        return Call()


@pytest_asyncio.fixture
async def backup(tmp_path: Path) -> Path:
    """Of a cluster of three nodes and two shards, some days old, with five messages, one of them leased."""
    world = World(tmp_path / "old")
    world.host.lead()
    founding = Settle("x", 1, (Home(1, 0, ("a", "b")), Home(2, 0, ("b", "c"))),
                      tuple(Member(n, 0, f"{n}:1", f"{n}:2") for n in "abc"), first=True, cluster_id="old")
    world.node.meta.apply(1, 1, encode_command([founding]))
    world.host.indexes[0] = 1
    world.know("d")
    for key in ("k1", "k2", "k3", "k4"):
        await world.put("d", b"payload of " + key.encode(), key=key)
    await world.put("d", b"second", key="k1")
    await world.take(world.consumer(1))
    path = tmp_path / "backup"
    with BackupWriter(path, lambda progress: None) as writer:
        while (group := writer.next_group()) is not None:
            reading = asyncio.ensure_future(writer.reader(group).read(Stub(world)))
            while not reading.done():
                await asyncio.sleep(0)
                world.host.turn()
            reading.result()
        writer.finish()
    world.store.close()
    change(path, begun=(datetime.now(UTC) - timedelta(days=DAYS)).isoformat())
    return path


def change(backup: Path, **fields: Any) -> None:
    """Changes what a backup says of itself."""
    file = backup / format_.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """What a restore says that is refused."""
    capsys.readouterr()
    assert main.restore(list(arguments)) == code
    out = capsys.readouterr()
    assert not out.out and out.err.startswith("spillway restore: ")
    return out.err


def test_a_directory_is_made_that_serve_takes(backup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The state is the backup's; logs begin above all that the old cluster can have reached since; the old nodes are forgotten."""
    path = tmp_path / "x" / "new"
    assert main.restore([str(backup), "--data-dir", str(path), "--node-id", "n9", "--cluster", "other", "--replicas", "2"]) == 0
    out = capsys.readouterr().out
    serve = next(line for line in out.splitlines() if line.startswith("  start:")).split()[3:]
    config = load(serve, {})
    assert (config.node_id, config.cluster, config.shards, config.replicas) == ("n9", "other", 2, 2)
    assert claim(config) == path and sorted(p.name for p in path.iterdir()) == ["log", "log.synced", "node.json", "state"]

    manifest = format_.read_manifest(backup)
    store = StateStore(path / "state")
    journal = JournalStore(path / "log", "other", "n9")
    node = journal.node
    assert node.formed and not node.recovering and node.founders == {"n9": node.incarnation} and not journal.founding
    for group in manifest.groups:
        rows, log = store.group(group.group), journal.journal(group.group)
        assert rows.applied_index - group.index >= (DAYS + 1) * 24 * 3600 * 1000
        assert rows.applied_term - group.term >= (DAYS + 1) * 24 * 3600 * 1000
        assert (log.first, log.last, log.term_at(log.last)) == (rows.applied_index, rows.applied_index, rows.applied_term)
        assert (log.getCurrentTerm(), log.getVotedForNodeId(), log.admitted) == (rows.applied_term, None, node.incarnation)
        assert log.configuration == Configuration(("n9",)) and log.install_above is None
        at, configuration = rows.configuration or (0, b"")
        assert (at, decode_configuration(configuration)) == (log.configuration_index, log.configuration)
    shards = [Shard(store.group(number)) for number in (1, 2)]
    found = {name: [m[3] for m in shard.messages(queue)] for shard in shards
             for name in shard.queue_names(b"d", b"", 10) if (queue := shard.open(name)) is not None}
    assert {name.decode().split("\0")[2]: len(bodies) for name, bodies in found.items()} == {"k1": 2, "k2": 1, "k3": 1, "k4": 1}
    assert sum(len(shard.leases) for shard in shards) == 1
    meta = MetaRuntime("n9", store.group(0), lambda: None)
    assert not meta.directory.members and not meta.directory.homes
    assert meta.directory.identity is not None and meta.directory.identity.former == ("old",)
    assert meta.directory.cluster_id == node.cluster_id != ""
    store.close()
    journal.close()


def test_nothing_is_restored_over_anything(backup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's directory, somebody's files, a restore that is at work: each with what to do, and untouched."""
    path = tmp_path / "data"
    claim(NodeConfig(data_dir=str(path)))
    text = refused(capsys, str(backup), "--data-dir", str(path))
    assert (f"data_dir {path} has the data of a node, and a restore never replaces any; name another directory, or move this one away if "
            "its cluster is gone") in text
    assert [p.name for p in path.iterdir()] == [FILE]
    (path / FILE).rename(path / "log")
    assert f"data_dir {path} is not empty; name an empty directory" in refused(capsys, str(backup), "--data-dir", str(path))
    assert [p.name for p in path.iterdir()] == ["log"]
    assert "cannot be used: File exists" in refused(capsys, str(backup), "--data-dir", str(path / "log"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "state").write_text("of that one")
    with (other / RESTORING).open("wb") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        assert "another restore is at work" in refused(capsys, str(backup), "--data-dir", str(other))
    assert (other / "state").read_text() == "of that one"

    def finish(*_: object) -> None:  # the other one, at the last moment
        (other / FILE).write_text("{}")
    monkeypatch.setattr(fcntl, "flock", finish)
    assert "has the data of a node" in refused(capsys, str(backup), "--data-dir", str(other))
    assert (other / "state").read_text() == "of that one"


@pytest.mark.parametrize("moment", ["installed", "founded", "named"])
def test_half_a_restore_is_no_data_directory(backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Wherever it ends, serve refuses what is there, and says so; the next restore does all of it again."""
    path = tmp_path / "new"

    def crash(*_: object) -> Any:
        raise KeyboardInterrupt
    if moment == "installed":
        monkeypatch.setattr(restored, "found", crash)
    elif moment == "founded":
        monkeypatch.setattr(StateStore, "sync_now", crash)
    else:
        monkeypatch.setattr("spillway.broker.datadir._write", crash)
    with pytest.raises(KeyboardInterrupt):
        main.restore([str(backup), "--data-dir", str(path)])
    monkeypatch.undo()
    with pytest.raises(DataDirError, match=r"is half of a restore that did not finish; run `spillway restore` again, or empty"):
        claim(load(["--data-dir", str(path), "--shards", "2"], {}))
    assert main.restore([str(backup), "--data-dir", str(path)]) == 0
    assert claim(load(["--data-dir", str(path), "--shards", "2", "--replicas", "1"], {})) == path
    assert not (path / RESTORING).exists()


def test_settings_that_do_not_fit_are_refused(backup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is made."""
    into = ["--data-dir", str(tmp_path / "new")]
    text = refused(capsys, str(backup), *into, "--shards", "4")
    assert "shards is 4, and 2 in the backup, for ever: leave it out, or set it to 2" in text
    text = refused(capsys, str(backup), *into, "--join", "127.0.0.1:1")
    assert "join is set; what is restored is the first node of a new cluster, which others join: leave it out" in text
    assert "node_id is ''" in refused(capsys, str(backup), *into, "--node-id", "")
    assert not (tmp_path / "new").exists()
    text = refused(capsys, str(backup), *into, "--disk-free-bytes-min", str(1 << 60))
    assert "MiB free" in text and "free some, or name another one" in text


def test_what_is_no_backup_is_refused(backup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or not a whole one, or a newer one's, or damaged, and a cluster that cannot be."""
    into = ["--data-dir", str(tmp_path / "new")]
    assert "is no backup, or one that did not finish" in refused(capsys, str(tmp_path / "nothing"), *into)
    change(backup, format=9)
    assert "format 9, written by a newer Spillway; this one reads up to 1: use the newer version" in refused(capsys, str(backup), *into)
    change(backup, format=1, cluster="a/b")
    assert "cluster is 'a/b'" in refused(capsys, str(backup), *into)
    change(backup, cluster="c", begun="1026-01-01T00:00:00+00:00")
    assert "would begin at entry" in refused(capsys, str(backup), *into, code=3)
    change(backup, begun=datetime.now(UTC).isoformat())
    file = backup / "shard-0001.group"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "shard-0001.group is damaged: the checksum of chunk" in refused(capsys, str(backup), *into)
    file.write_bytes(content[:-1])
    assert "bytes, not" in refused(capsys, str(backup), *into)


def test_a_directory_row_that_does_not_decode_is_found_here(backup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the node that starts; and a disk that fails is told apart from a backup that does."""
    into = ["--data-dir", str(tmp_path / "new")]

    def corrupt(self: object, rows: object) -> None:
        raise restore.CorruptEntry("the row b'd' of the directory does not decode")
    with monkeypatch.context() as patch:
        patch.setattr(restore.Directory, "load", corrupt)
        assert "meta.group cannot be restored: the row b'd'" in refused(capsys, str(backup), *into)

    def fail(self: object) -> None:
        raise StorageFailed("the state cannot be synced: the disk is on fire")
    monkeypatch.setattr(StateStore, "sync_now", fail)
    assert "the disk is on fire" in refused(capsys, str(backup), *into, code=3)


def test_logs_begin_above_what_the_cluster_can_have_reached() -> None:
    """Also if clocks differ by some hours; but not beyond what numbers hold."""
    day = restored.DAY_MS
    assert [restored.jump(elapsed) for elapsed in (-5 * day, 0, day)] == [day, day, 2 * day]


async def test_a_log_that_would_begin_too_high_is_refused(tmp_path: Path) -> None:
    """Sequences and copies' numbers are made of indexes, and have 64 bits."""
    store = StateStore(tmp_path / "state")
    journal = JournalStore(tmp_path / "log", "c", "n")
    with pytest.raises(StoreRefused, match="group 1 would begin at entry"):
        restored.found(journal, [(1, store.group(1))], 1, restored.INDEX_MAX + 1, "i")
    assert not journal.node.formed
    store.close()
    journal.close()
