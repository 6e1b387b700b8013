"""Policies, routes and operators' calls on three nodes that share a destination's queues: any node answers for all."""
from __future__ import annotations

import threading
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
from spillway.v1.message_pb2 import ERROR_CODE_OVER_BUDGET, ERROR_CODE_UNAVAILABLE
from spillway.v1.queue_service_pb2 import (
    OUTCOME_ACK,
    OUTCOME_DOWN,
    OUTCOME_REJECT,
    Credit,
    LeasedRun,
    LeaseRequest,
    ProduceRequest,
    Settlement,
    Subscribe,
)
from spillway.v1.queue_service_pb2_grpc import QueueServiceStub

Make = Callable[..., ClusterProcesses]
KEYS = 60  # enough for every shard of every node


@pytest.fixture
def channels(cluster: Make) -> Iterator[list[grpc.Channel]]:
    """A channel to each of three nodes."""
    processes = cluster(nodes=3)
    opened = [grpc.insecure_channel(address) for address in processes.addresses]
    yield opened
    for channel in opened:
        channel.close()


def destination(channel: grpc.Channel, name: str, **policy: Any) -> None:
    """Creates or changes a destination."""
    AdminServiceStub(channel).UpdateDestination(pb.UpdateDestinationRequest(
        destination=pb.Destination(name=name, policy=pb.DeliveryPolicy(**policy)), allow_missing=True), timeout=CALL_SECONDS)


def fill(channel: grpc.Channel, name: str, each: int = 1, size: int = 1) -> None:
    """Messages for many keys, one after the other for each."""
    for n in range(each):
        response = produce(channel, *(record(name, key=f"k{k}", payload=b"%d" % n * size) for k in range(KEYS)))
        assert not response.errors, response.errors[0]


class Taker:
    """One Lease stream with much credit, and what it got; not settled."""

    def __init__(self, channel: grpc.Channel, name: str, run_messages_max: int = 1, lease_seconds: int = 30) -> None:
        self.runs: list[LeasedRun] = []
        self._channel = channel
        self._requests = Open(LeaseRequest(subscribe=Subscribe(
            destinations=[name], credit=Credit(messages=10_000, bytes=1 << 26), run_messages_max=run_messages_max,
            lease_duration=Duration(seconds=lease_seconds))))
        self._call = QueueServiceStub(channel).Lease(iter(self._requests), timeout=60)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for response in self._call:
                self.runs += response.runs
        except grpc.RpcError:
            pass

    def until(self, count: int, seconds: float = 20.0) -> list[LeasedRun]:
        """Waits for so many runs, and takes them."""
        deadline = time.monotonic() + seconds
        while len(self.runs) < count:
            assert time.monotonic() < deadline, f"{len(self.runs)} runs of {count} within {seconds} s"
            time.sleep(0.02)
        found, self.runs = self.runs[:count], self.runs[count:]
        return found

    def settle(self, runs: list[LeasedRun], outcome: int, **fields: Any) -> None:
        """Settles the first message of each (all, with ACK)."""
        response = settle(self._channel, *(
            Settlement(shard=run.shard, fencing_token=run.fencing_token, outcome=outcome,  # type: ignore[arg-type]
                       sequence=run.messages[-1 if outcome == OUTCOME_ACK else 0].sequence, **fields) for run in runs))
        assert not response.errors, response.errors[0]

    def close(self) -> None:
        """Ends the stream."""
        self._requests.end.set()
        self._call.cancel()
        self._thread.join()


def stats(channel: grpc.Channel, name: str) -> pb.DestinationStats:
    """Counts over all nodes, once every shard has told."""
    while True:
        answer = AdminServiceStub(channel).GetDestinationStats(pb.GetDestinationStatsRequest(name=name), timeout=CALL_SECONDS)
        if not answer.shards_missing:
            return answer.stats
        time.sleep(0.1)


