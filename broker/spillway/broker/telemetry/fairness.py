"""How fairly the scheduler serves tenants: Jain's index (Jain, Chiu, Hawe 1984), (sum x)^2 / (n sum x^2).

x is by how much a tenant's start tag advanced: what it got of consumers' time and bytes, by its weight, which is what the scheduler
shares out. Looked at are tenants of a destination that had something ready at both ends of a window: others did not want more.
"""
from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spillway.broker.core.scheduler import Destination, Tenant
    from spillway.broker.runtime.node import Node

WINDOW_MS = 10_000
SAMPLE = 64  # tenants of a destination; those with the smallest tags are among them: who is behind shows
DESTINATIONS = 256  # looked at


class Fairness:
    """Of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._begun: dict[bytes, dict[bytes, float]] = {}  # destination -> tenant -> start tag
        self._since_ms = node.now_ms()
        self._indexes: dict[bytes, float] = {}

    def look(self) -> None:
        """Ends the window if it is time, and begins the next one."""
        now = self._node.now_ms()
        if now - self._since_ms < WINDOW_MS:
            return
        self._since_ms = now
        self._indexes = {}
        begun, self._begun = self._begun, {}
        for name, destination in islice(self._node.scheduler.destinations.items(), DESTINATIONS):
            before = begun.get(name)
            if before:
                self._indexes[name] = jain([t.start - before[t.name] for t in _wanting(destination, before)])
            if len(destination.heap) > 1:
                self._begun[name] = {t.name: t.start for _, _, t in islice(destination.heap, SAMPLE) if t.ready}

    def of(self, destination: bytes) -> float:
        """The index of the last window; 1 where there was nothing to share."""
        return self._indexes.get(destination, 1.0)


def _wanting(destination: Destination, before: Iterable[bytes]) -> list[Tenant]:
    return [tenant for name in before if (tenant := destination.tenants.get(name)) is not None and tenant.ready]


def jain(shares: list[float]) -> float:
    """The index of some shares, which are at least 0."""
    shares = [max(0.0, x) for x in shares]
    squares = sum(x * x for x in shares)
    return 1.0 if not squares else sum(shares) ** 2 / (len(shares) * squares)
