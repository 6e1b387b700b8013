"""What the commands share: options, running, printing."""
from __future__ import annotations

import asyncio
import base64
import dataclasses
import enum
import json
import re
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from spillway.client.cli import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_UNAVAILABLE, EXIT_USAGE

if TYPE_CHECKING:
    from spillway.client import Admin

CONNECT_SECONDS = 10.0
PREVIEW_CHARACTERS = 60
LINE_CHARACTERS_MAX = 100_000


class Output(enum.StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


Address = Annotated[list[str], typer.Option("--address", "-a", envvar="SPILLWAY_ADDRESS", metavar="HOST:PORT",
                                            help="A node of the cluster; may be given several times.")]
Format = Annotated[Output, typer.Option("--output", "-o", help="Tables for people, JSON for programs.")]
DestinationName = Annotated[str, typer.Argument(help="The destination.", metavar="DESTINATION")]
TenantName = Annotated[str | None, typer.Argument(help="Only this tenant; '' is the one without a name.", metavar="TENANT")]
KeyName = Annotated[str | None, typer.Argument(help="Only this key of the tenant.", metavar="KEY")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
ADDRESS = ["127.0.0.1:7070"]


# -- running -----------------------------------------------------------------------------------------------------


def run_async(command: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Runs a command's coroutine, faster if uvloop is there, and exits; an error becomes a line and an exit code."""
    from spillway.client.errors import InvalidArgument, NotFound, SpillwayError, Unavailable

    try:
        try:
            import uvloop
        except ImportError:
            code = asyncio.run(command())
        else:
            code = uvloop.run(command())
    except SpillwayError as error:
        print(f"spillway: {error}", file=sys.stderr)
        code = EXIT_FAILED
        if isinstance(error, InvalidArgument):
            code = EXIT_USAGE
        elif isinstance(error, NotFound):
            code = EXIT_NOT_FOUND
        elif isinstance(error, Unavailable):
            code = EXIT_UNAVAILABLE
    raise typer.Exit(code)


def run_admin(address: list[str], command: Callable[[Admin], Coroutine[Any, Any, int]]) -> NoReturn:
    """As `run_async`, for a command that needs a client's admin calls."""
    from spillway.client import Client

    async def connected() -> int:
        async with Client(address) as client:
            return await command(client.admin)

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
