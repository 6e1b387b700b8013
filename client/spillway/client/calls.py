"""Calls that any node serves: made at the node that answered the last one (`Admin` says why), and at one after the other while they are
UNAVAILABLE, or older than the call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container
from typing import Any, TypeVar

import grpc
from spillway.client.admin_wire import python_field
from spillway.client.connection import Channels
from spillway.client.errors import InvalidArgument, SpillwayError, Unavailable, from_rpc_error
from spillway.client.retry import Backoff
from spillway.client.topology import Router

TIMEOUT_SECONDS = 10.0
ATTEMPT_SECONDS_MAX = 6.0  # of the timeout, for one node: a broker waits up to 5 s for a leader

T = TypeVar("T")


class Calls:
    """Base of Admin and Cluster."""

    def __init__(self, router: Router, channels: Channels, stub: Callable[[Any], Any]) -> None:
        """`stub` makes the service's stub from a channel."""
        self._router = router
        self._channels = channels
        self._stub = stub

    async def _call(self, call: Callable[[Any, float], Awaitable[T]], timeout: float,
                    attempt_seconds_max: float = ATTEMPT_SECONDS_MAX) -> T:
        """One call, at one node after the other while they are UNAVAILABLE. While a cluster is upgraded, some of its nodes know a call,
        and some do not."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        backoff = Backoff(0.05, 1.0)
        last = Unavailable("no node answered in time")
        turn = 0
        older: set[str] = set()
        while (left := deadline - loop.time()) > 0:
            try:
                return await self._attempt(turn, older, call, min(left, attempt_seconds_max))
            except Unavailable as error:
                last = error
                turn += 1
                await asyncio.sleep(min(backoff.next(), max(deadline - loop.time(), 0)))
        raise last

    async def _attempt(self, turn: int, older: set[str], call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """One call at one node, of those that are up the next one with each turn; the stub is its first argument. `older`: addresses of
        nodes that do not know it, which are left out while there are others; added to."""
        address = self._address(turn, older)
        try:
            result = await call(self._stub(self._channels.get(address, "control")), *arguments)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                older.add(address)
                if not older.issuperset(self._router.watch.addresses):
                    raise Unavailable(f"the node at {address} is of an older version, which does not know this call") from None
            found = translated(error)
            if isinstance(found, Unavailable):
                self._failed(address)
            raise found from None
        self._answered(address)
        return result

    def _answered(self, address: str) -> None:
        self._router.health.worked(address)
        self._router.answered = address

    def _failed(self, address: str) -> None:
        self._router.health.failed(address)
        self._router.watch.suspect(address)

    def _address(self, turn: int, older: Container[str] = ()) -> str:
        known = sorted(self._router.watch.addresses, key=lambda address: address != self._router.answered)
        addresses = [a for a in known if a not in older] or known
        order = [addresses[(turn + i) % len(addresses)] for i in range(len(addresses))]
        return next((a for a in order if self._router.health.is_up(a)), order[0])


def translated(error: grpc.RpcError) -> SpillwayError:
    """The package's error, its field by the name that the field has in Python."""
    found = from_rpc_error(error)
    return InvalidArgument(python_field(found.field), found.description) if isinstance(found, InvalidArgument) else found
