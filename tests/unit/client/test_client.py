"""Admin calls, the client for threads, the command line, and what importing it brings along."""
from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from spillway.client import (
    AlreadyExists,
    Client,
    Closed,
    Conflict,
    DeliveryPolicy,
    Destination,
    DestinationNotFound,
    HttpTarget,
    InternalError,
    InvalidArgument,
    NackPolicy,
    PermissionDenied,
    Record,
    ResourceExhausted,
    StaleLease,
    Unavailable,
    cli,
    sync,
)
from spillway.client.connection import calls_under_way
from spillway.client.errors import from_item_error, from_rpc_error
from spillway.client.loop_thread import LoopThread
from spillway.v1 import message_pb2 as m

from tests.unit.client.fake_broker import FakeCluster
from tests.unit.client.serving import serving


@contextmanager
def threaded() -> Iterator[FakeCluster]:
    """A cluster in a thread of its own, for programs that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> FakeCluster:
        return await FakeCluster().start(2)

    cluster = asyncio.run_coroutine_threadsafe(start(), loop).result(5)
    try:
        yield cluster
    finally:
        asyncio.run_coroutine_threadsafe(cluster.stop(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def test_destinations_are_created_read_changed_and_listed() -> None:
    """Every field of policy and target makes the round trip."""
    async with serving(2) as (_, client):
        full = Destination("a", DeliveryPolicy(
            run_messages_max=3, lease_seconds=1.5, backoff_base=0.25, backoff_cap=9.0, nack_policy=NackPolicy.BLOCK_UNTIL,
            attempts_max=4, age_max=60.0), HttpTarget(
                "http://x", 2.5, 7, {"X-A": "1"}, ("whsec_a", "whsec_b"), True, 3))
        assert await client.admin.create_destination(full) == full
        assert await client.admin.get_destination("a") == full
        await client.admin.update_destination(Destination("b"), create=True)
        for name in "cde":
            await client.admin.create_destination(name)
        assert [d.name async for d in client.admin.list_destinations()] == list("abcde")
        with pytest.raises(AlreadyExists):
            await client.admin.create_destination("a")
        with pytest.raises(DestinationNotFound):
            await client.admin.get_destination("z")
        with pytest.raises(DestinationNotFound):
            await client.admin.update_destination(Destination("z"))
        with pytest.raises(Conflict):
            await client.admin.update_destination(Destination("a", etag="old"))
        with pytest.raises(InvalidArgument) as error:
            await client.admin.create_destination("")
        assert error.value.field == "destination.name"
        with pytest.raises(InvalidArgument):
            await client.admin.create_destination(Destination("n", DeliveryPolicy(age_max=-1)))
        assert [d.payload async for d in client.admin.list_dead_letters("a")] == [b"dead"]
        assert (await client.admin.destination_stats("a")).messages == 0


async def test_admin_calls_go_to_a_node_that_answers() -> None:
    """A dead node costs one more attempt; no node at all is Unavailable."""
    async with serving(2) as (cluster, client):
        await cluster.nodes["n1"].stop()
        for name in "ab":
            await client.admin.create_destination(name)
        await cluster.nodes["n2"].stop()
        with pytest.raises(Unavailable):
            await client.admin.get_destination("a", timeout=0.2)


async def test_a_client_must_be_open() -> None:
    """And needs addresses."""
    with pytest.raises(Closed):
        Client("127.0.0.1:1").producer()
    with pytest.raises(InvalidArgument):
        Client([])
    with pytest.raises(InvalidArgument):
        Client("nowhere")


async def test_closing_the_client_closes_what_it_made() -> None:
    """Producers flush, consumers give back."""
    async with serving() as (cluster, client):
        producer, consumer = client.producer(), client.consumer("d")
        future = producer.send_nowait("d", b"x")
        await client.close()
        assert future.done() and producer.closed and consumer.closed
        assert not cluster.leases
        await client.close()


async def test_a_closed_client_leaves_nothing_for_other_loops() -> None:
    """gRPC hears of the end of a call later than who ends it. If the loop were closed by then, another one would report an error."""
    async with serving(2) as (cluster, other):
        others = calls_under_way()
        async with Client(cluster.addresses) as client, client.producer() as producer, client.consumer("d") as consumer:
            await producer.send("d", b"x")
            assert await consumer.next_run(5) is not None
            assert calls_under_way() > others
        assert calls_under_way() <= others  # those of the other client go on
        await other.close()
        assert not calls_under_way()


def test_a_loop_of_its_own_is_closed_in_order() -> None:
    """Whatever still runs there is cancelled, and ends."""
    loop, ended = LoopThread(), []

    async def linger() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    async def begin() -> None:
        tasks.append(asyncio.create_task(linger()))
        await asyncio.sleep(0)
    tasks: list[asyncio.Task[None]] = []
    loop.run(begin())
    loop.stop()
    assert ended and loop.loop.is_closed() and tasks[0].cancelled()


def test_the_client_for_threads() -> None:
    """Sends, batches, consumes, settles and administers without await."""
    with threaded() as cluster, sync.Client(cluster.addresses) as client:
        assert client.wait_ready(5).ready and client.topology.shard_count == 4
        with client.producer() as producer:
            assert producer.send("d", b"0", key="k").sequence
            assert len(producer.send_many([Record("d", b"%d" % i, key="k") for i in range(1, 5)])) == 5 - 1
            assert producer.submit("d", b"5", key="k").result(5).sequence
            producer.flush()
            with pytest.raises(InvalidArgument):
                producer.send("", b"")
        got = []
        with client.consumer("d", name="threads") as consumer:
            run = consumer.next_run(5)
            assert run is not None and run.payloads == [b"%d" % i for i in range(6)]
            run.extend(5)
            run.ack(run.messages[0])
            run.release()
            with pytest.raises(StaleLease):
                run.ack()
            for message in consumer:
                with message:
                    got.append((message.payload, message.key, message.attempt, message.id, dict(message.headers)))
                    if len(got) == 1:
                        raise ValueError("once")
                if len(got) == 6:
                    break
        assert [g[0] for g in got] == [b"1", b"1", b"2", b"3", b"4", b"5"] and got[1][2] == 2
        client.admin.create_destination("new")
        assert [d.name for d in client.admin.list_destinations()] == ["new"]
        assert client.admin.get_destination("new").name == "new"
        assert client.admin.destination_stats("new").messages == 0
        assert len(client.admin.list_dead_letters("new")) == 1
    with pytest.raises(Closed):
        client.producer()


def test_statuses_become_errors() -> None:
    """No gRPC type gets out, whatever the status."""
    expected = {grpc.StatusCode.NOT_FOUND: DestinationNotFound, grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
                grpc.StatusCode.UNAUTHENTICATED: PermissionDenied, grpc.StatusCode.FAILED_PRECONDITION: StaleLease,
                grpc.StatusCode.CANCELLED: Unavailable, grpc.StatusCode.DATA_LOSS: InternalError}
    for code, kind in expected.items():
        error = from_rpc_error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="why"))
        assert type(error) is kind and "why" in str(error)
    for code in m.ErrorCode.values():
        from_item_error(m.ItemError(code=code, description="why"))


# -- the command line --------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    code = cli.main(list(arguments))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_produce_and_consume_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                                 tmp_path: object) -> None:
    """Plain lines, JSON lines and whole files go in; payloads or JSON come out."""
    with threaded() as cluster:
        monkeypatch.setenv("SPILLWAY_ADDRESS", cluster.addresses[0])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
        code, _, err = run(capsys, "produce", "d", "--tenant", "t", "--key", "k", "--header", "a=b")
        assert code == 0 and "2 messages" in err
        lines = b'{"payload": "three", "id": "3"}\n{"payload_base64": "/w==", "delay": 0}\n'
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        code, out, _ = run(capsys, "produce", "d", "--tenant", "t", "--key", "k", "--json", "-o", "json")
        assert code == 0 and len(out.splitlines()) == 2 and json.loads(out.splitlines()[0])["sequence"]
        code, out, _ = run(capsys, "consume", "d", "-n", "1", "--no-ack")
        assert (code, out) == (0, "one\n")
        code, out, _ = run(capsys, "consume", "d", "-n", "4", "-o", "json")
        got = [json.loads(line) for line in out.splitlines()]
        assert [g.get("payload", g.get("payload_base64")) for g in got] == ["one", "two", "three", "/w=="]
        assert got[0]["tenant"] == "t" and got[0]["headers"] == {"a": "b"} and got[2]["id"] == "3"
        assert run(capsys, "consume", "d", "--idle", "0.05")[0] == 0
        assert not any(cluster.queues.values())
        for bad in (b"[]", b"{", b'{"what": 1}', b'{"delay": "x"}'):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(bad)))
            code, _, err = run(capsys, "produce", "d", "--json")
            assert code == 2 and "line 1" in err
        code, _, err = run(capsys, "produce", "d", "--file", "/nowhere")
        assert code == 2 and "/nowhere" in err
        assert run(capsys, "produce", "d", "--header", "x")[0] == 2


def test_destinations_and_status_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables for people, JSON for programs, exit codes for scripts."""
    with threaded() as cluster:
        at = ("--address", cluster.addresses[0])
        code, out, _ = run(capsys, "destination", "apply", "d", "--nack-policy", "skip", "--url", "http://x", "-o", "json",
                           *at)
        assert code == 0 and json.loads(out)["policy"]["nack_policy"] == "skip"
        code, out, _ = run(capsys, "destination", "apply", "d", "--timeout", "3", "--lease-seconds", "9", "-o", "json", *at)
        shown = json.loads(out)
        assert {"url": "http://x", "timeout": 3.0, "concurrency_max": None}.items() <= shown["http"].items()
        assert shown["policy"]["nack_policy"] == "skip" and shown["policy"]["lease_seconds"] == 9.0
        assert "http://x" in run(capsys, "destination", "list", *at)[1]
        assert "lease_seconds" in run(capsys, "destination", "show", "d", *at)[1]
        assert json.loads(run(capsys, "destination", "stats", "d", "-o", "json", *at)[1])["messages"] == 0
        assert run(capsys, "destination", "show", "z", *at)[0] == 3
        assert run(capsys, "destination", "apply", "e", "--timeout", "3", *at)[0] == 2
        assert run(capsys, "destination", "apply", "e", "--nack-policy", "what", *at)[0] == 2
        code, out, _ = run(capsys, "status", *at)
        assert code == 0 and "all have a leader" in out
        cluster.leaders[2] = ""
        code, out, _ = run(capsys, "status", "-o", "json", *at)
        assert code == 4 and json.loads(out)["healthy"] is False


