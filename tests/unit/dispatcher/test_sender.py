"""One endpoint: where requests may go, what they carry, which redirects they follow; against real HTTP servers."""
from __future__ import annotations

import asyncio
import socket
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from spillway.client.dispatcher import sender as module
from spillway.client.dispatcher.addresses import AddressForbidden
from spillway.client.dispatcher.outcome import Failure
from spillway.client.dispatcher.sender import Answer, Sender
from spillway.client.dispatcher.source import Target
from standardwebhooks import Webhook
from yarl import URL

SECRET = "whsec_" + b64encode(b"s" * 32).decode()
OWN = (("Authorization", "Bearer own"), ("X-Own", "own"), ("Content-Type", "application/own"))
MESSAGE = {"Spillway-Message-Id": "1-7", "Content-Type": "application/json", "X-Mine": "1"}


class Request(NamedTuple):
    method: str
    path: str
    body: bytes
    headers: dict[str, str]


class Server:
    """Notes what comes; answers with what is set for the path, 204 by default."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[Request] = []
        self.answers: dict[str, web.Response] = {}
        self.connections: set[object] = set()
        self.hanging = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.connections.add(request.transport)
        self.requests.append(Request(request.method, request.path, await request.read(), dict(request.headers)))
        if request.path == "/hang":
            await self.hanging.wait()
        answer = self.answers.get(request.path)
        if answer is None:
            return web.Response(status=204)
        return web.Response(status=answer.status, headers=answer.headers)

    def redirect(self, path: str, to: str | None, status: int = 307) -> None:
        self.answers[path] = web.Response(status=status, headers={} if to is None else {"Location": to})

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.requests]


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(listening.getsockname()[1])
        runner = web.ServerRunner(web.Server(server.handle), shutdown_timeout=0.1)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        try:
            yield server
        finally:
            server.hanging.set()
            await runner.cleanup()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


@pytest.fixture
async def other() -> AsyncIterator[Server]:
    """Another origin."""
    async with serving() as server:
        yield server


class Names(AbstractResolver):
    """A name server: each lookup takes the next of the answers, the last one for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.lookups = 0

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        self.lookups += 1
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [ResolveResult(hostname=host, host=address, port=port, proto=0, flags=socket.AI_NUMERICHOST,
                              family=socket.AF_INET6 if ":" in address else socket.AF_INET) for address in addresses]

    async def close(self) -> None:
        pass


class Real(AbstractResolver):
    """The system's, in the event loop's threads."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        return [ResolveResult(hostname=host, host=str(where[0]), port=port, family=kind, proto=proto,
                              flags=socket.AI_NUMERICHOST) for kind, _, proto, _, where in found]

    async def close(self) -> None:
        pass


def public(url: str, **more: object) -> Target:
    return replace(Target("d", url, 5.0, 4), **more)  # type: ignore[arg-type]


def local(url: str, **more: object) -> Target:
    return public(url, allow_private_addresses=True, **more)


async def post(target: Target, *, names: AbstractResolver | None = None, headers: dict[str, str] | None = None,
               check: Callable[[str, int], None] | None = None, payload: bytes = b"payload") -> Answer:
    async with Sender(target, names or Real(), "spillway/test", check) as sender:
        return await sender.post(payload, MESSAGE if headers is None else headers)


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [
    "127.0.0.1", "127.1.2.3", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::1]", "[::]", "0.0.0.0", "localhost", "0177.0.0.1",
    "0x7f.0.0.1", "127.1", "0x7f000001", "2130706433", "017700000001", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "10.0.0.1",
    "169.254.169.254", "100.64.0.1", "[fd00:ec2::254]", "[fe80::1%25lo]", "①②⑦.0.0.1", "127。0。0。1", "LOCALHOST", "localhost."])
async def test_private_hosts(server: Server, host: str) -> None:
    """However a host is written that leads to a private address, nothing is sent; that is our doing, not a failure of
    the receiver, unless nobody takes it for a host at all."""
    try:
        answer = await post(public(server.url("/", host)))
    except ValueError:  # not a URL: the target is not delivered at all
        return
    assert answer.failure is Failure.FORBIDDEN or (answer.failure, answer.detail) in (
        (Failure.CONNECT, "unusable host"), (Failure.CONNECT, "gaierror")), answer
    assert answer.status == 0 and not server.connections


@pytest.mark.parametrize("host", ["127.0.0.1", "[::ffff:127.0.0.1]", "localhost", "0.0.0.0"])
async def test_private_hosts_allowed(server: Server, host: str) -> None:
    """A target may allow them."""
    assert (await post(local(server.url("/", host)))).status == 204


async def test_reason(server: Server) -> None:
    """A refusal says which address it was and of what kind."""
    assert (await post(public(server.url("/")))).detail == "127.0.0.1 is loopback"
    assert (await post(public("http://named.example/"), names=Names(["10.0.0.1", "192.168.0.1"]))).detail in (
        "10.0.0.1 is private", "192.168.0.1 is private")


async def test_name_that_leads_inside(server: Server) -> None:
    """A public name with a private address is refused."""
    names = Names(["127.0.0.1"])
    answer = await post(public(f"http://inside.example:{server.port}/"), names=names)
    assert answer.failure is Failure.FORBIDDEN and names.lookups == 1 and not server.connections
    assert (await post(local(f"http://inside.example:{server.port}/"), names=names)).status == 204


async def test_mixed_addresses(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name's addresses only the public ones are tried, whichever come first."""
    tried: list[str] = []

    def note(address: str, port: int) -> None:
        tried.append(address)

    async def refuse(*_: object) -> None:
        raise ConnectionRefusedError

    # Nothing leaves this machine.
    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", refuse)
    target = public(f"http://mixed.example:{server.port}/")
    answer = await post(target, names=Names(["127.0.0.1", "8.8.8.8", "::1", "10.1.1.1"]), check=note)
    assert answer.failure is Failure.CONNECT
    assert set(tried) == {"8.8.8.8"} and not server.connections


