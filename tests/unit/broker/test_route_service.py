"""Routes as operators make them: what is stored, what is refused with which field, and that a refusal changes nothing."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from node_world import Context, Refused, World
from several_nodes import Asked
from spillway.broker.core import directory as d
from spillway.broker.services import pages
from spillway.broker.services.admin import AdminService
from spillway.v1 import admin_service_pb2 as pb


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node that leads everything, with three destinations."""
    made = World(tmp_path)
    made.know("a", "b", "c")
    made.host.lead()
    yield made
    await made.forwarder.close()
    made.store.close()


def route(source: str, *targets: str | pb.RouteTarget, etag: str = "") -> pb.Route:
    """A route to destinations."""
    return pb.Route(source=source, etag=etag, targets=[
        t if isinstance(t, pb.RouteTarget) else pb.RouteTarget(destination=t) for t in targets])


async def create(world: World, *args: Any, **fields: Any) -> pb.Route:
    """A route that is created."""
    answer: pb.Route = (await world.admin("CreateRoute", pb.CreateRouteRequest(route=route(*args, **fields)))).route
    return answer


async def test_a_route_is_made_read_replaced_and_removed(world: World) -> None:
    """What was sent is what is answered, rules and etags filled in; messages follow it at once."""
    made = await create(world, "s", pb.RouteTarget(destination="a", filter="tenant == 't'", over_budget=pb.OVER_BUDGET_SKIP), "b")
    assert made == pb.Route(source="s", etag=made.etag, targets=[
        pb.RouteTarget(destination="a", filter="tenant == 't'", over_budget=pb.OVER_BUDGET_SKIP),
        pb.RouteTarget(destination="b", over_budget=pb.OVER_BUDGET_REFUSE)])
    assert int(made.etag) > 0
    assert (await world.admin("GetRoute", pb.GetRouteRequest(source="s"))).route == made
    changed = (await world.admin("UpdateRoute", pb.UpdateRouteRequest(route=route("s", "c", etag=made.etag)))).route
    assert [t.destination for t in changed.targets] == ["c"] and changed.etag != made.etag
    assert (await world.admin("ListRoutes", pb.ListRoutesRequest())).routes == [changed]
    await world.put("s", b"x")
    for _ in range(20):
        world.host.turn()
    assert world.totals("c").enqueued == 1
    await world.admin("DeleteRoute", pb.DeleteRouteRequest(source="s", etag=changed.etag))
    assert not world.node.meta.directory.routes
    assert not (await world.admin("ListRoutes", pb.ListRoutesRequest())).routes
    for runtime in world.node.shards.values():
        runtime.copier.stop()


async def test_updates_may_create(world: World) -> None:
    """With allow_missing only; an etag then has nothing to fit."""
    with pytest.raises(Refused, match=r"NOT_FOUND: route\.source"):
        await world.admin("UpdateRoute", pb.UpdateRouteRequest(route=route("s", "a")))
    with pytest.raises(Refused, match=r"ABORTED: route\.etag"):
        await world.admin("UpdateRoute", pb.UpdateRouteRequest(route=route("s", "a", etag="5"), allow_missing=True))
    made = await world.admin("UpdateRoute", pb.UpdateRouteRequest(route=route("s", "a"), allow_missing=True))
    assert made.route.source == "s" and set(world.node.meta.directory.routes) == {"s"}


FILTER_ERROR = "line 1, column 1: there is no variable payload"


