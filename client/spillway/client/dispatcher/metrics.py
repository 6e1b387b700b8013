"""Every metric of a dispatcher, once, and their collection. Counted are the plain integers of its lanes.

Bounded: DESTINATIONS_MAX destinations have series of their own, those that were seen first; the rest counts as `other`.
"""
from __future__ import annotations

from dataclasses import astuple, fields
from typing import TYPE_CHECKING

from spillway.client.dispatcher.lane import CLOSED, Counts, Lane
from spillway.contract.telemetry import process
from spillway.contract.telemetry.metrics import MILLISECOND_POWERS, SLOTS, Family, Histogram, Metric, Sample, Value

if TYPE_CHECKING:
    from spillway.client.dispatcher.dispatcher import Dispatcher

DESTINATIONS_MAX = 256
OTHER = "other"

HTTP = Metric("spillway_dispatcher_http_seconds", "histogram", "s",
              "HTTP requests, from the first byte to the end of the answer, or to why there is none.",
              "How fast is the receiver?", ("destination",), MILLISECOND_POWERS, 1000)
OUTCOMES = Metric("spillway_dispatcher_outcomes_total", "counter", "{message}",
                  "What became of messages: delivered, retried, throttled, down, rejected; and of runs: spared (settled without a "
                  "request), released, lost (the lease had ended).",
                  "What does the receiver answer?", ("destination", "outcome"))
IN_FLIGHT = Metric("spillway_dispatcher_in_flight", "gauge", "{request}", "Requests under way.", "Is it waiting for the receiver?",
                   ("destination",))
CONCURRENCY = Metric("spillway_dispatcher_concurrency_max", "gauge", "{request}", "Requests that may be under way at a time.",
                     "Is concurrency what limits it?", ("destination",))
CIRCUIT = Metric("spillway_dispatcher_circuit_open", "gauge", "1", "1 while the receiver cannot be reached, else 0.", "Is it down?",
                 ("destination",))
FAILURES = Metric("spillway_dispatcher_failures_in_a_row", "gauge", "{request}", "Requests without success since the last that had it.",
                  "Is it broken, or unlucky?", ("destination",))
DESTINATIONS = Metric("spillway_dispatcher_destinations", "gauge", "{destination}", "Destinations that this dispatcher delivers.",
                      "Does it have work?")
NOT_DELIVERED = Metric("spillway_dispatcher_destinations_unusable", "gauge", "{destination}", "Destinations whose target is of no use.",
                       "Is a target misconfigured?")
REACHABLE = Metric("spillway_dispatcher_broker_reachable", "gauge", "1", "1 if targets could be read from the broker the last time.",
                   "Does it see the cluster?")
ALL = [HTTP, OUTCOMES, IN_FLIGHT, CONCURRENCY, CIRCUIT, FAILURES, DESTINATIONS, NOT_DELIVERED, REACHABLE, *process.ALL]
_NAMES = [field.name for field in fields(Counts)]


class _Sum:
    """Of one destination, or of the rest."""

    def __init__(self) -> None:
        self.counts = [0] * len(_NAMES)
        self.latency = Histogram()

    def add(self, lane: Lane) -> None:
        """What a lane did."""
        self.counts = [a + b for a, b in zip(self.counts, astuple(lane.counts), strict=True)]
        self.latency.total += lane.latency.total
        for i in range(SLOTS):
            self.latency.slots[i] += lane.latency.slots[i]


class Past:
    """What lanes did that ended: totals only grow, whatever becomes of lanes."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}

    def label(self, destination: str) -> str:
        """By which name a destination goes."""
        if destination in self._sums:
            return destination
        if len(self._sums) >= DESTINATIONS_MAX or destination == OTHER:
            return OTHER
        self._sums[destination] = _Sum()
        return destination

    def ended(self, destination: str, lane: Lane) -> None:
        """A lane ended."""
        self._sums.setdefault(self.label(destination), _Sum()).add(lane)

    def sums(self) -> dict[str, _Sum]:
        """A copy, to add to."""
        out = {}
        for label, of in self._sums.items():
            out[label] = copy = _Sum()
            copy.counts = of.counts[:]
            copy.latency.total, copy.latency.slots = of.latency.total, of.latency.slots[:]
        return out


async def collect(dispatcher: Dispatcher) -> list[Family]:
    """All metrics, as of now."""
    samples: dict[Metric, list[Sample]] = {metric: [] for metric in ALL}

    def tell(metric: Metric, value: Value, *labels: str) -> None:
        samples[metric].append((labels, value))

    past = dispatcher.past
    levels: dict[str, list[int]] = {}
    lanes = [(past.label(name), lane) for name, lane in dispatcher.lanes()]
    sums = past.sums()
    for label, lane in lanes:
        sums.setdefault(label, _Sum()).add(lane)
        now = [lane.in_flight, lane.target.concurrency_max, int(lane.circuit != CLOSED), lane.failures_in_a_row]
        before = levels.get(label)
        levels[label] = now if before is None else [before[0] + now[0], before[1] + now[1], max(before[2], now[2]), max(before[3], now[3])]
    for label, of in sums.items():
        for name, count in zip(_NAMES, of.counts, strict=True):
            tell(OUTCOMES, count, label, name)
        tell(HTTP, of.latency, label)
    for label, values in levels.items():
        for metric, value in zip((IN_FLIGHT, CONCURRENCY, CIRCUIT, FAILURES), values, strict=True):
            tell(metric, value, label)
    tell(DESTINATIONS, len(lanes))
    tell(NOT_DELIVERED, dispatcher.unusable)
    tell(REACHABLE, int(dispatcher.reachable))
    for metric, figure in process.values().items():
        tell(metric, figure)
    return [Family(metric, found) for metric, found in samples.items()]
