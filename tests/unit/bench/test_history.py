"""The checker sees every fault that is injected, and no other."""
from __future__ import annotations

import pytest

from bench.history import Delivery, Verdict, judge

QUEUES = 3
SENT = [(number, number % QUEUES) for number in range(30)]


def deliveries() -> list[Delivery]:
    """All of them, in order."""
    return [Delivery(number, queue, 1 + queue % 2, 100 + number) for number, queue in SENT]


def test_clean() -> None:
    """Everything once and in order of its queue, queues in any order: nothing to report."""
    by_queue = sorted(deliveries(), key=lambda d: -d.queue)
    for arrived in (deliveries(), by_queue):
        assert judge(SENT, arrived) == Verdict(30, 30, 0, 0, 0, 0, 0)
        assert judge(SENT, arrived).clean


@pytest.mark.parametrize("position", [0, 13, 29])
def test_loss(position: int) -> None:
    """One missing, wherever it was."""
    arrived = deliveries()
    del arrived[position]
    verdict = judge(SENT, arrived)
    assert verdict == Verdict(30, 29, 1, 0, 0, 0, 0) and not verdict.clean


def test_reorder() -> None:
    """Two neighbours of a queue swapped: one was overtaken."""
    arrived = deliveries()
    arrived[4], arrived[4 + QUEUES] = arrived[4 + QUEUES], arrived[4]
    verdict = judge(SENT, arrived)
    assert verdict == Verdict(30, 30, 0, 0, 0, 1, 0) and not verdict.clean


def test_redelivery() -> None:
    """A lease that is handed out again from its start is no fault, but counted."""
    arrived = deliveries()
    arrived[10:10] = arrived[7:10]
    verdict = judge(SENT, arrived)
    assert verdict == Verdict(30, 30, 0, 3, 0, 0, 0) and verdict.clean


def test_stored_twice() -> None:
    """The same message under another sequence was stored twice, whether at once or late."""
    for position in (6, 30):
        arrived = deliveries()
        arrived.insert(position, arrived[5]._replace(sequence=777))
        verdict = judge(SENT, arrived)
        assert verdict == Verdict(30, 30, 0, 0, 1, 0, 0) and not verdict.clean


def test_misplaced() -> None:
    """From another queue than it was sent to, or never sent."""
    arrived = deliveries()
    arrived[3] = arrived[3]._replace(queue=1)
    arrived.append(Delivery(1000, 0, 1, 5000))
    verdict = judge(SENT, arrived)
    assert verdict == Verdict(30, 29, 1, 0, 0, 0, 2) and not verdict.clean
