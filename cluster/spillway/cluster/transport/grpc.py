"""Peers over gRPC: one bidirectional stream for each pair of nodes, on the peers' port. Keeps the guarantees of `base`.

The node with the lower id calls. Both sides first say who they are; a peer of another cluster, protocol or store is refused.
Then each side has one reader and one writer task. A frame costs next to nothing, a gRPC message about 0.1 ms of CPU: the
writer puts everything that waits into one message. While that is on its way the next one fills, so an idle connection sends
at once and a busy one sends little but large.

A side that has nothing to say sends an empty message now and then. Silence ends the connection: TCP alone would not notice a
machine that is gone, or a process that is stopped, for minutes. A connection that ends takes everything under way with it,
and the caller dials again: with a new channel, which looks the peer's address up anew, and soon, because a node that restarts
should be back at once.
"""
from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from spillway.cluster.errors import ClusterError, PeerRefused, SnapshotInvalid, WireInvalid
from spillway.cluster.transport.base import Handlers, PeerHello
from spillway.peer.v1 import peer_service_pb2
from spillway.peer.v1.peer_service_pb2 import (
    ExchangeRequest,
    ExchangeResponse,
    FetchSnapshotRequest,
    FetchSnapshotResponse,
    Hello,
)

log = logging.getLogger(__name__)

PROTOCOL = 1
FRAME_BYTES_MAX = 16 << 20
MESSAGE_BYTES_MAX = FRAME_BYTES_MAX + (64 << 10)  # a frame and its envelope
COALESCE_BYTES = 1 << 20  # frames in one message: more would delay the first of them
SEND_BUFFER_BYTES = 64 << 20  # a peer that is so far behind is better off with a new connection
HELLO_BYTES_MAX = 64 << 10
ID_LENGTH_MAX = 255
CLOSE_SECONDS = 0.5  # for calls that are served to end by themselves
OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),  # a second process must not share the port silently
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, without the backoff of the last one
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),  # a large message does not wait for window updates
    # What a dead machine leaves of a connection goes after some seconds; that it is dead was noticed before.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
"""For channels between peers and for the server of their port."""

_Shape = type[ExchangeRequest] | type[ExchangeResponse]  # of what a peer sends
_CLOSED = "it closed the connection"
_SERVICE = peer_service_pb2.DESCRIPTOR.services_by_name["PeerService"].full_name
_FAILURES = (grpc.aio.AioRpcError, grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Timing:
    """How soon a connection is taken for dead, and made again; in seconds."""

    heartbeat: float = 0.25
    """Longest pause between two messages."""
    silence: float = 1.25
    """A peer that says nothing for so long is gone: several heartbeats, and as long as an election takes."""
    handshake: float = 1.5
    reconnect_min: float = 0.02
    reconnect_max: float = 0.5


@dataclass(frozen=True, slots=True)
class _Hello:
    """A PeerHello without protobuf."""

    node_id: str
    incarnation: str
    formed: bool
    founders: Mapping[str, str] = field(default_factory=dict)


class _Connection:
    """One epoch with one peer: what waits to be sent, and when something was last heard."""

    def __init__(self, peer: str, incarnation: str, epoch: int, encode: Callable[[list[bytes]], bytes],
                 loop: asyncio.AbstractEventLoop) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.epoch = epoch
        self.encode = encode
        self.ended: asyncio.Future[str] = loop.create_future()  # with the reason
        self.broken = False  # takes nothing more, and ends soon
        self.buffered = 0  # bytes that gRPC has not taken yet
        self.now = loop.time
        self.heard_at = self.said_at = self.beat_at = self.now()
        self.timer: asyncio.TimerHandle | None = None
        self._frames: list[bytes] = []
        self._beat = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, frame: bytes) -> None:
        """A frame to be sent."""
        self._frames.append(frame)
        self.buffered += len(frame)
        self._wake()

    def beat(self) -> None:
        """An empty message is to be sent, unless there is more to say by then."""
        self._beat = True
        self._wake()

    def drop(self) -> None:
        """Forgets what waits; `write` returns as soon as gRPC has taken what it was given."""
        self.broken = True
        self._frames = []
        self._wake()

    async def write(self, write: Callable[[bytes], Awaitable[None]], opening: bytes) -> None:
        """Sends the opening, if any, and then whatever waits, whenever something does."""
        if opening:
            await write(opening)
        while not self.broken:
            if not self._frames and not self._beat:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
                continue
            self._beat = False
            frames, size = self._take()
            self.said_at = self.now()
            await write(self.encode(frames))
            self.buffered -= size

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _take(self) -> tuple[list[bytes], int]:
        frames, size = self._frames, self.buffered
        if size <= COALESCE_BYTES:
            self._frames = []
            return frames, size
        count = size = 0
        for frame in frames:
            if count and size + len(frame) > COALESCE_BYTES:
                break
            size += len(frame)
            count += 1
        self._frames = frames[count:]
        return frames[:count], size


