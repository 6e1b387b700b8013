"""Calls about the cluster itself, while its nodes are of different versions."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from spillway.client import NodeState, Unavailable
from spillway.client.cluster import status_from_pb, thin_without
from spillway.client.commands import cluster as commands
from spillway.client.errors import InternalError
from spillway.v1 import cluster_service_pb2 as pb
from typer.testing import CliRunner

from tests.unit.client.serving import serving


async def test_a_node_that_does_not_know_a_call_is_passed_over() -> None:
    """In the middle of an upgrade any node that does know it serves it; the others are not taken for broken."""
    async with serving(3) as (cluster, client):
        asked: list[str] = []

        def answers(name: str) -> Any:
            async def status(request: pb.GetClusterStatusRequest, context: Any) -> pb.GetClusterStatusResponse:
                asked.append(name)
                return pb.GetClusterStatusResponse(cluster="fake", feature_level=7)
            return status
        last = [*cluster.nodes.values()][-1]
        await last.stop()
        last.GetClusterStatus = answers(last.name)  # type: ignore[method-assign]
        await last.start()
        assert (await client.cluster.status()).feature_level == 7
        assert asked == [last.name]


async def test_a_call_that_no_node_knows() -> None:
    """It is said at once, not after a timeout."""
    async with serving(2) as (_, client):
        with pytest.raises(InternalError, match="UNIMPLEMENTED"):
            await client.cluster.status(timeout=600)


async def test_what_is_unavailable_is_said_rather_than_who_is_older() -> None:
    """The reason comes from a node that knows the call."""
    async with serving(2) as (cluster, client):
        async def drain(request: pb.DrainNodeRequest, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "first upgrade every node")
        last = [*cluster.nodes.values()][-1]
        await last.stop()
        last.DrainNode = drain  # type: ignore[assignment, method-assign]
        await last.start()
        with pytest.raises(Unavailable, match="first upgrade every node"):
            await client.cluster.drain("n1", timeout=0.5)


def test_what_nodes_from_before_feature_levels_say() -> None:
    """Nothing of them: the cluster is at the first one."""
    found = status_from_pb(pb.GetClusterStatusResponse(nodes=[pb.NodeReport(node=pb.Node(id="a"))]))
    assert found.feature_level == 1
    assert (found.nodes[0].feature_max, found.nodes[0].state) == (0, NodeState.UNSPECIFIED)


async def test_a_drain_is_not_over_while_nobody_says_where_replicas_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups whose nodes do not answer show no replica anywhere: they may all be on the node that leaves."""
    def status(*voters: list[str]) -> pb.GetClusterStatusResponse:
        return pb.GetClusterStatusResponse(nodes=[pb.NodeReport(node=pb.Node(id="a", state=pb.NODE_STATE_DRAINING))],
                                           groups=[pb.GroupReport(group=n, voters=v) for n, v in enumerate(voters)])
    answers = iter([status(["a", "b"], []), status([], []), status(["a", "b"], ["b"])])

    async def said() -> Any:
        return status_from_pb(next(answers))
    monkeypatch.setattr(commands, "POLL_SECONDS", 0)
    client: Any = SimpleNamespace(cluster=SimpleNamespace(status=said))
    assert await commands._wait(client, "a", 600.0) == 0
    assert next(answers, None) is None
    answers = iter([status(["a", "b"], [])])
    assert await commands._wait(client, "a", -1.0) == 1


def group(number: int, voters: str, answers: dict[str, int | str], leader: str = "a") -> pb.GroupReport:
    """A group: its voters, and of each replica that answered how far behind it is, or its role."""
    return pb.GroupReport(group=number, leader=leader, voters=list(voters), replicas=[
        pb.ReplicaReport(node=node, lag=0 if isinstance(said, str) else said, role=said if isinstance(said, str) else "follower")
        for node, said in answers.items()])


@pytest.mark.parametrize(("why", "groups", "thin"), [
    ("all are in step", [group(1, "abc", {"a": 0, "b": 0, "c": 0})], ()),
    ("one of the others does not answer", [group(1, "abc", {"a": 0, "b": 0})], (1,)),
    ("one of the others is far behind", [group(0, "abc", {"a": 0, "b": 0, "c": 5000})], (0,)),
    ("it is a little behind, as always under load", [group(1, "abc", {"a": 0, "b": 0, "c": 100})], ()),
    ("one of the others has lost its disk", [group(1, "abc", {"a": 0, "b": 0, "c": "recovering"})], (1,)),
    ("it is the node itself that is behind", [group(1, "abc", {"a": 9999, "b": 0, "c": 0})], ()),
    ("of five one may be missing", [group(1, "abcde", {"a": 0, "b": 0, "c": 0, "d": 0})], ()),
    ("of five two may not", [group(1, "abcde", {"a": 0, "b": 0, "c": 0})], (1,)),
    ("a learner is no voter", [group(1, "abc", {"a": 0, "b": 0, "x": 0})], (1,)),
    ("no leader", [group(2, "abc", {"a": 0, "b": 0, "c": 0}, leader="")], (2,)),
    ("a group of others", [group(1, "bcd", {"b": 0})], ()),
    ("one or two voters never can", [group(1, "a", {"a": 0}), group(2, "ab", {"a": 0})], ()),
    ("told by older nodes", [group(1, "abc", {"a": 0, "b": "", "c": ""})], ()),
])
def test_who_can_do_without_a_node(why: str, groups: list[pb.GroupReport], thin: tuple[int, ...]) -> None:
    """Every group keeps a majority of voters that answered and are in step, or its number is named."""
    assert thin_without(status_from_pb(pb.GetClusterStatusResponse(groups=groups)), "a") == thin, why


@pytest.mark.parametrize(("answers", "code", "said"), [
    ({"a": 0, "b": 0, "c": 0}, 0, "node a can be stopped"),
    ({"a": 0, "b": 0}, 4, "should not be stopped now: no majority without it: shard 1")])
def test_stoppable_says_so_by_its_exit_code(
        answers: dict[str, int | str], code: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook before the stop waits for it, and goes on in the end."""
    async def status(*_: Any, **__: Any) -> Any:
        return status_from_pb(pb.GetClusterStatusResponse(groups=[group(1, "abc", answers)]))
    monkeypatch.setattr("spillway.client.cluster.Cluster.status", status)
    ran = CliRunner().invoke(commands.app, ["stoppable", "a", "--wait", "10ms", "--address", "127.0.0.1:1"])
    assert ran.exit_code == code and said in ran.output