async def test_rebinding(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that was public when it was looked up first, and is private for the connection, is refused: what counts is
    the address connected to. Two lookups in a row, and one whose answer changes behind the resolver's back."""
    monkeypatch.setattr(module, "DNS_SECONDS", 0)
    names = Names(["8.8.8.8"], ["127.0.0.1"])
    checked: list[str] = []
    target = public(f"http://rebinding.example:{server.port}/")

    def unreachable(address: str, port: int) -> None:
        checked.append(address)
        if address == "8.8.8.8":
            raise AddressForbidden("not in a test")

    async with Sender(target, names, "test", unreachable) as sender:
        assert (await sender.post(b"", MESSAGE)).failure is Failure.FORBIDDEN
        answer = await sender.post(b"", MESSAGE)
    assert (answer.failure, answer.detail) == (Failure.FORBIDDEN, "127.0.0.1 is loopback")
    assert checked == ["8.8.8.8"], "the second address does not even get to the further check"
    assert names.lookups == 2 and not server.connections


async def test_the_socket_is_checked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check right before connecting holds by itself: an address that gets past the resolver is refused there."""

    async def unchecked(self: module._CheckedResolver, host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
        return await self._inner.resolve(host, port, family)

    monkeypatch.setattr(module._CheckedResolver, "resolve", unchecked)
    answer = await post(public(f"http://inside.example:{server.port}/"), names=Names(["127.0.0.1"]))
    assert answer.failure is Failure.FORBIDDEN and not server.connections


async def test_further_check(server: Server) -> None:
    """A check of the caller's holds for targets that allow private addresses, too."""

    def refuse(address: str, port: int) -> None:
        raise AddressForbidden(f"{address}:{port}")

    answer = await post(local(server.url("/")), check=refuse)
    assert (answer.failure, answer.detail) == (Failure.FORBIDDEN, f"127.0.0.1:{server.port}")


async def test_no_proxy_from_the_environment(server: Server, other: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would connect to where nobody checks."""
    monkeypatch.setenv("http_proxy", other.url(""))
    monkeypatch.setenv("HTTP_PROXY", other.url(""))
    assert (await post(local(server.url("/")))).status == 204
    assert server.paths == ["/"] and not other.requests


# -- headers ---------------------------------------------------------------------------------------------------------


async def test_own_headers(server: Server) -> None:
    """The target's headers win over the message's, in whatever case; the dispatcher's win over both."""
    target = local(server.url("/"), headers=(
        *OWN, ("x-mine", "2"), ("Spillway-Message-Id", "forged"), ("Content-Length", "1"), ("Host", "elsewhere"),
        ("Webhook-Id", "forged"), ("Connection", "close"), ("X-Bad", "a\r\nX-Forged: 1")))
    await post(target, headers={**MESSAGE, "AUTHORIZATION": "Bearer tenant", "x-OWN": "tenant"})
    headers = server.requests[0].headers
    assert {name: value for name, value in headers.items() if name not in ("Host", "Accept")} == {
        "Spillway-Message-Id": "1-7", "Authorization": "Bearer own", "X-Own": "own", "x-mine": "2",
        "Content-Type": "application/own", "Content-Length": "7", "User-Agent": "spillway/test"}
    assert headers["Host"] == f"127.0.0.1:{server.port}"


async def test_message_headers_without_own(server: Server) -> None:
    """Without headers and secrets of the target, the message's are sent as they are, signatures of its producer, too."""
    await post(local(server.url("/")), headers={**MESSAGE, "webhook-id": "theirs"})
    assert server.requests[0].headers["webhook-id"] == "theirs"


async def test_signed(server: Server) -> None:
    """What arrives can be verified, and a tenant cannot forge it; the time is that of the attempt."""
    now = time.time()
    target = local(server.url("/"), signing_secrets=(SECRET,))
    async with Sender(target, Real(), "test", wall=lambda: now) as sender:
        await sender.post(b'{"a": 1}', {**MESSAGE, "Webhook-Signature": "v1,forged", "WEBHOOK-ID": "x"})
        now += 100
        await sender.post(b'{"a": 1}', MESSAGE)
    first, second = server.requests
    for request in (first, second):
        assert Webhook(SECRET).verify(request.body, request.headers) == {"a": 1}
        assert sorted(name for name in request.headers if name.lower().startswith("webhook-")) == [
            "webhook-id", "webhook-signature", "webhook-timestamp"]
        assert request.headers["webhook-id"] == "1-7"
    assert int(second.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) == 100


async def test_header_or_credentials_of_the_url(server: Server) -> None:
    """An Authorization header wins over credentials in the URL."""
    url = server.url("/").replace("://", "://user:password@")
    await post(local(url))
    await post(local(url, headers=OWN))
    assert [r.headers["Authorization"] for r in server.requests] == [
        "Basic " + b64encode(b"user:password").decode(), "Bearer own"]


@pytest.mark.parametrize("more", [{"url": "http://"}, {"url": "ftp://a/"}, {"signing_secrets": ("whsec_secret",)}])
def test_unusable(more: dict[str, object]) -> None:
    """A target that cannot be used is refused, and no secret is shown."""
    with pytest.raises(ValueError, match=r"^(the URL of destination 'd'|signing_secrets\[0\]) is not") as caught:
        Sender(replace(public("http://a/"), **more), Real(), "test")  # type: ignore[arg-type]
    assert "whsec_secret" not in str(caught.value)


# -- redirects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_not_followed_by_default(server: Server, status: int) -> None:
    """Nothing is followed unless the target says so."""
    server.redirect("/", "/there", status)
    assert (await post(local(server.url("/")))).status == status
    assert server.paths == ["/"]


@pytest.mark.parametrize(("status", "followed"), [(300, False), (301, False), (302, False), (303, False), (304, False),
                                                  (307, True), (308, True)])
async def test_which_are_followed(server: Server, status: int, followed: bool) -> None:
    """Those that keep method and body are; within an origin everything is sent again."""
    server.redirect("/", "there?x=1", status)
    answer = await post(local(server.url("/"), redirects_max=1, headers=OWN, signing_secrets=(SECRET,)))
    assert answer.status == (204 if followed else status) and answer.failure is None
    assert server.paths == (["/", "/there"] if followed else ["/"])
    for request in server.requests:
        assert (request.method, request.body, request.headers["Authorization"]) == ("POST", b"payload", "Bearer own")
    assert server.requests[0].headers == server.requests[-1].headers


async def test_other_origin(server: Server, other: Server) -> None:
    """Another origin gets message and signature, so that it can verify them, but neither the target's headers nor
    credentials; not even if it leads back."""
    server.redirect("/", other.url("/there").replace("://", "://user:password@"))
    other.redirect("/there", server.url("/back"))
    target = local(server.url("/").replace("://", "://me:password@"), redirects_max=2, headers=OWN[1:], signing_secrets=(SECRET,))
    answer = await post(target, headers={**MESSAGE, "Cookie": "tenant"})
    assert answer.status == 204
    first, back = server.requests
    there, = other.requests
    assert "Authorization" in first.headers and first.headers["X-Own"] == "own" and first.headers["Cookie"] == "tenant"
    for request in (there, back):
        assert not {"Authorization", "Cookie", "X-Own"} & request.headers.keys()
        assert request.headers["Content-Type"] == "application/own" and request.headers["X-Mine"] == "1"
        Webhook(SECRET).verify(request.body, request.headers, json_parse=False)


async def test_how_many(server: Server) -> None:
    """As many are followed as the target says, and no more; a loop ends."""
    for i in range(5):
        server.redirect(f"/{i}", f"/{i + 1}")
    assert (await post(local(server.url("/0"), redirects_max=5))).status == 204
    answer = await post(local(server.url("/0"), redirects_max=4))
    assert (answer.status, answer.failure, answer.detail) == (0, Failure.REDIRECT, "more than 4")
    assert server.paths == ["/0", "/1", "/2", "/3", "/4", "/5", "/0", "/1", "/2", "/3", "/4"]
    server.redirect("/5", "/0")
    assert (await post(local(server.url("/0"), redirects_max=5))).failure is Failure.REDIRECT


async def test_redirect_inside(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A public endpoint that redirects to a private address, by number or by name, gets nobody there."""

    def pretend(address: str, port: int) -> None:  # that the server's address is public
        if (address, port) != ("127.0.0.1", server.port):
            real(address, port)

    real = module.check_public
    monkeypatch.setattr(module, "check_public", pretend)
    async with serving() as inside:
        for to in (inside.url("/"), inside.url("/", "localhost"), inside.url("/", "[::ffff:7f00:1]"), "http://169.254.169.254/"):
            server.redirect("/", to)
            answer = await post(public(server.url("/"), redirects_max=3))
            assert answer.failure is Failure.FORBIDDEN, to
        assert not inside.connections
    assert server.paths == ["/"] * 4


@pytest.mark.parametrize(("location", "detail"), [
    (None, "no Location"), ("", "no Location"), ("ftp://a/", "not to http:// or https:// with a host"),
    ("file:///etc/passwd", "not to http:// or https:// with a host"),
    ("http://a:99999/", "unusable Location"), ("http://[::1", "unusable Location"), ("javascript:alert(1)", None),
])
async def test_unusable_location(server: Server, location: str | None, detail: str | None) -> None:
    """What is no HTTP URL is not followed, and breaks nothing."""
    server.redirect("/", location)
    answer = await post(local(server.url("/"), redirects_max=3))
    assert answer.failure is Failure.REDIRECT and answer.detail == (detail or "not to http:// or https:// with a host")


def test_https_stays() -> None:
    """What was meant to be encrypted is not sent in the clear; the other way is fine."""
    assert module._redirected(URL("https://a/x"), "http://a/x") == "from https:// to http://"
    assert module._redirected(URL("https://a/x"), "//b/y#z") == URL("https://b/y")
    assert module._redirected(URL("http://a/x"), "https://u:p@a/x") == URL("https://a/x")


async def test_redirects_share_the_timeout(server: Server) -> None:
    """The timeout is for the whole chain: leases count on it."""
    server.redirect("/", "/hang")
    started = time.monotonic()
    answer = await post(local(server.url("/"), redirects_max=5, timeout=0.3))
    assert answer.failure is Failure.TIMEOUT and time.monotonic() - started < 3.0


# -- connections -----------------------------------------------------------------------------------------------------


async def test_connections_are_used_again(server: Server) -> None:
    """Requests one after another take one connection; several at a time as many as the target allows."""
    async with Sender(local(server.url("/"), concurrency_max=3), Real(), "test") as sender:
        for _ in range(5):
            await sender.post(b"", MESSAGE)
        assert len(server.connections) == 1
        await asyncio.gather(*(sender.post(b"", MESSAGE) for _ in range(20)))
        assert 1 < len(server.connections) <= 3


async def test_body_is_bounded() -> None:
    """Of a body no more is taken than the bound and what is in buffers; the connection is closed then, and the status
    counts. A small body is read, so that the connection can be used again."""
    sent = 0
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent, connections
        connections += 1
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                big = b"/big" in request
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 40 if big else 10_000))
                if not big:
                    writer.write(bytes(10_000))
                while big:
                    writer.write(bytes(65536))
                    await writer.drain()
                    sent += 65536
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with Sender(local(base + "/small"), Real(), "test") as sender:
        for _ in range(3):
            assert (await sender.post(b"", MESSAGE)).status == 200
    assert connections == 1
    assert (await post(local(base + "/big"), payload=b"")).status == 200
    server.close()
    await server.wait_closed()
    assert sent < 32 << 20


async def test_retired_sender_finishes(server: Server) -> None:
    """A sender that is retired lets its request finish, and closes then."""
    sender = Sender(local(server.url("/hang")), Real(), "test")
    sender.open()
    posting = asyncio.create_task(sender.post(b"", MESSAGE))
    async with asyncio.timeout(10):
        while not server.requests:
            await asyncio.sleep(0)
        retiring = asyncio.create_task(sender.retire())
        await asyncio.sleep(0)
        assert not retiring.done()
        server.hanging.set()
        assert (await posting).status == 204
        await retiring
    assert sender._session is not None and sender._session.closed
