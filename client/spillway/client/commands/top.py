"""`spillway top`: what goes on, worst first; on a terminal again and again, with a way into the tenants of a destination.

`Watch` asks, `ranked` and the `_rows` are pure, `_live` draws and reads keys.
"""
from __future__ import annotations

import enum
import fnmatch
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from spillway.client.cli import EXIT_UNAVAILABLE
from spillway.client.commands.common import (
    HERE,
    Connection,
    Stream,
    StreamFormat,
    command,
    now,
    plain,
    plural,
    print_json,
    print_line,
    print_table,
    run_admin,
    seconds,
    size,
    span,
    table,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from spillway.client import Admin, DestinationStats, Gate, TopTenants

app = typer.Typer()
ASKED_AT_A_TIME = 16  # destinations: each is a question to every shard
INTERVAL_MIN = 0.2  # seconds


class Sort(enum.StrEnum):
    """What comes first."""

    AGE = "age"
    BACKLOG = "backlog"
    RATE = "rate"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class Row:
    """One destination."""

    name: str
    state: str
    messages: int
    message_bytes: int
    in_per_second: float | None = None  # enqueued; None: not known, at a first look
    out_per_second: float | None = None  # acknowledged
    leased: int = 0
    oldest_age: float | None = None  # seconds, of the oldest message; None: there is none, or it is not known
    dead_letters: int = 0
    consumers: int = 0


@dataclass(frozen=True, slots=True)
class TenantRow:
    """One tenant of a destination."""

    name: str
    gate: str
    messages: int
    message_bytes: int
    grows_per_second: float | None  # messages; below 0: they get fewer; None: not known, at a first look


@command(app, examples=("spillway top", "spillway top --once --sort backlog", "spillway top --filter 'crm*' --once -o json",
                        "spillway top billing --once"))
def top(
    destination: Annotated[str | None, typer.Argument(help="Only the tenants of this one.", metavar="[DESTINATION]",
                                                      show_default=False)] = None,
    interval: Annotated[float, typer.Option(parser=seconds, metavar="DURATION", help="Between two looks; 200ms at least.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help=(
        "Print it once, as where there is no terminal. Rates are those of one interval."))] = False,
    sort: Annotated[Sort, typer.Option("--sort", "-s", help="What comes first.")] = Sort.AGE,
    filter_: Annotated[str, typer.Option("--filter", metavar="PATTERN", help=(
        "Only destinations of such names; * stands for anything."))] = "*",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most so many; 1 to 1000.")] = 20,
    output: StreamFormat = Stream.TABLE,
    connection: Connection = HERE,
) -> None:
    """Shows destinations, those whose messages wait longest first, or tenants, those with the most messages first. On a terminal it goes
    on, and keys do more: arrows and Enter look into a destination, s sorts, q quits. Exit code 4 if shards did not answer."""
    from spillway.client.commands.live import is_terminal

    interval = max(interval, INTERVAL_MIN)

    async def show(admin: Admin) -> int:
        watch = Watch(admin, filter_)
        if output is Stream.JSONL and not once:
            return await _lines(watch, destination, interval, sort, limit)
        if output is Stream.TABLE and not once and is_terminal():
            return await _live(watch, destination, interval, sort, limit)
        return await _once(watch, destination, interval, sort, limit, output)

    run_admin(connection, show)


# -- asking ------------------------------------------------------------------------------------------------------


class Watch:
    """Looks at destinations again and again, and tells what changed in between."""

    def __init__(self, admin: Admin, pattern: str = "*") -> None:
        self._admin = admin
        self._pattern = pattern
        self._before: dict[str, tuple[float, DestinationStats]] = {}
        self._tenants_before: dict[str, dict[str, tuple[float, int]]] = {}
        self.shards_missing: set[int] = set()

    async def destinations(self) -> list[Row]:
        """All of them, in no order."""
        import asyncio

        from spillway.client import DestinationNotFound

        names = [one.name async for one in self._admin.list_destinations() if fnmatch.fnmatchcase(one.name, self._pattern)]
        room = asyncio.Semaphore(ASKED_AT_A_TIME)
        self.shards_missing.clear()

        async def ask(name: str) -> Row | None:
            async with room:
                try:
                    stats = await self._admin.destination_stats(name)
                except DestinationNotFound:  # it was deleted just now
                    return None
            self.shards_missing.update(stats.shards_missing)
            moment = time.monotonic()
            before, self._before[name] = self._before.get(name), (moment, stats)
            return destination_row(name, stats, before, moment, datetime.now(UTC))

        rows = [row for row in await asyncio.gather(*map(ask, names)) if row is not None]
        self._before = {name: self._before[name] for name in names if name in self._before}
        return rows

    async def tenants(self, destination: str, limit: int) -> tuple[list[TenantRow], TopTenants]:
        """Those of one destination with the most messages."""
        found = await self._admin.top_tenants(destination, limit)
        gates = {gate.tenant: gate async for gate in self._admin.list_gates(destination)}
        self.shards_missing = set(found.shards_missing)
        moment = time.monotonic()
        before = self._tenants_before.get(destination, {})
        self._tenants_before = {destination: {one.tenant: (moment, one.messages) for one in found.tenants}}
        rows = []
        for one in found.tenants:
            grows = None
            if one.tenant in before:
                then, messages = before[one.tenant]
                grows = (one.messages - messages) / max(moment - then, 1e-9)
            rows.append(TenantRow(one.tenant, _gate(gates.get(one.tenant) or gates.get(None)), one.messages, one.message_bytes, grows))
        return rows, found


