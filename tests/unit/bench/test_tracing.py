"""Workload j's arithmetic and table."""
from __future__ import annotations

from bench.report import render
from bench.tracing import BARS, PARTNERS, VARIANTS, compared


def test_pairs_are_compared_one_by_one() -> None:
    """What slows both of a pair down is no cost; the median pair counts, not the mean."""
    assert compared([99.0, 49.5, 990.0], [100.0, 50.0, 1000.0])["median"] == 1.0
    assert compared([100.0] * 4, [100.0] * 4) == {"median": 0.0, "low": 0.0, "high": 0.0}
    assert compared([100.0, 100.0, 10.0], [100.0, 100.0, 100.0])["median"] == 0.0


def test_its_table_has_a_row_for_each_variant() -> None:
    """With the cost and the bar."""
    j = {"rounds": 2, "seconds": 1.0, "sampled_every": 100, "collector": {"bytes": 1, "requests": 2}, "bars_percent": BARS,
         "per_second": {name: [100, 200] for name in VARIANTS}, "cpu_us_per_message": {name: [1.0, 2.0] for name in VARIANTS},
         "cost_percent": {name: compared([1.0], [1.0]) for name in PARTNERS},
         "cpu_percent": {name: compared([1.0], [1.0]) for name in PARTNERS}}
    machine = {"cores_usable": 2, "cpu": "x", "kernel": "1", "filesystem": "ext4", "python": "3", "commit": "c",
               "uncommitted_changes": False, "load_average_before": 0}
    limit = {"batch": 1, "messages_per_second": 1, "round_trip": {"p50_ms": 1, "p99_ms": 1}, "single_sync": {"p50_ms": 1, "p99_ms": 1}}
    text = render({"machine": machine, "limits": {"grpc": limit, "rocksdb": limit}, "quick": False, "failed": {}, "j": j})
    assert all(what in text for what in ("neither", "metrics, scraped", "nothing sampled", "one of 100 sampled"))
