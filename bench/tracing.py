"""Workload j: what metrics and traces take from a node's throughput."""
from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.request import urlopen

from bench.children import Children, Worker, poll
from bench.counters import FINISH, GO, READY_CONSUMER, READY_PRODUCER, SETTLED, STOP, Counters
from bench.nodes import Nodes
from bench.usage import cpu_seconds
from demo.ports import free_ports

QUEUES = 1_000
PAYLOAD_BYTES = 1024
OUTSTANDING = CREDIT = 8192
RAMP_SECONDS = 1.0  # at the begin of each slice
WARM_SECONDS = 3.0  # of each node, before the first round
READY_SECONDS = DRAIN_SECONDS = 60.0
SAMPLED_EVERY = 100
BARS = {"sampled": 3.0}  # percent of throughput that it may cost


class Variant(NamedTuple):
    """One node and its producer."""

    flags: tuple[str, ...] = ()  # COLLECTOR and METRICS stand for addresses
    sampled_every: int = SAMPLED_EVERY
    headers: bool = True


COLLECTOR, METRICS = "COLLECTOR", "METRICS"
_SCRAPED = ("--metrics-listen", METRICS)  # once a second, fifteen times as often as usual
VARIANTS = {
    "bare": Variant(),  # a hundredth of its messages is sampled, too, but it makes no spans
    "off": Variant(_SCRAPED),
    "unsampled": Variant((*_SCRAPED, "--otlp-endpoint", COLLECTOR), 0),
    "sampled": Variant((*_SCRAPED, "--otlp-endpoint", COLLECTOR)),
}
PARTNERS = {"off": "bare", "unsampled": "off", "sampled": "off"}  # what each is compared with: metrics cost by themselves


class _Side:
    """A node with its load, which works while it is told to."""

    def __init__(self, directory: Path, name: str, variant: Variant, collector: str, children: Children) -> None:
        self.name = name
        metrics = f"127.0.0.1:{free_ports(1)[0]}"
        flags = [{COLLECTOR: collector, METRICS: metrics}.get(flag, flag) for flag in variant.flags]
        self.scraped = f"http://{metrics}/metrics" if METRICS in variant.flags else ""
        self.counters = Counters()
        self.nodes = Nodes(directory / name, 1, children, flags)
        self.consumer = Worker("consume", directory / name, self.counters, addresses=self.nodes.addresses, credit=CREDIT)
        self.producer = Worker("traced", directory / name, self.counters, addresses=self.nodes.addresses, queues=QUEUES,
                               payload_bytes=PAYLOAD_BYTES, outstanding=OUTSTANDING, sampled_every=variant.sampled_every,
                               headers=variant.headers)
        children.start(self.consumer)
        children.start(self.producer)
        poll(lambda: self.counters[READY_CONSUMER] and self.counters[READY_PRODUCER], READY_SECONDS, f"the load of {name}", children)

    def slice(self, seconds: float) -> tuple[float, float]:
        """Works for a while: (messages acknowledged per second, microseconds of the node's processor time for each)."""
        self.counters[GO] = 1
        time.sleep(RAMP_SECONDS)
        pid = next(iter(self.nodes.pids.values()))
        settled, cpu, start = self.counters[SETTLED], cpu_seconds(pid), time.monotonic()
        while (left := start + seconds - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            if self.scraped:
                with urlopen(self.scraped, timeout=10) as answer:
                    answer.read()
        elapsed = time.monotonic() - start
        count, used = self.counters[SETTLED] - settled, cpu_seconds(pid) - cpu
        self.counters[GO] = 0
        quiet = -1
        while quiet != self.counters[SETTLED]:  # what is on its way must not be the next one's load
            quiet = self.counters[SETTLED]
            time.sleep(0.1)
        return count / elapsed, used / max(count, 1) * 1e6


def measure(directory: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Has each variant work once a round, one after the other, in an order that turns."""
    with Children() as children:
        directory.mkdir(parents=True, exist_ok=True)
        counters = Counters()
        [port] = free_ports(1)
        collector = Worker("collector", directory, counters, port=port)
        children.start(collector)
        poll(lambda: counters[READY_CONSUMER], READY_SECONDS, "the collector", children)
        sides = [_Side(directory, name, variant, f"http://127.0.0.1:{port}", children) for name, variant in VARIANTS.items()]
        for side in sides:
            side.slice(WARM_SECONDS)
        per_second: dict[str, list[float]] = {side.name: [] for side in sides}
        cpu_us: dict[str, list[float]] = {side.name: [] for side in sides}
        for turn in range(rounds):
            first = turn % len(sides)
            for side in (*sides[first:], *sides[:first]):
                rate, cost = side.slice(seconds)
                per_second[side.name].append(rate)
                cpu_us[side.name].append(cost)
                children.check()
        for side in sides:
            side.counters[STOP] = 1
            side.producer.result(DRAIN_SECONDS)
            side.counters[FINISH] = 1
            side.consumer.result(DRAIN_SECONDS)
        counters[FINISH] = 1
        took = collector.result(DRAIN_SECONDS)
    return {
        "rounds": rounds, "seconds": seconds, "sampled_every": SAMPLED_EVERY, "collector": took, "bars_percent": BARS,
        "per_second": {name: [round(v) for v in values] for name, values in per_second.items()},
        "cpu_us_per_message": {name: [round(v, 2) for v in values] for name, values in cpu_us.items()},
        "cost_percent": {name: compared(per_second[name], per_second[partner]) for name, partner in PARTNERS.items()},
        "cpu_percent": {name: compared(cpu_us[partner], cpu_us[name]) for name, partner in PARTNERS.items()},
    }


def compared(less: Sequence[float], more: Sequence[float]) -> dict[str, float]:
    """By how many percent the first are less than the second, pair by pair: the median pair, and the best and worst quarter."""
    costs = sorted((1 - a / b) * 100 for a, b in zip(less, more, strict=True))
    quarter = len(costs) // 4
    return {"median": round(median(costs), 2), "low": round(costs[quarter], 2), "high": round(costs[-1 - quarter], 2)}