def destination_row(name: str, stats: DestinationStats, before: tuple[float, DestinationStats] | None, moment: float,
                    today: datetime) -> Row:
    """One destination, from its counts now and at `before`; times of `before` and `moment` in seconds."""
    came = went = None
    if before is not None:
        then, old = before
        length = max(moment - then, 1e-9)
        came = max(stats.enqueued_total - old.enqueued_total, 0) / length  # totals shrink when shards do not answer
        went = max(stats.acked_total - old.acked_total, 0) / length
    age = None if stats.oldest_enqueue_time is None else max((today - stats.oldest_enqueue_time).total_seconds(), 0.0)
    return Row(name, _state(stats, went if went is not None else stats.acked_per_second, today), stats.messages, stats.message_bytes, came,
               went, stats.leased, age, stats.dead_letters, stats.consumers)


def _state(stats: DestinationStats, rate: float, today: datetime) -> str:
    if stats.paused:
        return "paused"
    if stats.parked_until_time is not None and stats.parked_until_time > today:
        return f"parked {span((stats.parked_until_time - today).total_seconds())}"
    if not stats.messages:
        return "empty"
    if not stats.consumers:
        return "no consumer"
    gated = f", {plural(stats.parked_tenants, 'tenant')} gated" if stats.parked_tenants else ""
    return ("moving" if rate or stats.leased else "waiting") + gated


def _gate(gate: Gate | None) -> str:
    if gate is None:
        return ""
    left = "" if gate.until_time is None else f" {span(max((gate.until_time - datetime.now(UTC)).total_seconds(), 0))}"
    return gate.cause.name.lower() + left


def ranked(rows: Sequence[Row], sort: Sort) -> list[Row]:
    """The rows, the most remarkable first; equals by name."""
    def weight(row: Row) -> float:
        if sort is Sort.AGE:
            return row.oldest_age or 0.0
        if sort is Sort.RATE:
            return (row.in_per_second or 0.0) + (row.out_per_second or 0.0)
        return row.messages if sort is Sort.BACKLOG else 0

    return sorted(rows, key=lambda row: (-weight(row), row.name))


# -- showing -----------------------------------------------------------------------------------------------------

DESTINATION_HEAD = ("destination", "state", "in/s", "out/s", "messages", "bytes", "leased", "oldest", "dead", "consumers")
TENANT_HEAD = ("tenant", "gate", "messages", "bytes", "share", "grows/s")
_NUMBERS = (*DESTINATION_HEAD[2:], *TENANT_HEAD[2:])


def _destination_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [(row.name, row.state, _rate(row.in_per_second), _rate(row.out_per_second), f"{row.messages:,}", size(row.message_bytes),
             f"{row.leased:,}", "" if row.oldest_age is None else span(row.oldest_age), f"{row.dead_letters:,}" if row.dead_letters else "",
             str(row.consumers)) for row in rows]


def _tenant_rows(rows: Sequence[TenantRow]) -> list[tuple[str, ...]]:
    total = sum(row.messages for row in rows) or 1
    return [(row.name or "''", row.gate, f"{row.messages:,}", size(row.message_bytes), f"{row.messages / total:.0%}",
             "…" if row.grows_per_second is None else f"{row.grows_per_second:+,.0f}") for row in rows]


def _rate(rate: float | None) -> str:
    return "…" if rate is None else f"{rate:,.0f}" if rate >= 10 or not rate else f"{rate:.1f}"


def _json(row: Row) -> dict[str, Any]:
    """A destination as JSON has it."""
    found = plain(row)
    return {"destination": found.pop("name"), **found}


def _summary(rows: Sequence[Row]) -> str:
    waiting = [row for row in rows if row.messages]
    return (f"{plural(len(rows), 'destination')}, {len(waiting)} with messages: {sum(row.messages for row in rows):,} messages, "
            f"{size(sum(row.message_bytes for row in rows))}; in {_rate(sum(row.in_per_second or 0 for row in rows))}/s, "
            f"out {_rate(sum(row.out_per_second or 0 for row in rows))}/s")


