"""What only connections over a network can suffer: strangers, noise, silence, restarts, slow readers."""
from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from spillway.cluster.errors import SnapshotInvalid
from spillway.cluster.transport.grpc import (
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    OPTIONS,
    PROTOCOL,
    GrpcTransport,
    Timing,
)
from spillway.peer.v1.peer_service_pb2 import (
    ExchangeRequest,
    ExchangeResponse,
    FetchSnapshotRequest,
    Hello,
)

from tests.conformance.transport_links import PATIENCE_SECONDS, QUICK, GrpcLinks, Node

EXCHANGE = "/spillway.peer.v1.PeerService/Exchange"
FETCH = "/spillway.peer.v1.PeerService/FetchSnapshot"
PATIENT = Timing(heartbeat=0.02, silence=60.0, handshake=1.0, reconnect_min=0.001, reconnect_max=0.02)


@pytest.fixture
async def links() -> AsyncIterator[GrpcLinks]:
    made = GrpcLinks()
    yield made
    await made.close()


async def connected(a: Node, b: Node) -> None:
    await a.until(lambda: b.name in a.up)
    await b.until(lambda: a.name in b.up)


def hello(**changes: Any) -> bytes:
    fields = {"protocol": PROTOCOL, "cluster": "test", "node_id": "a", "incarnation": "store of a", **changes}
    return ExchangeRequest(hello=Hello(**fields)).SerializeToString()


class Stranger:
    """A bare client on a node's peer port."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[
            ("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)])
        self.call: Any = self.channel.stream_stream(EXCHANGE)()

    async def says(self, *messages: bytes) -> tuple[grpc.StatusCode, str]:
        """How the node ends the stream."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            try:
                for message in messages:
                    await self.call.write(message)
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError:
                pass
            code, details = await self.call.code(), await self.call.details()
        await self.channel.close()
        return code, details


@pytest.mark.parametrize(("changes", "said"), [
    ({"protocol": PROTOCOL + 1}, f"node 'a' speaks peer protocol {PROTOCOL + 1}, node 'b' speaks {PROTOCOL}"),
    ({"protocol": 0}, "speaks peer protocol 0"),
    ({"cluster": "other"}, "node 'a' is of cluster 'other', node 'b' of 'test'"),
    ({"node_id": "b"}, "another node has the id 'b', too"),
    ({"node_id": "z"}, "node 'z' is no member"),
    ({"node_id": ""}, "node '' is no member"),
    ({"node_id": "c"}, "node 'c' called node 'b': the lower id calls"),
    ({"incarnation": ""}, "names no incarnation"),
    ({"incarnation": "x" * 300}, "names no incarnation"),
    ({"founders": {"a": "x" * HELLO_BYTES_MAX}}, "a hello of"),
])
async def test_strangers_are_refused_with_the_reason(links: GrpcLinks, changes: dict[str, Any], said: str) -> None:
    """Another cluster, another protocol, no member; the node is told of none of them."""
    b = Node("b")
    await links.add(b)
    code, details = await Stranger(links.ports["b"]).says(hello(**changes))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert said in details
    assert b.last == {}


@pytest.mark.parametrize("messages", [
    [b"\xff\xff\xff garbage"], [b""], [ExchangeRequest(frames=[b"x"]).SerializeToString()],
    [hello(), b"\x0a\xff"], [hello(), hello()], [hello(), ExchangeRequest(frames=[b"x"]).SerializeToString() + b"\x12\x7f"]])
async def test_noise_ends_the_connection_and_nothing_else(links: GrpcLinks, messages: list[bytes]) -> None:
    """Before and after a valid hello; a real peer connects afterwards."""
    a, b = Node("a"), Node("b")
    await links.add(b)
    await Stranger(links.ports["b"]).says(*messages)
    await b.until(lambda: b.up == {})
    assert b.frames == []
    await links.add(a)
    await connected(a, b)


