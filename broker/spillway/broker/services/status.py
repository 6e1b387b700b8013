"""Errors to gRPC statuses: the one table. Details follow google.rpc: ErrorInfo always, BadRequest for a field,
RetryInfo where a retry makes sense."""
from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from spillway.broker import errors as e

DOMAIN = "spillway"
_CODES: list[tuple[type[Exception], grpc.StatusCode, str]] = [  # the first that fits
    (e.NotFound, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (e.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"),
    (e.EtagMismatch, grpc.StatusCode.ABORTED, "ETAG_MISMATCH"),
    (e.RequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    (e.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (e.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    (e.TooMuch, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVER_LIMIT"),
    (e.Unavailable, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
]


def status_of(error: Exception) -> status_pb2.Status:
    """The google.rpc.Status of an error; INTERNAL without details for one that has no mapping."""
    for kind, code, reason in _CODES:
        if isinstance(error, kind):
            break
    else:
        return status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message="internal error; see the node's log")
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    details: list[Any] = [info]
    if isinstance(error, e.RequestError):
        info.metadata["field"] = error.field
        details.append(error_details_pb2.BadRequest(field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)]))
    if isinstance(error, e.Unavailable):
        if error.leader:
            info.metadata["leader"] = error.leader
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(100)
        details.append(retry)
    if isinstance(error, e.TooMuch):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_seconds * 1000))
        details.append(retry)
    status = status_pb2.Status(code=code.value[0], message=str(error))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: Any, error: Exception) -> NoReturn:
    """Ends the call with the error's status."""
    status = rpc_status.to_status(status_of(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")


async def pass_on(context: Any, error: Exception) -> NoReturn:
    """Ends the call with the error's status; another node's answer goes on with its details."""
    if isinstance(error, grpc.aio.AioRpcError):
        await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
        raise AssertionError("abort returned")
    await abort(context, error)
