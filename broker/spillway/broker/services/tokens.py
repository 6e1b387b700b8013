"""AdminService, tokens: made, listed, revoked. The meta group's leader changes them; every node has them all."""
from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from spillway.broker.core.access import ANY, LEASE, SCOPES_MAX, Scope, Token
from spillway.broker.core.bounds import COUNT_MAX, NUMBER_MAX
from spillway.broker.errors import BrokerError, RequestError
from spillway.broker.runtime.node import Node
from spillway.broker.services.changes import made_by_leader
from spillway.broker.services.names import check_name, duration_ms
from spillway.broker.services.operations import CALL_SECONDS
from spillway.broker.services.pages import page_size, take_page, token, token_name
from spillway.broker.services.principal import make_token
from spillway.broker.services.status import pass_on
from spillway.v1 import token_pb2 as pb

TTL_MS_MIN, TTL_MS_MAX = 1000, 3650 * 86_400_000


class Tokens:
    """The handlers; part of AdminService."""

    node: Node
    _meta_leader: Callable[[], Awaitable[Any]]  # the stub of the meta group's leader, None if it is this node
    _made: Callable[[Any], None]  # see AdminService

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Any) -> pb.CreateTokenResponse:
        """See admin_service.proto."""
        try:
            token_id, text, digest = make_token()
            wanted = parse_token(request, token_id, digest, self.node.now_ms())
            if (stub := await self._meta_leader()) is not None:
                created: pb.CreateTokenResponse = await made_by_leader(self.node, stub.CreateToken(request, timeout=CALL_SECONDS))
                return created
            stored = await self.node.meta.put_token(wanted)
            self._made(context)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.CreateTokenResponse(token=token_proto(stored), secret=text)

    async def ListTokens(self, request: pb.ListTokensRequest, context: Any) -> pb.ListTokensResponse:
        """See admin_service.proto."""
        try:
            size = page_size(request.page_size)
            after = token_name(request.page_token)
        except BrokerError as error:
            await pass_on(context, error)
        known = self.node.meta.directory.tokens
        page, more = take_page(sorted(t for t in known if t > after), size, lambda token_id: token_proto(known[token_id]))
        return pb.ListTokensResponse(tokens=page, next_page_token=token(page[-1].token_id.encode()) if more else "")

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Any) -> pb.RevokeTokenResponse:
        """See admin_service.proto."""
        try:
            check_name("token_id", request.token_id)
            if (stub := await self._meta_leader()) is not None:
                revoked: pb.RevokeTokenResponse = await made_by_leader(self.node, stub.RevokeToken(request, timeout=CALL_SECONDS))
                return revoked
            await self.node.meta.drop_token(request.token_id)
            self._made(context)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.RevokeTokenResponse()


def parse_token(request: pb.CreateTokenRequest, token_id: str, digest: bytes, now: int) -> Token:
    """What a request asks for. Raises RequestError."""
    check_name("name", request.name, empty=True)
    if not 0 < len(request.scopes) <= SCOPES_MAX:
        raise RequestError("scopes", f"has {len(request.scopes)} entries; it must have 1 to {SCOPES_MAX}")
    scopes = []
    for i, scope in enumerate(request.scopes):
        if not pb.TOKEN_ACTION_PRODUCE <= scope.action <= pb.TOKEN_ACTION_ADMIN:
            raise RequestError(f"scopes[{i}].action", f"{scope.action} is none of PRODUCE, LEASE, ADMIN")
        check_name(f"scopes[{i}].destinations", scope.destinations, empty=True)
        check_name(f"scopes[{i}].tenants", scope.tenants, empty=True)
        action, tenants = scope.action - pb.TOKEN_ACTION_PRODUCE, scope.tenants if scope.HasField("tenants") else ANY
        if action == LEASE and tenants != ANY:
            raise RequestError(f"scopes[{i}].tenants", "is set in a scope to lease: a consumer gets messages of all tenants of a "
                               "destination; leave it unset")
        scopes.append(Scope(action, scope.destinations or ANY, tenants))
    expires = now + duration_ms("ttl", request.ttl, TTL_MS_MIN, TTL_MS_MAX) if request.HasField("ttl") else 0
    limits = request.limits
    for field, most in (("streams_max", COUNT_MAX), ("messages_per_second", COUNT_MAX), ("bytes_in_flight_max", NUMBER_MAX)):
        if (value := getattr(limits, field)) > most:
            raise RequestError(f"limits.{field}", f"is {value}; at most {most}")
    return Token(token_id, 0, request.name, digest, tuple(scopes), now, expires, limits.streams_max, limits.messages_per_second,
                 limits.bytes_in_flight_max)


def token_proto(stored: Token) -> pb.Token:
    """A token as clients see it."""
    out = pb.Token(token_id=stored.token_id, name=stored.name, limits=pb.TokenLimits(
        streams_max=stored.streams_max, messages_per_second=stored.messages_per_second, bytes_in_flight_max=stored.bytes_in_flight_max))
    for scope in stored.scopes:
        out.scopes.add(action=scope.action + pb.TOKEN_ACTION_PRODUCE,
                       destinations=scope.destinations, tenants=scope.tenants)
    out.create_time.FromMilliseconds(stored.created_ms)
    if stored.expires_ms:
        out.expire_time.FromMilliseconds(stored.expires_ms)
    return out
