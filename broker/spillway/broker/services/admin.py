"""AdminService: destinations, dead letters, and what its other parts serve. Parse, call, map."""
from __future__ import annotations

import asyncio
from typing import Any

import grpc
from spillway.broker.core import directory as d
from spillway.broker.core.rows import DeadRow, sequence_of
from spillway.broker.errors import BrokerError, NotFound, Unavailable
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.services.access import visible
from spillway.broker.services.changes import made_by_leader, tell_index
from spillway.broker.services.destinations import destination_proto, parse_destination
from spillway.broker.services.explain import Explain
from spillway.broker.services.gates import Gates
from spillway.broker.services.names import check_destination, check_name, parse_etag
from spillway.broker.services.operations import CALL_SECONDS
from spillway.broker.services.pages import PAGE_BYTES_MAX, no_token, page_size, take_page, token, token_bytes, token_name
from spillway.broker.services.routes import Routes
from spillway.broker.services.stats import Stats
from spillway.broker.services.status import pass_on
from spillway.broker.services.tokens import Tokens
from spillway.contract.hashing import PART
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1 import admin_service_pb2_grpc
from spillway.v1.message_pb2 import Message

POLL_SECONDS = 0.02
DEAD_LETTERS_AT_ONCE = 16  # read from the store; each may have as much as a message may


class AdminService(Explain, Gates, Routes, Stats, Tokens, admin_service_pb2_grpc.AdminServiceServicer):
    """The handlers. One instance serves clients, one (`peer` true) the other nodes and answers for itself only."""

    def __init__(self, node: Node, forwarder: Forwarder, peer: bool = False) -> None:
        self.node = node
        self.forwarder = forwarder
        self.peer = peer

    async def CreateDestination(self, request: pb.CreateDestinationRequest, context: Any) -> pb.CreateDestinationResponse:
        """See admin_service.proto."""
        try:
            wanted = parse_destination(request.destination, self.node.config.payload_bytes_max)
            if (stub := await self._meta_leader()) is not None:
                created: pb.CreateDestinationResponse = await made_by_leader(
                    self.node, stub.CreateDestination(request, timeout=CALL_SECONDS))
                return created
            stored = await self.node.meta.put(wanted, create=True, replace=False, etag=0)
            self._made(context)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.CreateDestinationResponse(destination=destination_proto(stored))

    async def UpdateDestination(self, request: pb.UpdateDestinationRequest, context: Any) -> pb.UpdateDestinationResponse:
        """See admin_service.proto."""
        try:
            wanted = parse_destination(request.destination, self.node.config.payload_bytes_max)
            etag = parse_etag("destination.etag", request.destination.etag)
            if (stub := await self._meta_leader()) is not None:
                updated: pb.UpdateDestinationResponse = await made_by_leader(
                    self.node, stub.UpdateDestination(request, timeout=CALL_SECONDS))
                return updated
            stored = await self.node.meta.put(wanted, create=request.allow_missing, replace=True, etag=etag)
            self._made(context)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.UpdateDestinationResponse(destination=destination_proto(stored))

    def _made(self, context: Any) -> None:
        """This node made a change; another one that asked for it is told."""
        if self.peer:
            tell_index(self.node, context)

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
            return pb.GetDestinationResponse(destination=destination_proto(await self.known("name", request.name)))
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)

    async def known(self, field: str, name: str) -> d.Destination:
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
            size = page_size(request.page_size)
            after = token_name(request.page_token)
        except BrokerError as error:
            await pass_on(context, error)
        known = self.node.meta.directory.destinations
        names = sorted(n for n in known if n > after and visible(n))
        page, more = take_page(names, size, lambda name: destination_proto(known[name], secrets=False))
        return pb.ListDestinationsResponse(destinations=page, next_page_token=token(page[-1].name.encode()) if more else "")

    async def ListDeadLetters(self, request: pb.ListDeadLettersRequest, context: Any) -> pb.ListDeadLettersResponse:
        """See admin_service.proto. Pages go shard by shard; a page may end early where a shard does."""
        try:
            if not self.peer:
                await self.known("destination", request.destination)
            tenant = request.tenant if request.HasField("tenant") else None
            if tenant is not None:
                check_name("tenant", tenant, empty=True)
            size = page_size(request.page_size)
            shard, after = _dead_token(request.page_token, self.node.config.shards)
            response = await self._dead_page(request, tenant, size, shard, after)
            while not response.dead_letters and response.next_page_token and not self.peer:
                shard, after = _dead_token(response.next_page_token, self.node.config.shards)
                response = await self._dead_page(request, tenant, size, shard, after)
            return response
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)

    async def _dead_page(self, request: pb.ListDeadLettersRequest, tenant: str | None, size: int, shard: int,
                         after: bytes) -> pb.ListDeadLettersResponse:
        """One page of one shard, from its leader; may be empty. Raises Unavailable."""
        leader = await self.forwarder.await_leader(shard)
        if leader != self.node.config.node_id:
            if self.peer:
                raise Unavailable(f"this node does not lead shard {shard}", leader)
            forwarded = pb.ListDeadLettersRequest()
            forwarded.CopyFrom(request)
            forwarded.page_token = token(shard.to_bytes(4, "big") + after)
            page: pb.ListDeadLettersResponse = await self._at(leader, "ListDeadLetters", forwarded, timeout=CALL_SECONDS)
            return page
        response = pb.ListDeadLettersResponse()
        bytes_left = PAGE_BYTES_MAX
        more = True
        while more and len(response.dead_letters) < size and bytes_left > 0:
            runtime = self.node.shards[shard]
            if not runtime.leading:
                raise Unavailable(f"shard {shard}: the leader changed; ask again")
            found = runtime.state.dead_letters(
                request.destination.encode(), None if tenant is None else tenant.encode(), after, DEAD_LETTERS_AT_ONCE)
            more = len(found) == DEAD_LETTERS_AT_ONCE
            for key, row in found:
                if len(response.dead_letters) == size or bytes_left <= 0:
                    more = True
                    break
                response.dead_letters.append(_dead_letter(shard, key, row))
                bytes_left -= len(row.body)
                after = key
            await asyncio.sleep(0)
        if more:
            response.next_page_token = token(shard.to_bytes(4, "big") + after)
        elif shard < self.node.config.shards:
            response.next_page_token = token((shard + 1).to_bytes(4, "big"))
        return response


def _dead_letter(shard: int, key: bytes, row: DeadRow) -> pb.DeadLetter:
    # In an unordered destination each message is a queue of its own: what the producer called it comes first.
    destination, tenant, name = row.queue.partition(PART)[0].decode().split("\0")
    letter = pb.DeadLetter(shard=shard, sequence=sequence_of(key), destination=destination, tenant=tenant, key=name,
                           attempts=row.attempts, reason=row.reason, message=Message.FromString(row.body))
    letter.enqueue_time.FromMilliseconds(row.enqueue_ms)
    letter.dead_time.FromMilliseconds(row.dead_ms)
    return letter


def _dead_token(text: str, shards: int) -> tuple[int, bytes]:
    raw = token_bytes(text)
    if not raw:
        return 1, b""
    shard = int.from_bytes(raw[:4], "big")
    if len(raw) < 4 or not 1 <= shard <= shards:
        raise no_token()
    return shard, raw[4:]
