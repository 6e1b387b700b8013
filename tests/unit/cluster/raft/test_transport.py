"""What `transport.base` guarantees, for the in-process connections. The same checks suit any other PeerTransport."""
from __future__ import annotations

import random
from typing import Any

import pytest
from spillway.cluster.errors import SnapshotBroken, WireInvalid
from spillway.cluster.raft.formation import Hello
from spillway.cluster.snapshots import Position
from spillway.cluster.transport.base import Handlers, PeerHello
from spillway.cluster.transport.memory import MemoryNetwork, MemoryTransport


class Node:
    """Notes what its transport tells it, and checks the order of it."""

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self.transport = MemoryTransport(network, name, lambda: Hello(name, "i", False), self.export)
        self.up: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.frames: list[tuple[str, int, bytes]] = []
        self.refuses = False
        self.transport.start(Handlers(self.connected, self.frame, self.disconnected))

    def connected(self, peer: str, epoch: int, hello: PeerHello) -> None:
        assert peer not in self.up, "a new connection before the old one ended"
        assert epoch > self.last.get(peer, 0), "epochs grow"
        self.up[peer] = self.last[peer] = epoch

    def frame(self, peer: str, epoch: int, data: bytes) -> None:
        assert self.up.get(peer) == epoch, "a frame outside of its connection"
        if self.refuses:
            raise WireInvalid("no")
        self.frames.append((peer, epoch, data))

    def disconnected(self, peer: str, epoch: int) -> None:
        assert self.up.pop(peer) == epoch

    async def export(self, group: int, peer: str, position: Position | None) -> Any:
        for i in range(position.number if position else 0, 3):
            yield b"%d" % i

    def send(self, peer: str, data: bytes) -> None:
        self.transport.send(peer, self.up.get(peer, -1), data)


class Timeline:
    """A scheduler that runs when told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, int, Any]] = []

    def later(self, seconds: float, action: Any) -> None:
        self.due.append((self.now + seconds, len(self.due), action))

    def run(self) -> None:
        while self.due:
            self.due.sort(key=lambda d: d[:2])
            self.now, _, action = self.due.pop(0)
            action()


def _pair(delay: Any = lambda a, b: 0.0) -> tuple[Timeline, MemoryNetwork, Node, Node]:
    time = Timeline()
    network = MemoryNetwork(time.later, lambda: time.now, delay)
    return time, network, Node(network, "a"), Node(network, "b")


def test_frames_come_in_order_and_once_whatever_the_delay() -> None:
    """FIFO: a later frame never overtakes."""
    rnd = random.Random(1)
    time, _, a, b = _pair(lambda x, y: rnd.random())
    for i in range(50):
        a.send("b", b"%d" % i)
    assert b.frames == [], "never delivered inside of send"
    time.run()
    assert [f[2] for f in b.frames] == [b"%d" % i for i in range(50)]


def test_nothing_crosses_connections() -> None:
    """What is under way when a connection breaks is lost, and so is what is sent into an older one."""
    time, network, a, b = _pair(lambda x, y: 1.0)
    a.send("b", b"old")
    old = a.up["b"]
    network.disconnect("a", "b")
    assert not a.up
    assert not b.up
    network.connect("a", "b")
    a.transport.send("b", old, b"late")
    a.send("b", b"new")
    time.run()
    assert [f[2] for f in b.frames] == [b"new"]


def test_a_cut_direction_stays_cut_until_a_new_connection() -> None:
    """No gaps: after a lost frame nothing of that direction arrives; the other direction goes on."""
    time, network, a, b = _pair()
    network.cut("a", "b")
    a.send("b", b"1")
    b.send("a", b"2")
    time.run()
    assert (b.frames, [f[2] for f in a.frames]) == ([], [b"2"])
    network.disconnect("a", "b")
    network.connect("a", "b")
    a.send("b", b"3")
    time.run()
    assert [f[2] for f in b.frames] == [b"3"]


def test_blocked_nodes_do_not_connect() -> None:
    """Until they are unblocked."""
    _, network, a, _ = _pair()
    network.block("a", "b")
    network.connect("a", "b")
    assert not a.up
    network.unblock("a", "b")
    assert "b" in a.up


def test_a_refused_frame_closes_the_connection() -> None:
    """WireInvalid from the handler."""
    time, _, a, b = _pair()
    b.refuses = True
    a.send("b", b"x")
    time.run()
    assert not a.up
    assert not b.up


async def test_a_closed_transport_is_gone() -> None:
    """Peers are told, and frames to it are dropped."""
    time, _, a, b = _pair()
    await b.transport.close()
    assert not a.up
    a.send("b", b"x")
    time.run()
    assert b.frames == []


async def test_snapshots_come_in_order_and_need_a_connection() -> None:
    """Chunks as exported; a transfer that breaks says so."""
    _, network, a, _ = _pair()
    assert [c async for c in a.transport.fetch_snapshot("b", 0, None)] == [b"0", b"1", b"2"]
    assert [c async for c in a.transport.fetch_snapshot("b", 0, Position(9, 2, 0, 0, b""))] == [b"2"]
    chunks = a.transport.fetch_snapshot("b", 0, None)
    assert await anext(chunks) == b"0"
    network.disconnect("a", "b")
    with pytest.raises(SnapshotBroken):
        await anext(chunks)
    with pytest.raises(SnapshotBroken):
        await anext(a.transport.fetch_snapshot("b", 0, None))
