"""Runs seeds: `python -m tests.simulation.raft --seed 7`, or `--seeds 200 --first 1000`."""
from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

from tests.simulation.raft.world import World


def main() -> int:
    """Prints what happened; a seed that fails is printed with the command that replays it."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.raft")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    seeds = [args.seed] if args.seed is not None else range(args.first, args.first + args.seeds)
    totals: Counter[str] = Counter()
    failed = 0
    began = time.perf_counter()
    for seed in seeds:
        world = World(seed)
        try:
            totals.update(world.run())
        except Exception as error:
            failed += 1
            if args.seed is not None:
                traceback.print_exc()
            print(f"seed {seed}: {type(error).__name__}: {error}\n  options: {world.options}\n"
                  f"  replay: python -m tests.simulation.raft --seed {seed}")
    print(f"{len(seeds)} seeds, {failed} failed, {time.perf_counter() - began:.1f} s: {dict(totals)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
