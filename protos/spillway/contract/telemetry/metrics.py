"""Metrics: definitions, counts, and the text that Prometheus reads.

A metric is defined once, as a `Metric`; its values are plain integers elsewhere, and become `Family` objects only when somebody
looks. An OpenTelemetry instrument per message would cost more than the message.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
SLOTS = 32  # of a histogram: powers of two, up to 2^31 units
# Exported of them: with each destination a bucket is a series, and every second power tells enough below and above what matters.
MILLISECOND_POWERS = (1, 3, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 22, 26)
MICROSECOND_POWERS = (6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 22)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, as everybody sees it: Prometheus, OpenTelemetry, the documentation, the tests of rules and dashboards."""

    name: str
    """As Prometheus has it: with its unit, counters with `_total`."""
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    """As OpenTelemetry has it (UCUM): s, By, {message}, 1."""
    help: str
    question: str
    """What it answers, for whoever is on call."""
    labels: tuple[str, ...] = ()
    powers: tuple[int, ...] = ()
    """Of a histogram: the slots that are exported."""
    per_second: int = 1
    """Of a histogram: how many of the units that it counts in make a second."""

    @property
    def bounds(self) -> tuple[float, ...]:
        """Upper bounds of a histogram's buckets in seconds, without the infinite one."""
        return tuple((1 << power) / self.per_second for power in self.powers)


class Histogram:
    """Counts of durations, by powers of two of a unit: one addition, no search, no floating point."""

    __slots__ = ("slots", "total")

    def __init__(self) -> None:
        self.slots = [0] * SLOTS
        """`slots[b]` counts durations below 2^b units, and not below 2^(b-1)."""
        self.total = 0
        """Of all durations, in units."""

    def add(self, units: int) -> None:
        """One duration; what is negative (clocks) counts as nothing."""
        if units > 0:
            self.total += units
            power = units.bit_length()
            self.slots[power if power < SLOTS else SLOTS - 1] += 1
        else:
            self.slots[0] += 1

    def add_run(self, first: int, last: int, total: int, count: int) -> None:
        """`count` durations that sum up to `total`, the longest `first`, the shortest `last`, as those of messages in order are. Where
        both ends fall into one slot, so does what is between; otherwise it counts with the first."""
        if total > 0:
            self.total += total
        power = first.bit_length() if first > 0 else 0
        slot = self.slots
        if count > 1 and (last.bit_length() if last > 0 else 0) != power:
            count -= 1
            other = last.bit_length() if last > 0 else 0
            slot[other if other < SLOTS else SLOTS - 1] += 1
        slot[power if power < SLOTS else SLOTS - 1] += count

    @property
    def count(self) -> int:
        """How many durations."""
        return sum(self.slots)

    def buckets(self, powers: Sequence[int]) -> list[int]:
        """How many are below each bound, and not below the one before; the last: those beyond all bounds."""
        out, at = [], 0
        for power in powers:
            out.append(sum(self.slots[at:power + 1]))
            at = power + 1
        out.append(sum(self.slots[at:]))
        return out

    def __repr__(self) -> str:
        return f"<Histogram: {self.count} of {self.total} units>"


Value = int | float | Histogram
Sample = tuple[tuple[str, ...], Value]
"""Values of the labels, in the metric's order, and what was counted."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with what was counted of it."""

    metric: Metric
    samples: list[Sample]


TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def render(families: Iterable[Family], open_metrics: bool = False) -> bytes:
    """The families in Prometheus' text format, or in OpenMetrics'. A family without samples is told of all the same."""
    lines: list[str] = []
    for family in families:
        metric = family.metric
        name = metric.name
        told = name.removesuffix("_total") if open_metrics and metric.kind == COUNTER else name
        lines.append(f"# HELP {told} {_escaped_help(metric.help)}")
        lines.append(f"# TYPE {told} {metric.kind}")
        for values, value in family.samples:
            labels = ",".join([f'{k}="{_escaped(v)}"' for k, v in zip(metric.labels, values, strict=True)])
            if isinstance(value, Histogram):
                _histogram(lines, metric, labels, value)
            else:
                lines.append(f"{name}{{{labels}}} {_number(value)}" if labels else f"{name} {_number(value)}")
    if open_metrics:
        lines.append("# EOF")
    lines.append("")
    return "\n".join(lines).encode()


def _histogram(lines: list[str], metric: Metric, labels: str, value: Histogram) -> None:
    name, comma = metric.name, f"{labels}," if labels else ""
    below = 0
    for bound, count in zip((*map(_number, metric.bounds), "+Inf"), value.buckets(metric.powers), strict=True):
        below += count
        lines.append(f'{name}_bucket{{{comma}le="{bound}"}} {below}')
    braced = f"{{{labels}}}" if labels else ""
    lines.append(f"{name}_sum{braced} {_number(value.total / metric.per_second)}")
    lines.append(f"{name}_count{braced} {below}")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _escaped_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def table(metrics: Iterable[Metric]) -> str:
    """The metrics as rows of the documentation's table."""
    rows = ["| metric | type | unit | labels | question |", "| --- | --- | --- | --- | --- |"]
    for m in metrics:
        labels = ", ".join(f"`{label}`" for label in m.labels) or "-"
        rows.append(f"| `{m.name}` | {m.kind} | {m.unit} | {labels} | {m.question} |")
    return "\n".join(rows)