def test_wrong_usage_and_missing_clusters_have_exit_codes(capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """2 for usage, 4 for a cluster that cannot be reached."""
    assert run(capsys, "nonsense")[0] == 2
    assert run(capsys, "--help")[0] == 0
    assert run(capsys, "status", "-a", "127.0.0.1:1")[0] == 4


class Plugin:
    """An entry point that fails or answers."""

    def __init__(self, name: str, missing: str = "") -> None:
        self.name = name
        self.missing = missing

    def load(self) -> object:
        if self.missing:
            raise ModuleNotFoundError(f"No module named {self.missing!r}", name=self.missing)
        return lambda argv: print("plugged", argv) or 7


def test_plugged_in_commands_parse_for_themselves(capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """`spillway x --help` reaches x; without its extra there is a hint."""
    points = [Plugin("x"), Plugin("serve", missing="rocksdict")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    assert run(capsys, "x", "--help")[:2] == (7, "plugged ['--help']\n")
    code, _, err = run(capsys, "serve", "--help")
    assert code == 2 and "spillway[broker]" in err and "rocksdict" in err
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    code, _, err = run(capsys, "dispatch")
    assert code == 2 and "spillway[dispatch]" in err


def test_the_client_needs_neither_storage_nor_consensus_nor_the_command_lines_libraries() -> None:
    """Importing it with these blocked works, and loads none of the broker."""
    code = """
import sys
for name in ("rocksdict", "pysyncobj", "msgspec", "typer", "click", "rich", "uvloop", "aiohttp", "grpc_status"):
    sys.modules[name] = None
import spillway.client, spillway.client.sync, spillway.client.cli
loaded = [n for n in sys.modules if n.startswith(("spillway.broker", "spillway.cluster", "spillway.peer"))]
assert not loaded, loaded
assert spillway.client.cli.main(["status"]) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "spillway[cli]" in done.stderr
