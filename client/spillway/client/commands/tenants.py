"""Tenants of a destination: tenant list, show, limits, pause, resume, park, unpark."""
from __future__ import annotations

import dataclasses
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from spillway.client.cli import EXIT_UNAVAILABLE
from spillway.client.commands import operations
from spillway.client.commands.common import (
    HERE,
    Connection,
    DestinationName,
    DryRun,
    Format,
    Output,
    command,
    flat,
    plain,
    print_json,
    print_one,
    print_table,
    run_admin,
    scope,
    seconds,
    size,
    size_of,
    when,
)

if TYPE_CHECKING:
    from spillway.client import Admin, Destination, Explanation, Gate, TenantPolicy, TenantStats

app = typer.Typer(no_args_is_help=True, help="Tenants of a destination: backlog, gates and limits of their own.")
Tenant = Annotated[str, typer.Argument(help="The tenant; '' is the one without a name.", metavar="TENANT")]
CONFLICTS_MAX = 5  # others that change the destination while one changes it; then they are told


@command(app, "list", aliases=("ls",), examples=("spillway tenant list billing", "spillway tenant list billing -n 3 -o json"))
def list_some(
    destination: DestinationName,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most so many of those with messages; 1 to 1000.")] = 100,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Lists tenants: those with the most messages, and all that are paused, parked or have a policy of their own. Exit code 4 if shards
    did not answer."""

    async def show(admin: Admin) -> int:
        policies = (await admin.get_destination(destination)).policy.tenants
        gates = {gate.tenant: gate async for gate in admin.list_gates(destination) if gate.tenant is not None}
        found = await admin.top_tenants(destination, limit)
        counts = {one.tenant: one for one in found.tenants}
        names = [*counts, *sorted({*policies, *gates} - counts.keys())]
        rows = [_row(name, counts.get(name), gates.get(name), policies.get(name)) for name in names]
        if output is Output.JSON:
            print_json({"tenants": rows, "shards_missing": list(found.shards_missing)})
        else:
            print_table(("tenant", "messages", "bytes", "gate", "weight", "messages/s", "leases", "may keep"), [
                (row["tenant"] or "''", str(row["messages"]), size(row["message_bytes"]), _gate(gates.get(row["tenant"])),
                 *_policy(policies.get(row["tenant"]))) for row in rows])
        if found.shards_missing:
            print(f"spillway: incomplete: shards {', '.join(map(str, found.shards_missing))} did not answer", file=sys.stderr)
        return EXIT_UNAVAILABLE if found.shards_missing else 0

    run_admin(connection, show)


@command(app, "show", examples=("spillway tenant show billing acme",))
def show_one(destination: DestinationName, tenant: Tenant, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Shows one tenant: what waits, why it is not moving, its gate and its policy."""

    async def show(admin: Admin) -> int:
        policy = (await admin.get_destination(destination)).policy.tenants.get(tenant)
        gate = None
        async for one in admin.list_gates(destination):
            gate = one if one.tenant == tenant else gate
        told: Explanation = await admin.explain(destination, tenant)
        print_one({"destination": destination, "tenant": tenant, "messages": told.messages, "cause": plain(told.cause),
                   "explanation": told.sentence, "drain_time": plain(told.drain_time), "gate": plain(gate),
                   "policy": plain(policy)}, output)
        return 0

    run_admin(connection, show)


@command(app, "limits", examples=("spillway tenant limits billing acme --rate 50 --leases-max 4",
                                  "spillway tenant limits billing acme --weight 2 --bytes-max 100MiB",
                                  "spillway tenant limits billing acme",
                                  "spillway tenant limits billing acme --clear"))
def limits(
    destination: DestinationName,
    tenant: Tenant,
    rate: Annotated[float | None, typer.Option(metavar="N", help="Deliveries per second, on average; 0.01 to 1,000,000.")] = None,
    burst: Annotated[int | None, typer.Option(metavar="N", help="Deliveries at once after a rest.")] = None,
    leases_max: Annotated[int | None, typer.Option(metavar="N", help="Leases at a time.")] = None,
    bytes_max: Annotated[int | None, typer.Option(parser=size_of, metavar="SIZE", help=(
        "What it may keep waiting: 10MiB, 1GB, or bytes; beyond it Produce is refused."))] = None,
    age_max: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help=(
        "Age of its oldest message, beyond which Produce is refused."))] = None,
    weight: Annotated[float | None, typer.Option(metavar="N", help="Its share of the destination; 0.01 to 100, 1 is usual.")] = None,
    unlimited: Annotated[bool, typer.Option("--unlimited", help=(
        "No limits, whatever the destination's policy says of each tenant."))] = False,
    clear: Annotated[bool, typer.Option("--clear", help="As every other tenant again.")] = False,
    dry_run: DryRun = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Shows or changes what a tenant may do that differs from the others; what is not given stays."""
    from spillway.client import Conflict, Limit, Retention
    from spillway.client import TenantPolicy as Policy

    rates = _given(messages_per_second=rate, burst=burst, leases_max=leases_max)
    budget = _given(bytes_max=bytes_max, age_max=age_max)
    if sum((bool(rates or budget or weight is not None), unlimited, clear)) > 1:
        raise typer.BadParameter("give limits, or --unlimited, or --clear", param_hint="--unlimited" if unlimited else "--clear")

    def changed(old: TenantPolicy | None) -> TenantPolicy | None:
        if clear:
            return None
        if unlimited:
            return dataclasses.replace(old or Policy(), limit=Limit(), retention=Retention())
        new = old or Policy()
        if rates:
            new = dataclasses.replace(new, limit=dataclasses.replace(new.limit or Limit(), **rates))
        if budget:
            new = dataclasses.replace(new, retention=dataclasses.replace(new.retention or Retention(), **budget))
        return new if weight is None else dataclasses.replace(new, weight=weight)

    async def change(admin: Admin) -> int:
        for attempt in range(CONFLICTS_MAX):
            found: Destination = await admin.get_destination(destination)
            tenants = dict(found.policy.tenants)
            old = tenants.pop(tenant, None)
            asked = bool(rates or budget or weight is not None or unlimited or clear)
            new = changed(old) if asked else old
            if new is not None:
                tenants[tenant] = new
            if asked and not dry_run:
                wanted = dataclasses.replace(found, policy=dataclasses.replace(found.policy, tenants=tenants))
                try:
                    new = (await admin.update_destination(wanted)).policy.tenants.get(tenant)
                except Conflict:
                    if attempt + 1 == CONFLICTS_MAX:
                        raise
                    continue
            _print_limits(destination, tenant, new, output)
            return 0
        raise AssertionError

    run_admin(connection, change)


def _print_limits(destination: str, tenant: str, policy: TenantPolicy | None, output: Output) -> None:
    if output is Output.JSON:
        print_json({"destination": destination, "tenant": tenant, "policy": plain(policy)})
    elif policy is None:
        print(f"{scope(destination, tenant)}: as every other tenant")
    else:
        shown = plain(policy)
        for part in ("limit", "retention"):
            if shown[part] is not None:  # what it does not say is unlimited there, and as the others' where it is missing
                shown[part] = {name: "unlimited" if value is None else value for name, value in shown[part].items()
                               if name != "burst" or value is not None}
        print_table(("field", "value"), [(name, value or "as the others") for name, value in flat(shown).items()])


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@command(app, "pause", examples=("spillway tenant pause billing acme --reason 'asked for it'",))
def pause(destination: DestinationName, tenant: Tenant, reason: operations.Reason = "", output: Format = Output.TABLE,
          connection: Connection = HERE) -> None:
    """Stops deliveries of a tenant until resumed. Leases that are out run on; producing goes on."""
    operations.pause(destination, tenant, reason, output, connection)


@command(app, "resume", examples=("spillway tenant resume billing acme",))
def resume(destination: DestinationName, tenant: Tenant, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Undoes pause. Succeeds if nothing was paused."""
    operations.resume(destination, tenant, output, connection)


