"""What consumers lease from: destination list, show, stats, apply."""
from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from spillway.client.cli import EXIT_UNAVAILABLE
from spillway.client.commands.common import (
    HERE,
    Connection,
    DestinationName,
    DryRun,
    Format,
    Output,
    command,
    flat,
    masked,
    plain,
    print_json,
    print_one,
    print_table,
    run_admin,
    seconds,
    without_credentials,
)

if TYPE_CHECKING:
    from spillway.client import Admin, Destination

app = typer.Typer(no_args_is_help=True, help="Destinations: what consumers lease from.")


@command(app, "list", aliases=("ls",), examples=("spillway destination list",
    "spillway destination list -o json"))
def list_all(output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Lists all destinations, by name."""

    async def show(admin: Admin) -> int:
        found = [one async for one in admin.list_destinations()]
        if output is Output.JSON:
            print_json([masked(one) for one in found])
        else:
            print_table(("name", "order", "nack policy", "lease", "http"), [
                (one.name, "no" if one.policy.ordered is False else "yes",
                 one.policy.nack_policy.name.lower() if one.policy.nack_policy else "",
                 f"{one.policy.lease_seconds:g} s" if one.policy.lease_seconds else "",
                 without_credentials(one.http.url) if one.http else "") for one in found])
        return 0

    run_admin(connection, show)


@command(app, "show", examples=("spillway destination show billing",))
def show_one(
    name: DestinationName,
    secrets: Annotated[bool, typer.Option("--secrets", help=(
        "Show signing secrets, values of headers and the URL's credentials, too."))] = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Shows one destination's policy and target."""

    async def show(admin: Admin) -> int:
        print_one(masked(await admin.get_destination(name), secrets), output)
        return 0

    run_admin(connection, show)


@command(app, "stats", examples=(
    "spillway destination stats billing",
    "spillway destination stats billing -o json"))
def stats(name: DestinationName, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Shows counts of one destination. Exit code 4 if shards did not answer."""

    async def show(admin: Admin) -> int:
        found = await admin.destination_stats(name)
        print_one(plain(found), output)
        return EXIT_UNAVAILABLE if found.shards_missing else 0

    run_admin(connection, show)


@command(app, "apply", examples=(
    "spillway destination apply billing",
    "spillway destination apply crm --url https://crm.example/events --timeout 5s --concurrency-max 8",
    "spillway destination apply crm --nack-policy block_until --attempts-max 10 --ttl 7d",
    "spillway destination apply -f policy.toml --dry-run",
    "spillway destination apply -f policy.toml"))
def apply(
    name: Annotated[str | None, typer.Argument(help="The destination.", metavar="DESTINATION")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE.toml", help=(
        "Destinations and their whole policies, instead of a name and options; see docs/policies.md."))] = None,
    dry_run: DryRun = False,
    run_messages_max: Annotated[int | None, typer.Option(help="Longest run of one queue in a lease; 1 to 1024.")] = None,
    lease_seconds: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help=(
        "How long a lease lasts; 1 s to 12 h."))] = None,
    backoff_base: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help=(
        "Waiting time before the first retry."))] = None,
    backoff_cap: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help=(
        "Waiting time before a retry at most."))] = None,
    nack_policy: Annotated[str | None, typer.Option(metavar="block|block_until|skip", help=(
        "What happens to messages that fail."))] = None,
    attempts_max: Annotated[int | None, typer.Option(help="block_until: attempts before it is dead-lettered.")] = None,
    age_max: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help=(
        "block_until: age at which it is."))] = None,
    ordered: Annotated[bool | None, typer.Option("--ordered/--unordered", help="Whether queues keep their order.")] = None,
    ttl: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help=(
        "Age at which messages are not delivered any more."))] = None,
    url: Annotated[str | None, typer.Option(help="Where the dispatcher sends its messages; '' for nowhere.")] = None,
    timeout: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help=(
        "Of each request of the dispatcher."))] = None,
    concurrency_max: Annotated[int | None, typer.Option(help="Requests at a time per dispatcher.")] = None,
    allow_private: Annotated[bool | None, typer.Option("--allow-private/--no-allow-private", help=(
        "Loopback, private and link-local addresses may be called, too."))] = None,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Creates a destination, or changes what is given and keeps the rest. With --file: makes destinations exactly as the file
    has them, defaults included, and says what changed."""
    from spillway.client import NackPolicy

    if nack_policy is not None and nack_policy.upper() not in NackPolicy.__members__:
        raise typer.BadParameter(f"{nack_policy!r} is not block, block_until or skip", param_hint="--nack-policy")
    policy: dict[str, Any] = {
        "run_messages_max": run_messages_max, "lease_seconds": lease_seconds, "backoff_base": backoff_base,
        "backoff_cap": backoff_cap, "nack_policy": NackPolicy[nack_policy.upper()] if nack_policy else None,
        "attempts_max": attempts_max, "age_max": age_max, "ordered": ordered, "ttl": ttl}
    policy = {field: value for field, value in policy.items() if value is not None}
    http: dict[str, Any] = {"timeout": timeout, "concurrency_max": concurrency_max, "allow_private_addresses": allow_private}
    http = {field: value for field, value in http.items() if value is not None}
    if file is not None:
        if name is not None or url is not None or policy or http:
            raise typer.BadParameter("a file says it all: give no name and no options of a policy", param_hint="--file")
        _apply_file(file, dry_run, output, connection)
    if name is None:
        raise typer.BadParameter("give a name, or --file", param_hint="DESTINATION")
    _apply_options(name, policy, url, http, dry_run, output, connection)


def _apply_options(name: str, policy: dict[str, Any], url: str | None, http: dict[str, Any], dry_run: bool, output: Output,
                   connection: Connection) -> None:
    from spillway.client import Destination, DestinationNotFound, HttpTarget, InvalidArgument

    async def apply_one(admin: Admin) -> int:
        try:
            old = await admin.get_destination(name)
        except DestinationNotFound:
            old = Destination(name)
        target = old.http
        if url is not None:
            target = dataclasses.replace(target, url=url) if url and target else HttpTarget(url) if url else None
        if target is None and http:
            raise InvalidArgument(", ".join(_OPTIONS[field] for field in http), "needs a --url")
        if target is not None:
            target = dataclasses.replace(target, **http)
        new = dataclasses.replace(old, policy=dataclasses.replace(old.policy, **policy), http=target)
        print_one(masked(new if dry_run else await admin.update_destination(new, create=True)), output)
        return 0

    run_admin(connection, apply_one)


_OPTIONS = {"timeout": "--timeout", "concurrency_max": "--concurrency-max", "allow_private_addresses": "--allow-private"}


def _apply_file(path: Path, dry_run: bool, output: Output, connection: Connection) -> None:
    from spillway.client import Destination, DestinationNotFound, InvalidArgument
    from spillway.client.policy_file import filled, in_file, load_destinations, other_tables

    async def apply_all(admin: Admin) -> int:
        done = []
        try:
            for where, wanted in load_destinations(path).items():
                old: Destination | None
                try:
                    old = await admin.get_destination(wanted.name)
                except DestinationNotFound:
                    old = None
                before, after = filled(old or Destination(wanted.name)), filled(wanted)
                if not dry_run and (old is None or _changes(before, after)):
                    try:
                        after = filled(await admin.update_destination(
                            dataclasses.replace(wanted, etag=old.etag if old else ""), create=True))
                    except InvalidArgument as error:
                        raise in_file(path, where, error) from None
                done.append(_report(wanted.name, old is None, _changes(before, after), dry_run, output))
        finally:
            if output is Output.JSON:
                print_json(done)
        if other_tables(path, "destination"):
            print(f"{path} has routes, too: spillway route apply -f {path}", file=sys.stderr)
        return 0

    run_admin(connection, apply_all)


def _report(name: str, created: bool, changes: dict[str, tuple[str, str]], dry_run: bool, output: Output) -> dict[str, Any]:
    """Prints what became of one destination; returns it as JSON has it."""
    result = "created" if created else "changed" if changes else "unchanged"
    if output is Output.TABLE:
        would = "would be " if dry_run and result != "unchanged" else ""
        print(f"{name}: {would}{result}", file=sys.stdout)
        for field, (old, new) in changes.items():
            print(f"  {field}: {old or 'none'} -> {new or 'none'}")
    return {"destination": name, "result": result, "dry_run": dry_run,
            "changes": [{"field": field, "old": old, "new": new} for field, (old, new) in changes.items()]}


def _changes(old: Destination, new: Destination) -> dict[str, tuple[str, str]]:
    """field -> (old, new) as people read them, of what differs; the values of secrets are not shown."""
    clear = [flat(masked(one, secrets=True)) for one in (old, new)]
    shown = [flat(masked(one)) for one in (old, new)]
    return {name.removeprefix("policy."): (shown[0].get(name, ""), shown[1].get(name, "")) for name in [*clear[0], *clear[1]]
            if name not in ("name", "etag") and clear[0].get(name, "") != clear[1].get(name, "")}