def test_dead_letters_of_all_nodes_are_redriven_and_purged(channels: list[grpc.Channel]) -> None:
    """Asked of one node; in order, ahead of what came later."""
    fill(channels[0], "d", 2)
    taker = Taker(channels[1], "d", lease_seconds=2)
    taker.settle(taker.until(KEYS), OUTCOME_REJECT)
    taker.close()
    assert stats(channels[2], "d").dead_letters == KEYS
    admin = AdminServiceStub(channels[2])
    counted = list(admin.RedriveDeadLetters(pb.RedriveDeadLettersRequest(destination="d", validate_only=True)))
    assert [(one.redriven, one.done) for one in counted] == [(KEYS, True)]
    # What is leased now would be given back only when its lease ends; a redrive waits for that.
    done = list(admin.RedriveDeadLetters(pb.RedriveDeadLettersRequest(destination="d", messages_per_second=1000), timeout=60))
    assert done[-1].done and done[-1].redriven == KEYS
    taker = Taker(channels[0], "d", 10)
    runs = taker.until(KEYS)
    assert all([m.message.payload for m in run.messages] == [b"0", b"1"] for run in runs)
    taker.settle(runs, OUTCOME_REJECT)
    taker.close()
    assert admin.PurgeDeadLetters(pb.PurgeDeadLettersRequest(destination="d"), timeout=CALL_SECONDS).dead_letters == KEYS
    left = stats(channels[1], "d")
    assert (left.dead_letters, left.messages, left.redriven_total) == (0, KEYS, KEYS)


def test_peek_purge_and_top_tenants_of_all_nodes(channels: list[grpc.Channel]) -> None:
    """Any node answers for all shards."""
    fill(channels[0], "d", 2)
    for i, channel in enumerate(channels):
        answer = AdminServiceStub(channel).PeekMessages(
            pb.PeekMessagesRequest(destination="d", tenant="t", key=f"k{i}"), timeout=CALL_SECONDS)
        assert ([m.message.payload for m in answer.messages], answer.count) == ([b"0", b"1"], 2)
        top = AdminServiceStub(channel).ListTopTenants(pb.ListTopTenantsRequest(destination="d"), timeout=CALL_SECONDS)
        assert [(t.tenant, t.messages) for t in top.tenants] == [("t", 2 * KEYS)]
    purged = AdminServiceStub(channels[1]).PurgeMessages(
        pb.PurgeMessagesRequest(destination="d", tenant="t", key="k7"), timeout=CALL_SECONDS)
    assert (purged.messages, purged.queues) == (2, 1)
    purged = AdminServiceStub(channels[2]).PurgeMessages(pb.PurgeMessagesRequest(destination="d"), timeout=CALL_SECONDS)
    assert purged.messages == 2 * (KEYS - 1) and stats(channels[0], "d").purged_total == 2 * KEYS


def test_a_destination_that_is_down_is_parked_on_every_node(channels: list[grpc.Channel]) -> None:
    """One node's consumers report it; the others' stop, too, within a moment, and go on when it is up."""
    taker = Taker(channels[0], "d")
    produce(channels[0], record("d", key="first"))
    first = taker.until(1)
    taker.settle(first, OUTCOME_DOWN, delay=Duration(seconds=4))
    parked_at = time.monotonic()
    time.sleep(1.0)
    fill(channels[1], "d")
    for channel in channels:
        told = AdminServiceStub(channel).Explain(pb.ExplainRequest(destination="d"), timeout=CALL_SECONDS)
        assert told.cause == pb.STALL_CAUSE_PARKED, told
    time.sleep(1.0)
    assert not taker.runs
    probe = taker.until(1)
    assert time.monotonic() - parked_at > 3.5
    time.sleep(0.3)
    assert not taker.runs  # one message probes
    taker.settle(probe, OUTCOME_ACK)
    taker.until(KEYS)
    taker.close()


def test_a_budget_counts_what_waits_on_all_nodes(channels: list[grpc.Channel]) -> None:
    """Through any node: what does not fit is refused with the destination's name, soon after it is full."""
    destination(channels[0], "d", retention=pb.Retention(bytes_max=200_000))
    refused = 0
    for n in range(30):
        response = produce(channels[n % 3], *(record("d", key=f"k{k}", payload=bytes(1000)) for k in range(20)))
        for error in response.errors:
            assert error.code == ERROR_CODE_OVER_BUDGET and "destination 'd'" in error.description
            refused += 1
        time.sleep(0.1)
    held = stats(channels[0], "d").message_bytes
    assert 190_000 < held < 260_000 and refused > 300
    AdminServiceStub(channels[0]).PurgeMessages(pb.PurgeMessagesRequest(destination="d"), timeout=CALL_SECONDS)
    time.sleep(1.0)
    assert not produce(channels[1], record("d", payload=bytes(1000))).errors


