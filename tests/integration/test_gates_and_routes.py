"""Pauses, parkings and routes over three nodes: whichever node is asked, all of them follow and tell the same."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from cluster_process import ClusterProcesses
from google.protobuf.duration_pb2 import Duration
from plain_client import CALL_SECONDS, Open, produce, record, settle
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1.admin_service_pb2_grpc import AdminServiceStub
from spillway.v1.queue_service_pb2 import OUTCOME_DOWN, Credit, LeasedRun, LeaseRequest, Settlement, Subscribe
from spillway.v1.queue_service_pb2_grpc import QueueServiceStub

KEYS = 30  # enough for every shard of every node


@pytest.fixture
def channels(cluster: Callable[..., ClusterProcesses]) -> Iterator[list[grpc.Channel]]:
    """A channel to each of three nodes."""
    processes = cluster(nodes=3)
    opened = [grpc.insecure_channel(address) for address in processes.addresses]
    yield opened
    for channel in opened:
        channel.close()


def ask(channel: grpc.Channel, method: str, **fields: Any) -> Any:
    """A call of AdminService."""
    return getattr(AdminServiceStub(channel), method)(getattr(pb, method + "Request")(**fields), timeout=CALL_SECONDS)


def leased(channel: grpc.Channel, name: str, seconds: float) -> list[LeasedRun]:
    """What a consumer gets within some time; its leases soon end."""
    requests = Open(LeaseRequest(subscribe=Subscribe(
        destinations=[name], credit=Credit(messages=1000, bytes=1 << 26), run_messages_max=1,
        lease_duration=Duration(seconds=2))))
    call = QueueServiceStub(channel).Lease(iter(requests), timeout=seconds)
    runs: list[LeasedRun] = []
    try:
        for response in call:
            runs += response.runs
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        requests.end.set()
        call.cancel()
    return runs


class Taker:
    """One Lease stream, and what it got; not settled."""

    def __init__(self, channel: grpc.Channel, name: str) -> None:
        self._requests = Open(LeaseRequest(subscribe=Subscribe(
            destinations=[name], credit=Credit(messages=1000, bytes=1 << 26), run_messages_max=1,
            lease_duration=Duration(seconds=2))))
        self._call = QueueServiceStub(channel).Lease(iter(self._requests), timeout=60)

    def until(self, count: int) -> list[LeasedRun]:
        """Waits for so many runs, or more."""
        runs: list[LeasedRun] = []
        while len(runs) < count:
            runs += next(self._call).runs
        return runs

    def close(self) -> None:
        """Ends the stream."""
        self._requests.end.set()
        self._call.cancel()


def eventually(check: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_whatever_is_closed_is_closed_and_opened_everywhere(channels: list[grpc.Channel]) -> None:
    """By any node for all nodes: a pause, and what a failure closed."""
    first, second, third = channels
    ask(first, "CreateDestination", destination=pb.Destination(name="d"))
    for channel in channels:
        produce(channel, *(record("d", key=f"k{k}", payload=b"x") for k in range(KEYS)))
    ask(second, "PauseDelivery", destination="d", reason="maintenance")
    eventually(lambda: all(ask(c, "ListGates", destination="d").gates for c in channels))
    assert not leased(third, "d", 1.0)
    for channel in channels:
        gate, = ask(channel, "ListGates", destination="d").gates
        assert (gate.cause, gate.reason, gate.HasField("tenant")) == (pb.GATE_CAUSE_PAUSED, "maintenance", False)
        assert ask(channel, "GetDestinationStats", name="d").stats.paused
    counts = ask(first, "GetDestinationStats", name="d").stats
    assert (counts.queues, counts.queues_leased, counts.messages) == (KEYS, 0, 3 * KEYS) and counts.message_bytes > 3 * KEYS
    ask(third, "ResumeDelivery", destination="d")
    eventually(lambda: not any(ask(c, "ListGates", destination="d").gates for c in channels))
    taker = Taker(first, "d")
    run = taker.until(1)[0]
    answer = settle(first, Settlement(shard=run.shard, fencing_token=run.fencing_token, sequence=run.messages[0].sequence,
                                      outcome=OUTCOME_DOWN, delay=Duration(seconds=600)))
    assert not answer.errors
    taker.close()
    for channel in channels:
        gate, = ask(channel, "ListGates", destination="d").gates
        assert gate.cause == pb.GATE_CAUSE_FAILURES and gate.step == 1
    time.sleep(1.0)  # the other nodes hear of it, and the taker's other leases end
    assert not leased(third, "d", 1.0)
    ask(second, "UnparkDelivery", destination="d")
    assert not any(ask(c, "ListGates", destination="d").gates for c in channels)
    eventually(lambda: len({r.key for r in leased(third, "d", 3.0)}) == KEYS, 30.0)


def test_routes_are_made_by_any_node_and_followed_by_all(channels: list[grpc.Channel]) -> None:
    """With filters; what is wrong is refused with its field, whoever leads."""
    first, second, third = channels
    for name in ("a", "b"):
        ask(first, "CreateDestination", destination=pb.Destination(name=name))
    targets = [pb.RouteTarget(destination="a"), pb.RouteTarget(destination="b", filter="key == 'k1' && has(headers.x)")]
    made = ask(second, "CreateRoute", route=pb.Route(source="s", targets=targets)).route
    for channel in channels:
        assert ask(channel, "GetRoute", source="s").route == made
        with pytest.raises(grpc.RpcError) as refused:
            ask(channel, "CreateRoute", route=pb.Route(source="r", targets=[pb.RouteTarget(destination="a", filter="key")]))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "route.targets[0].filter: gives a string, not a bool" in (refused.value.details() or "")
        with pytest.raises(grpc.RpcError) as unknown:
            ask(channel, "CreateRoute", route=pb.Route(source="r", targets=[pb.RouteTarget(destination="none")]))
        assert "route.targets[0].destination: 'none' is neither" in (unknown.value.details() or "")
    eventually(lambda: all(len(ask(c, "ListRoutes").routes) == 1 for c in channels))
    for channel in channels:
        response = produce(channel, *(record("s", key=f"k{k}", payload=b"x", headers={"x": "1"}) for k in range(KEYS)))
        assert not response.errors
    eventually(lambda: [ask(third, "GetDestinationStats", name=n).stats.enqueued_total for n in ("a", "b")] == [3 * KEYS, 3])
    ask(third, "DeleteRoute", source="s", etag=made.etag)
    eventually(lambda: not any(ask(c, "ListRoutes").routes for c in channels))
