"""The commands of `spillway`. Needs the `cli` extra."""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import typer
from spillway.client.cli import EXIT_FAILED
from spillway.client.commands import (
    backup,
    bench,
    check,
    cluster,
    completion,
    contexts,
    dead_letters,
    destinations,
    messages,
    operations,
    plugged,
    routes,
    status,
    tenants,
    tokens,
    top,
)

app = typer.Typer(name="spillway", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
                  rich_markup_mode=None,
                  help="Spillway: a replicated, fair, strictly ordered multi-tenant message queue.",
                  epilog="docs/cli.md has every command, the exit codes, and how contexts work.")
# In the order in which people come to need them.
for _part in (plugged, messages, status, check, top, operations):
    app.add_typer(_part.app)
for _name, _group in (("destination", destinations.app), ("tenant", tenants.app), ("route", routes.app), ("dead-letter", dead_letters.app),
                      ("cluster", cluster.app), ("token", tokens.app)):
    app.add_typer(_group, name=_name)
for _name in ("deadletter", "dlq"):
    app.add_typer(dead_letters.app, name=_name, hidden=True)
app.add_typer(backup.app)
app.add_typer(bench.app, name="bench")
app.add_typer(contexts.app, name="context")
app.add_typer(completion.app, name="completion")


def run(argv: list[str], run_plugged: Callable[[str, list[str]], int | None] = lambda name, argv: None) -> int:
    """Runs one command; returns the exit code. What is none of these is tried with `run_plugged`, which gives None if it knows it
    neither."""
    program = typer.main.get_command(app)
    if argv and not argv[0].startswith("-") and argv[0] not in program.commands:  # type: ignore[attr-defined]
        code = run_plugged(argv[0], argv[1:])
        if code is not None:
            return code
    try:
        program(args=argv, prog_name="spillway")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else EXIT_FAILED
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return EXIT_FAILED
    return 0


__all__ = ["app", "run"]
