"""AdminService, routes: who gets copies of what is produced to a source."""
from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from spillway.broker.core import directory as d
from spillway.broker.core.filters import FilterError, compile_filter
from spillway.broker.errors import BrokerError, NotFound, RequestError
from spillway.broker.runtime.node import Node
from spillway.broker.services.access import visible
from spillway.broker.services.changes import made_by_leader
from spillway.broker.services.fanout import COPIES_MAX
from spillway.broker.services.names import check_destination, parse_etag
from spillway.broker.services.operations import CALL_SECONDS
from spillway.broker.services.pages import page_size, take_page, token, token_name
from spillway.broker.services.status import pass_on
from spillway.v1 import admin_service_pb2 as pb

TARGETS_MAX = 64


class Routes:
    """The handlers; part of AdminService."""

    node: Node
    _meta_leader: Callable[[], Awaitable[Any]]  # the stub of the meta group's leader, None if it is this node
    _made: Callable[[Any], None]  # see AdminService

    async def CreateRoute(self, request: pb.CreateRouteRequest, context: Any) -> pb.CreateRouteResponse:
        """See admin_service.proto."""
        try:
            wanted = parse_route(request.route)
            if (stub := await self._meta_leader()) is not None:
                created: pb.CreateRouteResponse = await made_by_leader(self.node, stub.CreateRoute(request, timeout=CALL_SECONDS))
                return created
            self._check_copies(wanted)
            stored = await self.node.meta.put_route(wanted, create=True, replace=False, etag=0)
            self._made(context)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.CreateRouteResponse(route=route_proto(stored))

    async def UpdateRoute(self, request: pb.UpdateRouteRequest, context: Any) -> pb.UpdateRouteResponse:
        """See admin_service.proto."""
        try:
            wanted = parse_route(request.route)
            etag = parse_etag("route.etag", request.route.etag)
            if (stub := await self._meta_leader()) is not None:
                updated: pb.UpdateRouteResponse = await made_by_leader(self.node, stub.UpdateRoute(request, timeout=CALL_SECONDS))
                return updated
            self._check_copies(wanted)
            stored = await self.node.meta.put_route(wanted, create=request.allow_missing, replace=True, etag=etag)
            self._made(context)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.UpdateRouteResponse(route=route_proto(stored))

    async def GetRoute(self, request: pb.GetRouteRequest, context: Any) -> pb.GetRouteResponse:
        """See admin_service.proto. Only the meta group's leader can tell that there is none."""
        try:
            check_destination("source", request.source)
            stored = self.node.meta.directory.routes.get(request.source)
            if stored is None and (stub := await self._meta_leader()) is not None:
                known: pb.GetRouteResponse = await stub.GetRoute(request, timeout=CALL_SECONDS)
                return known
            stored = self.node.meta.directory.routes.get(request.source)
            if stored is None:
                raise NotFound("source", f"a route of {request.source!r} does not exist")
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.GetRouteResponse(route=route_proto(stored))

    async def ListRoutes(self, request: pb.ListRoutesRequest, context: Any) -> pb.ListRoutesResponse:
        """See admin_service.proto."""
        try:
            size = page_size(request.page_size)
            after = token_name(request.page_token)
        except BrokerError as error:
            await pass_on(context, error)
        routes = self.node.meta.directory.routes
        sources = sorted(s for s in routes if s > after and visible(s))
        page, more = take_page(sources, size, lambda source: route_proto(routes[source]))
        return pb.ListRoutesResponse(routes=page, next_page_token=token(page[-1].source.encode()) if more else "")

    async def DeleteRoute(self, request: pb.DeleteRouteRequest, context: Any) -> pb.DeleteRouteResponse:
        """See admin_service.proto."""
        try:
            check_destination("source", request.source)
            etag = parse_etag("etag", request.etag)
            if (stub := await self._meta_leader()) is not None:
                deleted: pb.DeleteRouteResponse = await made_by_leader(self.node, stub.DeleteRoute(request, timeout=CALL_SECONDS))
                return deleted
            await self.node.meta.drop_route(request.source, etag)
            self._made(context)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        return pb.DeleteRouteResponse()

    def _check_copies(self, route: d.Route) -> None:
        """Raises RequestError if a route leads to more destinations than a message may be copied to. On the meta group's
        leader. A route that comes to lead there later, as another one changes, refuses its messages."""
        routes = self.node.meta.directory.routes
        seen = {route.source}
        front = [route]
        ends: set[str] = set()
        while front:
            for target in front.pop().targets:
                name = target.destination
                if name not in routes:
                    ends.add(name)
                elif name not in seen:
                    seen.add(name)
                    front.append(routes[name])
        if len(ends) > COPIES_MAX:
            raise RequestError("route.targets", f"lead to {len(ends)} destinations; at most {COPIES_MAX}")


def parse_route(message: pb.Route) -> d.Route:
    """A route as callers send it. Raises RequestError naming the field."""
    check_destination("route.source", message.source)
    if not 1 <= len(message.targets) <= TARGETS_MAX:
        raise RequestError("route.targets", f"has {len(message.targets)} targets; it must have 1 to {TARGETS_MAX}")
    targets: dict[str, d.Target] = {}
    for number, target in enumerate(message.targets):
        field = f"route.targets[{number}]"
        check_destination(f"{field}.destination", target.destination)
        if target.destination in targets:
            raise RequestError(f"{field}.destination", f"{target.destination!r} is there twice; join the filters with ||")
        if target.filter:
            try:
                compile_filter(target.filter)
            except FilterError as error:
                raise RequestError(f"{field}.filter", str(error)) from None
        if target.over_budget not in pb.OverBudget.values():
            raise RequestError(f"{field}.over_budget", f"{target.over_budget} is not a rule of OverBudget")
        targets[target.destination] = d.Target(target.destination, target.filter, target.over_budget == pb.OVER_BUDGET_SKIP)
    return d.Route(message.source, 0, tuple(targets.values()))


def route_proto(stored: d.Route) -> pb.Route:
    """A stored route as the protocol's message."""
    return pb.Route(source=stored.source, etag=str(stored.revision), targets=[
        pb.RouteTarget(destination=t.destination, filter=t.filter,
                       over_budget=pb.OVER_BUDGET_SKIP if t.skip_over_budget else pb.OVER_BUDGET_REFUSE)
        for t in stored.targets])
