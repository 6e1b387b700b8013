"""What `spillway top` makes of counts, and what keys do."""
from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from spillway.client.commands.live import named
from spillway.client.commands.top import Row, Sort, View, destination_row, ranked
from spillway.client.model import DestinationStats

NOW = datetime(2030, 1, 1, tzinfo=UTC)
STATS = DestinationStats(messages=5, leased=0, queues=2, dead_letters=1, enqueued_total=100, acked_total=90, dead_lettered_total=1,
                         retried_total=0, expired_total=0, oldest_enqueue_time=NOW - timedelta(seconds=30), parked_until_time=None,
                         parked_tenants=0, shards_missing=(), message_bytes=50, consumers=1)


def test_rates_are_what_changed_between_two_looks() -> None:
    """None at the first; never below 0, when shards do not answer."""
    first = destination_row("d", STATS, None, 10.0, NOW)
    assert (first.in_per_second, first.out_per_second, first.oldest_age) == (None, None, 30.0)
    later = dataclasses.replace(STATS, enqueued_total=120, acked_total=80)
    row = destination_row("d", later, (10.0, STATS), 14.0, NOW)
    assert (row.in_per_second, row.out_per_second) == (5.0, 0.0)


@pytest.mark.parametrize(("change", "state"), [
    ({"paused": True}, "paused"), ({"parked_until_time": NOW + timedelta(seconds=90)}, "parked 1m 30s"),
    ({"parked_until_time": NOW - timedelta(seconds=1)}, "waiting"), ({"messages": 0}, "empty"), ({"consumers": 0}, "no consumer"),
    ({}, "waiting"), ({"leased": 1}, "moving"), ({"acked_per_second": 1.0, "parked_tenants": 2}, "moving, 2 tenants gated")])
def test_the_state_is_the_first_thing_that_matters(change: dict[str, object], state: str) -> None:
    """As an operator would say it."""
    assert destination_row("d", dataclasses.replace(STATS, **change), None, 0.0, NOW).state == state  # type: ignore[arg-type]


def test_the_most_remarkable_comes_first() -> None:
    """Equals are in the order of their names."""
    rows = [Row("a", "", 1, 0), Row("c", "", 9, 0, 1.0, 1.0, oldest_age=5.0), Row("b", "", 9, 0, 3.0, None, oldest_age=7.0)]
    assert {sort: "".join(row.name for row in ranked(rows, sort)) for sort in Sort} == {
        Sort.AGE: "bca", Sort.BACKLOG: "bca", Sort.RATE: "bca", Sort.NAME: "abc"}


def test_keys_move_look_into_and_leave() -> None:
    """The marked row stays in the table."""
    rows = [Row("a", "", 1, 0), Row("b", "", 1, 0)]
    view = View(None, Sort.AGE)
    assert not view.press("up", rows) and view.chosen == 0
    for _ in range(3):
        view.press("down", rows)
    assert view.chosen == 1
    assert view.press("enter", rows) and (view.destination, view.chosen) == ("b", 0)
    assert not view.press("enter", []) and not view.press("s", []) and view.sort is Sort.AGE
    assert view.press("left", []) and view.destination is None
    assert [view.sort for _ in Sort if not view.press("s", rows)] == [Sort.BACKLOG, Sort.RATE, Sort.NAME, Sort.AGE]
    assert view.press("r", rows) and not view.press("x", rows)
    assert not View(None, Sort.AGE).press("enter", [])


def test_keys_without_a_character_have_names() -> None:
    """Several may come at once."""
    assert named(b"\x1b[A\x1bOBq\r\x1b") == ["up", "down", "q", "enter", "escape"]
    assert named(b"") == [] and named(b"\xff") == ["ÿ"]
