"""Who may join and leave, and what is said to those who may not."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from node_world import Refused, World
from several_nodes import PeersContext
from spillway.broker.core import directory as d
from spillway.broker.core import features
from spillway.broker.errors import NotFound, RequestError, Unavailable
from spillway.broker.runtime.balance import check_departure, check_newcomer
from spillway.broker.services.cluster import ClusterService
from spillway.broker.services.member import MemberService
from spillway.peer.v1.member_service_pb2 import ClusterMember, JoinRequest


def known(incarnation: str = "i", leaving: int = d.STAYS) -> d.Member:
    return d.Member("n4", 1, "p:1", "c:1", incarnation=incarnation, leaving=leaving)


@pytest.mark.parametrize(("formed", "inside", "member", "running", "refused"), [
    (False, False, None, None, None),  # a new one
    (True, False, None, None, "the data of a cluster, and is no node of this one"),
    (False, True, None, None, "the data of a cluster, and is no node of this one"),  # it was removed meanwhile
    (True, False, known(), "i", None),  # it says what is new
    (False, False, known(), None, None),
    (False, False, known("old"), None, None),  # it lost its disk
    (False, True, known("old"), "i", None),  # it lost its disk, and has recovered
    (True, False, known(""), None, None),  # a founder that had not said
    (True, False, known("old"), None, "has other data"),
    (False, False, known("old"), "old", "running already"),  # two with one id
    (False, True, known("old"), "old", "running already"),
    (False, False, known(leaving=d.GONE), None, "being removed"),
    (True, False, known(leaving=d.DRAINS), None, None)])
def test_who_may_join(formed: bool, inside: bool, member: d.Member | None, running: str | None, refused: str | None) -> None:
    """A new node with an empty directory, and those that are known with their own; a node of the cluster whatever became of its disk,
    as the others have let it in."""
    new = ClusterMember(node_id="n4", incarnation="i")
    if refused is None:
        check_newcomer(new, formed, inside, member, running)
        return
    with pytest.raises(RequestError, match=refused) as caught:
        check_newcomer(new, formed, inside, member, running)
    assert caught.value.field == "node_id"


@pytest.mark.parametrize(("staying", "replicas", "refused"), [
    (["a", "b", "c", "d"], 3, None), (["a", "b"], 1, None),
    (["a", "b", "c"], 3, "there are 2 nodes, and shards have 3 replicas; let another node join first"),
    (["a", "b"], 3, "there are 1 nodes, and shards have 2 replicas"),
    (["a"], 3, "the last one"), (["a"], 1, "the last one")])
def test_who_may_leave(staying: list[str], replicas: int, refused: str | None) -> None:
    """Nobody without whom there were fewer nodes than replicas."""
    if refused is None:
        check_departure("a", staying, replicas)
        return
    with pytest.raises(RequestError, match=refused):
        check_departure("a", staying, replicas)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    world.node.meta.directory.level = features.MEMBERS
    yield world
    world.store.close()


@pytest.mark.parametrize(("said", "leaving", "shards", "answered"), [
    ({}, d.STAYS, 2, True), ({}, d.DRAINS, 2, True), ({}, d.GONE, 2, False), ({}, d.STAYS, 3, False),
    ({"node_id": "n5"}, d.STAYS, 2, False), ({"incarnation": "other"}, d.STAYS, 2, False), ({"peer_address": "p:2"}, d.STAYS, 2, False)])
async def test_who_is_a_member_already_needs_no_leader(world: World, said: dict[str, str], leaving: int, shards: int,
                                                       answered: bool) -> None:
    """A node that was killed right after it had joined asks again. It may be the very voter without whom the meta group has no leader:
    any node tells it who the others are. Whatever is new about it needs the leader."""
    async def await_meta_leader() -> str:
        raise Unavailable("there is no leader")

    world.node.meta.directory.members.update(n1=d.Member("n1", 1, "p:1", "c:1"), n4=known(leaving=leaving))
    forwarder: Any = SimpleNamespace(await_meta_leader=await_meta_leader)
    member = ClusterMember(**{"node_id": "n4", "peer_address": "p:1", "client_address": "c:1", "incarnation": "i", **said})
    request = JoinRequest(cluster="spillway", member=member, shard_count=shards, replica_count=1)
    joining = MemberService(world.node, forwarder).Join(request, PeersContext())
    if answered:
        assert [m.node_id for m in (await joining).members] == ["n1", "n4"]
    else:
        with pytest.raises(Refused, match="UNAVAILABLE: there is no leader"):
            await joining


async def test_nobody_leaves_a_cluster_that_is_only_forming(world: World) -> None:
    """The nodes have not said yet who they are: that is no reason to say that there is none of that name."""
    with pytest.raises(Unavailable, match="only forming; try again"):
        await world.node.balance.leave("n1", d.DRAINS)
    world.node.meta.directory.members.update(n1=d.Member("n1", 1, "p:1", "c:1"))
    with pytest.raises(NotFound, match="there is no node 'n2'; there are n1"):
        await world.node.balance.leave("n2", d.DRAINS)


async def test_who_watches_hears_of_leaders_of_shards_that_are_elsewhere(world: World) -> None:
    """A node without a replica of a shard, as one that was drained, tells its watchers when the shard's leader changes: clients would
    never ask the new one."""
    watching = asyncio.create_task(world.node.wait_topology(world.node.revision))
    await asyncio.sleep(0)
    for watcher in world.host.watchers:
        watcher(2, "n3", 5)
    await asyncio.wait_for(watching, 10)


@pytest.mark.parametrize("why", ["joins", "recovers"])
async def test_a_node_that_does_not_know_the_others_yet_names_no_nodes(world: World, why: str) -> None:
    """Its meta replica has not caught up: who believed that it is alone would forget all others. Those who watch hear when it knows."""
    service = ClusterService(world.node, world.forwarder)
    assert service.topology().shard_count == 2
    if why == "recovers":
        world.host.recovering = True
    else:
        world.node.config = msgspec.structs.replace(world.node.config, join=["127.0.0.1:7071"])
    world.node.balance.follow()
    assert (service.topology().cluster, service.topology().shard_count, len(service.topology().nodes)) == ("spillway", 0, 0)
    watching = asyncio.create_task(world.node.wait_topology(world.node.revision))
    await asyncio.sleep(0)
    world.node.meta.directory.members.update(n1=d.Member("n1", 1, "p:1", "c:1"))
    world.node.balance.follow()
    await asyncio.wait_for(watching, 10)
    assert service.topology().shard_count == 2
