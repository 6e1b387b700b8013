"""`python -m bench.plots RESULTS.json docs/plots`: plots of workloads c, e and g as SVG, and their figures as a Markdown table.

Lines on a grid need no plotting library. Each file carries its own colours, for light and for dark pages, and its own background, so that
it reads on any. The same results give the same bytes: a test compares what is committed with what `results.json` beside it gives.
"""
from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, PANEL_HEIGHT, HEAD, FOOT, GAP = 760, 170, 74, 52, 34
LEFT, RIGHT = 64, 16
STYLE = """
.page{fill:#ffffff}.text{fill:#1f2328}.quiet{fill:#59636e}.grid{stroke:#d1d9e0}.event{stroke:#59636e;stroke-dasharray:4 3}
.one{stroke:#0969da}.two{stroke:#bc4c00}.key-one{fill:#0969da}.key-two{fill:#bc4c00}
text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif}.title{font-size:15px;font-weight:600}
@media(prefers-color-scheme:dark){.page{fill:#0d1117}.text{fill:#f0f6fc}.quiet{fill:#9198a1}.grid{stroke:#3d444d}.event{stroke:#9198a1}
.one{stroke:#4493f8}.two{stroke:#db6d28}.key-one{fill:#4493f8}.key-two{fill:#db6d28}}
"""
COLOURS = ("one", "two")


class Line(NamedTuple):
    """One line of a panel: its name and its points; a None is a hole."""

    name: str
    points: Sequence[tuple[float, float | None]]


class Panel(NamedTuple):
    """One grid: what is up, and its lines. Logarithmic if `log`."""

    label: str
    lines: Sequence[Line]
    log: bool = False


class Event(NamedTuple):
    """Something that happened at a time, in seconds."""

    at: float
    label: str


