"""Changes of the meta group, wherever they are asked for: its leader makes them. Whoever asked a node for one finds it made there, though a
follower learns of it a moment later than the leader."""
from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

from spillway.broker.runtime.node import Node

INDEX = "spillway-meta-index"  # trailing metadata between nodes: up to which entry the meta group is applied where a change was made
BEHIND_SECONDS = 1.0  # that an answer waits for this node to know what it says
POLL_SECONDS = 0.01

Answer = TypeVar("Answer", covariant=True)


class Asked(Protocol[Answer]):
    """A call to another node, as grpc.aio has it."""

    def __await__(self) -> Any: ...

    def trailing_metadata(self) -> Awaitable[Any]:
        """What came behind the answer."""


def tell_index(node: Node, context: Any) -> None:
    """Says with the answer to another node how much has to be known there."""
    context.set_trailing_metadata(((INDEX, str(node.meta.rows.applied_index)),))


async def made_by_leader(node: Node, call: Asked[Answer]) -> Answer:
    """What the leader answers, once this node knows what it changed; after a while in any case. Raises grpc.aio.AioRpcError."""
    answer: Answer = await call
    index = next((int(value) for key, value in await call.trailing_metadata() or () if key == INDEX), 0)
    deadline = asyncio.get_running_loop().time() + BEHIND_SECONDS
    while node.meta.rows.applied_index < index:
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(POLL_SECONDS)
    return answer
