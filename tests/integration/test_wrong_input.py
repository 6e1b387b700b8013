"""Wrong input of every kind gets a clear, typed error that names the field or the remedy; nothing is lost and the
node stays up."""
from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster_process import ClusterProcesses, NodeProcess
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from plain_client import CALL_SECONDS, Open, lease, produce, record, settle
from spillway.v1 import admin_service_pb2 as admin
from spillway.v1.admin_service_pb2_grpc import AdminServiceStub
from spillway.v1.message_pb2 import (
    ERROR_CODE_DESTINATION_NOT_FOUND,
    ERROR_CODE_INVALID_ARGUMENT,
    ERROR_CODE_OUT_OF_SEQUENCE,
    ERROR_CODE_RESOURCE_EXHAUSTED,
    ERROR_CODE_STALE_TOKEN,
)
from spillway.v1.queue_service_pb2 import (
    OUTCOME_ACK,
    OUTCOME_RETRY,
    Credit,
    LeaseRequest,
    LeaseResponse,
    ProduceRequest,
    Settlement,
    Subscribe,
)
from spillway.v1.queue_service_pb2_grpc import QueueServiceStub

Make = Callable[..., ClusterProcesses]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node with small limits, shared by the tests of this module: each must leave it serving."""
    processes = ClusterProcesses(tmp_path_factory.mktemp("wrong"), 1, ["--payload-bytes-max", "1000"])
    processes.start()
    yield processes.nodes["n1"]
    processes.end()


@pytest.fixture
def channel(node: NodeProcess) -> Iterator[grpc.Channel]:
    """A connection; afterwards the node must still take, lease and settle a message."""
    with grpc.insecure_channel(node.address) as channel:
        yield channel
        assert node.running, node.text()
        response = produce(channel, record(destination="still-up"))
        assert not response.errors
        run = lease(channel, "still-up")
        assert settle(channel, Settlement(shard=run.shard, fencing_token=run.fencing_token, outcome=OUTCOME_ACK,
                                          sequence=run.messages[0].sequence)).results == [1]


def refused(calls: Iterable[Any]) -> tuple[grpc.StatusCode, str, str]:
    """(status code, field of the ErrorInfo, message) of a stream that is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        list(calls)
    status = rpc_status.from_call(caught.value)
    field = ""
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            field = info.metadata["field"]
    return caught.value.code(), field, caught.value.details()


@pytest.mark.parametrize(("bad", "field"), [
    ({"destination": ""}, "records[1].destination"),
    ({"destination": "d" * 256}, "records[1].destination"),
    ({"destination": "a\nb"}, "records[1].destination"),
    ({"destination": "a*"}, "records[1].destination"),
    ({"tenant": "é" * 128}, "records[1].tenant"),
    ({"tenant": "a\x00b"}, "records[1].tenant"),
    ({"key": "k" * 256}, "records[1].key"),
    ({"key": "\x7f"}, "records[1].key"),
    ({"payload": b"x" * 1001}, "records[1].message.payload"),
    ({"id": "i" * 256}, "records[1].message.id"),
    ({"id": "a\tb"}, "records[1].message.id"),
    ({"headers": {"h": "v" * (64 << 10)}}, "records[1].message.headers"),
    ({"delay": Duration(seconds=-1)}, "records[1].delay"),
    ({"delay": Duration(nanos=-1)}, "records[1].delay"),
    ({"delay": Duration(seconds=7 * 24 * 3600 + 1)}, "records[1].delay"),
])
def test_a_bad_record_is_refused_by_field_and_its_neighbours_are_stored(
        channel: grpc.Channel, bad: dict[str, Any], field: str) -> None:
    """Only the bad record of a batch is refused, with INVALID_ARGUMENT and the field's path."""
    response = produce(channel, record(destination="wrong"), record(**bad), record(destination="wrong"))
    assert [(e.index, e.code, e.field) for e in response.errors] == [(1, ERROR_CODE_INVALID_ARGUMENT, field)]
    assert response.errors[0].description
    first, middle, last = response.sequences
    assert 0 < first < last and middle == 0


def test_names_and_payload_at_the_limit_are_taken(channel: grpc.Channel) -> None:
    """255 bytes of name and payload_bytes_max bytes of payload pass."""
    response = produce(channel, record("d" * 255, "t" * 255, "k" * 255, b"x" * 1000, id="i" * 255))
    assert not response.errors and response.sequences[0]


