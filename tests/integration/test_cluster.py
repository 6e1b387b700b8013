"""Real clusters whose nodes are killed, wiped and stopped: what was acknowledged is there, in order."""
from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from cluster_process import ClusterProcesses, NodeProcess
from google.protobuf.duration_pb2 import Duration
from plain_client import CALL_SECONDS, Open, lease, produce, record, settle
from spillway.client import Client
from spillway.v1 import admin_service_pb2 as admin
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1.admin_service_pb2_grpc import AdminServiceStub
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub
from spillway.v1.message_pb2 import ERROR_CODE_UNAVAILABLE
from spillway.v1.queue_service_pb2 import (
    OUTCOME_ACK,
    OUTCOME_DOWN,
    OUTCOME_REJECT,
    OUTCOME_RETRY,
    OUTCOME_THROTTLED,
    Credit,
    LeasedRun,
    LeaseRequest,
    Settlement,
    Subscribe,
)
from spillway.v1.queue_service_pb2_grpc import QueueServiceStub

Make = Callable[..., ClusterProcesses]


def until(what: str, condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Polls other processes until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def put(channel: grpc.Channel, destination: str, first: int, count: int, key: str = "k") -> None:
    """Produces numbered messages to one queue, one after the other, each until it is stored."""
    for n in range(first, first + count):
        def stored(n: int = n) -> bool:
            # The producer's number makes the repetition harmless.
            response = produce(channel, record(destination, key=key, payload=str(n).encode(), producer_sequence=n + 1),
                               producer_id=f"{destination}-{key}")
            assert all(e.code == ERROR_CODE_UNAVAILABLE for e in response.errors), response.errors
            return not response.errors
        until(f"{destination} {n} stored", stored)


def ack(channel: grpc.Channel, run: LeasedRun) -> None:
    """Settles a whole run, until it is settled."""
    settlement = Settlement(shard=run.shard, fencing_token=run.fencing_token, sequence=run.messages[-1].sequence,
                            outcome=OUTCOME_ACK)

    def settled() -> bool:
        response = settle(channel, settlement)
        assert all(e.code == ERROR_CODE_UNAVAILABLE for e in response.errors), response.errors
        return not response.errors

    until("settled", settled)


def drain(channel: grpc.Channel, destination: str, count: int) -> list[bytes]:
    """Takes and acknowledges `count` messages."""
    got: list[bytes] = []
    while len(got) < count:
        run = lease(channel, destination, run_messages_max=1)
        got += [m.message.payload for m in run.messages]
        ack(channel, run)
    return got


def runs(channel: grpc.Channel, destination: str, count: int) -> list[LeasedRun]:
    """Leases `count` runs of one message over one stream."""
    requests = Open(LeaseRequest(subscribe=Subscribe(
        destinations=[destination], credit=Credit(messages=count, bytes=1 << 20), run_messages_max=1)))
    found: list[LeasedRun] = []
    for response in QueueServiceStub(channel).Lease(iter(requests), timeout=CALL_SECONDS):
        found += response.runs
        if len(found) >= count:
            requests.end.set()
            return found
    raise AssertionError("the stream ended without the runs")


def numbers(first: int, count: int) -> list[bytes]:
    """Payloads of `put`."""
    return [str(n).encode() for n in range(first, first + count)]


def stats(channel: grpc.Channel, name: str) -> admin.DestinationStats:
    """Counts of a destination."""
    return AdminServiceStub(channel).GetDestinationStats(
        admin.GetDestinationStatsRequest(name=name), timeout=CALL_SECONDS).stats


def groups(node: NodeProcess) -> dict[int, pb.GroupStatus]:
    """A node's replicas; empty if it does not answer."""
    try:
        with grpc.insecure_channel(node.address) as channel:
            answer = ClusterServiceStub(channel).GetNodeStatus(pb.GetNodeStatusRequest(), timeout=5)
        return {g.group: g for g in answer.groups}
    except grpc.RpcError:
        return {}


def level(processes: ClusterProcesses) -> bool:
    """Whether all running nodes are ordinary members at the same applied indexes."""
    found = [groups(n) for n in processes.nodes.values() if n.running]
    if not all(found) or any(g.role not in ("leader", "follower") for f in found for g in f.values()):
        return False
    return len({tuple((n, g.applied_index) for n, g in sorted(f.items())) for f in found}) == 1


def test_every_node_serves_every_call(cluster: Make) -> None:
    """A plain client that knows one node produces to all shards, leases from all shards and settles, through each node."""
    processes = cluster(nodes=3)
    for address in processes.addresses:
        with grpc.insecure_channel(address) as channel:
            response = produce(channel, *(record("any", key=f"k{i}", payload=str(i).encode()) for i in range(40)))
            assert not response.errors and all(response.sequences)
            assert sorted(drain(channel, "any", 40)) == sorted(numbers(0, 40))
            until("counted", lambda c=channel: stats(c, "any").messages == 0)  # type: ignore[misc]


@pytest.mark.parametrize("wipe", [True, False], ids=["wiped", "restarted"])
def test_a_node_comes_back_and_counts_again(cluster: Make, wipe: bool) -> None:
    """A node that was killed catches up, and one that lost its directory, too, recovers from the others; either then
    carries the data when another node dies."""
    processes = cluster(nodes=3)
    n1, n2, n3 = processes.nodes.values()
    with grpc.insecure_channel(n1.address) as channel:
        put(channel, "back", 0, 30)
        n2.kill()
        if wipe:
            shutil.rmtree(n2.data_dir)
        put(channel, "back", 30, 10)
        n2.start()
        until("n2 is an ordinary member again", lambda: level(processes))
        n3.kill()
        put(channel, "back", 40, 10)
        assert drain(channel, "back", 50) == numbers(0, 50)


def test_a_node_that_is_far_behind_catches_up_by_snapshot(cluster: Make) -> None:
    """A node that was away while the log moved on takes the state of the shard, leases and dead letters included, and
    then carries it when another node dies."""
    processes = cluster(nodes=3)
    n1, _, n3 = processes.nodes.values()
    body = b"x" * 64_000
    with grpc.insecure_channel(n1.address) as channel:
        put(channel, "far", 0, 4)
        n3.kill()
        shard = 0

        def fill(n: int) -> int:
            """Produces 3 MiB to the queue and takes all but the first messages away again."""
            response = produce(channel, *(record("far", key=f"other{n}-{i}", payload=body) for i in range(48)))
            return len(response.errors)

        held = lease(channel, "far", run_messages_max=1, lease_duration=Duration(seconds=600))
        shard = held.shard
        for n in range(24):
            until("filled", lambda n=n: fill(n) == 0)  # type: ignore[misc]
        until("the log of every shard moved on",
              lambda: all(g.log_first_index > 2 for n, g in groups(n1).items() if n))
        n3.start()
        until("n3 is level", lambda: level(processes))
        assert "installed a snapshot" in n3.text()
        n1.kill()
    with grpc.insecure_channel(n3.address) as channel:
        until("leaders", lambda: all(s.leader in ("n2", "n3") for s in processes.topology(n3).shards))
        assert held.shard == shard
        ack(channel, held)
        until("counted", lambda: stats(channel, "far").messages >= 3 + 24 * 48)
        seen = drain_queue(channel, "far", held.key, 3)
        assert seen == numbers(1, 3)


def drain_queue(channel: grpc.Channel, destination: str, key: str, count: int) -> list[bytes]:
    """Takes everything until `count` messages of one queue came; returns those."""
    got: list[bytes] = []
    while len(got) < count:
        run = lease(channel, destination)
        if run.key == key:
            got += [m.message.payload for m in run.messages]
        ack(channel, run)
    return got


def test_a_lease_outlives_the_leader_that_granted_it(cluster: Make) -> None:
    """When the leader of a leased queue is killed, the next one knows the lease: it gives the queue to nobody else, and
    takes the acknowledgement of who holds it."""
    processes = cluster(nodes=3)
    with grpc.insecure_channel(processes.addresses[0]) as channel:
        put(channel, "held", 0, 2)
        run = lease(channel, "held")
    victim = processes.leader(run.shard)
    victim.kill()
    other = next(n for n in processes.nodes.values() if n.running)
    with grpc.insecure_channel(other.address) as channel:
        until("another leader", lambda: processes.topology(other).shards[run.shard - 1].leader not in ("", victim.node_id))
        assert stats(channel, "held").leased == 1
        ack(channel, run)
        rest = lease(channel, "held")
        assert [(m.message.payload, m.attempt) for m in rest.messages] == [(b"1", 1)]
        assert rest.fencing_token > run.fencing_token


def test_plain_clients_are_served_while_a_leader_hangs(cluster: Make) -> None:
    """SIGSTOP: its connections stay open and say nothing. What another node passed on to it goes to who leads then, and nobody waits for
    its credit or for its answers."""
    running = cluster(3)
    frozen, other = running.nodes["n1"], running.nodes["n2"]
    keys = [str(k) for k in range(16)]  # of most shards
    with grpc.insecure_channel(other.address) as channel:
        for key in keys:
            put(channel, "d", 0, 1, key)
        assert frozen.process is not None
        frozen.process.send_signal(signal.SIGSTOP)
        try:
            for key in keys:
                put(channel, "d", 1, 1, key)
            got: dict[str, list[bytes]] = {key: [] for key in keys}
            while any(len(payloads) < 2 for payloads in got.values()):
                run = lease(channel, "d")
                got[run.key] += [m.message.payload for m in run.messages]
                ack(channel, run)
        finally:
            frozen.process.send_signal(signal.SIGCONT)
    assert all(payloads == [b"0", b"1"] for payloads in got.values())


def test_all_nodes_killed_at_once_lose_nothing(cluster: Make) -> None:
    """What was acknowledged is on disks: after kill -9 of all nodes it is there, in order, and the numbering goes on."""
    processes = cluster(nodes=3)
    with grpc.insecure_channel(processes.addresses[0]) as channel:
        put(channel, "all", 0, 40)
        assert drain(channel, "all", 5) == numbers(0, 5)
    for node in processes.nodes.values():
        node.kill()
    for node in processes.nodes.values():
        node.start()
    processes.wait_ready()
    with grpc.insecure_channel(processes.addresses[1]) as channel:
        put(channel, "all", 40, 5)
        assert drain(channel, "all", 40) == numbers(5, 40)


async def test_all_nodes_killed_under_load_lose_nothing_and_store_nothing_twice(cluster: Make) -> None:
    """kill -9 of all nodes at once while a client produces: it goes on when they are back, and every message is stored
    once, in its queue's order, though nobody knew which requests under way had been stored."""
    processes = cluster(nodes=3)
    keys, each = 20, 60
    async with Client(processes.addresses) as client:
        async with client.producer() as producer:
            sends = []
            for n in range(keys * each):
                sends.append(asyncio.ensure_future(producer.send("load", b"%d" % n, tenant="t", key=f"k{n % keys}")))
                if n % keys == 0:
                    await asyncio.sleep(0.005)  # spreads the load; no outcome depends on it
                if n == keys * each // 2:
                    await sends[n // 2]
                    for node in processes.nodes.values():
                        node.kill()
                    for node in processes.nodes.values():
                        node.start()
            await asyncio.wait_for(asyncio.gather(*sends), 40)
        got: dict[str, list[int]] = {}
        async with asyncio.timeout(30), client.consumer("load") as consumer:
            async for run in consumer.runs():
                got.setdefault(run.key, []).extend(int(p) for p in run.payloads)
                await run.ack()
                if sum(map(len, got.values())) >= keys * each:
                    break
        while (counts := await client.admin.destination_stats("load")).shards_missing:
            await asyncio.sleep(0.1)
    assert got == {f"k{k}": list(range(k, keys * each, keys)) for k in range(keys)}
    assert (counts.enqueued_total, counts.messages) == (keys * each, 0)


def test_a_planned_stop_hands_leaderships_over(cluster: Make) -> None:
    """A node that gets SIGTERM gives its leaderships away, ends with 0, and nothing is lost."""
    processes = cluster(nodes=3)
    n1, n2, _ = processes.nodes.values()
    with grpc.insecure_channel(n2.address) as channel:
        put(channel, "stop", 0, 10)
        assert n1.stop() == 0
        until("others lead", lambda: all(s.leader not in ("", "n1") for s in processes.topology(n2).shards))
        put(channel, "stop", 10, 10)
        assert drain(channel, "stop", 20) == numbers(0, 20)
    assert "fatal" not in n1.text()


@pytest.mark.parametrize("kill", [True, False])
def test_a_restart_keeps_queues_leases_gates_and_dead_letters(cluster: Make, kill: bool) -> None:
    """After a restart of a cluster of one, planned or not: a live lease still excludes others and can be settled, dead
    letters are listed, and the order of the rest stands."""
    processes = cluster()
    node = processes.nodes["n1"]
    with grpc.insecure_channel(node.address) as channel:
        put(channel, "keep", 0, 5)
        put(channel, "keep", 0, 1, key="dead")
        first = lease(channel, "keep", run_messages_max=1)
        second = lease(channel, "keep", run_messages_max=1)
        held, rejected = (first, second) if first.key == "k" else (second, first)
        assert not settle(channel, Settlement(
            shard=rejected.shard, fencing_token=rejected.fencing_token, sequence=rejected.messages[0].sequence,
            outcome=OUTCOME_REJECT, reason="no such user")).errors
    node.kill() if kill else node.stop()
    node.start()
    processes.wait_ready()
    with grpc.insecure_channel(node.address) as channel:
        counts = stats(channel, "keep")
        assert (counts.messages, counts.leased, counts.dead_letters, counts.enqueued_total) == (5, 1, 1, 6)
        letters = all_dead_letters(channel, "keep")
        assert [(d.key, d.reason, d.attempts, d.message.payload) for d in letters] == [("dead", "no such user", 1, b"0")]
        ack(channel, held)
        assert drain(channel, "keep", 4) == numbers(1, 4)


def all_dead_letters(channel: grpc.Channel, destination: str, **fields: Any) -> list[admin.DeadLetter]:
    """All pages."""
    found: list[admin.DeadLetter] = []
    token = ""
    while True:
        page = AdminServiceStub(channel).ListDeadLetters(
            admin.ListDeadLettersRequest(destination=destination, page_token=token, **fields), timeout=CALL_SECONDS)
        found += page.dead_letters
        token = page.next_page_token
        if not token:
            return found


def test_policies_decide_between_retry_and_dead_letter(cluster: Make) -> None:
    """BLOCK_UNTIL retries in order until the attempts are used up, SKIP dead-letters at once; the next message says that
    one is missing before it. BLOCK, the default, never gives up and never lets the next one pass."""
    channel = grpc.insecure_channel(cluster(nodes=3).addresses[2])
    service = AdminServiceStub(channel)
    until_two = admin.DeliveryPolicy(nack_policy=admin.NACK_POLICY_BLOCK_UNTIL, attempts_max=2,
                                     backoff=admin.Backoff(base=Duration(nanos=1_000_000)))
    block = admin.DeliveryPolicy(backoff=until_two.backoff)
    skip = admin.DeliveryPolicy(nack_policy=admin.NACK_POLICY_SKIP)
    for name, policy in (("two", until_two), ("block", block), ("skip", skip)):
        service.CreateDestination(admin.CreateDestinationRequest(
            destination=admin.Destination(name=name, policy=policy)), timeout=CALL_SECONDS)

    def retry(run: LeasedRun) -> None:
        assert not settle(channel, Settlement(shard=run.shard, fencing_token=run.fencing_token, outcome=OUTCOME_RETRY,
                                              sequence=run.messages[0].sequence, reason="500")).errors

    put(channel, "block", 0, 2)
    for attempt in range(1, 5):
        run = lease(channel, "block")
        assert [(m.message.payload, m.attempt) for m in run.messages] == [(b"0", attempt)]
        retry(run)
    assert drain(channel, "block", 2) == numbers(0, 2) and not all_dead_letters(channel, "block")
    for name, attempts in (("two", 2), ("skip", 1)):
        put(channel, name, 0, 3)
        for attempt in range(1, attempts + 1):
            run = lease(channel, name, run_messages_max=1)
            assert (run.messages[0].message.payload, run.messages[0].attempt) == (b"0", attempt)
            retry(run)
        run = lease(channel, name, run_messages_max=1)
        assert run.messages[0].message.payload == b"1" and run.gap.count == 1
        ack(channel, run)
        assert drain(channel, name, 1) == [b"2"]
        assert [d.message.payload for d in all_dead_letters(channel, name)] == [b"0"]
    channel.close()


def test_dead_letters_of_all_nodes_are_listed_page_by_page(cluster: Make) -> None:
    """Through any node: each dead letter once, however small the pages, with tenant, key, reason and message; of one
    tenant only, if asked."""
    processes = cluster(nodes=3)
    wanted = {(f"t{i % 2}", f"k{i}", b"%d" % i) for i in range(12)}
    with grpc.insecure_channel(processes.addresses[0]) as channel:
        assert not produce(channel, *(record("dead", tenant=t, key=k, payload=p) for t, k, p in sorted(wanted))).errors
        for run in runs(channel, "dead", len(wanted)):
            assert not settle(channel, Settlement(shard=run.shard, fencing_token=run.fencing_token, outcome=OUTCOME_REJECT,
                                                  sequence=run.messages[0].sequence, reason=f"no {run.key}")).errors
    for address in processes.addresses:
        with grpc.insecure_channel(address) as channel:
            for size in (1, 5, 100):
                letters = all_dead_letters(channel, "dead", page_size=size)
                assert len(letters) == len(wanted)
                assert {(d.tenant, d.key, d.message.payload) for d in letters} == wanted
                assert {(d.reason, d.attempts) for d in letters} == {(f"no {k}", 1) for _, k, _ in wanted}
            assert {d.tenant for d in all_dead_letters(channel, "dead", tenant="t1")} == {"t1"}


def test_a_destination_that_is_down_is_parked_and_probed(cluster: Make) -> None:
    """DOWN parks the whole destination without counting an attempt; afterwards one probe goes out, and its success opens
    the destination. Another destination does not notice."""
    channel = grpc.insecure_channel(cluster().addresses[0])
    for key in ("a", "b", "c"):
        put(channel, "broken", 0, 1, key=key)
    put(channel, "sound", 0, 3)
    run = lease(channel, "broken", run_messages_max=1)
    assert not settle(channel, Settlement(shard=run.shard, fencing_token=run.fencing_token, outcome=OUTCOME_DOWN,
                                          sequence=run.messages[0].sequence, delay=Duration(nanos=500_000_000))).errors
    counts = stats(channel, "broken")
    assert counts.HasField("parked_until_time") and (counts.messages, counts.leased) == (3, 0)
    assert drain(channel, "sound", 3) == numbers(0, 3)
    seen = set()
    for _ in range(3):
        run = lease(channel, "broken", run_messages_max=1)
        assert run.messages[0].attempt == 1
        seen.add(run.key)
        ack(channel, run)
    assert seen == {"a", "b", "c"}
    assert not stats(channel, "broken").HasField("parked_until_time")
    channel.close()


def test_a_throttled_tenant_waits_and_others_do_not(cluster: Make) -> None:
    """THROTTLED parks one tenant of a destination without counting an attempt: its other queues wait, too, another
    tenant's do not, and after the delay everything goes on in order."""
    with grpc.insecure_channel(cluster().addresses[0]) as channel:
        for key in ("a", "b"):
            for n in range(2):
                assert not produce(channel, record("limited", tenant="busy", key=key, payload=b"%d" % n)).errors
        run = lease(channel, "limited")
        assert not settle(channel, Settlement(shard=run.shard, fencing_token=run.fencing_token, outcome=OUTCOME_THROTTLED,
                                              sequence=run.messages[0].sequence, delay=Duration(seconds=3))).errors
        began = time.monotonic()
        until("parked", lambda: stats(channel, "limited").parked_tenants == 1, 1)
        assert not produce(channel, record("limited", tenant="calm", key="a")).errors
        calm = lease(channel, "limited")
        assert calm.tenant == "calm"
        ack(channel, calm)
        assert stats(channel, "limited").parked_tenants == 1
        got: dict[str, list[bytes]] = {}
        while sum(map(len, got.values())) < 4:
            run = lease(channel, "limited")
            assert {m.attempt for m in run.messages} == {1}
            got.setdefault(run.key, []).extend(m.message.payload for m in run.messages)
            ack(channel, run)
        assert time.monotonic() - began > 2
        assert got == {"a": numbers(0, 2), "b": numbers(0, 2)}
        until("open", lambda: not stats(channel, "limited").parked_tenants)
