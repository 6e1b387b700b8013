"""A client made of generated code only: one request, one answer."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
from spillway.v1.message_pb2 import Message
from spillway.v1.queue_service_pb2 import (
    AckRequest,
    AckResponse,
    Credit,
    LeasedRun,
    LeaseRequest,
    ProduceRecord,
    ProduceRequest,
    ProduceResponse,
    Settlement,
    Subscribe,
)
from spillway.v1.queue_service_pb2_grpc import QueueServiceStub

CALL_SECONDS = 20


def record(destination: str = "d", tenant: str = "t", key: str = "k", payload: bytes = b"x", **fields: Any) -> ProduceRecord:
    """One record."""
    message = Message(payload=payload, id=fields.pop("id", ""), headers=fields.pop("headers", {}))
    return ProduceRecord(destination=destination, tenant=tenant, key=key, message=message, **fields)


def produce(channel: grpc.Channel, *records: ProduceRecord, producer_id: str = "") -> ProduceResponse:
    """One request, one response."""
    requests = iter([ProduceRequest(records=records, producer_id=producer_id)])
    return next(QueueServiceStub(channel).Produce(requests, timeout=CALL_SECONDS))


def settle(channel: grpc.Channel, *settlements: Settlement) -> AckResponse:
    """One request, one response."""
    return next(QueueServiceStub(channel).Ack(iter([AckRequest(settlements=settlements)]), timeout=CALL_SECONDS))


class Open:
    """Requests of a stream that stays open until told otherwise."""

    def __init__(self, *requests: Any) -> None:
        self.requests = requests
        self.end = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        yield from self.requests
        self.end.wait(CALL_SECONDS)


def lease(channel: grpc.Channel, destination: str, **fields: Any) -> LeasedRun:
    """One run of a destination; its Lease stream is closed again."""
    requests = Open(LeaseRequest(subscribe=Subscribe(
        destinations=[destination], credit=Credit(messages=1, bytes=1 << 20), **fields)))
    call = QueueServiceStub(channel).Lease(iter(requests), timeout=CALL_SECONDS)
    try:
        for response in call:
            if response.runs:
                return response.runs[0]
    finally:
        requests.end.set()
        call.cancel()
    raise AssertionError("the stream ended without a run")
