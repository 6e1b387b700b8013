"""Messages that could not be delivered: dead-letter list, purge, redrive."""
from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from spillway.client.commands.common import (
    HERE,
    Connection,
    DestinationName,
    DryRun,
    Format,
    KeyName,
    Output,
    TenantName,
    Yes,
    command,
    confirmed,
    plain,
    plural,
    preview,
    print_done,
    print_json,
    print_table,
    run_admin,
    scope,
    when,
    with_payload,
)
from spillway.client.commands.progress import Bar

if TYPE_CHECKING:
    from spillway.client import Admin, DeadLetter

app = typer.Typer(no_args_is_help=True, help="Dead letters: messages that could not be delivered.")


@command(app, "list", aliases=("ls",), examples=(
    "spillway dead-letter list billing",
    "spillway dead-letter list billing acme -n 0 -o json"))
def list_some(
    destination: DestinationName,
    tenant: TenantName = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="At most so many; 0: all.")] = 100,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Lists dead letters, oldest first for each shard."""

    async def show(admin: Admin) -> int:
        found: list[DeadLetter] = []
        more = False
        async for one in admin.list_dead_letters(destination, tenant=tenant):
            if limit and len(found) == limit:
                more = True
                break
            found.append(one)
        if output is Output.JSON:
            print_json([_plain(one) for one in found])
        else:
            print_table(("shard", "sequence", "tenant", "key", "attempts", "dead since", "reason", "payload"), [
                (str(one.shard), str(one.sequence), one.tenant, one.key, str(one.attempts), when(one.dead_time), one.reason,
                 preview(one.payload)) for one in found])
        if more:
            print(f"there are more than {limit}: --limit shows them", file=sys.stderr)
        return 0

    run_admin(connection, show)


@command(app, "purge", examples=(
    "spillway dead-letter purge billing acme --dry-run",
    "spillway dead-letter purge billing --yes"))
def purge(destination: DestinationName, tenant: TenantName = None, yes: Yes = False, dry_run: DryRun = False,
          output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Removes dead letters of a destination or a tenant for good."""

    async def work(admin: Admin) -> int:
        count = await admin.purge_dead_letters(destination, tenant, dry_run=True)
        if not dry_run and count:
            confirmed(f"remove {plural(count, 'dead letter')} of {scope(destination, tenant)} for good?", yes)
            count = await admin.purge_dead_letters(destination, tenant)
        print_done(f"{'would be removed' if dry_run else 'removed'}: {plural(count, 'dead letter')} of "
                   f"{scope(destination, tenant)}", output, dead_letters=count, dry_run=dry_run)
        return 0

    run_admin(connection, work)


@command(app, "redrive", examples=(
    "spillway dead-letter redrive billing --dry-run",
    "spillway dlq redrive billing acme --rate 100"))
def redrive(
    destination: DestinationName,
    tenant: TenantName = None,
    key: KeyName = None,
    rate: Annotated[float, typer.Option(help="At most so many per second; 0.1 to 100,000.")] = 100.0,
    dry_run: DryRun = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Puts dead letters back at the head of their queues, in order. What is back stays so if it is interrupted."""

    async def work(admin: Admin) -> int:
        total = count = 0
        async for step in admin.redrive_dead_letters(destination, tenant, key, messages_per_second=rate, dry_run=True):
            total = count = step.redriven
        if not dry_run:
            count = 0
            try:
                with Bar("putting back", total) as bar:
                    async for step in admin.redrive_dead_letters(destination, tenant, key, messages_per_second=rate):
                        count = step.redriven
                        bar.show(count)
            finally:
                if count < total:
                    print(f"{count} of {plural(total, 'dead letter')} put back", file=sys.stderr)
        print_done(f"{'would be put back' if dry_run else 'put back'}: {plural(count, 'dead letter')} of "
                   f"{scope(destination, tenant, key)}", output, redriven=count, dry_run=dry_run)
        return 0

    run_admin(connection, work)


def _plain(letter: DeadLetter) -> dict[str, Any]:
    out = plain(letter)
    del out["payload"]
    return with_payload(out, letter.payload)
