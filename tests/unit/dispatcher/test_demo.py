"""The demo's own parts: its events are always the same, and its verifier catches what must not happen."""
from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from demo.events import EVENTS, Event, encode, generate, main, read, write
from demo.history import ACCEPTED, REFUSED, STALE, Arrival, History
from demo.verify import verify

KEYS = ("a", "b")


def produced(count: int) -> list[Event]:
    """Events 0, 2, 4, ... of key a, the others of key b."""
    return [Event(n, "t", KEYS[n % 2], b"event %d" % n) for n in range(count)]


def arrival(number: int, verdict: int = ACCEPTED, tenant: str = "t") -> Arrival:
    return Arrival(tenant, KEYS[number % 2], number, zlib.crc32(b"event %d" % number), verdict)


def arrivals(*numbers: int) -> list[Arrival]:
    return [arrival(number) for number in numbers]


def test_in_order() -> None:
    """All events once, each queue in order, queues in any order among themselves: passed."""
    report = verify(produced(6), arrivals(1, 3, 0, 5, 2, 4))
    assert report.passed and (report.arrived, report.duplicates, report.overtaken) == (6, 0, 0)


def test_loss() -> None:
    """An event that never arrived is lost, whether in the middle, which also breaks the order, or at the end."""
    report = verify(produced(6), arrivals(0, 1, 3, 5, 4))
    assert not report.passed and (report.lost, report.overtaken) == (1, 1)
    assert "never arrived: events 2" in report.examples
    report = verify(produced(6), arrivals(0, 1, 2, 3, 5))
    assert not report.passed and (report.lost, report.overtaken) == (1, 0)


def test_refused_is_not_arrived() -> None:
    """An event that was only ever refused is lost."""
    report = verify(produced(3), [*arrivals(0, 2), arrival(1, REFUSED)])
    assert not report.passed and (report.lost, report.refused) == (1, 1)


def test_reorder() -> None:
    """Two events of one queue swapped: caught, though none is lost."""
    report = verify(produced(6), arrivals(0, 4, 2, 1, 3, 5))
    assert not report.passed and report.lost == 0 and report.overtaken == 1


def test_duplicates() -> None:
    """A prefix delivered again, in order, is counted and allowed."""
    report = verify(produced(6), arrivals(0, 2, 1, 0, 2, 4, 3, 3, 5))
    assert report.passed and report.duplicates == 3


def test_overtaking_redelivery() -> None:
    """After a redelivery the queue goes on from there: skipping what had arrived before is out of order."""
    report = verify(produced(8), arrivals(0, 2, 4, 2, 6, 1, 3, 5, 7))
    assert not report.passed and report.overtaken == 1 and report.lost == 0


def test_retries() -> None:
    """A refused event may come again; nothing may come in its stead."""
    failed = arrival(2, REFUSED)
    assert verify(produced(6), [*arrivals(0), failed, failed, *arrivals(2, 4, 1, 3, 5)]).passed
    report = verify(produced(6), [*arrivals(0), failed, *arrivals(4, 2, 4, 1, 3, 5)])
    assert not report.passed and report.overtaken == 1


def test_stale() -> None:
    """What a receiver dropped for its old fencing token neither arrived nor broke the order."""
    report = verify(produced(6), [*arrivals(0, 2, 4, 1, 3), arrival(2, STALE), arrival(5)])
    assert report.passed and (report.stale, report.duplicates) == (1, 0)


def test_corrupt_and_misplaced() -> None:
    """A changed payload, another tenant's event and an event that nobody produced are caught."""
    good = arrivals(0, 1)
    assert not verify(produced(2), [good[0]._replace(checksum=1), good[1]]).passed
    report = verify(produced(2), [*good, arrival(0, tenant="u"), arrival(9)])
    assert not report.passed and report.misplaced == 2


def test_history_survives_the_wire() -> None:
    """A history read back is the history."""
    history = History()
    for item in (*arrivals(0, 2, 1), arrival(3, REFUSED, "Zoë"), arrival(3, STALE)):
        history.add(*item)
    again = History.load(history.dump())
    assert list(again) == list(history) and again.counts == history.counts == [3, 1, 1] and len(again) == 5


def test_events_are_deterministic(tmp_path: Path) -> None:
    """The same seed writes the same bytes, on every machine and version; another seed others."""
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    write(first, 500)
    assert main(["--events", "500", "--out", str(second)]) == 0
    write(other, 500, seed=7)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert hashlib.sha256(first.read_bytes()).hexdigest() == (
        "f795011d3573c6b64cb261df8f6eeb975aab927ce9fb767a26de7309b7f8d32d")


@pytest.mark.parametrize("count", [0, 1, 2_000])
def test_events_can_be_read(tmp_path: Path, count: int) -> None:
    """A file has as many events as asked for, and reading tells whose they are."""
    path = tmp_path / "events"
    write(path, count)
    events = read(path)
    assert [e.number for e in events] == list(range(count))
    for event, made in zip(events, generate(count), strict=True):
        assert event.line == encode(made) and event.key == made["userId"] and f"wk_{event.tenant}" == made["writeKey"]


def test_events_are_realistic() -> None:
    """The full set: calls of all three kinds, unique ids, time going forward, 200 tenants of very different sizes,
    users with enough events each for order to matter."""
    events = list(generate())
    assert len(events) == EVENTS == 20_000
    assert set(Counter(e["type"] for e in events)) == {"track", "identify", "page"}
    assert len({e["messageId"] for e in events}) == EVENTS
    assert all(str(a["timestamp"]) <= str(b["timestamp"]) for a, b in pairwise(events))
    tenants = Counter(e["writeKey"] for e in events)
    assert len(tenants) == 200
    assert max(tenants.values()) > 100 * min(tenants.values())
    users = Counter((e["writeKey"], e["userId"]) for e in events)
    assert EVENTS / len(users) > 5
    assert json.loads(encode(events[0])) == events[0]
