"""Who may join and leave, and what is said to those who may not."""
from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from node_world import World
from spillway.broker.core import directory as d
from spillway.broker.errors import RequestError
from spillway.broker.runtime.balance import check_departure, check_newcomer
from spillway.peer.v1.member_service_pb2 import ClusterMember


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


async def test_who_watches_hears_of_leaders_of_shards_that_are_elsewhere(tmp_path: Path) -> None:
    """A node without a replica of a shard, as one that was drained, tells its watchers when the shard's leader changes: clients would
    never ask the new one."""
    world = World(tmp_path)
    try:
        watching = asyncio.create_task(world.node.wait_topology(world.node.revision))
        await asyncio.sleep(0)
        for watcher in world.host.watchers:
            watcher(2, "n3", 5)
        await asyncio.wait_for(watching, 10)
    finally:
        world.store.close()
