"""Everything the client raises, and whose fault it is.

    SpillwayError
    ├── InvalidArgument          the caller's: a field is missing, too long or out of range; `field` names it
    ├── NotFound                 the caller's: what is asked for does not exist
    │   ├── DestinationNotFound  no such destination, and auto-create is off
    │   ├── NodeNotFound         no such node
    │   └── RouteNotFound        no such route
    ├── AlreadyExists            the caller's: the name is taken
    ├── Conflict                 the caller's: someone else changed the destination or route first (etag)
    ├── PermissionDenied         the caller's: no right to do this
    ├── BackupError              the caller's disk: a backup cannot be written, or what is there is none, or damaged
    ├── BufferFull               the caller is faster than the cluster: wait (`send`) or shed load
    ├── Closed                   the caller's: the producer, consumer or client is closed
    ├── Unavailable              the cluster's: nobody can serve this now; retry
    ├── ResourceExhausted        the cluster's: a disk watermark or a quota; nothing was stored, retry later
    │   └── OverBudget           the destination's, or a tenant's there: too much waits already
    ├── SendTimeout              time ran out; `outcome_unknown` says whether the record may be stored
    ├── OutcomeUnknown           the record may or may not be stored, and no retry can tell
    ├── PartialFailure           some records of a batch failed; `errors` and `receipts` say which
    ├── StaleLease               the lease expired or was taken away: the message is, or will be, someone else's
    └── InternalError            a bug, in the broker or here

gRPC's own exceptions end at `from_rpc_error`: none leaves this package.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from spillway.v1 import message_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spillway.client.model import Receipt


class SpillwayError(Exception):
    """Base of everything that this package raises on purpose."""


class InvalidArgument(SpillwayError, ValueError):
    """A field is missing, too long or out of range. `field` names it; retrying does not help."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}" if field else description)
        self.field = field
        self.description = description


class NotFound(SpillwayError):
    """What was asked for does not exist."""


class DestinationNotFound(NotFound):
    """The destination does not exist, or has nothing of what was asked for."""


class NodeNotFound(NotFound):
    """The cluster has no such node."""


class RouteNotFound(NotFound):
    """The source has no route."""


class AlreadyExists(SpillwayError):
    """The name is taken, by a destination or a route."""


class Conflict(SpillwayError):
    """The etag given is not the current one: read again, then update."""


class PermissionDenied(SpillwayError):
    """The caller may not do this."""


class BackupError(SpillwayError):
    """A backup cannot be written, or what is there is none, not complete, or damaged."""


class BufferFull(SpillwayError):
    """`in_flight_bytes_max` of unacknowledged records is reached. Nothing was queued."""


class Closed(SpillwayError):
    """The producer, consumer or client is closed."""


class Unavailable(SpillwayError):
    """No node can serve this now. Retry."""


class ResourceExhausted(SpillwayError):
    """A disk watermark or a quota was reached, or a message is too large. Nothing was stored."""


class OverBudget(ResourceExhausted):
    """The destination, or the tenant there, is over its retention budget; the message says which. The record was not stored;
    records of other destinations go on. Retry when some of what waits has been delivered."""


class SendTimeout(SpillwayError, TimeoutError):
    """The time given to a send ran out. If `outcome_unknown`, the record went out and may be, or still become,
    stored; otherwise it was never sent and is forgotten."""

    def __init__(self, description: str, *, outcome_unknown: bool) -> None:
        super().__init__(description)
        self.outcome_unknown = outcome_unknown


class OutcomeUnknown(SpillwayError):
    """The record may or may not be stored, and no retry can tell: the shard forgot this producer, or the stream
    ended for good after the record went out."""


class PartialFailure(SpillwayError):
    """Some records of a batch failed. `receipts[i]` is the receipt of record i or None; `errors` maps the position
    of every failed record to its error."""

    def __init__(self, receipts: Sequence[Receipt | None], errors: Mapping[int, SpillwayError]) -> None:
        position, error = next(iter(errors.items()))
        super().__init__(f"{len(errors)} of {len(receipts)} records failed; record {position}: {error}")
        self.receipts = receipts
        self.errors = errors


class StaleLease(SpillwayError):
    """The lease is not current any more: it expired, was superseded, or had ended. The settlement changed nothing."""


class InternalError(SpillwayError):
    """A bug, in the broker or in this package."""


def from_rpc_error(error: grpc.RpcError) -> SpillwayError:
    """The package's error for a failed call. The one place where gRPC's errors are looked into."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    details = (error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None) or str(error)
    status = grpc.StatusCode
    match code:
        case status.INVALID_ARGUMENT | status.OUT_OF_RANGE:
            field, colon, description = details.partition(": ")
            named = colon and field and " " not in field
            return InvalidArgument(field if named else "", description if named else details)
        case status.NOT_FOUND:
            return DestinationNotFound(details)
        case status.ALREADY_EXISTS:
            return AlreadyExists(details)
        case status.ABORTED:
            return Conflict(details)
        case status.PERMISSION_DENIED | status.UNAUTHENTICATED:
            return PermissionDenied(details)
        case status.RESOURCE_EXHAUSTED:
            return ResourceExhausted(details)
        case status.FAILED_PRECONDITION:
            return StaleLease(details)
        case status.UNAVAILABLE | status.CANCELLED | status.DEADLINE_EXCEEDED | None:
            return Unavailable(details)
        case status.INTERNAL | status.UNKNOWN if "from Core" in details or details == "Stream removed":
            return Unavailable(details)  # how a connection that breaks during a write looks
        case _:
            return InternalError(f"{code.name}: {details}")


def from_item_error(item: message_pb2.ItemError) -> SpillwayError:
    """The package's error for a refused item of a batch."""
    code, text = item.code, item.description
    match code:
        case message_pb2.ERROR_CODE_INVALID_ARGUMENT:
            return InvalidArgument(item.field, text)
        case message_pb2.ERROR_CODE_DESTINATION_NOT_FOUND:
            return DestinationNotFound(text)
        case message_pb2.ERROR_CODE_UNAVAILABLE:
            return Unavailable(text)
        case message_pb2.ERROR_CODE_RESOURCE_EXHAUSTED:
            return ResourceExhausted(text)
        case message_pb2.ERROR_CODE_OVER_BUDGET:
            return OverBudget(text)
        case message_pb2.ERROR_CODE_STALE_TOKEN:
            return StaleLease(text)
        case message_pb2.ERROR_CODE_PERMISSION_DENIED:
            return PermissionDenied(text)
        case _:
            known = message_pb2.ErrorCode.DESCRIPTOR.values_by_number.get(code)  # there may be later ones
            return InternalError(f"{code if known is None else known.name}: {text}")
