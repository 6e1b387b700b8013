"""What a call needs, for every call that there is; and the lists that nobody must forget to extend."""
from __future__ import annotations

from typing import Any

import pytest
from spillway.broker.core.access import ADMIN, LEASE, PRODUCE, Grants, Scope
from spillway.broker.errors import PermissionDenied
from spillway.broker.services import access
from spillway.broker.services.access import check
from spillway.broker.services.audit import target_of
from spillway.broker.services.principal import TRUSTED, Principal
from spillway.v1 import admin_service_pb2 as admin
from spillway.v1 import cluster_service_pb2 as cluster
from spillway.v1 import queue_service_pb2 as queue
from spillway.v1 import token_pb2

SERVICES = [module.DESCRIPTOR.services_by_name[name] for module, name in (
    (admin, "AdminService"), (cluster, "ClusterService"), (queue, "QueueService"))]
METHODS = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
EVERYTHING = {"/spillway.v1.AdminService/" + name for name in ("CreateToken", "ListTokens", "RevokeToken")} | {
    "/spillway.v1.ClusterService/" + name for name in ("DrainNode", "UndrainNode", "RemoveNode", "Backup")}


def who(*scopes: Scope) -> Principal:
    """A caller with scopes."""
    return Principal("x", Grants(scopes))


def empty(method: str) -> Any:
    """A request of a method."""
    return METHODS[method].input_type._concrete_class()


def test_every_call_is_in_one_list_or_needs_everything() -> None:
    """A call that is new needs everything until it is named."""
    lists = [access._TOKEN_ONLY, access._SOME_ADMIN, set(access._STREAMS), set(access._PAIRS), EVERYTHING]
    assert set().union(*lists) == METHODS.keys()
    assert sum(map(len, lists)) == len(METHODS)
    assert METHODS.keys() > access._READS


@pytest.mark.parametrize("method", METHODS)
def test_nobody_may_do_what_it_has_no_scope_for(method: str) -> None:
    """Without scopes only what every client needs; with all of a kind, what is of that kind; another node everything."""
    request = empty(method)
    check(method, request, TRUSTED)
    check(method, request, Principal("anonymous"))
    if method in access._TOKEN_ONLY:
        check(method, request, who())
        return
    needed = access._STREAMS.get(method, ADMIN)
    check(method, request, who(Scope(needed)))
    for action in (PRODUCE, LEASE, ADMIN):
        if action != needed:
            with pytest.raises(PermissionDenied, match="has no"):
                check(method, request, who(Scope(action)))
    with pytest.raises(PermissionDenied):
        check(method, request, who())


@pytest.mark.parametrize("method", sorted(EVERYTHING))
def test_what_is_about_more_than_destinations_needs_everything(method: str) -> None:
    """Nodes, backups, tokens."""
    with pytest.raises(PermissionDenied, match="no admin scope for everything"):
        check(method, empty(method), who(Scope(ADMIN, "a*"), Scope(ADMIN, "*", "t")))


def test_destinations_and_tenants_are_looked_at() -> None:
    """Of requests that name them; one that names no tenant is about all of them."""
    mine = who(Scope(ADMIN, "a*", "t*"))
    whole = who(Scope(ADMIN, "a*"))
    at = "/spillway.v1.AdminService/"
    check(at + "PauseDelivery", admin.PauseDeliveryRequest(destination="ab", tenant="t1"), mine)
    for request in (admin.PauseDeliveryRequest(destination="ab"), admin.PauseDeliveryRequest(destination="ab", tenant=""),
                    admin.PauseDeliveryRequest(destination="b", tenant="t1")):
        with pytest.raises(PermissionDenied, match=f"no admin scope for destination '{request.destination}'"):
            check(at + "PauseDelivery", request, mine)
    check(at + "PauseDelivery", admin.PauseDeliveryRequest(destination="ab"), whole)
    check(at + "PeekMessages", admin.PeekMessagesRequest(destination="ab", tenant="t"), mine)
    with pytest.raises(PermissionDenied):
        check(at + "PeekMessages", admin.PeekMessagesRequest(destination="ab"), mine)  # the tenant without a name
    route = admin.Route(source="a", targets=[admin.RouteTarget(destination="a1"), admin.RouteTarget(destination="b")])
    with pytest.raises(PermissionDenied, match="destination 'b' with all its tenants"):
        check(at + "CreateRoute", admin.CreateRouteRequest(route=route), whole)
    del route.targets[1]
    check(at + "CreateRoute", admin.CreateRouteRequest(route=route), whole)
    check(at + "UpdateDestination", admin.UpdateDestinationRequest(destination=admin.Destination(name="a")), whole)
    with pytest.raises(PermissionDenied):
        check(at + "UpdateDestination", admin.UpdateDestinationRequest(destination=admin.Destination(name="b")), whole)


def test_the_audit_log_tells_what_a_call_is_about() -> None:
    """Its names; nothing of what is secret."""
    secret = admin.Destination(name="d", http=admin.HttpTarget(url="http://u:p@h", signing_secrets=["whsec_x"]))
    assert target_of(admin.CreateDestinationRequest(destination=secret)) == "name=d"
    assert target_of(admin.PauseDeliveryRequest(destination="d", tenant="", reason="r")) == "destination=d tenant="
    assert target_of(cluster.DrainNodeRequest(node_id="n1")) == "node_id=n1"
    assert target_of(token_pb2.RevokeTokenRequest(token_id="i")) == "token_id=i"
    assert len(target_of(admin.PauseDeliveryRequest(destination="d" * 5000))) == 300
