"""`spillway`: produce, consume, look, and start what other packages plug in.

Exit codes: 0 done; 1 failed; 2 wrong usage or a refused argument; 3 no such destination, route or node; 4 the cluster cannot be
reached, or (status) is not healthy; 5 not allowed; 130 interrupted. EXIT_CODES says what they mean. Results go to standard output,
everything else to standard error.

Commands of the entry-point group `spillway.commands` parse their own arguments: `spillway serve --help` reaches them.
Heavy modules are imported by the commands that need them, so that completion and help stay fast.
"""
from __future__ import annotations

import os
import sys
from typing import NamedTuple

GROUP = "spillway.commands"
EXIT_CODES = {
    0: "done",
    1: "failed: not confirmed, not stored, a conflict, a backup that is damaged",
    2: "wrong usage, or an argument that the cluster refuses; the message names it",
    3: "what was asked for does not exist: a destination, a route, a node, a dead letter",
    4: "the cluster cannot be reached or did not answer in time; or it answered that something is wrong (`status`, `cluster status`) or "
       "only a part of it did (`top`, `tenant list`, `destination stats`)",
    5: "the caller may not do this",
    130: "interrupted",
}


class Plugged(NamedTuple):
    """A command that another part of the package brings."""

    extra: str  # where it comes from when it is missing
    help: str
    examples: tuple[str, ...]


PLUGGED = {
    "serve": Plugged("broker", "Runs a node.", ("spillway serve --data-dir ./data", "spillway serve --config node.toml")),
    "dev": Plugged("broker", "Runs a node to try things with: everything in a temporary directory, ready to use.",
                   ("spillway dev", "spillway dev --data-dir ./try --shards 8")),
    "config": Plugged("broker", "Prints the settings that serve would take, and checks them.", ("spillway config --shards 32",)),
    "restore": Plugged("broker", "Makes the data directory of a new cluster's first node from a backup.",
                       ("spillway restore ./backup-1 --data-dir ./restored --node-id n1",)),
    "dispatch": Plugged("dispatch", "Delivers messages to the URLs of their destinations, over HTTP.",
                        ("spillway dispatch", "spillway dispatch --destination 'crm*' --status-port 7080")),
}
EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_UNAVAILABLE, EXIT_DENIED = 1, 2, 3, 4, 5


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
    try:
        code = command(argv)
    except SystemExit as exit_:
        if exit_.code or name not in PLUGGED or not {"-h", "--help"}.intersection(argv):
            raise
        print("\nexamples:", *PLUGGED[name].examples, sep="\n  ")  # below the command's own help
        code = 0
    return code if isinstance(code, int) else 0


def _missing(what: str, extra: str, error: ModuleNotFoundError | None) -> int:
    reason = f" ({error.name} is not installed)" if error is not None else ""
    print(f"{what} needs the {extra!r} extra{reason}: pip install 'spillway[{extra}]'", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
