"""Who may call on the peers' port: nodes, under their own name. Only with TLS between nodes; without, whoever reaches the port."""
from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from spillway.broker.runtime.node import Node
from spillway.broker.services.around import around
from spillway.broker.services.member import PASSED_ON
from spillway.broker.services.refusals import Refusals
from spillway.cluster.transport.tls import certified_names
from spillway.peer.v1 import member_service_pb2, share_service_pb2

log = logging.getLogger(__name__)

EXCHANGES = "/spillway.peer.v1.PeerService/"  # which compares the names itself, with the hello


class PeerNames(grpc.aio.ServerInterceptor):
    """Refuses callers whose certificate names no node of the cluster, or another one than the request does."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._refusals = Refusals(log, "peer_listen")

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(EXCHANGES):
            return handler

        @asynccontextmanager
        async def guard(request: Any, context: Any) -> AsyncIterator[None]:
            if why := self._stranger(method, request, context):
                self._refusals.note(f"{context.peer()}: {method}: {why}", f"{method}: {why}")
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
            yield
        return around(handler, guard)

    def _stranger(self, method: str, request: Any, context: Any) -> str:
        """Why the caller may not say this; empty if it may."""
        names = certified_names(context)
        said = ", ".join(map(repr, names)) or "nobody"
        if isinstance(request, member_service_pb2.JoinRequest) and not self._passed_on(names, context):
            joins = request.member.node_id
            return "" if joins in names else f"the certificate names {said}, and not the node that is to join, {joins[:80]!r}"
        if self._node.knows_members and self._node.members.keys().isdisjoint(names):  # a node that joins has yet to hear of the others
            return f"the certificate names {said}, and no node of the cluster"
        if isinstance(request, share_service_pb2.ShareRequest) and request.node_id not in names:
            return f"the certificate names {said}, and the request says that it is of {request.node_id[:80]!r}"
        return ""

    def _passed_on(self, names: tuple[str, ...], context: Any) -> bool:
        """Whether a node of the cluster asks for another one."""
        return (any(key == PASSED_ON for key, _ in context.invocation_metadata() or ())
                and not self._node.members.keys().isdisjoint(names))
