"""`spillway check`: one look for a monitor, with its exit codes. `judge` is pure."""
from __future__ import annotations

import enum
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from spillway.client.commands.common import (
    HERE,
    Connection,
    command,
    connect,
    now,
    plain,
    print_json,
    print_table,
    run_async,
    seconds,
    span,
)

if TYPE_CHECKING:
    from spillway.client import ClusterStatus, DestinationStats

app = typer.Typer()
ASKED_AT_A_TIME = 16  # destinations: each is a question to every shard
TOLD_MAX = 5  # findings in the line for Nagios


class Form(enum.StrEnum):
    """Who reads it."""

    TABLE = "table"
    TEXT = "text"  # as table
    JSON = "json"
    NAGIOS = "nagios"
    PROMETHEUS = "prometheus"


class Level(enum.IntEnum):
    """How bad it is; also the exit code."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    level: Level
    about: str  # a destination; "" for the cluster
    what: str


@dataclass(frozen=True, slots=True)
class Bounds:
    """From where on something is a warning, and critical. None: never."""

    warning: float | None
    critical: float | None

    def level(self, value: float) -> Level:
        """How bad a value is."""
        if self.critical is not None and value >= self.critical:
            return Level.CRITICAL
        return Level.WARNING if self.warning is not None and value >= self.warning else Level.OK



@command(app, examples=("spillway check", "spillway check --filter 'bill*' --age-warning 2m --age-critical 10m --format nagios",
                        "spillway check --backlog-critical 100000 --dead-warning 1000 --format prometheus > check.prom"))
def check(
    filter_: Annotated[str, typer.Option("--filter", metavar="PATTERN", help=(
        "Only destinations of such names; * stands for anything."))] = "*",
    age_warning: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help=(
        "Age of a destination's oldest message: 5m, 1h, or seconds."))] = None,
    age_critical: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help="The same, critical.")] = None,
    backlog_warning: Annotated[int | None, typer.Option(min=1, metavar="N", help="Messages of a destination.")] = None,
    backlog_critical: Annotated[int | None, typer.Option(min=1, metavar="N", help="The same, critical.")] = None,
    dead_warning: Annotated[int | None, typer.Option(min=1, metavar="N", help="Dead letters of a destination.")] = None,
    dead_critical: Annotated[int | None, typer.Option(min=1, metavar="N", help="The same, critical.")] = None,
    output: Annotated[Form, typer.Option("--output", "--format", "-o", help="Who reads it.")] = Form.TABLE,
    connection: Connection = HERE,
) -> None:
    """Looks at the cluster and its destinations once, for a monitor. Exit code 0: all is well, 1: a warning, 2: critical, 3: it cannot be
    told. A shard without a leader is critical, whatever else is wrong with the cluster a warning."""
    bounds = {"age": Bounds(age_warning, age_critical), "backlog": Bounds(backlog_warning, backlog_critical),
              "dead": Bounds(dead_warning, dead_critical)}

    async def look() -> int:
        from spillway.client import SpillwayError

        stats: dict[str, DestinationStats] = {}
        try:
            async with connect(connection) as client:
                status = await client.cluster.status()
                stats = await _stats(client.admin, filter_)
        except SpillwayError as error:
            findings = [Finding(Level.UNKNOWN, "", str(error))]
        else:
            findings = judge(status, stats, bounds, datetime.now(UTC))
        _print(findings, stats, bounds, output)
        return worst(findings)

    run_async(look)


async def _stats(admin: Any, pattern: str) -> dict[str, DestinationStats]:
    import asyncio

    from spillway.client import DestinationNotFound

    room = asyncio.Semaphore(ASKED_AT_A_TIME)
    found: dict[str, DestinationStats] = {}

    async def ask(name: str) -> None:
        async with room:
            try:
                found[name] = await admin.destination_stats(name)
            except DestinationNotFound:  # it was deleted just now
                pass

    names = [one.name async for one in admin.list_destinations() if fnmatch.fnmatchcase(one.name, pattern)]
    await asyncio.gather(*map(ask, names))
    return {name: found[name] for name in names if name in found}


def judge(status: ClusterStatus, stats: Mapping[str, DestinationStats], bounds: Mapping[str, Bounds], today: datetime) -> list[Finding]:
    """What is not as it should be, the worst first."""
    found = [Finding(Level.CRITICAL, "", f"{f'shard {group.group}' if group.group else 'the meta group'} has no leader")
             for group in status.groups if not group.leader]
    found += [Finding(Level.WARNING, "", f"{one.what}; {one.remedy}") for one in status.problems]
    for name, one in stats.items():
        if one.shards_missing:
            found.append(Finding(Level.UNKNOWN, name, f"shards {', '.join(map(str, one.shards_missing))} did not answer"))
        for kind, value in values(one, today).items():
            level = bounds[kind].level(value)
            if level is not Level.OK:
                told = {"age": f"its oldest message is {span(value)} old", "backlog": f"{value:,.0f} messages wait",
                        "dead": f"{value:,.0f} dead letters"}[kind]
                found.append(Finding(level, name, told))
    order = (Level.CRITICAL, Level.UNKNOWN, Level.WARNING)
    return sorted(found, key=lambda one: order.index(one.level))


def values(stats: DestinationStats, today: datetime) -> dict[str, float]:
    """What is compared with bounds: seconds and counts."""
    oldest = stats.oldest_enqueue_time
    age = 0.0 if oldest is None else max((today - oldest).total_seconds(), 0.0)
    return {"age": age, "backlog": stats.messages, "dead": stats.dead_letters}


def worst(findings: Sequence[Finding]) -> Level:
    """The exit code: of the first, as they are sorted."""
    return findings[0].level if findings else Level.OK


def _print(findings: Sequence[Finding], stats: Mapping[str, DestinationStats], bounds: Mapping[str, Bounds], output: Form) -> None:
    level, today = worst(findings), datetime.now(UTC)
    measured = {name: values(one, today) for name, one in stats.items()}
    if output is Form.JSON:
        print_json({"time": now(), "status": level.name.lower(), "findings": plain(findings), "destinations": {
            name: {"oldest_age": round(one["age"], 3), "messages": one["backlog"], "dead_letters": one["dead"]}
            for name, one in measured.items()}})
    elif output is Form.NAGIOS:
        print(nagios(findings, measured, bounds))
    elif output is Form.PROMETHEUS:
        print(prometheus(level, measured), end="")
    else:
        print(f"{level.name.lower()}: {len(measured)} destinations looked at, {len(findings)} findings")
        if findings:
            print_table(("level", "destination", "what"), [(one.level.name.lower(), one.about, one.what) for one in findings])


def nagios(findings: Sequence[Finding], measured: Mapping[str, Mapping[str, float]], bounds: Mapping[str, Bounds]) -> str:
    """One line as plugins of Nagios print it: status, what is wrong, and numbers behind a bar: the largest of all destinations."""
    told = [f"{one.about}: {one.what}" if one.about else one.what for one in findings[:TOLD_MAX]]
    if len(findings) > TOLD_MAX:
        told.append(f"{len(findings) - TOLD_MAX} more")
    text = "; ".join(told) or f"{len(measured)} destinations"
    numbers = []
    for kind, unit in (("age", "s"), ("backlog", ""), ("dead", "")):
        value = max((one[kind] for one in measured.values()), default=0)
        edges = ";".join("" if edge is None else f"{edge:g}" for edge in (bounds[kind].warning, bounds[kind].critical))
        numbers.append(f"{kind}_max={value:.0f}{unit};{edges};0")
    return f"SPILLWAY {worst(findings).name} - {text.replace('|', '/')} | {' '.join(numbers)}"


def prometheus(level: Level, measured: Mapping[str, Mapping[str, float]]) -> str:
    """For the textfile collector of node_exporter."""
    lines = ["# HELP spillway_check_status 0 all is well, 1 a warning, 2 critical, 3 it cannot be told.",
             "# TYPE spillway_check_status gauge", f"spillway_check_status {int(level)}"]
    for kind, name, help_ in (("age", "oldest_age_seconds", "Age of the oldest message."),
                              ("backlog", "messages", "Messages waiting or leased."), ("dead", "dead_letters", "Dead letters stored.")):
        lines += [f"# HELP spillway_check_{name} {help_}", f"# TYPE spillway_check_{name} gauge"]
        for destination, one in measured.items():
            quoted = destination.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            lines.append(f'spillway_check_{name}{{destination="{quoted}"}} {one[kind]:.3f}'.rstrip("0").rstrip("."))
    return "\n".join(lines) + "\n"