def test_a_rate_limit_is_divided_among_the_nodes(channels: list[grpc.Channel]) -> None:
    """All nodes together give what the policy says, not each of them."""
    destination(channels[0], "d", limit=pb.Limit(messages_per_second=20, burst=1), run_messages_max=1)
    fill(channels[0], "d", 5)
    taker = Taker(channels[1], "d")
    counts = []
    for seconds in (2.0, 4.0):  # first the nodes find out what the others have
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            runs, taker.runs = taker.runs, []
            count += len(runs)
            if runs:
                taker.settle(runs, OUTCOME_ACK)
            time.sleep(0.02)
        counts.append(count)
    taker.close()
    assert 60 <= counts[1] <= 90


def test_routes_through_every_node_at_once_do_not_wait_for_each_other(channels: list[grpc.Channel]) -> None:
    """Each node forwards to the others what waits for copies that the others make on it."""
    for name in ("a", "b", "c"):
        destination(channels[0], name)
    AdminServiceStub(channels[0]).CreateRoute(pb.CreateRouteRequest(route=pb.Route(
        source="s", targets=[pb.RouteTarget(destination=name) for name in ("a", "b", "c")])), timeout=CALL_SECONDS)
    problems: list[object] = []
    unknown = 0  # leaders may still move while the cluster is young, and these producers have no id

    def send(channel: grpc.Channel) -> None:
        nonlocal unknown
        requests = (ProduceRequest(records=[record("s", key=f"k{k}") for k in range(KEYS)]) for _ in range(30))
        try:
            for response in QueueServiceStub(channel).Produce(requests, timeout=2 * CALL_SECONDS):
                unknown += sum(e.code == ERROR_CODE_UNAVAILABLE for e in response.errors)
                problems.extend(e for e in response.errors if e.code != ERROR_CODE_UNAVAILABLE)
        except grpc.RpcError as error:
            problems.append(error)

    threads = [threading.Thread(target=send, args=(channel,)) for channel in channels for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    sent = 6 * 30 * KEYS
    stored, = {stats(channels[0], name).enqueued_total for name in ("a", "b", "c")}
    assert sent - unknown <= stored <= sent
    assert unknown < sent / 2, "calls that wait for each other end by their deadlines only"


def test_a_route_copies_across_nodes_through_the_loss_of_one(cluster: Make) -> None:
    """Every acknowledged event is at every target once and in order, though a node is killed while they are copied."""
    processes = cluster(nodes=3)
    with grpc.insecure_channel(processes.addresses[0]) as channel:
        for name in ("a", "b"):
            destination(channel, name)
        AdminServiceStub(channel).CreateRoute(pb.CreateRouteRequest(route=pb.Route(
            source="s", targets=[pb.RouteTarget(destination="a"), pb.RouteTarget(destination="b")])), timeout=CALL_SECONDS)
    victim = list(processes.nodes.values())[1]
    with grpc.insecure_channel(processes.addresses[0]) as channel:
        for n in range(40):
            if n == 20:
                victim.kill()
            for k in range(10):
                deadline = time.monotonic() + 30
                while True:
                    response = produce(channel, record("s", key=f"k{k}", payload=b"%d" % n, producer_sequence=n + 1),
                                       producer_id=f"p{k}")
                    if not response.errors:
                        break
                    assert time.monotonic() < deadline, response.errors
                    time.sleep(0.05)
        for name in ("a", "b"):
            taker = Taker(channel, name, 64)
            got: dict[str, list[bytes]] = {}
            while sum(map(len, got.values())) < 400:
                run, = taker.until(1)
                got.setdefault(run.key, []).extend(m.message.payload for m in run.messages)
                taker.settle([run], OUTCOME_ACK)
            taker.close()
            assert got == {f"k{k}": [b"%d" % n for n in range(40)] for k in range(10)}
            assert stats(channel, name).enqueued_total == 400
