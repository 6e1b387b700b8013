"""Runs whole simulated clusters: `python -m tests.simulation --seed 7` replays one, `--seeds 2000 --first 0` runs many.

A seed is a run: the same seed does the same, to the last byte of its trace (`--trace`), in any process.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.cluster.world import World

PIECE = 10  # seeds that a process takes at a time
REPLAY = "python -m tests.simulation --seed {}"


def commit() -> str:
    """The commit that runs, with a mark if files differ from it."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def collect_rarely() -> None:
    """For a process that runs seeds only: a world is garbage as a whole, when it is over."""
    gc.set_threshold(100_000, 50, 50)


def some(seeds: range) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Counts of what happened in these seeds, and (seed, what was wrong) of those that failed."""
    counts: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        world = World(seed)
        try:
            world.run()
        except Exception as error:
            failures.append((seed, f"{type(error).__name__}: {error}"))
        counts.update(world.counts)
    return counts, failures


def one(seed: int, trace: bool) -> int:
    """Replays a seed, with all that is known of a failure."""
    world = World(seed, show=print if trace else None)
    print(f"seed {seed} at {commit()}: {world.options}")
    try:
        world.run()
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        print(f"trace {world.digest}; {json.dumps(dict(sorted(world.counts.items())))}")
    return 0


def pieces(first: int, seeds: int) -> Iterator[range]:
    """Ranges of seeds."""
    for start in range(first, first + seeds, PIECE):
        yield range(start, min(start + PIECE, first + seeds))


def many(first: int, seeds: int, jobs: int) -> int:
    """Runs seeds in several processes; prints each that fails, with the command that replays it, and what happened in all."""
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    failed = 0
    with ProcessPoolExecutor(jobs, initializer=collect_rarely) as pool:
        for found, failures in pool.map(some, pieces(first, seeds)):
            counts.update(found)
            for seed, what in failures:
                failed += 1
                print(f"seed {seed} fails at {commit()}: {what[:600]}\n  replay: {REPLAY.format(seed)}", flush=True)
    hours = counts.pop("simulated ms", 0) / 3_600_000
    print(json.dumps({
        "commit": commit(), "seeds": seeds, "first": first, "failed": failed, "seconds": round(time.perf_counter() - began, 1),
        "simulated_hours": round(hours, 1), "faults": {k[7:]: v for k, v in sorted(counts.items()) if k.startswith("fault: ")},
        "members": {k[9:]: v for k, v in sorted(counts.items()) if k.startswith("members: ")},
        **{k.replace(" ", "_"): v for k, v in sorted(counts.items()) if ":" not in k}}, indent=1))
    return 1 if failed else 0


def main() -> int:
    """Returns the exit code: 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event")
    parser.add_argument("--seeds", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    args = parser.parse_args()
    if args.seed is not None:
        return one(args.seed, args.trace)
    return many(args.first, args.seeds, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
