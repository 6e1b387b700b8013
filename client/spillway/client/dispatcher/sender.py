"""One HTTP endpoint: connections, timeouts, limits; requests in, answers or kinds of failure out.

Each destination has a sender of its own, with its own connections: nothing that one endpoint does (hang, fill its
pool, answer without end) can be felt at another. Only the threads that look up names are shared; they are many,
and there is at most one lookup per sender at a time.

Addresses are checked twice, both times after names were resolved, so that there is no window for DNS rebinding: those
that a name resolves to (the forbidden ones are left out), and the one of every connection right before it is made,
which holds for numeric hosts, too. A connection that is used again was checked when it was made.
"""
from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from spillway.client.dispatcher.addresses import AddressForbidden, check_public
from spillway.client.dispatcher.headers import message_headers
from spillway.client.dispatcher.outcome import Failure
from spillway.client.dispatcher.signing import SIGNATURE_HEADERS, Signer
from spillway.client.dispatcher.source import Target
from yarl import URL

RESPONSE_BYTES_MAX = 64 << 10  # of a body that nobody reads: more, and the connection is closed instead of reused
CONNECT_SECONDS_MAX = 10.0  # of the timeout, at most this and at most half may go into connecting
SECONDS_MIN = 0.001  # for a request after a redirect; aiohttp takes 0 for no limit
DNS_SECONDS = 10  # how long an address is kept: endpoints move
IDLE_SECONDS = 30.0  # how long an unused connection is kept

AddressCheck = Callable[[str, int], None]
"""Called with the numeric address and port of every connection right before it is made; raises AddressForbidden."""

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_FOLLOWED = frozenset((307, 308))  # those that keep method and body
_CREDENTIALS = frozenset(("authorization", "cookie"))  # not for other origins
_FOR_ANYBODY = frozenset(("content-type", "user-agent"))  # the target's headers that say nothing to hide


class Answer(NamedTuple):
    """What came of a request: an answer's status and headers, or a failure and the name of its error."""

    status: int
    headers: Mapping[str, str] = _NO_HEADERS
    failure: Failure | None = None
    detail: str = ""


class Resolver(AbstractResolver):
    """Looks names up in given threads. (The event loop's own few would be taken by a handful of dead name servers.)"""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def resolve(self, host: str, port: int = 0,
                      family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """The addresses of a host. Raises OSError."""
        found = await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG))
        return [ResolveResult(hostname=host, host=_numeric(address), port=int(address[1]), family=kind, proto=protocol,
                              flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)
                for kind, _, protocol, _, address in found]

    async def close(self) -> None:
        """Nothing: the threads belong to the caller."""


def _numeric(address: tuple[object, ...]) -> str:
    """The host of a socket address; link-local ones with their scope."""
    host = str(address[0])
    return f"{host}%{address[3]}" if len(address) == 4 and address[3] and "%" not in host else host


