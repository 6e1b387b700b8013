"""Judges a destination's history: is every event there, intact, and in order? Pure.

Order, per (tenant, key): a receiver's place in the queue is a cursor. Each request must be for the event at the
cursor or for an earlier one, which then is a redelivery: the lease that carried it came back, and delivery goes on
from there. A request beyond the cursor has overtaken one. The cursor moves behind an event once it was accepted;
after a refusal it stays, so that what follows a failed event before it succeeded is caught, too.
"""
from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from demo.events import Event
from demo.history import ACCEPTED, STALE, Arrival

EXAMPLES_MAX = 5


@dataclass
class Report:
    """What is to be said of one destination."""

    expected: int  # events produced
    arrived: int = 0  # different events accepted
    lost: int = 0
    duplicates: int = 0  # accepted again
    refused: int = 0  # requests answered with an error
    stale: int = 0  # requests of a lease that had been replaced, dropped by the receiver
    overtaken: int = 0  # requests beyond the cursor
    corrupt: int = 0  # payload not as produced
    misplaced: int = 0  # events under another tenant or key than their own, or that nobody produced
    examples: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Nothing lost, nothing out of order, nothing changed. Duplicates are allowed: delivery is at least once."""
        return not (self.lost or self.overtaken or self.corrupt or self.misplaced)

    def note(self, example: str) -> None:
        """Keeps the first few examples of what is wrong."""
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(example)


def verify(events: Sequence[Event], history: Iterable[Arrival]) -> Report:
    """The report of one destination to which all events were produced, in the order given."""
    places: list[int] = []  # event number -> place in its queue
    lengths: dict[tuple[str, str], int] = {}
    for event in events:
        queue = event.tenant, event.key
        places.append(lengths.get(queue, 0))
        lengths[queue] = places[-1] + 1
    checksums = [zlib.crc32(event.line) for event in events]
    report = Report(len(events))
    seen = bytearray(len(events))
    cursors: dict[tuple[str, str], int] = {}
    for tenant, key, number, checksum, verdict in history:
        queue = tenant, key
        if number >= len(events) or (events[number].tenant, events[number].key) != queue:
            report.misplaced += 1
            report.note(f"event {number} came as {tenant}/{key}")
            continue
        if checksum != checksums[number]:
            report.corrupt += 1
            report.note(f"event {number} came with another payload")
        if verdict == STALE:
            report.stale += 1
            continue
        place = places[number]
        cursor = cursors.get(queue, 0)
        if place > cursor:
            report.overtaken += 1
            report.note(f"event {number} of {tenant}/{key}, its {place + 1}th, came when the {cursor + 1}th was due")
        if verdict != ACCEPTED:
            report.refused += 1
            cursors[queue] = place
            continue
        cursors[queue] = place + 1
        if seen[number]:
            report.duplicates += 1
        else:
            seen[number] = 1
            report.arrived += 1
    report.lost = report.expected - report.arrived
    if report.lost:
        missing = [number for number, here in enumerate(seen) if not here]
        report.note(f"never arrived: events {', '.join(map(str, missing[:10]))}{' ...' if len(missing) > 10 else ''}")
    return report
