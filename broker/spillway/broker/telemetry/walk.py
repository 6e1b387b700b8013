"""What no counter knows: the oldest message of a destination, and which tenants have the largest backlogs.

A walk looks at every queue of the shards that this node leads, a page at a time, and rests between pages so that it takes a
hundredth of the loop's time at most. So what a scrape costs does not depend on how many queues there are; what depends on it is how
old the answer may be. Candidates are looked at again when they are told of: what is told was true then.
"""
from __future__ import annotations

import asyncio
from heapq import heappush, heapreplace, nlargest
from typing import TYPE_CHECKING

from spillway.broker.core.subscription import INTERNAL
from spillway.broker.telemetry.registry import TENANTS_MAX

if TYPE_CHECKING:
    from spillway.broker.runtime.node import Node
    from spillway.broker.runtime.shard import ShardRuntime

PAGE = 64  # queues looked at in a row: a fraction of a millisecond
REST = 99  # times as long as a page took is rested after it
PAUSE_SECONDS = 1.0  # between walks
CANDIDATES = 8  # of a destination: if the oldest is gone, the next one tells
TENANTS_HELD_MAX = 4096  # in a walk; beyond, the smallest half is forgotten

_Oldest = list[tuple[int, int, bytes]]  # a heap of (-enqueue ms, shard, queue)


class Walk:
    """Walks for ever; others read its results."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._unsettled: dict[bytes, _Oldest] = {}
        self._ready: dict[bytes, _Oldest] = {}
        self.tenants: list[tuple[int, bytes]] = []
        """(messages, `destination NUL tenant`), the largest first."""
        self.walks = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.once()
            await asyncio.sleep(PAUSE_SECONDS)

    async def once(self) -> None:
        """One walk."""
        unsettled: dict[bytes, _Oldest] = {}
        ready: dict[bytes, _Oldest] = {}
        tenants: dict[bytes, int] = {}
        for runtime in list(self._node.shards.values()):
            if not runtime.leading:
                continue
            for name, counters in list(runtime.state.counters.items()):
                if counters.messages and not name.startswith(INTERNAL):
                    await self._destination(runtime, name, unsettled.setdefault(name, []), ready.setdefault(name, []), tenants)
        self._unsettled, self._ready = unsettled, ready
        self.tenants = [(messages, scope) for scope, messages in nlargest(TENANTS_MAX, tenants.items(), key=lambda item: item[1])]
        self.walks += 1

    async def _destination(self, runtime: ShardRuntime, name: bytes, unsettled: _Oldest, ready: _Oldest,
                           tenants: dict[bytes, int]) -> None:
        monotonic = self._node.clock.monotonic
        start, seen = b"", b""
        while runtime.leading:
            begin = monotonic()
            now = self._node.now_ms()
            state = runtime.state
            queues = state.queue_names(name + b"\0", start, PAGE)
            for queue in queues:
                if head := state.head_ms(queue):
                    _offer(unsettled, (-head, runtime.number, queue))
                if (len(ready) < CANDIDATES or -head > ready[0][0]) and (head := state.waiting_head_ms(queue, now)):
                    _offer(ready, (-head, runtime.number, queue))
                scope = queue[:queue.index(b"\0", len(name) + 1)]
                if scope != seen:
                    seen = scope
                    tenants[scope] = tenants.get(scope, 0) + state.tenant(scope)[0]
            if len(tenants) > TENANTS_HELD_MAX:
                kept = nlargest(TENANTS_HELD_MAX // 2, tenants.items(), key=lambda item: item[1])
                tenants.clear()
                tenants.update(kept)
            await asyncio.sleep((monotonic() - begin) * REST)
            if len(queues) < PAGE:
                return
            start = queues[-1] + b"\0"

    def oldest_unsettled(self, destination: bytes) -> int:
        """Enqueue time in ms of the oldest message that was found and is still there, 0 if none is."""
        found = 0
        for negative, shard, queue in self._unsettled.get(destination, ()):
            runtime = self._node.shards.get(shard)
            if runtime is not None and runtime.leading and runtime.state.head_ms(queue) == -negative:
                found = min(found or -negative, -negative)
        return found

    def oldest_ready(self, destination: bytes) -> int:
        """The same of those that wait for a consumer and nothing else."""
        found = 0
        now = self._node.now_ms()
        for negative, shard, queue in self._ready.get(destination, ()):
            runtime = self._node.shards.get(shard)
            if runtime is not None and runtime.leading and runtime.state.waiting_head_ms(queue, now) == -negative:
                found = min(found or -negative, -negative)
        return found


def _offer(oldest: _Oldest, one: tuple[int, int, bytes]) -> None:
    """Keeps the CANDIDATES with the earliest times: the heap's first has the latest of them."""
    if len(oldest) < CANDIDATES:
        heappush(oldest, one)
    elif one[0] > oldest[0][0]:
        heapreplace(oldest, one)
