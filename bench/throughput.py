"""Workload a: messages per second end to end, in a steady state."""
from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.children import Children, Worker, poll
from bench.counters import (
    FINISH,
    PRODUCED,
    READY_CONSUMER,
    REFUSED,
    SETTLED,
    STOP,
    Counters,
)
from bench.nodes import Nodes
from bench.usage import cpu_seconds, machine_seconds

PAYLOAD_BYTES = 1024
OUTSTANDING = 8192
CREDIT = 8192
RAMP_SECONDS = 3.0
DRAIN_SECONDS = 60.0


def measure(directory: Path, node_count: int, queues: int, seconds: float) -> dict[str, Any]:
    """Runs a fresh cluster, one producer and one consumer; counts confirmed acknowledgements for `seconds`."""
    counters = Counters()
    with Children() as children:
        nodes = Nodes(directory, node_count, children)
        if queues == 1:
            nodes.run_messages_max("d0", 1024)  # a single queue is leased run by run: longer runs, fewer turns
        consumer = Worker("consume", directory, counters, addresses=nodes.addresses, credit=CREDIT)
        producer = Worker("produce", directory, counters, addresses=nodes.addresses, queues=queues,
                          payload_bytes=PAYLOAD_BYTES, outstanding=OUTSTANDING)
        children.start(consumer)
        poll(lambda: counters[READY_CONSUMER], 60, "the consumer", children)
        children.start(producer)
        poll(lambda: counters[SETTLED] >= OUTSTANDING, 60, "the first messages", children)
        time.sleep(RAMP_SECONDS)
        pids = {**nodes.pids, "producer": producer.pid, "consumer": consumer.pid}
        settled = [counters[SETTLED]]
        cpu = {name: cpu_seconds(pid) for name, pid in pids.items()}
        machine = machine_seconds()
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < seconds:
            time.sleep(min(1.0, max(seconds - elapsed, 0.001)))
            settled.append(counters[SETTLED])
            children.check()
        elapsed = time.monotonic() - start
        count = counters[SETTLED] - settled[0]
        used = {name: cpu_seconds(pid) - cpu[name] for name, pid in pids.items()}
        whole = {name: (value - machine[name]) / elapsed for name, value in machine_seconds().items()}
        counters[STOP] = 1
        sent = producer.result(DRAIN_SECONDS)
        poll(lambda: counters[SETTLED] >= counters[PRODUCED], DRAIN_SECONDS, "every message acknowledged", children)
        counters[FINISH] = 1
        received = consumer.result(DRAIN_SECONDS)
    return {
        "nodes": node_count, "queues": queues, "messages_per_second": round(count / elapsed), "seconds": round(elapsed, 2),
        "per_second": [b - a for a, b in pairwise(settled)],
        "cores": {name: round(value / elapsed, 2) for name, value in used.items()},
        "machine_cores": {"others": round(max(whole["busy"] - sum(used.values()) / elapsed, 0.0), 2),
                          "idle": round(whole["idle"], 2), "stolen": round(whole["stolen"], 2)},
        "cpu_us_per_message": {name: round(value / max(count, 1) * 1e6, 1) for name, value in used.items()},
        "produced": sent["produced"], "failed": sent["failed"], "settled": received["settled"],
        "refused_settlements": counters[REFUSED], "delivered": received["delivered"],
    }