@pytest.mark.parametrize(("wanted", "says"), [
    (route("", "a"), "route.source: must not be empty"),
    (route("s" * 256, "a"), "route.source: has 256 bytes; at most 255"),
    (route("s*", "a"), "route.source: has a '*'"),
    (route("s\n", "a"), "route.source: has the control character"),
    (route("s"), "route.targets: has 0 targets; it must have 1 to 64"),
    (route("s", *[f"d{i}" for i in range(65)]), "route.targets: has 65 targets; it must have 1 to 64"),
    (route("s", "a", ""), r"route.targets[1].destination: must not be empty"),
    (route("s", "a", "b*"), r"route.targets[1].destination: has a '*'"),
    (route("s", "a", "b", "a"), "route.targets[2].destination: 'a' is there twice"),
    (route("s", "a", "b", "none"), "route.targets[2].destination: 'none' is neither a destination nor the source of a route"),
    (route("s", "a", "b", pb.RouteTarget(destination="c", filter="payload == 'x'")), "route.targets[2].filter: " + FILTER_ERROR),
    (route("s", pb.RouteTarget(destination="c", filter="tenant ==")), "route.targets[0].filter: line 1, column 10: Syntax error"),
    (route("s", pb.RouteTarget(destination="c", filter="x" * 4097)), "route.targets[0].filter: has 4097 bytes; at most 4096"),
    (route("s", pb.RouteTarget(destination="c", filter=" ")), "route.targets[0].filter: is empty"),
    (route("s", pb.RouteTarget(destination="c", over_budget=3)), "route.targets[0].over_budget: 3 is not a rule"),  # type: ignore[arg-type]
    (route("s", "s"), "route.targets: is a cycle of routes: s -> s"),
    (route("a", "b"), "route.source: 'a' is a destination"),
    (route("old", "inner"), "route.targets: is a cycle of routes: old -> inner -> old"),
], ids=lambda value: str(value)[:40] if isinstance(value, str) else "")
async def test_a_wrong_route_is_refused_by_its_field(world: World, wanted: pb.Route, says: str) -> None:
    """Created or replaced; and nothing has changed."""
    world.route("old", "c")
    world.route("inner", "old", "a")
    before = dict(world.node.meta.directory.routes)
    for method, request in (("CreateRoute", pb.CreateRouteRequest(route=wanted)),
                            ("UpdateRoute", pb.UpdateRouteRequest(route=wanted, allow_missing=True))):
        if method == "CreateRoute" and wanted.source == "old":
            continue
        with pytest.raises(Refused) as refused:
            await world.admin(method, request)
        assert refused.value.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INVALID_ARGUMENT.value[0])
        assert refused.value.details.startswith(says)
        assert world.node.meta.directory.routes == before


@pytest.mark.parametrize(("method", "request_", "says"), [
    ("CreateRoute", pb.CreateRouteRequest(route=route("old", "a")), "ALREADY_EXISTS: route.source"),
    ("UpdateRoute", pb.UpdateRouteRequest(route=route("old", "a", etag="77")), "ABORTED: route.etag: 77 is not current"),
    ("UpdateRoute", pb.UpdateRouteRequest(route=route("old", "a", etag="x")), "INVALID_ARGUMENT: route.etag: 'x' is not an etag"),
    ("UpdateRoute", pb.UpdateRouteRequest(route=route("none", "a")), "NOT_FOUND: route.source"),
    ("GetRoute", pb.GetRouteRequest(source="none"), "NOT_FOUND: source"),
    ("GetRoute", pb.GetRouteRequest(source=""), "INVALID_ARGUMENT: source: must not be empty"),
    ("DeleteRoute", pb.DeleteRouteRequest(source="none"), "NOT_FOUND: source"),
    ("DeleteRoute", pb.DeleteRouteRequest(source="*"), "INVALID_ARGUMENT: source"),
    ("DeleteRoute", pb.DeleteRouteRequest(source="old", etag="77"), "ABORTED: etag"),
    ("DeleteRoute", pb.DeleteRouteRequest(source="old", etag="-1"), "INVALID_ARGUMENT: etag"),
    ("DeleteRoute", pb.DeleteRouteRequest(source="old"), "INVALID_ARGUMENT: source: is a target of the route of 'outer'"),
    ("ListRoutes", pb.ListRoutesRequest(page_size=1001), "INVALID_ARGUMENT: page_size"),
    ("ListRoutes", pb.ListRoutesRequest(page_size=-1), "INVALID_ARGUMENT: page_size"),
    ("ListRoutes", pb.ListRoutesRequest(page_token="%"), "INVALID_ARGUMENT: page_token"),
    ("ListRoutes", pb.ListRoutesRequest(page_token="_w=="), "INVALID_ARGUMENT: page_token"),
    ("CreateDestination", pb.CreateDestinationRequest(destination=pb.Destination(name="old")),
     "ALREADY_EXISTS: destination.name: 'old' is the source of a route"),
], ids=lambda value: value[:30] if isinstance(value, str) else "")
async def test_a_refusal_changes_nothing(world: World, method: str, request_: Any, says: str) -> None:
    """With its status and field."""
    world.route("old", "c")
    world.route("outer", "old")
    before = dict(world.node.meta.directory.routes)
    with pytest.raises(Refused) as refused:
        await world.admin(method, request_)
    assert str(refused.value).startswith(says)
    assert world.node.meta.directory.routes == before


