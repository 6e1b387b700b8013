"""The dispatcher between a broker (a small model of one) and real HTTP servers."""
from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import NamedTuple

import pytest
from aiohttp import ClientSession, hdrs, web
from aiohttp.test_utils import TestServer
from spillway.client.dispatcher.dispatcher import Counts, Dispatcher, matcher, state_of
from spillway.client.dispatcher.lane import RUN_MESSAGES_MAX
from spillway.client.dispatcher.sender import AddressForbidden
from spillway.client.dispatcher.source import Target
from spillway.client.dispatcher.status import status_server
from spillway.client.errors import StaleLease, Unavailable
from standardwebhooks import Webhook, WebhookVerificationError

QueueName = tuple[str, str, str]
WAIT_SECONDS_MAX = 20.0  # for what must happen; a test that reaches it fails


@dataclass
class Message:
    sequence: int
    payload: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    id: str = ""
    attempt: int = 1


class Gap(NamedTuple):
    count: int
    first_sequence: int
    last_sequence: int


class Queue:
    def __init__(self, name: QueueName) -> None:
        self.name = name
        self.messages: deque[Message] = deque()
        self.gap: Gap | None = None
        self.lease: Run | None = None


class Run:
    """A lease of the model; settles at once."""

    shard = 1

    def __init__(self, broker: FakeBroker, queue: Queue, token: int, count: int, seconds: float) -> None:
        self.broker = broker
        self.queue = queue
        self.fencing_token = token
        self.destination, self.tenant, self.key = queue.name
        self.messages = [replace(m) for m in list(queue.messages)[:count]]
        self.gap = queue.gap
        self.ended = False
        self.ends = asyncio.get_running_loop().time() + seconds

    def seconds_left(self) -> float:
        return self.ends - asyncio.get_running_loop().time()

    def _settle(self, *what: object) -> bool:
        self.broker.settlements.append((self.tenant, *what))
        self.broker.changed.set()
        return self.queue.lease is self and not self.ended

    def _outcome(self, error: Exception | None = None) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if error is None:
            future.set_result(None)
        else:
            self.ended = True
            future.set_exception(error)
            future.exception()  # not everybody waits for it
        return future

    def _end(self) -> asyncio.Future[None]:
        self.ended = True
        self.queue.lease = None
        self.broker.pump()
        return self._outcome()

    def ack(self, upto: int) -> asyncio.Future[None]:
        if not self._settle("ack", upto):
            return self._outcome(StaleLease("ack"))
        messages = self.queue.messages
        while messages and messages[0].sequence <= upto:
            messages.popleft()
            self.queue.gap = None
        return self._end() if upto == self.messages[-1].sequence else self._outcome()

    def retry(self, delay: float | None, reason: str) -> asyncio.Future[None]:
        if not self._settle("retry", delay, reason):
            return self._outcome(StaleLease("retry"))
        self.queue.messages[0].attempt += 1
        return self._end()

    def throttled(self, delay: float | None) -> asyncio.Future[None]:
        if not self._settle("throttled", delay):
            return self._outcome(StaleLease("throttled"))
        self.broker.parked.add((self.destination, self.tenant))
        return self._end()

    def down(self, delay: float | None) -> asyncio.Future[None]:
        if not self._settle("down", delay):
            return self._outcome(StaleLease("down"))
        self.broker.parked.add((self.destination, None))
        return self._end()

    def reject(self, reason: str) -> asyncio.Future[None]:
        if not self._settle("reject", reason):
            return self._outcome(StaleLease("reject"))
        dead = self.queue.messages.popleft()
        self.broker.dead.append(dead.sequence)
        self.queue.gap = Gap(1, dead.sequence, dead.sequence)
        return self._end()

    def release(self) -> asyncio.Future[None]:
        return self._end() if self._settle("release") else self._outcome(StaleLease("release"))

    def extend(self, seconds: float) -> asyncio.Future[None]:
        if self.queue.lease is not self or self.seconds_left() < 0:
            return self._outcome(StaleLease("extend"))
        self.broker.extended += 1
        self.ends = asyncio.get_running_loop().time() + seconds
        return self._outcome()


class Consumer:
    def __init__(self, credit: int, run_messages_max: int, lease_seconds: float) -> None:
        self.credit = credit
        self.run_messages_max = run_messages_max
        self.lease_seconds = lease_seconds
        self.out: asyncio.Queue[Run | Exception] = asyncio.Queue()


