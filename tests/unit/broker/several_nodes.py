"""A node_world.World as one of several nodes: the others are what a test says they answer."""
from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

from node_world import Context, World
from spillway.broker.services.admin import AdminService
from spillway.v1 import admin_service_pb2 as pb


class Asked:
    """A call to another node, as grpc.aio has it; the answer is a test's."""

    def __init__(self, answer: Coroutine[Any, Any, Any], *trailing: tuple[str, str]) -> None:
        self._answer = answer
        self._trailing = trailing

    def __await__(self) -> Any:
        return self._answer.__await__()

    async def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """As gRPC has it."""
        return self._trailing


class Peer:
    """AdminService of another node, as this one calls it."""

    def __init__(self, answers: dict[str, Any] | None = None) -> None:
        self.calls: list[tuple[str, Any, Any]] = []
        self.answers = answers or {}

    def __getattr__(self, method: str) -> Any:
        async def call(request: Any, timeout: float, metadata: Any = None) -> Any:
            self.calls.append((method, request, metadata))
            answer = self.answers.get(method, getattr(pb, method + "Response")())
            if isinstance(answer, Exception):
                raise answer
            return answer(request) if callable(answer) else answer
        return lambda *request, **options: Asked(call(*request, **options))


class PeersContext(Context):
    """Of a call of another node."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        self.metadata = metadata
        self.trailing: tuple[tuple[str, str], ...] = ()

    def set_trailing_metadata(self, trailing: tuple[tuple[str, str], ...]) -> None:
        """As gRPC's."""
        self.trailing = trailing

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """As gRPC has it."""
        return self.metadata


def service(world: World, leaders: dict[int, str | None], peers: dict[str, Peer], meta_leader: str = "n1") -> AdminService:
    """The service of a node of several."""
    async def await_meta_leader() -> str:
        return meta_leader

    world.node.leader_of = world.node.leader_in_touch = lambda shard: leaders[shard]  # type: ignore[method-assign]
    forwarder: Any = SimpleNamespace(await_meta_leader=await_meta_leader, link=lambda node: SimpleNamespace(admin=peers[node]))
    return AdminService(world.node, forwarder)


async def finish(world: World, call: Any) -> Any:
    """A call, with turns while it lasts."""
    task = asyncio.ensure_future(call)
    while not task.done():
        await asyncio.sleep(0)
        world.host.turn()
    return task.result()
