"""What was sent against what was delivered: loss, duplicates, order. Pure."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Delivery(NamedTuple):
    """One delivered message: its number, given by the producer and ascending in each queue, the queue it came from, and
    its place in the broker's log (shard, sequence)."""

    number: int
    queue: int
    shard: int
    sequence: int


@dataclass(frozen=True)
class Verdict:
    """What a history shows. All but `redelivered` must be 0: a redelivery is what at-least-once delivery allows."""

    sent: int
    delivered: int  # different messages
    lost: int  # sent, never delivered
    redelivered: int  # delivered again, the same stored message
    stored_twice: int  # delivered again under another sequence
    reordered: int  # delivered for the first time after a later one of their queue
    misplaced: int  # in a queue where they were not sent to, or never sent at all

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, stored twice, reordered or misplaced."""
        return not (self.lost or self.stored_twice or self.reordered or self.misplaced)


def judge(sent: Iterable[tuple[int, int]], deliveries: Iterable[Delivery]) -> Verdict:
    """Compares (number, queue) pairs sent with deliveries in order of their arrival."""
    expected = dict(sent)
    places: dict[int, tuple[int, int]] = {}
    latest: dict[int, int] = {}
    redelivered = stored_twice = reordered = misplaced = 0
    for one in deliveries:
        if expected.get(one.number) != one.queue:
            misplaced += 1
            continue
        place = (one.shard, one.sequence)
        known = places.get(one.number)
        if known is not None:
            if known == place:
                redelivered += 1
            else:
                stored_twice += 1
            continue
        places[one.number] = place
        if one.number > latest.get(one.queue, -1):
            latest[one.queue] = one.number
        else:
            reordered += 1
    return Verdict(len(expected), len(places), len(expected) - len(places), redelivered, stored_twice, reordered, misplaced)
