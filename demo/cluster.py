"""Three broker nodes on loopback, as processes of their own; started, watched, killed."""
from __future__ import annotations

import asyncio
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import grpc
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub

from demo.children import Child, Children
from demo.ports import free_ports

READY_SECONDS_MAX = 60.0
CALL_SECONDS = 1.0


@dataclass(frozen=True)
class NodeView:
    """What a node says of itself; `state` is "up", "starting", or "killed" and the like if it does not answer."""

    name: str
    state: str
    leads: int = 0
    follows: int = 0
    other: int = 0  # replicas that are candidates or recovering


class Node:
    """One node."""

    def __init__(self, name: str, directory: Path, address: str, peer_address: str) -> None:
        self.name = name
        self.address = address
        self.peer_address = peer_address
        self.data = directory / name
        self.child: Child | None = None
        self.killed = False
        self._channel = grpc.aio.insecure_channel(address, (("grpc.max_reconnect_backoff_ms", 1000),))
        self._stub = ClusterServiceStub(self._channel)

    async def status(self) -> NodeView:
        """Its roles, if it answers."""
        if self.killed:
            return NodeView(self.name, "killed")
        if self.child is None or not self.child.running:
            return NodeView(self.name, "ended")
        try:
            answer = await self._stub.GetNodeStatus(pb.GetNodeStatusRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError:
            return NodeView(self.name, "starting")
        roles = Counter(group.role for group in answer.groups)
        leads, follows = roles.pop("leader", 0), roles.pop("follower", 0)
        return NodeView(self.name, "up", leads, follows, roles.total())

    async def topology(self) -> pb.Topology | None:
        """The cluster as it knows it, if it answers."""
        try:
            answer = await self._stub.GetTopology(pb.GetTopologyRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError:
            return None
        return answer.topology

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()


class Cluster:
    """Nodes n1, n2, n3."""

    def __init__(self, directory: Path, children: Children, size: int = 3) -> None:
        self._children = children
        ports = free_ports(2 * size)
        self.nodes = [Node(f"n{i + 1}", directory, f"127.0.0.1:{ports[2 * i]}", f"127.0.0.1:{ports[2 * i + 1]}")
                      for i in range(size)]
        self._peers = ",".join(f"{n.name}={n.peer_address}/{n.address}" for n in self.nodes)

    @property
    def addresses(self) -> list[str]:
        """Where clients reach the nodes."""
        return [node.address for node in self.nodes]

    async def start(self, node: Node) -> None:
        """Starts a node on what its directory holds."""
        node.child = await self._children.start(
            node.name, *spillway("serve"), "--node-id", node.name, "--cluster", "demo", "--listen", node.address,
            "--peer-listen", node.peer_address, "--data-dir", str(node.data), "--peers", self._peers,
            "--log-level", "warning")
        node.killed = False

    async def kill(self, node: Node) -> None:
        """SIGKILL."""
        assert node.child is not None
        node.killed = True
        await node.child.kill()

    async def ready(self) -> None:
        """Waits until every node sees a leader of every shard. Raises RuntimeError with the log's end if one ends."""
        async with asyncio.timeout(READY_SECONDS_MAX):
            for node in self.nodes:
                while not _complete(await node.topology()):
                    self.check()
                    await asyncio.sleep(0.2)

    def check(self) -> None:
        """Raises RuntimeError if a node ended that was not killed."""
        for node in self.nodes:
            if node.child is not None and not node.child.running and not node.killed:
                raise RuntimeError(f"node {node.name} ended with {node.child.process.returncode}:\n{node.child.tail()}")

    async def statuses(self) -> list[NodeView]:
        """What the nodes say of themselves."""
        return await asyncio.gather(*(node.status() for node in self.nodes))

    async def close(self) -> None:
        """Ends the connections; the processes are the children's."""
        for node in self.nodes:
            await node.close()


def _complete(topology: pb.Topology | None) -> bool:
    return (topology is not None and 0 < topology.shard_count == len(topology.shards)
            and all(shard.leader for shard in topology.shards))


def spillway(command: str) -> list[str]:
    """How to run a command of the `spillway` program that belongs to this interpreter."""
    return [sys.executable, "-c", "import sys; from spillway.client.cli import main; sys.exit(main())", command]
