"""Who may join and leave, and what is said to those who may not."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import pytest
from node_world import Refused, World
from several_nodes import PeersContext
from spillway.broker.core import directory as d
from spillway.broker.core import features
from spillway.broker.errors import NotFound, RequestError, Unavailable
from spillway.broker.runtime.balance import check_addresses, check_departure, check_newcomer
from spillway.broker.services.cluster import ClusterService
from spillway.broker.services.member import MemberService
from spillway.peer.v1.member_service_pb2 import ClusterMember, JoinRequest, JoinResponse
from spillway.peer.v1.member_service_pb2_grpc import MemberServiceServicer, add_MemberServiceServicer_to_server


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


@pytest.mark.parametrize(("peer", "client", "refused"), [
    ("p:2", "c:2", None), ("p:1", "c:2", "peer_address: is p:1, and so is that of node 'n1': choose another one, or remove that"),
    ("p:2", "c:1", "client_address: is c:1")])
def test_two_nodes_are_not_at_one_address(peer: str, client: str, refused: str | None) -> None:
    """The others would take one for the other. A node may stay where it is, or was."""
    members = [d.Member("n1", 1, "p:1", "c:1"), known()]
    members[1] = msgspec.structs.replace(members[1], peer_address="p:4")
    new = ClusterMember(node_id="n4", peer_address=peer, client_address=client)
    if refused is None:
        check_addresses(new, members)
    else:
        with pytest.raises(RequestError, match=refused):
            check_addresses(new, members)


def test_nobody_joins_whom_it_cannot_reach() -> None:
    """A cluster of one that listens anywhere may not have said where that is; it can say so yet."""
    new = ClusterMember(node_id="n4", peer_address="p:4", client_address="c:4")
    with pytest.raises(Unavailable, match=r"'n1' says that it is at 0\.0\.0\.0:7071, where no other node reaches it"):
        check_addresses(new, [d.Member("n1", 1, "0.0.0.0:7071", "c:1")])


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


@pytest.mark.parametrize(("said", "refused"), [
    ({"peer_address": "0.0.0.0:7071"}, "peer_address: is 0.0.0.0:7071, where no other node reaches it; start it with --advertise"),
    ({"client_address": "[::]:7070"}, "client_address: is"), ({"client_address": "c:0"}, "client_address: is c:0")])
async def test_a_node_that_is_nowhere_does_not_join(world: World, said: dict[str, str], refused: str) -> None:
    """Others would look for it on their own machines."""
    member = ClusterMember(**{"node_id": "n4", "peer_address": "p:1", "client_address": "c:1", **said})
    with pytest.raises(Refused, match=f"INVALID_ARGUMENT: {refused}"):
        await MemberService(world.node, world.forwarder).Join(JoinRequest(cluster="spillway", member=member), PeersContext())


async def test_what_a_node_says_is_newer_than_what_the_operator_said_of_it(tmp_path: Path) -> None:
    """The addresses in --peers win over those in the log when a node starts, as they may all have changed. A node that says another one
    since, as it was removed and has joined at another machine, is there."""
    world = World(tmp_path, peers=["n1=p:1/c:1", "n2=named:2/c:2"])
    statuses: dict[int, Any] = {}
    world.host.status = lambda: statuses  # type: ignore[attr-defined]
    node, told = world.node, []
    node.balance.joined = told.append
    node.meta.directory.members.update(n1=d.Member("n1", 5, "p:1", "c:1"), n2=d.Member("n2", 5, "said:2", "c:2"))

    def follow() -> None:
        node.meta.revision += 1
        node.balance.follow()

    follow()
    statuses[0] = SimpleNamespace(log_last_index=9)
    node.meta.directory.members["n2"] = d.Member("n2", 9, "logged:2", "c:2")  # of an entry from before it was started
    follow()
    assert told == [] and node.members["n2"].peer_address == "named:2"
    node.meta.directory.members["n2"] = d.Member("n2", 10, "new:2", "c:2")
    follow()
    assert told == [{"n2": "new:2"}] and node.members["n2"].peer_address == "new:2"
    world.store.close()


class Elsewhere(MemberServiceServicer):
    """A node that is asked."""

    def __init__(self, answer: JoinResponse | tuple[grpc.StatusCode, str]) -> None:
        self.answer = answer
        self.asked: list[JoinRequest] = []

    async def Join(self, request: JoinRequest, context: Any) -> JoinResponse:  # type: ignore[override]
        self.asked.append(request)
        if isinstance(self.answer, tuple):
            await context.abort(*self.answer)
        assert isinstance(self.answer, JoinResponse)
        return self.answer


@pytest.mark.parametrize("answer", [
    JoinResponse(members=[ClusterMember(node_id="n1", peer_address="p:1"), ClusterMember(node_id="n2", peer_address="moved:2"),
                          ClusterMember(node_id="n5", peer_address="p:5")]),
    (grpc.StatusCode.NOT_FOUND, "node_id: none of this one"), (grpc.StatusCode.INVALID_ARGUMENT, "cluster_id: another one"),
    (grpc.StatusCode.UNAVAILABLE, "no leader")])
async def test_who_cannot_reach_the_leader_asks_others(tmp_path: Path, answer: JoinResponse | tuple[grpc.StatusCode, str]) -> None:
    """They say where the nodes are, or that this one is none any more, and then it ends; nothing else ends it. Once there is a leader,
    what the meta group says counts again."""
    server = grpc.aio.server()
    there = Elsewhere(answer)
    add_MemberServiceServicer_to_server(there, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    world = World(tmp_path, join=["127.0.0.1:1", f"127.0.0.1:{port}"])
    node = world.node
    node.features = features.known()
    world.host.present = set()  # type: ignore[attr-defined]
    world.host.hello = lambda: SimpleNamespace(incarnation="i")  # type: ignore[attr-defined]
    world.host.cluster_id = "x"
    ended: list[bool] = []
    told: list[dict[str, str]] = []
    node.on_removed = lambda: ended.append(True)
    node.balance.joined = told.append
    node.meta.directory.members.update(n1=d.Member("n1", 1, "p:1", "c:1"), n2=d.Member("n2", 1, "127.0.0.1:1", "c:2"))
    node.meta.revision += 1
    node.balance.follow()
    told.clear()
    await node.balance._introduce(world.forwarder)
    await server.stop(None)
    request, = there.asked
    assert (request.inside, request.cluster_id, request.member.node_id) == (True, "x", "n1")
    if isinstance(answer, JoinResponse):
        assert told == [{"n2": "moved:2", "n5": "p:5"}] and not ended
        node.meta.directory.members["n1"] = d.Member("n1", 1, node.own.peer_address, node.own.client_address, incarnation="i",
                                                     feature_min=node.features.low, feature_max=node.features.high)
        world.host.leader, world.host.present = "n2", {"n2"}  # type: ignore[attr-defined]
        await node.balance._introduce(world.forwarder)
        assert told[1:] == [{"n2": "127.0.0.1:1"}]
    else:
        assert told == [] and ended == [True] * (answer[0] is grpc.StatusCode.NOT_FOUND)
    world.store.close()


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
