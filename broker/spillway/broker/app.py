"""The composition root: builds a node from its settings and runs it until it is told to stop."""
from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import signal
import sys
import time
from contextlib import nullcontext

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from spillway.broker.config import NodeConfig, members_of, meta_founders
from spillway.broker.core import features
from spillway.broker.datadir import claim, raise_format
from spillway.broker.errors import ConfigError, DataDirError, Unavailable
from spillway.broker.ports import check_free
from spillway.broker.probes import Probes, ProbeServer, unready_of
from spillway.broker.runtime.balance import META_GROUP
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.security import clients_tls, peers_tls, protection
from spillway.broker.services.access import Authenticate, Authorize, Sessions
from spillway.broker.services.admin import AdminService
from spillway.broker.services.audit import Audit
from spillway.broker.services.cluster import ClusterService
from spillway.broker.services.jwt import Keys
from spillway.broker.services.member import MemberService
from spillway.broker.services.parsing import ParseErrors
from spillway.broker.services.peers import PeerNames
from spillway.broker.services.principal import AdminFile, Authenticator, Limits
from spillway.broker.services.queue import QueueService
from spillway.broker.services.quotas import Quotas
from spillway.broker.services.share import ShareService
from spillway.broker.telemetry.telemetry import Telemetry
from spillway.cluster.errors import StorageFailed, StoreRefused
from spillway.cluster.placement import place
from spillway.cluster.raft.host import RaftHost
from spillway.cluster.raft.journal import JournalStore
from spillway.cluster.snapshots import Position
from spillway.cluster.state_store import StateStore
from spillway.cluster.transport.grpc import PROTOCOL, GrpcTransport
from spillway.cluster.transport.tls import POLL_SECONDS, TlsFiles
from spillway.contract.limits import FRAME_BYTES_MAX
from spillway.peer.v1.member_service_pb2 import JoinRequest
from spillway.peer.v1.member_service_pb2_grpc import add_MemberServiceServicer_to_server
from spillway.peer.v1.peer_service_pb2 import Hello
from spillway.peer.v1.share_service_pb2_grpc import add_ShareServiceServicer_to_server
from spillway.v1 import admin_service_pb2, cluster_service_pb2, queue_service_pb2
from spillway.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from spillway.v1.cluster_service_pb2_grpc import add_ClusterServiceServicer_to_server

log = logging.getLogger(__name__)

