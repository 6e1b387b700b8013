"""Copies of messages for several destinations: route list, show, create, apply, delete."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from spillway.client.commands.common import (
    HERE,
    Connection,
    DryRun,
    Format,
    Output,
    command,
    plain,
    print_done,
    print_json,
    print_table,
    run_admin,
)

if TYPE_CHECKING:
    from spillway.client import Admin, Route

app = typer.Typer(no_args_is_help=True, help="Routes: copies of messages for several destinations.")
Source = Annotated[str, typer.Argument(help="The name that producers use.")]


@command(app, "list", aliases=("ls",), examples=("spillway route list",))
def list_all(output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Lists all routes, by source."""

    async def show(admin: Admin) -> int:
        found = [one async for one in admin.list_routes()]
        if output is Output.JSON:
            print_json(plain(found))
        else:
            _print(found)
        return 0

    run_admin(connection, show)


@command(app, "show", examples=("spillway route show events",))
def show_one(source: Source, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Shows one route."""

    async def show(admin: Admin) -> int:
        _print_one(await admin.get_route(source), output)
        return 0

    run_admin(connection, show)


@command(app, "create", examples=(
    "spillway route create orders billing",
    'spillway route create pages billing crm --filter \'headers["kind"] == "page"\''))
def create(
    source: Source,
    target: Annotated[list[str], typer.Argument(help="Destinations, or sources of other routes, that get a copy.")],
    filter_: Annotated[str, typer.Option("--filter", metavar="CEL", help=(
        "Which messages, for all targets; e.g. headers[\"kind\"] == \"order\". A file has one for each."))] = "",
    skip_over_budget: Annotated[bool, typer.Option("--skip-over-budget", help=(
        "Leave out a target that is over its budget, instead of refusing the message."))] = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Creates a route. Fails if the source has one."""
    from spillway.client import Route, RouteTarget

    async def work(admin: Admin) -> int:
        route = Route(source, tuple(RouteTarget(name, filter_, skip_over_budget) for name in target))
        _print_one(await admin.create_route(route), output)
        return 0

    run_admin(connection, work)


@command(app, "apply", examples=(
    "spillway route apply -f policy.toml --dry-run",
    "spillway route apply -f policy.toml"))
def apply(
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE.toml", help="Routes; see docs/policies.md.")],
    dry_run: DryRun = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Makes routes exactly as a file has them, and says what changed. Routes that are not in it stay."""
    from spillway.client import InvalidArgument, RouteNotFound
    from spillway.client.policy_file import in_file, load_routes

    async def work(admin: Admin) -> int:
        done = []
        try:
            for where, wanted in load_routes(file).items():
                old: Route | None
                try:
                    old = await admin.get_route(wanted.source)
                except RouteNotFound:
                    old = None
                result = "created" if old is None else "unchanged" if old.targets == wanted.targets else "changed"
                if not dry_run and result != "unchanged":
                    try:
                        await admin.update_route(dataclasses.replace(wanted, etag=old.etag if old else ""), create=True)
                    except InvalidArgument as error:
                        raise in_file(file, where, error) from None
                done.append({"source": wanted.source, "result": result, "dry_run": dry_run})
                if output is Output.TABLE:
                    print(f"{wanted.source}: {'would be ' if dry_run and result != 'unchanged' else ''}{result}")
                    if result != "unchanged":
                        _print([wanted])
        finally:
            if output is Output.JSON:
                print_json(done)
        return 0

    run_admin(connection, work)


@command(app, "delete", examples=("spillway route delete orders",))
def delete(source: Source, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Removes a route. Copies that were promised are still made."""

    async def work(admin: Admin) -> int:
        await admin.delete_route(source)
        print_done(f"deleted the route of {source!r}", output, source=source, state="deleted")
        return 0

    run_admin(connection, work)


def _print_one(route: Route, output: Output) -> None:
    if output is Output.JSON:
        print_json(plain(route))
    else:
        _print([route])


def _print(routes: list[Route]) -> None:
    print_table(("source", "target", "filter", "over budget"), [
        (route.source, target.destination, target.filter, "skip" if target.skip_over_budget else "refuse")
        for route in routes for target in route.targets])