class GrpcTransport:
    """A PeerTransport. Give it the server of the peers' port before that starts; see `add_to_server`."""

    def __init__(self, cluster: str, node_id: str, peers: Mapping[str, str], hello: Callable[[], PeerHello],
                 export: Callable[[int, str], AsyncIterator[bytes]], *, credentials: grpc.ChannelCredentials | None = None,
                 timing: Timing | None = None, send_buffer_bytes: int = SEND_BUFFER_BYTES,
                 chance: Callable[[], float] = random.random) -> None:
        """`peers` are the other members: node id -> host:port, read anew for each connection. `hello()` is what peers are
        told of this node's store; `export(group, peer)` gives the chunks of a snapshot, each at most 256 KiB. Without
        `credentials` channels are not encrypted. `chance` draws the jitter of reconnects from [0, 1)."""
        self._cluster = cluster
        self._node_id = node_id
        self._peers = peers
        self._hello = hello
        self._export = export
        self._credentials = credentials
        self._timing = timing or Timing()
        self._send_buffer_bytes = send_buffer_bytes
        self._chance = chance
        self._handlers: Handlers | None = None
        self._connections: dict[str, _Connection] = {}
        self._epoch = 0
        self._dialers: set[asyncio.Task[Any]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()  # calls that are served
        self._said: dict[str, str] = {}  # peer -> what was last logged of it: once is enough
        self._closed = False

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Serves the other nodes, beside whatever else the server offers. The server should have OPTIONS."""
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {
            "Exchange": grpc.stream_stream_rpc_method_handler(self._serve_exchange),
            "FetchSnapshot": grpc.unary_stream_rpc_method_handler(self._serve_snapshot)}),))

    def start(self, handlers: Handlers) -> None:
        """See PeerTransport."""
        assert self._handlers is None, "a transport starts once"
        self._handlers = handlers
        for peer in self._peers:
            if self._node_id < peer:
                self._dialers.add(asyncio.get_running_loop().create_task(self._dial(peer)))

    def send(self, peer: str, epoch: int, frame: bytes) -> None:
        """See PeerTransport."""
        assert len(frame) <= FRAME_BYTES_MAX, f"a frame of {len(frame)} bytes; at most {FRAME_BYTES_MAX} are taken"
        connection = self._connections.get(peer)
        if connection is None or connection.epoch != epoch or connection.broken:
            return
        connection.put(frame)
        if connection.buffered > self._send_buffer_bytes:
            connection.drop()
            why = f"more than {self._send_buffer_bytes >> 20} MiB wait for it"
            asyncio.get_running_loop().call_soon(self._end, connection, why)

    async def fetch_snapshot(self, peer: str, group: int) -> AsyncIterator[bytes]:
        """See PeerTransport. It has a channel of its own, so that frames don't queue behind it, and needs a connection,
        whose end it notices as the connection does."""
        connection = self._connections.get(peer)
        if connection is None:
            raise SnapshotInvalid(f"node {peer} is not connected")
        request = FetchSnapshotRequest(group=group, cluster=self._cluster, protocol=PROTOCOL, node_id=self._node_id)
        channel = self._channel(peer)
        read: asyncio.Task[Any] | None = None
        try:
            fetch: Any = channel.unary_stream(f"/{_SERVICE}/FetchSnapshot")
            call = fetch(request.SerializeToString())
            while True:
                read = asyncio.get_running_loop().create_task(call.read())
                await asyncio.wait((read, connection.ended), return_when=asyncio.FIRST_COMPLETED)
                if connection.ended.done() or read.cancelled():
                    raise SnapshotInvalid(f"the connection to node {peer} broke")
                data = read.result()
                if data is grpc.aio.EOF:
                    return
                yield FetchSnapshotResponse.FromString(data).chunk
        except grpc.aio.AioRpcError as error:
            raise SnapshotInvalid(f"node {peer}: {error.details() or error.code().name}") from None
        except DecodeError:
            raise SnapshotInvalid(f"node {peer} sent a message of unknown shape") from None
        finally:
            if read is not None:
                read.cancel()
            await channel.close()

    async def close(self) -> None:
        """See PeerTransport. Handlers are not called any more."""
        self._closed = True
        for connection in list(self._connections.values()):
            self._end(connection, "the node is stopping")
        for task in self._dialers:
            task.cancel()
        tasks = self._tasks | self._dialers
        if tasks:
            _, tasks = await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def __repr__(self) -> str:
        epochs = {peer: connection.epoch for peer, connection in sorted(self._connections.items())}
        return f"<gRPC transport of {self._node_id}: {len(epochs)} of {len(self._peers)} peers connected, epochs {epochs}>"

    # -- connections ---------------------------------------------------------------------------------------------

    async def _dial(self, peer: str) -> None:
        """Keeps a connection to a peer."""
        timing, now = self._timing, asyncio.get_running_loop().time
        wait = timing.reconnect_min
        while True:
            begun = now()
            try:
                await self._call(peer)
            except PeerRefused as error:
                self._say(peer, logging.ERROR, "refused: %s", error)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    self._say(peer, logging.ERROR, "refused by node %s: %s", peer, error.details())
            except WireInvalid as error:
                self._say(peer, logging.ERROR, "node %s: %s", peer, error)
            except _FAILURES:
                pass
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # The peer cancelled the call, which gRPC reports in the same way.
            if now() - begun > timing.silence:
                wait = timing.reconnect_min
            await asyncio.sleep(wait * (1 + self._chance()) / 2)
            wait = min(2 * wait, timing.reconnect_max)

    async def _call(self, peer: str) -> None:
        """One connection to a peer, from here, until it ends. Raises PeerRefused and gRPC's errors."""
        channel = self._channel(peer)
        try:
            call: Any = channel.stream_stream(f"/{_SERVICE}/Exchange")()
            async with asyncio.timeout(self._timing.handshake):
                await call.write(ExchangeRequest(hello=self._own_hello()).SerializeToString())
                first = await call.read()
            if first is not grpc.aio.EOF:
                hello = self._check(first, ExchangeResponse, peer)
                await self._run(self._begin(hello, _encode_request), call.read, call.write, ExchangeResponse, b"")
        finally:
            await channel.close()

    async def _serve_exchange(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """One connection from a peer, until it ends."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._handlers is None or self._closed:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the node is starting or stopping")
            async with asyncio.timeout(self._timing.handshake):
                first: Any = await context.read()
            if first is grpc.aio.EOF:
                return
            connection = self._begin(self._check(first, ExchangeRequest, None), _encode_response)
            await self._run(connection, context.read, context.write, ExchangeRequest,
                            ExchangeResponse(hello=self._own_hello()).SerializeToString())
            await context.abort(grpc.StatusCode.ABORTED, connection.ended.result())
        except (PeerRefused, WireInvalid) as error:
            self._say(context.peer(), logging.ERROR, "refused: %s", error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except _FAILURES:
            pass
        finally:
            self._tasks.discard(task)

    def _own_hello(self) -> Hello:
        hello = self._hello()
        return Hello(protocol=PROTOCOL, cluster=self._cluster, node_id=self._node_id, incarnation=hello.incarnation,
                     formed=hello.formed, founders=hello.founders)

    def _check(self, data: bytes, shape: _Shape, peer: str | None) -> _Hello:
        """Who the peer is; `peer` is who was called, None for a caller. Raises PeerRefused or WireInvalid."""
        if len(data) > HELLO_BYTES_MAX:
            raise WireInvalid(f"a hello of {len(data)} bytes; at most {HELLO_BYTES_MAX} are taken")
        first = _parse(data, shape)
        if not first.HasField("hello"):
            raise WireInvalid("the first message is no hello")
        hello = first.hello
        node_id = hello.node_id
        if hello.protocol != PROTOCOL:
            raise PeerRefused(f"node {node_id!r} speaks peer protocol {hello.protocol}, node {self._node_id!r} speaks "
                              f"{PROTOCOL}: run releases that have one in common")
        if hello.cluster != self._cluster:
            raise PeerRefused(f"node {node_id!r} is of cluster {hello.cluster!r}, node {self._node_id!r} of "
                              f"{self._cluster!r}: check the addresses of the members")
        if node_id == self._node_id:
            raise PeerRefused(f"another node has the id {node_id!r}, too: give each node its own")
        if peer is not None and node_id != peer:
            raise PeerRefused(f"node {node_id!r} answers at the address of node {peer!r}: check the addresses")
        if node_id not in self._peers:
            raise PeerRefused(f"node {node_id[:ID_LENGTH_MAX]!r} is no member of the cluster for node {self._node_id!r}")
        if peer is None and node_id > self._node_id:
            raise PeerRefused(f"node {node_id!r} called node {self._node_id!r}: the lower id calls")
        if not 0 < len(hello.incarnation) <= ID_LENGTH_MAX:
            raise PeerRefused(f"node {node_id!r} names no incarnation of its store")
        present = self._connections.get(node_id)
        if present is not None and present.incarnation != hello.incarnation:
            raise PeerRefused(f"node {node_id!r} is connected with another store: two nodes have that id, or the other one "
                              "has only just gone")
        return _Hello(node_id, hello.incarnation, hello.formed, dict(hello.founders))

    def _begin(self, hello: _Hello, encode: Callable[[list[bytes]], bytes]) -> _Connection:
        """A new epoch."""
        peer = hello.node_id
        present = self._connections.get(peer)
        if present is not None:
            self._end(present, "it connected anew")
        self._epoch += 1
        loop = asyncio.get_running_loop()
        connection = _Connection(peer, hello.incarnation, self._epoch, encode, loop)
        self._connections[peer] = connection
        connection.timer = loop.call_later(self._timing.heartbeat, self._beat, connection)
        self._said.pop(peer, None)
        log.info("connected to node %s, epoch %d", peer, connection.epoch)
        assert self._handlers is not None
        self._handlers.connected(peer, connection.epoch, hello)
        return connection

    def _end(self, connection: _Connection, why: str) -> None:
        """The end of an epoch; what is under way is lost."""
        if connection.ended.done():
            return
        connection.ended.set_result(why)
        connection.drop()
        if connection.timer is not None:
            connection.timer.cancel()
        del self._connections[connection.peer]
        if not self._closed:
            log.info("lost node %s, epoch %d: %s", connection.peer, connection.epoch, why)
            assert self._handlers is not None
            self._handlers.disconnected(connection.peer, connection.epoch)

    async def _run(self, connection: _Connection, read: Callable[[], Awaitable[Any]],
                   write: Callable[[bytes], Awaitable[None]],
                   shape: _Shape, opening: bytes) -> None:
        """Moves frames until the connection ends.

        A write of a server is never cancelled: gRPC could not end the call any more, and the caller would not hear of it
        (seen with 1.85.1). So this returns when gRPC has taken the last message or has found the connection dead."""
        loop = asyncio.get_running_loop()
        reader, writer = (loop.create_task(self._guard(connection, work)) for work in (
            self._read(connection, read, shape), connection.write(write, opening)))
        try:
            await asyncio.shield(connection.ended)
            reader.cancel()
            await asyncio.wait((reader, writer), timeout=None if opening else 0)  # only a server has an opening
        finally:
            self._end(connection, _CLOSED)
            reader.cancel()
            writer.cancel()
            await asyncio.wait((reader, writer))

    async def _guard(self, connection: _Connection, work: Awaitable[None]) -> None:
        """Ends the connection when its reader or writer ends."""
        why = _CLOSED
        try:
            await work
        except WireInvalid as error:
            why = str(error)
            log.warning("node %s, epoch %d: %s", connection.peer, connection.epoch, error)
        except _FAILURES as error:
            why = (error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)) or why
        except Exception:
            why = "a bug in this node"
            log.exception("node %s, epoch %d", connection.peer, connection.epoch)
        finally:
            self._end(connection, why)

    async def _read(self, connection: _Connection, read: Callable[[], Awaitable[Any]],
                    shape: _Shape) -> None:
        assert self._handlers is not None
        frame, peer, epoch, ended, now = (
            self._handlers.frame, connection.peer, connection.epoch, connection.ended.done, connection.now)
        while (data := await read()) is not grpc.aio.EOF:
            connection.heard_at = now()
            if data:
                message = _parse(data, shape)
                if message.HasField("hello"):
                    raise WireInvalid("a second hello")
                for one in message.frames:
                    if ended():
                        return
                    frame(peer, epoch, one)

    def _beat(self, connection: _Connection) -> None:
        """Says something if nothing was said for a while; ends the connection if nothing was heard for long."""
        now, timing = connection.now(), self._timing
        if now - connection.beat_at > 2 * timing.heartbeat:
            connection.heard_at = now  # our own loop stood still: what the peer said is not read yet
        connection.beat_at = now
        if now - connection.heard_at > timing.silence:
            self._end(connection, f"silent for {now - connection.heard_at:.1f} s")
            return
        if now - connection.said_at >= timing.heartbeat / 2:
            connection.beat()
        connection.timer = asyncio.get_running_loop().call_later(timing.heartbeat, self._beat, connection)

    def _channel(self, peer: str) -> grpc.aio.Channel:
        address = self._peers[peer]
        if self._credentials is not None:
            return grpc.aio.secure_channel(address, self._credentials, options=OPTIONS)
        return grpc.aio.insecure_channel(address, options=OPTIONS)

    def _say(self, about: str, level: int, text: str, *values: object) -> None:
        """Logs, unless it is what was said last."""
        said = text % values
        if self._said.get(about) != said:
            if len(self._said) > 1000:  # callers choose their addresses
                self._said.clear()
            self._said[about] = said
            log.log(level, said)

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def _serve_snapshot(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            request = FetchSnapshotRequest.FromString(data)
            if request.protocol != PROTOCOL or request.cluster != self._cluster or request.node_id not in self._peers:
                raise PeerRefused(f"node {request.node_id[:ID_LENGTH_MAX]!r} of cluster "
                                  f"{request.cluster[:ID_LENGTH_MAX]!r} with peer protocol {request.protocol} may not fetch "
                                  f"from node {self._node_id!r} of cluster {self._cluster!r} with protocol {PROTOCOL}")
            async for chunk in self._export(request.group, request.node_id):
                yield FetchSnapshotResponse(chunk=chunk).SerializeToString()
        except ClusterError as error:
            log.warning("a snapshot of group %d for node %s: %s", request.group, request.node_id[:ID_LENGTH_MAX], error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a request of unknown shape")
        finally:
            self._tasks.discard(task)


def _encode_request(frames: list[bytes]) -> bytes:
    return ExchangeRequest(frames=frames).SerializeToString() if frames else b""


def _encode_response(frames: list[bytes]) -> bytes:
    return ExchangeResponse(frames=frames).SerializeToString() if frames else b""


def _parse(data: bytes, shape: _Shape) -> ExchangeRequest | ExchangeResponse:
    try:
        return shape.FromString(data)
    except DecodeError:
        raise WireInvalid(f"a message of {len(data)} bytes does not parse") from None
