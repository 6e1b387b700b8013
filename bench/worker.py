"""The processes that load the brokers: `python -m bench.worker ROLE COUNTERS-FD RESULT-FILE OPTIONS`.

A role is an async function of a module below; what it returns is written to the result file as JSON.
"""
from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import uvloop

from bench.counters import Counters

ROLES = {
    "produce": "bench.load", "consume": "bench.load",
    "echo": "bench.limits", "stream": "bench.limits",
    "quiet": "bench.neighbour_load", "burst": "bench.neighbour_load", "handle": "bench.neighbour_load",
    "rounds": "bench.round_trip_load",
    "paced": "bench.failover_load", "record": "bench.failover_load",
    "endpoint": "bench.isolation_load", "events": "bench.isolation_load",
    "fill": "bench.transfer_load",
    "traced": "bench.tracing_load", "collector": "bench.tracing_load",
}


def main(argv: list[str]) -> None:
    """Runs one role."""
    role, fd, result_file, options = argv
    run = getattr(importlib.import_module(ROLES[role]), role)
    result = uvloop.run(run(Counters(int(fd)), **json.loads(options)))
    Path(result_file).write_text(json.dumps(result))
    os._exit(0)  # what is still open is of no interest any more


if __name__ == "__main__":
    main(sys.argv[1:])
