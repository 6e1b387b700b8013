"""The dispatcher with a real node, the real client, and real HTTP servers; and the demo as a whole."""
from __future__ import annotations

import asyncio
import os
import signal
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from spillway.client import Client, DeliveryPolicy, Destination, HttpTarget, Record
from spillway.client.dispatcher.broker import ClientBroker
from spillway.client.dispatcher.dispatcher import Dispatcher
from standardwebhooks import Webhook

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # the demo is a program of the repository, not of the package

from demo.children import Children  # noqa: E402
from demo.cluster import Cluster, spillway  # noqa: E402

SECONDS_MAX = 60.0  # for what must happen; a test that reaches it fails
POLICY = DeliveryPolicy(backoff_base=0.01, backoff_cap=0.1)


class Receiver:
    """An HTTP server; `answer` decides, success by default."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.answer: Callable[[str, dict[str, str]], Awaitable[web.Response | None]] | None = None
        self.came = asyncio.Event()
        application = web.Application()
        application.router.add_post("/", self._handle)
        self.server = TestServer(application)

    async def _handle(self, request: web.Request) -> web.Response:
        body, headers = (await request.read()).decode(), dict(request.headers)
        self.requests.append((body, headers))
        self.came.set()
        response = None if self.answer is None else await self.answer(body, headers)
        return web.Response(status=204) if response is None else response

    def bodies(self, tenant: str) -> list[str]:
        return [body for body, headers in self.requests if headers["Spillway-Tenant"] == tenant]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            while not condition():
                self.came.clear()
                await self.came.wait()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    await receiver.server.start_server()
    yield receiver
    await receiver.server.close()


@pytest.fixture
async def children(tmp_path: Path) -> AsyncIterator[Children]:
    async with Children(tmp_path) as children:
        yield children


@pytest.fixture
async def client(tmp_path: Path, children: Children) -> AsyncIterator[Client]:
    cluster = Cluster(tmp_path, children, size=1)
    await cluster.start(cluster.nodes[0])
    await cluster.ready()
    async with Client(cluster.addresses) as client:
        await client.wait_ready(SECONDS_MAX)
        yield client
    await cluster.close()


@asynccontextmanager
async def dispatching(client: Client) -> AsyncIterator[None]:
    dispatcher = Dispatcher(ClientBroker(client), watch_seconds=0.1)
    task = asyncio.create_task(dispatcher.run())
    try:
        yield
    finally:
        dispatcher.stop()
        async with asyncio.timeout(SECONDS_MAX):
            await task


def local(url: str) -> HttpTarget:
    return HttpTarget(url, allow_private_addresses=True)


async def produce(client: Client, destination: str, tenant: str, *payloads: str) -> None:
    async with client.producer() as producer:
        await producer.send_many([Record(destination, p.encode(), tenant=tenant, key="k") for p in payloads])


async def settled(client: Client, destination: str, left: int = 0) -> None:
    """Waits until so many messages are left; acknowledgements follow deliveries."""
    async with asyncio.timeout(SECONDS_MAX):
        while (await client.admin.destination_stats(destination)).messages != left:
            pass


def numbers(count: int) -> list[str]:
    return [str(i) for i in range(count)]


async def test_delivers_in_order(client: Client, receiver: Receiver) -> None:
    """A destination that gets its URL after its messages is noticed; all messages arrive once, in order, and are gone."""
    for tenant in ("a", "b"):
        await produce(client, "crm", tenant, *numbers(100))
    async with dispatching(client):
        await client.admin.update_destination(Destination("crm", POLICY, local(str(receiver.server.make_url("/")))))
        await settled(client, "crm")
    assert receiver.bodies("a") == receiver.bodies("b") == numbers(100)


async def test_outcomes(client: Client, receiver: Receiver) -> None:
    """A refused message becomes a dead letter with its reason and leaves a gap that the next one tells of; a failing
    one is tried again before anything behind it; a throttled tenant waits, others do not."""
    throttled = True

    async def answer(body: str, headers: dict[str, str]) -> web.Response | None:
        tenant, attempt = headers["Spillway-Tenant"], int(headers["Spillway-Attempt"])
        if tenant == "refused" and body == "1":
            return web.Response(status=422)
        if tenant == "failing" and body == "1" and attempt < 3:
            return web.Response(status=500)
        if tenant == "throttled" and throttled:
            return web.Response(status=429, headers={"Retry-After": "1"})
        return None

    receiver.answer = answer
    await client.admin.create_destination(Destination("crm", POLICY, local(str(receiver.server.make_url("/")))))
    for tenant in ("refused", "failing", "throttled"):
        await produce(client, "crm", tenant, *numbers(3))
    async with dispatching(client):
        await settled(client, "crm", left=3)
        assert (await client.admin.destination_stats("crm")).parked_tenants == 1
        throttled = False
        await settled(client, "crm")
    assert receiver.bodies("refused") == ["0", "1", "2"]
    dead = [letter async for letter in client.admin.list_dead_letters("crm")]
    assert [(letter.tenant, letter.payload, letter.reason) for letter in dead] == [("refused", b"1", "HTTP 422")]
    gaps = [headers.get("Spillway-Gap") for _, headers in receiver.requests if headers["Spillway-Tenant"] == "refused"]
    assert gaps == [None, None, f"count=1, first={dead[0].sequence}, last={dead[0].sequence}"]
    assert receiver.bodies("failing") == ["0", "1", "1", "1", "2"]
    assert receiver.bodies("throttled")[-3:] == numbers(3)
    attempts = {headers["Spillway-Attempt"] for _, headers in receiver.requests if headers["Spillway-Tenant"] == "throttled"}
    assert attempts == {"1"}, "being throttled is no attempt"


async def test_down_then_up(client: Client, receiver: Receiver) -> None:
    """A destination that refuses connections is parked with all its messages, and goes on once its URL answers."""
    await client.admin.create_destination(Destination("crm", POLICY, local("http://127.0.0.1:9/")))
    await produce(client, "crm", "a", *numbers(20))
    async with dispatching(client):
        async with asyncio.timeout(SECONDS_MAX):
            while (await client.admin.destination_stats("crm")).parked_until_time is None:
                pass
        stats = await client.admin.destination_stats("crm")
        assert (stats.messages, stats.retried_total, stats.dead_letters) == (20, 0, 0)
        await client.admin.update_destination(Destination("crm", POLICY, local(str(receiver.server.make_url("/")))))
        await settled(client, "crm")
    assert receiver.bodies("a") == numbers(20)
    assert {headers["Spillway-Attempt"] for _, headers in receiver.requests} == {"1"}


async def test_refused_then_allowed_and_signed(client: Client, receiver: Receiver) -> None:
    """A private address parks the destination; once it is allowed, all messages arrive untouched, signed with the secrets
    and with the headers that the destination has by then: a running dispatcher learns of them."""
    secret = "whsec_" + b64encode(b"s" * 32).decode()
    url = str(receiver.server.make_url("/"))
    await client.admin.create_destination(Destination("crm", POLICY, HttpTarget(url)))
    await produce(client, "crm", "a", *numbers(20))
    async with dispatching(client):
        async with asyncio.timeout(SECONDS_MAX):
            while (await client.admin.destination_stats("crm")).parked_until_time is None:
                pass
        stats = await client.admin.destination_stats("crm")
        assert (stats.messages, stats.retried_total, stats.dead_letters) == (20, 0, 0) and not receiver.requests
        await client.admin.update_destination(Destination("crm", POLICY, HttpTarget(
            url, allow_private_addresses=True, signing_secrets=(secret,), headers={"X-Own": "1"})))
        await settled(client, "crm")
    assert receiver.bodies("a") == numbers(20)
    for body, headers in receiver.requests:
        Webhook(secret).verify(body, headers)
        assert (headers["Spillway-Attempt"], headers["X-Own"]) == ("1", "1")
    listed = [destination async for destination in client.admin.list_destinations()]
    assert [d.http and d.http.signing_secrets for d in listed] == [()], "lists leave secrets out"


async def test_program_stops_gracefully(client: Client, receiver: Receiver, children: Children) -> None:
    """SIGTERM to `spillway dispatch`: the request under way is finished and acknowledged, the rest is given back at
    once and untouched, and the program ends with 0."""
    answer_now = asyncio.Event()

    async def answer(body: str, headers: dict[str, str]) -> web.Response | None:
        await answer_now.wait()
        return None

    receiver.answer = answer
    await client.admin.create_destination(Destination("crm", POLICY, local(str(receiver.server.make_url("/")))))
    await produce(client, "crm", "a", *numbers(5))
    address = next(iter(client.topology.nodes.values()))
    program = await children.start("dispatcher", *spillway("dispatch"), "--address", address)
    await receiver.until(lambda: len(receiver.requests) == 1)
    os.kill(program.process.pid, signal.SIGTERM)
    answer_now.set()
    async with asyncio.timeout(SECONDS_MAX):
        assert await program.process.wait() == 0
    arrived = len(receiver.requests)
    await settled(client, "crm", left=5 - arrived)
    async with dispatching(client):
        await settled(client, "crm")
    assert receiver.bodies("a") == numbers(5)
    assert {headers["Spillway-Attempt"] for _, headers in receiver.requests} == {"1"}


@pytest.mark.slow
async def test_demo() -> None:
    """The demo, smaller: three nodes, five destinations, one node killed and started again; nothing is lost, nothing
    out of order."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "demo", "--events", "2000", "--seconds-max", "60", "--plain", cwd=ROOT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    text = output.decode()
    assert process.returncode == 0, text
    assert "SIGKILL to" in text and "started again" in text and text.rstrip().endswith("PASSED"), text
