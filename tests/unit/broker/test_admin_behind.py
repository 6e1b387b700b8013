"""A node whose copy of the meta group is behind: what another node has told the caller is not denied here."""
from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from several_nodes import Asked
from spillway.broker.core.directory import destination
from spillway.broker.core.policy import Policy
from spillway.broker.errors import NotFound
from spillway.broker.services import changes
from spillway.broker.services.admin import AdminService
from spillway.v1.admin_service_pb2 import DeleteRouteRequest, DeleteRouteResponse, GetDestinationRequest, GetDestinationResponse


class Leader:
    """The meta group's leader on another node, and what it knows."""

    def __init__(self, names: set[str], asked: Any) -> None:
        self.names = names
        self.asked = asked

    async def GetDestination(self, request: GetDestinationRequest, timeout: float) -> GetDestinationResponse:
        """The leader's answer."""
        self.asked(request.name)
        if request.name not in self.names:
            raise grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), grpc.aio.Metadata())
        return GetDestinationResponse()


def service(known: dict[str, Any], leader: Leader) -> AdminService:
    """The service of a node that knows some destinations and does not lead the meta group."""
    async def await_meta_leader() -> str:
        return "n2"

    node: Any = SimpleNamespace(config=SimpleNamespace(node_id="n1"), meta=SimpleNamespace(get=known.get))
    forwarder: Any = SimpleNamespace(await_meta_leader=await_meta_leader, link=lambda _: SimpleNamespace(admin=leader))
    return AdminService(node, forwarder)


async def test_a_destination_that_the_leader_knows_is_waited_for() -> None:
    """It was created through another node a moment ago."""
    known: dict[str, Any] = {}
    stored = destination("new", Policy())

    def asked(name: str) -> None:
        asyncio.get_running_loop().call_later(0.03, known.__setitem__, name, stored)

    assert await service(known, Leader({"new"}, asked)).known("name", "new") is stored


async def test_only_the_leader_says_that_there_is_none() -> None:
    """A name that nobody knows is asked for once, and refused."""
    names: list[str] = []
    with pytest.raises(NotFound):
        await service({}, Leader(set(), names.append)).known("name", "none")
    assert names == ["none"]


@pytest.mark.parametrize(("told", "index"), [((("other", "x"), (changes.INDEX, "7")), 7), ((), 6), (((changes.INDEX, "8"),), 7)])
async def test_what_the_leader_made_is_known_here_before_the_answer(monkeypatch: pytest.MonkeyPatch, told: Any, index: int) -> None:
    """Who asks this node next must not be told what was before: its next change would be refused, as made of something old. A leader of a
    former version does not say how much that is, and a node that learns nothing for a while answers nevertheless."""
    monkeypatch.setattr(changes, "BEHIND_SECONDS", 0.3)
    at = SimpleNamespace(applied_index=6)

    class Storing(Leader):
        def DeleteRoute(self, request: DeleteRouteRequest, timeout: float) -> Asked:
            async def answer() -> DeleteRouteResponse:
                asyncio.get_running_loop().call_later(0.05, setattr, at, "applied_index", 7)
                return DeleteRouteResponse()
            return Asked(answer(), *told)

    asked = service({}, Storing(set(), print))
    asked.node.meta.rows = at  # type: ignore[assignment]
    assert await asked.DeleteRoute(DeleteRouteRequest(source="d"), None) == DeleteRouteResponse()
    assert at.applied_index == index
