"""Histograms of integers, and the text that Prometheus reads."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from spillway.contract.telemetry.metrics import MILLISECOND_POWERS, Family, Histogram, Metric, render, table

WAIT = Metric("w_seconds", "histogram", "s", "Waits.", "How long?", ("d",), MILLISECOND_POWERS, 1000)
DONE = Metric("done_total", "counter", "1", "Done.", "How many?", ("d",))
LEVEL = Metric("level", "gauge", "1", 'A "level"\\.', "How high?")


@given(st.lists(st.integers(-5, 1 << 40)))
def test_a_bucket_has_what_is_below_its_bound(durations: list[int]) -> None:
    """Each duration counts in exactly one bucket: of the first bound above it, where negative ones are nothing."""
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    bounds = [*WAIT.bounds, float("inf")]
    below = [sum(max(d, 0) < bound * 1000 for d in durations) for bound in bounds]
    counted = histogram.buckets(MILLISECOND_POWERS)
    assert [sum(counted[:i + 1]) for i in range(len(counted))] == below
    assert (histogram.count, histogram.total) == (len(durations), sum(max(d, 0) for d in durations))


@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=50))
def test_a_run_counts_as_its_messages(durations: list[int]) -> None:
    """As many as there are, with their sum; the longest and the shortest each in their own slot."""
    durations.sort(reverse=True)
    histogram, single = Histogram(), Histogram()
    histogram.add_run(durations[0], durations[-1], sum(durations), len(durations))
    for duration in durations:
        single.add(duration)
    assert (histogram.count, histogram.total) == (single.count, single.total)
    assert histogram.slots[durations[0].bit_length()] and histogram.slots[durations[-1].bit_length()]
    if durations[0].bit_length() == durations[-1].bit_length():
        assert histogram.slots == single.slots


def test_the_text_is_what_prometheus_reads() -> None:
    """Names, labels, escapes, buckets that add up; in OpenMetrics a counter's family has no suffix, and there is an end."""
    wait = Histogram()
    for ms in (0, 1, 5, 1 << 30):
        wait.add(ms)
    families = [Family(DONE, [(('a"\\\n',), 3)]), Family(LEVEL, [((), 0.5)]), Family(WAIT, [(("d",), wait)])]
    text = render(families).decode()
    assert 'done_total{d="a\\"\\\\\\n"} 3\n' in text and "# TYPE done_total counter\n" in text
    assert '# HELP level A "level"\\\\.\n' in text and "\nlevel 0.5\n" in text
    assert 'w_seconds_bucket{d="d",le="0.002"} 2\n' in text and 'w_seconds_bucket{d="d",le="+Inf"} 4\n' in text
    assert f'w_seconds_sum{{d="d"}} {((1 << 30) + 6) / 1000}\n' in text and 'w_seconds_count{d="d"} 4\n' in text
    text = render(families, open_metrics=True).decode()
    assert "# TYPE done counter\n" in text and "\ndone_total{" in text and text.endswith("# EOF\n")


def test_a_table_has_a_row_for_each() -> None:
    """For the documentation."""
    assert table([DONE, LEVEL]).splitlines()[2:] == ["| `done_total` | counter | 1 | `d` | How many? |",
                                                      "| `level` | gauge | 1 | - | How high? |"]
