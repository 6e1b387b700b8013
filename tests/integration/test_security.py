"""Real nodes with certificates and tokens: who has none, or the wrong one, is refused, and that is logged; who has goes on, whatever is
rotated, revoked or killed."""
from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from certificates import ADMIN_TOKEN, Authority, SecureCluster, bearer
from cluster_process import ClusterProcesses, NodeProcess
from cryptography.hazmat.primitives.asymmetric import ec
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from grpc_status import rpc_status
from plain_client import record
from spillway.client import Client, NotFound, PermissionDenied, TokenScope, Unavailable
from spillway.cluster.transport.grpc import PROTOCOL
from spillway.peer.v1.peer_service_pb2 import ExchangeRequest, FetchSnapshotRequest, Hello
from spillway.peer.v1.peer_service_pb2_grpc import PeerServiceStub
from spillway.peer.v1.share_service_pb2 import ShareRequest
from spillway.peer.v1.share_service_pb2_grpc import ShareServiceStub
from spillway.v1 import admin_service_pb2 as admin
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1.admin_service_pb2_grpc import AdminServiceStub
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub
from spillway.v1.message_pb2 import ERROR_CODE_PERMISSION_DENIED
from spillway.v1.queue_service_pb2 import (
    OUTCOME_ACK,
    AckRequest,
    Credit,
    LeaseRequest,
    ProduceRequest,
    Settlement,
    Subscribe,
)
from spillway.v1.queue_service_pb2_grpc import QueueServiceStub

from demo.ports import free_ports

LONG = 60.0  # seconds: a test that waits this long has failed


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., SecureCluster]]:
    """Starts clusters; ends their processes."""
    made: list[SecureCluster] = []

    def start(nodes: int = 1, **options: Any) -> SecureCluster:
        cluster = SecureCluster(tmp_path, nodes, **options)
        made.append(cluster)
        cluster.start()
        return cluster

    yield start
    for cluster in made:
        cluster.end()


async def until(what: str, condition: Callable[[], Any]) -> None:
    """Waits for other processes."""
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.02)


def audited(node: NodeProcess, **fields: str) -> list[dict[str, Any]]:
    """Lines of a node's audit log with these values."""
    lines = [json.loads(line.partition("spillway.audit: ")[2]) for line in node.text().splitlines() if "spillway.audit: " in line]
    return [line for line in lines if all(value in line[name] for name, value in fields.items())]


def refused(channel: grpc.Channel, token: str = ADMIN_TOKEN) -> grpc.RpcError:
    """The error of a call that must not be answered."""
    with channel, pytest.raises(grpc.RpcError) as caught:
        ClusterServiceStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=10, metadata=bearer(token))
    return caught.value


OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


async def test_whoever_has_no_valid_certificate_is_refused_at_the_clients_port(tmp_path: Path) -> None:
    """Without TLS, without a certificate where one is demanded, with one that has expired or is of another authority: no connection, and
    the node says each."""
    users = Authority(tmp_path, "users")
    cluster = SecureCluster(tmp_path, 1, ["--tls-client-ca", str(users.path)], tokens=False)
    node = cluster.nodes["n1"]
    node.env["GRPC_VERBOSITY"] = "ERROR"  # as the command line has it
    mine = users.issue("app", "app")
    node.start()
    try:
        def call(cert: tuple[str, str] | None) -> grpc.Channel:
            return grpc.secure_channel(node.address, cluster.clients.credentials(cert), OPTIONS)

        def works() -> bool:
            try:
                with call(mine) as channel:
                    return bool(ClusterServiceStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=5).topology.shards)
            except grpc.RpcError:
                return False

        await until("it serves", works)
        for channel, said in ((grpc.insecure_channel(node.address, OPTIONS), "a connection without TLS"),
                              (call(None), "a connection without a certificate"),
                              (call(users.issue("old", "app", expired=True)), "certificate has expired"),
                              (call(Authority(tmp_path, "strangers").issue("stranger", "app")), "unable to get local issuer certificate")):
            assert refused(channel).code() is grpc.StatusCode.UNAVAILABLE
            await until(said, lambda said=said: said in node.text())
        assert "clients on" in node.text() and "certificates of tls_client_ca" in node.text()
        # Who is known by a certificate is named in the audit log.
        with call(mine) as channel, pytest.raises(grpc.RpcError):
            AdminServiceStub(channel).PauseDelivery(admin.PauseDeliveryRequest(destination="d", reason="r"), timeout=10)
        await until("it is in the audit log", lambda: audited(node, who="certificate", method="PauseDelivery", target="destination=d",
                                                              result="NOT_FOUND"))
    finally:
        cluster.end()