@pytest.mark.parametrize("count", [0, 4097])
def test_a_batch_of_the_wrong_size_ends_the_stream(channel: grpc.Channel, count: int) -> None:
    """No records, or more than 4096, is INVALID_ARGUMENT naming `records`."""
    request = ProduceRequest(records=[record()] * count)
    code, field, text = refused(QueueServiceStub(channel).Produce(iter([request]), timeout=CALL_SECONDS))
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "records") and str(count) in text


def test_a_frame_over_the_transport_limit_is_refused(channel: grpc.Channel) -> None:
    """A frame that no batch may have is refused by gRPC before it is buffered whole."""
    request = ProduceRequest(records=[record(payload=b"x" * (5 << 20))])
    code, _, text = refused(QueueServiceStub(channel).Produce(iter([request]), timeout=CALL_SECONDS))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text


def test_unknown_destination_without_auto_create(cluster: Make) -> None:
    """With auto_create off, producing to an unknown destination is refused by name; after creating it, it is taken."""
    processes = cluster(flags=["--no-auto-create"])
    with grpc.insecure_channel(processes.addresses[0]) as channel:
        response = produce(channel, record("nowhere"))
        assert [(e.code, e.field) for e in response.errors] == [
            (ERROR_CODE_DESTINATION_NOT_FOUND, "records[0].destination")]
        assert "nowhere" in response.errors[0].description
        AdminServiceStub(channel).CreateDestination(
            admin.CreateDestinationRequest(destination=admin.Destination(name="nowhere")), timeout=CALL_SECONDS)
        assert not produce(channel, record("nowhere")).errors


def test_unknown_and_stale_leases_change_nothing(channel: grpc.Channel) -> None:
    """A settlement with a token that never was, or is over, is refused as STALE_TOKEN; of a shard that does not exist,
    as INVALID_ARGUMENT; settling twice succeeds twice."""
    produce(channel, record("stale"))
    run = lease(channel, "stale")
    sequence = run.messages[0].sequence
    good = Settlement(shard=run.shard, fencing_token=run.fencing_token, sequence=sequence, outcome=OUTCOME_ACK)
    response = settle(
        channel,
        Settlement(shard=run.shard, fencing_token=run.fencing_token + 1, sequence=sequence, outcome=OUTCOME_ACK),
        Settlement(shard=999, fencing_token=1, sequence=1, outcome=OUTCOME_ACK),
        Settlement(shard=run.shard, fencing_token=run.fencing_token, sequence=sequence + 7, outcome=OUTCOME_ACK),
        Settlement(shard=run.shard, fencing_token=run.fencing_token, sequence=sequence),
        Settlement(shard=run.shard, fencing_token=run.fencing_token, sequence=sequence, outcome=OUTCOME_RETRY,
                   delay=Duration(seconds=-5)))
    assert list(response.results) == [3, 3, 3, 3, 3]
    assert [(e.index, e.code, e.field) for e in response.errors] == [
        (0, ERROR_CODE_STALE_TOKEN, "settlements[0].fencing_token"),
        (1, ERROR_CODE_INVALID_ARGUMENT, "settlements[1].shard"),
        (2, ERROR_CODE_INVALID_ARGUMENT, "settlements[2].sequence"),
        (3, ERROR_CODE_INVALID_ARGUMENT, "settlements[3].outcome"),
        (4, ERROR_CODE_INVALID_ARGUMENT, "settlements[4].delay")]
    assert settle(channel, good).results == [1]
    assert settle(channel, good).results == [2]


def test_a_gap_in_a_producers_sequence_is_refused(channel: grpc.Channel) -> None:
    """A producer's record that skips a number is OUT_OF_SEQUENCE; a repeated one is acknowledged and not stored twice."""
    assert produce(channel, record("seq", producer_sequence=2), producer_id="p").errors[0].code == ERROR_CODE_OUT_OF_SEQUENCE
    first = produce(channel, record("seq", producer_sequence=1), producer_id="p")
    again = produce(channel, record("seq", producer_sequence=1), producer_id="p")
    assert not first.errors and not again.errors and again.sequences[0] == 1
    run = lease(channel, "seq", run_messages_max=10)
    assert len(run.messages) == 1


