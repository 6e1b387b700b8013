"""`spillway`: produce, consume, look, and start what other packages plug in.

Exit codes: 0 done; 1 failed; 2 wrong usage or a refused argument; 3 no such destination, route or node; 4 the cluster cannot be
reached, or (status) is not healthy; 5 not allowed; 130 interrupted. docs/cli.md has them all. Results go to standard output,
everything else to standard error.

Commands of the entry-point group `spillway.commands` parse their own arguments: `spillway serve --help` reaches them.
Heavy modules are imported by the commands that need them, so that completion and help stay fast.
"""
from __future__ import annotations

import os
import sys
from typing import NamedTuple

GROUP = "spillway.commands"


class Plugged(NamedTuple):
    """A command that another part of the package brings."""

    extra: str  # where it comes from when it is missing
    help: str


PLUGGED = {
    "serve": Plugged("broker", "Runs a node (needs spillway[broker])."),
    "dev": Plugged("broker", "Runs a node to try things with: everything in a temporary directory, ready to use."),
    "config": Plugged("broker", "Prints the settings that serve would take, and checks them."),
    "restore": Plugged("broker", "Makes the data directory of a new cluster's first node from a backup."),
    "dispatch": Plugged("dispatch", "Delivers messages over HTTP (needs spillway[dispatch])."),
}
EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_UNAVAILABLE, EXIT_DENIED, EXIT_INTERRUPTED = 1, 2, 3, 4, 5, 130


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. The console script's entry point."""
    arguments = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC reports on every connection that a node closes
    if arguments and arguments[0] in PLUGGED:
        return run_plugged(arguments[0], arguments[1:]) or 0
    try:
        from spillway.client.commands import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        return _missing("the command line", "cli", error)
    return run(arguments, run_plugged)


def run_plugged(name: str, argv: list[str]) -> int | None:
    """Runs a command of an entry point; returns the exit code. None: there is no such command."""
    import importlib.metadata  # takes as long as the rest of a start: only when one is asked for

    point = next((one for one in importlib.metadata.entry_points(group=GROUP) if one.name == name), None)
    if point is None:
        return _missing(f"spillway {name}", PLUGGED[name].extra, None) if name in PLUGGED else None
    try:
        command = point.load()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("spillway") or name not in PLUGGED:
            raise
        return _missing(f"spillway {name}", PLUGGED[name].extra, error)
    code = command(argv)
    return code if isinstance(code, int) else 0


def _missing(what: str, extra: str, error: ModuleNotFoundError | None) -> int:
    reason = f" ({error.name} is not installed)" if error is not None else ""
    print(f"{what} needs the {extra!r} extra{reason}: pip install 'spillway[{extra}]'", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
