"""What a leader knows of one follower, beside the library's next and match index.

Entries are sent ahead of answers, up to a window in bytes, so that a slow follower costs the leader no memory. Everything
here is forgotten when a leadership begins and when a connection does.
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a node's replicas, in bytes."""

    append: int = 1 << 20
    """Of entries in one message; at least one entry."""
    window: int = 2 << 20
    """Sent to one follower of one group and not answered."""
    tail: int = 2 << 20
    """Of one group's log in memory, beside what is not applied and synced yet."""
    keep: int = 16 << 20
    """Of log that all groups of the node keep for followers that are merely slow."""
    hold: int = 128 << 20
    """Of log that one group keeps for followers that fetch a snapshot: 2 s of a saturated network."""


class Progress:
    """One follower of one group."""

    __slots__ = ("_sent", "hold_index", "in_flight_bytes", "offer_until", "offering", "round")

    def __init__(self) -> None:
        self.round = 0  # grows with every reset acted upon: see guard
        self.in_flight_bytes = 0
        self._sent: deque[tuple[int, int]] = deque()  # (last index, bytes)
        self.offering = False  # it needs a snapshot
        self.offer_until = 0.0  # it is alive and may be fetching one until then
        self.hold_index = 0  # the log from here on is kept for it, within bounds

    def sent(self, last: int, size: int) -> None:
        """Entries up to `last` were sent."""
        self._sent.append((last, size))
        self.in_flight_bytes += size

    def answered(self, index: int) -> None:
        """The follower has everything up to `index`."""
        sent = self._sent
        while sent and sent[0][0] <= index:
            self.in_flight_bytes -= sent.popleft()[1]

    def start_over(self) -> None:
        """What is under way no longer counts: a new round begins."""
        self.round += 1
        self._sent.clear()
        self.in_flight_bytes = 0

    def offer(self, hold_index: int) -> None:
        """The follower is behind the log."""
        if not self.offering:
            self.offering = True
            self.hold_index = hold_index
            self.offer_until = 0.0

    def offered(self) -> None:
        """The follower takes entries again."""
        self.offering = False