async def test_a_route_leads_to_so_many_destinations_only(world: World) -> None:
    """Each is a copy of every message."""
    names = [f"d{i}" for i in range(17 * 64)]
    world.know(*names)
    for i in range(17):
        world.route(f"r{i:02}", *names[i * 64:(i + 1) * 64])
    await create(world, "enough", *[f"r{i:02}" for i in range(16)])
    with pytest.raises(Refused, match="lead to 1088 destinations; at most 1024"):
        await create(world, "more", *[f"r{i:02}" for i in range(17)])


async def test_routes_are_listed_by_source_in_pages(world: World) -> None:
    """Each once; a page ends early where it grows too large for a client."""
    names = [f"s{i:03}" for i in range(30)]
    for name in reversed(names):
        world.route(name, *[d.Target(f"d{i}", "x" * 4000) for i in range(64)])
    found: list[str] = []
    sizes = []
    token = ""
    while True:
        page = await world.admin("ListRoutes", pb.ListRoutesRequest(page_size=20, page_token=token))
        found += [r.source for r in page.routes]
        sizes.append(len(page.routes))
        assert page.ByteSize() < pages.PAGE_BYTES_MAX + (300 << 10)
        if not (token := page.next_page_token):
            break
    assert found == names and max(sizes) < 20
    assert [r.source for r in (await world.admin("ListRoutes", pb.ListRoutesRequest(page_size=2))).routes] == names[:2]


async def test_many_large_routes_at_once_fit_the_log(world: World) -> None:
    """An entry of the log stays small, however many changes wait."""
    wanted = [route(f"s{i}", *[pb.RouteTarget(destination=x, filter="tenant == '" + "x" * 4000 + "'") for x in ("a", "b", "c")])
              for i in range(100)]
    largest = world.host.largest
    calls = [asyncio.ensure_future(AdminService(world.node, world.forwarder).CreateRoute(
        pb.CreateRouteRequest(route=r), Context())) for r in wanted]
    await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
        world.host.turn()
    await asyncio.gather(*calls)
    assert len(world.node.meta.directory.routes) == 100
    assert largest < world.host.largest <= (1 << 20) + 1024


class Leader:
    """The meta group's leader on another node."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, method: str) -> Any:
        async def call(request: Any, timeout: float) -> Any:
            self.calls.append((method, request))
            return getattr(pb, method + "Response")()
        return lambda *request, **options: Asked(call(*request, **options))


async def test_changes_go_to_the_meta_groups_leader() -> None:
    """As they are, once they were checked; a node that is behind asks it for a route that it does not know."""
    leader = Leader()

    async def await_meta_leader() -> str:
        return "n2"

    node: Any = SimpleNamespace(config=SimpleNamespace(node_id="n1"), meta=SimpleNamespace(
        directory=d.Directory(), rows=SimpleNamespace(applied_index=0)))
    forwarder: Any = SimpleNamespace(await_meta_leader=await_meta_leader, link=lambda _: SimpleNamespace(admin=leader))
    service = AdminService(node, forwarder)
    requests = [("CreateRoute", pb.CreateRouteRequest(route=route("s", "a"))),
                ("UpdateRoute", pb.UpdateRouteRequest(route=route("s", "a"))),
                ("GetRoute", pb.GetRouteRequest(source="s")), ("DeleteRoute", pb.DeleteRouteRequest(source="s"))]
    for method, request in requests:
        await getattr(service, method)(request, Context())
    assert leader.calls == requests
    with pytest.raises(Refused):
        await service.CreateRoute(pb.CreateRouteRequest(route=route("s")), Context())
    assert leader.calls == requests
    peer = AdminService(node, forwarder, peer=True)
    with pytest.raises(Refused, match="does not lead the meta group"):  # a call is passed on once only
        await peer.CreateRoute(requests[0][1], Context())