EXIT_CONFIG, EXIT_DATA = 2, 3
STOP_GRACE_SECONDS, PEER_GRACE_SECONDS = 2.0, 0.2
JOIN_SECONDS, JOIN_AGAIN_SECONDS = 5.0, 0.5
CLIENT_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second broker on the port must fail, not share it
    ("grpc.max_receive_message_length", FRAME_BYTES_MAX),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),  # of clients that vanished nothing else ever tells
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.server_handshake_timeout_ms", 20_000),  # a connection that says nothing holds a descriptor
    ("grpc.http2.lookahead_bytes", 1 << 20),
]
PEER_OPTIONS = [*CLIENT_OPTIONS, ("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


async def serve_until_stopped(config: NodeConfig) -> int:
    """Runs a node until SIGTERM or SIGINT; returns the exit code."""
    probes = Probes()
    try:
        # Before the stores are opened: a node that reads a long log answers that it has not started.
        server = ProbeServer(probes, config.probe_listen) if config.probe_listen else nullcontext()
    except ConfigError as error:
        print(f"spillway serve: {error}", file=sys.stderr)
        return EXIT_CONFIG
    with server:
        return await _serve(config, probes)


async def _serve(config: NodeConfig, probes: Probes) -> int:
    try:
        app = App(config)
    except (DataDirError, StoreRefused, StorageFailed, ConfigError) as error:
        print(f"spillway serve: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_DATA
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    app.node.on_removed = stop.set
    watching = loop.create_task(probes.watch(app))
    watching.add_done_callback(app.node.task_done)
    starting, stopping = loop.create_task(app.start()), loop.create_task(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # it waits for a cluster that it is to join
        starting.cancel()
        await asyncio.wait((starting,))
        app.close()
        return 0
    try:
        starting.result()
    except (ConfigError, StoreRefused) as error:
        print(f"spillway serve: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_DATA
    _greet(config)
    await stopping
    app.node.stopping = True
    probes.beat(app)
    await app.stop()
    watching.cancel()
    return 0


def _greet(config: NodeConfig) -> None:
    """Tells a person how to talk to the node."""
    address = config.listen
    flag = "" if address == "127.0.0.1:7070" else f" --address {address}"
    print(f"""spillway: node {config.node_id} of cluster {config.cluster!r} serves {address}, data in {config.data_dir}
  produce:  .venv/bin/spillway produce hello --tenant acme --key user-1{flag} <<< 'first event'
  consume:  .venv/bin/spillway consume hello --count 1{flag}
  deliver:  .venv/bin/spillway dispatch{flag}     (POSTs to destinations that have a URL; see README)
  status:   .venv/bin/spillway status{flag}
  stop:     Ctrl-C""", flush=True)


class App:
    """One node, wired."""

    def __init__(self, config: NodeConfig) -> None:
        """Opens the stores. Raises DataDirError, StoreRefused, StorageFailed or ConfigError."""
        self.config = config
        self._following: asyncio.Task[None] | None = None  # whatever fails from here on closes what is open
        members = members_of(config)
        self.tls, self.peer_tls = clients_tls(config), peers_tls(config)
        self._admin_file = AdminFile(config.admin_token_file) if config.admin_token_file else None
        self._keys = Keys(config.jwt_jwks_file, config.jwt_issuer, config.jwt_audience) if config.jwt_jwks_file else None
        for level, line in protection(config):
            log.log(level, line)
        path = self._path = claim(config)
        self.journal = JournalStore(path / "log", config.cluster, config.node_id)
        try:
            self.store = StateStore(path / "state", snapshot_bytes_per_second=config.snapshot_bytes_per_second)
        except StoreRefused:
            self.journal.close()
            raise
        peers = {m.node_id: m.peer_address for m in members.values() if m.node_id != config.node_id}
        self.transport = GrpcTransport(self._hello, config.cluster, config.node_id, peers, self._export, self._unfit,
                                       self._foreign, self.peer_tls)
        self.host = RaftHost(config.node_id, sorted(members), self.journal, self.transport, self.store, joins=bool(config.join))
        if self.journal.node.formed and not config.join and not self.host.has_replica(META_GROUP, meta_founders(config)):
            self.close()
            raise StoreRefused(f"node {config.node_id!r} was removed from cluster {config.cluster!r}; its data is of no more use: start it "
                               "with --join and an empty data_dir")
        if not config.join and len(members) == 1 and self._blank() and features.known(config.feature_level_max).high >= features.MEMBERS:
            self.journal.change_node(cluster_id=secrets.token_hex(8))  # clients never hear of it without
        founded = {} if config.join else place(sorted(members), config.shards, min(config.replicas, len(members)))
        self.node = Node(config, self.store, self.host, founded)
        self.node.keep_level = self._keep_level
        try:
            self.node.check_level(self.node.meta.directory.level)
        except (StoreRefused, StorageFailed):
            self.close()
            raise
        self.telemetry = Telemetry(self.node) if config.metrics_listen or config.otlp_endpoint else None
        self.node.balance.joined = self.transport.set_peers
        self.node.balance.follow()
        self.forwarder = Forwarder(self.node, self.peer_tls)
        audit = Audit()
        self.queue = QueueService(self.node, self.forwarder, audit=audit)
        authenticator = Authenticator(config.auth == "tokens", lambda: self.node.meta.directory, time.time, self._admin_file, self._keys,
                                      behind=lambda: not self.node.meta.leading)
        limits = Limits(config.connection_streams_max, config.connection_messages_per_second, config.connection_bytes_in_flight_max)
        self._sessions = Sessions(authenticator, time.time)
        self.node.on_tokens = self._sessions.recheck
        self.server = grpc.aio.server(options=CLIENT_OPTIONS, interceptors=[
            Authenticate(authenticator, self._sessions, Quotas(limits), audit), ParseErrors(), Authorize(audit)])
        named = [PeerNames(self.node)] if self.peer_tls else []
        self.peer_server = grpc.aio.server(options=PEER_OPTIONS, interceptors=[ParseErrors(), *named])
        self.health = health.aio.HealthServicer()
        self._running: asyncio.Task[None] | None = None
        self._joining = False

    def started(self) -> bool:
        """See probes.Subject."""
        return self._joining or self.host.turned is not None

    def unready(self) -> str:
        """See probes.Subject."""
        meta, own = self.host.groups.get(META_GROUP), self.config.node_id
        leader = self.host.leader_of(META_GROUP)[0]
        return unready_of(serves=self._running is not None, stopping=self.node.stopping,
                          member=meta is not None and own in meta.configuration, recovering=self.host.recovering,
                          led=leader is not None and self.host.in_touch(leader))

    def turned(self) -> float | None:
        """See probes.Subject."""
        return None if self._running is None or self._running.done() else self.host.turned

    def _blank(self) -> bool:
        node = self.journal.node
        return not (node.formed or node.recovering or node.cluster_id)

    def _hello(self) -> Hello:
        node = self.journal.node
        return Hello(protocol=PROTOCOL, cluster=node.cluster, node_id=node.node_id, incarnation=node.incarnation,
                     formed=node.formed, founders=node.founders, feature_min=self.node.features.low,
                     feature_max=self.node.features.high, feature_level=self.node.meta.directory.level,
                     cluster_id=self.node.cluster_id)

    def _foreign(self, peer: Hello) -> str:
        """Why a node is of another cluster than this one, though that has the same name; if this is the one that is wrong, it ends."""
        ours, theirs = self.node.cluster_id, peer.cluster_id
        if not theirs or not ours or theirs == ours:
            return ""
        identity = self.node.meta.directory.identity
        cluster, own = self.config.cluster, self.config.node_id
        # Who is called by its id by a cluster that it does not continue, and has nobody else, had lost its disk and did not know that.
        if (peer.called == own and peer.formed and len(self.node.members) == 1 and theirs not in (identity.former if identity else ())):
            self.host.fatal(StoreRefused(
                f"this node was one of cluster {cluster!r} with the identity {theirs}, and has founded another one of that name: start it "
                "with --join and an empty data_dir"))
        return (f"node {peer.node_id!r} is of another cluster {cluster!r}: that one's identity is {theirs}, this one's {ours}. If it "
                "belongs here, start it with --join and an empty data_dir")

    def _unfit(self, peer: Hello) -> str:
        """Why this node and a peer cannot be in one cluster; if this one is to blame, it ends."""
        if why := features.refusal(peer.feature_level or features.LEVEL_MIN, self.node.features):
            self.host.fatal(StoreRefused(why))
            return why
        why = features.refusal(self.node.meta.directory.level, features.said(peer.feature_min, peer.feature_max))
        return why and f"node {peer.node_id!r}: {why}"

    def _keep_level(self, level: int) -> None:
        try:
            raise_format(self._path, level)
        except OSError as error:
            raise StorageFailed(f"{self._path} cannot be written: {error.strerror}") from None

    def _export(self, group: int, peer: str, position: Position | None) -> object:
        return self.host.export(group, peer, position)

    async def start(self) -> None:
        """Binds the ports, then starts the groups. Raises ConfigError if a port is taken."""
        self.server.add_generic_rpc_handlers((self.queue.handler(),))
        add_AdminServiceServicer_to_server(AdminService(self.node, self.forwarder), self.server)
        add_ClusterServiceServicer_to_server(ClusterService(self.node, self.forwarder), self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        names = [d.services_by_name[n].full_name for d, n in (
            (queue_service_pb2.DESCRIPTOR, "QueueService"), (admin_service_pb2.DESCRIPTOR, "AdminService"),
            (cluster_service_pb2.DESCRIPTOR, "ClusterService"))]
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)
        self.transport.add_to_server(self.peer_server)
        self.peer_server.add_generic_rpc_handlers((QueueService(self.node, self.forwarder, peer=True).handler(),))
        add_AdminServiceServicer_to_server(AdminService(self.node, self.forwarder, peer=True), self.peer_server)
        add_ClusterServiceServicer_to_server(ClusterService(self.node, self.forwarder, peer=True), self.peer_server)
        add_ShareServiceServicer_to_server(ShareService(self.node), self.peer_server)
        add_MemberServiceServicer_to_server(MemberService(self.node, self.forwarder), self.peer_server)
        _bind("listen", self.config.listen, self.server, self.tls)
        _bind("peer_listen", self.config.peer_listen, self.peer_server, self.peer_tls)
        self._following = asyncio.get_running_loop().create_task(self._follow_files())
        if self.telemetry is not None:
            self.telemetry.collector.streams = lambda: self.queue.open_streams
            certificates = {"clients": self.tls, "nodes": self.peer_tls}
            self.telemetry.collector.certificate_ends = lambda: {
                port: files.ends for port, files in certificates.items() if files is not None}
            await self.telemetry.listen()
        if self.config.join and (not self.journal.node.formed or len(self.node.members) == 1):
            self._joining = True
            await self._join()
        await self.health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.peer_server.start()
        await self.server.start()
        self._running = asyncio.get_running_loop().create_task(self.host.run())
        self.node.start(self.forwarder)
        if self.telemetry is not None:
            self.telemetry.start()

    async def _join(self) -> None:
        """Asks the cluster to take this node in, until it does. Raises ConfigError if it refuses."""
        config = self.config
        request = JoinRequest(cluster=config.cluster, member=self.node.balance.introduction(),
                              formed=self.journal.node.formed, shard_count=config.shards, replica_count=config.replicas)
        for address in itertools.cycle(config.join):
            try:
                answer = await self.forwarder.join_at(address, request, JOIN_SECONDS)
            except Unavailable as error:
                log.info("asked %s to join: %s", address, error)
                await asyncio.sleep(JOIN_AGAIN_SECONDS)
                continue
            if isinstance(answer, grpc.aio.AioRpcError):
                if answer.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    raise ConfigError(f"the cluster does not take this node in: {answer.details()}")
                if answer.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise ConfigError(f"join has {address}, which is no peer address of a node that others can join; name a "
                                      "--peer-listen of a node")
                log.info("asked %s to join: %s", address, answer.details())
                await asyncio.sleep(JOIN_AGAIN_SECONDS)
                continue
            if answer.cluster_id:
                self.journal.change_node(cluster_id=answer.cluster_id)
            self.transport.set_peers({m.node_id: m.peer_address for m in answer.members if m.node_id != config.node_id})
            return

    async def _follow_files(self) -> None:
        """Takes new certificates, and a new admin token, into use."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            news = [source.poll() for source in (self._admin_file, self._keys) if source is not None]
            if any(news):
                self._sessions.recheck()
            if self.tls is not None:
                self.tls.poll()
            if self.peer_tls is not None and self.peer_tls.poll():
                self.transport.rotate()
                self.forwarder.rotate()

    async def stop(self) -> None:
        """Stops without losing anything: leaderships first, then clients' streams, whose work the new leaders do, then the rest."""
        log.info("stopping")
        await self.health.enter_graceful_shutdown()
        self.node.stopping = True  # nothing more is granted
        await self.host.hand_over()
        self.queue.drain()  # what had been granted is on its way by now: who left earlier would miss it
        await self.server.stop(STOP_GRACE_SECONDS if len(self.node.members) > 1 else PEER_GRACE_SECONDS)
        await self.host.stop(0)
        assert self._running is not None
        await self._running
        await self.peer_server.stop(PEER_GRACE_SECONDS)
        await self.transport.close()
        await self.forwarder.close()
        await self.node.stop()
        if self.telemetry is not None:
            await self.telemetry.stop()
        self.close()
        log.info("stopped")

    def close(self) -> None:
        """Releases the stores."""
        if self._following is not None:
            self._following.cancel()
        self.store.close()
        self.journal.close()


def _bind(setting: str, address: str, server: grpc.aio.Server, tls: TlsFiles | None) -> None:
    check_free(setting, address)
    try:
        bound = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.server_credentials())
    except RuntimeError as error:
        raise ConfigError(f"{setting} {address} cannot be used: {error}") from None
    if not bound:
        raise ConfigError(f"{setting} {address} cannot be used")


