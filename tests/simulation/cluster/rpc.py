"""gRPC between simulated processes: what the product uses of grpc.aio, with delays, resets and silence from the seed.

A link joins a client to a server and carries all their calls. Messages of one direction keep their order; a link that breaks
ends its calls: UNAVAILABLE for the client, cancellation for the server. A reader that does not read stops the writer after a
few messages, as gRPC's flow control does.
"""
from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc

from tests.simulation.cluster.loop import PROCESS, Process, SimLoop

WINDOW = 16  # messages that are sent and not read
CONNECT_SECONDS = 1.0  # until it is known that nothing answers
EOF = grpc.aio.EOF


class Aborted(Exception):
    """A handler ended its call with a status."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        super().__init__(code, details)
        self.code, self.details, self.trailing = code, details, trailing


class Network:
    """All links. Names are those of nodes and clients."""

    def __init__(self, loop: SimLoop, delay: Callable[[str, str], float]) -> None:
        self.loop = loop
        self.delay = delay
        self.servers: dict[str, Server] = {}  # by address
        self.links: dict[tuple[str, str], Link] = {}  # (client, address)
        self.blocked: set[tuple[str, str]] = set()  # (client, server's name): no link comes about
        self.hanging: set[str] = set()
        """Names of servers that hang: what is connected stays so, and nothing new comes about."""
        self.bugs: list[str] = []
        """Exceptions that handlers let out."""

    def channel(self, address: str, options: Any = None) -> Channel:
        """As grpc.aio.insecure_channel, for the process that runs."""
        process = PROCESS.get()
        assert process is not None
        return Channel(self, process, address)

    def module(self) -> Any:
        """In place of the module grpc in modules that make channels."""
        aio = SimpleNamespace(insecure_channel=self.channel, AioRpcError=grpc.aio.AioRpcError, UsageError=grpc.aio.UsageError,
                              EOF=EOF)
        return SimpleNamespace(aio=aio, StatusCode=grpc.StatusCode)

    def link(self, client: Process, address: str) -> Link | None:
        """The present link, or a new one; None if the server cannot be reached."""
        link = self.links.get((client.name, address))
        if link is not None and link.client is client:
            return link
        server = self.servers.get(address)
        if server is None or not server.process.alive or server.process.name in self.hanging or (
                (client.name, server.process.name) in self.blocked):
            return None
        link = self.links[client.name, address] = Link(self, client, server)
        return link

    def between(self, a: str, b: str) -> list[Link]:
        """Links of two processes, in both directions."""
        return [link for link in list(self.links.values()) if {link.client.name, link.server.process.name} == {a, b}]

    def block(self, a: str, b: str) -> None:
        """Breaks all links of two processes, and lets none come about."""
        self.blocked |= {(a, b), (b, a)}
        for link in self.between(a, b):
            link.reset()

    def unblock(self, a: str, b: str) -> None:
        """Undoes `block`."""
        self.blocked -= {(a, b), (b, a)}

    def died(self, process: Process) -> None:
        """A process is gone: its links break."""
        for link in list(self.links.values()):
            if process in (link.client, link.server.process):
                link.reset()


class Link:
    """What joins one client to one server."""

    def __init__(self, network: Network, client: Process, server: Server) -> None:
        self.network = network
        self.client = client
        self.server = server
        self.up = True
        self.lost: set[str] = set()  # names of senders whose messages vanish
        self.calls: dict[Call, None] = {}
        self._arrives: dict[bool, float] = {True: 0.0, False: 0.0}

    def send(self, to_server: bool, arrive: Callable[[], None]) -> None:
        """Something is on its way, and does `arrive` there."""
        here, there = (self.client, self.server.process) if to_server else (self.server.process, self.client)
        if not self.up or here.name in self.lost:
            return
        loop = self.network.loop
        when = max(self._arrives[to_server], loop.now + self.network.delay(here.name, there.name))
        self._arrives[to_server] = when

        def deliver() -> None:
            if self.up and here.name not in self.lost:
                arrive()
        loop.call_at(when, deliver, context=there.context)

    def reset(self) -> None:
        """The link breaks; both sides are told."""
        if not self.up:
            return
        self.up = False
        self.network.links.pop((self.client.name, self.server.address), None)
        for call in list(self.calls):
            call.broken()
        self.calls.clear()


class _Direction:
    """Messages of a call on their way to one side."""

    __slots__ = ("inbox", "news", "room", "under_way")

    def __init__(self) -> None:
        self.inbox: deque[Any] = deque()
        self.news = asyncio.Event()
        self.room = asyncio.Event()
        self.under_way = 0

    def arrive(self, item: Any) -> None:
        """A message, or EOF."""
        self.inbox.append(item)
        self.news.set()

    async def wait_room(self) -> None:
        """Until another message may be sent."""
        while self.under_way >= WINDOW:
            self.room.clear()
            await self.room.wait()
        self.under_way += 1

    async def take(self) -> Any:
        """The next message; EOF stays."""
        while not self.inbox:
            self.news.clear()
            await self.news.wait()
        item = self.inbox[0]
        if item is not EOF:
            self.inbox.popleft()
            self.under_way -= 1
            self.room.set()
        return item


class Call:
    """One call. The client's methods are those of grpc.aio's stream calls."""

    def __init__(self, channel: Channel, method: str, request: Any, metadata: Any, timeout: float | None,
                 serialize: Any, deserialize: Any) -> None:
        self.channel = channel
        self.method = method
        self.metadata = tuple(metadata or ())
        self._serialize, self._deserialize = serialize, deserialize
        network = channel.network
        self._requests, self._answers = _Direction(), _Direction()
        self._status: tuple[grpc.StatusCode, str, Any] | None = None
        self._handler: asyncio.Task[Any] | None = None
        self._over = False  # the server has ended it
        self._cancelled = False  # by this side
        self._timer: Any = None
        self.link = network.link(channel.process, channel.address)
        if self.link is None:
            server = network.servers.get(channel.address)
            refused = server is None or not server.process.alive
            network.loop.call_later(0.002 if refused else CONNECT_SECONDS, self._end, grpc.StatusCode.UNAVAILABLE,
                                    "connection refused" if refused else "connect timed out")
        else:
            self.link.calls[self] = None
            self.link.send(True, self._begin)
            if request is not None:
                self._send_request(request)
                self._send_request(EOF)
        if timeout is not None:
            self._timer = network.loop.call_later(timeout, self._late)

    # -- the client's side ---------------------------------------------------------------------------------------

    def _send_request(self, item: Any) -> None:
        if item is not EOF:
            item = self._serialize(item) if self._serialize else item
        if self.link is not None:
            self.link.send(True, lambda: self._requests.arrive(item))

    async def write(self, request: Any) -> None:
        """As grpc.aio; raises if the call is over."""
        self._check()
        if self._requests.under_way >= WINDOW:
            waiter = asyncio.ensure_future(self._requests.wait_room())
            ended = asyncio.ensure_future(self._answered())
            await asyncio.wait((waiter, ended), return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            ended.cancel()
            self._check()
        else:
            self._requests.under_way += 1
        self._send_request(request)

    async def _answered(self) -> None:
        while self._status is None:
            self._answers.news.clear()
            await self._answers.news.wait()

    def _check(self) -> None:
        if self._status is not None:
            self._raise()

    def _raise(self) -> None:
        assert self._status is not None
        if self._cancelled:
            raise asyncio.CancelledError
        code, details, trailing = self._status
        if code is grpc.StatusCode.OK:
            raise asyncio.InvalidStateError("the call is over")
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing or grpc.aio.Metadata(), details=details)

    async def done_writing(self) -> None:
        """As grpc.aio."""
        self._send_request(EOF)

    async def read(self) -> Any:
        """As grpc.aio: the next answer, EOF at the end; raises if it failed."""
        while not self._answers.inbox:
            if self._status is not None:
                if self._status[0] is not grpc.StatusCode.OK:
                    self._raise()
                return EOF
            self._answers.news.clear()
            await self._answers.news.wait()
        data = self._answers.inbox.popleft()
        self._answers.under_way -= 1
        self._answers.room.set()
        return self._deserialize(data) if self._deserialize else data

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        answer = await self.read()
        if answer is EOF:
            raise StopAsyncIteration
        return answer

    def __await__(self) -> Any:
        return self._unary().__await__()

    async def _unary(self) -> Any:
        try:
            answer = await self.read()
        except asyncio.CancelledError:
            self.cancel()
            raise
        assert answer is not EOF, f"{self.method} gave no answer"
        return answer

    def cancel(self) -> bool:
        """As grpc.aio."""
        if self._status is not None:
            return False
        if self.channel.process.alive:
            self._cancelled = True
            if self.link is not None:
                self.link.send(True, self._cancel_handler)
            self._end(grpc.StatusCode.CANCELLED, "cancelled by the client")
        return True

    async def trailing_metadata(self) -> Any:
        """As grpc.aio."""
        await self._answered()
        assert self._status is not None
        return self._status[2] or grpc.aio.Metadata()

    def cancelled(self) -> bool:
        """As grpc.aio."""
        return self._status is not None and self._status[0] is grpc.StatusCode.CANCELLED

    def _late(self) -> None:
        if self._status is None:
            if self.link is not None:
                self.link.send(True, self._cancel_handler)
            self._end(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded")

    def _end(self, code: grpc.StatusCode, details: str, trailing: Any = None) -> None:
        if self._status is None:
            self._status = (code, details, trailing)
            if code is not grpc.StatusCode.OK:
                self._answers.inbox.clear()
            self._answers.news.set()
            self._requests.room.set()
            self._forget()
            if self._timer is not None:
                self._timer.cancel()

    # -- the server's side ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        assert self.link is not None
        server = self.link.server
        handler = server.handler(self.method, self.metadata)
        if handler is None:
            self._finish(grpc.StatusCode.UNIMPLEMENTED, f"there is no {self.method}")
            return
        self._handler = server.network.loop.spawn(server.process, self._serve(handler))
        self.link.calls[self] = None

    async def _serve(self, handler: Any) -> None:
        context = ServerContext(self)
        parse = handler.request_deserializer or (lambda data: data)
        serialize = handler.response_serializer or (lambda answer: answer)
        try:
            first: Any
            if handler.request_streaming:
                first = _Requests(self._requests, parse)
            else:
                data = await self._requests.take()
                first = parse(data)
            method = (handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary)
            made = method(first, context)
            if hasattr(made, "__aiter__"):
                async for answer in made:
                    await context.write(serialize(answer))
            else:
                answer = await made
                if not handler.response_streaming:
                    await context.write(serialize(answer))
            self._finish(grpc.StatusCode.OK, "", context.trailing)
        except Aborted as status:
            self._finish(status.code, status.details, status.trailing)
        except asyncio.CancelledError:
            self._finish(grpc.StatusCode.CANCELLED, "cancelled")
        except Exception as error:
            assert self.link is not None
            if not self.link.server.process.alive:
                return  # it ended because of this
            self.link.network.bugs.append(f"{self.method} on {self.link.server.process.name}: {type(error).__name__}: {error}")
            self._finish(grpc.StatusCode.UNKNOWN, str(error))

    async def answer(self, data: bytes) -> None:
        """From the handler's context."""
        await self._answers.wait_room()
        assert self.link is not None
        self.link.send(False, lambda: self._answers.arrive(data) if self._status is None else None)
        await asyncio.sleep(0)

    def _forget(self) -> None:
        """Its link need not tell that it broke, once both sides are done. The server may not be when the client is: what it was sent last
        can be lost with the link."""
        if self.link is not None and self._status is not None and (self._over or self._handler is None):
            self.link.calls.pop(self, None)

    def _finish(self, code: grpc.StatusCode, details: str, trailing: Any = None) -> None:
        self._over = True
        self._forget()
        assert self.link is not None
        self.link.send(False, lambda: self._end(code, details, trailing))

    def _cancel_handler(self) -> None:
        if self._handler is not None and not self._over:
            self._handler.cancel()

    def broken(self) -> None:
        """The link broke: both sides hear of it."""
        assert self.link is not None
        loop = self.link.network.loop
        loop.call_soon(self._end, grpc.StatusCode.UNAVAILABLE, "connection reset", context=self.channel.process.context)
        loop.call_soon(self._cancel_handler, context=self.link.server.process.context)


