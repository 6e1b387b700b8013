"""What is counted beside the shards' own counters: plain integers, per destination and per node.

The shards' counters are replicated, and their totals are of all time, while a node tells what happened while it led: else a change of
leader would look like a burst. So a shard's counters are noted when this node takes it over, and what they grew by is added up
here whenever somebody asks, and when it gives the shard up. That costs a message nothing.
"""
from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from spillway.broker.core.meter import TOTALS, Meter
from spillway.broker.core.subscription import INTERNAL
from spillway.broker.telemetry.registry import DESTINATIONS_MAX, OTHER
from spillway.contract.telemetry.metrics import Histogram

if TYPE_CHECKING:
    from spillway.broker.core.queue import Counters, Message
    from spillway.broker.runtime.shard import ShardRuntime

FIELDS = ("enqueued", "acked", "retried", "dead_lettered", "discarded", "ttl_expired", "deduplicated", "overflowed", "purged", "redriven",
          "expired")
_values = attrgetter(*FIELDS)
_ZEROS = (0,) * len(FIELDS)
assert len(FIELDS) == TOTALS


class Meters:
    """All that a node counts."""

    def __init__(self) -> None:
        self.other = Meter()
        self.by_destination: dict[bytes, Meter] = {OTHER.encode(): self.other}  # a destination of this name counts with the rest
        self.stale = 0  # settlements
        self.duplicates = 0  # messages of idempotent producers
        self.refused: dict[int, int] = {}  # by spillway.v1.ErrorCode
        self.commits = Histogram()  # us
        self.loop_lag = Histogram()  # us
        self.leader_changes = 0
        self._led: dict[int, dict[bytes, tuple[int, ...]]] = {}  # shard -> destination -> counters as added up so far

    def of(self, destination: bytes) -> Meter:
        """The destination's meter: its own as long as there is room."""
        meter = self.by_destination.get(destination)
        if meter is None:
            if len(self.by_destination) > DESTINATIONS_MAX or destination.startswith(INTERNAL):
                return self.other
            meter = self.by_destination[destination] = Meter()
        return meter

    def keep(self, exists: set[bytes], led: list[ShardRuntime]) -> None:
        """Makes room: forgets destinations that are no more. Call when there is none. `led` are the shards that this node leads."""
        for name in [n for n in self.by_destination if n not in exists and n != OTHER.encode()]:
            del self.by_destination[name]
            for runtime in led:
                if (counters := runtime.state.counters.get(name)) is not None:
                    counters.meter = None

    def delivered(self, counters: Counters, messages: list[Message], attempts: int, now: int) -> None:
        """A run went to a consumer; `attempts` are those of its head that failed."""
        meter = counters.meter
        if meter is None:
            meter = counters.meter = self.of(counters.name)
        count = len(messages)
        meter.leased += count
        if attempts:
            meter.redelivered += 1
        first = messages[0][1]
        if count == 1:
            meter.wait.add(now - first)
        else:
            meter.wait.add_run(now - first, now - messages[-1][1], now * count - sum([m[1] for m in messages]), count)

    # -- the shards' counters ------------------------------------------------------------------------------------

    def took_over(self, runtime: ShardRuntime) -> None:
        """This node leads a shard from now on."""
        noted = self._led[runtime.number] = {}
        for name, counters in runtime.state.counters.items():
            noted[name] = _values(counters)
            if counters.queues and not name.startswith(INTERNAL):  # of the others the first lease will say
                counters.meter = self.of(name)

    def resigned(self, runtime: ShardRuntime) -> None:
        """This node does not lead it any more; what came of it until now counts."""
        noted = self._led.pop(runtime.number, None)
        if noted is not None:
            for name, counters in runtime.state.counters.items():
                self._add(name, counters, noted)
                counters.meter = None

    def add_up(self, runtime: ShardRuntime, name: bytes, counters: Counters) -> None:
        """Adds what a destination's counters in a shard grew by since the last call."""
        noted = self._led.get(runtime.number)
        if noted is not None:
            self._add(name, counters, noted)

    def _add(self, name: bytes, counters: Counters, noted: dict[bytes, tuple[int, ...]]) -> None:
        now = _values(counters)
        before = noted.get(name, _ZEROS)
        if now != before and not name.startswith(INTERNAL):
            noted[name] = now
            totals = self.of(name).totals
            for i, (new, old) in enumerate(zip(now, before, strict=True)):
                totals[i] += new - old
