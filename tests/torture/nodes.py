"""The nodes of a run: real processes, placed in a network, that end with the run in every case."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub

from tests.integration.cluster_process import ClusterProcesses, NodeProcess
from tests.torture.network import ROOT, Network

CALL_SECONDS = 2.0
WAIT_SECONDS = 90.0  # for what must happen; generous, as other work may use the machine
DISK_FREE_BYTES_MIN = 24 << 20
AT_WORK = ("leader", "follower")


def end_with_me() -> list[str]:
    """What to put before a command so that it is killed when this process ends."""
    return [sys.executable, "-m", "bench.children", str(os.getpid())]


def until(what: str, condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Polls other processes until a condition holds. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


class Node(NodeProcess):
    """A node that remembers where in its log its present life begins."""

    said_from = 0

    def start(self) -> None:
        """Starts it; does not wait."""
        self.said_from = self.log.stat().st_size if self.log.exists() else 0
        super().start()

    def said(self) -> str:
        """Its log since it was started last."""
        return self.log.read_bytes()[self.said_from:].decode(errors="replace")


class Nodes(ClusterProcesses):
    """A cluster whose nodes can be reached, frozen and looked at while they suffer."""

    def __init__(self, directory: Path, count: int, network: Network, disk_mib: int = 0) -> None:
        """With `disk_mib`, each node's directory is a disk of its own of that size (see `disk`), which must be mounted there."""
        ids = [f"n{i + 1}" for i in range(count)]
        self.addresses_of_clients: list[str] = []
        self.nodes: dict[str, Node] = {}  # type: ignore[assignment]
        for node_id, place in network.places(ids).items():
            flags = ["--disk-free-bytes-min", str(DISK_FREE_BYTES_MIN if disk_mib else 0), "--allow-insecure"]  # in namespaces of its own
            if count > 1:
                flags += ["--peers", place.peers]
            node = Node(directory, node_id, place.listen, place.peer_listen, flags)
            if disk_mib:
                node.data_dir = directory / node_id / "data"  # beside what fills the disk
                node.argv[node.argv.index("--data-dir") + 1] = str(node.data_dir)
            node.argv = [*end_with_me(), *place.prefix, *node.argv]
            self.nodes[node_id] = node
            self.addresses_of_clients.append(place.address)

    @property
    def ids(self) -> list[str]:
        """All node ids."""
        return list(self.nodes)

    @property
    def running(self) -> list[Node]:
        """Nodes whose process lives, frozen ones too."""
        return [node for node in self.nodes.values() if node.running]

    def signal(self, node_id: str, number: signal.Signals) -> None:
        """Sends a signal and does not wait."""
        process = self.nodes[node_id].process
        assert process is not None
        process.send_signal(number)

    def kill_at_once(self, ids: list[str]) -> None:
        """kill -9 of several, without a pause in between."""
        for node_id in ids:
            if self.nodes[node_id].running:
                self.signal(node_id, signal.SIGKILL)
        for node_id in ids:
            process = self.nodes[node_id].process
            assert process is not None
            process.wait(WAIT_SECONDS)

    def seen_by(self, node: Node) -> pb.Topology | None:
        """The topology as a node sees it, if it answers."""
        try:
            with _channel(node) as channel:
                return ClusterServiceStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=CALL_SECONDS).topology
        except grpc.RpcError:
            return None

    def groups(self, node: Node) -> dict[int, pb.GroupStatus]:
        """A node's replicas; empty if it does not answer."""
        try:
            with _channel(node) as channel:
                answer = ClusterServiceStub(channel).GetNodeStatus(pb.GetNodeStatusRequest(), timeout=CALL_SECONDS)
            return {group.group: group for group in answer.groups}
        except grpc.RpcError:
            return {}

    def leaders(self) -> dict[int, str]:
        """The leader of each shard, as the nodes themselves say it; the one of the highest term counts."""
        found: dict[int, tuple[int, str]] = {}
        for node in self.running:
            for number, group in self.groups(node).items():
                if number and group.role == "leader":
                    found[number] = max(found.get(number, (0, "")), (group.term, node.node_id))
        return {number: node_id for number, (_, node_id) in sorted(found.items())}

    def healthy(self) -> bool:
        """Whether every node runs, answers, knows every leader, and has applied what was committed anywhere just before."""
        if len(self.running) < len(self.nodes):
            return False
        committed: dict[int, int] = {}
        found = []
        for node in self.nodes.values():
            groups = self.groups(node)
            if not groups:
                return False
            found.append(groups)
            for number, group in groups.items():
                committed[number] = max(committed.get(number, 0), group.commit_index)
        for node in self.nodes.values():
            topology = self.seen_by(node)
            if topology is None or not topology.shards or not all(shard.leader for shard in topology.shards):
                return False
            # `committed` was read before: under load nobody is level at one moment.
            groups = self.groups(node)
            if not groups or any(group.role not in AT_WORK or group.applied_index < committed.get(number, 0)
                                 for number, group in groups.items()):
                return False
        return True

    def wait_healthy(self) -> None:
        """Waits for that. Raises TimeoutError with what is wrong, RuntimeError if a node ended."""
        def healthy() -> bool:
            for node in self.nodes.values():
                if not node.running:
                    raise RuntimeError(f"{node.node_id} ended with {node.process and node.process.returncode}:\n{tail(node)}")
            return self.healthy()
        try:
            until("every node at work", healthy)
        except TimeoutError as error:
            state = {node.node_id: {number: (group.role, group.leader, group.term, group.applied_index, group.commit_index)
                                    for number, group in self.groups(node).items()} for node in self.nodes.values()}
            raise TimeoutError(f"{error}; {state}") from None


def tail(node: Node, lines: int = 12) -> str:
    """The end of a node's log."""
    return "\n".join(node.said().splitlines()[-lines:])


def _channel(node: Node) -> grpc.Channel:
    return grpc.insecure_channel(node.address, options=[("grpc.use_local_subchannel_pool", 1)])


class Worker:
    """A process of the load."""

    def __init__(self, directory: Path, role: str, name: str, options: str) -> None:
        self.role, self.name = role, name
        self.log = directory / f"{name}.log"
        self.history = directory / f"{name}.jsonl"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*end_with_me(), sys.executable, "-m", "tests.torture.worker", role, str(self.history), name, options], cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def check(self) -> None:
        """Raises RuntimeError if it failed."""
        if self.process.poll():
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.log.read_text()[-2000:]}")

    def end(self, seconds: float) -> None:
        """In good order. Raises TimeoutError, RuntimeError."""
        self.process.send_signal(signal.SIGTERM)
        self.wait(seconds)

    def wait(self, seconds: float) -> None:
        """Waits for its end. Raises TimeoutError, RuntimeError."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} did not end within {seconds:.0f} s:\n{self.log.read_text()[-2000:]}") from None
        self.check()

    def kill(self) -> None:
        """At once."""
        self.process.kill()
        self.process.wait()
