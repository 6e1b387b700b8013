"""Who is let in at the clients' port, and what it may do there. The one place that decides, but for destinations and tenants of records
and leases, which are looked at where requests are parsed (`produce`, `queue`), with the same grants.

Two interceptors: `Authenticate` comes first and looks at nothing of the request; `Authorize` sees it parsed. Between nodes neither is
needed: the first node has asked, and the peers' port takes nodes only.
"""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from spillway.broker.core.access import ADMIN, ANY, LEASE, PRODUCE
from spillway.broker.errors import PermissionDenied, TooMuch, Unauthenticated
from spillway.broker.services.around import around
from spillway.broker.services.audit import Audit, target_of
from spillway.broker.services.principal import Authenticator, Principal, current, enter
from spillway.broker.services.quotas import Quotas, enter_quota
from spillway.broker.services.status import abort

HEALTH = "/grpc.health.v1.Health/"  # open to everybody
_ADMIN, _CLUSTER, _QUEUE = (f"/spillway.v1.{name}Service/" for name in ("Admin", "Cluster", "Queue"))
_TOKEN_ONLY = {_CLUSTER + "GetTopology", _CLUSTER + "WatchTopology"}  # what every client needs
_SOME_ADMIN = {  # whoever may administer anything; lists have only what it may see, see `visible`
    _ADMIN + "ListDestinations", _ADMIN + "ListRoutes", _CLUSTER + "GetNodeStatus", _CLUSTER + "GetClusterStatus"}
_STREAMS = {_QUEUE + "Produce": PRODUCE, _QUEUE + "Lease": LEASE, _QUEUE + "Ack": LEASE}
_READS = {*_TOKEN_ONLY, *_SOME_ADMIN, *(_ADMIN + name for name in (
    "GetDestination", "GetDestinationStats", "ListGates", "Explain", "ListTopTenants", "GetRoute", "ListTokens"))}
"""Not in the audit log. What shows payloads is there: PeekMessages, ListDeadLetters, Backup."""
Pair = tuple[str, str]  # destination, tenant; ANY: all of them


def _tenant(request: Any) -> str:
    field = request.DESCRIPTOR.fields_by_name.get("tenant")
    if field is None or (field.has_presence and not request.HasField("tenant")):
        return ANY
    return str(request.tenant)


def _route(request: Any) -> Iterable[Pair]:
    return [(request.route.source, ANY), *((target.destination, ANY) for target in request.route.targets)]


_PAIRS: dict[str, Callable[[Any], Iterable[Pair]]] = {
    **{_ADMIN + name: lambda request: [(request.destination, _tenant(request))] for name in (
        "ListDeadLetters", "PurgeDeadLetters", "RedriveDeadLetters", "PeekMessages", "PurgeMessages", "PauseDelivery", "ResumeDelivery",
        "ParkDelivery", "UnparkDelivery", "ListGates", "Explain", "ListTopTenants")},
    **{_ADMIN + name: lambda request: [(request.destination.name, ANY)] for name in ("CreateDestination", "UpdateDestination")},
    **{_ADMIN + name: lambda request: [(request.name, ANY)] for name in ("GetDestination", "GetDestinationStats")},
    **{_ADMIN + name: lambda request: [(request.source, ANY)] for name in ("GetRoute", "DeleteRoute")},
    **{_ADMIN + name: _route for name in ("CreateRoute", "UpdateRoute")},
}
"""What a call needs an admin scope for. One that is not named needs one for everything."""


def visible(destination: str) -> bool:
    """Whether whoever calls may see a destination, or a route's source, in a list."""
    grants = current().grants
    return grants is None or grants.allows(ADMIN, destination)


class _Session:
    """A stream that is open, and the task that serves it."""

    __slots__ = ("principal", "task", "timer", "why")

    def __init__(self, principal: Principal, task: asyncio.Task[Any]) -> None:
        self.principal = principal
        self.task = task
        self.why = ""  # it was ended
        self.timer: asyncio.TimerHandle | None = None

    def end(self, why: str) -> None:
        """The caller is not let in any more."""
        if not self.why:
            self.why = why
            self.task.cancel()


