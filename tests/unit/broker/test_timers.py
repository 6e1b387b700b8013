"""Timers: everything due comes out once, earliest first, and nothing else does."""
from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from spillway.broker.runtime.timers import Timers


def test_nothing_is_due_before_its_time() -> None:
    """At its own millisecond a timer is due, one before it is not."""
    timers = Timers()
    timers.add(100, 1, b"q")
    assert timers.pop_due(99, 100) == [] and len(timers) == 1
    assert timers.pop_due(100, 100) == [(1, b"q")] and len(timers) == 0


def test_what_came_out_does_not_come_again() -> None:
    """A timer fires once; the same queue added twice fires twice, as the hints it is."""
    timers = Timers()
    timers.add(1, 1, b"q")
    timers.add(2, 1, b"q")
    assert timers.pop_due(5, 100) == [(1, b"q"), (1, b"q")]
    assert timers.pop_due(1 << 60, 100) == []


@settings(derandomize=True, deadline=None, database=None)
@given(st.lists(st.one_of(
    st.tuples(st.integers(0, 50), st.integers(0, 3), st.binary(max_size=2)), st.integers(0, 60))))
def test_timers_behave_as_a_sorted_list(steps: list[tuple[int, int, bytes] | int]) -> None:
    """Whatever is added and asked for in whatever order, each look takes all that is due, ordered by time."""
    timers = Timers()
    model: list[tuple[int, int, bytes]] = []
    for step in steps:
        if isinstance(step, tuple):
            timers.add(*step)
            model.append(step)
        else:
            due = sorted(t for t in model if t[0] <= step)
            model = [t for t in model if t[0] > step]
            assert timers.pop_due(step, 100) == [t[1:] for t in due]
        assert len(timers) == len(model)