async def test_a_peer_that_says_it_is_another_one_is_refused(tmp_path: Path, started: Any) -> None:
    """A certificate of n3 does not let anybody be n2: not in the hello, not for a snapshot, not for what is shared. One that names no node
    lets nobody in at all, and nor does another authority's. All is logged."""
    cluster = started(3)
    node = cluster.nodes["n1"]
    topology = cluster.topology()
    hello = Hello(protocol=PROTOCOL, cluster="spillway", node_id="n2", incarnation="x", formed=True, feature_min=1, feature_max=9,
                  cluster_id=topology.cluster_id)

    def peer(*names: str, authority: Authority = cluster.peers) -> grpc.Channel:
        cert = authority.issue("intruder", *names)
        return grpc.secure_channel(node.peer_address, cluster.peers.credentials(cert), [
            *OPTIONS, ("grpc.ssl_target_name_override", "n1")])

    with peer("n3") as channel:
        calls: list[tuple[Any, str]] = [
            (lambda: list(PeerServiceStub(channel).Exchange(iter([ExchangeRequest(hello=hello)]), timeout=10)),
             "says that it is node 'n2', and its certificate names 'n3'"),
            (lambda: list(PeerServiceStub(channel).FetchSnapshot(FetchSnapshotRequest(group=0, cluster="spillway"), timeout=10,
                                                                 metadata=(("spillway-node", "n2"),))), "its certificate names 'n3'"),
            (lambda: ShareServiceStub(channel).Share(ShareRequest(node_id="n2", number=1), timeout=10),
             "the request says that it is of 'n2'")]
        for call, said in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED)
            assert said in caught.value.details()
            await until(said, lambda said=said: said in node.text())
    error = refused(peer("app"))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED and "no node of the cluster" in error.details()
    assert refused(peer("n2", authority=Authority(tmp_path, "strangers"))).code() is grpc.StatusCode.UNAVAILABLE
    await until("stranger", lambda: "unable to get local issuer certificate" in node.text())
    assert refused(grpc.insecure_channel(node.peer_address, OPTIONS)).code() is grpc.StatusCode.UNAVAILABLE
    await until("plaintext", lambda: "a connection without TLS" in node.text())
    # The cluster has noticed nothing.
    assert all(s.leader for s in cluster.topology().shards)


async def test_nodes_with_and_without_tls_say_what_is_wrong(tmp_path: Path) -> None:
    """One node has certificates, the other has none, and a third one has another one's: each says it of the others, and they form no
    cluster."""
    cluster = SecureCluster(tmp_path, 3, tokens=False)
    n1, n2, n3 = cluster.nodes.values()
    at = n2.argv.index("--tls-cert")
    del n2.argv[at:at + 10]
    cluster.peers.issue("n3-peers", "n1", "n3")  # valid for itself
    n3.argv[n3.argv.index("--node-id") + 1] = "n3"
    try:
        for node in (n1, n2):
            node.start()
        await until("n1 tells", lambda: "n2" in n1.text() and "does not speak TLS" in n1.text())
        await until("n2 tells", lambda: "speaks TLS, and this node does not: set peer_tls_cert" in n2.text())
        # Somebody else at the address of n2.
        n2.kill()
        cluster.peers.issue("n2-peers", "n3", "n2")
        n2.argv += cluster.security("n2")
        n2.start()
        await until("n2 is n2", lambda: "connected to node n2" in n1.text())
        n2.kill()
        cluster.peers.issue("n2-peers", "n4")
        n2.argv[n2.argv.index("--node-id") + 1] = "n4"
        n2.argv[n2.argv.index("--data-dir") + 1] = str(tmp_path / "n4")
        peers = n2.argv.index("--peers")
        del n2.argv[peers:peers + 2]
        n2.start()
        await until("n1 tells", lambda: "should be node 'n2', and has a certificate of 'n4'" in n1.text())
    finally:
        cluster.end()


