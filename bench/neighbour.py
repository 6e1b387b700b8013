"""Workload c: what a tenant that dumps does to the others."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.children import Children, Worker, poll
from bench.counters import FINISH, GO, READY_BURST, READY_CONSUMER, READY_PRODUCER, SETTLED, STOP, Counters
from bench.nodes import Nodes
from bench.stats import series, summary

TENANTS, PER_SECOND = 100, 5.0
BURST_MESSAGES, BURST_KEYS = 50_000, 1_000
HANDLERS, HANDLER_SECONDS = 50, 0.05
PAYLOAD_BYTES = 1024
SETTLE_SECONDS = 2.0
SERIES_SECONDS = 0.5  # for plots


def measure(directory: Path, seconds: float) -> dict[str, Any]:
    """Runs one node, the quiet tenants for `seconds`, then the dump and `seconds` more."""
    counters = Counters()
    with Children() as children:
        nodes = Nodes(directory, 1, children)
        consumer = Worker("handle", directory, counters, addresses=nodes.addresses, handlers=HANDLERS,
                          handler_seconds=HANDLER_SECONDS)
        quiet = Worker("quiet", directory, counters, addresses=nodes.addresses, tenants=TENANTS, per_second=PER_SECOND,
                       payload_bytes=PAYLOAD_BYTES)
        burst = Worker("burst", directory, counters, addresses=nodes.addresses, messages=BURST_MESSAGES, keys=BURST_KEYS,
                       payload_bytes=PAYLOAD_BYTES)
        children.start(consumer)
        children.start(burst)
        poll(lambda: counters[READY_CONSUMER] and counters[READY_BURST], 60, "consumer and burst", children)
        children.start(quiet)
        poll(lambda: counters[READY_PRODUCER], 60, "the quiet tenants", children)
        time.sleep(SETTLE_SECONDS)
        begin = time.monotonic()
        time.sleep(seconds)
        counters[GO] = 1
        dump = burst.result(60)
        handled = counters[SETTLED]
        rest = max(dump["start"] + seconds - time.monotonic(), 1.0)
        start = time.monotonic()
        time.sleep(rest)
        capacity = (counters[SETTLED] - handled) / (time.monotonic() - start)
        end = time.monotonic()
        counters[STOP] = 1
        sent = quiet.result(60)
        time.sleep(1.0)
        counters[FINISH] = 1
        got = consumer.result(60)

    def between(samples: list[list[float]], since: float, until: float) -> dict[str, Any]:
        return summary([seconds for at, seconds in samples if since <= at < until])

    return {
        "quiet_sent": sent["sent"], "quiet_handled": len(got["begun"]),
        "quiet_sender_late_max_ms": round(sent["late_max"] * 1e3, 1),
        "burst_stored_seconds": round(dump["end"] - dump["start"], 2), "burst_handled": got["burst_handled"],
        "burst_backlog_at_end": BURST_MESSAGES - got["burst_handled"], "handled_per_second": round(capacity),
        "dump_at_seconds": round(dump["start"] - begin, 3), "series": series(got["begun"], begin, end, SERIES_SECONDS),
        "to_handler": {"before": between(got["begun"], begin, dump["start"]),
                       "while_dumping": between(got["begun"], dump["start"], dump["end"]),
                       "during": between(got["begun"], dump["start"], end)},
        "to_stored": {"before": between(sent["stored"], begin, dump["start"]),
                      "while_dumping": between(sent["stored"], dump["start"], dump["end"]),
                      "during": between(sent["stored"], dump["start"], end)},
    }