class FakeBroker:
    """Ordered queues, one lease each; parks until told otherwise; backoffs take no time."""

    def __init__(self, *targets: Target) -> None:
        self.known = list(targets)
        self.queues: dict[QueueName, Queue] = {}
        self.consumers: dict[str, Consumer] = {}
        self.settlements: list[tuple[object, ...]] = []
        self.parked: set[tuple[str, str | None]] = set()
        self.dead: list[int] = []
        self.extended = 0
        self.tokens = 0
        self.sequences = 0
        self.failing = False
        self.lease_seconds: float | None = None
        self.changed = asyncio.Event()

    def put(self, destination: str, *payloads: bytes, tenant: str = "t", key: str = "k",
            headers: dict[str, str] | None = None) -> None:
        name = (destination, tenant, key)
        queue = self.queues.setdefault(name, Queue(name))
        for payload in payloads:
            self.sequences += 1
            queue.messages.append(Message(self.sequences, payload, headers or {}))
        self.pump()

    def unpark(self) -> None:
        self.parked.clear()
        self.pump()

    def pump(self) -> None:
        self.changed.set()
        for queue in self.queues.values():
            destination, tenant, _ = queue.name
            consumer = self.consumers.get(destination)
            if queue.lease is not None or not queue.messages or consumer is None or (
                    (destination, None) in self.parked or (destination, tenant) in self.parked):
                continue
            self.tokens += 1
            run = queue.lease = Run(self, queue, self.tokens, consumer.run_messages_max,
                                    self.lease_seconds or consumer.lease_seconds)
            consumer.out.put_nowait(run)

    def expire(self, destination: str) -> None:
        """Takes all leases of a destination away and hands them out again."""
        for queue in self.queues.values():
            if queue.name[0] == destination and queue.lease is not None:
                queue.lease.ends = 0.0
                queue.lease = None
        self.pump()

    def left(self, destination: str) -> int:
        return sum(len(q.messages) for q in self.queues.values() if q.name[0] == destination)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def targets(self) -> list[Target]:
        if self.failing:
            raise Unavailable("no node answers")
        return list(self.known)

    @asynccontextmanager
    async def consume(self, destination: str, credit_messages: int, credit_bytes: int, run_messages_max: int,
                      lease_seconds: float) -> AsyncIterator[AsyncIterator[Run]]:
        consumer = Consumer(credit_messages, run_messages_max, lease_seconds)
        assert destination not in self.consumers, "a destination has one stream"
        self.consumers[destination] = consumer
        self.pump()

        async def runs() -> AsyncIterator[Run]:
            while True:
                run = await consumer.out.get()
                if isinstance(run, Exception):
                    raise run
                yield run

        try:
            yield runs()
        finally:
            del self.consumers[destination]
            while not consumer.out.empty():
                run = consumer.out.get_nowait()
                if isinstance(run, Run):
                    await run.release()


async def spin(condition: Callable[[], bool]) -> None:
    """For what has no event to wait for."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not condition():
            await asyncio.sleep(0)


class Request(NamedTuple):
    path: str
    body: bytes
    headers: dict[str, str]


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Receiver:
    """An HTTP server that notes what comes; answers per path: a status, headers, or a handler of its own."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.handlers: dict[str, Handler] = {}
        self.answers: dict[str, deque[web.Response]] = defaultdict(deque)
        self.running: dict[str, int] = defaultdict(int)
        self.running_max: dict[str, int] = defaultdict(int)
        self.connections: set[object] = set()
        self.came = asyncio.Event()
        self.unblocked = asyncio.Event()
        application = web.Application(client_max_size=4 << 20)
        application.router.add_post("/{path:.*}", self._handle)
        self.server = TestServer(application)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        queue = path + request.headers["Spillway-Tenant"] + request.headers["Spillway-Key"]
        self.connections.add(request.transport)
        for name in (path, queue):
            self.running[name] += 1
            self.running_max[name] = max(self.running_max[name], self.running[name])
        self.requests.append(Request(path, await request.read(), dict(request.headers)))
        self.came.set()
        try:
            if path in self.handlers:
                return await self.handlers[path](request)
            return self.answers[path].popleft() if self.answers[path] else web.Response()
        finally:
            for name in (path, queue):
                self.running[name] -= 1

    def bodies(self, path: str) -> list[bytes]:
        return [r.body for r in self.requests if r.path == path]

    def url(self, path: str) -> str:
        return str(self.server.make_url(path))

    async def hang(self, request: web.Request) -> web.StreamResponse:
        """Answers once `unblocked`."""
        await self.unblocked.wait()
        return web.Response()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not condition():
                self.came.clear()
                await self.came.wait()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    await receiver.server.start_server()
    yield receiver
    receiver.unblocked.set()
    await receiver.server.close()


@asynccontextmanager
async def dispatching(broker: FakeBroker, **options: object) -> AsyncIterator[Dispatcher]:
    options.setdefault("watch_seconds", 0.02)
    dispatcher = Dispatcher(broker, **options)  # type: ignore[arg-type]
    task = asyncio.create_task(dispatcher.run())
    try:
        yield dispatcher
    finally:
        dispatcher.stop()
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await task


def urls(dispatcher: Dispatcher) -> dict[str, str]:
    return {name: member.target.url for name, member in dispatcher._members.items()}


def local(name: str, url: str, timeout: float, concurrency_max: int) -> Target:
    return Target(name, url, timeout, concurrency_max, allow_private_addresses=True)


def target(receiver: Receiver, name: str, timeout: float = 5.0, concurrency_max: int = 4) -> Target:
    return local(name, receiver.url("/" + name), timeout, concurrency_max)


def numbers(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % i for i in range(start, start + count)]


async def test_in_order_and_one_at_a_time(receiver: Receiver) -> None:
    """All messages of every queue arrive, in order, never two of a queue at once; connections are used
    again."""
    broker = FakeBroker(target(receiver, "a"))
    for key in "uvwxyz":
        broker.put("a", *numbers(50), key=key)
    async with dispatching(broker) as dispatcher:
        await broker.until(lambda: not broker.left("a"))
        assert dispatcher.counts().delivered == 300
    for key in "uvwxyz":
        assert [r.body for r in receiver.requests if r.headers["Spillway-Key"] == key] == numbers(50)
        assert receiver.running_max["/at" + key] == 1
    assert receiver.running_max["/a"] <= 4
    assert len(receiver.connections) <= 4


