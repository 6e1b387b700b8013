"""Options of every command that talks to a cluster: how the client proves who it is, and whom it trusts."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from spillway.client.commands.common import CONNECTION

OPTIONS: dict[str, str] = {
    "tls_ca": "PEM file with the authority of the nodes' certificates, or 'default' for public ones; without it: no TLS.",
    "tls_cert": "PEM file with this client's certificate, where nodes demand one.",
    "tls_key": "PEM file with its key.",
    "tls_server_name": "The name in the nodes' certificates, if that is not in their addresses.",
    "token": "The token; a file is better, which others cannot see in the list of processes.",
    "token_file": "A file with the token.",
}


def add_options(app: typer.Typer) -> None:
    """Gives all commands that have an address these options, too."""
    for command in app.registered_commands:
        if command.callback is not None and "address" in inspect.signature(command.callback).parameters:
            command.callback = _with_options(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            add_options(group.typer_instance)


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def run(**values: Any) -> Any:
        CONNECTION.clear()
        CONNECTION.update({name: values.pop(name) for name in OPTIONS})
        return command(**values)

    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    parameters = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    for name, text in OPTIONS.items():
        option = typer.Option(f"--{name.replace('_', '-')}", envvar=f"SPILLWAY_{name.upper()}", metavar=name.rpartition("_")[2].upper(),
                              help=text, rich_help_panel="Security", show_default=False)
        hints[name] = Annotated[str, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default="", annotation=hints[name]))
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return run
