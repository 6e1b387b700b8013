"""Destinations, routes, and what became of messages. Any node serves any call; failed calls go to another node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
from spillway.client.admin_wire import (
    count,
    dead_letter_from_pb,
    destination_from_pb,
    destination_to_pb,
    duration,
    explanation_from_pb,
    gate_from_pb,
    peeked_from_pb,
    route_from_pb,
    route_to_pb,
    scope_to_pb,
    stats_from_pb,
    token_from_pb,
)
from spillway.client.calls import TIMEOUT_SECONDS, Calls, translated
from spillway.client.connection import Channels, answers
from spillway.client.errors import (
    DestinationNotFound,
    InvalidArgument,
    NotFound,
    RouteNotFound,
    Unavailable,
)
from spillway.client.model import (
    DeadLetter,
    Destination,
    DestinationStats,
    Explanation,
    Gate,
    Peek,
    Purged,
    RedriveProgress,
    Route,
    TenantStats,
    Token,
    TokenScope,
    TopTenants,
)
from spillway.client.retry import Backoff
from spillway.client.streams import QUESTION_SECONDS_MAX, SILENCE_SECONDS_MAX
from spillway.client.topology import Router
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1 import admin_service_pb2_grpc as rpc
from spillway.v1 import token_pb2

PURGE_TIMEOUT_SECONDS = 120.0
PURGE_ATTEMPT_SECONDS_MAX = 60.0  # a million queues take their time
REDRIVE_TIMEOUT_SECONDS = 60.0
PAGE_SIZE = 100

T = TypeVar("T")


class Admin(Calls):
    """Calls of AdminService. They go to one node as long as it answers, so they see what this client changed; what was changed through
    other nodes that one may learn a moment later. Every method takes `timeout` in seconds for all attempts together and raises Unavailable
    when it runs out, InvalidArgument naming a field that is refused, and what its description says. Where `tenant` and
    `key` may be given, None means all of them; a `key` needs a `tenant`."""

    def __init__(self, router: Router, channels: Channels) -> None:
        super().__init__(router, channels, rpc.AdminServiceStub)

    # -- destinations --------------------------------------------------------------------------------------------

    async def create_destination(self, destination: Destination | str, *, timeout: float = TIMEOUT_SECONDS) -> Destination:
        """Creates a destination; returns it as stored, defaults filled in. Raises AlreadyExists (also if a first attempt
        had created it and its answer was lost)."""
        request = pb.CreateDestinationRequest(destination=destination_to_pb(destination))
        response = await self._call(lambda stub, seconds: stub.CreateDestination(request, timeout=seconds), timeout)
        return destination_from_pb(response.destination)

    async def update_destination(self, destination: Destination | str, *, create: bool = False,
                                 timeout: float = TIMEOUT_SECONDS) -> Destination:
        """Replaces policy and target (of one that is missing, too, if `create`); a name alone takes the defaults. Returns
        it as stored. Raises DestinationNotFound, Conflict if its etag is set and not current."""
        request = pb.UpdateDestinationRequest(destination=destination_to_pb(destination), allow_missing=create)
        response = await self._call(lambda stub, seconds: stub.UpdateDestination(request, timeout=seconds), timeout)
        return destination_from_pb(response.destination)

    async def get_destination(self, name: str, *, timeout: float = TIMEOUT_SECONDS) -> Destination:
        """One destination. Raises DestinationNotFound."""
        request = pb.GetDestinationRequest(name=name)
        response = await self._call(lambda stub, seconds: stub.GetDestination(request, timeout=seconds), timeout)
        return destination_from_pb(response.destination)

    async def list_destinations(self, *, timeout: float = TIMEOUT_SECONDS) -> AsyncIterator[Destination]:
        """All destinations, by name, without their signing secrets, fetched in pages of 100; `timeout` is for each page."""
        request = pb.ListDestinationsRequest(page_size=PAGE_SIZE)
        async for page in self._pages(lambda stub: stub.ListDestinations, request, timeout):
            for one in page.destinations:
                yield destination_from_pb(one)

    async def destination_stats(self, name: str, *, timeout: float = TIMEOUT_SECONDS) -> DestinationStats:
        """Counts of one destination over all shards. Raises DestinationNotFound."""
        request = pb.GetDestinationStatsRequest(name=name)
        response = await self._call(lambda stub, seconds: stub.GetDestinationStats(request, timeout=seconds), timeout)
        return stats_from_pb(response)

    async def top_tenants(self, destination: str, limit: int = 10, *, timeout: float = TIMEOUT_SECONDS) -> TopTenants:
        """The tenants with the most messages waiting or leased, at most `limit` (1 to 1000). Raises
        DestinationNotFound."""
        request = pb.ListTopTenantsRequest(destination=destination, limit=_least_one("limit", limit))
        response = await self._call(lambda stub, seconds: stub.ListTopTenants(request, timeout=seconds), timeout)
        return TopTenants(tuple(TenantStats(one.tenant, one.messages, one.message_bytes) for one in response.tenants),
                          tuple(response.shards_missing))

    # -- messages ------------------------------------------------------------------------------------------------

    async def explain(self, destination: str, tenant: str | None = None, key: str | None = None, *,
                      timeout: float = TIMEOUT_SECONDS) -> Explanation:
        """Why a queue, a tenant or a destination is not moving, and when it will have drained. Raises
        DestinationNotFound."""
        request = pb.ExplainRequest(destination=destination, tenant=tenant, key=_key(tenant, key))
        response = await self._call(lambda stub, seconds: stub.Explain(request, timeout=seconds), timeout)
        return explanation_from_pb(response)

    async def peek(self, destination: str, tenant: str, key: str, limit: int = 10, *,
                   timeout: float = TIMEOUT_SECONDS) -> Peek:
        """The first messages of a queue (at most `limit`, 1 to 100, and about 1 MiB), without leasing them. Raises
        DestinationNotFound."""
        request = pb.PeekMessagesRequest(destination=destination, tenant=tenant, key=key, limit=_least_one("limit", limit))
        response = await self._call(lambda stub, seconds: stub.PeekMessages(request, timeout=seconds), timeout)
        return Peek(tuple(peeked_from_pb(one) for one in response.messages), response.count)

    async def purge(self, destination: str, tenant: str | None = None, key: str | None = None, *, dry_run: bool = False,
                    timeout: float = PURGE_TIMEOUT_SECONDS) -> Purged:
        """Removes all messages for good (dead letters stay); their leases end. Returns how many, of how many queues;
        `dry_run` only counts. What an attempt had removed whose answer was lost is not counted. Raises
        DestinationNotFound."""
        request = pb.PurgeMessagesRequest(destination=destination, tenant=tenant, key=_key(tenant, key),
                                          validate_only=dry_run)
        response = await self._call(lambda stub, seconds: stub.PurgeMessages(request, timeout=seconds), timeout,
                                    PURGE_ATTEMPT_SECONDS_MAX)
        return Purged(response.messages, response.queues)

    # -- dead letters --------------------------------------------------------------------------------------------

    async def list_dead_letters(self, destination: str, *, tenant: str | None = None,
                                timeout: float = TIMEOUT_SECONDS) -> AsyncIterator[DeadLetter]:
        """Dead letters of a destination (or of one tenant of it), oldest first per shard, in pages of 100; `timeout`
        is for each page. Raises DestinationNotFound."""
        request = pb.ListDeadLettersRequest(destination=destination, tenant=tenant, page_size=PAGE_SIZE)
        async for page in self._pages(lambda stub: stub.ListDeadLetters, request, timeout):
            for one in page.dead_letters:
                yield dead_letter_from_pb(one)

    async def purge_dead_letters(self, destination: str, tenant: str | None = None, *, dry_run: bool = False,
                                 timeout: float = PURGE_TIMEOUT_SECONDS) -> int:
        """Removes dead letters for good. Returns how many; `dry_run` only counts. What an attempt had removed whose
        answer was lost is not counted. Raises DestinationNotFound."""
        request = pb.PurgeDeadLettersRequest(destination=destination, tenant=tenant, validate_only=dry_run)
        response = await self._call(lambda stub, seconds: stub.PurgeDeadLetters(request, timeout=seconds), timeout,
                                    PURGE_ATTEMPT_SECONDS_MAX)
        return int(response.dead_letters)

    async def redrive_dead_letters(self, destination: str, tenant: str | None = None, key: str | None = None, *,
                                   messages_per_second: float = 100.0, dry_run: bool = False,
                                   timeout: float = REDRIVE_TIMEOUT_SECONDS) -> AsyncIterator[RedriveProgress]:
        """Puts dead letters back at the head of their queues, in order, at 0.1 to 100,000 per second, and says how far it
        is; `dry_run` only counts. It goes on as long as the caller iterates, and stops when the iterator is closed; a
        later call goes on from there. If the node fails, it goes on at another; `timeout` is for how long no node may
        answer. Raises DestinationNotFound, also if there is no such dead letter."""
        if not 0.1 <= messages_per_second <= 100_000:
            raise InvalidArgument("messages_per_second", f"{messages_per_second:g} is not 0.1 to 100,000")
        request = pb.RedriveDeadLettersRequest(destination=destination, tenant=tenant, key=_key(tenant, key),
                                               messages_per_second=messages_per_second, validate_only=dry_run)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        backoff = Backoff(0.05, 1.0)
        before = so_far = turn = 0  # put back: by streams that broke, and by all

        def heard() -> None:
            nonlocal deadline
            deadline = loop.time() + timeout
        while True:
            address = self._address(turn)
            turn += 1
            channel = self._channels.get(address, "control")
            call = rpc.AdminServiceStub(channel).RedriveDeadLetters(request)
            try:
                while (response := await _next(call, channel, address, heard)) is not None:
                    self._answered(address)
                    backoff.reset()
                    heard()
                    so_far = before + response.redriven
                    yield RedriveProgress(so_far, response.done)
                    if response.done:
                        return
                failure = Unavailable(f"{address} ended the stream before everything was back")
            except Unavailable as silent:
                failure = silent
            except grpc.aio.AioRpcError as error:
                failed = translated(error)
                if isinstance(failed, NotFound) and so_far:
                    yield RedriveProgress(so_far, True)  # the node that broke had put back the last one
                    return
                if not isinstance(failed, Unavailable):
                    raise failed from None
                failure = failed
            finally:
                call.cancel()
            if not dry_run:
                before = so_far
            if loop.time() > deadline:
                raise failure
            self._failed(address)
            await asyncio.sleep(backoff.next())

    # -- gates ---------------------------------------------------------------------------------------------------

    async def pause(self, destination: str, tenant: str | None = None, *, reason: str = "",
                    timeout: float = TIMEOUT_SECONDS) -> None:
        """Stops deliveries of a destination, or of one tenant there, until resumed. Leases that are out run on. `reason`
        is for people; up to 1024 bytes. Raises DestinationNotFound."""
        request = pb.PauseDeliveryRequest(destination=destination, tenant=tenant, reason=reason)
        await self._call(lambda stub, seconds: stub.PauseDelivery(request, timeout=seconds), timeout)

    async def resume(self, destination: str, tenant: str | None = None, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Undoes `pause`. Succeeds if nothing was paused. Raises DestinationNotFound."""
        request = pb.ResumeDeliveryRequest(destination=destination, tenant=tenant)
        await self._call(lambda stub, seconds: stub.ResumeDelivery(request, timeout=seconds), timeout)

    async def park(self, destination: str, tenant: str | None = None, *, seconds: float, reason: str = "",
                   timeout: float = TIMEOUT_SECONDS) -> None:
        """As `pause`, for a time: 1 ms to 7 days. Raises DestinationNotFound."""
        request = pb.ParkDeliveryRequest(destination=destination, tenant=tenant, duration=duration("seconds", seconds),
                                         reason=reason)
        await self._call(lambda stub, left: stub.ParkDelivery(request, timeout=left), timeout)

    async def unpark(self, destination: str, tenant: str | None = None, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Ends a parking at once, an operator's or one after THROTTLED or DOWN. Succeeds if nothing was parked. Raises
        DestinationNotFound."""
        request = pb.UnparkDeliveryRequest(destination=destination, tenant=tenant)
        await self._call(lambda stub, seconds: stub.UnparkDelivery(request, timeout=seconds), timeout)

    async def list_gates(self, destination: str, *, timeout: float = TIMEOUT_SECONDS) -> AsyncIterator[Gate]:
        """Everything that is paused or parked in a destination: its own gate first, then by tenant, in pages of 100;
        `timeout` is for each page. Raises DestinationNotFound."""
        request = pb.ListGatesRequest(destination=destination, page_size=PAGE_SIZE)
        async for page in self._pages(lambda stub: stub.ListGates, request, timeout):
            for one in page.gates:
                yield gate_from_pb(one)

    # -- routes --------------------------------------------------------------------------------------------------

    async def create_route(self, route: Route, *, timeout: float = TIMEOUT_SECONDS) -> Route:
        """Creates a route; returns it as stored. Raises AlreadyExists (also if a first attempt had created it and its
        answer was lost), InvalidArgument for a filter that does not parse, an unknown target or a cycle."""
        request = pb.CreateRouteRequest(route=route_to_pb(route))
        response = await self._call(lambda stub, seconds: stub.CreateRoute(request, timeout=seconds), timeout)
        return route_from_pb(response.route)

    async def update_route(self, route: Route, *, create: bool = False, timeout: float = TIMEOUT_SECONDS) -> Route:
        """Replaces a route's targets (of one that is missing, too, if `create`); returns it as stored. Raises
        RouteNotFound, Conflict if its etag is set and not current, InvalidArgument as `create_route`."""
        request = pb.UpdateRouteRequest(route=route_to_pb(route), allow_missing=create)
        response = await self._call_of_route(lambda stub, seconds: stub.UpdateRoute(request, timeout=seconds), timeout)
        return route_from_pb(response.route)

    async def get_route(self, source: str, *, timeout: float = TIMEOUT_SECONDS) -> Route:
        """One route. Raises RouteNotFound."""
        request = pb.GetRouteRequest(source=source)
        response = await self._call_of_route(lambda stub, seconds: stub.GetRoute(request, timeout=seconds), timeout)
        return route_from_pb(response.route)

    async def list_routes(self, *, timeout: float = TIMEOUT_SECONDS) -> AsyncIterator[Route]:
        """All routes, by source, fetched in pages of 100; `timeout` is for each page."""
        async for page in self._pages(lambda stub: stub.ListRoutes, pb.ListRoutesRequest(page_size=PAGE_SIZE), timeout):
            for one in page.routes:
                yield route_from_pb(one)

    async def delete_route(self, source: str, *, etag: str = "", timeout: float = TIMEOUT_SECONDS) -> None:
        """Removes a route; copies that were promised are still made. Raises RouteNotFound (also if a first attempt had
        removed it and its answer was lost), Conflict if `etag` is given and not current."""
        request = pb.DeleteRouteRequest(source=source, etag=etag)
        await self._call_of_route(lambda stub, seconds: stub.DeleteRoute(request, timeout=seconds), timeout)

    # -- tokens --------------------------------------------------------------------------------------------------

    async def create_token(self, name: str, scopes: Sequence[TokenScope], *, ttl: float | None = None, streams_max: int = 0,
                           messages_per_second: int = 0, bytes_in_flight_max: int = 0,
                           timeout: float = TIMEOUT_SECONDS) -> tuple[Token, str]:
        """Makes a token: what it is, and what clients give as `token`, which nobody can tell later. `ttl` is for how many seconds it is
        valid (None: until it is revoked); the limits are for all that uses it at one node (0: none)."""
        limits = token_pb2.TokenLimits(streams_max=count("streams_max", streams_max),
                                       messages_per_second=count("messages_per_second", messages_per_second),
                                       bytes_in_flight_max=count("bytes_in_flight_max", bytes_in_flight_max, 64))
        request = token_pb2.CreateTokenRequest(name=name, scopes=map(scope_to_pb, scopes), limits=limits,
                                               ttl=None if ttl is None else duration("ttl", ttl))
        response = await self._call(lambda stub, seconds: stub.CreateToken(request, timeout=seconds), timeout)
        return token_from_pb(response.token), response.secret

    async def list_tokens(self, *, timeout: float = TIMEOUT_SECONDS) -> AsyncIterator[Token]:
        """All tokens, by id, fetched in pages of 100; `timeout` is for each page."""
        request = token_pb2.ListTokensRequest(page_size=PAGE_SIZE)
        async for page in self._pages(lambda stub: stub.ListTokens, request, timeout):
            for one in page.tokens:
                yield token_from_pb(one)

    async def revoke_token(self, token_id: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Ends a token for good, with the streams that were opened with it. Raises NotFound."""
        request = token_pb2.RevokeTokenRequest(token_id=token_id)
        try:
            await self._call(lambda stub, seconds: stub.RevokeToken(request, timeout=seconds), timeout)
        except NotFound as error:
            raise NotFound(str(error)) from None  # no destination

    # -- inner ---------------------------------------------------------------------------------------------------

    async def _pages(self, method: Callable[[Any], Any], request: Any, timeout: float) -> AsyncIterator[Any]:
        """The pages of a list, each with a `timeout` of its own."""
        while True:
            page = await self._call(lambda stub, seconds: method(stub)(request, timeout=seconds), timeout)
            yield page
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def _call_of_route(self, call: Callable[[Any, float], Awaitable[T]], timeout: float) -> T:
        try:
            return await self._call(call, timeout)
        except DestinationNotFound as error:
            raise RouteNotFound(str(error)) from None


async def _next(call: grpc.aio.UnaryStreamCall[Any, T], channel: grpc.aio.Channel, address: str, heard: Callable[[], None]) -> T | None:
    """The next answer of a stream, None at its end. Raises Unavailable if the node hangs; one that has nothing to say for long answers
    what is easy, which is `heard`."""
    reading = asyncio.ensure_future(call.read())
    try:
        while not (await asyncio.wait((reading,), timeout=SILENCE_SECONDS_MAX))[0]:
            if await answers(channel, QUESTION_SECONDS_MAX):
                heard()
            elif not reading.done():
                raise Unavailable(f"{address} does not answer")
        response = reading.result()
        return None if response is grpc.aio.EOF else response  # type: ignore[return-value]
    finally:
        reading.cancel()


def _least_one(field: str, value: int) -> int:
    if value == 0:  # which the protocol has for its default
        raise InvalidArgument(field, "0 is less than 1")
    return count(field, value)


def _key(tenant: str | None, key: str | None) -> str | None:
    if key is not None and tenant is None:
        raise InvalidArgument("key", "needs a tenant")
    return key
