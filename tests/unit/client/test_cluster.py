"""Calls about the cluster itself, while its nodes are of different versions."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from spillway.client import NodeState, Unavailable
from spillway.client.cluster import status_from_pb
from spillway.client.commands import cluster as commands
from spillway.client.errors import InternalError
from spillway.v1 import cluster_service_pb2 as pb

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