async def test_a_message_beyond_the_limit_ends_the_connection(links: GrpcLinks) -> None:
    """Before it is in memory as a whole."""
    b = Node("b")
    await links.add(b)
    code, _ = await Stranger(links.ports["b"]).says(hello(), bytes(FRAME_BYTES_MAX + (1 << 17)))
    assert code is not grpc.StatusCode.OK
    await b.until(lambda: b.up == {})


async def test_the_largest_frame_is_taken(links: GrpcLinks) -> None:
    """And one byte more is a bug of the sender."""
    a, b = Node("a"), Node("b")
    await links.add(a)
    await links.add(b)
    await connected(a, b)
    a.send("b", bytes(FRAME_BYTES_MAX))
    await b.until(lambda: b.frames)
    assert len(b.frames[0][2]) == FRAME_BYTES_MAX
    with pytest.raises(AssertionError, match="at most"):
        a.send("b", bytes(FRAME_BYTES_MAX + 1))


async def test_a_caller_that_says_nothing_is_not_waited_for() -> None:
    """A stream without a hello ends by itself."""
    links = GrpcLinks(Timing(handshake=0.05))
    b = Node("b")
    await links.add(b)
    code, _ = await Stranger(links.ports["b"]).says()
    assert code is grpc.StatusCode.OK
    await links.close()


