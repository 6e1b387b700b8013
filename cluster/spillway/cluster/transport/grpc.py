"""Peers over gRPC: one bidirectional stream for each pair of nodes; the node with the lower id calls.

If it does not call for some seconds, the other one does, now and then: the address where the one with the lower id looks for it may be
of yesterday, and a node that founded another cluster instead of coming back to this one calls nobody. Two calls at a time do no harm:
the later connection closes the earlier one.
"""
from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from spillway.cluster.errors import ClusterError, PeerRefused, SnapshotBroken
from spillway.cluster.snapshots import Position
from spillway.cluster.transport.base import Handlers
from spillway.cluster.transport.tls import TlsFiles, TlsInvalid, certified_names, speaks_tls
from spillway.peer.v1 import peer_service_pb2_grpc
from spillway.peer.v1.peer_service_pb2 import (
    ExchangeRequest,
    ExchangeResponse,
    FetchSnapshotRequest,
    FetchSnapshotResponse,
    Hello,
    SnapshotPosition,
)

log = logging.getLogger(__name__)

PROTOCOL = 1
SEND_BUFFER_BYTES_MAX = 64 << 20  # to one peer; beyond it the peer does not read, and the connection is reset
MESSAGE_BYTES_SOFT = 4 << 20  # frames in one gRPC message
RECONNECT_SECONDS_MAX = 0.5
REFUSED_LOG_SECONDS, REFUSED_LOG_MAX = 60.0, 100
SNAPSHOT_SILENCE_SECONDS = 15.0  # whoever sends one says something every second
HELLO = "spillway-hello-bin"  # trailing metadata of a refused call: who refuses
PROBE_AGAIN_SECONDS = 5.0  # between looks at why a peer that is there cannot be talked to
LONELY_SECONDS = 5.0  # without a connection: then the node with the higher id calls, too
SILENCE_SECONDS = 1.5  # a peer that says nothing for so long (claims come every second) is gone
OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20),
           ("grpc.so_reuseport", 0), ("grpc.use_local_subchannel_pool", 1),
           ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
           ("grpc.max_reconnect_backoff_ms", int(RECONNECT_SECONDS_MAX * 1000)),
           ("grpc.dns_min_time_between_resolutions_ms", 500),  # a pod that starts again has its name, and another address; by default 30 s
           ("grpc.http2.lookahead_bytes", 4 << 20)]


