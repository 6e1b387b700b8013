"""Probes say what is so, and nothing else: pure parts with a clock of their own, and the server's threads beside a loop that is stuck."""
from __future__ import annotations

import asyncio
import socket
import threading
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from spillway.broker.errors import ConfigError
from spillway.broker.probes import STALE_SECONDS, STUCK_SECONDS, Probes, ProbeServer, unready_of

NAMES = ("startup", "readiness", "liveness")
UP = {"serves": True, "stopping": False, "member": True, "recovering": False, "led": True}


@dataclass
class Subject:
    """A node, as far as probes see it."""

    is_started: bool = False
    why: str = ""
    turn: float | None = None

    def started(self) -> bool:
        """See probes.Subject."""
        return self.is_started

    def unready(self) -> str:
        """See probes.Subject."""
        return self.why

    def turned(self) -> float | None:
        """See probes.Subject."""
        return self.turn


@dataclass
class Clock:
    """A clock that is set."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def answers(probes: Probes) -> tuple[bool | None, ...]:
    """What the three probes say."""
    return tuple(probes.serving(name) for name in NAMES)


def test_a_node_that_opens_its_stores_has_not_started_and_is_alive() -> None:
    """However long it takes: only startup's own patience ends it."""
    clock = Clock()
    probes = Probes(clock)
    assert answers(probes) == (False, False, True)
    clock.now += 10 * STUCK_SECONDS
    assert answers(probes) == (False, False, True)


def test_a_node_without_quorum_is_started_and_alive_and_not_ready() -> None:
    """Restarting it would not bring the others back."""
    clock = Clock()
    probes = Probes(clock)
    for _ in range(1000):
        clock.now += 1
        probes.beat(Subject(True, unready_of(**{**UP, "led": False}), clock.now))
    assert answers(probes) == (True, False, True)
    probes.beat(Subject(True, unready_of(**UP), clock.now))
    assert answers(probes) == (True, True, True)
    assert probes.serving("") is True
    assert probes.serving("spillway.v1.QueueService") is None


@pytest.mark.parametrize("change", [{"serves": False}, {"stopping": True}, {"member": False}, {"recovering": True}, {"led": False}])
def test_each_reason_alone_makes_a_node_unready(change: dict[str, object]) -> None:
    """And says so."""
    assert unready_of(**UP) == ""
    assert unready_of(**(UP | change))  # type: ignore[arg-type]


def test_a_loop_that_stands_still_is_not_ready_soon_and_not_alive_late() -> None:
    """What the loop said last may be of yesterday."""
    clock = Clock()
    probes = Probes(clock)
    probes.beat(Subject(True, "", clock.now))
    clock.now += STALE_SECONDS - 0.1
    assert answers(probes) == (True, True, True)
    clock.now += 0.2
    assert answers(probes) == (True, False, True)
    clock.now += STUCK_SECONDS
    assert answers(probes) == (True, False, False)
    probes.beat(Subject(True, "", clock.now))
    assert answers(probes) == (True, True, True)


def test_turns_that_stand_still_while_the_loop_turns() -> None:
    """A write that never ends: such a node only looks alive. One that makes no turns because it stops is no such node."""
    clock = Clock()
    probes = Probes(clock)
    turned = clock.now
    clock.now += STUCK_SECONDS + 1
    probes.beat(Subject(True, "", turned))
    assert answers(probes) == (True, True, False)
    probes.beat(Subject(True, "it stops", None))
    assert answers(probes) == (True, False, True)


def test_once_started_is_always_started() -> None:
    """The start is over, whatever comes."""
    probes = Probes(Clock())
    probes.beat(Subject(True))
    probes.beat(Subject(False))
    assert probes.serving("startup") is True


def check(port: int, name: str) -> str:
    """What a health check answers: a status, or the code of an error."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=10, wait_for_ready=True)
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_the_server_answers_while_the_loop_is_stuck() -> None:
    """Its threads need no loop; a loop that is blocked is found by what it no longer says."""
    clock = Clock()
    probes = Probes(clock)
    beaten, release = threading.Event(), threading.Event()

    async def node() -> None:
        probes.beat(Subject(True, "", clock.now))
        beaten.set()
        release.wait()  # blocks the loop

    with ProbeServer(probes, "127.0.0.1:0") as server:
        assert [check(server.port, name) for name in NAMES] == ["NOT_SERVING", "NOT_SERVING", "SERVING"]
        assert check(server.port, "other") == "NOT_FOUND"
        loop = threading.Thread(target=asyncio.run, args=(node(),))
        loop.start()
        try:
            assert beaten.wait(10)
            assert [check(server.port, name) for name in NAMES] == ["SERVING", "SERVING", "SERVING"]
            clock.now += STUCK_SECONDS + 1
            assert [check(server.port, name) for name in NAMES] == ["SERVING", "NOT_SERVING", "NOT_SERVING"]
        finally:
            release.set()
            loop.join()


def test_nothing_but_checks_is_served() -> None:
    """Watchers would hold its threads, and everything else wants TLS and tokens."""
    with ProbeServer(Probes(), "127.0.0.1:0") as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        call = channel.unary_unary("/spillway.v1.ClusterService/GetTopology")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_port_that_is_taken() -> None:
    """It is said which setting, before anything is opened."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"probe_listen 127\.0\.0\.1:\d+ cannot be used"):
            ProbeServer(Probes(), f"127.0.0.1:{taken.getsockname()[1]}")
