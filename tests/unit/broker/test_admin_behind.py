"""A node whose copy of the meta group is behind: what another node has told the caller is not denied here."""
from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from spillway.broker.core.directory import destination
from spillway.broker.core.policy import Policy
from spillway.broker.errors import NotFound
from spillway.broker.services.admin import AdminService
from spillway.v1.admin_service_pb2 import (
    Destination,
    GetDestinationRequest,
    GetDestinationResponse,
    UpdateDestinationRequest,
    UpdateDestinationResponse,
)


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


async def test_what_the_leader_stored_is_known_here_before_the_answer() -> None:
    """Who asks this node next must not be told what was before: its next change would be refused, as made of something old."""
    at = SimpleNamespace(applied_index=6)

    class Storing(Leader):
        async def UpdateDestination(self, request: UpdateDestinationRequest, timeout: float) -> UpdateDestinationResponse:
            asyncio.get_running_loop().call_later(0.05, setattr, at, "applied_index", 7)
            return UpdateDestinationResponse(destination=Destination(name="d", etag="7"))

    asked = service({}, Storing(set(), print))
    asked.node.meta.rows = at  # type: ignore[assignment]
    asked.node.config.payload_bytes_max = 1 << 20  # type: ignore[misc]
    answer = await asked.UpdateDestination(UpdateDestinationRequest(destination=Destination(name="d")), None)
    assert answer.destination.etag == "7" and at.applied_index == 7
