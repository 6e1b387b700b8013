"""`python -m bench [a b c d e f g h i j]`: runs workloads, prints a table, writes JSON."""
from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import changes, failover, isolation, limits, machine, memory, neighbour, pick, round_trip, throughput, tracing, transfer
from bench.report import render

DISK_TYPES_REFUSED = ("tmpfs", "ramfs")


def throughputs(directory: Path, quick: bool) -> list[dict[str, Any]]:
    """Workload a."""
    return [throughput.measure(directory / f"a-{nodes}-{queues}", nodes, queues, 4.0 if quick else 10.0)
            for nodes in (1, 3) for queues in (1, 1_000, 100_000)]


def round_trips(directory: Path, quick: bool) -> list[dict[str, Any]]:
    """Workload b."""
    return [round_trip.measure(directory / f"b-{nodes}", nodes, 200 if quick else 500) for nodes in (1, 3)]


def noisy_neighbour(directory: Path, quick: bool) -> dict[str, Any]:
    """Workload c."""
    return neighbour.measure(directory / "c", 5.0 if quick else 15.0)


def memories(directory: Path, quick: bool) -> list[dict[str, Any]]:
    """Workload d."""
    return [memory.measure(directory / f"d-{queues}", queues)
            for queues in ((20_000, 100_000) if quick else (100_000, 1_000_000))]


def fail_over(directory: Path, quick: bool) -> dict[str, Any]:
    """Workload e."""
    return failover.measure(directory / "e", 4.0 if quick else 6.0)


def picks(_directory: Path, quick: bool) -> list[dict[str, Any]]:
    """Workload f."""
    return [pick.measure(queues, 5_000 if quick else 20_000, limited)
            for limited in (False, True) for queues in (10, 1_000, 100_000, 1_000_000)]


def isolations(directory: Path, quick: bool) -> dict[str, Any]:
    """Workload g."""
    return isolation.measure(directory / "g", 5.0 if quick else 20.0)


def all_changes(directory: Path, quick: bool) -> dict[str, Any]:
    """Workload h."""
    return changes.measure(directory / "h", 500.0 if quick else 3_000.0)


def transfers(directory: Path, quick: bool) -> dict[str, Any]:
    """Workload i."""
    return transfer.measure(directory / "i", (128 << 20) if quick else (2 << 30))


def tracings(directory: Path, quick: bool) -> dict[str, Any]:
    """Workload j."""
    return tracing.measure(directory / "j", 3 if quick else 16, 1.0 if quick else 4.0)


WORKLOADS: dict[str, Callable[[Path, bool], Any]] = {
    "a": throughputs, "b": round_trips, "c": noisy_neighbour, "d": memories, "e": fail_over,
    "f": picks, "g": isolations, "h": all_changes, "i": transfers, "j": tracings}


def main(argv: list[str]) -> int:
    """Runs what the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks; see bench/README.md.")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD",
                        help="a throughput, b round trip, c noisy neighbour, d memory, e failover, f pick, g isolation, "
                             "h changes, i transfer, j tracing; default: all")
    parser.add_argument("--quick", action="store_true", help="shorter and smaller: for a look, not for figures")
    parser.add_argument("--out", type=Path, default=Path("build/bench/results.json"), help="where the JSON goes")
    parser.add_argument("--dir", type=Path, default=Path("build/bench"), help="below it the nodes keep their data; a disk")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    arguments = parser.parse_args(argv)
    chosen = sorted(set(arguments.workloads)) or list(WORKLOADS)
    if unknown := set(chosen) - set(WORKLOADS):
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    arguments.dir.mkdir(parents=True, exist_ok=True)
    if (kind := machine.filesystem(arguments.dir)) in DISK_TYPES_REFUSED:
        parser.error(f"--dir {arguments.dir} is on {kind}, where a sync costs nothing; choose a disk")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: everything started is ended
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=arguments.dir)).resolve()
    results: dict[str, Any] = {"machine": machine.describe(directory), "quick": arguments.quick, "failed": {}}
    seconds = 2.0 if arguments.quick else 5.0
    try:
        say("raw limits")
        results["limits"] = {"grpc": limits.grpc_limit(directory / "limits", seconds, throughput.PAYLOAD_BYTES),
                             "rocksdb": limits.rocksdb_limit(directory / "limits", seconds, throughput.PAYLOAD_BYTES)}
        for letter in chosen:
            say(f"workload {letter}")
            start = time.monotonic()
            try:
                results[letter] = WORKLOADS[letter](directory, arguments.quick)
            except (RuntimeError, TimeoutError) as error:
                results["failed"][letter] = str(error)
                say(f"workload {letter} failed: {error}")
            say(f"workload {letter} took {time.monotonic() - start:.0f} s")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    text = json.dumps(results, indent=1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")
    print(text if arguments.json else render(results))
    return 1 if results["failed"] else 0


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
