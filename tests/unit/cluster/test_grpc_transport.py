"""Peers over real gRPC connections: a connection that breaks, however it breaks, is made again."""
from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
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
    node = GrpcTransport(lambda: hello("a"), "c", "a", {"b": f"127.0.0.1:{port}"}, lambda group, peer: None)

    def connected(peer: str, epoch: int, said: Hello) -> None:
        for _ in range(32):
            node.send(peer, epoch, FRAME)

    node.start(Handlers(connected, lambda peer, epoch, frame: None, lambda peer, epoch: None))
    try:
        await asyncio.wait_for(frozen.again.wait(), LONG)
    finally:
        await node.close()
        await server.stop(None)


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
