"""What one node takes at most, and what it says to whoever wants more."""
from __future__ import annotations

import resource
from pathlib import Path

import grpc
from spillway.v1.cluster_service_pb2 import GetTopologyRequest
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub

from tests.hostile.suite import Node

STREAMS_MAX = 20


async def test_streams_are_bounded(tmp_path: Path) -> None:
    """One more is refused, with the setting's name; it gets in when another one ends. Calls are served meanwhile."""
    node = Node(tmp_path, "--streams-max", str(STREAMS_MAX))
    try:
        await node.wait()
        async with grpc.aio.insecure_channel(node.clients) as channel:
            open_ = [channel.stream_stream(f"/spillway.v1.QueueService/{('Produce', 'Lease', 'Ack')[i % 3]}")()
                     for i in range(STREAMS_MAX)]
            while True:
                more = channel.stream_stream("/spillway.v1.QueueService/Produce")(timeout=5)
                if await more.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # else the others are still on their way
                    break
            assert "streams_max" in (await more.details() or "")
            await ClusterServiceStub(channel).GetTopology(GetTopologyRequest())
            open_.pop().cancel()
            while True:
                more = channel.stream_stream("/spillway.v1.QueueService/Produce")(timeout=0.5)
                if await more.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    break
    finally:
        node.end()


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
