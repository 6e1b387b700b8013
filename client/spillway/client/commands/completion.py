"""Shell completion: completion show, install."""
from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated

import typer
from spillway.client.commands.common import Format, Output, command, print_done

app = typer.Typer(no_args_is_help=True, help="Completion of commands and options by the shell.")
PROGRAM, VARIABLE = "spillway", "_SPILLWAY_COMPLETE"  # the variable asks the program for completions instead of running it


class Shell(enum.StrEnum):
    """Shells that are completed in."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def _shell(given: Shell | None) -> Shell:
    name = given or Path(os.environ.get("SHELL", "")).name
    if name not in list(Shell):
        raise typer.BadParameter(f"your shell ({name or 'unknown'}) is none that is known; name it: bash, zsh or fish", param_hint="SHELL")
    return Shell(name)


Wanted = Annotated[Shell | None, typer.Argument(help="The shell.", show_default="yours", metavar="bash|zsh|fish")]


@command(app, "show", examples=("spillway completion show bash", "spillway completion show zsh > _spillway"))
def show(shell: Wanted = None, output: Format = Output.TABLE) -> None:
    """Prints the script that makes a shell complete, for your own way to install it."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    chosen = _shell(shell)
    script = get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=chosen)
    print_done(script, output, shell=chosen, script=script)


@command(app, "install", examples=("spillway completion install bash",))
def install(shell: Wanted = None, output: Format = Output.TABLE) -> None:
    """Installs completion for a shell, in its files in your home directory. New shells have it."""
    from typer.completion import install as into  # type: ignore[attr-defined]

    chosen, path = into(shell=_shell(shell), prog_name=PROGRAM, complete_var=VARIABLE)
    print_done(f"installed completion for {chosen} in {path}; new shells have it", output, shell=chosen, file=str(path))
