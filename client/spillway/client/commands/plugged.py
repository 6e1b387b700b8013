"""Commands that come with the extras, so that help and completion know them. `spillway.client.cli` runs them before it comes to this,
and they parse their own arguments."""
from __future__ import annotations

import typer
from spillway.client.cli import PLUGGED, Plugged, run_plugged
from spillway.client.commands.common import examples_text

app = typer.Typer()
_AS_IT_IS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def _add(name: str, what: Plugged) -> None:
    @app.command(name, help=what.help, context_settings=_AS_IT_IS, options_metavar="[OPTIONS]", epilog=examples_text(what.examples))
    def plugged(ctx: typer.Context) -> None:
        raise typer.Exit(run_plugged(name, ctx.args) or 0)


for _name, _what in PLUGGED.items():
    _add(_name, _what)
