"""Brokers on loopback, as processes of their own."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from spillway.v1 import admin_service_pb2 as admin_pb
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1.admin_service_pb2_grpc import AdminServiceStub
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub

from bench.children import Child, Children, poll
from demo.ports import free_ports

READY_SECONDS = 60.0
CALL_SECONDS = 2.0


class Nodes:
    """One cluster of one or more nodes; started in its own directory, ended with `children`."""

    def __init__(self, directory: Path, count: int, children: Children, flags: Sequence[str] = ()) -> None:
        self._directory, self._started, self._flags = directory, children, list(flags)
        directory.mkdir(parents=True, exist_ok=True)
        ports = free_ports(2 * count)
        ids = [f"n{i + 1}" for i in range(count)]
        self.listen = {n: f"127.0.0.1:{ports[2 * i]}" for i, n in enumerate(ids)}
        self._peers = peers = {n: f"127.0.0.1:{ports[2 * i + 1]}" for i, n in enumerate(ids)}
        everyone = ",".join(f"{n}={peers[n]}/{self.listen[n]}" for n in ids) if count > 1 else ""
        self.children: dict[str, Child] = {}
        for n in ids:
            self._start(n, ["--peers", everyone] if everyone else [])
        poll(self._ready, READY_SECONDS, "a leader for every shard")

    def _start(self, node: str, flags: Sequence[str]) -> None:
        command = [sys.executable, "-m", "spillway.broker", "--node-id", node, "--listen", self.listen[node],
                   "--peer-listen", self._peers[node], "--data-dir", str(self._directory / node)]
        self.children[node] = Child(node, [*command, *self._flags, *flags], self._directory)
        self._started.start(self.children[node])

    def join(self, node: str) -> None:
        """Starts one more node, which joins the cluster; does not wait."""
        listen, peer = (f"127.0.0.1:{port}" for port in free_ports(2))
        seeds = ",".join(self._peers[n] for n, child in self.children.items() if child.running)
        self.listen[node], self._peers[node] = listen, peer
        self._start(node, ["--join", seeds])

    def cluster(self) -> pb.GetClusterStatusResponse | None:
        """The cluster as the first node that runs and answers sees it."""
        for node, child in self.children.items():
            if child.running:
                try:
                    with self._channel(node) as channel:
                        return ClusterServiceStub(channel).GetClusterStatus(pb.GetClusterStatusRequest(), timeout=5)
                except grpc.RpcError:
                    continue
        return None

    def drain(self, node: str) -> None:
        """Has a node's replicas moved to others; does not wait."""
        with self._channel(next(n for n, child in self.children.items() if child.running and n != node)) as channel:
            ClusterServiceStub(channel).DrainNode(pb.DrainNodeRequest(node_id=node), timeout=10)

    @property
    def addresses(self) -> list[str]:
        """Where clients reach the nodes."""
        return list(self.listen.values())

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by node."""
        return {n: child.pid for n, child in self.children.items()}

    def _ready(self) -> bool:
        for n, child in self.children.items():
            if not child.running:
                raise RuntimeError(f"{n} ended:\n{child.tail()}")
            topology = self.topology(n)
            if topology is None or not topology.shards or not all(s.leader for s in topology.shards):
                return False
        return True

    def topology(self, node: str) -> pb.Topology | None:
        """The cluster as a node sees it, if it answers."""
        try:
            with self._channel(node) as channel:
                return ClusterServiceStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=CALL_SECONDS).topology
        except grpc.RpcError:
            return None

    def status(self, node: str) -> dict[int, pb.GroupStatus] | None:
        """The replicas of a node by group, if it answers."""
        try:
            with self._channel(node) as channel:
                answer = ClusterServiceStub(channel).GetNodeStatus(pb.GetNodeStatusRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError:
            return None
        return {group.group: group for group in answer.groups}

    def run_messages_max(self, destination: str, count: int) -> None:
        """Creates a destination whose runs may be so long."""
        policy = admin_pb.DeliveryPolicy(run_messages_max=count)
        request = admin_pb.UpdateDestinationRequest(
            destination=admin_pb.Destination(name=destination, policy=policy), allow_missing=True)
        with self._channel(next(iter(self.listen))) as channel:
            AdminServiceStub(channel).UpdateDestination(request, timeout=10)

    def _channel(self, node: str) -> grpc.Channel:
        return grpc.insecure_channel(self.listen[node], options=[("grpc.use_local_subchannel_pool", 1)])
