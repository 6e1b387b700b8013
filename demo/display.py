"""What the demo shows: live tables on a terminal, periodic lines elsewhere, and the verdict."""
from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from demo.cluster import NodeView
from demo.verify import Report

LINE_SECONDS = 5.0  # between two lines where there is no terminal
WIDTH = 130  # of tables where there is no terminal


@dataclass(frozen=True)
class DestinationView:
    """One destination at a moment."""

    name: str
    kind: str  # what is the matter with it, for people
    delivered: int = 0  # requests answered with success
    refused: int = 0  # requests answered with an error
    queued: int | None = None  # None: not known right now
    dead: int = 0
    oldest_seconds: float | None = None
    parked_seconds: float | None = None  # the whole destination; None: it is not
    parked_tenants: int = 0


@dataclass(frozen=True)
class View:
    """Everything at a moment."""

    seconds: float
    phase: str
    produced: int  # events
    events: int
    rate: float  # deliveries per second, lately
    destinations: Sequence[DestinationView] = ()
    nodes: Sequence[NodeView] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def tables(view: View) -> Group:
    """The live tables."""
    destinations = Table(title=f"{view.seconds:.0f} s, {view.phase}: {view.produced}/{view.events} events produced,"
                               f" {view.rate:.0f} deliveries/s", title_justify="left", box=box.SIMPLE, show_edge=False,
                         pad_edge=False)
    for name, justify in (("to", "left"), ("answers", "left"), ("delivered", "right"), ("refused", "right"),
                          ("queued", "right"), ("oldest", "right"), ("parked", "left")):
        destinations.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in view.destinations:
        destinations.add_row(
            row.name, row.kind, str(row.delivered), str(row.refused) if row.refused else "",
            "?" if row.queued is None else str(row.queued), _age(row.oldest_seconds), _parked(row),
            style="green" if row.queued == 0 and row.delivered else "")
    nodes = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in ("node", "state", "leads", "follows", "catching up"):
        nodes.add_column(name, justify="left" if name in ("node", "state") else "right")
    for node in view.nodes:
        nodes.add_row(node.name, node.state, *(("", "", "") if node.state != "up" else (
            str(node.leads), str(node.follows), str(node.other) if node.other else "")),
            style="" if node.state == "up" else "bold red")
    return Group(destinations, "", nodes, "", *(Text(note, style="dim") for note in view.notes[-4:]))


def line(view: View) -> str:
    """The same in one line."""
    destinations = "  ".join(
        f"{row.name} {row.delivered}/{'?' if row.queued is None else row.queued}{' parked' if _parked(row) else ''}"
        for row in view.destinations)
    nodes = " ".join(f"{node.name}:{node.leads}L/{node.follows}F" if node.state == "up" else f"{node.name}:{node.state}"
                     for node in view.nodes)
    return (f"{view.seconds:5.1f} s  {view.phase}  produced {view.produced}/{view.events}  "
            f"delivered/queued: {destinations}  nodes: {nodes}")


def _age(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _parked(row: DestinationView) -> str:
    if row.parked_seconds is not None:
        return f"for {max(row.parked_seconds, 0):.1f} s"
    return f"{row.parked_tenants} tenant{'' if row.parked_tenants == 1 else 's'}" if row.parked_tenants else ""


class Display:
    """Shows views as they come. Use as a context manager."""

    def __init__(self, plain: bool) -> None:
        self._console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        self._live = None if plain or not self._console.is_terminal else Live(
            console=self._console, auto_refresh=False, transient=False)
        self._line_due = 0.0
        self._notes_shown = 0

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, view: View, last: bool = False) -> None:
        """Shows the present state; without a terminal at most every few seconds, but notes at once."""
        if self._live is not None:
            self._live.update(tables(view), refresh=True)
            return
        for note in view.notes[self._notes_shown:]:
            self.say(f"{view.seconds:5.1f} s  {note}")
        self._notes_shown = len(view.notes)
        if last or time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + LINE_SECONDS
            self.say(line(view))

    def say(self, text: str) -> None:
        """One line."""
        if self._live is not None:
            self._console.print(text, highlight=False)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def verdict(self, events: int, reports: dict[str, Report | None], queued: dict[str, int | None], passed: bool,
                problems: Sequence[str]) -> None:
        """The final table. A report of None: the destination is down, and everything must still be queued."""
        if self._live is not None:
            self._live.stop()
        table = Table(title=f"verification: {events} events to each destination", title_justify="left", box=box.SIMPLE,
                      show_edge=False, pad_edge=False)
        for name in ("destination", "arrived", "lost", "disorder", "changed", "duplicates", "queued", "verdict"):
            table.add_column(name, justify="left" if name in ("destination", "verdict") else "right", no_wrap=True)
        for name, report in reports.items():
            left = queued.get(name)
            shown = "?" if left is None else str(left)
            good = not any(problem.startswith(f"{name}: ") for problem in problems)
            verdict = Text("ok" if good else "FAILED", style="green" if good else "bold red")
            if report is None:
                table.add_row(name, "", "", "", "", "", shown, verdict)
            else:
                table.add_row(name, str(report.arrived), str(report.lost), str(report.overtaken),
                              str(report.corrupt + report.misplaced), str(report.duplicates), shown, verdict)
        self._console.print(table)
        for problem in problems:
            self._console.print(problem, style="red", highlight=False)
        self._console.print("PASSED" if passed else "FAILED", style="bold green" if passed else "bold red")
