"""Workload b: the unloaded round trip."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.children import Children, Worker
from bench.counters import Counters
from bench.nodes import Nodes

WARM_UP = 100
SECONDS_MAX = 120.0
PAYLOAD_BYTES = 1024


def measure(directory: Path, node_count: int, rounds: int) -> dict[str, Any]:
    """Runs a fresh cluster and one process that sends, receives and acknowledges one message at a time."""
    counters = Counters()
    with Children() as children:
        nodes = Nodes(directory, node_count, children)
        worker = Worker("rounds", directory, counters, addresses=nodes.addresses, count=rounds, warm_up=WARM_UP,
                        payload_bytes=PAYLOAD_BYTES)
        children.start(worker)
        return {"nodes": node_count, **worker.result(SECONDS_MAX)}
