"""The cluster itself: how its nodes are, who of them is to leave, and backups. Any node serves any call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from spillway.client.backup import BackupWriter, ChunkReader
from spillway.client.calls import TIMEOUT_SECONDS, Calls
from spillway.client.connection import Channels
from spillway.client.errors import DestinationNotFound, NodeNotFound, Unavailable
from spillway.client.model import BackupProgress, ClusterStatus, GroupReport, NodeReport, NodeState, Problem, ReplicaReport
from spillway.client.retry import Backoff
from spillway.client.topology import Router
from spillway.contract.backup import Manifest
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1 import cluster_service_pb2_grpc as rpc

T = TypeVar("T")
BACKUP_ATTEMPTS = 8  # for each group, with pauses that grow: long enough for an election, or a node that starts again
LAG_IN_STEP = 1000  # entries: the nodes' answers are of different moments, and a shard under load writes hundreds a second
_STATES = {int(state) for state in NodeState}


class Cluster(Calls):
    """Calls of ClusterService. Every method takes `timeout` in seconds for all attempts together and raises Unavailable when it
    runs out, and what its description says."""

    def __init__(self, router: Router, channels: Channels) -> None:
        super().__init__(router, channels, rpc.ClusterServiceStub)

    async def status(self, *, timeout: float = TIMEOUT_SECONDS) -> ClusterStatus:
        """Nodes, groups, what moves, what is wrong and what to do about it, as far as the nodes answer within two seconds."""
        response = await self._call(lambda stub, seconds: stub.GetClusterStatus(pb.GetClusterStatusRequest(), timeout=seconds), timeout)
        return status_from_pb(response)

    async def drain(self, node_id: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Has every replica and leadership of a node moved to others; returns when that is decided, see `status` for when it is done.
        Raises NodeNotFound; InvalidArgument if too few nodes are left."""
        await self._of_node(lambda stub, seconds: stub.DrainNode(pb.DrainNodeRequest(node_id=node_id), timeout=seconds), timeout)

    async def undrain(self, node_id: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Undoes `drain`. Raises NodeNotFound; InvalidArgument if the node is being removed."""
        await self._of_node(lambda stub, seconds: stub.UndrainNode(pb.UndrainNodeRequest(node_id=node_id), timeout=seconds), timeout)

    async def remove(self, node_id: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """As `drain`; then the node is none of the cluster any more. Also for one that is dead for good. Cannot be undone."""
        await self._of_node(lambda stub, seconds: stub.RemoveNode(pb.RemoveNodeRequest(node_id=node_id), timeout=seconds), timeout)

    async def back_up(self, directory: str | Path, *, on_progress: Callable[[BackupProgress], None] = lambda progress: None) -> Manifest:
        """Writes a backup into a directory that does not exist or is empty, while the cluster serves: everything that was acknowledged
        before the call is in it. A group whose leader goes away is begun again, a number of times. Raises InvalidArgument if the
        directory is not empty, BackupError if it cannot be written, Unavailable if a group's leader cannot be reached: then what
        was written is no backup, and may be removed."""
        with BackupWriter(Path(directory), on_progress) as writer:
            while (group := writer.next_group()) is not None:
                await self._back_up_group(writer.reader(group))
            return writer.finish()

    async def _back_up_group(self, reader: ChunkReader) -> None:
        backoff = Backoff(0.1, 4.0)
        last = Unavailable("")
        older: set[str] = set()
        for turn in range(BACKUP_ATTEMPTS):
            try:
                await self._attempt(turn, older, reader.read)
            except Unavailable as error:
                last = error
                await asyncio.sleep(backoff.next())
            else:
                return
        raise last

    async def _of_node(self, call: Callable[[Any, float], Awaitable[T]], timeout: float) -> T:
        try:
            return await self._call(call, timeout)
        except DestinationNotFound as error:
            raise NodeNotFound(str(error)) from None


def thin_without(found: ClusterStatus, node_id: str) -> tuple[int, ...]:
    """Numbers of the groups that would have no majority in step if a node stopped now, or that have no leader to say so; 0 is the meta
    group. Groups without a vote of the node do not count, nor do those of one or two voters, which never can do without one."""
    return tuple(g.group for g in found.groups if node_id in g.voters and len(g.voters) > 2 and (not g.leader or sum(
        r.node in g.voters and r.node != node_id and r.role != "recovering" and r.lag <= LAG_IN_STEP for r in g.replicas
    ) <= len(g.voters) // 2))


def status_from_pb(response: pb.GetClusterStatusResponse) -> ClusterStatus:
    """As the client has it."""
    return ClusterStatus(
        response.cluster,
        tuple(NodeReport(n.node.id, n.node.address, n.node.zone, n.node.host,
                         NodeState(n.node.state) if n.node.state in _STATES else NodeState.UNSPECIFIED,
                         n.reachable, n.version, n.replicas, n.leads, n.feature_max) for n in response.nodes),
        tuple(GroupReport(g.group, g.leader, g.term, tuple(g.wanted), tuple(g.voters), tuple(g.learners),
                          tuple(ReplicaReport(r.node, r.applied_index, r.lag, r.role) for r in g.replicas), g.moving)
              for g in response.groups),
        tuple(Problem(p.what, p.remedy) for p in response.problems), response.feature_level or 1)