def chart(title: str, subtitle: str, panels: Sequence[Panel], events: Sequence[Event]) -> str:
    """An SVG: panels below one another over one time axis."""
    height = HEAD + len(panels) * PANEL_HEIGHT + (len(panels) - 1) * GAP + FOOT
    last = max(x for panel in panels for line in panel.lines for x, _ in line.points)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
             f'aria-label="{escape(title)}">', f"<style>{STYLE}</style>", f'<rect class="page" width="{WIDTH}" height="{height}"/>',
             f'<text class="text title" x="{LEFT}" y="22">{escape(title)}</text>',
             f'<text class="quiet" x="{LEFT}" y="40">{escape(subtitle)}</text>']
    for number, panel in enumerate(panels):
        parts += _panel(panel, HEAD + number * (PANEL_HEIGHT + GAP), last, events if number == 0 else [Event(e.at, "") for e in events])
    bottom = height - FOOT
    for second in _steps(0, last, 8):
        parts.append(f'<text class="quiet" x="{_x(second, last):.1f}" y="{bottom + 18}" text-anchor="middle">{second:g}</text>')
    parts.append(f'<text class="quiet" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{bottom + 36}" text-anchor="middle">seconds</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int, last: float, events: Sequence[Event]) -> Iterator[str]:
    values = [y for line in panel.lines for _, y in line.points if y is not None]
    if panel.log:
        low, high = 10 ** math.floor(math.log10(max(min(values), 1e-9))), 10 ** math.ceil(math.log10(max(values)))
        marks = [10 ** e for e in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    else:
        marks = _steps(0, max(values), 5)
        if marks[-1] < max(values):
            marks.append(marks[-1] + marks[1] - marks[0])
        low, high = 0, marks[-1]

    def place(value: float) -> float:
        share = math.log10(value / low) / math.log10(high / low) if panel.log else value / high
        return top + PANEL_HEIGHT - share * PANEL_HEIGHT

    yield f'<text class="text" x="{LEFT}" y="{top - 4}">{escape(panel.label)}</text>'
    for mark in marks:
        yield f'<path class="grid" d="M{LEFT} {place(mark):.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="quiet" x="{LEFT - 8}" y="{place(mark) + 4:.1f}" text-anchor="end">{mark:,g}</text>'
    row, free = 0, 0.0  # labels that would run into each other go below one another
    for event in events:
        x = _x(event.at, last)
        row = row + 1 if x < free else 0
        free = x + 7 * len(event.label) + 12
        yield f'<path class="event" d="M{x:.1f} {top}V{top + PANEL_HEIGHT}"/>'
        if event.label:
            yield f'<text class="quiet" x="{x + 5:.1f}" y="{top + 13 + 15 * row}">{escape(event.label)}</text>'
    key = float(WIDTH - RIGHT)
    for line, colour in reversed(list(zip(panel.lines, COLOURS, strict=False))):
        yield f'<path class="{colour}" fill="none" stroke-width="1.8" d="{_path(line.points, last, place)}"/>'
        yield f'<text class="key-{colour}" x="{key:.1f}" y="{top - 4}" text-anchor="end">{escape(line.name)}</text>'
        key -= 7 * len(line.name) + 16


def _path(points: Sequence[tuple[float, float | None]], last: float, place: Any) -> str:
    out, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        out.append(f"{pen}{_x(x, last):.1f} {place(y):.1f}")
        pen = "L"
    return "".join(out)


def _x(seconds: float, last: float) -> float:
    return LEFT + seconds / last * (WIDTH - LEFT - RIGHT)


def _steps(low: float, high: float, count: int) -> list[float]:
    """At most `count` + 1 round numbers from `low` to `high`."""
    rough = max(high - low, 1e-9) / count
    power: float = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
    return [round(low + i * step, 9) for i in range(int((high - low) / step + 1e-9) + 1)]


def machine(results: dict[str, Any]) -> str:
    """On what a run was made, in one line."""
    m = results["machine"]
    return (f"{m['cores_usable']} cores of an {m['cpu']}, Linux {m['kernel'].partition('-')[0]}, {m['filesystem']}, Python {m['python']}; "
            f"load average before the run {m['load_average_before']}")


def neighbour(results: dict[str, Any]) -> str:
    """Workload c."""
    c = results["c"]
    series = c["series"]
    return chart("A tenant dumps 50,000 messages beside 100 quiet ones", machine(results), [
        Panel("quiet tenants: ms from send until the handler starts", [
            Line("median", [(one["at"], one["p50_ms"]) for one in series]),
            Line("99 of 100", [(one["at"], one["p99_ms"]) for one in series])], log=True)],
        [Event(c["dump_at_seconds"], "the dump begins"), Event(c["dump_at_seconds"] + c["burst_stored_seconds"], "all of it is stored")])


def isolation(results: dict[str, Any]) -> str:
    """Workload g."""
    g = results["g"]
    series = g["series"]
    return chart("Five of ten destinations die; these are the other five", machine(results), [
        Panel("messages delivered a second", [Line("delivered", [(one["at"], one["count"]) for one in series])]),
        Panel("ms from send until the request arrives", [
            Line("median", [(one["at"], one["p50_ms"]) for one in series]),
            Line("99 of 100", [(one["at"], one["p99_ms"]) for one in series])])],
        [Event(one["at"], f"{one['dead']} dead") for one in g["changes"]])


def outage(results: dict[str, Any]) -> str:
    """Workload e."""
    e = results["e"]
    line = e["timeline"]
    return chart("A node of three is killed at 2,000 messages a second, and comes back", machine(results), [
        Panel("messages a second, each tenth of a second", [
            Line("stored", [(one["at"], one["stored_per_second"]) for one in line]),
            Line("delivered", [(one["at"], one["delivered_per_second"]) for one in line])]),
        Panel("longest ms from send until delivered", [
            Line("of all queues", [(one["at"], None if one["send_to_delivered_max"] is None else one["send_to_delivered_max"] * 1e3)
                                   for one in line])])],
        [Event(e["killed_at_seconds"], "killed"), Event(e["restarted_at_seconds"], "started again")])


PLOTS = {"neighbour": ("c", neighbour), "isolation": ("g", isolation), "outage": ("e", outage)}


def figures(results: dict[str, Any]) -> str:
    """The figures of the plots, as a Markdown table."""
    c, e, g = results["c"], results["e"], results["g"]
    rows = []
    for phase, when in (("before", "before the dump"), ("while_dumping", f"in the {c['burst_stored_seconds']} s in which it is taken in"),
                        ("during", "from its start on, 15 s")):
        one = c["to_handler"][phase]
        rows.append((f"a quiet tenant's message until its handler starts, {when}", f"{one['p50_ms']:,.1f} ms", f"{one['p99_ms']:,.1f} ms"))
    for one, ratio in zip(g["phases"], g["throughput_ratio"], strict=True):
        rows.append((f"a healthy destination's message until its request arrives, {one['dead']} of {g['destinations']} dead "
                     f"(throughput {ratio:.2f} of before)", f"{one['p50_ms']:,.1f} ms", f"{one['p99_ms']:,.1f} ms"))
    lines = ["| | median | 99 of 100 |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    lost = ", ".join(f"{e[key]} {key.replace('_', ' ')}" for key in ("lost", "stored_twice", "reordered", "redelivered"))
    lines += ["", f"A node of three killed at 2,000 messages a second: longest wait until stored {e['all']['send_to_stored_max']} s, until "
              f"delivered {e['all']['send_to_delivered_max']} s; of {e['sent']:,} messages {lost}.",
              "", f"Measured on {machine(results)}, commit {results['machine']['commit'][:10]}."]
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def with_figures(page: str, results: dict[str, Any]) -> str:
    """A page with the table between its marks made anew."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{figures(results)}\n{END}{after}"


def main(argv: list[str]) -> int:
    """Writes the plots, the results beside them, and the table of the page above them; returns the exit code."""
    if len(argv) != 2:
        print("usage: python -m bench.plots RESULTS.json FOLDER   (of a run of `make bench ARGS=\"c e g\"`)", file=sys.stderr)
        return 2
    results, folder = json.loads(Path(argv[0]).read_text()), Path(argv[1])
    if missing := sorted({letter for letter, _ in PLOTS.values()} - results.keys()):
        print(f"bench.plots: {argv[0]} lacks workload {', '.join(missing)}", file=sys.stderr)
        return 2
    kept = {"machine": results["machine"], "quick": results["quick"]} | {letter: results[letter] for letter, _ in PLOTS.values()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
    for name, (_, plot) in PLOTS.items():
        (folder / f"{name}.svg").write_text(plot(kept))
    page = folder.parent / "ordering-and-fairness.md"
    if page.exists():
        page.write_text(with_figures(page.read_text(), kept))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