@pytest.mark.parametrize(("subscribe", "field"), [
    (Subscribe(), "subscribe.destinations"),
    (Subscribe(destinations=["a"] * 257), "subscribe.destinations"),
    (Subscribe(destinations=["a\n"]), "subscribe.destinations[0]"),
    (Subscribe(destinations=["a"], consumer="c" * 256), "subscribe.consumer"),
    (Subscribe(destinations=["a"], session="s" * 65), "subscribe.session"),
    (Subscribe(destinations=["a"], run_messages_max=1025), "subscribe.run_messages_max"),
    (Subscribe(destinations=["a"], credit=Credit(messages=-1)), "subscribe.credit"),
    (Subscribe(destinations=["a"], lease_duration=Duration(nanos=1)), "subscribe.lease_duration"),
    (Subscribe(destinations=["a"], lease_duration=Duration(seconds=-1)), "subscribe.lease_duration"),
])
def test_a_bad_subscription_is_refused_by_field(channel: grpc.Channel, subscribe: Subscribe, field: str) -> None:
    """Every limit of Subscribe is INVALID_ARGUMENT with the field's path."""
    code, found, _ = refused(QueueServiceStub(channel).Lease(iter([LeaseRequest(subscribe=subscribe)]), timeout=CALL_SECONDS))
    assert (code, found) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_a_lease_stream_must_subscribe_first_and_once(channel: grpc.Channel) -> None:
    """Credit before, or a second subscription after, the first request is refused."""
    stub = QueueServiceStub(channel)
    code, field, _ = refused(stub.Lease(iter([LeaseRequest(credit=Credit(messages=1))]), timeout=CALL_SECONDS))
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "subscribe")
    subscribe = LeaseRequest(subscribe=Subscribe(destinations=["a"]))
    code, field, _ = refused(stub.Lease(iter([subscribe, subscribe]), timeout=CALL_SECONDS))
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "credit")


@pytest.mark.parametrize("method", ["Produce", "Lease", "Ack"])
def test_garbage_bytes_end_the_stream(channel: grpc.Channel, method: str) -> None:
    """Bytes that are no request end the stream with INVALID_ARGUMENT that names the expected type."""
    call = channel.stream_stream(f"/spillway.v1.QueueService/{method}")
    code, field, text = refused(call(iter([b"\xff\xfe garbage"]), timeout=CALL_SECONDS))
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "request") and f"spillway.v1.{method}Request" in text


def test_bytes_that_are_not_http2_close_the_connection(node: NodeProcess, channel: grpc.Channel) -> None:
    """A connection that does not speak HTTP/2 is closed; others do not notice."""
    host, port = node.address.split(":")
    with socket.create_connection((host, int(port)), timeout=CALL_SECONDS) as s:
        try:
            s.sendall(b"\x00\x01garbage" * 1000)
            while s.recv(4096):
                pass
        except ConnectionError:
            pass  # reset by the node, before or after it answered


def test_a_client_that_never_reads_gets_no_more_than_its_credit(channel: grpc.Channel, node: NodeProcess) -> None:
    """A consumer that subscribes with credit for 8 messages and never reads holds 8 messages and nobody else's."""
    for _ in range(4):
        assert not produce(channel, *(record("unread", key=f"k{i}", payload=b"x" * 900) for i in range(200))).errors
    requests = Open(LeaseRequest(subscribe=Subscribe(destinations=["unread"], credit=Credit(messages=8, bytes=1 << 20),
                                                     run_messages_max=1)))
    call = QueueServiceStub(channel).Lease(iter(requests), timeout=CALL_SECONDS)
    stats = AdminServiceStub(channel)
    request = admin.GetDestinationStatsRequest(name="unread")
    for _ in range(200):
        leased = stats.GetDestinationStats(request, timeout=CALL_SECONDS).stats.leased
        assert leased <= 8
        if leased == 8:
            break
    assert leased == 8
    other = lease(channel, "unread", run_messages_max=1)
    assert len(other.messages) == 1
    requests.end.set()
    call.cancel()


def test_a_consumer_that_vanishes_loses_its_lease_in_time(channel: grpc.Channel) -> None:
    """A leased message whose consumer is gone is delivered again after the lease, as the next attempt, with a higher
    fencing token; the old token settles nothing."""
    produce(channel, record("vanish"))
    first = lease(channel, "vanish", lease_duration=Duration(seconds=1))
    second = lease(channel, "vanish")
    assert second.messages[0].sequence == first.messages[0].sequence
    assert second.messages[0].attempt == 2 and second.fencing_token > first.fencing_token
    late = Settlement(shard=first.shard, fencing_token=first.fencing_token, sequence=first.messages[0].sequence,
                      outcome=OUTCOME_ACK)
    assert settle(channel, late).errors[0].code == ERROR_CODE_STALE_TOKEN


