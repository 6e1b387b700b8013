"""One HTTP endpoint: connections, timeouts, limits; requests in, answers or kinds of failure out.

Each destination has a sender of its own, with its own connections: nothing that one endpoint does (hang, fill its
pool, answer without end) can be felt at another. Only the threads that look up names are shared; they are many,
and there is at most one lookup per sender at a time.
"""
from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from spillway.client.dispatcher.outcome import Failure
from spillway.client.dispatcher.source import Target
from yarl import URL

RESPONSE_BYTES_MAX = 64 << 10  # of a body that nobody reads: more, and the connection is closed instead of reused
CONNECT_SECONDS_MAX = 10.0  # of the timeout, at most this and at most half may go into connecting
DNS_SECONDS = 10  # how long an address is kept: endpoints move
IDLE_SECONDS = 30.0  # how long an unused connection is kept

AddressCheck = Callable[[str, int], None]
"""Called with the numeric address and port of every connection right before it is made, after names were resolved,
so that no name can lead past it; raises AddressForbidden."""

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class AddressForbidden(OSError):
    """An AddressCheck refused the address."""


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


class Sender:
    """Sends messages to one target. Use as an async context manager."""

    def __init__(self, target: Target, resolver: AbstractResolver, user_agent: str,
                 address_check: AddressCheck | None = None) -> None:
        """Raises ValueError if the target's URL is not usable."""
        url = URL(target.url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"the URL of destination {target.destination!r} is not http:// or https:// with a host")
        # aiohttp refuses a request that has credentials both in its URL and in a header, which is the tenant's to set.
        self._authorization = "" if url.user is None else aiohttp.encode_basic_auth(url.user, url.password or "")
        self.url = url.with_user(None)
        self._headers = {"User-Agent": user_agent}
        self._timeout = aiohttp.ClientTimeout(total=target.timeout, connect=min(target.timeout / 2, CONNECT_SECONDS_MAX))
        self._connections = target.concurrency_max
        self._resolver = resolver
        self._address_check = address_check
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            limit=self._connections, resolver=self._resolver, ttl_dns_cache=DNS_SECONDS, keepalive_timeout=IDLE_SECONDS,
            socket_factory=self._open_socket)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=self._timeout, headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),  # cookies would carry one tenant's session into another's requests
            auto_decompress=False,  # bodies are dropped: never unpack a bomb
            skip_auto_headers=("Accept-Encoding", "Content-Type"), trust_env=False)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        assert self._session is not None
        await self._session.close()

    def _open_socket(self, address: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
        family, kind, protocol, _, where = address
        if self._address_check is not None:
            port = where[1]
            assert isinstance(port, int)
            self._address_check(str(where[0]), port)
        return socket.socket(family, kind, protocol)

    async def post(self, payload: bytes, headers: Mapping[str, str]) -> Answer:
        """Sends one message and waits for the whole answer; never raises but for cancellation and bugs."""
        assert self._session is not None
        if self._authorization:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            headers["Authorization"] = self._authorization
        try:
            async with self._session.post(self.url, data=payload, headers=headers, allow_redirects=False) as response:
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
                return Answer(0, failure=Failure.FORBIDDEN)
            return Answer(0, failure=Failure.CONNECT, detail=type(cause).__name__)
        except aiohttp.InvalidURL:
            return Answer(0, failure=Failure.CONNECT, detail="unusable host")
        except (aiohttp.ClientError, OSError, ValueError) as e:  # ValueError: an answer that is hardly HTTP
            return Answer(0, failure=Failure.BROKEN, detail=type(e).__name__)