def test_a_node_with_a_certificate_of_another_one_does_not_start(tmp_path: Path) -> None:
    """It ends at once, with what to do."""
    cluster = SecureCluster(tmp_path, 1)
    cluster.peers.issue("n1-peers", "n2")
    node = cluster.nodes["n1"]
    node.start()
    assert node.wait() == 2
    assert "peer_tls_cert" in node.text() and "does not name this node: it needs the DNS name 'n1'" in node.text()


def test_a_node_beyond_loopback_without_protection_does_not_start(tmp_path: Path) -> None:
    """It ends at once, with what to do."""
    port = free_ports(1)[0]
    node = NodeProcess(tmp_path, "n1", f"0.0.0.0:{port}", "127.0.0.1:0", [])
    node.start()
    assert node.wait() == 2
    assert "without TLS: set tls_cert and tls_key, listen on loopback, or say allow_insecure" in node.text()


async def test_what_a_token_does_not_allow_is_refused_by_name(started: Any) -> None:
    """Producing, leasing, settling and administering are refused where no scope is for it, with the scope and the destination; no token,
    or a wrong one, is refused altogether. Each refusal is in the audit log."""
    cluster = started(3)
    node = cluster.nodes["n1"]
    async with Client(cluster.addresses, **cluster.trust, token_file=str(cluster.admin_token_file)) as client:
        for name in ("mine", "mine-too", "theirs"):
            await client.admin.create_destination(name)
        _, mine = await client.admin.create_token("mine", [TokenScope("produce", "mine*", "acme*"), TokenScope("lease", "mine*"),
                                                           TokenScope("admin", "mine*")])
        _, theirs = await client.admin.create_token("theirs", [TokenScope("produce", "theirs"), TokenScope("lease", "theirs")])
        with pytest.raises(PermissionDenied, match="admin_token_file has no lease scope"):
            async with client.consumer("mine") as consumer:
                await consumer.next_message(LONG)
    async with Client(cluster.addresses, **cluster.trust, token=mine) as client, client.producer() as producer:
        await producer.send("mine", b"1", tenant="acme-1")
        for destination, tenant in (("mine", "other"), ("mine", ""), ("theirs", "acme"), ("new", "acme")):
            with pytest.raises(PermissionDenied, match=f"no produce scope for destination '{destination}', tenant '{tenant}'"):
                await producer.send(destination, b"2", tenant=tenant)
        assert [d.name async for d in client.admin.list_destinations()] == ["mine", "mine-too"]
        with pytest.raises(PermissionDenied, match="no admin scope for destination 'theirs'"):
            await client.admin.pause("theirs", reason="r")
        with pytest.raises(PermissionDenied, match="no admin scope for everything"):
            await client.admin.create_token("more", [TokenScope("admin")])
        for patterns in ("theirs", "*", ["mine", "m*"]):
            with pytest.raises(PermissionDenied, match="no lease scope for destination"):
                async with client.consumer(patterns) as consumer:
                    await consumer.next_message(LONG)
        async with client.consumer(["mine", "mine-*"]) as consumer:
            message = await consumer.next_message(LONG)
            assert message is not None and message.payload == b"1"
            await foreign_settlement(cluster, theirs, message.run.shard, message.run.fencing_token, message.sequence)
            await message.ack()
    for token, said in (("", "no token"), ("spw_0123_x", "not valid, or was revoked"), (mine + "x", "not valid, or was revoked"),
                        ("guessed", "not valid")):
        for one in cluster.nodes.values():
            channel = grpc.secure_channel(one.address, cluster.clients.credentials(), OPTIONS)
            with channel, pytest.raises(grpc.RpcError) as caught:
                ClusterServiceStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=10, metadata=bearer(token) if token else ())
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED and said in caught.value.details()
    assert audited(node, result="UNAUTHENTICATED", method="ClusterService/GetTopology")
    lines = [line for one in cluster.nodes.values() for line in audited(one, result="PERMISSION_DENIED")]
    for method, why in (("AdminService/PauseDelivery", "no admin scope for destination 'theirs'"),
                        ("AdminService/CreateToken", "no admin scope for everything"),
                        ("QueueService/Produce", "no produce scope"), ("QueueService/Lease", "no lease scope"),
                        ("QueueService/Ack", "no lease scope")):
        assert any(line["method"] == method and why in line["why"] and line["from"].startswith("ipv4:127.0.0.1:") for line in lines), method
    done = [line for one in cluster.nodes.values() for line in audited(one, method="AdminService/CreateToken", result="OK")]
    assert len(done) == 2 and all(line["who"] == "admin_token_file" for line in done)
    assert not any(mine in one.text() or ADMIN_TOKEN in one.text() for one in cluster.nodes.values())


