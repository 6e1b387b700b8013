"""What one node takes at most, and what it says to whoever wants more."""
from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import grpc
from spillway.v1.cluster_service_pb2 import GetTopologyRequest
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub

from tests.hostile.suite import Node

STREAMS_MAX = 20
BEYOND = 5


async def test_streams_are_bounded(tmp_path: Path) -> None:
    """Those beyond are refused, with the setting's name; one gets in when another one ends. Calls are served meanwhile."""
    node = Node(tmp_path, "--streams-max", str(STREAMS_MAX))
    try:
        await node.wait()
        async with grpc.aio.insecure_channel(node.clients) as channel, asyncio.timeout(60):
            streams = [channel.stream_stream(f"/spillway.v1.QueueService/{('Produce', 'Lease', 'Ack')[i % 3]}")()
                       for i in range(STREAMS_MAX + BEYOND)]
            ends = {asyncio.ensure_future(stream.code()): stream for stream in streams}
            refused: set[asyncio.Future[grpc.StatusCode]] = set()
            while len(refused) < BEYOND:  # which ones is the network's choice
                done, _ = await asyncio.wait(ends.keys() - refused, return_when=asyncio.FIRST_COMPLETED)
                refused |= done
            for end in refused:
                assert await end is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "streams_max" in (await ends[end].details() or "")
            await ClusterServiceStub(channel).GetTopology(GetTopologyRequest())
            held = [end for end in ends if end not in refused]
            assert not any(end.done() for end in held)
            assert await _answer(channel) is grpc.StatusCode.RESOURCE_EXHAUSTED
            ends[held.pop()].cancel()
            while (code := await _answer(channel)) is grpc.StatusCode.RESOURCE_EXHAUSTED:  # the end is on its way
                pass
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert not any(end.done() for end in held)
    finally:
        node.end()


async def _answer(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """What a stream is told whose only request is garbage: about the garbage, once it got in."""
    stream = channel.stream_stream("/spillway.v1.QueueService/Produce")(iter([b"\xff"]))
    return await stream.code()  # type: ignore[no-any-return]


async def test_all_descriptors_are_taken(tmp_path: Path) -> None:
    """A node may open as many files as the system lets it, not as few as shells are given."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard // 2), hard))
    try:
        node = Node(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        await node.wait()
        assert resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        node.end()
