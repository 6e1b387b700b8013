"""What a fault cost, from the traces of the messages around it. Pure."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.stats import longest_gap, percentile, stretches


class Trace(NamedTuple):
    """One message: when it was handed in, stored and delivered for the first time; None: never."""

    number: int
    queue: int
    sent_at: float
    stored_at: float | None
    delivered_at: float | None


def outage(traces: Sequence[Trace], since: float, until: float) -> dict[str, Any]:
    """The worst waits of messages handed in from a second before `since` until `until`, the longest time without any
    delivery, and the longest time without a delivery in one queue, in that time, in seconds. A message that never
    arrived makes the worst wait None. Times of the slowest messages count from `since`."""
    chosen = [t for t in traces if since - 1.0 <= t.sent_at < until]
    if not chosen:
        return {"messages": 0}
    delivered = [t.delivered_at for t in traces if t.delivered_at is not None]
    queues: dict[int, list[float]] = {t.queue: [] for t in traces}
    for t in traces:
        if t.delivered_at is not None:
            queues[t.queue].append(t.delivered_at)
    gaps = [longest_gap(times, since, until) for times in queues.values()]
    worst: dict[int, float] = {}
    for t in chosen:
        worst[t.queue] = max(worst.get(t.queue, 0.0), _wait(t))
    return {
        "messages": len(chosen),
        "slowest": [slow(t, since) for t in sorted(chosen, key=_wait, reverse=True)[:3]],
        "send_to_stored_max": _worst([None if t.stored_at is None else t.stored_at - t.sent_at for t in chosen]),
        "send_to_delivered_max": _worst([None if t.delivered_at is None else t.delivered_at - t.sent_at for t in chosen]),
        "send_to_delivered_max_of_median_queue": _finite(percentile(list(worst.values()), 50)),
        "delivery_gap_overall": round(longest_gap(delivered, since, until), 3),
        "delivery_gap_of_worst_queue": round(max(gaps), 3),
        "delivery_gap_of_median_queue": round(percentile(gaps, 50), 3),
    }


def timeline(traces: Sequence[Trace], since: float, until: float, width: float) -> list[dict[str, Any]]:
    """For each whole stretch of `width` seconds of [since, until): messages handed in, stored and delivered in it for each second, and the
    longest wait until delivered of those handed in in it (None: of none, or for ever). `at` counts from `since`."""
    steps = stretches(since, until, width)

    def place(at: float) -> int | None:
        found = math.floor((at - since) / width)
        return found if 0 <= found < steps else None

    counts = [[0, 0, 0] for _ in range(steps)]
    longest: list[float | None] = [None] * steps
    for t in traces:
        for kind, at in enumerate((t.sent_at, t.stored_at, t.delivered_at)):
            if at is not None and (where := place(at)) is not None:
                counts[where][kind] += 1
        if (where := place(t.sent_at)) is not None:
            longest[where] = max(longest[where] or 0.0, _wait(t))
    return [{"at": round(i * width, 3), "sent_per_second": round(sent / width), "stored_per_second": round(stored / width),
             "delivered_per_second": round(delivered / width),
             "send_to_delivered_max": None if wait is None else _finite(wait)}
            for i, ((sent, stored, delivered), wait) in enumerate(zip(counts, longest, strict=True))]


def slow(trace: Trace, since: float) -> dict[str, Any]:
    """One message and its times, for whoever looks for the reason."""
    stored, delivered = (None if at is None else round(at - since, 3) for at in (trace.stored_at, trace.delivered_at))
    return {"number": trace.number, "queue": trace.queue, "sent": round(trace.sent_at - since, 3), "stored": stored,
            "delivered": delivered}


def _wait(trace: Trace) -> float:
    return float("inf") if trace.delivered_at is None else trace.delivered_at - trace.sent_at


def _worst(waits: Sequence[float | None]) -> float | None:
    return None if None in waits else round(max(w for w in waits if w is not None), 3)


def _finite(value: float) -> float | None:
    return None if value == float("inf") else round(value, 3)