class _Requests:
    """What a handler reads."""

    def __init__(self, direction: _Direction, parse: Any) -> None:
        self._direction = direction
        self._parse = parse

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        item = await self._direction.take()
        if item is EOF:
            raise StopAsyncIteration
        return self._parse(item)


class ServerContext:
    """What a handler has of its call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.trailing: Any = None

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """As grpc.aio."""
        self.trailing = grpc.aio.Metadata(*trailing_metadata)

    async def write(self, data: bytes) -> None:
        """As grpc.aio."""
        await self._call.answer(data)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        """As grpc.aio."""
        raise Aborted(code, details, grpc.aio.Metadata(*trailing_metadata))

    def invocation_metadata(self) -> Any:
        """As grpc.aio."""
        return self._call.metadata

    def peer(self) -> str:
        """Who calls."""
        return f"sim:{self._call.channel.process.name}"


class Channel:
    """As grpc.aio.Channel."""

    def __init__(self, network: Network, process: Process, address: str) -> None:
        self.network = network
        self.process = process
        self.address = address

    def _callable(self, method: str, request_serializer: Any = None, response_deserializer: Any = None,
                  _registered_method: bool = False) -> Any:
        def streaming(metadata: Any = None, timeout: float | None = None) -> Call:
            return Call(self, method, None, metadata, timeout, request_serializer, response_deserializer)
        return streaming

    stream_stream = stream_unary = _callable

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None,
                    _registered_method: bool = False) -> Any:
        """As grpc.aio."""
        def unary(request: Any, timeout: float | None = None, metadata: Any = None, wait_for_ready: bool = False) -> Call:
            return Call(self, method, request, metadata, timeout, request_serializer, response_deserializer)
        return unary

    unary_stream = unary_unary

    def get_state(self) -> grpc.ChannelConnectivity:
        """As grpc.aio."""
        link = self.network.links.get((self.process.name, self.address))
        return grpc.ChannelConnectivity.READY if link is not None and link.client is self.process else grpc.ChannelConnectivity.CONNECTING

    async def close(self, grace: float | None = None) -> None:
        """As grpc.aio."""


class Server:
    """As grpc.aio.Server, at an address."""

    def __init__(self, network: Network, process: Process, address: str) -> None:
        self.network = network
        self.process = process
        self.address = address
        self._generic: list[Any] = []
        self._methods: dict[str, Any] = {}
        network.servers[address] = self

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """As grpc.aio."""
        self._generic += handlers

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """As grpc.aio."""
        self._methods.update({f"/{service}/{name}": handler for name, handler in handlers.items()})

    def handler(self, method: str, metadata: Any) -> Any:
        """The handler of a method, or None."""
        if method in self._methods:
            return self._methods[method]
        details = SimpleNamespace(method=method, invocation_metadata=metadata)
        for generic in self._generic:
            if (found := generic.service(details)) is not None:
                return found
        return None