def test_a_full_disk_refuses_produce_and_nothing_else(cluster: Make) -> None:
    """Below the watermark of free disk Produce is RESOURCE_EXHAUSTED; what is stored is leased and settled."""
    processes = cluster()
    node = processes.nodes["n1"]
    with grpc.insecure_channel(node.address) as channel:
        assert not produce(channel, record("disk")).errors
    assert node.stop() == 0
    node.argv += ["--disk-free-bytes-min", str(1 << 60)]
    node.start()
    processes.wait_ready()
    with grpc.insecure_channel(node.address) as channel:
        response = produce(channel, record("disk"))
        assert [e.code for e in response.errors] == [ERROR_CODE_RESOURCE_EXHAUSTED]
        assert "disk" in response.errors[0].description
        run = lease(channel, "disk")
        done = Settlement(shard=run.shard, fencing_token=run.fencing_token, sequence=run.messages[0].sequence,
                          outcome=OUTCOME_ACK)
        assert settle(channel, done).results == [1]


def start_fails(node: NodeProcess) -> str:
    """Starts a node that must refuse; returns what it said."""
    node.start()
    assert node.process is not None
    assert node.process.wait(CALL_SECONDS) in (2, 3)
    return node.text()


@pytest.mark.parametrize(("flags", "says"), [
    (["--shards", "many"], "shards is 'many'"),
    (["--shards", "0"], "shards is 0; it must be 1 to 1024"),
    (["--listen", "nowhere"], "listen has 'nowhere'; write host:port"),
    (["--peers", "n2=127.0.0.1:1/127.0.0.1:2"], "peers does not name this node, 'n1'"),
    (["--config", "/does/not/exist.toml"], "cannot be read"),
])
def test_a_wrong_setting_stops_the_start_with_its_name(cluster: Make, flags: list[str], says: str) -> None:
    """A flag that is wrong ends the start with exit code 2 and a sentence that names it."""
    processes = cluster(start=False)
    node = processes.nodes["n1"]
    node.argv += flags
    assert says in start_fails(node)


def test_a_config_file_with_a_typo_names_file_and_setting(cluster: Make, tmp_path: Path) -> None:
    """An unknown key of the TOML file is refused with the known ones; broken TOML with its place."""
    node = cluster(start=False).nodes["n1"]
    file = tmp_path / "node.toml"
    node.argv += ["--config", str(file)]
    file.write_text("shard = 4\n")
    said = start_fails(node)
    assert str(file) in said and "unknown setting 'shard'" in said and "shards" in said
    file.write_text("shards = \n")
    assert "not valid TOML" in start_fails(node)


def test_a_data_directory_of_another_node_or_a_newer_version_is_refused(cluster: Make) -> None:
    """A node does not touch a directory that is not its own, or that it cannot read; it says what to do."""
    processes = cluster()
    node = processes.nodes["n1"]
    assert node.stop() == 0
    argv = list(node.argv)
    node.argv = [*argv, "--node-id", "n9"]
    assert "belongs to node_id 'n1', not 'n9'" in start_fails(node)
    node.argv = [*argv, "--cluster", "other"]
    assert "belongs to cluster 'spillway'" in start_fails(node)
    node.argv = [*argv, "--shards", "4"]
    assert "belongs to shards 16" in start_fails(node)
    file = node.data_dir / "node.json"
    kept = file.read_text()
    file.write_text(kept.replace('"format": 1', '"format": 99'))
    assert "written by a newer Spillway" in start_fails(node)
    file.write_text("{")
    assert "damaged" in start_fails(node)
    file.write_text(kept)
    node.argv = argv
    node.start()
    processes.wait_ready()


def test_a_directory_in_use_is_refused(cluster: Make) -> None:
    """A second process on the same directory does not start."""
    processes = cluster()
    node = processes.nodes["n1"]
    other = NodeProcess(node.directory, "n1", "127.0.0.1:0", "127.0.0.1:0", [])
    other.log = node.directory / "other.log"
    assert "another process" in start_fails(other)
    assert node.running


def test_unknown_responses_are_not_expected(channel: grpc.Channel) -> None:
    """A Lease stream with credit and no messages is answered with heartbeats only, never with an error."""
    requests = Open(LeaseRequest(subscribe=Subscribe(destinations=["empty"], credit=Credit(messages=1, bytes=1))))
    call = QueueServiceStub(channel).Lease(iter(requests), timeout=CALL_SECONDS)
    response = next(call)
    assert response == LeaseResponse()
    requests.end.set()
    call.cancel()