async def foreign_settlement(cluster: SecureCluster, token: str, shard: int, fencing_token: int, sequence: int) -> None:
    """Whoever guesses somebody else's fencing token settles nothing, at any node."""
    request = AckRequest(settlements=[Settlement(shard=shard, fencing_token=fencing_token, sequence=sequence, outcome=OUTCOME_ACK)])
    for node in cluster.nodes.values():
        async with grpc.aio.secure_channel(node.address, cluster.clients.credentials(), OPTIONS) as channel:
            call = QueueServiceStub(channel).Ack(iter([request]), metadata=bearer(token))  # type: ignore[call-overload]
            response = await call.read()
            assert [e.code for e in response.errors] == [ERROR_CODE_PERMISSION_DENIED], response
            call.cancel()


async def test_a_revoked_token_ends_what_it_had_opened_everywhere(started: Any) -> None:
    """Streams at every node, whoever is asked to revoke it: they end with UNAUTHENTICATED, and no new one opens."""
    cluster = started(3)
    options = {**cluster.trust, "token_file": str(cluster.admin_token_file)}
    async with Client(cluster.addresses, **options) as client:
        await client.admin.create_destination("d")
        made, secret = await client.admin.create_token("short", [TokenScope("produce", "d"), TokenScope("lease", "d")])
        _, stays = await client.admin.create_token("stays", [TokenScope("produce", "d"), TokenScope("lease", "d")])
        channels = [grpc.aio.secure_channel(n.address, cluster.clients.credentials(), OPTIONS) for n in cluster.nodes.values()]
        metadata = bearer(secret)
        streams = []
        for channel in channels:
            stub: Any = QueueServiceStub(channel)  # type: ignore[arg-type]
            lease = stub.Lease(metadata=metadata)
            await lease.write(LeaseRequest(subscribe=Subscribe(destinations=["d"], credit=Credit(messages=1, bytes=1000))))
            produce = stub.Produce(metadata=metadata)
            await produce.write(ProduceRequest(records=[record("d", payload=b"x")]))
            assert not (await produce.read()).errors
            watch = ClusterServiceStub(channel).WatchTopology(pb.WatchTopologyRequest(), metadata=metadata)  # type: ignore[call-overload]
            await watch.read()
            streams += [lease, produce, watch]
        kept = QueueServiceStub(channels[0]).Produce(metadata=bearer(stays))  # type: ignore[arg-type,call-arg]
        await kept.write(ProduceRequest(records=[record("d", payload=b"x")]))
        assert not (await kept.read()).errors
        await client.admin.revoke_token(made.token_id)
        async with asyncio.timeout(LONG):
            for stream in streams:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    while await stream.read() is not grpc.aio.EOF:
                        pass
                    raise AssertionError(f"ended with {await stream.code()}")
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED and "revoked" in caught.value.details()
        for channel in channels:
            with pytest.raises(grpc.aio.AioRpcError, match="revoked"):
                await ClusterServiceStub(channel).GetTopology(pb.GetTopologyRequest(), metadata=metadata)  # type: ignore[misc]
        await kept.write(ProduceRequest(records=[record("d", payload=b"x")]))
        assert not (await kept.read()).errors
        for node in cluster.nodes.values():
            assert audited(node, who=f"token {made.token_id} (short)", result="UNAUTHENTICATED")
        for channel in channels:
            await channel.close()
        with pytest.raises(NotFound):
            await client.admin.revoke_token(made.token_id)
        # The admin token is valid as long as it is in its file.
        cluster.admin_token_file.write_text("another-admin-token-of-enough-characters")
        await until("the client has read it", lambda: client._security.token() != ADMIN_TOKEN)

        async def works() -> bool:
            try:
                return len([t async for t in client.admin.list_tokens()]) == 1
            except PermissionDenied:
                return False

        async with asyncio.timeout(LONG):
            while not await works():
                await asyncio.sleep(0.05)
    for node in cluster.nodes.values():  # each looks at its file by itself
        def former(node: NodeProcess = node) -> bool:
            channel = grpc.secure_channel(node.address, cluster.clients.credentials(), OPTIONS)
            try:
                with channel:
                    ClusterServiceStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=10, metadata=bearer(ADMIN_TOKEN))
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.UNAUTHENTICATED
            return False

        await until("it refuses the former one", former)