async def _once(watch: Watch, destination: str | None, interval: float, sort: Sort, limit: int, output: Stream) -> int:
    import asyncio

    if destination is not None:
        tenants, found = await watch.tenants(destination, limit)
        if output is Stream.TABLE:
            print_table(TENANT_HEAD[:-1], [row[:-1] for row in _tenant_rows(tenants)])
        else:
            (print_json if output is Stream.JSON else print_line)(plain(found))
    else:
        await watch.destinations()
        await asyncio.sleep(interval)
        rows = await watch.destinations()
        shown = ranked(rows, sort)[:limit]
        if output is Stream.TABLE:
            print(_summary(rows))
            print_table(DESTINATION_HEAD, _destination_rows(shown))
            if len(rows) > limit:
                print(f"{len(rows) - limit} more: --limit shows them", file=sys.stderr)
        else:
            (print_json if output is Stream.JSON else print_line)(
                {"time": now(), "destinations": [_json(row) for row in shown], "total": len(rows),
                 "shards_missing": sorted(watch.shards_missing)})
    return _complete(watch)


def _complete(watch: Watch) -> int:
    if watch.shards_missing:
        print(f"spillway: incomplete: shards {', '.join(map(str, sorted(watch.shards_missing)))} did not answer", file=sys.stderr)
    return EXIT_UNAVAILABLE if watch.shards_missing else 0


async def _lines(watch: Watch, destination: str | None, interval: float, sort: Sort, limit: int) -> int:
    """A line of JSON for each look, until interrupted."""
    import asyncio

    while True:
        if destination is None:
            rows = await watch.destinations()
            print_line({"time": now(), "destinations": [_json(row) for row in ranked(rows, sort)[:limit]], "total": len(rows),
                        "shards_missing": sorted(watch.shards_missing)})
        else:
            print_line({"time": now(), "destination": destination} | plain((await watch.tenants(destination, limit))[1]))
        await asyncio.sleep(interval)


@dataclass(slots=True)
class View:
    """What is on the screen."""

    destination: str | None  # whose tenants; None: destinations
    sort: Sort
    chosen: int = 0  # index of the marked row

    def press(self, key: str, rows: Sequence[Row | TenantRow]) -> bool:
        """Reacts to a key; whether to look again at once."""
        last = max(len(rows) - 1, 0)
        moves = {"up": -1, "k": -1, "down": 1, "j": 1}
        if key in moves:
            self.chosen = min(max(self.chosen + moves[key], 0), last)
        elif key in ("enter", "right", "l") and self.destination is None and rows:
            self.destination, self.chosen = rows[min(self.chosen, last)].name, 0
            return True
        elif key in ("left", "h", "escape") and self.destination is not None:
            self.destination, self.chosen = None, 0
            return True
        elif key == "s" and self.destination is None:
            order = list(Sort)
            self.sort = order[(order.index(self.sort) + 1) % len(order)]
        else:
            return key in ("r", " ")
        return False


async def _live(watch: Watch, destination: str | None, interval: float, sort: Sort, limit: int) -> int:
    """Draws until q is pressed. What cannot be asked right now is said, and asked again."""
    from spillway.client import NotFound, Unavailable
    from spillway.client.commands.live import Keys, screen

    view, keys, told = View(destination, sort), Keys(), ""
    rows: list[Row] = []
    tenants: list[TenantRow] = []
    with screen() as draw, keys.reading():
        while True:
            try:
                if view.destination is None:
                    rows = await watch.destinations()
                else:
                    tenants = (await watch.tenants(view.destination, limit))[0]
                told = f"shards {', '.join(map(str, sorted(watch.shards_missing)))} did not answer" if watch.shards_missing else ""
            except Unavailable as error:
                told = str(error)
            except NotFound:
                if destination is not None:
                    raise
                view.destination = None
                continue
            deadline = time.monotonic() + interval
            while (left := deadline - time.monotonic()) > 0:
                shown: Sequence[Row | TenantRow] = tenants
                if view.destination is None:
                    shown = ranked(rows, view.sort)[:limit]
                view.chosen = min(view.chosen, max(len(shown) - 1, 0))
                draw(_drawn(view, rows, tenants, limit, told))
                key = await keys.next(left)
                if key == "q" or (key == "escape" and view.destination is None):
                    return 0
                if key is not None and view.press(key, shown):
                    break


def _drawn(view: View, rows: Sequence[Row], tenants: Sequence[TenantRow], limit: int, told: str) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    if view.destination is None:
        drawn = table(DESTINATION_HEAD, _destination_rows(ranked(rows, view.sort)[:limit]), _NUMBERS)
        title = _summary(rows)
        keys = f"sorted by {view.sort} (s)   up/down, Enter: its tenants   q: quit"
    else:
        drawn = table(TENANT_HEAD, _tenant_rows(tenants), _NUMBERS)
        title = f"tenants of {view.destination!r}, those with the most messages"
        keys = "left: back   q: quit"
    for number, row in enumerate(drawn.rows):
        row.style = "reverse" if number == view.chosen else ""
    parts: list[RenderableType] = [Text(title, style="bold"), *([Text(told, style="red")] if told else []), drawn, Text(keys, style="dim")]
    return Group(*parts)
