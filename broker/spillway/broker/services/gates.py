"""AdminService, gates: what operators pause and park, and what is closed after THROTTLED or DOWN.

What operators close is in the meta group; its leader changes it. What failures close belongs to the leaders of the
shards: each opens its own.
"""
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from spillway.broker.core.directory import HOLDS_MAX
from spillway.broker.errors import BrokerError, Unavailable
from spillway.broker.services.changes import made_by_leader
from spillway.broker.services.names import check_reason, duration_ms
from spillway.broker.services.operations import CALL_SECONDS, SHARDS_METADATA, Operations, metadata_of
from spillway.broker.services.pages import no_token, page_size, take_page, token, token_bytes
from spillway.broker.services.status import pass_on
from spillway.v1 import admin_service_pb2 as pb

PARK_MS_MAX = 7 * 86_400_000
EXPIRED_PER_CALL_MAX = 256
Key = tuple[bool, str, int]  # of a gate: whether it is a tenant's, which one, cause: the order in which they are listed


class Gates(Operations):
    """The handlers; part of AdminService."""

    _meta_leader: Callable[[], Awaitable[Any]]  # the stub of the meta group's leader, None if it is this node
    _made: Callable[[Any], None]  # see AdminService

    async def PauseDelivery(self, request: pb.PauseDeliveryRequest, context: Any) -> pb.PauseDeliveryResponse:
        """See admin_service.proto."""
        try:
            check_reason("reason", request.reason)
            await self._hold("PauseDelivery", request, context, pause=request.reason, paused=True)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.PauseDeliveryResponse()

    async def ResumeDelivery(self, request: pb.ResumeDeliveryRequest, context: Any) -> pb.ResumeDeliveryResponse:
        """See admin_service.proto."""
        try:
            await self._hold("ResumeDelivery", request, context, pause="")
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.ResumeDeliveryResponse()

    async def ParkDelivery(self, request: pb.ParkDeliveryRequest, context: Any) -> pb.ParkDeliveryResponse:
        """See admin_service.proto."""
        try:
            check_reason("reason", request.reason)
            wait = duration_ms("duration", request.duration if request.HasField("duration") else Duration(), 1, PARK_MS_MAX)
            await self._hold("ParkDelivery", request, context, park_until=self.node.now_ms() + wait, park_why=request.reason)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.ParkDeliveryResponse()

    async def UnparkDelivery(self, request: pb.UnparkDeliveryRequest, context: Any) -> pb.UnparkDeliveryResponse:
        """See admin_service.proto. Between nodes: with shards named, opens the gates of this node, which must lead these
        shards; without, ends the operator's parking, on the meta group's leader."""
        try:
            if self.peer and SHARDS_METADATA in dict(context.invocation_metadata()):
                self._own(await self._plan(context))
                self.node.open_gates(scope_of(request))
            else:
                await self._hold("UnparkDelivery", request, context, park_until=0)
                if not self.peer:
                    await self._stubbornly(lambda: self._open_all(request))
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.UnparkDeliveryResponse()

    async def _open_all(self, request: pb.UnparkDeliveryRequest) -> None:
        """Opens the gates of all leaders that can be reached; then raises if there are others."""
        self.node.open_gates(scope_of(request))
        plan: dict[str, list[int]] = {}
        for shard in range(1, self.node.config.shards + 1):
            if (leader := self.node.leader_of(shard)) is not None and leader != self.node.config.node_id:
                plan.setdefault(leader, []).append(shard)
        missing = self._leaderless()
        results = await asyncio.gather(*(
            self._at(node, "UnparkDelivery", request, timeout=CALL_SECONDS, metadata=metadata_of(shards))
            for node, shards in plan.items()), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        if missing:
            raise Unavailable(f"shards {missing} have no leader; what they keep closed stays so")

    async def _hold(self, method: str, request: Any, context: Any, **change: Any) -> None:
        """Makes a change (as MetaRuntime.hold has it) or has the meta group's leader do so, once it is checked whose it is.
        Raises RequestError, NotFound, Unavailable, or what the leader answers."""
        await self._check_scope(request.destination, request.tenant if request.HasField("tenant") else None, None)
        if (stub := await self._meta_leader()) is not None:
            await made_by_leader(self.node, getattr(stub, method)(request, timeout=CALL_SECONDS))
            return
        meta, now = self.node.meta, self.node.now_ms()
        if len(meta.directory.holds) >= HOLDS_MAX:  # nothing else forgets the parkings that are over
            expired = [scope for scope, hold in meta.directory.holds.items() if hold.paused is None and hold.parked_until <= now]
            await asyncio.gather(*(meta.hold(scope, park_until=0) for scope in expired[:EXPIRED_PER_CALL_MAX]))
        await meta.hold(scope_of(request), **change)
        self._made(context)

    async def ListGates(self, request: pb.ListGatesRequest, context: Any) -> pb.ListGatesResponse:
        """See admin_service.proto. Another node is told of this node's own only."""
        try:
            await self._check_scope(request.destination, None, None)
            size = page_size(request.page_size)
            after = _key_of_token(request.page_token)
            found: dict[Key, pb.Gate] = {}
            ends: list[Key] = []
            for gate in self.own_gates(request.destination):
                _merge(found, gate)
            if not self.peer:
                for gate in self._operators_gates(request.destination):
                    _merge(found, gate)
                pages: list[pb.ListGatesResponse] = await asyncio.gather(*(
                    self._at(node, "ListGates", request, timeout=CALL_SECONDS) for node in self._leaders()))
                for page in pages:
                    for gate in page.gates:
                        _merge(found, gate)
                    if page.next_page_token:  # it has others behind these, so this page ends here at the latest
                        ends.append(_key(page.gates[-1]))
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        keys = sorted(key for key in found if (after is None or key > after) and all(key <= end for end in ends))
        gates, more = take_page(keys, size, found.__getitem__)
        return pb.ListGatesResponse(gates=gates, next_page_token=_token_of(gates[-1]) if more or ends else "")

    def _operators_gates(self, destination: str) -> list[pb.Gate]:
        """What operators have paused or parked in a destination: a gate for each, even of the same scope."""
        name = destination.encode()
        now = self.node.now_ms()
        found = []
        for scope, hold in self.node.meta.directory.holds.items():
            if scope != name and not scope.startswith(name + b"\0"):
                continue
            tenant = None if scope == name else scope[len(name) + 1:].decode()
            if hold.paused is not None:
                found.append(pb.Gate(tenant=tenant, cause=pb.GATE_CAUSE_PAUSED, reason=hold.paused))
            if hold.parked_until > now:
                gate = pb.Gate(tenant=tenant, cause=pb.GATE_CAUSE_PARKED, reason=hold.parked_why)
                gate.until_time.FromMilliseconds(hold.parked_until)
                found.append(gate)
        return found


def scope_of(request: Any) -> bytes:
    """What a request is about: `destination`, or `destination NUL tenant`."""
    name: str = request.destination
    return f"{name}\0{request.tenant}".encode() if request.HasField("tenant") else name.encode()


def _key(gate: pb.Gate) -> Key:
    return gate.HasField("tenant"), gate.tenant, gate.cause


def _merge(found: dict[Key, pb.Gate], gate: pb.Gate) -> None:
    """Adds a gate that several nodes may keep: the one that opens last counts."""
    known = found.setdefault(_key(gate), gate)
    step = max(known.step, gate.step)
    if gate.until_time.ToMilliseconds() > known.until_time.ToMilliseconds():
        known.until_time.CopyFrom(gate.until_time)
    known.step = step


def _token_of(gate: pb.Gate) -> str:
    is_tenant, tenant, cause = _key(gate)
    return token(bytes((is_tenant, cause)) + tenant.encode())


def _key_of_token(text: str) -> Key | None:
    raw = token_bytes(text)
    if not raw:
        return None
    try:
        if len(raw) < 2 or raw[0] > 1:
            raise no_token()
        return bool(raw[0]), raw[2:].decode(), raw[1]
    except UnicodeDecodeError:
        raise no_token() from None
