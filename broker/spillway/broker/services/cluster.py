"""ClusterService: who leads what, who the nodes are, and their state for backups."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc
from spillway.broker.core import directory as d
from spillway.broker.errors import BrokerError, RequestError, Unavailable
from spillway.broker.runtime.balance import META_GROUP, ask_status, node_status
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.services.changes import made_by_leader, tell_index
from spillway.broker.services.cluster_status import cluster_status
from spillway.broker.services.names import check_name
from spillway.broker.services.operations import CALL_SECONDS
from spillway.broker.services.status import pass_on
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1 import cluster_service_pb2_grpc

WATCH_PERIOD_SECONDS = 0.05  # changes within it are told at once
Answer = TypeVar("Answer", pb.DrainNodeResponse, pb.UndrainNodeResponse, pb.RemoveNodeResponse)
_STATES = {d.STAYS: pb.NODE_STATE_ACTIVE, d.DRAINS: pb.NODE_STATE_DRAINING, d.GONE: pb.NODE_STATE_REMOVING}


class ClusterService(cluster_service_pb2_grpc.ClusterServiceServicer):
    """The handlers. One instance serves clients, one (`peer` true) the other nodes and passes nothing on."""

    def __init__(self, node: Node, forwarder: Forwarder, peer: bool = False) -> None:
        self.node = node
        self.forwarder = forwarder
        self.peer = peer
        self._topology = pb.Topology()
        self._built: tuple[int, int] | None = None  # revisions of what it was built from

    def _nodes(self) -> list[pb.Node]:
        known = self.node.meta.directory.members
        out = []
        for member in self.node.members.values():
            said = known.get(member.node_id)
            out.append(pb.Node(id=member.node_id, address=member.client_address, zone=said.zone if said else "",
                               host=said.host if said else "", state=_STATES[said.leaving if said else d.STAYS]))
        return out

    def topology(self) -> pb.Topology:
        """As this node sees it, built once for all who ask and watch: not to be changed. It is the same object as long as it is the
        same."""
        node = self.node
        revisions = node.revision, node.meta.directory.nodes_revision
        if self._built != revisions:
            self._built = revisions
            if (topology := self._build_topology()) != self._topology:
                self._topology = topology
        return self._topology

    def _build_topology(self) -> pb.Topology:
        node = self.node
        identity = node.meta.directory.identity
        out = pb.Topology(cluster=node.config.cluster, cluster_id=node.cluster_id, former_ids=identity.former if identity else ())
        if not node.knows_members:
            return out
        out.shard_count = node.config.shards
        out.nodes.extend(self._nodes())
        for shard, replicas in sorted(node.placement.items()):
            out.shards.add(shard=shard, leader=node.leader_of(shard) or "", replicas=replicas,
                           term=node.host.leader_of(shard)[1])
        return out

    async def GetTopology(self, request: pb.GetTopologyRequest, context: Any) -> pb.GetTopologyResponse:
        """See cluster_service.proto."""
        return pb.GetTopologyResponse(topology=self.topology())

    async def WatchTopology(self, request: pb.WatchTopologyRequest,
                            context: Any) -> AsyncIterator[pb.WatchTopologyResponse]:
        """See cluster_service.proto."""
        told: pb.Topology | None = None
        revision = self.node.revision
        while True:
            now = self.topology()
            if now is not told:
                told = now
                yield pb.WatchTopologyResponse(topology=now)
            revision = await self.node.wait_topology(revision)
            await asyncio.sleep(WATCH_PERIOD_SECONDS)

    async def GetNodeStatus(self, request: pb.GetNodeStatusRequest, context: Any) -> pb.GetNodeStatusResponse:
        """See cluster_service.proto."""
        return node_status(self.node)

    async def GetClusterStatus(self, request: pb.GetClusterStatusRequest, context: Any) -> pb.GetClusterStatusResponse:
        """See cluster_service.proto."""
        nodes = self._nodes()
        answers = await asyncio.gather(*(ask_status(self.node, self.forwarder, node.id) for node in nodes))
        found = {node.id: answer for node, answer in zip(nodes, answers, strict=True) if answer is not None}
        return cluster_status(self.node.config.cluster, nodes, self.node.placement, found)

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Any) -> pb.DrainNodeResponse:
        """See cluster_service.proto."""
        return await self._leave("DrainNode", request, pb.DrainNodeResponse(), d.DRAINS, context)

    async def UndrainNode(self, request: pb.UndrainNodeRequest, context: Any) -> pb.UndrainNodeResponse:
        """See cluster_service.proto."""
        return await self._leave("UndrainNode", request, pb.UndrainNodeResponse(), d.STAYS, context)

    async def RemoveNode(self, request: pb.RemoveNodeRequest, context: Any) -> pb.RemoveNodeResponse:
        """See cluster_service.proto."""
        return await self._leave("RemoveNode", request, pb.RemoveNodeResponse(), d.GONE, context)

    async def _leave(self, method: str, request: Any, response: Answer, leaving: int, context: Any) -> Answer:
        try:
            check_name("node_id", request.node_id)
            self.node.balance.check_members_change()
            leader = await self.forwarder.await_meta_leader()
            if leader == self.node.config.node_id:
                await self.node.balance.leave(request.node_id, leaving)
                if self.peer:
                    tell_index(self.node, context)
            elif self.peer:
                raise Unavailable("this node does not lead the meta group", leader)
            else:
                await made_by_leader(self.node, getattr(self.forwarder.link(leader).cluster, method)(request, timeout=CALL_SECONDS))
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return response

    async def Backup(self, request: pb.BackupRequest, context: Any) -> AsyncIterator[pb.BackupResponse]:
        """See cluster_service.proto."""
        try:
            async for part in self._backup(request):
                yield part
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)

    async def _backup(self, request: pb.BackupRequest) -> AsyncIterator[pb.BackupResponse]:
        node, group = self.node, request.group
        if group > node.config.shards:
            raise RequestError("group", f"there is no shard {group}; there are {node.config.shards}")
        leader = await (self.forwarder.await_meta_leader() if group == META_GROUP else self.forwarder.await_leader(group))
        if leader == node.config.node_id:
            async for part in node.backups.read(group):
                yield part
        elif self.peer:
            raise Unavailable(f"this node does not lead group {group}", leader)
        else:
            call: Any = self.forwarder.link(leader).cluster.Backup(request)
            try:
                async for part in call:
                    yield part
            finally:
                call.cancel()
