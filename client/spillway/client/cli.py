"""`spillway`: produce, consume, look, and start what other packages plug in.

Exit codes: 0 done; 1 failed; 2 wrong usage or a refused argument; 3 no such destination, route or node; 4 the cluster cannot be
reached, or (status) is not healthy; 5 not allowed. Results go to standard output, everything else to standard error.

Commands of the entry-point group `spillway.commands` parse their own arguments: `spillway serve --help` reaches them.
Heavy modules are imported by the commands that need them, so that completion and help stay fast.
"""
from __future__ import annotations

import importlib.metadata
import os
import sys

GROUP = "spillway.commands"
# Where commands come from when they are missing.
EXTRAS = {"serve": "broker", "config": "broker", "restore": "broker", "dispatch": "dispatch"}
EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_UNAVAILABLE, EXIT_DENIED = 1, 2, 3, 4, 5


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. The console script's entry point."""
    arguments = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC reports on every connection that a node closes
    if arguments and not arguments[0].startswith("-"):
        plugged = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
        if arguments[0] in plugged:
            return _run_plugged(plugged[arguments[0]], arguments[1:])
        if arguments[0] in EXTRAS:
            return _missing(f"spillway {arguments[0]}", EXTRAS[arguments[0]], None)
    try:
        from spillway.client.commands import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        return _missing("the command line", "cli", error)
    return run(arguments)


def _run_plugged(point: importlib.metadata.EntryPoint, argv: list[str]) -> int:
    try:
        command = point.load()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(point.name)
        if extra is None or (error.name or "").startswith("spillway"):
            raise
        return _missing(f"spillway {point.name}", extra, error)
    code = command(argv)
    return code if isinstance(code, int) else 0


def _missing(what: str, extra: str, error: ModuleNotFoundError | None) -> int:
    reason = f" ({error.name} is not installed)" if error is not None else ""
    print(f"{what} needs the {extra!r} extra{reason}: pip install 'spillway[{extra}]'", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
