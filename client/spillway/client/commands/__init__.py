"""The commands of `spillway` that talk to a cluster. Needs the `cli` extra."""
from __future__ import annotations

import contextlib
import sys

import typer
from spillway.client.cli import EXIT_FAILED
from spillway.client.commands import backup, cluster, contexts, dead_letters, destinations, messages, operations, routes, status, tokens

app = typer.Typer(name="spillway", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
                  rich_markup_mode=None,
                  help="Spillway: a replicated, fair, strictly ordered multi-tenant message queue.",
                  epilog="Installed extras add commands: serve and restore (spillway[broker]), dispatch (spillway[dispatch]).")
for _part in (messages, status, operations, backup):
    app.add_typer(_part.app)
app.add_typer(cluster.app, name="cluster")
app.add_typer(contexts.app, name="context")
app.add_typer(destinations.app, name="destination")
app.add_typer(dead_letters.app, name="dead-letter")
app.add_typer(routes.app, name="route")
app.add_typer(tokens.app, name="token")


def run(argv: list[str]) -> int:
    """Runs one command; returns the exit code."""
    try:
        app(args=argv, prog_name="spillway")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else EXIT_FAILED
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return EXIT_FAILED
    return 0


__all__ = ["app", "run"]
