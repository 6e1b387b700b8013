"""Who may do what: token create, list, revoke."""
from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from spillway.client.commands.common import (
    HERE,
    Connection,
    Format,
    Output,
    Yes,
    command,
    confirmed,
    plain,
    print_done,
    print_json,
    print_table,
    run_admin,
    seconds,
    when,
)

if TYPE_CHECKING:
    from spillway.client import Admin, Token

app = typer.Typer(no_args_is_help=True, help="Tokens of clients: what they may do. docs/security.md has the whole story.")
PATTERN = "PATTERN"


@command(app, "create", examples=("spillway token create ci --produce 'billing-*' --expires 90d",
                                  "spillway token create crm-worker --lease crm > crm.token",
                                  "spillway token create acme --produce '*' --admin crm --tenant acme --messages-per-second 500"))
def create(
    name: Annotated[str, typer.Argument(help="What it is for, for people.")] = "",
    produce: Annotated[list[str] | None, typer.Option("--produce", metavar=PATTERN, help=(
        "May produce to this destination; '*' stands for any run of characters. May be repeated, as --lease and --admin."))] = None,
    lease: Annotated[list[str] | None, typer.Option("--lease", metavar=PATTERN, help="May lease from this destination.")] = None,
    admin: Annotated[list[str] | None, typer.Option("--admin", metavar=PATTERN, help=(
        "May administer this destination; '*' is everything: nodes, backups and tokens, too."))] = None,
    tenant: Annotated[list[str] | None, typer.Option("--tenant", metavar=PATTERN, help=(
        "Only for this tenant, of --produce and --admin. May be repeated."))] = None,
    expires: Annotated[float | None, typer.Option("--expires", parser=seconds, metavar="DURATION", help=(
        "How long it is valid: 12h, 90d. Without it: until it is revoked."))] = None,
    streams_max: Annotated[int, typer.Option(min=0, help="Open streams with it at one node; 0: no limit of its own.")] = 0,
    messages_per_second: Annotated[int, typer.Option(min=0, help="Produced with it at one node; 0: no limit of its own.")] = 0,
    bytes_in_flight_max: Annotated[int, typer.Option(min=0, help="Of requests that are not answered, at one node; 0: no limit.")] = 0,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Makes a token, and prints it: that is the only time. What goes to standard output is the token alone."""
    from spillway.client import TokenScope

    scopes = [TokenScope("lease", pattern) for pattern in lease or ()]
    for action, patterns in (("produce", produce), ("admin", admin)):
        for pattern in patterns or ():
            scopes += [TokenScope(action, pattern, one) for one in tenant or ("*",)]
    if not scopes:
        raise typer.BadParameter("say what it may do: --produce, --lease or --admin with a destination, or '*'")
    if tenant and not (produce or admin):
        raise typer.BadParameter("--tenant is of --produce and --admin; who leases gets messages of all tenants")

    async def work(client: Admin) -> int:
        token, secret = await client.create_token(name, scopes, ttl=expires, streams_max=streams_max,
                                                  messages_per_second=messages_per_second, bytes_in_flight_max=bytes_in_flight_max)
        if output is Output.JSON:
            print_json({**plain(token), "secret": secret})
        else:
            typer.echo(f"token {token.token_id}: {_scopes(token)}; it is not shown again:", err=True)
            print(secret)
        return 0

    run_admin(connection, work)


@command(app, "list", aliases=("ls",), examples=("spillway token list", "spillway token list -o json"))
def list_all(output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Lists all tokens, without what is secret in them."""

    async def show(admin: Admin) -> int:
        found = [one async for one in admin.list_tokens()]
        if output is Output.JSON:
            print_json(plain(found))
        else:
            print_table(("id", "name", "created", "expires", "may"), [
                (t.token_id, t.name, when(t.create_time), when(t.expire_time, "never"), _scopes(t)) for t in found])
        return 0

    run_admin(connection, show)


@command(app, "revoke", examples=("spillway token revoke 8f3b2c1d9a7e --yes",))
def revoke(
    token_id: Annotated[str, typer.Argument(help="Its id, as list shows it.", metavar="ID")],
    yes: Yes = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Ends a token for good, with the streams that were opened with it, on every node."""
    confirmed(f"Revoke the token {token_id} for good?", yes)

    async def work(admin: Admin) -> int:
        await admin.revoke_token(token_id)
        print_done(f"token {token_id} is revoked", output, token_id=token_id, state="revoked")
        return 0

    run_admin(connection, work)


def _scopes(token: Token) -> str:
    return ", ".join(f"{s.action} {s.destinations}" + ("" if s.tenants == "*" else f" of {s.tenants!r}") for s in token.scopes)
