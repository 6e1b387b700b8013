"""Real nodes for tests: processes on loopback, each with a directory of its own, ended in every case."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub

from demo.ports import free_ports

START_SECONDS = 30.0


class NodeProcess:
    """One `spillway serve`."""

    def __init__(self, directory: Path, node_id: str, listen: str, peer_listen: str, flags: list[str]) -> None:
        self.directory = directory
        self.node_id = node_id
        self.address = listen
        self.peer_address = peer_listen
        self.log = directory / f"{node_id}.log"
        self.data_dir = directory / node_id
        self.argv = [sys.executable, "-m", "spillway.broker", "--node-id", node_id, "--listen", listen,
                     "--peer-listen", peer_listen, "--data-dir", str(self.data_dir), *flags]
        self.env: dict[str, str] = {}  # beside that of the tests
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; does not wait."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=log, env={**os.environ, **self.env})

    def kill(self, sig: int = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(sig)
        return self.process.wait(START_SECONDS)

    def stop(self) -> int:
        """A planned stop."""
        return self.kill(signal.SIGTERM)

    def wait(self) -> int:
        """Waits until it has ended by itself; returns the exit code."""
        assert self.process is not None
        return self.process.wait(START_SECONDS)

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")


class ClusterProcesses:
    """One or more nodes of a cluster."""

    def __init__(self, directory: Path, nodes: int, flags: list[str] | None = None) -> None:
        ports = free_ports(2 * nodes)
        ids = [f"n{i + 1}" for i in range(nodes)]
        listen = {n: f"127.0.0.1:{ports[2 * i]}" for i, n in enumerate(ids)}
        peer = {n: f"127.0.0.1:{ports[2 * i + 1]}" for i, n in enumerate(ids)}
        common = list(flags or [])
        if nodes > 1:
            common += ["--peers", ",".join(f"{n}={peer[n]}/{listen[n]}" for n in ids)]
        self.directory = directory
        self.flags = list(flags or [])
        self.nodes = {n: NodeProcess(directory, n, listen[n], peer[n], common) for n in ids}

    def join(self, node_id: str, *flags: str) -> NodeProcess:
        """Starts one more node, which joins; does not wait."""
        listen, peer = (f"127.0.0.1:{port}" for port in free_ports(2))
        seeds = ",".join(n.peer_address for n in self.nodes.values() if n.running)
        node = self.nodes[node_id] = NodeProcess(self.directory, node_id, listen, peer, [*self.flags, "--join", seeds, *flags])
        node.start()
        return node

    @property
    def addresses(self) -> list[str]:
        """Where clients reach the nodes."""
        return [n.address for n in self.nodes.values()]

    def start(self) -> None:
        """Starts all nodes and waits until every shard has the leader that it is meant to have, and every node knows it. Whoever takes
        over first hands over soon, which plain clients would see."""
        for node in self.nodes.values():
            node.start()
        self.wait_ready(preferred=True)

    def wait_ready(self, preferred: bool = False) -> None:
        """Waits until every running node knows a leader for every shard; if `preferred`, that is the first of the replicas."""
        deadline = time.monotonic() + START_SECONDS
        for node in self.nodes.values():
            if not node.running:
                continue
            while True:
                try:
                    topology = self.topology(node)
                    if topology.shards and all(s.leader in (s.replicas[:1] if preferred else s.replicas) for s in topology.shards):
                        break
                except grpc.RpcError:
                    pass
                assert node.running, f"{node.node_id} ended:\n{node.text()}"
                assert time.monotonic() < deadline, f"{node.node_id} is not ready:\n{node.text()}"
                time.sleep(0.05)  # polling another process; nothing is assumed of how long it takes

    def topology(self, node: NodeProcess | None = None) -> pb.Topology:
        """The topology as a node sees it. Raises grpc.RpcError."""
        node = node or next(n for n in self.nodes.values() if n.running)
        with grpc.insecure_channel(node.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            return ClusterServiceStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=5).topology

    def leader(self, shard: int) -> NodeProcess:
        """The node that leads a shard."""
        return self.nodes[self.topology().shards[shard - 1].leader]

    def end(self) -> None:
        """Ends whatever still runs."""
        for node in self.nodes.values():
            if node.running:
                node.kill()
