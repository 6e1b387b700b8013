"""Peers over real gRPC connections: a connection that breaks, however it breaks, is made again."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from spillway.cluster import exports
from spillway.cluster.errors import PeerRefused, SnapshotBroken
from spillway.cluster.snapshots import Position
from spillway.cluster.state_store import StateStore
from spillway.cluster.transport import grpc as transport
from spillway.cluster.transport.base import Handlers
from spillway.cluster.transport.grpc import PROTOCOL, GrpcTransport
from spillway.peer.v1.peer_service_pb2 import ExchangeResponse, Hello
from spillway.peer.v1.peer_service_pb2_grpc import PeerServiceServicer, add_PeerServiceServicer_to_server

LONG = 30.0  # seconds: a test that waits this long has failed
FRAME = bytes(1 << 20)


def hello(node: str) -> Hello:
    """What a node says first."""
    return Hello(protocol=PROTOCOL, cluster="c", node_id=node)


class Frozen(PeerServiceServicer):
    """A node that greets and then stands still: it takes nothing and says nothing."""

    def __init__(self) -> None:
        self.calls = 0
        self.again = asyncio.Event()

    async def Exchange(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        self.calls += 1
        if self.calls == 3:
            self.again.set()
        await context.read()
        await context.write(ExchangeResponse(hello=hello("b")))
        await asyncio.Event().wait()


async def test_a_node_calls_again_when_a_peer_fell_silent_in_the_middle_of_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that stands still takes no more bytes, so that a frame is stuck when the silence is noticed: the call ends, and the
    next one begins, again and again. Nobody else would call: the node with the lower id does."""
    monkeypatch.setattr(transport, "SILENCE_SECONDS", 0.3)
    server = grpc.aio.server()
    frozen = Frozen()
    add_PeerServiceServicer_to_server(frozen, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    node = GrpcTransport(lambda: hello("a"), "c", "a", {"b": f"127.0.0.1:{port}"}, lambda group, peer, position: None)

    def connected(peer: str, epoch: int, said: Hello) -> None:
        for _ in range(32):
            node.send(peer, epoch, FRAME)

    node.start(Handlers(connected, lambda peer, epoch, frame: None, lambda peer, epoch: None))
    try:
        await asyncio.wait_for(frozen.again.wait(), LONG)
    finally:
        await node.close()
        await server.stop(None)


def sender(store: StateStore) -> GrpcTransport:
    """The node b, which sends what is in its store."""
    def export(group: int, peer: str, position: Position | None) -> AsyncGenerator[bytes, None]:
        return store.export(group, peer, position)

    return GrpcTransport(lambda: hello("b"), "c", "b", {}, export)


async def test_a_snapshot_goes_on_over_a_new_connection(tmp_path: Path) -> None:
    """The node that sends it loses its port in the middle, and serves at another one: not a chunk is sent twice, though the state has
    changed meanwhile."""
    source, target = StateStore(tmp_path / "a"), StateStore(tmp_path / "b", snapshot_bytes_per_second=1 << 40)
    rows = {b"%05d" % n: Random(n).randbytes(20_000) for n in range(2_000)}
    source.group(1).commit(10, 2, list(rows.items()), [], [])
    b = sender(source)
    a = GrpcTransport(lambda: hello("a"), "c", "a", {}, None)
    numbers: list[int] = []

    async def serve() -> grpc.aio.Server:
        server = grpc.aio.server()
        b.add_to_server(server)
        a.set_peers({"b": f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"})
        await server.start()
        return server

    async def fetch(position: Position | None) -> AsyncIterator[bytes]:
        async for chunk in a.fetch_snapshot("b", 1, position):
            numbers.append(int.from_bytes(chunk[5:9], "little"))
            yield chunk
            if len(numbers) == 60:
                await server.stop(None)
                source.group(1).commit(11, 2, [(b"zz", b"late")], [b"01999"], [])

    server = await serve()
    with pytest.raises(SnapshotBroken):
        await target.install(1, "b", fetch, 0)
    server = await serve()
    assert await target.install(1, "b", fetch, 0) == (10, 2)
    assert dict(target.group(1).scan(b"", b"\xff")) == rows
    assert numbers == list(range(len(numbers))) and len(numbers) > 120
    await server.stop(None)
    await a.close()
    source.close()
    target.close()


async def test_a_sender_that_vanishes_ends_the_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine lost its power: nothing comes any more, not even the end of the connection. No replica waits for that for ever."""
    monkeypatch.setattr(transport, "SNAPSHOT_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(exports, "TAKEN_SECONDS", 0.5)
    source = StateStore(tmp_path, snapshot_bytes_per_second=16 << 20)
    source.group(1).commit(10, 2, [(b"%03d" % n, bytes(100_000)) for n in range(500)], [], [])
    server = grpc.aio.server()
    sender(source).add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    vanished = False
    pipes: list[asyncio.Task[None]] = []

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                if not vanished:
                    writer.write(data)
        finally:
            writer.close()
            await writer.wait_closed()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, there = await asyncio.open_connection("127.0.0.1", port)
        pipes.extend(asyncio.ensure_future(pipe(*way)) for way in ((reader, there), (back, writer)))

    network = await asyncio.start_server(between, "127.0.0.1", 0)
    node = GrpcTransport(lambda: hello("a"), "c", "a", {"b": f"127.0.0.1:{network.sockets[0].getsockname()[1]}"}, None)
    chunks = aiter(node.fetch_snapshot("b", 1, None))
    await anext(chunks)
    vanished = True
    async with asyncio.timeout(LONG):
        with pytest.raises(SnapshotBroken, match="silent"):
            while True:
                await anext(chunks)
        while repr(source._exports) != "<exports: 0 running, 1 kept>":  # the sender has noticed, too
            await asyncio.sleep(0.01)
    for task in pipes:
        task.cancel()
    await asyncio.gather(*pipes, return_exceptions=True)
    network.close()
    await network.wait_closed()
    await server.stop(None)
    await node.close()
    source.close()


async def test_a_peer_that_is_none_any_more_sends_nothing(tmp_path: Path) -> None:
    """It was removed right after it had offered a snapshot: that is no bug of this node."""
    node = GrpcTransport(lambda: hello("a"), "c", "a", {}, None)
    with pytest.raises(SnapshotBroken, match="node b is none of the cluster any more"):
        await anext(aiter(node.fetch_snapshot("b", 1, None)))


async def test_who_is_refused_for_its_versions_learns_who_refuses() -> None:
    """The node that calls is told by the one that refuses it what that one says of itself, and may draw its conclusions."""
    said: list[Hello] = []
    refused = asyncio.Event()

    def too_low(of: Hello) -> str:
        said.append(of)
        refused.set()
        return "this version is too low"

    def never(*_: Any) -> None:
        raise AssertionError("there must be no connection")

    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    low = GrpcTransport(lambda: hello("a"), "c", "a", {"b": f"127.0.0.1:{port}"}, None, too_low)
    high = GrpcTransport(lambda: Hello(protocol=PROTOCOL, cluster="c", node_id="b", feature_level=7), "c", "b", {"a": ""}, None,
                         lambda of: f"node {of.node_id} is too low")
    high.add_to_server(server)
    await server.start()
    low.start(Handlers(never, never, never))
    high.start(Handlers(never, never, never))
    try:
        await asyncio.wait_for(refused.wait(), LONG)
        assert (said[0].node_id, said[0].feature_level) == ("b", 7)
    finally:
        await low.close()
        await high.close()
        await server.stop(None)


async def test_a_node_that_is_not_called_calls_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node with the lower id looks for the other one where it was: the connection comes about by the other one, which says whom it
    calls; and once there is one, nobody calls again."""
    monkeypatch.setattr(transport, "LONELY_SECONDS", 0.2)
    up = asyncio.Event()
    epochs: list[int] = []

    def connected(peer: str, epoch: int, said: Hello) -> None:
        assert said.called == "a"
        epochs.append(epoch)
        up.set()

    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    a = GrpcTransport(lambda: hello("a"), "c", "a", {"b": "127.0.0.1:1"}, None)
    b = GrpcTransport(lambda: hello("b"), "c", "b", {"a": f"127.0.0.1:{port}"}, None)
    a.add_to_server(server)
    await server.start()
    a.start(Handlers(connected, lambda *_: None, lambda *_: None))
    b.start(Handlers(lambda *_: None, lambda *_: None, lambda *_: None))
    try:
        await asyncio.wait_for(up.wait(), LONG)
        await asyncio.sleep(0.6)  # a call more would have come meanwhile
        assert len(epochs) == 1
    finally:
        await b.close()
        await a.close()
        await server.stop(None)


async def test_who_is_of_another_cluster_of_the_same_name_is_refused() -> None:
    """Even before it is asked whether it is a member: it may have been one, and have come back as something else."""
    node = GrpcTransport(lambda: hello("a"), "c", "a", {}, None, foreign=lambda of: f"{of.cluster_id} is another one")
    with pytest.raises(PeerRefused, match="j is another one"):
        node._open("", Hello(protocol=PROTOCOL, cluster="c", node_id="b", cluster_id="j"))


async def test_a_peer_that_moved_is_called_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel to where it was is closed, and so is that of a peer that is gone: they would be used, or stay, for ever."""
    node = GrpcTransport(lambda: hello("c"), "c", "c", {"a": "127.0.0.1:1", "b": "127.0.0.1:1", "d": "127.0.0.1:1"}, None)
    node.start(Handlers(lambda *_: None, lambda *_: None, lambda *_: None))
    try:
        kept, moved, gone = node.channel("a"), node.channel("b"), node.channel("d")
        node.set_peers({"a": "127.0.0.1:1", "b": "127.0.0.1:2"})
        assert node.channel("a") is kept and node.channel("b") is not moved
        with pytest.raises(KeyError):
            node.channel("d")
        await asyncio.gather(*node._tasks)
        for channel in (moved, gone):
            with pytest.raises(grpc.aio.UsageError, match="closed"):
                await channel.unary_unary("/x")(b"")
    finally:
        await node.close()
