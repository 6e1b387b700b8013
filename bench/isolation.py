"""Workload g: what dead destinations do to healthy ones, through the HTTP dispatcher."""
from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from bench.children import Child, Children, Worker, poll
from bench.counters import FINISH, GO, READY_CONSUMER, READY_PRODUCER, STOP, Counters
from bench.nodes import Nodes
from bench.stats import series, summary
from demo.ports import free_ports

DESTINATIONS = 10
DEAD = (0, 1, 5)  # how many of them, phase by phase
PER_SECOND = 40.0  # messages for each destination
TENANTS, KEYS = 20, 5
SETTLE_SECONDS = 4.0
SERIES_SECONDS = 1.0  # for plots


def measure(directory: Path, seconds: float) -> dict[str, Any]:
    """One node, one dispatcher, ten destinations with an endpoint each; then one of them has none, then five. Figures are of
    the five that always have one."""
    counters = Counters()
    with Children() as children:
        nodes = Nodes(directory, 1, children)
        port, closed = free_ports(2)
        endpoint = Worker("endpoint", directory, counters, port=port)
        producer = Worker("events", directory, counters, addresses=nodes.addresses, destinations=DESTINATIONS,
                          per_second=PER_SECOND, tenants=TENANTS, keys=KEYS, port=port, closed=closed)
        dispatcher = Child("dispatcher", [sys.executable, "-m", "spillway.client.cli", "dispatch", "--address",
                                          nodes.addresses[0]], directory)
        children.start(endpoint)
        poll(lambda: counters[READY_CONSUMER], 30, "the endpoint", children)
        children.start(producer)
        poll(lambda: counters[READY_PRODUCER], 60, "the producer", children)
        children.start(dispatcher)
        windows = []
        for dead in DEAD:
            counters[GO] = dead
            time.sleep(SETTLE_SECONDS)
            begin = time.monotonic()
            time.sleep(seconds)
            windows.append((dead, begin, time.monotonic()))
        if not dispatcher.running:
            raise RuntimeError(f"the dispatcher ended:\n{dispatcher.tail()}")
        counters[STOP] = 1
        sent = producer.result(60)
        time.sleep(1.0)
        counters[FINISH] = 1
        got = endpoint.result(60)
    phases = []
    for dead, begin, end in windows:
        waits = [wait for at, wait, number in got["arrived"] if begin <= at < end and number >= max(DEAD)]
        phases.append({"dead": dead, "per_second": round(len(waits) / (end - begin), 1), **summary(waits)})
    return {"destinations": DESTINATIONS, "sent": sent["sent"], "sender_late_max_ms": round(sent["late_max"] * 1e3, 1),
            "phases": phases,
            "changes": [{"dead": dead, "at": round(begin - SETTLE_SECONDS - windows[0][1], 3)} for dead, begin, _ in windows[1:]],
            "series": series(((at, wait) for at, wait, number in got["arrived"] if number >= max(DEAD)), windows[0][1], windows[-1][2],
                             SERIES_SECONDS),
            "throughput_ratio": [round(p["per_second"] / phases[0]["per_second"], 3) for p in phases],
            "p99_ratio": [round(p["p99_ms"] / phases[0]["p99_ms"], 2) for p in phases]}
