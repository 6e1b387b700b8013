"""Queues and gates that become due at a time. Coarse (the node looks every few milliseconds) and cheap: a heap of
plain tuples. A timer is a hint; whoever acts on it looks at the state again."""
from __future__ import annotations

from heapq import heapify, heappop, heappush


class Timers:
    """A heap of (due in ms since 1970, shard, queue) and (due, 0, gate scope)."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, bytes]] = []

    def add(self, due: int, shard: int, name: bytes) -> None:
        """Something of a shard (or, with shard 0, a gate) is due at a time."""
        heappush(self._heap, (due, shard, name))

    def remove_shard(self, shard: int) -> None:
        """Forgets what is due of a shard: the node no longer leads it, and adds everything again when it does."""
        self._heap = [timer for timer in self._heap if timer[1] != shard]
        heapify(self._heap)

    def pop_due(self, now: int, limit: int) -> list[tuple[int, bytes]]:
        """(shard, name) of what is due by now, the earliest first, at most `limit`."""
        found: list[tuple[int, bytes]] = []
        heap = self._heap
        while heap and heap[0][0] <= now and len(found) < limit:
            _, shard, name = heappop(heap)
            found.append((shard, name))
        return found

    def __len__(self) -> int:
        return len(self._heap)
