"""Probes of real processes."""
from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import grpc
from cluster_process import ClusterProcesses
from grpc_health.v1 import health_pb2, health_pb2_grpc

from demo.ports import free_ports

Make = Callable[..., ClusterProcesses]
NAMES = ("startup", "readiness", "liveness")


def check(port: int, name: str, seconds: float = 5.0) -> str:
    """A status, or the code of an error."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=seconds)
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def until_they_say(port: int, *wanted: str) -> None:
    """Waits until the three probes say so."""
    deadline = time.monotonic() + 60
    while (said := tuple(check(port, name) for name in NAMES)) != wanted:
        assert time.monotonic() < deadline, f"{said}, not {wanted}"
        time.sleep(0.05)


def test_a_node_alone(cluster: Make) -> None:
    """It is started, ready and alive; frozen it answers nobody; when it ends, nobody answers."""
    (port,) = free_ports(1)
    node = cluster(1, ["--probe-listen", f"127.0.0.1:{port}"]).nodes["n1"]
    until_they_say(port, "SERVING", "SERVING", "SERVING")
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    assert check(port, "liveness", seconds=2.0) in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
    node.process.send_signal(signal.SIGCONT)
    until_they_say(port, "SERVING", "SERVING", "SERVING")
    assert node.stop() == 0
    assert check(port, "liveness") == "UNAVAILABLE"


def test_a_node_that_waits_to_be_let_in(cluster: Make) -> None:
    """It has started, or kubelet would end it while its cluster is down, and is not ready."""
    port, nobody = free_ports(2)
    waiting = cluster(1, start=False).nodes["n1"]
    waiting.argv += ["--join", f"127.0.0.1:{nobody}", "--probe-listen", f"127.0.0.1:{port}"]
    waiting.start()
    until_they_say(port, "SERVING", "NOT_SERVING", "SERVING")
    assert waiting.stop() == 0


def test_a_node_that_founds_a_cluster_whose_others_are_away(cluster: Make) -> None:
    """As pods that are not scheduled yet: started, not ready, alive; ready once they are there."""
    ports = dict(zip(("n1", "n2", "n3"), free_ports(3), strict=True))
    running = cluster(3, start=False)
    for name, node in running.nodes.items():
        node.argv += ["--probe-listen", f"127.0.0.1:{ports[name]}"]
    running.nodes["n1"].start()
    until_they_say(ports["n1"], "SERVING", "NOT_SERVING", "SERVING")
    for name in ("n2", "n3"):
        running.nodes[name].start()
    for port in ports.values():
        until_they_say(port, "SERVING", "SERVING", "SERVING")
    for name in ("n2", "n3"):
        running.nodes[name].kill()
    until_they_say(ports["n1"], "SERVING", "NOT_SERVING", "SERVING")
    with suppress(TimeoutError):
        running.nodes["n1"].stop()


def test_a_port_that_is_taken_ends_the_node_before_it_touches_its_data(cluster: Make) -> None:
    """With the setting's name."""
    running = cluster(1, start=False)
    node = running.nodes["n1"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        node.argv += ["--probe-listen", f"127.0.0.1:{port}"]
        node.start()
        assert node.wait() == 2
    assert f"probe_listen 127.0.0.1:{port} cannot be used" in node.text() and not node.data_dir.exists()
