"""Nodes that are connected by some transport, for tests: what each is told is noted and checked."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Protocol

import grpc
from spillway.cluster.raft.formation import Hello
from spillway.cluster.transport.base import Handlers, PeerHello, PeerTransport
from spillway.cluster.transport.grpc import OPTIONS, GrpcTransport, Timing
from spillway.cluster.transport.memory import MemoryNetwork, MemoryTransport

PATIENCE_SECONDS = 10.0  # for what must happen; nothing waits so long unless it is broken
QUICK = Timing(heartbeat=0.02, silence=0.3, handshake=1.0, reconnect_min=0.001, reconnect_max=0.02)


class Node:
    """Notes what its transport tells it, and checks that the order of it is allowed."""

    def __init__(self, name: str, incarnation: str = "") -> None:
        self.name = name
        self.incarnation = incarnation or f"store of {name}"
        self.transport: PeerTransport
        self.up: dict[str, int] = {}
        self.hellos: dict[str, PeerHello] = {}
        self.last: dict[str, int] = {}
        self.frames: list[tuple[str, int, bytes]] = []
        self.on_frame: Callable[[str, bytes], None] = lambda peer, frame: None
        self.chunks: Callable[[int, str], AsyncIterator[bytes]] = _three
        self.quiet = False  # nothing may be told any more
        self.happened = asyncio.Event()

    def handlers(self) -> Handlers:
        return Handlers(self._connected, self._frame, self._disconnected)

    def hello(self) -> Hello:
        return Hello(self.name, self.incarnation, True, {self.name: "founder"})

    def export(self, group: int, peer: str) -> AsyncIterator[bytes]:
        return self.chunks(group, peer)

    def send(self, peer: str, frame: bytes) -> None:
        """On the present connection; there must be one."""
        self.transport.send(peer, self.up[peer], frame)

    def heard(self, peer: str, epoch: int = 0) -> list[bytes]:
        """Frames of a peer, of one epoch or of all."""
        return [frame for of, at, frame in self.frames if of == peer and epoch in (0, at)]

    async def until(self, reached: Callable[[], Any]) -> None:
        """Until something holds that changes with what the node is told."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not reached():
                self.happened.clear()
                await self.happened.wait()

    async def fetch(self, peer: str, group: int = 0) -> list[bytes]:
        return [chunk async for chunk in self.transport.fetch_snapshot(peer, group)]

    def _connected(self, peer: str, epoch: int, hello: PeerHello) -> None:
        assert not self.quiet
        assert peer not in self.up, "a new connection before the old one ended"
        assert epoch > self.last.get(peer, 0), "epochs grow"
        self.up[peer] = self.last[peer] = epoch
        self.hellos[peer] = hello
        self.happened.set()

    def _frame(self, peer: str, epoch: int, frame: bytes) -> None:
        assert not self.quiet
        assert self.up.get(peer) == epoch, "a frame outside of its connection"
        self.on_frame(peer, frame)
        self.frames.append((peer, epoch, frame))
        self.happened.set()

    def _disconnected(self, peer: str, epoch: int) -> None:
        assert not self.quiet
        assert self.up.pop(peer) == epoch
        self.happened.set()


async def _three(group: int, peer: str) -> AsyncIterator[bytes]:
    for number in range(3):
        yield b"%d %d for %s" % (group, number, peer.encode())


class Links(Protocol):
    """Makes and breaks connections between nodes."""

    async def add(self, node: Node) -> None:
        """Starts a node's transport; it connects to all others."""

    async def cut(self, a: str, b: str) -> None:
        """Breaks the connection of two nodes, with what is under way; they may connect anew."""

    async def heal(self, a: str, b: str) -> None:
        """Lets the nodes connect again, if the transport does not do so by itself."""

    async def close(self) -> None:
        """Stops everything."""


class MemoryLinks:
    """By function calls."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.network = MemoryNetwork(loop.call_later, loop.time)
        self.nodes: list[Node] = []

    async def add(self, node: Node) -> None:
        node.transport = MemoryTransport(self.network, node.name, node.hello, node.export)
        self.nodes.append(node)
        node.transport.start(node.handlers())

    async def cut(self, a: str, b: str) -> None:
        self.network.disconnect(a, b)

    async def heal(self, a: str, b: str) -> None:
        self.network.connect(a, b)

    async def close(self) -> None:
        for node in self.nodes:
            node.quiet = True
            await node.transport.close()


class Proxy:
    """A TCP hop in front of a node: can break connections, stop moving bytes, and refuse."""

    def __init__(self, port: int = 0) -> None:
        self.target = port
        self.port = 0
        self.moving = asyncio.Event()
        self.moving.set()
        self.refusing = False
        self._server: asyncio.Server
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Breaks every connection, with what is under way."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        self._server.close()
        self.refusing = True
        while self._tasks:
            self.moving.set()
            self.cut()
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        try:
            if not self.refusing:
                to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self.target)
                ends.append(to_writer)
                self._writers.update(ends)
                moves = [asyncio.ensure_future(self._move(*way)) for way in ((reader, to_writer), (to_reader, writer))]
                await asyncio.wait(moves, return_when=asyncio.FIRST_COMPLETED)
                for end in ends:
                    end.transport.abort()
                for move in moves:
                    move.cancel()
                await asyncio.wait(moves)
        except OSError:
            pass
        finally:
            for end in ends:
                end.transport.abort()
            self._writers.difference_update(ends)
            self._tasks.discard(task)

    async def _move(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await self.moving.wait()
                writer.write(data)
                await writer.drain()


class GrpcLinks:
    """Over real sockets, with a proxy in front of every node."""

    def __init__(self, timing: Timing = QUICK, **options: Any) -> None:
        self.timing = timing
        self.options = options
        self.addresses: dict[str, str] = {}
        self.ports: dict[str, int] = {}  # without the proxy
        self.proxies: dict[str, Proxy] = {}
        self.nodes: list[Node] = []
        self._servers: dict[str, grpc.aio.Server] = {}

    async def add(self, node: Node, cluster: str = "test", **options: Any) -> None:
        node.transport = transport = GrpcTransport(cluster, node.name, _Members(self.addresses, node.name), node.hello,
                                                   node.export, timing=self.timing, **self.options, **options)
        server = grpc.aio.server(options=OPTIONS)
        transport.add_to_server(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._servers[node.name] = server
        self.ports[node.name] = port
        proxy = self.proxies.get(node.name)
        if proxy is None:
            proxy = self.proxies[node.name] = Proxy()
            await proxy.start()
            self.addresses[node.name] = f"127.0.0.1:{proxy.port}"
        proxy.target = port
        self.nodes.append(node)
        transport.start(node.handlers())

    async def cut(self, a: str, b: str) -> None:
        self.proxies[max(a, b)].cut()

    async def heal(self, a: str, b: str) -> None:
        """The transport does so by itself."""

    async def remove(self, node: Node) -> None:
        """Stops a node as a process that exits."""
        node.quiet = True
        self.nodes.remove(node)
        await node.transport.close()
        await self._servers.pop(node.name).stop(None)

    async def close(self) -> None:
        for node in list(self.nodes):
            await self.remove(node)
        for proxy in self.proxies.values():
            await proxy.close()


class _Members(dict[str, str]):
    """All members' addresses, as they are now, but the own one."""

    def __init__(self, addresses: dict[str, str], own: str) -> None:
        super().__init__({name: "" for name in ("a", "b", "c") if name != own})
        self._addresses = addresses

    def __getitem__(self, name: str) -> str:
        return self._addresses.get(name, "127.0.0.1:1")
