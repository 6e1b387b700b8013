"""What a node gives to backups: the state of a group that it leads, with all that was acknowledged before."""
from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from node_world import Context, Refused, World
from spillway.broker.errors import Unavailable
from spillway.broker.runtime import backup
from spillway.broker.services.cluster import ClusterService
from spillway.cluster.errors import StorageFailed
from spillway.cluster.machine import Role
from spillway.cluster.state_store import StateStore
from spillway.contract.backup import Chain
from spillway.v1 import cluster_service_pb2 as pb


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> World:
    """A node that leads everything and knows a destination."""
    world = World(tmp_path)
    world.host.lead()
    world.know("d")
    return world


async def parts(world: World, group: int, turns: bool = True) -> list[pb.BackupResponse]:
    """All that a backup gets of a group, with turns while it lasts."""
    async def collect() -> list[pb.BackupResponse]:
        return [part async for part in world.node.backups.read(group)]

    task = asyncio.ensure_future(collect())
    while not task.done():
        await asyncio.sleep(0)
        if turns:
            world.host.turn()
    return task.result()


async def rows_of(found: list[pb.BackupResponse], group: int, path: Path) -> dict[bytes, bytes]:
    """The rows in it."""
    chain = Chain(group)
    for part in found[1:]:
        chain.take(part.chunk)
    assert chain.complete and found[0].cluster.shard_count == 2

    async def chunks(position: object) -> Any:
        for part in found[1:]:
            yield part.chunk

    store = StateStore(path)
    await store.install(group, "backup", chunks, 0)
    rows = dict(store.group(group).scan(b"", b"\xff\xff\xff\xff\xff"))
    store.close()
    return rows


async def test_everything_that_was_stored_before_is_in_it(world: World, tmp_path: Path) -> None:
    """Though no checkpoint had saved it; and the cluster says who it is."""
    await world.put("d", b"payload-1", b"payload-2")
    (shard,) = (n for n, runtime in world.node.shards.items() if b"d" in runtime.state.counters)
    assert world.node.shards[shard].rows.applied_index == 0
    found = await parts(world, shard)
    assert (found[0].cluster.cluster, found[0].cluster.replica_count) == ("spillway", 1) and found[0].cluster.version
    rows = await rows_of(found, shard, tmp_path / "copy")
    assert [value[-9:] for key, value in sorted(rows.items()) if key.startswith(b"m")] == [b"payload-1", b"payload-2"]
    meta = await rows_of(await parts(world, 0), 0, tmp_path / "copy")
    assert not meta  # nothing was decided yet; but its log has an entry for the backup
    assert world.node.meta.rows.applied_index == 1


async def test_a_leader_that_cannot_commit_gives_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be deposed, and not know what others acknowledged since."""
    monkeypatch.setattr(backup, "BARRIER_SECONDS", 0.02)
    with pytest.raises(Unavailable, match="shard 1 has no quorum"):
        await parts(world, 1, turns=False)
    world.host.turn()
    assert (await parts(world, 1))[0].cluster.cluster


async def test_a_leader_that_is_deposed_gives_nothing(world: World) -> None:
    """Be it before its entry is proposed, or when it is under way; one that follows is not even asked."""
    machine = world.node.shards[1]
    for propose in (False, True):
        task = asyncio.ensure_future(parts(world, 1, turns=False))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert machine.waiting
        if propose:
            assert machine.collect() is not None and not machine.waiting
        machine.role_changed(Role.FOLLOWER, 2, "n2")
        with pytest.raises(Unavailable, match="shard 1: the leader changed"):
            await task
        assert not machine.waiting
        with pytest.raises(Unavailable, match="does not lead shard 1"):
            await parts(world, 1)
        machine.role_changed(Role.LEADER, 3, "n1")
        world.host.term[1] = 3
    assert len(await parts(world, 1)) > 1


async def test_backups_at_a_time_are_bounded(world: World) -> None:
    """Each pins files; places are free again when readers have read all, or gone away."""
    readers = [world.node.backups.read(0) for _ in range(backup.EXPORTS_MAX)]
    firsts = [asyncio.ensure_future(anext(reader)) for reader in readers]
    while not all(first.done() for first in firsts):
        await asyncio.sleep(0)
        world.host.turn()
    with pytest.raises(Unavailable, match=f"is sending {backup.EXPORTS_MAX} groups to backups already; try again"):
        await parts(world, 0)
    for reader in readers:
        await reader.aclose()  # type: ignore[attr-defined]
    assert len(await parts(world, 0)) > 1


async def test_who_takes_nothing_holds_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while its place is another's, and its stream ends without the end of the state."""
    monkeypatch.setattr(backup, "STALL_SECONDS", 0.01)
    reader = world.node.backups.read(0)
    first = asyncio.ensure_future(anext(reader))
    while not first.done():
        await asyncio.sleep(0)
        world.host.turn()
    await anext(reader)
    assert world.node.backups._open
    while world.node.backups._open:
        await asyncio.sleep(0.001)
    with pytest.raises(Unavailable, match="nothing was taken for"):
        await anext(reader)


async def test_state_that_cannot_be_read_ends_the_node(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wherever else it meets damage."""
    fatal: list[BaseException] = []
    monkeypatch.setattr(world.host, "fatal", fatal.append)

    class Broken:
        def __iter__(self) -> Broken:
            return self

        def __next__(self) -> bytes:
            raise StorageFailed("rotten")

        def close(self) -> None:
            pass

    monkeypatch.setattr(world.node.store, "exporter", lambda group: Broken())
    with pytest.raises(Unavailable, match="cannot read its state"):
        await parts(world, 1)
    assert [str(error) for error in fatal] == ["rotten"]


async def test_the_call_finds_the_leader(world: World) -> None:
    """Here, or at another node; between nodes it is passed on no further. A group that there is not is refused by the field's name."""
    asked: list[int] = []

    class Call:
        def __init__(self, request: pb.BackupRequest) -> None:
            asked.append(request.group)

        async def __aiter__(self) -> Any:
            yield pb.BackupResponse(chunk=b"of n2")

        def cancel(self) -> None:
            asked.append(-1)

    leaders = {1: "n1", 2: "n2"}

    async def await_leader(shard: int) -> str:
        return leaders[shard]

    async def await_meta_leader() -> str:
        return "n2"

    link = SimpleNamespace(cluster=SimpleNamespace(Backup=Call))
    forwarder: Any = SimpleNamespace(await_leader=await_leader, await_meta_leader=await_meta_leader, link=lambda node: link)

    async def call(group: int, peer: bool = False) -> list[pb.BackupResponse]:
        service = ClusterService(world.node, forwarder, peer)

        async def collect() -> list[pb.BackupResponse]:
            return [part async for part in service.Backup(pb.BackupRequest(group=group), Context())]
        task = asyncio.ensure_future(collect())
        while not task.done():
            await asyncio.sleep(0)
            world.host.turn()
        return task.result()

    assert (await call(1))[0].cluster.cluster == "spillway" and not asked
    assert [p.chunk for p in await call(2)] == [p.chunk for p in await call(0)] == [b"of n2"] and asked == [2, -1, 0, -1]
    with pytest.raises(Refused, match="UNAVAILABLE: this node does not lead group 2"):
        await call(2, peer=True)
    with pytest.raises(Refused, match="INVALID_ARGUMENT: group: there is no shard 3; there are 2"):
        await call(3)
