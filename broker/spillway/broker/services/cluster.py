"""ClusterService: who leads what."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from spillway.broker.runtime.node import Node
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1 import cluster_service_pb2_grpc

WATCH_PERIOD_SECONDS = 0.05  # changes within it are told at once


class ClusterService(cluster_service_pb2_grpc.ClusterServiceServicer):
    """The handlers."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def topology(self) -> pb.Topology:
        """As this node sees it."""
        node = self.node
        out = pb.Topology(cluster=node.config.cluster, shard_count=node.config.shards)
        for member in node.members.values():
            out.nodes.add(id=member.node_id, address=member.client_address)
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
        told = None
        revision = self.node.revision
        while True:
            now = self.topology()
            if now != told:
                told = now
                yield pb.WatchTopologyResponse(topology=now)
            revision = await self.node.wait_topology(revision)
            await asyncio.sleep(WATCH_PERIOD_SECONDS)

    async def GetNodeStatus(self, request: pb.GetNodeStatusRequest, context: Any) -> pb.GetNodeStatusResponse:
        """See cluster_service.proto."""
        out = pb.GetNodeStatusResponse(node=self.node.config.node_id, version=version("spillway"))
        for group, s in sorted(self.node.host.status().items()):
            out.groups.add(group=group, role=s.role.value, leader=s.leader or "", term=s.term, commit_index=s.commit_index,
                           applied_index=s.applied_index, durable_index=s.durable_index,
                           log_first_index=s.log_first_index, log_last_index=s.log_last_index)
        return out