async def test_a_cluster_goes_on_while_all_certificates_are_replaced_and_leaders_die(started: Any) -> None:
    """Three nodes with mTLS and tokens: messages are produced and consumed, each once and in order, while a leader is killed, all
    certificates and the clients' token are replaced, and another one is killed: who comes back does so with the new ones."""
    cluster = started(3)
    async with Client(cluster.addresses, **cluster.trust, token_file=str(cluster.admin_token_file)) as client:
        await client.admin.create_destination("d")
        first, secret = await client.admin.create_token("app", [TokenScope("produce", "d"), TokenScope("lease", "d")])
    token_file = cluster.directory / "app.token"
    token_file.write_text(secret)
    got: list[int] = []
    async with Client(cluster.addresses, **cluster.trust, token_file=str(token_file)) as client, client.producer() as producer, \
            client.consumer("d") as consumer:
        sent = 0

        async def send(count: int) -> None:
            nonlocal sent
            for _ in range(count):
                async with asyncio.timeout(LONG):
                    await producer.send("d", str(sent).encode(), key="k")
                sent += 1

        async def take() -> None:
            async for message in consumer:
                async with message:
                    got.append(int(message.payload))

        taking = asyncio.create_task(take())
        await send(20)
        victim = cluster.leader(1)
        victim.kill()
        await send(20)
        victim.start()
        cluster.wait_ready()
        before = {n: node.text().count("took new files into use") for n, node in cluster.nodes.items()}
        for node_id in cluster.nodes:
            cluster.rotate(node_id)
        async with Client(cluster.addresses, **cluster.trust, token_file=str(cluster.admin_token_file)) as admins:
            _, secret = await admins.admin.create_token("app", [TokenScope("produce", "d"), TokenScope("lease", "d")])
            token_file.write_text(secret)
            await until("the client has read it", lambda: client._security.token() == secret)
            await admins.admin.revoke_token(first.token_id)
            await send(20)
            await until("all have the new ones", lambda: all(
                node.text().count("took new files into use") >= before[n] + 2 for n, node in cluster.nodes.items()))
            await send(20)
            victim = cluster.leader(2)
            victim.kill()
            await send(20)
            victim.start()
            cluster.wait_ready()
            await send(20)
            await until("all is consumed", lambda: len(got) >= sent)
            status = await admins.cluster.status()
            assert all(node.reachable for node in status.nodes)
        taking.cancel()
    assert list(dict.fromkeys(got)) == list(range(sent))


