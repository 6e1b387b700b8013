"""Spillway's Python client: asyncio first; `spillway.client.sync` has the same for threads.

    async with Client("127.0.0.1:7070") as client:
        async with client.producer() as producer:
            await producer.send("billing", b"payload", tenant="acme", key="order-1")
        async with client.consumer("billing") as consumer:
            async for message in consumer:
                async with message:
                    print(message.payload)

The parts are imported when they are asked for first: the command line must not load gRPC to print its help.
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spillway.client.admin import Admin
    from spillway.client.backup import verify_backup
    from spillway.client.client import Client
    from spillway.client.cluster import Cluster
    from spillway.client.consumer import Consumer, ConsumerState
    from spillway.client.errors import (
        AlreadyExists,
        BackupError,
        BufferFull,
        Closed,
        Conflict,
        DestinationNotFound,
        InternalError,
        InvalidArgument,
        NodeNotFound,
        NotFound,
        OutcomeUnknown,
        OverBudget,
        PartialFailure,
        PermissionDenied,
        ResourceExhausted,
        RouteNotFound,
        SendTimeout,
        SpillwayError,
        StaleLease,
        Unavailable,
    )
    from spillway.client.leases import LeasedMessage, LeasedRun
    from spillway.client.model import (
        AdaptiveLimit,
        BackupProgress,
        ClusterStatus,
        DeadLetter,
        DeliveryPolicy,
        Destination,
        DestinationStats,
        Explanation,
        Gap,
        Gate,
        GateCause,
        GroupReport,
        HttpTarget,
        Limit,
        NackPolicy,
        NodeReport,
        NodeState,
        Peek,
        PeekedMessage,
        Problem,
        Purged,
        Receipt,
        Record,
        RedriveProgress,
        ReplicaReport,
        Retention,
        Route,
        RouteTarget,
        StallCause,
        TenantPolicy,
        TenantStats,
        Token,
        TokenScope,
        TopTenants,
    )
    from spillway.client.outcomes import Down, Outcome, Reject, Release, Retry, Throttled
    from spillway.client.producer import Producer
    from spillway.client.settlements import Settlement
    from spillway.client.topology import Topology
    from spillway.contract.backup import GroupFile, Manifest

# Where the names above are, once more, for `__getattr__`; a test compares the two.
_HOMES = {
    "spillway.client.admin": "Admin",
    "spillway.client.backup": "verify_backup",
    "spillway.client.client": "Client",
    "spillway.client.cluster": "Cluster",
    "spillway.client.consumer": "Consumer ConsumerState",
    "spillway.client.errors": (
        "AlreadyExists BackupError BufferFull Closed Conflict DestinationNotFound InternalError InvalidArgument NodeNotFound "
        "NotFound OutcomeUnknown OverBudget PartialFailure PermissionDenied ResourceExhausted RouteNotFound SendTimeout "
        "SpillwayError StaleLease Unavailable"),
    "spillway.client.leases": "LeasedMessage LeasedRun",
    "spillway.client.model": (
        "AdaptiveLimit BackupProgress ClusterStatus DeadLetter DeliveryPolicy Destination DestinationStats Explanation Gap Gate "
        "GateCause GroupReport HttpTarget Limit NackPolicy NodeReport NodeState Peek PeekedMessage Problem Purged Receipt Record "
        "RedriveProgress ReplicaReport Retention Route RouteTarget StallCause TenantPolicy TenantStats Token TokenScope "
        "TopTenants"),
    "spillway.client.outcomes": "Down Outcome Reject Release Retry Throttled",
    "spillway.client.producer": "Producer",
    "spillway.client.settlements": "Settlement",
    "spillway.client.topology": "Topology",
    "spillway.contract.backup": "GroupFile Manifest",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AdaptiveLimit",
    "Admin",
    "AlreadyExists",
    "BackupError",
    "BackupProgress",
    "BufferFull",
    "Client",
    "Closed",
    "Cluster",
    "ClusterStatus",
    "Conflict",
    "Consumer",
    "ConsumerState",
    "DeadLetter",
    "DeliveryPolicy",
    "Destination",
    "DestinationNotFound",
    "DestinationStats",
    "Down",
    "Explanation",
    "Gap",
    "Gate",
    "GateCause",
    "GroupFile",
    "GroupReport",
    "HttpTarget",
    "InternalError",
    "InvalidArgument",
    "LeasedMessage",
    "LeasedRun",
    "Limit",
    "Manifest",
    "NackPolicy",
    "NodeNotFound",
    "NodeReport",
    "NodeState",
    "NotFound",
    "Outcome",
    "OutcomeUnknown",
    "OverBudget",
    "PartialFailure",
    "Peek",
    "PeekedMessage",
    "PermissionDenied",
    "Problem",
    "Producer",
    "Purged",
    "Receipt",
    "Record",
    "RedriveProgress",
    "Reject",
    "Release",
    "ReplicaReport",
    "ResourceExhausted",
    "Retention",
    "Retry",
    "Route",
    "RouteNotFound",
    "RouteTarget",
    "SendTimeout",
    "Settlement",
    "SpillwayError",
    "StaleLease",
    "StallCause",
    "TenantPolicy",
    "TenantStats",
    "Throttled",
    "Token",
    "TokenScope",
    "TopTenants",
    "Topology",
    "Unavailable",
    "verify_backup",
]