async def test_request(receiver: Receiver) -> None:
    """A request carries payload, metadata and the message's headers, and nothing that aiohttp would add of its own."""
    broker = FakeBroker(target(receiver, "a"))
    broker.put("a", b'{"a":1}', tenant="Zoë & co", key="", headers={
        "Content-Type": "application/json", "X-Mine": "1", "Spillway-Attempt": "9", "X-Bad": "a\r\nX-Forged: 1",
        "Transfer-Encoding": "chunked", "Content-Length": "1"})
    broker.put("a", b"", tenant="empty")
    async with dispatching(broker):
        await broker.until(lambda: not broker.left("a"))
    first, second = sorted(receiver.requests, key=lambda r: -len(r.body))
    headers = first.headers
    assert first.body == b'{"a":1}'
    assert headers.pop("User-Agent").startswith("spillway/")
    assert headers.pop("Host") == f"127.0.0.1:{receiver.server.port}"
    assert headers.pop("Accept") == "*/*"
    assert headers == {
        "Content-Type": "application/json", "X-Mine": "1", "Content-Length": "7", "Spillway-Message-Id": "1-1",
        "Spillway-Sequence": "1", "Spillway-Shard": "1", "Spillway-Attempt": "1", "Spillway-Fencing-Token": "1",
        "Spillway-Destination": "a", "Spillway-Tenant": "Zo%C3%AB%20&%20co", "Spillway-Key": ""}
    assert second.body == b"" and second.headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(("answer", "settlement"), [
    (web.Response(status=500), ("retry", None, "HTTP 500")),
    (web.Response(status=503), ("retry", None, "HTTP 503")),
    (web.Response(status=503, headers={"Retry-After": "7"}), ("throttled", 7.0)),
    (web.Response(status=429), ("throttled", None)),
    (web.Response(status=429, headers={"Retry-After": "7"}), ("throttled", 7.0)),
    (web.Response(status=404), ("reject", "HTTP 404")),
    (web.Response(status=303, headers={"Location": "/elsewhere"}), ("reject", "HTTP 303")),
    (web.Response(status=302, headers={"Location": "/elsewhere"}), ("down", None)),
    (web.Response(status=308, headers={"Location": "/elsewhere"}), ("down", None)),
], ids=str)
async def test_partial_run(receiver: Receiver, answer: web.Response, settlement: tuple[object, ...]) -> None:
    """The delivered prefix is acknowledged, the failing message settled with its outcome, the rest goes back
    untouched and is delivered in order later."""
    broker = FakeBroker(target(receiver, "a"))
    receiver.answers["/a"] += [web.Response(), web.Response(status=201), answer]
    broker.put("a", *numbers(5))
    async with dispatching(broker):
        await broker.until(lambda: len(broker.settlements) >= 2)
        assert broker.settlements[:2] == [("t", "ack", 2), ("t", *settlement)]
        broker.unpark()
        await broker.until(lambda: not broker.left("a"))
    again = [] if settlement[0] == "reject" else [b"2"]
    assert receiver.bodies("/a") == [b"0", b"1", b"2", *again, b"3", b"4"]
    attempts = [int(r.headers["Spillway-Attempt"]) for r in receiver.requests]
    assert attempts == [1, 1, 1, *([2] if settlement[0] == "retry" else [1] * len(again)), 1, 1]
    if settlement[0] == "reject":
        assert broker.dead == [3]
        assert [r.headers.get("Spillway-Gap") for r in receiver.requests] == [
            None, None, None, "count=1, first=3, last=3", None]


async def test_refused_connection_parks(receiver: Receiver) -> None:
    """Nobody listens: the destination is down, and goes on as soon as somebody does and its gate opens."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/x"
        broker = FakeBroker(local("a", url, 5.0, 4))
        broker.put("a", *numbers(3))
        async with dispatching(broker) as dispatcher:
            await broker.until(lambda: bool(broker.settlements))
            assert broker.settlements == [("t", "down", None)]
            assert broker.left("a") == 3
            broker.known = [target(receiver, "a")]
            await spin(lambda: urls(dispatcher).get("a") == receiver.url("/a"))
            broker.unpark()
            await broker.until(lambda: not broker.left("a"))
    assert receiver.bodies("/a") == numbers(3)


@pytest.mark.parametrize("url", ["http://host.invalid/", "https://127.0.0.1:{port}/", "http://2130706433/"])
async def test_no_connection(receiver: Receiver, url: str) -> None:
    """Unknown hosts, endpoints that speak no TLS and hosts that hide an address in a number are down, too."""
    broker = FakeBroker(local("a", url.format(port=receiver.server.port), 5.0, 4))
    broker.put("a", b"x")
    async with dispatching(broker):
        await broker.until(lambda: bool(broker.settlements))
    assert broker.settlements[0] == ("t", "down", None)


async def test_connect_timeout() -> None:
    """A host that does not answer at all is down, not merely slow."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = []
        for _ in range(4):  # the backlog takes one or two; the kernel ignores further attempts
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        broker = FakeBroker(local("a", f"http://127.0.0.1:{full.getsockname()[1]}/", 0.4, 4))
        broker.put("a", b"x")
        async with dispatching(broker):
            await broker.until(lambda: bool(broker.settlements))
        assert broker.settlements[0] == ("t", "down", None)
        for filler in fillers:
            filler.close()


