"""Probes: whether the node has started, is ready and is alive, by gRPC health checks on a port of their own.

That port never has TLS, as kubelet's probes cannot present a certificate, and it serves nothing but `grpc.health.v1.Health/Check`. It is
served by threads, not by the node's loop: it answers while the stores are opened and replayed, and when the loop is stuck. What it
answers is only looked up; the loop says how it is twice a second (`Probes.beat`). The names:

    startup    SERVING once the stores are open, what is in them has been read, and the first turn was made, or the node waits to be
               let into its cluster. Never depends on other nodes.
    readiness  SERVING while the node is a member of the meta group, has recovered what it lost, is in touch with the meta group's
               leader or leads it, serves clients, and is not stopping.
    liveness   NOT_SERVING only if the loop, or the turns of the Raft host, have made no progress for STUCK_SECONDS; before the start
               is over, startup is what to look at. Lost quorum, other nodes, destinations and queues have no part in it.

The empty name is the same as readiness. All other names are NOT_FOUND, and Watch is UNIMPLEMENTED: each watcher would hold a thread.
"""
from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import grpc
from grpc_health.v1 import health_pb2
from spillway.broker.config import split_address
from spillway.broker.errors import ConfigError
from spillway.broker.ports import check_free

log = logging.getLogger(__name__)

STARTUP, READINESS, LIVENESS = "startup", "readiness", "liveness"
BEAT_SECONDS = 0.5
STALE_SECONDS = 10.0  # a loop that was silent for so long serves nobody
STUCK_SECONDS = 60.0  # of one fsync or one turn: a disk that slow has its node out of every quorum, but may recover
THREADS = 2
SERVICE = "grpc.health.v1.Health"
OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4096),
    ("grpc.max_connection_idle_ms", 60_000),  # whoever does not ask any more
    ("grpc.server_handshake_timeout_ms", 5_000),
]


class Subject(Protocol):
    """What is probed: the node."""

    def started(self) -> bool:
        """Its stores are open and read, and it works, or waits for a cluster that it is to join."""

    def unready(self) -> str:
        """Why it cannot serve clients now; empty if it can."""

    def turned(self) -> float | None:
        """When the Raft host's last turn began, in the seconds of `time.monotonic`; None while it makes none, and is not meant to."""


class Probes:
    """What the probes are told. Written by the node's loop, read by the threads of ProbeServer: each field is replaced at once."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._beaten: float | None = None
        self._turned: float | None = None
        self._started = False
        self._unready = "it starts"

    def beat(self, subject: Subject) -> None:
        """Notes how the node is; called by its loop."""
        self._turned = subject.turned()
        self._started = self._started or subject.started()
        if (why := subject.unready()) != self._unready:
            self._unready = why
            log.info("not ready: %s", why) if why else log.info("ready")
        self._beaten = self._monotonic()

    async def watch(self, subject: Subject) -> None:
        """Beats until cancelled."""
        while True:
            self.beat(subject)
            await asyncio.sleep(BEAT_SECONDS)

    def serving(self, name: str) -> bool | None:
        """Whether a probe passes; None for an unknown name."""
        now = self._monotonic()
        beaten, turned = self._beaten, self._turned
        if name == STARTUP:
            return self._started
        if name in (READINESS, ""):
            return self._started and not self._unready and beaten is not None and now - beaten < STALE_SECONDS
        if name == LIVENESS:
            return not self._started or all(moment is None or now - moment < STUCK_SECONDS for moment in (beaten, turned))
        return None


class ProbeServer:
    """Answers probes from when it is made until the end of its `with` block."""

    def __init__(self, probes: Probes, address: str) -> None:
        """Listens at `host:port`. Raises ConfigError if that cannot be."""
        check_free("probe_listen", address)
        self._probes = probes
        self._threads = ThreadPoolExecutor(THREADS, "probe")
        self._server = grpc.server(self._threads, options=OPTIONS, maximum_concurrent_rpcs=16)
        check = grpc.unary_unary_rpc_method_handler(self._check, health_pb2.HealthCheckRequest.FromString,
                                                    health_pb2.HealthCheckResponse.SerializeToString)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Check": check}),))
        host, _ = split_address("probe_listen", address)
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"probe_listen {address} cannot be used: {error}") from None
        self._server.start()
        log.info("probes at %s:%d", host, self.port)

    def _check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
        serving = self._probes.serving(request.service)
        if serving is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"service is {request.service[:80]!r}; say startup, readiness or liveness")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING if serving else
                                              health_pb2.HealthCheckResponse.NOT_SERVING)

    def __enter__(self) -> ProbeServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.stop(0).wait()
        self._threads.shutdown()


def unready_of(*, serves: bool, stopping: bool, member: bool, recovering: bool, led: bool) -> str:
    """Why a node cannot serve clients now, for people; empty if it can."""
    if stopping:
        return "it stops"
    if not serves:
        return "it does not serve yet"
    if not member:
        return "it is no member of the meta group yet"
    if recovering:
        return "it has not yet recovered what it lost, or lacks as a new node"
    if not led:
        return "it is in touch with no leader of the meta group"
    return ""

