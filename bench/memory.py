"""Workload d: memory per queue, full and emptied."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.children import Children, Worker, poll
from bench.counters import FINISH, READY_CONSUMER, SETTLED, Counters
from bench.nodes import Nodes
from bench.usage import rss_bytes, settled_rss

PAYLOAD_BYTES = 100
CREDIT = 8192
WARM_QUEUES = 1_000
MESSAGES_PER_SECOND_MIN = 1_000  # slower is an error


def measure(directory: Path, queues: int) -> dict[str, Any]:
    """Fills so many queues of one node with a message each, drains them, and does both once more. Before that, the same
    messages go through a few queues: what a node keeps of any work (caches, the log's tail) is not the queues' cost."""
    patience = 60 + queues / MESSAGES_PER_SECOND_MIN
    with Children() as children:
        nodes = Nodes(directory, 1, children)
        pid = nodes.pids["n1"]
        out: dict[str, Any] = {"queues": queues, "warm_queues": WARM_QUEUES, "rss_fresh": settled_rss(pid)}
        for turn, names in (("warm", WARM_QUEUES), ("first", queues), ("second", queues)):
            counters = Counters()
            start = time.monotonic()
            producer = Worker("produce", directory, counters, addresses=nodes.addresses, queues=names,
                              payload_bytes=PAYLOAD_BYTES, outstanding=0, total=queues)
            children.start(producer)
            stored = producer.result(patience)["produced"]
            out[f"{turn}_fill_seconds"] = round(time.monotonic() - start, 1)
            if stored != queues:
                raise RuntimeError(f"{stored} of {queues} messages were stored")
            out[f"{turn}_rss_full"] = settled_rss(pid)
            start = time.monotonic()
            consumer = Worker("consume", directory, counters, addresses=nodes.addresses, credit=CREDIT)
            children.start(consumer)
            poll(lambda counters=counters: counters[READY_CONSUMER], 60, "the consumer", children)
            poll(lambda counters=counters: counters[SETTLED] >= queues, patience, "every queue emptied", children)
            out[f"{turn}_drain_seconds"] = round(time.monotonic() - start, 1)
            out[f"{turn}_rss_at_drain"] = rss_bytes(pid)
            counters[FINISH] = 1
            consumer.result(60)
            out[f"{turn}_rss_drained"] = settled_rss(pid)
    before = out["warm_rss_drained"]
    for turn in ("first", "second"):
        out[f"{turn}_bytes_per_full_queue"] = round((out[f"{turn}_rss_full"] - before) / queues)
        out[f"{turn}_bytes_per_emptied_queue"] = round((out[f"{turn}_rss_drained"] - before) / queues)
    return out
