"""`python -m tests.hostile [--seconds 300] [--rounds 3] [--seed 1]`: attacks a node and prints what became of it."""
from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from tests.hostile.suite import attack


def main() -> None:
    """Fails if the node breaks a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.0, help="go on for so long (default: once through)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(asyncio.run(attack(Path(directory), args.seed, args.rounds, args.seconds)), indent=1))


if __name__ == "__main__":
    main()