class Sessions:
    """All open streams of clients: they end when what let them in does."""

    def __init__(self, authenticator: Authenticator, wall: Callable[[], float]) -> None:
        self._authenticator = authenticator
        self._wall = wall
        self._open: set[_Session] = set()

    def open(self, principal: Principal) -> _Session:
        """The task that runs serves a stream."""
        task = asyncio.current_task()
        assert task is not None
        session = _Session(principal, task)
        self._open.add(session)
        if principal.expires:
            session.timer = asyncio.get_running_loop().call_later(
                max(0.0, principal.expires - self._wall()), session.end, "the token has expired")
        return session

    def close(self, session: _Session) -> None:
        """It is served no more."""
        self._open.discard(session)
        if session.timer is not None:
            session.timer.cancel()

    def recheck(self) -> None:
        """Tokens, or what they are verified with, have changed: ends the streams of those that are not valid any more."""
        for session in list(self._open):
            if why := self._authenticator.refusal(session.principal):
                session.end(why)


class Authenticate(grpc.aio.ServerInterceptor):
    """Lets nobody in who does not say who it is."""

    def __init__(self, authenticator: Authenticator, sessions: Sessions, quotas: Quotas, audit: Audit) -> None:
        self._authenticator = authenticator
        self._sessions = sessions
        self._quotas = quotas
        self._audit = audit

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(HEALTH):
            return handler
        streams = handler.request_streaming or handler.response_streaming

        @asynccontextmanager
        async def guard(request: Any, context: Any) -> AsyncIterator[None]:
            try:
                principal = await self._authenticator.identify(context)
            except Unauthenticated as error:
                self._audit.refused("unknown", context, method, "", "UNAUTHENTICATED", str(error))
                await abort(context, error)
            enter(principal)
            if not streams:
                yield
                return
            try:
                quota = self._quotas.open(context.peer(), principal)
            except TooMuch as error:
                self._audit.refused(principal.name, context, method, "", "RESOURCE_EXHAUSTED", str(error))
                await abort(context, error)
            enter_quota(quota)
            session = self._sessions.open(principal)
            try:
                yield
            except asyncio.CancelledError:
                if not session.why:
                    raise
                session.task.uncancel()
                self._audit.refused(principal.name, context, method, "", "UNAUTHENTICATED", session.why)
                await abort(context, Unauthenticated(session.why))
            finally:
                self._sessions.close(session)
                if quota is not None:
                    quota.end()
        return around(handler, guard)


class Authorize(grpc.aio.ServerInterceptor):
    """Refuses what the caller's grants do not allow, and keeps the audit log."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith((_ADMIN, _CLUSTER, _QUEUE)):
            return handler
        audited = method not in _READS and method not in _STREAMS

        @asynccontextmanager
        async def guard(request: Any, context: Any) -> AsyncIterator[None]:
            target = target_of(request) if audited else ""
            try:
                check(method, request, current())
            except PermissionDenied as error:
                self._audit.refused(current().name, context, method, target, "PERMISSION_DENIED", str(error))
                await abort(context, error)
            if not audited:
                yield
                return
            result = "OK"
            try:
                yield
            except asyncio.CancelledError:
                result = "CANCELLED"
                raise
            except BaseException:
                result = _code(context)
                raise
            finally:
                self._audit.done(current().name, context, method, target, result)
        return around(handler, guard)


def check(method: str, request: Any, principal: Principal) -> None:
    """Raises PermissionDenied if a principal may not make a call; of streams, if it may not open them at all."""
    grants = principal.grants
    if grants is None or method in _TOKEN_ONLY:
        return
    if (action := _STREAMS.get(method)) is not None:
        if not grants.some(action):
            raise PermissionDenied(f"{principal.name} has no {'produce' if action == PRODUCE else 'lease'} scope")
        return
    if method in _SOME_ADMIN:
        if not grants.some(ADMIN):
            raise PermissionDenied(f"{principal.name} has no admin scope")
        return
    for destination, tenant in _PAIRS[method](request) if method in _PAIRS else ((ANY, ANY),):
        if not grants.allows(ADMIN, destination, tenant):
            raise denied(principal, "admin", destination, tenant)


def denied(principal: Principal, action: str, destination: str, tenant: str = ANY) -> PermissionDenied:
    """The error for what a scope is missing for."""
    where = "everything" if destination == tenant == ANY and action == "admin" else "destination " + repr(destination[:300]) + (
        "" if action == "lease" else " with all its tenants" if tenant == ANY else f", tenant {tenant[:300]!r}")
    return PermissionDenied(f"{principal.name} has no {action} scope for {where}")


def _code(context: Any) -> str:
    code = context.code()
    for known in grpc.StatusCode:
        if code in (known, known.value[0]):
            return str(known.name)
    return "UNKNOWN"
