"""What `spillway bench` measures with, and how sizes and times are told."""
from __future__ import annotations

import random

import pytest
from spillway.client.commands.common import size, span
from spillway.client.commands.loads import Histogram


def test_a_histogram_is_right_to_one_percent_whatever_it_counts() -> None:
    """And its largest value is exact; its memory does not grow."""
    rng = random.Random(1)
    lengths = sorted(rng.lognormvariate(-5, 2) for _ in range(20_000))
    found = Histogram()
    for length in lengths:
        found.add(length)
    for share in (0.5, 0.9, 0.99, 0.999, 1.0):
        exact = lengths[max(round(share * len(lengths)) - 1, 0)]
        assert exact * 0.99 <= found.quantile(share) <= exact * 1.02, share
    assert found.summary()["max"] == round(lengths[-1] * 1000, 3) and found.count == 20_000
    assert len(found._buckets) < 2500


def test_a_histogram_of_nothing_and_of_the_smallest() -> None:
    """Has no length, or that one."""
    assert Histogram().summary() == {"count": 0, "p50": 0.0, "p90": 0.0, "p99": 0.0, "p999": 0.0, "max": 0.0}
    found = Histogram()
    found.add(0.0, times=3)
    assert found.count == 3 and found.quantile(1.0) == 0.0


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (300 << 10, "300 KiB"), (3 << 19, "1.5 MiB"),
                                             (5 << 30, "5.0 GiB"), (2 << 40, "2.0 TiB"), (5 << 50, "5120 TiB")])
def test_sizes_are_short(count: int, text: str) -> None:
    """Three digits, and a unit."""
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0s"), (9.94, "9.9s"), (12.4, "12s"), (60, "1m"), (200, "3m 20s"), (3600, "1h"),
                                               (3661, "1h 1m"), (363_600, "4d 5h")])
def test_lengths_of_time_are_short(seconds: float, text: str) -> None:
    """Two units at most."""
    assert span(seconds) == text
