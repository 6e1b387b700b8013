"""Connections inside one process, for tests and simulations: delay, loss by disconnect, cuts in one direction.

It keeps the guarantees of `base` and no more: frames of a connection come in order and at most once; whoever loses one frame
of a connection loses all later ones of that direction. Time comes from the scheduler that it is given: an event loop's
`call_later`, or a simulator's.
"""
from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from spillway.cluster.errors import SnapshotBroken, WireInvalid
from spillway.cluster.snapshots import Position
from spillway.cluster.transport.base import Handlers, PeerHello

Later = Callable[[float, Callable[[], None]], Any]  # seconds, what to do then


class _Connection:
    """One connection of a pair of nodes."""

    def __init__(self, a: MemoryTransport, b: MemoryTransport) -> None:
        self.ends = {a.node_id: (a, a.next_epoch()), b.node_id: (b, b.next_epoch())}
        self.up = True
        self.lost: set[str] = set()  # senders whose frames do not arrive any more
        self.arrives = {a.node_id: 0.0, b.node_id: 0.0}  # sender -> when its last frame arrives


class MemoryNetwork:
    """All connections between the transports that joined it."""

    def __init__(self, later: Later, now: Callable[[], float],
                 delay: Callable[[str, str], float] = lambda a, b: 0.0) -> None:
        """`delay(sender, receiver)` is in seconds; frames of a connection never overtake each other."""
        self._later = later
        self._now = now
        self.delay = delay
        self._transports: dict[str, MemoryTransport] = {}
        self._connections: dict[frozenset[str], _Connection] = {}
        self._blocked: set[frozenset[str]] = set()

    def join(self, transport: MemoryTransport) -> None:
        """A transport started: connects it to all others that are reachable."""
        self._transports[transport.node_id] = transport
        for other in list(self._transports):
            self.connect(transport.node_id, other)

    def leave(self, transport: MemoryTransport) -> None:
        """A transport closed, or its process died: its connections break."""
        if self._transports.get(transport.node_id) is transport:
            del self._transports[transport.node_id]
            for pair in [p for p in self._connections if transport.node_id in p]:
                self._break(pair)

    def connect(self, a: str, b: str) -> None:
        """Connects two nodes, if both are there, not connected and not blocked."""
        pair = frozenset((a, b))
        if len(pair) == 2 and a in self._transports and b in self._transports and (
                pair not in self._connections and pair not in self._blocked):
            ends = self._transports[a], self._transports[b]
            connection = self._connections[pair] = _Connection(*ends)
            hellos = {end.node_id: end.hello() for end in ends}
            for end, other in (ends, ends[::-1]):
                end.handlers.connected(other.node_id, connection.ends[end.node_id][1], hellos[other.node_id])

    def disconnect(self, a: str, b: str) -> None:
        """Breaks the connection of two nodes; what is under way is lost."""
        self._break(frozenset((a, b)))

    def block(self, a: str, b: str) -> None:
        """As `disconnect`, and keeps them apart until `unblock`."""
        self._blocked.add(frozenset((a, b)))
        self.disconnect(a, b)

    def unblock(self, a: str, b: str) -> None:
        """Lets two nodes connect again."""
        self._blocked.discard(frozenset((a, b)))
        self.connect(a, b)

    def cut(self, sender: str, receiver: str) -> None:
        """From now on nothing that `sender` sends on the present connection arrives; neither side notices."""
        connection = self._connections.get(frozenset((sender, receiver)))
        if connection is not None:
            connection.lost.add(sender)

    def connected(self, a: str, b: str) -> bool:
        """Whether two nodes have a connection."""
        return frozenset((a, b)) in self._connections

    def peers(self) -> list[str]:
        """Nodes that are there."""
        return list(self._transports)

    def _break(self, pair: frozenset[str]) -> None:
        connection = self._connections.pop(pair, None)
        if connection is not None:
            connection.up = False
            a, b = sorted(pair)
            for node, other in ((a, b), (b, a)):
                transport, epoch = connection.ends[node]
                if self._transports.get(node) is transport:
                    transport.handlers.disconnected(other, epoch)

    def send(self, sender: MemoryTransport, peer: str, epoch: int, frame: bytes) -> None:
        """A frame from a transport."""
        connection = self._connections.get(frozenset((sender.node_id, peer)))
        if connection is None or connection.ends[sender.node_id] != (sender, epoch) or sender.node_id in connection.lost:
            return
        now = self._now()
        arrives = max(connection.arrives[sender.node_id], now + self.delay(sender.node_id, peer))
        connection.arrives[sender.node_id] = arrives
        self._later(arrives - now, lambda: self._arrive(connection, sender.node_id, peer, frame))

    def _arrive(self, connection: _Connection, sender: str, peer: str, frame: bytes) -> None:
        if connection.up and sender not in connection.lost:
            transport, epoch = connection.ends[peer]
            try:
                transport.handlers.frame(sender, epoch, frame)
            except WireInvalid:
                self._break(frozenset((sender, peer)))

    def transport(self, node_id: str) -> MemoryTransport | None:
        """The transport of a node, None if it is not there."""
        return self._transports.get(node_id)


class MemoryTransport:
    """A PeerTransport on a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, node_id: str, hello: Callable[[], PeerHello],
                 export: Callable[[int, str, Position | None], AsyncGenerator[bytes, None]] | None = None) -> None:
        """`hello()` is what peers are told; `export(group, peer, position)` gives the chunks of a snapshot."""
        self.node_id = node_id
        self.hello = hello
        self.handlers: Handlers
        self._network = network
        self._export = export
        self._epoch = 0

    def next_epoch(self) -> int:
        """Numbers a connection."""
        self._epoch += 1
        return self._epoch

    def start(self, handlers: Handlers) -> None:
        """See PeerTransport."""
        self.handlers = handlers
        self._network.join(self)

    def send(self, peer: str, epoch: int, frame: bytes) -> None:
        """See PeerTransport."""
        self._network.send(self, peer, epoch, frame)

    async def fetch_snapshot(self, peer: str, group: int, position: Position | None) -> AsyncIterator[bytes]:
        """See PeerTransport."""
        other = self._network.transport(peer)
        if other is None or other._export is None or not self._network.connected(self.node_id, peer):
            raise SnapshotBroken(f"node {peer} is not reachable")
        async with aclosing(other._export(group, self.node_id, position)) as chunks:
            async for chunk in chunks:
                if not self._network.connected(self.node_id, peer):
                    raise SnapshotBroken(f"the connection to node {peer} broke")
                if chunk:  # else it is only a sign of life
                    yield chunk

    async def close(self) -> None:
        """See PeerTransport."""
        self._network.leave(self)