async def test_an_id_that_is_taken_is_refused(links: GrpcLinks, caplog: pytest.LogCaptureFixture) -> None:
    """A second node of the same id has another store: it gets no connection as long as the first one has, and says why."""
    caplog.set_level(logging.INFO)
    first, second, b = Node("a"), Node("a", "another store"), Node("b")
    await links.add(b)
    await links.add(first)
    await connected(first, b)
    code, details = await Stranger(links.ports["b"]).says(hello(incarnation="another store"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "node 'a' is connected with another store" in details
    first.send("b", b"still here")
    await b.until(lambda: b.heard("a") == [b"still here"])
    await links.remove(first)
    await b.until(lambda: "a" not in b.up)
    await links.add(second)  # it lost its disk, and replaces the first one
    await connected(second, b)
    assert b.hellos["a"].incarnation == "another store"


async def test_a_peer_that_connects_anew_replaces_its_old_connection(links: GrpcLinks) -> None:
    """It noticed the end before we did; what it says in the old one counts no more."""
    b = Node("b")
    await links.add(b)
    strangers = [Stranger(links.ports["b"]) for _ in range(3)]
    for stranger in strangers:
        epoch = b.last.get("a", 0)
        await stranger.call.write(hello())
        await b.until(lambda epoch=epoch: b.last.get("a", 0) > epoch)
    assert await strangers[0].says() == (grpc.StatusCode.ABORTED, "it connected anew")
    await strangers[2].call.write(ExchangeRequest(frames=[b"x"]).SerializeToString())
    await b.until(lambda: b.heard("a") == [b"x"])
    for stranger in strangers[1:]:
        await stranger.channel.close()


async def test_a_wrong_node_at_an_address_is_refused(links: GrpcLinks, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever answers must be the one who was called; said once, however often it is tried."""
    a, c = Node("a"), Node("c")
    await links.add(c)
    links.addresses["b"] = links.addresses["c"]
    await links.add(a)
    await connected(a, c)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not caplog.records:
            await asyncio.sleep(0.001)
    assert "node 'c' answers at the address of node 'b'" in caplog.text
    assert "b" not in a.up
    assert len([r for r in caplog.records if "answers at the address" in r.message]) == 1


async def test_a_refused_node_says_so_and_goes_on_trying(links: GrpcLinks, caplog: pytest.LogCaptureFixture) -> None:
    """Its operator may correct the other side."""
    a, b = Node("a"), Node("b")
    await links.add(b, cluster="other")
    await links.add(a)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while "refused by node b" not in caplog.text:
            await asyncio.sleep(0.001)
    await links.remove(b)
    b = Node("b")
    await links.add(b)
    await connected(a, b)


async def test_a_silent_peer_is_gone(links: GrpcLinks) -> None:
    """Both sides notice within the limit, though no connection was closed; then they connect again."""
    a, b = Node("a"), Node("b")
    await links.add(a)
    await links.add(b)
    await connected(a, b)
    chunks = a.transport.fetch_snapshot("b", 1)
    links.proxies["b"].moving.clear()
    links.proxies["b"].refusing = True
    begun = asyncio.get_running_loop().time()
    await a.until(lambda: not a.up)
    await b.until(lambda: not b.up)
    assert asyncio.get_running_loop().time() - begun < QUICK.silence * 10
    with pytest.raises(SnapshotInvalid, match="not connected"):
        await anext(chunks)
    links.proxies["b"].moving.set()
    links.proxies["b"].refusing = False
    await connected(a, b)


async def test_a_quiet_connection_stays(links: GrpcLinks) -> None:
    """Heartbeats take the place of frames, and are none."""
    a, b = Node("a"), Node("b")
    await links.add(a)
    await links.add(b)
    await connected(a, b)
    transport: Any = a.transport
    connection = transport._connections["b"]
    heard = connection.heard_at
    async with asyncio.timeout(PATIENCE_SECONDS):
        while connection.heard_at < heard + 2 * QUICK.silence:
            await asyncio.sleep(QUICK.heartbeat)
    assert (a.up, a.frames, b.frames) == ({"b": 1}, [], [])


async def test_a_loop_that_stood_still_does_not_blame_its_peers(links: GrpcLinks) -> None:
    """What they said meanwhile is waiting to be read."""
    a, b = Node("a"), Node("b")
    await links.add(a)
    await links.add(b)
    await connected(a, b)
    transport: Any = a.transport
    connection = transport._connections["b"]
    connection.heard_at -= 10 * QUICK.silence
    connection.beat_at -= 10 * QUICK.silence
    a.send("b", b"x")
    await b.until(lambda: b.frames)
    assert (a.up, b.up) == ({"b": 1}, {"a": 1})


async def test_a_peer_that_does_not_read_loses_its_connection() -> None:
    """Memory for it is bounded; afterwards frames come again."""
    links = GrpcLinks(PATIENT, send_buffer_bytes=8 << 20)
    a, b = Node("a"), Node("b")
    await links.add(a)
    await links.add(b)
    await connected(a, b)
    links.proxies["b"].moving.clear()
    epoch = a.up["b"]
    sent = 0
    while a.up.get("b") == epoch:
        a.transport.send("b", epoch, bytes(1 << 20))
        sent += 1
        assert sent < 100, "the buffer grows without bound"
        await asyncio.sleep(0)
    assert sent > 8
    links.proxies["b"].cut()
    links.proxies["b"].moving.set()
    await connected(a, b)
    a.send("b", b"again")
    await b.until(lambda: b.heard("a")[-1:] == [b"again"])
    await links.close()


async def test_what_waits_goes_in_one_message(links: GrpcLinks) -> None:
    """A gRPC message is what costs, so a turn's frames share one; a message is bounded, too."""
    a, b = Node("a"), Node("b")
    await links.add(a)
    await links.add(b)
    await connected(a, b)
    transport: Any = a.transport
    connection = transport._connections["b"]
    messages: list[int] = []
    encode = connection.encode

    def counting(frames: list[bytes]) -> Any:
        messages.append(len(frames))
        return encode(frames)

    connection.encode = counting
    for number in range(500):
        a.send("b", b"%d" % number)
    await b.until(lambda: len(b.frames) == 500)
    assert [count for count in messages if count] == [500]
    messages.clear()
    for _ in range(10):
        a.send("b", bytes(300_000))
    await b.until(lambda: len(b.frames) == 510)
    assert [count for count in messages if count] == [3, 3, 3, 1]


async def test_a_node_that_restarts_elsewhere_is_found(links: GrpcLinks) -> None:
    """Its address is looked up for each connection."""
    a, b = Node("a"), Node("b")
    await links.add(a)
    await links.add(b)
    await connected(a, b)
    await links.remove(b)
    await a.until(lambda: not a.up)
    await links.proxies.pop("b").close()
    b = Node("b")
    await links.add(b)
    await connected(a, b)
    assert a.up["b"] > 1


async def test_a_call_that_the_peer_cancels_is_made_again(links: GrpcLinks) -> None:
    """gRPC reports it as a cancellation of our own task."""
    a = Node("a")
    server = grpc.aio.server(options=OPTIONS)
    calls = 0
    enough = asyncio.Event()

    async def cancel(_: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            enough.set()
        await context.abort(grpc.StatusCode.CANCELLED, "")

    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
        "spillway.peer.v1.PeerService", {"Exchange": grpc.stream_stream_rpc_method_handler(cancel)}),))
    links.addresses["b"] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await links.add(a)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await enough.wait()
    await server.stop(None)
    assert a.last == {}


@pytest.mark.parametrize("changes", [{"cluster": "other"}, {"protocol": PROTOCOL + 1}, {"node_id": "z"}, None])
async def test_a_stranger_gets_no_snapshot(links: GrpcLinks, changes: dict[str, Any] | None) -> None:
    """Whether it names another cluster, protocol or node, or sends noise."""
    b = Node("b")
    await links.add(b)
    fields: dict[str, Any] = {"group": 1, "cluster": "test", "protocol": PROTOCOL, "node_id": "a"}
    request = b"\xff" if changes is None else FetchSnapshotRequest(**(fields | changes)).SerializeToString()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{links.ports['b']}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await anext(aiter(channel.unary_stream(FETCH)(request)))
    assert failed.value.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_node_that_has_not_started_takes_no_peers() -> None:
    """Its port may be open before the groups are there."""
    transport = GrpcTransport("test", "b", {"a": ""}, Node("b").hello, Node("b").export)
    server = grpc.aio.server(options=OPTIONS)
    transport.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    code, details = await Stranger(port).says(hello())
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "the node is starting or stopping")
    await transport.close()
    await server.stop(None)


