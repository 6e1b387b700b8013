"""Contexts: names for how to reach a cluster. context add, select, ls, show, rm."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from spillway.client.commands.common import (
    Format,
    Output,
    Yes,
    command,
    confirmed,
    context_names,
    contexts,
    print_done,
    print_json,
    print_one,
    print_table,
)
from spillway.client.connecting import OPTIONS, addresses
from spillway.client.contexts import ContextError

app = typer.Typer(no_args_is_help=True, help=(
    "Contexts: names for how to reach a cluster. Flags win over what a context says; see docs/cli.md."))
New = Annotated[str, typer.Argument(help="The context.", metavar="NAME")]
Name = Annotated[str, typer.Argument(help="The context.", metavar="NAME", autocompletion=context_names)]
HIDDEN = "…"
Secrets = Annotated[bool, typer.Option("--secrets", help="Show the token, too.")]


@command(app, "add", examples=("spillway context add local -a 127.0.0.1:7070 --description 'my machine'",
                               "spillway context add staging -a n1.example:7070 -a n2.example:7070 --select"))
def add(
    name: New,
    address: Annotated[list[str], typer.Option("--address", "-a", metavar="HOST:PORT", help=OPTIONS["address"].help)],
    tls_ca: Annotated[str | None, typer.Option(metavar="FILE", help=OPTIONS["tls_ca"].help)] = None,
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help=OPTIONS["tls_cert"].help)] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help=OPTIONS["tls_key"].help)] = None,
    tls_server_name: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["tls_server_name"].help)] = None,
    token_file: Annotated[str | None, typer.Option(metavar="FILE", help=OPTIONS["token_file"].help)] = None,
    token: Annotated[str | None, typer.Option(metavar="TOKEN", help="The token itself; it is kept in clear: prefer a file.")] = None,
    description: Annotated[str, typer.Option(help="For people.")] = "",
    select_: Annotated[bool, typer.Option("--select", help="Select it, too.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a context of that name.")] = False,
    output: Format = Output.TABLE,
) -> None:
    """Adds a context. Files are kept by their whole paths."""
    if token and token_file:
        raise typer.BadParameter("give a token or a file with it, not both", param_hint="--token")
    values: dict[str, Any] = {"address": list(addresses(address)), "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key,
                              "tls_server_name": tls_server_name, "token": token, "token_file": token_file, "description": description}
    for one, option in OPTIONS.items():
        if option.path and values[one]:
            values[one] = str(Path(values[one]).expanduser().absolute())
            if not Path(values[one]).exists():
                print(f"spillway: {values[one]} does not exist yet", file=sys.stderr)
    if token:
        print("spillway: the token is kept in clear, and was seen by whoever can list processes: prefer --token-file", file=sys.stderr)
    with _wrong_usage():
        found = contexts()
        found.add(name, values, replace)
        if select_:
            found.select(name)
    print_done(f"added context {name!r}" + (", and selected it" if select_ else ""), output, context=name, selected=select_)


@command(app, "select", examples=("spillway context select local", "spillway context select staging", "spillway context select -"))
def select(name: Annotated[str, typer.Argument(help="The context; - is the previous one, '' is none.", metavar="NAME",
                                                autocompletion=context_names)],
           output: Format = Output.TABLE) -> None:
    """Makes a context the one that commands take when nothing else says how to reach the cluster."""
    with _wrong_usage():
        chosen = contexts().select(name)
    print_done(f"selected context {chosen!r}" if chosen else "no context is selected", output, context=chosen or None)


@command(app, "ls", examples=("spillway context ls", "spillway context ls -o json"), aliases=("list",))
def ls(output: Format = Output.TABLE) -> None:
    """Lists contexts, by name; * marks the selected one."""
    with _wrong_usage():
        found = contexts()
        rows = sorted(found.all.items())
    if output is Output.JSON:
        print_json([{"context": name, "selected": name == found.selected} | _shown(one) for name, one in rows])
    else:
        print_table(("", "context", "address", "description"), [
            ("*" if name == found.selected else "", name, ", ".join(addresses(one.get("address"))), one.get("description", ""))
            for name, one in rows])


@command(app, "show", examples=("spillway context show", "spillway context show staging -o json"))
def show(name: Annotated[str | None, typer.Argument(help="The context; - is the previous one.", metavar="NAME",
                                                    show_default="the selected one", autocompletion=context_names)] = None,
         secrets: Secrets = False, output: Format = Output.TABLE) -> None:
    """Shows one context, and where it is kept."""
    with _wrong_usage():
        found = contexts()
        chosen = found.named(name or found.selected)
        if not chosen:
            raise ContextError("no context is selected; name one, or: spillway context select NAME")
        one = found.get(chosen)
    if "token" in one and found.readable_by_others():
        print(f"spillway: {found.path} has a token and others may read it: chmod 600 {found.path}", file=sys.stderr)
    print_one({"context": chosen, "selected": chosen == found.selected, **_shown(one, secrets), "file": str(found.path)}, output)


@command(app, "rm", examples=("spillway context rm staging --yes",), aliases=("remove",))
def rm(name: Name, yes: Yes = False, output: Format = Output.TABLE) -> None:
    """Removes a context. The files that it names stay."""
    with _wrong_usage():
        found = contexts()
        name = found.named(name)
        found.get(name)
        confirmed(f"remove context {name!r}?", yes)
        found.remove(name)
    print_done(f"removed context {name!r}", output, context=name, state="removed")


def _shown(one: dict[str, Any], secrets: bool = False) -> dict[str, Any]:
    """A context as JSON has it: every key, None for what it does not say."""
    shown: dict[str, Any] = {name: one.get(name) for name in OPTIONS} | {"description": one.get("description")}
    shown["address"] = list(addresses(one.get("address")))
    return shown | {"token": HIDDEN} if shown["token"] and not secrets else shown


@contextmanager
def _wrong_usage() -> Iterator[None]:
    """What is wrong about contexts is wrong usage."""
    try:
        yield
    except ContextError as error:
        raise typer.BadParameter(str(error)) from None
