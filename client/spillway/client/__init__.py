"""Spillway's Python client: asyncio first; `spillway.client.sync` has the same for threads.

    async with Client("127.0.0.1:7070") as client:
        async with client.producer() as producer:
            await producer.send("billing", b"payload", tenant="acme", key="order-1")
        async with client.consumer("billing") as consumer:
            async for message in consumer:
                async with message:
                    print(message.payload)
"""
from spillway.client.admin import Admin
from spillway.client.client import Client
from spillway.client.consumer import Consumer, ConsumerState
from spillway.client.errors import (
    AlreadyExists,
    BufferFull,
    Closed,
    Conflict,
    DestinationNotFound,
    InternalError,
    InvalidArgument,
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
    DeadLetter,
    DeliveryPolicy,
    Destination,
    DestinationStats,
    Explanation,
    Gap,
    Gate,
    GateCause,
    HttpTarget,
    Limit,
    NackPolicy,
    Peek,
    PeekedMessage,
    Purged,
    Receipt,
    Record,
    RedriveProgress,
    Retention,
    Route,
    RouteTarget,
    StallCause,
    TenantPolicy,
    TenantStats,
    TopTenants,
)
from spillway.client.outcomes import Down, Outcome, Reject, Release, Retry, Throttled
from spillway.client.producer import Producer
from spillway.client.settlements import Settlement
from spillway.client.topology import Topology

__all__ = [
    "AdaptiveLimit",
    "Admin",
    "AlreadyExists",
    "BufferFull",
    "Client",
    "Closed",
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
    "HttpTarget",
    "InternalError",
    "InvalidArgument",
    "LeasedMessage",
    "LeasedRun",
    "Limit",
    "NackPolicy",
    "NotFound",
    "Outcome",
    "OutcomeUnknown",
    "OverBudget",
    "PartialFailure",
    "Peek",
    "PeekedMessage",
    "PermissionDenied",
    "Producer",
    "Purged",
    "Receipt",
    "Record",
    "RedriveProgress",
    "Reject",
    "Release",
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
    "TopTenants",
    "Topology",
    "Unavailable",
]
