"""ShareService: what other nodes tell this one. On the peers' port only."""
from __future__ import annotations

from typing import Any

from spillway.broker.runtime.node import Node
from spillway.peer.v1 import share_service_pb2 as pb
from spillway.peer.v1 import share_service_pb2_grpc


class ShareService(share_service_pb2_grpc.ShareServiceServicer):
    """The handler."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def Share(self, request: pb.ShareRequest, context: Any) -> pb.ShareResponse:
        """See share_service.proto."""
        return self.node.shares.told(request)