@command(app, "park", examples=("spillway tenant park billing acme --for 10m",))
def park(destination: DestinationName, tenant: Tenant, duration: operations.ParkFor = 600.0, reason: operations.Reason = "",
         output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """As pause, for a time."""
    operations.park(destination, tenant, duration, reason, output, connection)


@command(app, "unpark", examples=("spillway tenant unpark billing acme",))
def unpark(destination: DestinationName, tenant: Tenant, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Ends a parking at once, an operator's or one after failures. A pause stays."""
    operations.unpark(destination, tenant, output, connection)


def _row(name: str, counts: TenantStats | None, gate: Gate | None, policy: TenantPolicy | None) -> dict[str, Any]:
    """A tenant as JSON has it."""
    return {"tenant": name, "messages": counts.messages if counts else 0, "message_bytes": counts.message_bytes if counts else 0,
            "gate": None if gate is None else {key: value for key, value in plain(gate).items() if key != "tenant"},
            "policy": plain(policy)}


def _gate(gate: Gate | None) -> str:
    """How a gate is told in a table."""
    if gate is None:
        return ""
    until: datetime | None = gate.until_time
    return gate.cause.name.lower() + (f" until {when(until)}" if until else "")


def _policy(policy: TenantPolicy | None) -> tuple[str, str, str, str]:
    """Weight, rate, leases and budget in a table; blank: as the others."""
    if policy is None:
        return ("", "", "", "")

    limit, kept = plain(policy.limit), plain(policy.retention)

    def of(part: dict[str, Any] | None, name: str) -> str:
        return "" if part is None else "unlimited" if part[name] is None else f"{part[name]:g}"

    kept_text = size(kept["bytes_max"]) if kept and kept["bytes_max"] is not None else of(kept, "bytes_max")
    return (f"{policy.weight:g}" if policy.weight is not None else "", of(limit, "messages_per_second"), of(limit, "leases_max"), kept_text)
