"""Who leads what, when sources disagree, and where requests go."""
from __future__ import annotations

import asyncio

import grpc
import pytest
from spillway.client import Client, Topology, topology
from spillway.client.connection import Health
from spillway.client.retry import Backoff, Verdict, is_final, verdict_of
from spillway.client.topology import merged
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1 import message_pb2 as m

from tests.unit.client.fake_broker import FakeCluster
from tests.unit.client.serving import serving, until


def heard(*shards: tuple[str, int], nodes: str = "abc", cluster: str = "x") -> pb.Topology:
    """A topology of (leader, term) per shard."""
    return pb.Topology(cluster=cluster, shard_count=len(shards), nodes=[pb.Node(id=n, address=f"{n}:1") for n in nodes],
                       shards=[pb.Shard(shard=i, leader=leader, term=term) for i, (leader, term) in enumerate(shards, 1)])


def test_a_later_term_wins() -> None:
    """A node that is behind does not take back what is known."""
    known = merged(Topology(), heard(("a", 3), ("b", 2)))
    after = merged(known, heard(("b", 2), ("c", 5)))
    assert after.leaders == ("a", "c") and after.terms == (3, 5)
    assert after.leader_of(1) == "a:1" and after.leader_of(9) is None and after.leads("c") == {2}


def test_no_leader_is_news_only_in_a_later_term() -> None:
    """A follower that has not heard from the leader yet does not unseat it; a new term does."""
    known = merged(Topology(), heard(("a", 3)))
    assert merged(known, heard(("", 3))).leaders == ("a",)
    assert merged(known, heard(("", 4))).leaders == ("",)
    assert known.ready and not merged(known, heard(("", 4))).ready


def test_a_leader_that_left_the_cluster_is_none() -> None:
    """Even if its term is the latest known."""
    known = merged(Topology(), heard(("a", 3)))
    assert merged(known, heard(("b", 2), nodes="bc")).leaders == ("b",)


def test_another_cluster_replaces_everything() -> None:
    """Terms of one cluster mean nothing in another."""
    known = merged(Topology(), heard(("a", 30)))
    assert merged(known, heard(("b", 1), cluster="y")).leaders == ("b",)


def test_a_cluster_of_the_same_name_is_not_believed() -> None:
    """A node that lost its disk may found one at a known address: what it says is left out. An identity that is not said, or not known
    yet, is no other one, and a cluster that was restored from a backup of the known one is its heir."""
    known = merged(Topology(), heard(("a", 3)))
    named = heard(("b", 4))
    named.cluster_id = "i"
    known = merged(known, named)
    assert (known.cluster_id, known.leaders) == ("i", ("b",))
    known = merged(known, heard(("c", 5)))
    assert (known.cluster_id, known.leaders) == ("i", ("c",))
    other = heard(("a", 30), nodes="a")
    other.cluster_id = "j"
    assert merged(known, other) is known
    other.former_ids.append("i")
    heir = merged(known, other)
    assert (heir.cluster_id, heir.leaders) == ("j", ("a",))
    assert merged(heir, named) is heir


def test_health_avoids_for_longer_and_longer() -> None:
    """Failures that come together are one; an answer clears them."""
    now = 0.0
    health = Health(lambda: now)
    first = health.failed("a")
    assert not health.is_up("a") and health.is_up("b")
    assert health.failed("a") == first
    waits = []
    for _ in range(10):
        now += 10
        assert health.is_up("a")
        waits.append(health.failed("a"))
    assert max(waits) <= 2.0 and waits[-1] > first
    health.worked("a")
    assert health.is_up("a")


def test_backoff_doubles_up_to_its_cap() -> None:
    """With jitter between half and all of it."""
    backoff = Backoff(0.1, 1.0, random=lambda: 1.0)
    assert [round(backoff.next(), 3) for _ in range(5)] == [0.1, 0.2, 0.4, 0.8, 1.0]
    backoff.reset()
    assert Backoff(0.1, 1.0, random=lambda: 0.0).next() == 0.05 and backoff.failures == 0


def test_every_error_code_has_a_verdict() -> None:
    """Unknown codes of later versions count as failed for good with unknown outcome."""
    for code in m.ErrorCode.values():
        assert isinstance(verdict_of(code), Verdict)
    assert verdict_of(99) is Verdict.REFUSED_UNKNOWN
    assert is_final(grpc.StatusCode.PERMISSION_DENIED) and not is_final(grpc.StatusCode.UNAVAILABLE)


async def test_the_watch_moves_on_when_its_node_dies() -> None:
    """News keep coming from another node."""
    async with serving(3) as (cluster, client):
        watch = client._watch
        assert watch is not None
        await until(lambda: watch._watched)
        name = next(n.name for n in cluster.nodes.values() if n.address == watch._watched)
        await cluster.nodes[name].stop()
        alive = next(n for n in cluster.nodes if n != name)
        await cluster.move(1, alive)
        await until(lambda: client.topology.leaders[0] == alive)


@pytest.mark.parametrize("mute", ["n1", "n2"])
@pytest.mark.parametrize("joined", [True, False])
async def test_a_node_that_tells_no_topology_is_left(mute: str, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it hangs or has not joined yet: another one is asked."""
    monkeypatch.setattr(topology, "FIRST_SECONDS_MAX", 0.3)
    async with asyncio.timeout(20):
        cluster = await FakeCluster().start(2)
        node = cluster.nodes[mute]
        node.joined = joined
        node.answers.clear()
        async with Client(cluster.addresses) as client:
            await client.wait_ready(10)
            await asyncio.sleep(0.5)  # the one that told it is stayed with
            assert client._router is not None and client._router.watch._watched != node.address
        node.answers.set()
        await cluster.stop()


async def test_a_suspicion_asks_another_node() -> None:
    """The watched node is silent; a failure elsewhere makes the client ask around."""
    async with serving(3) as (cluster, client):
        watch = client._watch
        assert watch is not None
        silent = watch._watched
        cluster.leaders[1] = "n3"  # nobody is told
        cluster.terms[1] += 1
        await asyncio.sleep(0.11)  # failures ask at most ten times a second
        watch.suspect(silent)
        await until(lambda: client.topology.leaders[0] == "n3")
        await until(lambda: watch._watched != silent)