def spillway(cluster: SecureCluster, *arguments: str, code: int = 0, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """One command."""
    done = subprocess.run([sys.executable, "-m", "spillway.client.cli", *arguments], input=stdin, capture_output=True, text=True,
                          timeout=LONG, check=False, env={
                              **os.environ, "SPILLWAY_ADDRESS": cluster.nodes["n1"].address,
                              "SPILLWAY_TLS_CA": str(cluster.clients.path), **env})
    assert done.returncode == code, done.stderr
    return done


def test_tokens_from_the_command_line(started: Any) -> None:
    """Made, used, listed and revoked; what goes to standard output is the token alone."""
    cluster = started()
    admins = {"SPILLWAY_TOKEN_FILE": str(cluster.admin_token_file)}
    assert "no token: this cluster asks for one" in spillway(cluster, "status", code=5).stderr
    made = spillway(cluster, "token", "create", "ci", "--produce", "hello*", "--lease", "hello", "--expires", "1h", **admins)
    token = made.stdout.strip()
    assert token.startswith("spw_") and "\n" not in token
    mine = {"SPILLWAY_TOKEN": token}
    spillway(cluster, "produce", "hello", stdin="first\n", **mine)
    assert spillway(cluster, "consume", "hello", "--count", "1", **mine).stdout == "first\n"
    assert "no produce scope for destination 'other'" in spillway(cluster, "produce", "other", stdin="x\n", code=1, **mine).stderr
    assert "no admin scope" in spillway(cluster, "destination", "list", code=5, **mine).stderr
    (listed,) = json.loads(spillway(cluster, "token", "list", "-o", "json", **admins).stdout)
    assert listed["name"] == "ci" and listed["expire_time"] and [s["action"] for s in listed["scopes"]] == ["lease", "produce"]
    spillway(cluster, "token", "revoke", listed["token_id"], "--yes", **admins)
    assert "revoked" in spillway(cluster, "produce", "hello", stdin="x\n", code=5, **mine).stderr
    assert json.loads(spillway(cluster, "token", "list", "-o", "json", **admins).stdout) == []
    wrong = spillway(cluster, "status", code=4, SPILLWAY_TLS_CA="")
    assert "has told the topology" in wrong.stderr or "cannot be reached" in wrong.stderr


def test_the_end_of_certificates_is_a_metric(started: Any) -> None:
    """Of both ports, for the alert that comes before it."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    started(1, flags=["--metrics-listen", address])
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=LONG) as response:
        text = response.read().decode()
    ends = dict(re.findall(r'^spillway_certificate_end_timestamp_seconds\{port="(\w+)"\} (\S+)$', text, re.MULTILINE))
    assert ends.keys() == {"clients", "nodes"} and min(map(float, ends.values())) > time.time()


async def test_limits_of_connections_and_tokens(started: Any) -> None:
    """One stream too many is refused, with when to come back; whoever produces too fast waits, and loses nothing."""
    cluster = started(1, flags=["--connection-streams-max", "3", "--connection-messages-per-second", "100",
                                "--connection-bytes-in-flight-max", "2000"])
    node = cluster.nodes["n1"]
    async with Client(node.address, **cluster.trust, token_file=str(cluster.admin_token_file)) as client:
        await client.admin.create_destination("d")
        _, secret = await client.admin.create_token("two", [TokenScope("produce", "d"), TokenScope("lease")], streams_max=2)

    def opened() -> grpc.aio.Channel:
        return grpc.aio.secure_channel(node.address, cluster.clients.credentials(), OPTIONS)

    async def over(channel: grpc.aio.Channel, token: str, said: str) -> None:
        call: Any = ClusterServiceStub(channel).WatchTopology(pb.WatchTopologyRequest(), metadata=bearer(token))  # type: ignore[call-overload]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and said in caught.value.details()
        status = rpc_status.from_call(caught.value)
        assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in status.details)

    async with opened() as one, opened() as two:
        watches: list[Any] = []
        for channel, token in ((one, secret), (two, secret), (one, ADMIN_TOKEN), (one, ADMIN_TOKEN)):
            watches.append(ClusterServiceStub(channel).WatchTopology(  # type: ignore[call-overload]
                pb.WatchTopologyRequest(), metadata=bearer(token)))
            await watches[-1].read()
        await over(one, ADMIN_TOKEN, "has 3 open streams")
        await over(two, secret, "token")
        for watch in watches:
            watch.cancel()
        assert audited(node, result="RESOURCE_EXHAUSTED")

        async def room() -> bool:
            call: Any = ClusterServiceStub(one).WatchTopology(  # type: ignore[call-overload]
                pb.WatchTopologyRequest(), metadata=bearer(secret))
            try:
                await call.read()
            except grpc.aio.AioRpcError:
                return False
            finally:
                call.cancel()
            return True

        async with asyncio.timeout(LONG):
            while not await room():
                await asyncio.sleep(0.02)
    # What comes at once is taken in at once, and then paid for: after 400 records nothing is read for three seconds.
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with Client(node.address, **cluster.trust, token=secret) as client, client.producer() as producer, asyncio.timeout(LONG):
        receipts = await asyncio.gather(*(producer.send("d", b"x", key=str(n)) for n in range(400)))
        receipts += [await producer.send("d", b"x", key=str(n)) for n in range(10)]
    assert len({(r.shard, r.sequence) for r in receipts}) == 410 and loop.time() - begun >= 2.0


async def test_tokens_of_an_identity_provider(tmp_path: Path) -> None:
    """They let in with what they claim; their streams end when they expire, and when their key is gone."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = {**json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key())), "kid": "k", "alg": "ES256"}
    (jwks := tmp_path / "jwks").write_text(json.dumps({"keys": [public]}))
    cluster = SecureCluster(tmp_path, 1, ["--jwt-jwks-file", str(jwks), "--jwt-issuer", "https://id.example", "--jwt-audience", "spillway"])
    node = cluster.nodes["n1"]

    def token(seconds: float, **claims: Any) -> str:
        scopes = [{"action": "produce", "destinations": "d"}, {"action": "lease", "destinations": "d"}]
        return jwt.encode({"iss": "https://id.example", "aud": "spillway", "sub": "app", "exp": time.time() + seconds, "spillway": scopes,
                           **claims}, key, "ES256", headers={"kid": "k"})

    try:
        cluster.start()
        async with Client(node.address, **cluster.trust, token=token(600)) as client, client.producer() as producer:
            await producer.send("d", b"1")
            with pytest.raises(PermissionDenied, match="no produce scope for destination 'e'"):
                await producer.send("e", b"2")
        error = refused(grpc.secure_channel(node.address, cluster.clients.credentials(), OPTIONS), token(600, aud="other"))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED and "Audience" in error.details()
        async with grpc.aio.secure_channel(node.address, cluster.clients.credentials(), OPTIONS) as channel:
            for lasts in (-3.0, 600.0):  # within the leeway of five seconds; until its key is taken away
                call: Any = ClusterServiceStub(channel).WatchTopology(  # type: ignore[call-overload]
                    pb.WatchTopologyRequest(), metadata=bearer(token(lasts)))
                await call.read()
                if lasts > 0:
                    jwks.write_text(json.dumps({"keys": [{**public, "kid": "another"}]}))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async with asyncio.timeout(LONG):
                        while await call.read() is not grpc.aio.EOF:
                            pass
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                if lasts < 0:
                    assert "expired" in caught.value.details()
    finally:
        cluster.end()


async def test_health_is_open_and_reflection_needs_a_token(started: Any) -> None:
    """Whoever probes has no token; whoever looks around has any."""
    cluster = started()
    node = cluster.nodes["n1"]
    request = ServerReflectionRequest(list_services="")
    async with grpc.aio.secure_channel(node.address, cluster.clients.credentials(), OPTIONS) as channel:
        health: Any = HealthStub(channel)
        assert (await health.Check(HealthCheckRequest())).status == HealthCheckResponse.SERVING
        watch = health.Watch(HealthCheckRequest())
        assert (await watch.read()).status == HealthCheckResponse.SERVING
        watch.cancel()
        reflection: Any = ServerReflectionStub(channel)

        async def silent() -> AsyncIterator[Any]:  # a write that meets the end of the call is an error of its own in grpc.aio
            await asyncio.Event().wait()
            yield
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflection.ServerReflectionInfo(silent()).read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = await reflection.ServerReflectionInfo(iter([request]), metadata=bearer(ADMIN_TOKEN)).read()
        assert "spillway.v1.QueueService" in {service.name for service in answer.list_services_response.service}


async def test_a_node_joins_with_certificates(started: Any) -> None:
    """Nobody knows its name before: its certificate must name the node that asks to join."""
    cluster = started()
    cluster.rotate("n2")
    node = cluster.join("n2", *cluster.security("n2"), "--auth", "tokens", "--admin-token-file", str(cluster.admin_token_file))
    await until("it joins", lambda: "connected to node n2" in cluster.nodes["n1"].text())
    cluster.wait_ready()
    await until("it knows all nodes", lambda: {n.id for n in cluster.topology(node).nodes} == {"n1", "n2"})


def test_a_cluster_without_any_of_it_works_as_before(tmp_path: Path) -> None:
    """On loopback, and says so."""
    cluster = ClusterProcesses(tmp_path, 1)
    try:
        cluster.start()
        assert "no TLS, no tokens; only this machine reaches it" in cluster.nodes["n1"].text()
    finally:
        cluster.end()


async def test_a_client_without_a_token_is_told_at_once(started: Any) -> None:
    """It does not try until its time is over."""
    cluster = started()
    async with Client(cluster.addresses, **cluster.trust) as client:
        with pytest.raises(PermissionDenied, match="no token"):
            await client.wait_ready(LONG)
    async with Client(cluster.addresses) as client:
        with pytest.raises(Unavailable):
            await client.wait_ready(1.0)
