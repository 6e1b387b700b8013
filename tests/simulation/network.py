"""The peers' network, rougher than its contract: frames also come twice, and late ones of a connection that is gone.

A transport promises neither to happen. Raft must be safe all the same (R8, R10, R11), and a bug in a transport is not to cost data.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from spillway.cluster.errors import WireInvalid
from spillway.cluster.transport.memory import Later, MemoryNetwork


class RoughNetwork(MemoryNetwork):
    """See the module. `twice` and `ghosts` are chances, of each frame."""

    def __init__(self, later: Later, now: Callable[[], float], delay: Callable[[str, str], float], rnd: random.Random,
                 twice: float, ghosts: float) -> None:
        super().__init__(later, now, delay)
        self._rnd = rnd
        self._twice = twice
        self._ghosts = ghosts
        self._hanging: set[str] = set()

    def leave_alone(self, node: str) -> None:
        """Others have found out that a node hangs: they have no connection with it until it is found again."""
        self._hanging.add(node)
        for other in self.peers():
            self.disconnect(node, other)

    def find_again(self, node: str) -> None:
        """It answers."""
        self._hanging.discard(node)
        for other in self.peers():
            self.connect(node, other)

    def connect(self, a: str, b: str) -> None:
        """See MemoryNetwork."""
        if self._hanging.isdisjoint((a, b)):
            super().connect(a, b)

    def _arrive(self, connection: Any, sender: str, peer: str, frame: bytes) -> None:
        transport, epoch = connection.ends[peer]
        if connection.up:
            super()._arrive(connection, sender, peer, frame)
            if self._twice and self._rnd.random() < self._twice:
                self._later(self._rnd.choice((0.0, 0.01, 0.5, 3.0)), lambda: self._again(transport, sender, epoch, frame))
        elif self._ghosts and sender not in connection.lost and self._rnd.random() < self._ghosts:
            self._again(transport, sender, epoch, frame)

    def _again(self, transport: Any, sender: str, epoch: int, frame: bytes) -> None:
        """Hands a frame to the process that it was for, if that still lives."""
        if self._transports.get(transport.node_id) is transport:
            try:
                transport.handlers.frame(sender, epoch, frame)
            except WireInvalid:
                pass
