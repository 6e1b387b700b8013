"""What is counted of a destination for metrics, on the leaders of its shards. Plain integers; who asks for none has none."""
from __future__ import annotations

from spillway.contract.telemetry.metrics import Histogram

OUTCOMES = ("", "ack", "retry", "throttled", "down", "reject", "release", "extend", "discard", "expired")
"""By the number of an outcome in `entry`."""
TOTALS = 11  # of the shards' counters; telemetry.meters says which


class Meter:
    """One destination, or all those that have none of their own. A shard's `Counters` have it while this node leads the shard."""

    __slots__ = ("end_to_end", "leased", "outcomes", "parked_ms", "redelivered", "totals", "wait")

    def __init__(self) -> None:
        self.totals = [0] * TOTALS
        self.leased = self.redelivered = self.parked_ms = 0
        self.outcomes = [0] * len(OUTCOMES)  # leases that ended, by outcome
        self.wait = Histogram()  # ms, as is the next
        self.end_to_end = Histogram()
