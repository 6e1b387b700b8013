"""The demo: three nodes, a dispatcher, five HTTP destinations, one killed node, and a verdict.

    python -m demo
    python -m demo --events 2000 --seconds-max 40

Exit codes: 0 passed, 1 failed, 130 interrupted.
"""
from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

from demo.run import Plan, run

FAILED = 1
INTERRUPTED = 130


async def _interruptible(plan: Plan) -> bool:
    """Runs; SIGTERM, as Ctrl-C, ends all processes before it ends this one."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run(plan)


def _problems(error: BaseException) -> list[str]:
    """What went wrong, without the wrapping of task groups."""
    if isinstance(error, BaseExceptionGroup):
        return [line for one in error.exceptions for line in _problems(one)]
    return [f"{type(error).__name__}: {error}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m demo", description="Three nodes, five HTTP destinations, every event to each of them, one node"
                                           " killed on the way; verifies that nothing is lost or out of order.")
    parser.add_argument("--events", type=int, default=Plan.events, help="how many (default: %(default)s)")
    parser.add_argument("--tenants", type=int, default=Plan.tenants, help="of how many tenants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Plan.seed, help="of the events (default: %(default)s)")
    parser.add_argument("--seconds-max", type=float, default=Plan.seconds_max,
                        help="give up, and fail, after this long (default: %(default)s)")
    parser.add_argument("--no-kill", action="store_true", help="leave all nodes alive")
    parser.add_argument("--plain", action="store_true", help="lines instead of a live table, also on a terminal")
    parser.add_argument("--keep", action="store_true", help="keep the directory with data and logs")
    options = parser.parse_args(argv)
    if options.events < 1 or options.tenants < 1:
        parser.error("--events and --tenants must be at least 1")
    plan = Plan.scaled(options.events, tenants=options.tenants, seed=options.seed, seconds_max=options.seconds_max,
                       kill=not options.no_kill, plain=options.plain, keep=options.keep)
    try:
        return 0 if asyncio.run(_interruptible(plan)) else FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    except Exception as error:
        for problem in _problems(error):
            print(problem, file=sys.stderr)
        print("FAILED")
        return FAILED


if __name__ == "__main__":
    raise SystemExit(main())