class _Connection:
    """One epoch with one peer."""

    def __init__(self, peer: str, epoch: int, incarnation: str) -> None:
        self.peer = peer
        self.epoch = epoch
        self.incarnation = incarnation
        self.frames: list[bytes] = []
        self.size = 0
        self.some = asyncio.Event()
        self.closed = False

    def send(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.size += len(frame)
        if self.size > SEND_BUFFER_BYTES_MAX:
            self.close()
        self.some.set()

    def close(self) -> None:
        self.closed = True
        self.frames = []
        self.some.set()

    async def take(self) -> list[bytes]:
        """What to send next, in one message; empty when closed."""
        while not self.frames and not self.closed:
            self.some.clear()
            await self.some.wait()
        taken, size = 0, 0
        for frame in self.frames:
            if taken and size + len(frame) > MESSAGE_BYTES_SOFT:
                break
            taken += 1
            size += len(frame)
        out, self.frames = self.frames[:taken], self.frames[taken:]
        self.size -= size
        return out


class GrpcTransport(peer_service_pb2_grpc.PeerServiceServicer):
    """A PeerTransport. Add it to the peers' server with `add_to_server`."""

    def __init__(self, hello: Any, cluster: str, node_id: str, peers: dict[str, str], export: Any,
                 unfit: Callable[[Hello], str] = lambda hello: "", foreign: Callable[[Hello], str] = lambda hello: "",
                 tls: TlsFiles | None = None) -> None:
        """`hello()` gives the Hello to send; `peers` maps node ids to host:port; `export(group, peer, position)` is an async
        generator of snapshot chunks; `unfit(hello)` says why there can be no connection to a member, or nothing; `foreign(hello)`
        says why whoever is there is of another cluster, in spite of its name, or nothing. `tls`: connections are encrypted, and a peer's
        certificate must name it."""
        self._hello = hello
        self._cluster = cluster
        self._node_id = node_id
        self._peers = peers
        self._export = export
        self._unfit = unfit
        self._foreign = foreign
        self._tls = tls
        self._probed: dict[str, float] = {}  # peer -> when it was looked why it cannot be talked to
        self._handlers: Handlers | None = None
        self._connections: dict[str, _Connection] = {}
        self._epoch = 0
        self._dials: dict[str, asyncio.Task[None]] = {}
        self._dialing: set[asyncio.Task[None]] = set()  # those, and former ones whose connection is still in use
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # that close channels, or look why a peer does not answer
        self._refused: dict[str, float] = {}  # what was said of refused peers -> when
        self._closing = False

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Serves the other nodes."""
        peer_service_pb2_grpc.add_PeerServiceServicer_to_server(self, server)

    def start(self, handlers: Handlers) -> None:
        """See PeerTransport."""
        self._handlers = handlers
        for peer in self._peers:
            self._start_dial(peer)

    def set_peers(self, peers: dict[str, str]) -> None:
        """Who the other nodes are now, and where; connections to those that are none any more, or are elsewhere, end."""
        before, self._peers = self._peers, dict(peers)
        if self._handlers is None:
            return
        for peer, address in before.items():
            if peers.get(peer) != address:
                if (dial := self._dials.pop(peer, None)) is not None:
                    dial.cancel()
                if (channel := self._channels.pop(peer, None)) is not None:
                    self._go(channel.close())
                if (connection := self._connections.get(peer)) is not None:
                    self._close(connection)
        for peer in peers:
            if peer not in self._dials:
                self._start_dial(peer)

    def rotate(self) -> None:
        """There are new certificates: calls anew with them. A connection that is up is closed only when the new one is: nothing is lost
        if that does not come about."""
        for peer in list(self._dials):
            del self._dials[peer]  # it goes on until its connection ends
            self._channels.pop(peer, None)
            self._start_dial(peer)

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start_dial(self, peer: str) -> None:
        if self._node_id != peer and not self._closing:
            dial = self._dials[peer] = asyncio.get_running_loop().create_task(self._dial(peer))
            self._dialing.add(dial)
            dial.add_done_callback(self._dialing.discard)

    def send(self, peer: str, epoch: int, frame: bytes) -> None:
        """See PeerTransport."""
        connection = self._connections.get(peer)
        if connection is not None and connection.epoch == epoch:
            connection.send(frame)

    async def close(self) -> None:
        """See PeerTransport."""
        self._closing = True
        for task in [*self._dialing, *self._tasks]:
            task.cancel()
        for connection in list(self._connections.values()):
            connection.close()
        for channel in list(self._channels.values()):
            await channel.close()
        await asyncio.gather(*self._dialing, *self._tasks, return_exceptions=True)

    def channel(self, peer: str) -> grpc.aio.Channel:
        """A channel to a peer, made anew after it broke. Raises KeyError if it is none any more."""
        channel = self._channels.get(peer)
        if channel is None:
            channel = self._channels[peer] = self._new_channel(peer, self._peers[peer])
        return channel

    def _new_channel(self, peer: str, address: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=OPTIONS)
        return self._tls.channel(address, peer, OPTIONS)

    def _check_name(self, context: Any, node_id: str) -> None:
        """Raises PeerRefused if the caller's certificate does not name the node that it says it is."""
        if self._tls is not None and node_id not in (names := certified_names(context)):
            raise PeerRefused(f"{context.peer().rpartition(':')[0]} says that it is node {node_id[:80]!r}, and its certificate names "
                              f"{', '.join(map(repr, names)) or 'nobody'}")

    async def _probe(self, peer: str, address: str) -> None:
        """A peer does not answer: says why, if somebody is at its address and TLS is the reason."""
        now = asyncio.get_running_loop().time()
        if now - self._probed.get(peer, -PROBE_AGAIN_SECONDS) < PROBE_AGAIN_SECONDS:
            return
        self._probed[peer] = now
        if self._tls is None:
            if await speaks_tls(address):
                self._log_refused(PeerRefused(f"node {peer!r} at {address} speaks TLS, and this node does not: set peer_tls_cert, "
                                              "peer_tls_key and peer_tls_ca here"))
            return
        try:
            names = await self._tls.names_at(address)
            if names is not None and peer not in names:
                self._log_refused(PeerRefused(f"whoever is at {address} should be node {peer!r}, and has a certificate of "
                                              f"{', '.join(map(repr, names)) or 'nobody'}"))
        except TlsInvalid as error:
            self._log_refused(PeerRefused(f"node {peer!r}: {error}"))

    # -- connections ---------------------------------------------------------------------------------------------

    def _open(self, peer: str, hello: Hello) -> _Connection:
        """Takes a connection into use. Raises PeerRefused."""
        if hello.protocol != PROTOCOL:
            raise PeerRefused(f"node {hello.node_id!r} speaks peer protocol {hello.protocol}, this one {PROTOCOL}")
        if hello.cluster != self._cluster:
            raise PeerRefused(f"node {hello.node_id!r} is of cluster {hello.cluster!r}, not {self._cluster!r}")
        if why := self._foreign(hello):
            raise PeerRefused(why)
        if hello.node_id not in self._peers or (peer and hello.node_id != peer):
            raise PeerRefused(f"node {hello.node_id!r} is not {peer or 'a member of this cluster'!r}")
        if why := self._unfit(hello):
            raise PeerRefused(why)
        old = self._connections.get(hello.node_id)
        if old is not None:
            if old.incarnation != hello.incarnation:  # one that lost its disk is let in when the old one falls silent
                raise PeerRefused(f"node {hello.node_id!r} is connected with another store; does it run twice?")
            self._close(old)
        self._epoch += 1
        connection = self._connections[hello.node_id] = _Connection(hello.node_id, self._epoch, hello.incarnation)
        assert self._handlers is not None
        log.info("connected to node %s", hello.node_id)
        self._handlers.connected(hello.node_id, connection.epoch, hello)
        return connection

    def _log_refused(self, error: PeerRefused) -> None:
        """They try again and again; once a minute is enough to know."""
        now, why = asyncio.get_running_loop().time(), str(error)
        if now - self._refused.get(why, -REFUSED_LOG_SECONDS) >= REFUSED_LOG_SECONDS:
            self._refused = {text: at for text, at in self._refused.items() if now - at < REFUSED_LOG_SECONDS}
            if len(self._refused) < REFUSED_LOG_MAX:
                self._refused[why] = now
                log.error("refused: %s", why)

    def _close(self, connection: _Connection) -> None:
        connection.close()
        if self._connections.get(connection.peer) is connection:
            del self._connections[connection.peer]
            assert self._handlers is not None
            if not self._closing:
                log.info("lost the connection to node %s", connection.peer)
            self._handlers.disconnected(connection.peer, connection.epoch)

    async def _read(self, connection: _Connection, read: Any) -> None:
        """Delivers frames until the stream ends, falls silent or says something of unknown shape."""
        assert self._handlers is not None
        frame = self._handlers.frame
        try:
            while not connection.closed:
                async with asyncio.timeout(SILENCE_SECONDS):
                    message = await read()
                if message is grpc.aio.EOF:
                    break
                for data in message.frames:
                    if not connection.closed:
                        frame(connection.peer, connection.epoch, data)
        except TimeoutError:
            log.warning("node %s: silent for %.1f s", connection.peer, SILENCE_SECONDS)
        except ClusterError as error:
            log.warning("node %s: %s", connection.peer, error)
        except grpc.aio.AioRpcError:
            pass
        finally:
            self._close(connection)

    async def _await_loneliness(self, peer: str) -> None:
        """Until a peer that should call has not for a while."""
        since = asyncio.get_running_loop().time()
        while (left := since + LONELY_SECONDS - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(left)
            if peer in self._connections:
                since = asyncio.get_running_loop().time()

    async def _dial(self, peer: str) -> None:
        wait = 0.02
        while True:
            if self._node_id > peer:
                await self._await_loneliness(peer)
            call: Any = None
            connected = False
            channel = self.channel(peer)
            try:
                call = peer_service_pb2_grpc.PeerServiceStub(channel).Exchange()
                hello = self._hello()
                hello.called = peer
                await call.write(ExchangeRequest(hello=hello))
                async with asyncio.timeout(SILENCE_SECONDS):
                    first = await call.read()
                if first is not grpc.aio.EOF:
                    connection = self._open(peer, first.hello)
                    connected = True
                    wait = 0.02
                    reader = asyncio.get_running_loop().create_task(self._read(connection, call.read))
                    try:
                        while frames := await connection.take():
                            await call.write(ExchangeRequest(frames=frames))
                    finally:
                        reader.cancel()
                        self._close(connection)
            except PeerRefused as error:
                self._log_refused(error)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    self._refused_by(peer, error)
            except (grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError):
                pass
            except asyncio.CancelledError:
                # A reader that times out cancels the call, and a write that is stuck in it then raises this, too.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
            finally:
                if call is not None:
                    call.cancel()
            # A new channel looks the address up anew.
            if self._channels.get(peer) is channel:
                del self._channels[peer]
            await channel.close()
            if self._dials.get(peer) is not asyncio.current_task():
                return  # another one, with new certificates, has taken over
            if not connected and peer in self._peers:
                self._go(self._probe(peer, self._peers[peer]))
            await asyncio.sleep(wait * (0.5 + random.random()))  # noqa: S311
            wait = min(wait * 2, RECONNECT_SECONDS_MAX)

    def _refused_by(self, peer: str, error: grpc.aio.AioRpcError) -> None:
        """A peer refuses this node, and says who it is: what this one thinks of that counts, too."""
        self._log_refused(PeerRefused(f"by node {peer!r}: {error.details()}"))
        for key, value in error.trailing_metadata() or ():
            if key == HELLO and isinstance(value, bytes):
                try:
                    hello = Hello.FromString(value)
                except DecodeError:
                    return
                if hello.cluster == self._cluster and hello.node_id == peer and (why := self._unfit(hello)):
                    self._log_refused(PeerRefused(why))

    async def Exchange(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        """See peer_service.proto."""
        if self._handlers is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        first = await context.read()
        if first is grpc.aio.EOF:
            return
        try:
            hello = self._hello()
            self._check_name(context, first.hello.node_id)
            connection = self._open("", first.hello)
        except PeerRefused as error:
            self._log_refused(error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error), ((HELLO, hello.SerializeToString()),))
            return
        reader = asyncio.get_running_loop().create_task(self._read(connection, context.read))
        try:
            await context.write(ExchangeResponse(hello=hello))
            while frames := await connection.take():
                await context.write(ExchangeResponse(frames=frames))
        finally:
            reader.cancel()
            self._close(connection)

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def FetchSnapshot(self, request: FetchSnapshotRequest, context: Any) -> AsyncIterator[FetchSnapshotResponse]:
        """See peer_service.proto."""
        if request.cluster != self._cluster:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is cluster {self._cluster!r}")
        peer = dict(context.invocation_metadata() or ()).get("spillway-node", "")
        try:
            self._check_name(context, peer)
        except PeerRefused as error:
            self._log_refused(error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        at = request.position
        position = Position(at.index, at.number, at.checksum, at.rows, at.last_key) if request.HasField("position") else None
        async with aclosing(self._export(request.group, peer, position)) as chunks:
            async for chunk in chunks:
                yield FetchSnapshotResponse(chunk=chunk)

    async def fetch_snapshot(self, peer: str, group: int, position: Position | None) -> AsyncIterator[bytes]:
        """See PeerTransport."""
        address = self._peers.get(peer)
        if address is None:
            raise SnapshotBroken(f"node {peer} is none of the cluster any more")
        request = FetchSnapshotRequest(group=group, cluster=self._cluster, position=None if position is None else SnapshotPosition(
            index=position.index, number=position.number, checksum=position.checksum, rows=position.rows, last_key=position.last_key))
        channel = self._new_channel(peer, address)
        try:
            call: Any = peer_service_pb2_grpc.PeerServiceStub(channel).FetchSnapshot(
                request, metadata=(("spillway-node", self._node_id),))
            while True:
                async with asyncio.timeout(SNAPSHOT_SILENCE_SECONDS):
                    response = await call.read()
                if response is grpc.aio.EOF:
                    break
                if response.chunk:  # else it is only a sign of life
                    yield response.chunk
        except TimeoutError:
            raise SnapshotBroken(f"silent for {SNAPSHOT_SILENCE_SECONDS} s") from None
        except grpc.aio.AioRpcError as error:
            raise SnapshotBroken(f"the stream broke: {error.details()}") from None
        finally:
            await channel.close()
