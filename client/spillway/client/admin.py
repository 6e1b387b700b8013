"""Destinations and what became of their messages. Any node serves any call; failed calls go to another node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from spillway.client.connection import Channels
from spillway.client.errors import InvalidArgument, Unavailable, from_rpc_error
from spillway.client.model import (
    DeadLetter,
    DeliveryPolicy,
    Destination,
    DestinationStats,
    HttpTarget,
    NackPolicy,
)
from spillway.client.retry import Backoff
from spillway.client.topology import Router
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1 import admin_service_pb2_grpc as rpc

TIMEOUT_SECONDS = 10.0
ATTEMPT_SECONDS_MAX = 6.0  # of the timeout, for one node: a broker waits up to 5 s for a leader
PAGE_SIZE = 100

T = TypeVar("T")


class Admin:
    """Calls of AdminService. Every method takes `timeout` in seconds for all attempts together and raises Unavailable
    when it runs out, besides what its description says."""

    def __init__(self, router: Router, channels: Channels) -> None:
        self._router = router
        self._channels = channels

    async def create_destination(self, destination: Destination | str, *, timeout: float = TIMEOUT_SECONDS) -> Destination:
        """Creates a destination; returns it as stored. Raises AlreadyExists (also if a first attempt had created it
        and its answer was lost), InvalidArgument."""
        request = pb.CreateDestinationRequest(destination=_to_pb(destination))
        response = await self._call(lambda stub, seconds: stub.CreateDestination(request, timeout=seconds), timeout)
        return _from_pb(response.destination)

    async def update_destination(self, destination: Destination, *, create: bool = False,
                                 timeout: float = TIMEOUT_SECONDS) -> Destination:
        """Replaces policy and target (of one that is missing, too, if `create`); returns it as stored. Raises
        DestinationNotFound, Conflict if its etag is set and not current, InvalidArgument."""
        request = pb.UpdateDestinationRequest(destination=_to_pb(destination), allow_missing=create)
        response = await self._call(lambda stub, seconds: stub.UpdateDestination(request, timeout=seconds), timeout)
        return _from_pb(response.destination)

    async def get_destination(self, name: str, *, timeout: float = TIMEOUT_SECONDS) -> Destination:
        """One destination. Raises DestinationNotFound."""
        request = pb.GetDestinationRequest(name=name)
        response = await self._call(lambda stub, seconds: stub.GetDestination(request, timeout=seconds), timeout)
        return _from_pb(response.destination)

    async def list_destinations(self, *, timeout: float = TIMEOUT_SECONDS) -> AsyncIterator[Destination]:
        """All destinations, by name, fetched in pages of 100; `timeout` is for each page."""
        token = ""
        while True:
            request = pb.ListDestinationsRequest(page_size=PAGE_SIZE, page_token=token)

            def call(stub: Any, seconds: float, request: pb.ListDestinationsRequest = request) -> Any:
                return stub.ListDestinations(request, timeout=seconds)

            response = await self._call(call, timeout)
            for one in response.destinations:
                yield _from_pb(one)
            token = response.next_page_token
            if not token:
                return

    async def destination_stats(self, name: str, *, timeout: float = TIMEOUT_SECONDS) -> DestinationStats:
        """Counts of one destination over all shards. Raises DestinationNotFound."""
        request = pb.GetDestinationStatsRequest(name=name)
        response = await self._call(lambda stub, seconds: stub.GetDestinationStats(request, timeout=seconds), timeout)
        stats = response.stats
        return DestinationStats(
            messages=stats.messages, leased=stats.leased, queues=stats.queues, dead_letters=stats.dead_letters,
            enqueued_total=stats.enqueued_total, acked_total=stats.acked_total,
            dead_lettered_total=stats.dead_lettered_total, retried_total=stats.retried_total,
            expired_total=stats.expired_total,
            oldest_enqueue_time=_moment(stats.oldest_enqueue_time) if stats.HasField("oldest_enqueue_time") else None,
            parked_until_time=_moment(stats.parked_until_time) if stats.HasField("parked_until_time") else None,
            parked_tenants=stats.parked_tenants, shards_missing=tuple(response.shards_missing))

    async def list_dead_letters(self, destination: str, *, tenant: str | None = None,
                                timeout: float = TIMEOUT_SECONDS) -> AsyncIterator[DeadLetter]:
        """Dead letters of a destination (or of one tenant of it), oldest first per shard, in pages of 100; `timeout`
        is for each page. Raises DestinationNotFound."""
        token = ""
        while True:
            request = pb.ListDeadLettersRequest(destination=destination, tenant=tenant, page_size=PAGE_SIZE,
                                                page_token=token)

            def call(stub: Any, seconds: float, request: pb.ListDeadLettersRequest = request) -> Any:
                return stub.ListDeadLetters(request, timeout=seconds)

            response = await self._call(call, timeout)
            for one in response.dead_letters:
                yield DeadLetter(
                    shard=one.shard, sequence=one.sequence, destination=one.destination, tenant=one.tenant, key=one.key,
                    attempts=one.attempts, reason=one.reason, enqueue_time=_moment(one.enqueue_time),
                    dead_time=_moment(one.dead_time), id=one.message.id, headers=dict(one.message.headers),
                    payload=one.message.payload)
            token = response.next_page_token
            if not token:
                return

    async def _call(self, call: Callable[[Any, float], Awaitable[T]], timeout: float) -> T:
        """One call, at one node after the other while they are UNAVAILABLE."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        backoff = Backoff(0.05, 1.0)
        last = Unavailable("no node answered in time")
        turn = 0
        while (left := deadline - loop.time()) > 0:
            address = self._address(turn)
            turn += 1
            stub = rpc.AdminServiceStub(self._channels.get(address, "control"))
            try:
                result = await call(stub, min(left, ATTEMPT_SECONDS_MAX))
            except grpc.aio.AioRpcError as error:
                translated = from_rpc_error(error)
                if not isinstance(translated, Unavailable):
                    raise translated from None
                last = translated
                self._router.health.failed(address)
                self._router.watch.suspect(address)
                await asyncio.sleep(min(backoff.next(), max(deadline - loop.time(), 0)))
            else:
                self._router.health.worked(address)
                return result
        raise last

    def _address(self, turn: int) -> str:
        addresses = self._router.watch.addresses
        order = [addresses[(turn + i) % len(addresses)] for i in range(len(addresses))]
        return next((a for a in order if self._router.health.is_up(a)), order[0])


