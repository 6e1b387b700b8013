"""AdminService of the fake broker: keeps destinations, routes and gates, and notes every call."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1 import admin_service_pb2_grpc as rpc
from spillway.v1 import message_pb2 as m

PAGE = 2  # lists are short here, and have pages nevertheless


class AdminState:
    """What AdminService of all nodes shares."""

    def __init__(self) -> None:
        self.destinations: dict[str, pb.Destination] = {}
        self.routes: dict[str, pb.Route] = {}
        self.gates: dict[str, pb.Gate] = {}  # by tenant; "*" for the whole destination
        self.dead_letters = [pb.DeadLetter(shard=1, sequence=7, tenant="t", key="k", reason="broken",
                                           message=m.Message(payload=b"dead"))]
        self.explanation = pb.ExplainResponse(sentence="Nothing is wrong.", cause=pb.STALL_CAUSE_NONE)
        self.peeked = pb.PeekMessagesResponse()
        self.top = pb.ListTopTenantsResponse()
        self.purged = pb.PurgeMessagesResponse(messages=3, queues=2)
        self.stats = pb.GetDestinationStatsResponse()
        # Of each stream in turn: what is sent, then its end; the last stands for all that come later.
        self.redrives: list[tuple[list[pb.RedriveDeadLettersResponse], grpc.StatusCode | None]] = [
            ([pb.RedriveDeadLettersResponse(redriven=1, done=True)], None)]
        self.calls: list[Any] = []  # every request, in order
        self.nodes_called: list[str] = []  # the node of each
        self.redrives_cancelled = 0
        self.check: Callable[[pb.Destination], str] = lambda destination: ""  # "field: why not" of what is refused


class FakeAdmin(rpc.AdminServiceServicer):
    """The handlers; part of a fake node."""

    name: str
    admin: AdminState
    waiting: Callable[[str], int]  # destination -> messages
    answers: asyncio.Event
    patience = 0.0  # between what a redrive says

    def _note(self, request: Any) -> None:
        self.admin.calls.append(request)
        self.admin.nodes_called.append(self.name)

    async def CreateDestination(self, request: pb.CreateDestinationRequest, context: Any) -> pb.CreateDestinationResponse:
        self._note(request)
        name = request.destination.name
        if not name:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "destination.name: must not be empty")
        if name in self.admin.destinations:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{name} exists")
        self.admin.destinations[name] = request.destination
        return pb.CreateDestinationResponse(destination=request.destination)

    async def UpdateDestination(self, request: pb.UpdateDestinationRequest, context: Any) -> pb.UpdateDestinationResponse:
        self._note(request)
        name = request.destination.name
        if why_not := self.admin.check(request.destination):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why_not)
        if name not in self.admin.destinations and not request.allow_missing:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{name} does not exist")
        if request.destination.etag == "old":
            await context.abort(grpc.StatusCode.ABORTED, "the etag is not current")
        self.admin.destinations[name] = request.destination
        return pb.UpdateDestinationResponse(destination=request.destination)

    async def _find(self, name: str, context: Any) -> pb.Destination:
        if name not in self.admin.destinations:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{name} does not exist")
        return self.admin.destinations[name]

    async def GetDestination(self, request: pb.GetDestinationRequest, context: Any) -> pb.GetDestinationResponse:
        self._note(request)
        return pb.GetDestinationResponse(destination=await self._find(request.name, context))

    async def ListDestinations(self, request: pb.ListDestinationsRequest, context: Any) -> pb.ListDestinationsResponse:
        self._note(request)
        page, token = _page(sorted(self.admin.destinations), request.page_token)
        return pb.ListDestinationsResponse(destinations=[self.admin.destinations[n] for n in page], next_page_token=token)

    async def GetDestinationStats(self, request: pb.GetDestinationStatsRequest,
                                  context: Any) -> pb.GetDestinationStatsResponse:
        self._note(request)
        out = pb.GetDestinationStatsResponse()
        out.CopyFrom(self.admin.stats)
        out.stats.messages = self.waiting(request.name)
        return out

    async def ListDeadLetters(self, request: pb.ListDeadLettersRequest, context: Any) -> pb.ListDeadLettersResponse:
        self._note(request)
        found = [one for one in self.admin.dead_letters if not request.HasField("tenant") or one.tenant == request.tenant]
        for one in found:
            one.destination = request.destination
        page, token = _page(found, request.page_token)
        return pb.ListDeadLettersResponse(dead_letters=page, next_page_token=token)

    async def PurgeDeadLetters(self, request: pb.PurgeDeadLettersRequest, context: Any) -> pb.PurgeDeadLettersResponse:
        self._note(request)
        count = len(self.admin.dead_letters)
        if not request.validate_only:
            self.admin.dead_letters.clear()
        return pb.PurgeDeadLettersResponse(dead_letters=count)

    async def RedriveDeadLetters(self, request: pb.RedriveDeadLettersRequest,
                                 context: Any) -> AsyncIterator[pb.RedriveDeadLettersResponse]:
        self._note(request)
        answers, end = self.admin.redrives.pop(0) if len(self.admin.redrives) > 1 else self.admin.redrives[0]
        complete = False
        try:
            for answer in answers:
                yield answer
                await asyncio.sleep(self.patience)
                await self.answers.wait()
            complete = True
        finally:
            self.admin.redrives_cancelled += not complete
        if end is not None:
            await context.abort(end, "the end")

    async def PeekMessages(self, request: pb.PeekMessagesRequest, context: Any) -> pb.PeekMessagesResponse:
        self._note(request)
        return self.admin.peeked

    async def PurgeMessages(self, request: pb.PurgeMessagesRequest, context: Any) -> pb.PurgeMessagesResponse:
        self._note(request)
        return self.admin.purged

    async def PauseDelivery(self, request: pb.PauseDeliveryRequest, context: Any) -> pb.PauseDeliveryResponse:
        self._note(request)
        self._close(request, pb.GATE_CAUSE_PAUSED)
        return pb.PauseDeliveryResponse()

    async def ResumeDelivery(self, request: pb.ResumeDeliveryRequest, context: Any) -> pb.ResumeDeliveryResponse:
        self._note(request)
        self.admin.gates.pop(_whose(request), None)
        return pb.ResumeDeliveryResponse()

    async def ParkDelivery(self, request: pb.ParkDeliveryRequest, context: Any) -> pb.ParkDeliveryResponse:
        self._note(request)
        self._close(request, pb.GATE_CAUSE_PARKED).until_time.FromSeconds(request.duration.seconds)
        return pb.ParkDeliveryResponse()

    async def UnparkDelivery(self, request: pb.UnparkDeliveryRequest, context: Any) -> pb.UnparkDeliveryResponse:
        self._note(request)
        self.admin.gates.pop(_whose(request), None)
        return pb.UnparkDeliveryResponse()

    def _close(self, request: Any, cause: pb.GateCause) -> pb.Gate:
        gate = self.admin.gates[_whose(request)] = pb.Gate(
            tenant=request.tenant if request.HasField("tenant") else None, cause=cause, reason=request.reason)
        return gate

    async def ListGates(self, request: pb.ListGatesRequest, context: Any) -> pb.ListGatesResponse:
        self._note(request)
        page, token = _page(sorted(self.admin.gates), request.page_token)
        return pb.ListGatesResponse(gates=[self.admin.gates[n] for n in page], next_page_token=token)

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        self._note(request)
        return self.admin.explanation

    async def ListTopTenants(self, request: pb.ListTopTenantsRequest, context: Any) -> pb.ListTopTenantsResponse:
        self._note(request)
        return self.admin.top

    async def CreateRoute(self, request: pb.CreateRouteRequest, context: Any) -> pb.CreateRouteResponse:
        self._note(request)
        if request.route.source in self.admin.routes:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{request.route.source} has a route")
        return pb.CreateRouteResponse(route=await self._route(request.route, context))

    async def UpdateRoute(self, request: pb.UpdateRouteRequest, context: Any) -> pb.UpdateRouteResponse:
        self._note(request)
        if not request.allow_missing:
            await self._find_route(request.route.source, context)
        return pb.UpdateRouteResponse(route=await self._route(request.route, context))

    async def _route(self, route: pb.Route, context: Any) -> pb.Route:
        if any(target.filter == "wrong" for target in route.targets):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "route.targets[0].filter: does not parse")
        if route.etag == "old":
            await context.abort(grpc.StatusCode.ABORTED, "the etag is not current")
        self.admin.routes[route.source] = route
        return route

    async def GetRoute(self, request: pb.GetRouteRequest, context: Any) -> pb.GetRouteResponse:
        self._note(request)
        return pb.GetRouteResponse(route=await self._find_route(request.source, context))

    async def _find_route(self, source: str, context: Any) -> pb.Route:
        if source not in self.admin.routes:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{source} has no route")
        return self.admin.routes[source]

    async def ListRoutes(self, request: pb.ListRoutesRequest, context: Any) -> pb.ListRoutesResponse:
        self._note(request)
        page, token = _page(sorted(self.admin.routes), request.page_token)
        return pb.ListRoutesResponse(routes=[self.admin.routes[n] for n in page], next_page_token=token)

    async def DeleteRoute(self, request: pb.DeleteRouteRequest, context: Any) -> pb.DeleteRouteResponse:
        self._note(request)
        await self._find_route(request.source, context)
        if request.etag == "old":
            await context.abort(grpc.StatusCode.ABORTED, "the etag is not current")
        del self.admin.routes[request.source]
        return pb.DeleteRouteResponse()


def _whose(request: Any) -> str:
    return str(request.tenant) if request.HasField("tenant") else "*"


def _page(found: list[Any], token: str) -> tuple[list[Any], str]:
    start = int(token or 0)
    return found[start:start + PAGE], str(start + PAGE) if start + PAGE < len(found) else ""
