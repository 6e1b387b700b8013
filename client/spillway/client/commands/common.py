"""What the commands share: options, running, printing."""
from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from spillway.client.cli import EXIT_DENIED, EXIT_FAILED, EXIT_NOT_FOUND, EXIT_UNAVAILABLE, EXIT_USAGE
from spillway.client.connecting import ADDRESS, OPTIONS, Option, resolve
from spillway.client.connecting import Connection as Connection  # commands have both from here
from spillway.client.connecting import connect as connect
from spillway.client.contexts import ContextError, Contexts, default_path

if TYPE_CHECKING:
    from spillway.client import Admin

CONNECT_SECONDS = 10.0
PREVIEW_CHARACTERS = 60
LINE_CHARACTERS_MAX = 100_000


class Output(enum.StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


Format = Annotated[Output, typer.Option("--output", "-o", help="Tables for people, JSON for programs.")]
DestinationName = Annotated[str, typer.Argument(help="The destination.", metavar="DESTINATION")]
TenantName = Annotated[str | None, typer.Argument(help="Only this tenant; '' is the one without a name.", metavar="TENANT")]
KeyName = Annotated[str | None, typer.Argument(help="Only this key of the tenant.", metavar="KEY")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
HERE = Connection()  # stands in signatures of commands; `command` puts there what the user gave

Function = TypeVar("Function", bound=Callable[..., None])

# -- defining ----------------------------------------------------------------------------------------------------


def command(app: typer.Typer, name: str | None = None, *, examples: Sequence[str] = (), aliases: Sequence[str] = (),
            **options: Any) -> Callable[[Function], Function]:
    """Makes a function a command of `app`. If it has a parameter `connection`, it gets all options that say how to reach the cluster.
    `examples` are whole lines that work on an empty cluster of one node, in their order; they stand below the help. `aliases` are
    further names, which the help does not list."""
    epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None

    def made(function: Function) -> Function:
        callback = _connected(function) if "connection" in inspect.signature(function).parameters else function
        app.command(name, epilog=epilog, **options)(callback)
        for alias in aliases:
            app.command(alias, epilog=epilog, hidden=True, **options)(callback)
        return function

    return made


def _connected(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the options of a connection instead of its parameter `connection`."""
    signature = inspect.signature(function, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "connection"]

    @functools.wraps(function)
    def callback(ctx: typer.Context, **arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in ("context", *OPTIONS)}
        # What comes from variables is left to `resolve`, which knows their place.
        flags = {name: value for name, value in given.items() if _by_flag(ctx, name)}
        function(**arguments, connection=connection_of(flags))

    parameters = [inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context), *own, *_parameters()]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return callback


@functools.cache
def _parameters() -> tuple[inspect.Parameter, ...]:
    """The options that say how to reach a cluster."""
    address = OPTIONS["address"]
    kinds: dict[str, Any] = {
        "address": Annotated[list[str] | None, typer.Option("--address", "-a", envvar=Option.variable("address"), metavar=address.metavar,
                                                            help=f"{address.help[:-1]} (default: {ADDRESS}).")],
        "context": Annotated[str | None, typer.Option("--context", envvar="SPILLWAY_CONTEXT", metavar="NAME",
                                                      help="Context that says how to reach the cluster; - is the previous one.")]}
    for name, option in OPTIONS.items():
        if name != "address":
            kinds[name] = Annotated[str | None, typer.Option(Option.flag(name), envvar=Option.variable(name), metavar=option.metavar,
                                                             help=option.help)]
    return tuple(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in kinds.items())


def _by_flag(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def contexts() -> Contexts:
    """This user's contexts."""
    return Contexts(default_path(os.environ))


def connection_of(flags: Mapping[str, Any]) -> Connection:
    """How to reach the cluster, by flags, variables and contexts. A wrong context is wrong usage."""
    found = contexts()
    try:
        return resolve(flags, os.environ, found, flags.get("context"))
    except ContextError as error:
        raise typer.BadParameter(str(error), param_hint="--context") from None


# -- running -----------------------------------------------------------------------------------------------------


def run_async(work: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Runs a command's coroutine, faster if uvloop is there, and exits; an error becomes a line and an exit code."""
    import asyncio

    from spillway.client.errors import InvalidArgument, NotFound, PermissionDenied, SpillwayError, Unavailable

    try:
        try:
            import uvloop
        except ImportError:
            code = asyncio.run(work())
        else:
            code = uvloop.run(work())
    except SpillwayError as error:
        print(f"spillway: {error}", file=sys.stderr)
        code = EXIT_FAILED
        if isinstance(error, InvalidArgument):
            code = EXIT_USAGE
        elif isinstance(error, NotFound):
            code = EXIT_NOT_FOUND
        elif isinstance(error, Unavailable):
            code = EXIT_UNAVAILABLE
        elif isinstance(error, PermissionDenied):
            code = EXIT_DENIED
    raise typer.Exit(code)


def run_admin(connection: Connection, work: Callable[[Admin], Coroutine[Any, Any, int]]) -> NoReturn:
    """As `run_async`, for a command that needs a client's admin calls."""
    async def connected() -> int:
        async with connect(connection) as client:
            return await work(client.admin)

    run_async(connected)


def seconds(text: str | float) -> float:
    """The value of an option that is a duration: "30s", "1h30m", or seconds."""
    from spillway.client.policy_file import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def confirmed(question: str, yes: bool) -> None:
    """Asks on standard error, unless `yes`. Ends the command with exit code 1 for anything but a yes."""
    if yes:
        return
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        print("spillway: not confirmed; nothing was done", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)


# -- values for people and programs ------------------------------------------------------------------------------


def plural(count: int, what: str) -> str:
    """"1 node", "2 nodes"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def scope(destination: str, tenant: str | None = None, key: str | None = None) -> str:
    """How a destination, a tenant or a queue is called in sentences."""
    return repr(destination) + ("" if tenant is None else f", tenant {tenant!r}") + ("" if key is None else f", key {key!r}")


def plain(value: Any) -> Any:
    """A value of the client as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, enum.Enum):
        return value.name.lower()
    return value


def with_payload(message: dict[str, Any], payload: bytes) -> dict[str, Any]:
    """Adds a payload as JSON can have it: text, or base64 of what is none."""
    try:
        message["payload"] = payload.decode()
    except UnicodeDecodeError:
        message["payload_base64"] = base64.b64encode(payload).decode()
    return message


def preview(payload: bytes) -> str:
    """The beginning of a payload, on one line."""
    text = payload[:4 * PREVIEW_CHARACTERS].decode(errors="replace")
    text = "".join(c if c.isprintable() else "·" for c in text)
    return text if len(text) <= PREVIEW_CHARACTERS else text[:PREVIEW_CHARACTERS - 1] + "…"


def when(moment: datetime | None, otherwise: str = "") -> str:
    """A moment in local time, to the second."""
    return otherwise if moment is None else moment.astimezone().isoformat(" ", "seconds")


def masked(destination: Any, secrets: bool = False) -> dict[str, Any]:
    """A destination as JSON has it, without what only its receiver should know: signing secrets, values of headers and
    credentials of the URL; with them if `secrets`."""
    out: dict[str, Any] = plain(destination)
    if out["http"] is not None and not secrets:
        out["http"]["signing_secrets"] = ["whsec_…" for _ in out["http"]["signing_secrets"]]
        out["http"]["headers"] = dict.fromkeys(out["http"]["headers"], "…")
        out["http"]["url"] = without_credentials(out["http"]["url"])
    return out


def without_credentials(url: str) -> str:
    """A URL without user and password."""
    return re.sub(r"(?<=//)[^/?#]*@", "…@", url, count=1)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """path -> text of everything in a value as JSON has it."""
    rows: dict[str, str] = {}
    for name, one in value.items():
        if isinstance(one, Mapping) and one:
            rows |= flat(one, f"{prefix}{name}.")
        elif isinstance(one, list):
            rows[prefix + name] = ", ".join(map(str, one))
        else:
            rows[prefix + name] = _text(one)
    return rows


def _text(value: Any) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


# -- printing ----------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """A value as JSON has it, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_one(value: dict[str, Any], output: Output) -> None:
    """One thing: its fields below one another."""
    if output is Output.JSON:
        print_json(value)
    else:
        print_table(("field", "value"), list(flat(value).items()))


def print_done(sentence: str, output: Output, **fields: Any) -> None:
    """What a command did: a sentence for people, fields for programs."""
    if output is Output.JSON:
        print_json(fields)
    else:
        print(sentence)


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Rows below a head, each on one line however long."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as it is: brackets are no markup
    Console(soft_wrap=True, width=LINE_CHARACTERS_MAX).print(table)