async def test_a_bug_in_a_handler_ends_the_connection_and_is_logged(links: GrpcLinks, caplog: pytest.LogCaptureFixture) -> None:
    """The reader must not die unseen, with a connection that only seems to be there."""
    a, b = Node("a"), Node("b")
    await links.add(a)
    await links.add(b)
    await connected(a, b)

    def bug(peer: str, frame: bytes) -> None:
        raise KeyError("bug")

    b.on_frame = bug
    epoch = a.up["b"]
    a.send("b", b"x")
    await a.until(lambda: a.up.get("b", epoch) != epoch)
    assert "KeyError" in caplog.text


async def test_closing_leaves_nothing_running(links: GrpcLinks) -> None:
    """No task, whatever state the connections were in."""
    before = asyncio.all_tasks()
    a, b = Node("a"), Node("b")
    await links.add(a)  # dials b and c, which are not there
    await links.add(b)
    await connected(a, b)
    assert "1 of 2 peers connected" in repr(a.transport)
    await links.close()
    left = {task for task in asyncio.all_tasks() - before if "spillway" in repr(task.get_coro())}
    assert left == set()


async def test_an_answer_of_unknown_shape_is_refused(links: GrpcLinks, caplog: pytest.LogCaptureFixture) -> None:
    """From a server that is no peer."""
    a = Node("a")
    server = grpc.aio.server(options=OPTIONS)
    answers = [b"\xff", b"", ExchangeResponse(frames=[b"x"]).SerializeToString()]
    asked = asyncio.Event()

    async def answer(_: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        if not answers:
            asked.set()
            return
        await context.write(answers.pop())
        await context.read()
        await context.read()

    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
        "spillway.peer.v1.PeerService", {"Exchange": grpc.stream_stream_rpc_method_handler(answer)}),))
    links.addresses["b"] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await links.add(a)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asked.wait()
    await server.stop(None)
    assert a.last == {}
    assert "the first message is no hello" in caplog.text
    assert "does not parse" in caplog.text