def _duration(field: str, seconds: float) -> Duration:
    if seconds < 0:
        raise InvalidArgument(field, f"{seconds} s is negative")
    return Duration(seconds=int(seconds), nanos=round((seconds - int(seconds)) * 1e9))


def _moment(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(UTC)


def _to_pb(destination: Destination | str) -> pb.Destination:
    if isinstance(destination, str):
        return pb.Destination(name=destination)
    out = pb.Destination(name=destination.name, etag=destination.etag)
    policy = destination.policy
    out.policy.run_messages_max = policy.run_messages_max or 0
    out.policy.attempts_max = policy.attempts_max or 0
    if policy.nack_policy is not None:
        out.policy.nack_policy = pb.NackPolicy.ValueType(policy.nack_policy.value)
    for seconds, target, field in ((policy.lease_seconds, out.policy.lease_duration, "lease_seconds"),
                                   (policy.backoff_base, out.policy.backoff.base, "backoff_base"),
                                   (policy.backoff_cap, out.policy.backoff.cap, "backoff_cap"),
                                   (policy.age_max, out.policy.age_max, "age_max")):
        if seconds is not None:
            target.CopyFrom(_duration(f"policy.{field}", seconds))
    if destination.http is not None:
        out.http.url = destination.http.url
        out.http.concurrency_max = destination.http.concurrency_max or 0
        if destination.http.timeout is not None:
            out.http.timeout.CopyFrom(_duration("http.timeout", destination.http.timeout))
    return out


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _from_pb(found: pb.Destination) -> Destination:
    policy, http = found.policy, None
    if found.HasField("http"):
        http = HttpTarget(found.http.url, _seconds(found.http.timeout) if found.http.HasField("timeout") else None,
                          found.http.concurrency_max or None)
    return Destination(found.name, DeliveryPolicy(
        run_messages_max=policy.run_messages_max or None,
        lease_seconds=_seconds(policy.lease_duration) if policy.HasField("lease_duration") else None,
        backoff_base=_seconds(policy.backoff.base) if policy.backoff.HasField("base") else None,
        backoff_cap=_seconds(policy.backoff.cap) if policy.backoff.HasField("cap") else None,
        nack_policy=NackPolicy(policy.nack_policy) if policy.nack_policy else None,
        attempts_max=policy.attempts_max or None,
        age_max=_seconds(policy.age_max) if policy.HasField("age_max") else None), http, found.etag)
