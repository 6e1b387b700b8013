"""Runs attacks on a real node, with an honest client beside them, and looks at what is left of them afterwards."""
from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
from spillway.v1 import cluster_service_pb2
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub

from demo.ports import free_ports
from tests.hostile.attacks import ATTACKS, Target
from tests.hostile.canary import Canary

RSS_GROWTH_MAX = 50 << 20
REST_SECONDS = 60.0  # until the memory of what was let go is given back: the node does so every ten seconds
START_SECONDS = 60.0


class Node:
    """A `spillway serve` on loopback."""

    def __init__(self, directory: Path, *settings: str) -> None:
        clients, peers = free_ports(2)
        self.clients, self.peers = f"127.0.0.1:{clients}", f"127.0.0.1:{peers}"
        self.log = directory / "node.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "spillway.broker", "--listen", self.clients, "--peer-listen", self.peers, "--data-dir",
                 str(directory / "data"), "--shards", "2", *settings], stdout=log, stderr=log)

    async def wait(self) -> None:
        """Until it serves."""
        deadline = time.monotonic() + START_SECONDS
        async with grpc.aio.insecure_channel(self.clients) as channel:
            while True:
                try:
                    answer = await ClusterServiceStub(channel).GetTopology(cluster_service_pb2.GetTopologyRequest(), timeout=5)
                    if all(shard.leader for shard in answer.topology.shards):
                        return
                except grpc.aio.AioRpcError:
                    pass
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                await asyncio.sleep(0.1)

    def rss(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def end(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()


async def attack(directory: Path, seed: int, rounds: int, seconds: float = 0.0) -> dict[str, Any]:
    """All attacks, one after the other; again and again for `seconds`. Once before the memory is measured, as a node that has
    worked has caches and arenas that a fresh one lacks. Raises AssertionError if the node breaks a promise."""
    node = Node(directory)
    try:
        await node.wait()
        target = Target(node.clients, node.peers, seed)
        canary = Canary(node.clients)
        canary.start()
        for run in ATTACKS.values():
            await run(target, 1)
        await _rest(node, node.rss())
        before, descriptors = node.rss(), node.descriptors()
        done: dict[str, int] = {}
        peak = before
        began = time.monotonic()
        while True:
            for name, run in ATTACKS.items():
                done[name] = done.get(name, 0) + await run(target, rounds)
                peak = max(peak, node.rss())
                assert node.process.poll() is None, f"the node ended after {name}:\n{node.log.read_text()[-3000:]}"
            if time.monotonic() - began >= seconds:
                break
        await canary.stop()
        await _rest(node, before + RSS_GROWTH_MAX // 2)
        after = node.rss()
        text = node.log.read_text(errors="replace")
        assert "Traceback" not in text, text[text.index("Traceback"):][:3000]
        assert after - before <= RSS_GROWTH_MAX, f"{(after - before) >> 20} MiB more than before"
        assert node.descriptors() <= descriptors + 50, f"{node.descriptors()} descriptors are open, {descriptors} were"
        return {"attacks": done, "statuses": dict(target.statuses), "canary": canary.sent, "rss_before": before, "rss_peak": peak,
                "rss_after": after}
    finally:
        node.end()


async def _rest(node: Node, enough: int) -> None:
    """Waits until the node's memory is below a bound, or does not shrink any more."""
    until = time.monotonic() + REST_SECONDS
    least, since = node.rss(), time.monotonic()
    while time.monotonic() < until and node.rss() > enough and time.monotonic() - since < 25:
        await asyncio.sleep(0.5)
        if node.rss() < least - (1 << 20):
            least, since = node.rss(), time.monotonic()
