"""What operators do to deliveries: gates, pause, resume, park, unpark, explain, peek, purge."""
from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

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
    seconds,
    when,
    with_payload,
)

if TYPE_CHECKING:
    from spillway.client import Admin

ParkFor = Annotated[float, typer.Option("--for", parser=seconds, metavar="DURATION", help=(
    "For how long: 30s, 10m, 1h30m, or seconds; up to 7d."))]
Reason = Annotated[str, typer.Option(help="Why, for people; up to 1024 bytes.")]


app = typer.Typer()


@command(app, examples=("spillway gates billing",))
def gates(destination: DestinationName, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Lists what is paused or parked in a destination: its own gate first, then by tenant."""

    async def show(admin: Admin) -> int:
        found = [one async for one in admin.list_gates(destination)]
        if output is Output.JSON:
            print_json(plain(found))
        elif not found:
            print(f"nothing of {scope(destination)} is paused or parked")
        else:
            print_table(("tenant", "cause", "until", "failures", "reason"), [
                ("(all)" if one.tenant is None else one.tenant or "''", one.cause.name.lower(), when(one.until_time, "resumed"),
                 str(one.step or ""), one.reason) for one in found])
        return 0

    run_admin(connection, show)


@command(app, examples=("spillway pause billing --reason maintenance", "spillway pause billing acme"))
def pause(destination: DestinationName, tenant: TenantName = None, reason: Reason = "", output: Format = Output.TABLE,
          connection: Connection = HERE) -> None:
    """Stops deliveries of a destination or a tenant until resumed. Leases that are out run on; producing goes on."""

    async def work(admin: Admin) -> int:
        await admin.pause(destination, tenant, reason=reason)
        print_done(f"paused {scope(destination, tenant)}", output, destination=destination, tenant=tenant, state="paused")
        return 0

    run_admin(connection, work)


@command(app, examples=("spillway resume billing", "spillway resume billing acme"))
def resume(destination: DestinationName, tenant: TenantName = None, output: Format = Output.TABLE,
           connection: Connection = HERE) -> None:
    """Undoes pause. Succeeds if nothing was paused."""

    async def work(admin: Admin) -> int:
        await admin.resume(destination, tenant)
        print_done(f"resumed {scope(destination, tenant)}", output, destination=destination, tenant=tenant, state="resumed")
        return 0

    run_admin(connection, work)


@command(app, examples=("spillway park billing acme --for 10m --reason 'too loud'",))
def park(
    destination: DestinationName,
    tenant: TenantName = None,
    duration: ParkFor = 600.0,
    reason: Reason = "",
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """As pause, for a time."""

    async def work(admin: Admin) -> int:
        await admin.park(destination, tenant, seconds=duration, reason=reason)
        print_done(f"parked {scope(destination, tenant)} for {duration:g} s", output, destination=destination, tenant=tenant,
                   state="parked", seconds=duration)
        return 0

    run_admin(connection, work)


@command(app, examples=("spillway unpark billing acme",))
def unpark(destination: DestinationName, tenant: TenantName = None, output: Format = Output.TABLE,
           connection: Connection = HERE) -> None:
    """Ends a parking at once, an operator's or one after failures. A pause stays."""

    async def work(admin: Admin) -> int:
        await admin.unpark(destination, tenant)
        print_done(f"unparked {scope(destination, tenant)}", output, destination=destination, tenant=tenant, state="unparked")
        return 0

    run_admin(connection, work)


@command(app, examples=("spillway explain billing", "spillway explain billing acme user-1", "spillway explain billing acme -o json"))
def explain(destination: DestinationName, tenant: TenantName = None, key: KeyName = None, output: Format = Output.TABLE,
            connection: Connection = HERE) -> None:
    """Says why a queue, a tenant or a destination is not moving, and when it will have drained."""

    async def show(admin: Admin) -> int:
        found = await admin.explain(destination, tenant, key)
        if output is Output.JSON:
            print_json(plain(found))
        else:
            print(found.sentence)
        return 0

    run_admin(connection, show)


@command(app, examples=("spillway peek billing acme user-1", "spillway peek billing acme user-1 -n 2 -o json"))
def peek(
    destination: DestinationName,
    tenant: Annotated[str, typer.Argument(help="The queue's tenant; '' is the one without a name.")],
    key: Annotated[str, typer.Argument(help="The queue's key.")],
    limit: Annotated[int, typer.Option("--limit", "-n", help="At most so many messages; 1 to 100.")] = 10,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Shows the first messages of a queue, without taking them."""

    async def show(admin: Admin) -> int:
        found = await admin.peek(destination, tenant, key, limit)
        if output is Output.JSON:
            shown = []
            for one in found.messages:
                message = plain(one)
                shown.append(with_payload({name: message[name] for name in message if name != "payload"}, one.payload))
            print_json({"messages": shown, "total": found.total})
        else:
            print_table(("sequence", "enqueued", "not before", "failed", "leased", "id", "payload"), [
                (str(one.sequence), when(one.enqueue_time), when(one.deliver_time), str(one.attempts or ""),
                 "yes" if one.leased else "", one.id, preview(one.payload)) for one in found.messages])
            print(f"{len(found.messages)} of {plural(found.total, 'message')}", file=sys.stderr)
        return 0

    run_admin(connection, show)


@command(app, examples=("spillway purge billing acme user-1 --dry-run", "spillway purge billing acme --yes"))
def purge(destination: DestinationName, tenant: TenantName = None, key: KeyName = None, yes: Yes = False, dry_run: DryRun = False,
          output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Removes the messages of a destination, a tenant or a queue for good. Dead letters stay."""

    async def work(admin: Admin) -> int:
        found = await admin.purge(destination, tenant, key, dry_run=True)
        what = f"{plural(found.messages, 'message')} of {plural(found.queues, 'queue')} of {scope(destination, tenant, key)}"
        if not dry_run and found.messages:
            confirmed(f"remove {what} for good?", yes)
            found = await admin.purge(destination, tenant, key)
            what = f"{plural(found.messages, 'message')} of {plural(found.queues, 'queue')} of {scope(destination, tenant, key)}"
        print_done(f"{'would be removed' if dry_run else 'removed'}: {what}", output, messages=found.messages,
                   queues=found.queues, dry_run=dry_run)
        return 0

    run_admin(connection, work)
