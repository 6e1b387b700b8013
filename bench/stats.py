"""Statistics of samples. Pure."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` % of the samples do not exceed (nearest rank)."""
    if not samples:
        raise ValueError("no samples")
    if not 0 < percent <= 100:
        raise ValueError(f"{percent} is not in (0, 100]")
    return sorted(samples)[math.ceil(len(samples) * percent / 100) - 1]


def summary(samples: Sequence[float]) -> dict[str, float | int | None]:
    """Count, p50, p99 and maximum, in milliseconds, of samples in seconds."""
    if not samples:
        return {"count": 0, "p50_ms": None, "p99_ms": None, "max_ms": None}
    return {"count": len(samples), "p50_ms": round(percentile(samples, 50) * 1e3, 3),
            "p99_ms": round(percentile(samples, 99) * 1e3, 3), "max_ms": round(max(samples) * 1e3, 3)}


def longest_gap(times: Iterable[float], since: float, until: float) -> float:
    """The longest stretch of [since, until] without an event."""
    inside = [since, *sorted(t for t in times if since <= t <= until), until]
    return max(b - a for a, b in pairwise(inside))


def series(samples: Iterable[tuple[float, float]], since: float, until: float, width: float) -> list[dict[str, float | int | None]]:
    """`summary` of each whole stretch of `width` seconds of [since, until): of (time, seconds) pairs, with `at`, when it begins, counted
    from `since`."""
    found: list[list[float]] = [[] for _ in range(stretches(since, until, width))]
    for at, seconds in samples:
        place = math.floor((at - since) / width)
        if 0 <= place < len(found):
            found[place].append(seconds)
    return [{"at": round(i * width, 3), **summary(one)} for i, one in enumerate(found)]


def stretches(since: float, until: float, width: float) -> int:
    """How many whole stretches of `width` there are."""
    return max(math.floor((until - since) / width + 1e-9), 0)