async def test_address_check(receiver: Receiver) -> None:
    """A check sees every address before a connection is made to it, and can refuse it."""
    asked = []

    def refuse(address: str, port: int) -> None:
        asked.append((address, port))
        raise AddressForbidden("private")

    broker = FakeBroker(target(receiver, "a"), local("b", f"http://localhost:{receiver.server.port}/b", 5.0, 1))
    broker.put("a", b"x")
    broker.put("b", b"x")
    async with dispatching(broker, address_check=refuse):
        await broker.until(lambda: len(broker.settlements) >= 2)
    assert set(broker.settlements[:2]) == {("t", "down", None)}
    assert ("127.0.0.1", receiver.server.port) in asked and not receiver.requests


async def test_timeout(receiver: Receiver) -> None:
    """A receiver that takes too long may have the message or not: it is tried again."""
    receiver.handlers["/a"] = receiver.hang
    broker = FakeBroker(target(receiver, "a", timeout=0.2))
    broker.put("a", b"x")
    async with dispatching(broker):
        await broker.until(lambda: bool(broker.settlements))
        receiver.unblocked.set()
        await broker.until(lambda: not broker.left("a"))
    assert broker.settlements[0] == ("t", "retry", None, "timeout")


@pytest.mark.parametrize("answer", [
    b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
    b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
], ids=["closed", "garbage", "short", "long header", "bad chunk"])
async def test_broken_response(answer: bytes) -> None:
    """An answer that is none, or ends early, is no success: it is tried again."""
    served = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer if served == 1 else b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    broker = FakeBroker(local("a", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", 5.0, 1))
    broker.put("a", b"")
    async with dispatching(broker):
        await broker.until(lambda: not broker.left("a"))
    server.close()
    first, last = broker.settlements
    assert first[1] == "retry" and str(first[3]).startswith("broken response")
    assert last[1] == "ack"


async def test_endless_body(receiver: Receiver) -> None:
    """A success with an endless body is a success; the body is neither kept nor waited for."""

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65536)
        except ConnectionError:
            return response

    receiver.handlers["/a"] = endless
    broker = FakeBroker(target(receiver, "a"))
    broker.put("a", *numbers(2))
    async with dispatching(broker):
        await broker.until(lambda: not broker.left("a"))
    assert receiver.bodies("/a") == numbers(2)


async def test_cookies_and_redirects_leave_no_trace(receiver: Receiver) -> None:
    """What a receiver sets while it gets one tenant's message is not sent with the next one's."""
    response = web.Response()
    response.set_cookie("session", "secret")
    receiver.answers["/a"].append(response)
    broker = FakeBroker(target(receiver, "a", concurrency_max=1))
    broker.put("a", *numbers(2))
    async with dispatching(broker):
        await broker.until(lambda: not broker.left("a"))
    assert not any("Cookie" in r.headers for r in receiver.requests)


async def test_isolation(receiver: Receiver) -> None:
    """A destination that hangs and one that is dead hold their own slots only: a healthy one delivers everything
    meanwhile, and what the others hold is bounded."""
    receiver.handlers["/slow"] = receiver.hang
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        broker = FakeBroker(target(receiver, "slow", timeout=60.0, concurrency_max=2), target(receiver, "healthy"),
                            local("dead", f"http://127.0.0.1:{nobody.getsockname()[1]}/", 5.0, 4))
        for i in range(100):
            broker.put("slow", *numbers(2), key=str(i))
            broker.put("dead", *numbers(2), key=str(i))
        async with dispatching(broker):
            await receiver.until(lambda: len(receiver.bodies("/slow")) == 2)
            for i in range(100):
                broker.put("healthy", *numbers(20), key=str(i))
            await broker.until(lambda: not broker.left("healthy"))
            assert len(receiver.bodies("/slow")) == receiver.running["/slow"] == 2
            assert broker.left("slow") == broker.left("dead") == 200
            assert broker.consumers["slow"].credit <= 2 * 2 * RUN_MESSAGES_MAX
            receiver.unblocked.set()
            await broker.until(lambda: not broker.left("slow"))


async def test_waiting_runs_share_the_verdict(receiver: Receiver) -> None:
    """While one request finds a tenant throttled, its runs that wait for a slot are settled alike without asking
    again; other tenants' are sent."""
    first = asyncio.Event()

    async def throttle(request: web.Request) -> web.StreamResponse:
        if request.headers["Spillway-Tenant"] == "loud":
            await first.wait()
            return web.Response(status=429, headers={"Retry-After": "60"})
        return web.Response()

    receiver.handlers["/a"] = throttle
    broker = FakeBroker(target(receiver, "a", concurrency_max=1))
    for i in range(10):
        broker.put("a", b"x", tenant="loud", key=str(i))
    broker.put("a", b"x", tenant="quiet")
    async with dispatching(broker) as dispatcher:
        await receiver.until(lambda: len(receiver.requests) == 1)
        first.set()
        await broker.until(lambda: len(broker.settlements) == 11)
        assert dispatcher.counts().spared == 9
    throttled = [s for s in broker.settlements if s[0] == "loud"]
    assert all(s[1] == "throttled" and 50 < float(str(s[2])) <= 60 for s in throttled)
    assert len(receiver.requests) == 2


async def test_lost_lease_stops_the_run(receiver: Receiver) -> None:
    """A run whose lease is gone sends no further message: the queue belongs to somebody else by then."""
    receiver.handlers["/a"] = receiver.hang
    broker = FakeBroker(target(receiver, "a", concurrency_max=2))
    broker.lease_seconds = 0.5  # less than a request may take: each needs an extension
    broker.put("a", *numbers(3))
    async with dispatching(broker) as dispatcher:
        await receiver.until(lambda: len(receiver.requests) == 1)
        assert broker.extended >= 1
        broker.lease_seconds = None
        broker.expire("a")
        await receiver.until(lambda: len(receiver.requests) == 2)
        receiver.unblocked.set()
        await broker.until(lambda: not broker.left("a"))
        assert dispatcher.counts().lost == 1
    assert receiver.bodies("/a") == [b"0", *numbers(3)]
    tokens = [int(r.headers["Spillway-Fencing-Token"]) for r in receiver.requests]
    assert tokens == [1, 2, 2, 2]


async def test_graceful_stop(receiver: Receiver) -> None:
    """Stopping takes nothing new, finishes the request under way, acknowledges it, and gives the rest back."""
    receiver.handlers["/a"] = receiver.hang
    broker = FakeBroker(target(receiver, "a", concurrency_max=1))
    broker.put("a", *numbers(5), key="sending")
    broker.put("a", *numbers(5), key="waiting")
    async with dispatching(broker) as dispatcher:
        await receiver.until(lambda: len(receiver.requests) == 1)
        dispatcher.stop()
        await broker.until(lambda: bool(broker.settlements))
        assert broker.settlements == [("t", "release")], "what waits for a slot goes back at once"
        receiver.unblocked.set()
    assert broker.settlements[1:3] == [("t", "ack", 1), ("t", "release")]
    assert len(receiver.requests) == 1
    assert broker.left("a") == 9
    assert all(queue.lease is None or not broker.consumers for queue in broker.queues.values())


async def test_stop_is_bounded(receiver: Receiver) -> None:
    """A request that does not end within the grace is given up; its message goes back without an attempt."""
    receiver.handlers["/a"] = receiver.hang
    broker = FakeBroker(target(receiver, "a", timeout=300.0))
    broker.put("a", *numbers(2))
    async with dispatching(broker, grace_seconds=0.05) as dispatcher:
        await receiver.until(lambda: len(receiver.requests) == 1)
        dispatcher.stop()
    assert broker.settlements[0] == ("t", "release")
    assert broker.left("a") == 2


async def test_targets_come_change_and_go(receiver: Receiver) -> None:
    """New targets are delivered, changed ones as they are now, those that are gone or lost their URL no more; an
    unreachable broker changes nothing; names decide what is delivered."""
    broker = FakeBroker(target(receiver, "crm.a"), target(receiver, "other"))
    broker.put("crm.a", b"0")
    broker.put("other", b"never")
    async with dispatching(broker, patterns=["crm.*"]) as dispatcher:
        await broker.until(lambda: not broker.left("crm.a"))
        broker.known = [replace(broker.known[0], url=receiver.url("/moved")), target(receiver, "crm.b")]
        broker.put("crm.b", b"0")
        await broker.until(lambda: not broker.left("crm.b"))
        await spin(lambda: urls(dispatcher).get("crm.a") == receiver.url("/moved"))
        broker.put("crm.a", b"1")
        await broker.until(lambda: not broker.left("crm.a"))
        broker.failing = True
        broker.put("crm.a", b"2")
        await broker.until(lambda: not broker.left("crm.a"))
        broker.failing = False
        broker.known = []
        await spin(lambda: not dispatcher.states())
        assert not broker.consumers
        broker.put("crm.a", b"3")
    assert receiver.bodies("/crm.a") == [b"0"]
    assert receiver.bodies("/moved") == [b"1", b"2"]
    assert receiver.bodies("/other") == []
    assert broker.left("crm.a") == 1


async def test_unusable_url(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    """A target that cannot be a URL is reported once, not delivered, and disturbs nobody."""
    broker = FakeBroker(local("bad", "http://", 5.0, 1), target(receiver, "good"))
    broker.put("good", *numbers(3))
    async with dispatching(broker):
        await broker.until(lambda: not broker.left("good"))
    assert [r.getMessage().startswith("destination=bad is not delivered") for r in caplog.records
            if r.levelno == logging.ERROR] == [True]


async def test_subscription_ends(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscription that the broker ends is made again."""
    monkeypatch.setattr("spillway.client.dispatcher.lane.RESUBSCRIBE_SECONDS", 0.0)
    broker = FakeBroker(target(receiver, "a"))
    async with dispatching(broker):
        await spin(lambda: "a" in broker.consumers)
        broker.consumers["a"].out.put_nowait(Unavailable("no node answers"))
        broker.put("a", *numbers(3))
        await broker.until(lambda: not broker.left("a"))
    assert receiver.bodies("/a") == numbers(3)


async def test_logs_hold_no_content(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    """Logs tell of states and counts, never of payloads, header values or URLs, and have no line per message."""
    caplog.set_level(logging.DEBUG, "spillway")
    answers = [web.Response(status=500, text="body-secret") for _ in range(20)]
    receiver.answers["/a"] += answers
    broker = FakeBroker(local("a", receiver.url("/a").replace("://", "://user:url-secret@"), 5.0, 1))
    broker.put("a", *[b"payload-secret"] * 200, headers={"X-Key": "header-secret"})
    async with dispatching(broker, summary_seconds=0.0):
        await broker.until(lambda: not broker.left("a"))
    assert "secret" not in caplog.text
    assert "delivered=" in caplog.text and "destination=a started" in caplog.text
    lines = [r for r in caplog.records if "destinations=" not in r.getMessage()]
    assert len(lines) < 20


@pytest.mark.parametrize(("patterns", "name", "fits"), [
    ([], "anything", True),
    (["a"], "a", True),
    (["a"], "ab", False),
    (["a*"], "ab", True),
    (["*.eu", "x"], "crm.eu", True),
    (["*.eu", "x"], "crm.us", False),
    (["a.c"], "abc", False),
    (["a*b*c"], "a1b2c", True),
    (["a|b"], "a", False),
    (["*"], "line\nbreak", True),
])
def test_patterns(patterns: list[str], name: str, fits: bool) -> None:
    """'*' stands for any run of characters, everything else for itself; without patterns all names fit."""
    assert matcher(patterns)(name) is fits


@pytest.mark.parametrize(("counts", "state"), [
    (Counts(), None),
    (Counts(delivered=1, retried=5, down=5), "delivering"),
    (Counts(down=1, retried=3), "down"),
    (Counts(retried=1), "failing"),
    (Counts(rejected=1, throttled=3), "failing"),
    (Counts(throttled=1), "throttled"),
    (Counts(released=4), None),
])
def test_states(counts: Counts, state: str | None) -> None:
    """A destination is what its last second was; a second without requests changes nothing."""
    assert state_of(counts) == state


async def test_no_header_blocks_its_message(receiver: Receiver) -> None:
    """Whatever header a message has, it is delivered: otherwise a tenant could block its queue, or a header that a
    library treats specially could change the request."""
    names = sorted({str(value) for name, value in vars(hdrs).items() if name.isupper() and isinstance(value, str)}
                   - {"*", "Sec-WebSocket-Key1"} - hdrs.METH_ALL)  # that one this server refuses, as a server may
    assert len(names) > 50
    broker = FakeBroker(target(receiver, "a"))
    for name in names:
        broker.put("a", b"payload", tenant=name, headers={name: "x"})
    async with dispatching(broker) as dispatcher:
        await broker.until(lambda: not broker.left("a"))
        assert dispatcher.counts().delivered == len(names) == len(receiver.requests)
    assert set(receiver.bodies("/a")) == {b"payload"}


async def test_password_in_url(receiver: Receiver) -> None:
    """Credentials of the URL go into the Authorization header; they win over a message's own."""
    url = receiver.url("/a").replace("://", "://user:p%40ss@")
    broker = FakeBroker(local("a", url, 5.0, 1))
    broker.put("a", b"0", headers={"authorization": "Bearer tenant"})
    broker.put("a", b"1")
    async with dispatching(broker):
        await broker.until(lambda: not broker.left("a"))
    assert [[v for k, v in r.headers.items() if k.lower() == "authorization"] for r in receiver.requests] == [
        ["Basic " + base64.b64encode(b"user:p@ss").decode()]] * 2


SECRETS = tuple("whsec_" + base64.b64encode(bytes([i]) * 32).decode() for i in range(2))


async def test_changes_take_effect_live(receiver: Receiver) -> None:
    """A new URL, new headers, new secrets and a permission hold for the next request, without a restart and without a
    new subscription; what is under way goes on undisturbed."""
    receiver.handlers["/a"] = receiver.hang
    broker = FakeBroker(replace(target(receiver, "a"), signing_secrets=SECRETS[:1]))
    broker.put("a", *numbers(3), key="begun")
    async with dispatching(broker) as dispatcher:
        await receiver.until(lambda: len(receiver.requests) == 1)
        consumer = broker.consumers["a"]
        broker.known = [replace(broker.known[0], url=receiver.url("/b"), signing_secrets=SECRETS, headers=(("X-New", "1"),))]
        await spin(lambda: urls(dispatcher).get("a") == receiver.url("/b"))
        broker.put("a", b"later", key="other")
        await receiver.until(lambda: len(receiver.requests) == 2)
        assert receiver.running["/a"] == 1, "the old request is still under way"
        receiver.unblocked.set()
        await broker.until(lambda: not broker.left("a"))
        assert broker.consumers["a"] is consumer
        assert not [s for s in broker.settlements if s[1] != "ack"]
        await spin(lambda: not dispatcher._members["a"].retiring)
    assert receiver.bodies("/a") == [b"0"] and sorted(receiver.bodies("/b")) == [b"1", b"2", b"later"]
    for request in receiver.requests:
        new = request.path == "/b"
        assert (request.headers.get("X-New") == "1") is new
        for secret, valid in ((SECRETS[0], True), (SECRETS[1], new)):
            try:
                Webhook(secret).verify(request.body, request.headers, json_parse=False)
                assert valid
            except WebhookVerificationError:
                assert not valid


@pytest.mark.parametrize("status", [308, 429])
async def test_late_verdict_of_the_old_target(receiver: Receiver, status: int) -> None:
    """What a request to the target as it was brings, says nothing of the new one: runs that wait are sent there."""

    async def late(request: web.Request) -> web.StreamResponse:
        await receiver.unblocked.wait()
        return web.Response(status=status, headers={"Retry-After": "600"})

    receiver.handlers["/a"] = late
    broker = FakeBroker(target(receiver, "a", concurrency_max=1))
    for key in "uvw":
        broker.put("a", b"x", key=key)
    async with dispatching(broker) as dispatcher:
        await receiver.until(lambda: len(receiver.requests) == 1)
        broker.known = [replace(broker.known[0], url=receiver.url("/b"))]
        await spin(lambda: urls(dispatcher)["a"] == receiver.url("/b"))
        receiver.unblocked.set()
        await broker.until(lambda: broker.left("a") == 1)
        assert shown(dispatcher, "a")["circuit"] == "closed" and shown(dispatcher, "a")["throttled_tenants"] == 0
        assert dispatcher.counts().spared == 0
    assert len(receiver.bodies("/a")) == 1 and len(receiver.bodies("/b")) == 2


async def test_throttling_of_the_old_target(receiver: Receiver) -> None:
    """A run that waits for a slot is sent to the new target, though the old one had throttled its tenant."""

    async def hang_for_quiet(request: web.Request) -> web.StreamResponse:
        if request.headers["Spillway-Tenant"] == "quiet":
            return await receiver.hang(request)
        return web.Response(status=429, headers={"Retry-After": "600"})

    receiver.handlers["/a"] = hang_for_quiet
    broker = FakeBroker(target(receiver, "a", concurrency_max=1))
    for tenant, key in (("loud", "1"), ("quiet", "1"), ("loud", "2")):
        broker.put("a", b"x", tenant=tenant, key=key)
    async with dispatching(broker) as dispatcher:
        await receiver.until(lambda: len(receiver.requests) == 2)
        assert shown(dispatcher, "a")["throttled_tenants"] == 1
        broker.known = [replace(broker.known[0], url=receiver.url("/b"))]
        await spin(lambda: urls(dispatcher)["a"] == receiver.url("/b"))
        receiver.unblocked.set()
        await broker.until(lambda: broker.left("a") == 1)
        assert dispatcher.counts().spared == 0
    assert len(receiver.bodies("/b")) == 1


async def test_timeout_and_concurrency_change(receiver: Receiver) -> None:
    """A new timeout and a new concurrency_max hold, too, with a subscription that fits them."""
    receiver.handlers["/a"] = receiver.hang
    broker = FakeBroker(target(receiver, "a", concurrency_max=1))
    async with dispatching(broker):
        await spin(lambda: "a" in broker.consumers)
        before = broker.consumers["a"]
        broker.known = [target(receiver, "a", timeout=60.0, concurrency_max=3)]
        await spin(lambda: broker.consumers.get("a", before) is not before)
        assert broker.consumers["a"].credit == 3 * before.credit
        assert broker.consumers["a"].lease_seconds > 60.0 > before.lease_seconds
        for i in range(5):
            broker.put("a", b"x", key=str(i))
        await receiver.until(lambda: len(receiver.requests) == 3)
        receiver.unblocked.set()
        await broker.until(lambda: not broker.left("a"))
    assert receiver.running_max["/a"] == 3


async def test_private_address_parks_until_allowed(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    """A URL that leads to a private address is a mistake of its owner: the destination is parked, no message is lost or
    has an attempt counted, the log says why; all is delivered once it is allowed."""
    broker = FakeBroker(replace(target(receiver, "a"), allow_private_addresses=False))
    broker.put("a", *numbers(3))
    async with dispatching(broker) as dispatcher:
        await broker.until(lambda: bool(broker.settlements))
        assert broker.settlements == [("t", "down", None)] and not receiver.requests
        await spin(lambda: dispatcher.states()["a"] == "down")
        broker.known = [target(receiver, "a")]
        await spin(lambda: dispatcher._members["a"].target == broker.known[0])
        broker.unpark()
        await broker.until(lambda: not broker.left("a"))
    assert receiver.bodies("/a") == numbers(3)
    assert {r.headers["Spillway-Attempt"] for r in receiver.requests} == {"1"} and not broker.dead
    assert "state=down was=new circuit=open failures_in_a_row=1 until=backoff: address not allowed: 127.0.0.1 is loopback" in (
        caplog.text)


async def test_change_to_unusable(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    """A secret that is none stops the destination, not the dispatcher; a good one starts it again."""
    broker = FakeBroker(target(receiver, "a"), target(receiver, "good"))
    async with dispatching(broker) as dispatcher:
        await spin(lambda: len(broker.consumers) == 2)
        broker.known[0] = replace(broker.known[0], signing_secrets=("whsec_none",))
        await spin(lambda: "a" not in broker.consumers and "a" not in dispatcher.states())
        broker.put("a", b"0")
        broker.put("good", b"0")
        await broker.until(lambda: not broker.left("good"))
        assert dispatcher.status()["not_delivered"] == [{
            "destination": "a", "reason": "signing_secrets[0] is not 'whsec_' and base64 of 24 to 64 bytes"}]
        broker.known[0] = target(receiver, "a")
        await broker.until(lambda: not broker.left("a"))
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    assert "whsec_none" not in caplog.text


def shown(dispatcher: Dispatcher, name: str) -> dict[str, object]:
    destinations = dispatcher.status()["destinations"]
    assert isinstance(destinations, list)
    found, = [one for one in destinations if one["destination"] == name]
    assert isinstance(found, dict)
    return found


async def test_circuit(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    """The circuit opens when the destination is found down, is half-open while the next message tries it, and closes
    when that gets through; the status tells of each, and the log of the opening and the closing."""
    caplog.set_level(logging.INFO, "spillway")
    looked_up = asyncio.Event()
    go_on = asyncio.Event()
    broker = FakeBroker(target(receiver, "a"))
    async with dispatching(broker) as dispatcher:
        await spin(lambda: bool(dispatcher.states()))
        assert (shown(dispatcher, "a").get("circuit", "closed"), shown(dispatcher, "a")["state"]) == ("closed", "new")
        port = receiver.server.port
        await receiver.server.close()
        broker.put("a", *numbers(2))
        await broker.until(lambda: bool(broker.settlements))
        await spin(lambda: dispatcher.states()["a"] == "down")
        one = shown(dispatcher, "a")
        assert (one["circuit"], one["failures_in_a_row"], one["last_status"], one["down"], one["failed"], one["in_flight"]) == (
            "open", 1, None, 1, 1, 0)
        assert one["last_error"] == "no connection: ConnectionRefusedError" and one["last_error_time"] is not None

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for _ in range(2):
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(1)
                looked_up.set()
                await go_on.wait()
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", port)
        broker.unpark()
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await looked_up.wait()
        assert (shown(dispatcher, "a")["circuit"], shown(dispatcher, "a")["in_flight"]) == ("half-open", 1)
        await spin(lambda: dispatcher._members["a"].circuit == "half-open")
        go_on.set()
        await broker.until(lambda: not broker.left("a"))
        await spin(lambda: dispatcher.states()["a"] == "delivering")
        one = shown(dispatcher, "a")
        assert (one["circuit"], one["failures_in_a_row"], one["last_status"], one["delivered"]) == ("closed", 0, 204, 2)
        server.close()
    changes = [r.getMessage() for r in caplog.records if "circuit=" in r.getMessage()]
    assert changes == [
        "destination=a state=down was=new circuit=open failures_in_a_row=1 until=backoff: no connection: ConnectionRefusedError",
        "destination=a state=delivering was=down circuit=closed failures_in_a_row=0 until=-"]


async def test_status_of_throttled(receiver: Receiver) -> None:
    """Of throttled tenants the status says how many, and until when the last of them is."""
    receiver.answers["/a"] += [web.Response(status=429, headers={"Retry-After": str(wait)}) for wait in (600, 60)]
    broker = FakeBroker(target(receiver, "a", concurrency_max=1))
    broker.put("a", b"x", tenant="loud")
    broker.put("a", b"x", tenant="louder")
    async with dispatching(broker) as dispatcher:
        await broker.until(lambda: len(broker.settlements) == 2)
        one = shown(dispatcher, "a")
        until = datetime.fromisoformat(str(one["throttled_until"])).timestamp()
    assert (one["circuit"], one["throttled_tenants"], one["last_status"], one["throttled"]) == ("closed", 2, 429, 2)
    assert 500 < until - time.time() <= 600


async def test_status_over_http(receiver: Receiver) -> None:
    """GET /status on loopback answers what is known as JSON, holds nothing of URLs, secrets and payloads, and only
    answers whoever asks for this machine."""
    url = receiver.url("/a").replace("://", "://user:url-secret@")
    broker = FakeBroker(replace(local("a", url, 5.0, 1), headers=(("X", "header-secret"),), signing_secrets=SECRETS[:1]))
    broker.put("a", b"payload-secret", headers={"X-Key": "message-secret"}, tenant="tenant-secret")
    async with dispatching(broker) as dispatcher, status_server(dispatcher.status, 0) as port, ClientSession() as session:
        await broker.until(lambda: not broker.left("a"))
        async with session.get(f"http://127.0.0.1:{port}/status") as response:
            text = await response.text()
            assert response.status == 200 and response.content_type == "application/json"
        for host, status in (("localhost", 200), ("evil.example", 403), (f"evil.example:{port}", 403)):
            async with session.get(f"http://127.0.0.1:{port}/status", headers={"Host": host}) as response:
                assert response.status == status
        async with session.get(f"http://127.0.0.1:{port}/") as response:
            assert response.status == 404
        with pytest.raises(OSError, match="in use"):
            async with status_server(dispatcher.status, port):
                pass
    found = json.loads(text)
    assert found["destinations"][0]["delivered"] == found["counts"]["delivered"] == 1
    assert "secret" not in text and "whsec" not in text and "http" not in text


async def test_many_dead_destinations_cost_the_living_nothing(receiver: Receiver) -> None:
    """Each destination has credit, slots and connections of its own: with fifty that hang, another one has all of its
    slots at once."""
    receiver.handlers["/hang"] = receiver.hang
    dead = [local(f"dead{i}", receiver.url("/hang"), 60.0, 2) for i in range(50)]
    broker = FakeBroker(*dead, target(receiver, "a", concurrency_max=8))
    for one in dead:
        for key in "uvw":
            broker.put(one.destination, b"x", key=key)
    receiver.handlers["/a"] = receiver.hang
    async with dispatching(broker) as dispatcher:
        await receiver.until(lambda: receiver.running["/hang"] == 100)
        for i in range(8):
            broker.put("a", b"x", key=str(i))
        await receiver.until(lambda: receiver.running["/a"] == 8)
        assert shown(dispatcher, "a")["in_flight"] == 8 and receiver.running["/hang"] == 100
        receiver.unblocked.set()
        await broker.until(lambda: not any(broker.left(one.destination) for one in broker.known))
