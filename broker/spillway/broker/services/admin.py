"""AdminService: destinations, counts, dead letters. Parse, call, map."""
from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Any, NoReturn
from urllib.parse import urlsplit

import grpc
from spillway.broker.core import directory as d
from spillway.broker.core.policy import Nack, Policy
from spillway.broker.core.rows import DeadRow, sequence_of
from spillway.broker.errors import BrokerError, NotFound, RequestError, Unavailable
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.services.names import check_destination, check_name, duration_ms
from spillway.broker.services.status import abort
from spillway.contract.limits import LEASE_MS_MAX, LEASE_MS_MIN, RUN_MESSAGES_MAX
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1 import admin_service_pb2_grpc
from spillway.v1.message_pb2 import Message

PAGE_DEFAULT = 100
PAGE_MAX = 1000
CALL_SECONDS = 5.0
POLL_SECONDS = 0.02
HOUR_MS = 3_600_000
URL_BYTES_MAX = 2048


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """The handlers. One instance serves clients, one (`peer` true) the other nodes and answers for itself only."""

    def __init__(self, node: Node, forwarder: Forwarder, peer: bool = False) -> None:
        self.node = node
        self.forwarder = forwarder
        self.peer = peer

    async def CreateDestination(self, request: pb.CreateDestinationRequest, context: Any) -> pb.CreateDestinationResponse:
        """See admin_service.proto."""
        try:
            wanted = parse_destination(request.destination)
            if (stub := await self._meta_leader()) is not None:
                created: pb.CreateDestinationResponse = await stub.CreateDestination(request, timeout=CALL_SECONDS)
                return created
            stored = await self.node.meta.put(wanted, create=True, replace=False, etag=0)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await _fail(context, error)
        return pb.CreateDestinationResponse(destination=destination_proto(stored))

    async def UpdateDestination(self, request: pb.UpdateDestinationRequest, context: Any) -> pb.UpdateDestinationResponse:
        """See admin_service.proto."""
        try:
            wanted = parse_destination(request.destination)
            etag = parse_etag(request.destination.etag)
            if (stub := await self._meta_leader()) is not None:
                updated: pb.UpdateDestinationResponse = await stub.UpdateDestination(request, timeout=CALL_SECONDS)
                return updated
            stored = await self.node.meta.put(wanted, create=request.allow_missing, replace=True, etag=etag)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await _fail(context, error)
        return pb.UpdateDestinationResponse(destination=destination_proto(stored))

    async def _meta_leader(self) -> Any:
        """The stub of the meta leader, or None if it is this node."""
        leader = await self.forwarder.await_meta_leader()
        if leader == self.node.config.node_id:
            return None
        if self.peer:
            raise Unavailable("this node does not lead the meta group", leader)
        return self.forwarder.link(leader).admin

    async def GetDestination(self, request: pb.GetDestinationRequest, context: Any) -> pb.GetDestinationResponse:
        """See admin_service.proto."""
        try:
            return pb.GetDestinationResponse(destination=destination_proto(await self._known("name", request.name)))
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await _fail(context, error)

    async def _known(self, field: str, name: str) -> d.Destination:
        """A destination. Only the meta group's leader can tell that there is none: this node may be behind what another one
        has already told the caller. Raises RequestError, NotFound, Unavailable, or what the leader answers."""
        check_destination(field, name)
        deadline = asyncio.get_running_loop().time() + CALL_SECONDS
        while (known := self.node.meta.get(name)) is None:
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable("the meta group is behind on this node")
            stub = await self._meta_leader()
            if stub is None:
                if self.node.meta.get(name) is None:
                    raise NotFound(field, f"destination {name!r} does not exist")
                continue
            try:
                await stub.GetDestination(pb.GetDestinationRequest(name=name), timeout=CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise NotFound(field, f"destination {name!r} does not exist") from None
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(POLL_SECONDS)
        return known

    async def ListDestinations(self, request: pb.ListDestinationsRequest, context: Any) -> pb.ListDestinationsResponse:
        """See admin_service.proto."""
        try:
            size = _page_size(request.page_size)
            after = _page_token(request.page_token).decode(errors="replace")
            names = sorted(n for n in self.node.meta.directory.destinations if n > after)
            response = pb.ListDestinationsResponse(
                destinations=[destination_proto(self.node.meta.directory.destinations[n]) for n in names[:size]])
            if len(names) > size:
                response.next_page_token = _token(names[size - 1].encode())
            return response
        except BrokerError as error:
            await abort(context, error)

    async def GetDestinationStats(self, request: pb.GetDestinationStatsRequest,
                                  context: Any) -> pb.GetDestinationStatsResponse:
        """See admin_service.proto."""
        try:
            if not self.peer:
                await self._known("name", request.name)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await _fail(context, error)
        node = self.node
        response = pb.GetDestinationStatsResponse(stats=await self._own_stats(request.name))
        if self.peer:
            return response
        remote: dict[str, list[int]] = {}
        for shard in range(1, node.config.shards + 1):
            leader = node.leader_of(shard)
            if leader is None:
                response.shards_missing.append(shard)
            elif leader != node.config.node_id:
                remote.setdefault(leader, []).append(shard)
        answers = await asyncio.gather(
            *(self.forwarder.link(n).admin.GetDestinationStats(request, timeout=CALL_SECONDS) for n in remote),
            return_exceptions=True)
        for shards, answer in zip(remote.values(), answers, strict=True):
            if isinstance(answer, pb.GetDestinationStatsResponse):
                _add_stats(response.stats, answer.stats)
            elif isinstance(answer, grpc.aio.AioRpcError):
                response.shards_missing.extend(shards)
            else:
                raise answer
        return response

    async def _own_stats(self, name: str) -> pb.DestinationStats:
        stats = pb.DestinationStats()
        destination = name.encode()
        parked_tenants: set[bytes] = set()
        now = self.node.now_ms()
        oldest = 0
        for runtime in self.node.shards.values():
            if not runtime.leading:
                continue
            c = runtime.state.counters.get(destination)
            if c is None:
                continue
            await asyncio.sleep(0)  # looking for the oldest message may take milliseconds a shard
            stats.messages += c.messages
            stats.leased += c.leased
            stats.queues += c.queues
            stats.dead_letters += c.dead
            stats.enqueued_total += c.enqueued
            stats.acked_total += c.acked
            stats.dead_lettered_total += c.dead_lettered
            stats.retried_total += c.retried
            stats.expired_total += c.expired
            if c.messages and (head := runtime.oldest_ms(destination)):
                oldest = min(oldest or head, head)
        if oldest:
            stats.oldest_enqueue_time.FromMilliseconds(oldest)
        for scope, (until, _) in self.node.gates.items():
            if scope == destination:
                stats.parked_until_time.FromMilliseconds(max(until, now))
            elif scope.startswith(destination + b"\0"):
                parked_tenants.add(scope)
        stats.parked_tenants = len(parked_tenants)
        return stats

    async def ListDeadLetters(self, request: pb.ListDeadLettersRequest, context: Any) -> pb.ListDeadLettersResponse:
        """See admin_service.proto. Pages go shard by shard; a page may end early where a shard does."""
        try:
            if not self.peer:
                await self._known("destination", request.destination)
            tenant = request.tenant if request.HasField("tenant") else None
            if tenant is not None:
                check_name("tenant", tenant, empty=True)
            size = _page_size(request.page_size)
            shard, after = _dead_token(request.page_token, self.node.config.shards)
            response = await self._dead_page(request, tenant, size, shard, after)
            while not response.dead_letters and response.next_page_token and not self.peer:
                shard, after = _dead_token(response.next_page_token, self.node.config.shards)
                response = await self._dead_page(request, tenant, size, shard, after)
            return response
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await _fail(context, error)

    async def _dead_page(self, request: pb.ListDeadLettersRequest, tenant: str | None, size: int, shard: int,
                         after: bytes) -> pb.ListDeadLettersResponse:
        """One page of one shard, from its leader; may be empty. Raises Unavailable."""
        leader = await self.forwarder.await_leader(shard)
        if leader != self.node.config.node_id:
            if self.peer:
                raise Unavailable(f"this node does not lead shard {shard}", leader)
            forwarded = pb.ListDeadLettersRequest()
            forwarded.CopyFrom(request)
            forwarded.page_token = _token(shard.to_bytes(4, "big") + after)
            page: pb.ListDeadLettersResponse = await self.forwarder.link(leader).admin.ListDeadLetters(
                forwarded, timeout=CALL_SECONDS)
            return page
        found = self.node.shards[shard].state.dead_letters(
            request.destination.encode(), None if tenant is None else tenant.encode(), after, size)
        response = pb.ListDeadLettersResponse(dead_letters=[_dead_letter(shard, key, row) for key, row in found])
        if len(found) == size:
            response.next_page_token = _token(shard.to_bytes(4, "big") + found[-1][0])
        elif shard < self.node.config.shards:
            response.next_page_token = _token((shard + 1).to_bytes(4, "big"))
        return response


async def _fail(context: Any, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AioRpcError):  # another node's answer, passed on with its details
        await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
        raise AssertionError("abort returned")
    await abort(context, error)


def parse_etag(etag: str) -> int:
    """The revision that an etag stands for; 0 for none. Raises RequestError."""
    if not etag:
        return 0
    if not (etag.isascii() and etag.isdigit() and len(etag) < 20 and int(etag)):
        raise RequestError("destination.etag", f"{etag[:64]!r} is not an etag of this cluster")
    return int(etag)


def parse_destination(message: pb.Destination) -> d.Destination:
    """A destination as callers send it, defaults filled in. Raises RequestError naming the field."""
    check_destination("destination.name", message.name)
    p = message.policy
    default = Policy()
    run = p.run_messages_max or default.run_messages_max
    if run > RUN_MESSAGES_MAX:
        raise RequestError("destination.policy.run_messages_max", f"is {run}; at most {RUN_MESSAGES_MAX}")
    lease = default.lease_ms
    if p.HasField("lease_duration"):
        lease = duration_ms("destination.policy.lease_duration", p.lease_duration, LEASE_MS_MIN, LEASE_MS_MAX)
    base, cap = default.backoff_base_ms, default.backoff_cap_ms
    if p.backoff.HasField("base"):
        base = duration_ms("destination.policy.backoff.base", p.backoff.base, 1, HOUR_MS)
        cap = max(cap, base)
    if p.backoff.HasField("cap"):
        cap = duration_ms("destination.policy.backoff.cap", p.backoff.cap, base, 24 * HOUR_MS)
    if p.nack_policy not in pb.NackPolicy.values():
        raise RequestError("destination.policy.nack_policy", f"{p.nack_policy} is not a nack policy")
    nack = Nack(p.nack_policy or pb.NACK_POLICY_BLOCK)
    age = 0
    if p.HasField("age_max"):
        age = duration_ms("destination.policy.age_max", p.age_max, 1, 366 * 24 * HOUR_MS)
    if p.attempts_max > 1000:
        raise RequestError("destination.policy.attempts_max", f"is {p.attempts_max}; at most 1000")
    if nack is Nack.BLOCK_UNTIL and not p.attempts_max and not age:
        raise RequestError("destination.policy.attempts_max", "BLOCK_UNTIL needs attempts_max or age_max")
    if nack is not Nack.BLOCK_UNTIL and (p.attempts_max or age):
        raise RequestError("destination.policy.nack_policy", "attempts_max and age_max are for BLOCK_UNTIL only")
    policy = Policy(run, lease, base, cap, nack, p.attempts_max, age)
    return d.destination(message.name, policy, _parse_http(message.http) if message.HasField("http") else None)


def _parse_http(http: pb.HttpTarget) -> d.HttpTarget:
    field = "destination.http.url"
    if len(http.url.encode()) > URL_BYTES_MAX:
        raise RequestError(field, f"has more than {URL_BYTES_MAX} bytes")
    try:
        parts = urlsplit(http.url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not http.url.isprintable() or " " in http.url:
        raise RequestError(field, f"{http.url!r} is not an http:// or https:// URL")
    default = d.HttpTarget("")
    timeout = default.timeout_ms
    if http.HasField("timeout"):
        timeout = duration_ms("destination.http.timeout", http.timeout, 100, 600_000)
    if http.concurrency_max > 1024:
        raise RequestError("destination.http.concurrency_max", f"is {http.concurrency_max}; at most 1024")
    return d.HttpTarget(http.url, timeout, http.concurrency_max or default.concurrency_max)


def destination_proto(stored: d.Destination) -> pb.Destination:
    """A stored destination as the protocol's message."""
    message = pb.Destination(name=stored.name, etag=str(stored.revision))
    p = message.policy
    p.run_messages_max = stored.run_messages_max
    p.lease_duration.FromMilliseconds(stored.lease_ms)
    p.backoff.base.FromMilliseconds(stored.backoff_base_ms)
    p.backoff.cap.FromMilliseconds(stored.backoff_cap_ms)
    p.nack_policy = stored.nack  # type: ignore[assignment]
    p.attempts_max = stored.attempts_max
    if stored.age_ms_max:
        p.age_max.FromMilliseconds(stored.age_ms_max)
    if stored.http is not None:
        message.http.url = stored.http.url
        message.http.timeout.FromMilliseconds(stored.http.timeout_ms)
        message.http.concurrency_max = stored.http.concurrency_max
    return message


def _add_stats(total: pb.DestinationStats, part: pb.DestinationStats) -> None:
    for field in ("messages", "leased", "queues", "dead_letters", "enqueued_total", "acked_total", "dead_lettered_total",
                  "retried_total", "expired_total"):
        setattr(total, field, getattr(total, field) + getattr(part, field))
    total.parked_tenants = max(total.parked_tenants, part.parked_tenants)
    if part.HasField("oldest_enqueue_time") and (
            not total.HasField("oldest_enqueue_time")
            or part.oldest_enqueue_time.ToMilliseconds() < total.oldest_enqueue_time.ToMilliseconds()):
        total.oldest_enqueue_time.CopyFrom(part.oldest_enqueue_time)
    if part.HasField("parked_until_time") and (
            part.parked_until_time.ToMilliseconds() > total.parked_until_time.ToMilliseconds()):
        total.parked_until_time.CopyFrom(part.parked_until_time)


def _dead_letter(shard: int, key: bytes, row: DeadRow) -> pb.DeadLetter:
    destination, tenant, name = row.queue.decode().split("\0")
    letter = pb.DeadLetter(shard=shard, sequence=sequence_of(key), destination=destination, tenant=tenant, key=name,
                           attempts=row.attempts, reason=row.reason, message=Message.FromString(row.body))
    letter.enqueue_time.FromMilliseconds(row.enqueue_ms)
    letter.dead_time.FromMilliseconds(row.dead_ms)
    return letter


def _page_size(size: int) -> int:
    if not 0 <= size <= PAGE_MAX:
        raise RequestError("page_size", f"is {size}; it must be 0 to {PAGE_MAX}")
    return size or PAGE_DEFAULT


def _token(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode()


def _page_token(token: str) -> bytes:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("page_token", "is not one of this service; start from an empty one") from None


def _dead_token(token: str, shards: int) -> tuple[int, bytes]:
    raw = _page_token(token)
    if not raw:
        return 1, b""
    shard = int.from_bytes(raw[:4], "big")
    if len(raw) < 4 or not 1 <= shard <= shards:
        raise RequestError("page_token", "is not one of this service; start from an empty one")
    return shard, raw[4:]
