"""Errors as gRPC statuses: the code, the details and what is kept from callers."""
from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from spillway.broker import errors as e
from spillway.broker.services.status import abort, status_of


def details(status: status_pb2.Status) -> dict[str, Any]:
    """The details by the name of their type; each at most once."""
    kinds: list[type[Message]] = [error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo]
    found: dict[str, Any] = {}
    for packed in status.details:
        kind = next(k for k in kinds if packed.Is(k.DESCRIPTOR))
        assert kind.DESCRIPTOR.name not in found
        found[kind.DESCRIPTOR.name] = kind()
        packed.Unpack(found[kind.DESCRIPTOR.name])
    return found


@pytest.mark.parametrize(("kind", "code", "reason"), [
    (e.RequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    (e.NotFound, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (e.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"),
    (e.EtagMismatch, grpc.StatusCode.ABORTED, "ETAG_MISMATCH"),
])
def test_a_callers_error_names_the_field_twice(kind: type[e.RequestError], code: grpc.StatusCode, reason: str) -> None:
    """Each error of the caller has its own code; ErrorInfo has reason and field, BadRequest field and description, and
    nothing invites to a retry."""
    status = status_of(kind("destination.name", "is wrong"))
    assert (status.code, status.message) == (code.value[0], "destination.name: is wrong")
    found = details(status)
    assert found.keys() == {"ErrorInfo", "BadRequest"}
    info = found["ErrorInfo"]
    assert (info.reason, info.domain, dict(info.metadata)) == (reason, "spillway", {"field": "destination.name"})
    violations = [(v.field, v.description) for v in found["BadRequest"].field_violations]
    assert violations == [("destination.name", "is wrong")]


@pytest.mark.parametrize(("leader", "metadata"), [("n2", {"leader": "n2"}), (None, {})])
def test_unavailable_says_when_to_retry_and_where(leader: str | None, metadata: dict[str, str]) -> None:
    """UNAVAILABLE carries a positive retry delay, and the leader if it is known."""
    status = status_of(e.Unavailable("shard 3 has no leader", leader))
    assert (status.code, status.message) == (grpc.StatusCode.UNAVAILABLE.value[0], "shard 3 has no leader")
    found = details(status)
    assert found.keys() == {"ErrorInfo", "RetryInfo"}
    assert (found["ErrorInfo"].reason, dict(found["ErrorInfo"].metadata)) == ("UNAVAILABLE", metadata)
    assert found["RetryInfo"].retry_delay.ToMilliseconds() > 0


@pytest.mark.parametrize("error", [RuntimeError("secret"), e.BrokerError("secret"), e.ConfigError("secret"),
                                   e.DataDirError("secret")])
def test_an_error_without_a_mapping_tells_nothing(error: Exception) -> None:
    """What is not the caller's is INTERNAL without details; its text stays in the node's log."""
    status = status_of(error)
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert not status.details and "secret" not in status.message


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    """All classes below one."""
    return {s for c in kind.__subclasses__() for s in {c, *subclasses(c)}}


def test_every_error_of_a_caller_is_mapped() -> None:
    """No subclass of RequestError falls through to INTERNAL, and no two of them look alike."""
    kinds = {e.RequestError, *subclasses(e.RequestError)}
    statuses = [status_of(kind("f", "d")) for kind in kinds]  # type: ignore[call-arg]
    assert grpc.StatusCode.INTERNAL.value[0] not in {s.code for s in statuses}
    assert len({s.code for s in statuses}) == len(kinds)


class Context:
    """Keeps what a call is ended with."""

    class Ended(Exception):
        """As gRPC does, ends the handler."""

    async def abort(self, *args: Any) -> None:
        """As of grpc.aio.ServicerContext."""
        self.args = args
        raise Context.Ended


async def test_abort_sends_code_text_and_details() -> None:
    """The call ends with the status' code and text, and the details travel in grpc-status-details-bin."""
    context = Context()
    error = e.NotFound("name", "destination 'd' does not exist")
    with pytest.raises(Context.Ended):
        await abort(context, error)
    code, text, metadata = context.args
    assert (code, text) == (grpc.StatusCode.NOT_FOUND, "name: destination 'd' does not exist")
    assert status_pb2.Status.FromString(dict(metadata)["grpc-status-details-bin"]) == status_of(error)
