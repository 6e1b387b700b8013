"""The table from HTTP answers to outcomes."""
from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict
from spillway.client.dispatcher.outcome import Action, Failure, decide, retry_after

NOW = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110
IN_A_MINUTE = "Sun, 06 Nov 1994 08:50:37 GMT"


@pytest.mark.parametrize(("status", "header", "action", "delay"), [
    (200, None, Action.ACK, None),
    (201, None, Action.ACK, None),
    (202, "5", Action.ACK, None),
    (204, None, Action.ACK, None),
    (299, None, Action.ACK, None),
    (300, None, Action.REJECT, None),
    (301, "5", Action.DOWN, None),
    (302, None, Action.DOWN, None),
    (303, None, Action.REJECT, None),
    (304, None, Action.REJECT, None),
    (307, None, Action.DOWN, None),
    (308, None, Action.DOWN, None),
    (399, None, Action.REJECT, None),
    (400, None, Action.REJECT, None),
    (401, None, Action.REJECT, None),
    (404, "5", Action.REJECT, None),
    (408, None, Action.RETRY, None),
    (409, None, Action.REJECT, None),
    (410, None, Action.REJECT, None),
    (422, None, Action.REJECT, None),
    (425, None, Action.RETRY, None),
    (429, None, Action.THROTTLED, None),
    (429, "0", Action.THROTTLED, None),
    (429, "7", Action.THROTTLED, 7.0),
    (429, "nonsense", Action.THROTTLED, None),
    (429, IN_A_MINUTE, Action.THROTTLED, 60.0),
    (429, "86401", Action.THROTTLED, 86_400.0),
    (499, None, Action.REJECT, None),
    (500, None, Action.RETRY, None),
    (500, "9", Action.RETRY, None),
    (501, None, Action.RETRY, None),
    (502, None, Action.RETRY, None),
    (503, None, Action.RETRY, None),
    (503, "nonsense", Action.RETRY, None),
    (503, "3", Action.THROTTLED, 3.0),
    (503, "0", Action.THROTTLED, None),
    (503, IN_A_MINUTE, Action.THROTTLED, 60.0),
    (504, None, Action.RETRY, None),
    (599, None, Action.RETRY, None),
    (999, None, Action.RETRY, None),
    (100, None, Action.RETRY, None),
])
def test_statuses(status: int, header: str | None, action: Action, delay: float | None) -> None:
    """Every class of statuses, with and without Retry-After, has the outcome of the table."""
    headers = CIMultiDict({} if header is None else {"retry-after": header})
    outcome = decide(status, headers, None, NOW)
    assert (outcome.action, outcome.delay) == (action, delay)
    assert action is Action.ACK or str(status) in outcome.reason


@pytest.mark.parametrize(("failure", "action"), [
    (Failure.CONNECT, Action.DOWN),
    (Failure.CONNECT_TIMEOUT, Action.DOWN),
    (Failure.FORBIDDEN, Action.DOWN),
    (Failure.REDIRECT, Action.DOWN),
    (Failure.TIMEOUT, Action.RETRY),
    (Failure.BROKEN, Action.RETRY),
])
def test_failures(failure: Failure, action: Action) -> None:
    """What never reached the receiver parks the destination; what may have reached it is tried again."""
    outcome = decide(200, {}, failure, NOW, "SomeError")
    assert (outcome.action, outcome.delay) == (action, None)
    assert failure.value in outcome.reason and "SomeError" in outcome.reason


def test_every_failure_is_in_the_table() -> None:
    """No failure counts as success."""
    assert all(decide(200, {}, failure, NOW).action is not Action.ACK for failure in Failure)


@pytest.mark.parametrize(("value", "seconds"), [
    (None, None),
    ("", None),
    ("0", 0.0),
    ("120", 120.0),
    (" 120 ", 120.0),
    ("1.5", 1.5),
    ("-1", None),
    ("+1", None),
    ("1e3", None),
    ("inf", None),
    ("nan", None),
    ("٣", None),  # a digit, but not of ASCII
    ("9" * 40, 86_400.0),
    ("9" * 5000, None),
    ("soon", None),
    (IN_A_MINUTE, 60.0),
    ("Sunday, 06-Nov-94 08:50:37 GMT", 60.0),
    ("Sun Nov  6 08:50:37 1994", 60.0),
    ("Sun, 06 Nov 1994 08:48:37 GMT", 0.0),
    ("Sun, 06 Nov 1994 09:50:37 +0100", 60.0),
    ("Mon, 07 Nov 2094 08:49:37 GMT", 86_400.0),
    ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
    ("Sun, 99 Nov 1994 08:50:37 GMT", None),
    ("Sun, 06 Nov 10000 08:50:37 GMT", None),
    ("1994-11-06T08:50:37Z", None),
    ("Fri, ", None),
])
def test_retry_after(value: str | None, seconds: float | None) -> None:
    """Seconds and all HTTP date forms are understood, bounded to a day; anything else is as if it were not there."""
    assert retry_after(value, NOW) == seconds


DATE_PARTS = st.sampled_from([
    "Sun,", "Sunday,", "Sun", "06", "6", "99", "-1", "06-Nov-94", "Nov", "Foo", "1994", "0000", "0001", "9999", "99999999999",
    "08:49:37", "24:00:60", "99:99:99", "08:49", "8:49:37.5", "GMT", "EST", "-0000", "+9999", "+99999999999", "(c", "\0", ""])


@given(st.one_of(st.text(max_size=80), st.lists(DATE_PARTS, max_size=8).map(" ".join), st.from_regex(r"[-+0-9.eE_]{0,70}")),
       st.floats(0, 1e11))
def test_retry_after_never_fails(value: str, now: float) -> None:
    """Whatever a receiver writes there, it is a time to wait up to a day, or none."""
    seconds = retry_after(value, now)
    assert seconds is None or 0.0 <= seconds <= 86_400.0


@given(st.integers(0, 4_000_000_000), st.integers(0, 86_400), st.sampled_from([
    "%a, %d %b %Y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"]))
def test_all_dates_are_understood(now: int, wait: int, form: str) -> None:
    """A date within a day is that many seconds away, whichever form a server writes and whenever that is."""
    value = datetime.fromtimestamp(now + wait, UTC).strftime(form)
    assert retry_after(value, now) == wait


def test_dates_are_in_gmt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the dispatcher runs does not move the dates of the form without a zone."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert retry_after("Sun Nov  6 08:50:37 1994", NOW) == 60.0
    finally:
        monkeypatch.undo()
        time.tzset()
