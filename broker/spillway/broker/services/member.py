"""MemberService: how a node becomes one of the cluster; on the peers' port only."""
from __future__ import annotations

from typing import Any

import grpc
from spillway.broker.config import is_nowhere, split_address
from spillway.broker.errors import BrokerError, ConfigError, RequestError
from spillway.broker.runtime.balance import said_of
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.services.operations import CALL_SECONDS
from spillway.broker.services.status import pass_on
from spillway.cluster.raft.configuration import NODE_ID_LENGTH_MAX
from spillway.peer.v1 import member_service_pb2 as pb
from spillway.peer.v1 import member_service_pb2_grpc

NAME_LENGTH_MAX = 63
PASSED_ON = "spillway-passed-on"  # metadata of a call that another node passed on: it is not passed on again


class MemberService(member_service_pb2_grpc.MemberServiceServicer):
    """The handlers."""

    def __init__(self, node: Node, forwarder: Forwarder) -> None:
        self.node = node
        self.forwarder = forwarder

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        """See member_service.proto."""
        try:
            _check(request)
            if self.node.balance.knows(request):
                return self._members()
            self.node.balance.check_members_change()
            leader = await self.forwarder.await_meta_leader()
            passed_on = any(key == PASSED_ON for key, _ in context.invocation_metadata() or ())
            if leader != self.node.config.node_id and not passed_on:
                passed: pb.JoinResponse = await self.forwarder.link(leader).member.Join(
                    request, timeout=CALL_SECONDS, metadata=((PASSED_ON, self.node.config.node_id),))
                return passed
            await self.node.balance.join(request)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return self._members()

    def _members(self) -> pb.JoinResponse:
        return pb.JoinResponse(members=map(said_of, self.node.meta.directory.members.values()), cluster_id=self.node.cluster_id)


def _check(request: pb.JoinRequest) -> None:
    member = request.member
    if not 0 < len(member.node_id) <= NAME_LENGTH_MAX <= NODE_ID_LENGTH_MAX or not all(c.isalnum() or c in "-_." for c in member.node_id):
        raise RequestError("node_id", f"is {member.node_id[:80]!r}; use 1 to {NAME_LENGTH_MAX} letters, digits, '-', '_' or '.'")
    for name in ("peer_address", "client_address"):
        try:
            split_address(name, address := getattr(member, name))
        except ConfigError as error:
            raise RequestError(name, str(error)) from None
        if is_nowhere(address):
            raise RequestError(name, f"is {address}, where no other node reaches it; start it with "
                               "--advertise peerhost:port/clienthost:port")
    for name in ("zone", "host", "incarnation"):
        if len(getattr(member, name)) > NAME_LENGTH_MAX:
            raise RequestError(name, f"has {len(getattr(member, name))} characters; at most {NAME_LENGTH_MAX}")
