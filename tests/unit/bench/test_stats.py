"""Percentiles and gaps of samples whose answers are known."""
from __future__ import annotations

import pytest

from bench.stats import longest_gap, percentile, series, summary


def test_percentile_is_nearest_rank() -> None:
    """It is always a sample: of 1..100 the p-th is p, of one sample it is that."""
    samples = list(range(100, 0, -1))
    assert [percentile(samples, p) for p in (1, 50, 99, 99.5, 100)] == [1, 50, 99, 100, 100]
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7.0


def test_percentile_refuses_nonsense() -> None:
    """No samples and impossible percentages are errors, not numbers."""
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)
    for percent in (0, -1, 101):
        with pytest.raises(ValueError, match="not in"):
            percentile([1.0], percent)


def test_summary_in_milliseconds() -> None:
    """Seconds in, milliseconds out; of nothing, nothing."""
    assert summary([0.001, 0.002, 0.1]) == {"count": 3, "p50_ms": 2.0, "p99_ms": 100.0, "max_ms": 100.0}
    assert summary([]) == {"count": 0, "p50_ms": None, "p99_ms": None, "max_ms": None}


def test_longest_gap() -> None:
    """Both ends of the window count as events, what is outside does not, order does not matter."""
    assert longest_gap([5.0, 1.0, 2.0, 99.0], 0.0, 6.0) == 3.0
    assert longest_gap([1.0], 0.0, 6.0) == 5.0
    assert longest_gap([], 2.0, 6.0) == 4.0


def test_series() -> None:
    """Each whole stretch has its own summary, an empty one none; what is outside, and of a stretch that is not whole, is left out."""
    found = series([(9.9, 9.0), (10.0, 0.001), (10.4, 0.003), (11.5, 0.002), (12.2, 9.0)], 10.0, 12.3, 1.0)
    assert [(one["at"], one["count"], one["max_ms"]) for one in found] == [(0.0, 2, 3.0), (1.0, 1, 2.0)]
    assert [one["count"] for one in series([(0.5, 1.0)], 0.0, 2.0, 1.0)] == [1, 0]
    assert series([], 1.0, 1.5, 1.0) == []