class _CheckedResolver(AbstractResolver):
    """Leaves out addresses that a check refuses."""

    def __init__(self, inner: AbstractResolver, check: AddressCheck) -> None:
        self._inner = inner
        self._check = check

    async def resolve(self, host: str, port: int = 0,
                      family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """The addresses of a host that are allowed. Raises OSError; AddressForbidden if there are only others."""
        allowed, refused = [], None
        for found in await self._inner.resolve(host, port, family):
            try:
                self._check(found["host"], found["port"])
                allowed.append(found)
            except AddressForbidden as e:
                refused = e
        if refused is not None and not allowed:
            raise refused
        return allowed

    async def close(self) -> None:
        """Nothing: the inner one belongs to the caller."""


class Sender:
    """Sends messages to one target. Use as an async context manager, or `open` and `close`."""

    def __init__(self, target: Target, resolver: AbstractResolver, user_agent: str,
                 address_check: AddressCheck | None = None, wall: Callable[[], float] = time.time) -> None:
        """
        Args:
            target: where to, and how.
            resolver: looks up names.
            user_agent: for the header of this name.
            address_check: asked before every connection, besides the rule of the target.
            wall: seconds since 1970, for signatures.

        Raises:
            ValueError: the target's URL or a secret of it is not usable; the message shows neither.
        """
        url = URL(target.url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"the URL of destination {target.destination!r} is not http:// or https:// with a host")
        # The target's headers may not forge what the dispatcher says, either.
        own = {name: value for name, value in message_headers(dict(target.headers)).items()
               if name.lower() not in SIGNATURE_HEADERS}
        names = {name.lower() for name in own}
        if url.user is not None and "authorization" not in names:
            # aiohttp refuses a request that has credentials both in its URL and in a header, which is the tenant's to set.
            own["Authorization"] = aiohttp.encode_basic_auth(url.user, url.password or "")
            names.add("authorization")
        self.url = url.with_user(None)
        self._own = own
        self._withheld = _CREDENTIALS | names - _FOR_ANYBODY
        self._signer = Signer(target.signing_secrets) if target.signing_secrets else None
        self._replaced = names | SIGNATURE_HEADERS if self._signer is not None else names
        self._headers = {"User-Agent": user_agent}
        self._timeout = target.timeout
        self._redirects_max = target.redirects_max
        self._connections = target.concurrency_max
        self._checks: list[AddressCheck] = [] if target.allow_private_addresses else [check_public]
        if address_check is not None:
            self._checks.append(address_check)
        self._resolver = _CheckedResolver(resolver, self._check)
        self._wall = wall
        self._session: aiohttp.ClientSession | None = None
        self._under_way = 0
        self._idle = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Sender: {self._under_way} requests under way>"

    def open(self) -> None:
        """Makes it ready to send. Needs a running event loop."""
        connector = aiohttp.TCPConnector(
            limit=self._connections, resolver=self._resolver, ttl_dns_cache=DNS_SECONDS, keepalive_timeout=IDLE_SECONDS,
            socket_factory=self._open_socket)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),  # cookies would carry one tenant's session into another's requests
            auto_decompress=False,  # bodies are dropped: never unpack a bomb
            skip_auto_headers=("Accept-Encoding", "Content-Type"),
            trust_env=False)  # a proxy from the environment would connect where the checks do not see it

    async def close(self) -> None:
        """Closes its connections. What is under way fails."""
        if self._session is not None:
            await self._session.close()

    async def retire(self) -> None:
        """Closes once nothing is under way."""
        while self._under_way:
            self._idle.clear()
            await self._idle.wait()
        await self.close()

    async def __aenter__(self) -> Self:
        self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    def _check(self, address: str, port: int) -> None:
        for check in self._checks:
            check(address, port)

    def _open_socket(self, address: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
        family, kind, protocol, _, where = address
        port = where[1]
        assert isinstance(port, int)
        self._check(str(where[0]), port)
        return socket.socket(family, kind, protocol)

    async def post(self, payload: bytes, headers: Mapping[str, str]) -> Answer:
        """Sends one message and waits for the whole answer, of the last request if redirects are followed, within the
        target's timeout; never raises but for cancellation and bugs.

        Args:
            payload: the body.
            headers: `request_headers` of the message; those of the target and signatures are added.
        """
        self._under_way += 1
        try:
            return await self._post(payload, self._all_headers(payload, headers))
        finally:
            self._under_way -= 1
            self._idle.set()

    def _all_headers(self, payload: bytes, headers: Mapping[str, str]) -> Mapping[str, str]:
        if not self._replaced:
            return headers
        out = {name: value for name, value in headers.items() if name.lower() not in self._replaced}
        out.update(self._own)
        if self._signer is not None:
            out.update(self._signer.headers(headers["Spillway-Message-Id"], payload, self._wall()))
        return out

    async def _post(self, payload: bytes, headers: Mapping[str, str]) -> Answer:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        url = self.url
        for redirects_left in range(self._redirects_max, -1, -1):
            answer = await self._post_once(url, payload, headers, max(deadline - loop.time(), SECONDS_MIN))
            if answer.status not in _FOLLOWED or not self._redirects_max:
                return answer
            if not redirects_left:
                return Answer(0, failure=Failure.REDIRECT, detail=f"more than {self._redirects_max}")
            to = _redirected(url, answer.headers.get("Location"))
            if isinstance(to, str):
                return Answer(0, failure=Failure.REDIRECT, detail=to)
            if to.origin() != url.origin():
                headers = {name: value for name, value in headers.items() if name.lower() not in self._withheld}
            url = to
        raise AssertionError("a redirect beyond the last was answered above")

    async def _post_once(self, url: URL, payload: bytes, headers: Mapping[str, str], seconds: float) -> Answer:
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=seconds, connect=min(self._timeout / 2, CONNECT_SECONDS_MAX))
        try:
            async with self._session.post(url, data=payload, headers=headers, allow_redirects=False,
                                          timeout=timeout) as response:
                size = 0
                async for chunk in response.content.iter_any():
                    size += len(chunk)
                    if size > RESPONSE_BYTES_MAX:
                        response.close()
                        break
                return Answer(response.status, response.headers)
        except aiohttp.ConnectionTimeoutError:
            return Answer(0, failure=Failure.CONNECT_TIMEOUT)
        except TimeoutError:
            return Answer(0, failure=Failure.TIMEOUT)
        except aiohttp.ClientConnectorError as e:
            cause = e.os_error
            if isinstance(cause, AddressForbidden):
                return Answer(0, failure=Failure.FORBIDDEN, detail=str(cause))
            return Answer(0, failure=Failure.CONNECT, detail=type(cause).__name__)
        except aiohttp.InvalidURL:
            return Answer(0, failure=Failure.CONNECT, detail="unusable host")
        except (aiohttp.ClientError, OSError, ValueError) as e:  # ValueError: an answer that is hardly HTTP
            return Answer(0, failure=Failure.BROKEN, detail=type(e).__name__)


def _redirected(url: URL, location: str | None) -> URL | str:
    """Where a redirect leads, without credentials; or why it is not followed. Its addresses are checked on connecting."""
    if not location:
        return "no Location"
    try:
        to = url.join(URL(location)).with_fragment(None)
        if to.scheme not in ("http", "https") or not to.host:
            return "not to http:// or https:// with a host"
        to = to.with_user(None)
        to.origin()
    except ValueError:
        return "unusable Location"
    if url.scheme == "https" and to.scheme != "https":
        return "from https:// to http://"
    return to
