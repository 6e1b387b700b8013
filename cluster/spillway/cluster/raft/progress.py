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
    """Of log that one group keeps for followers that answer, but are behind: 2 s of a saturated network. For one that fetches a
    snapshot it keeps as much more as was sent of that: beyond it, sending the state again would cost less."""


class Progress:
    """One follower of one group."""

    __slots__ = ("_sent", "alive_until", "hold_index", "in_flight_bytes", "offering", "round", "snapshot_bytes")

    def __init__(self) -> None:
        self.round = 0  # grows with every reset acted upon: see guard
        self.in_flight_bytes = 0
        self._sent: deque[tuple[int, int]] = deque()  # (last index, bytes)
        self.offering = False  # it needs a snapshot
        self.lead()

    def lead(self) -> None:
        """A leadership begins: nothing is known of what the follower needs."""
        self.alive_until = 0.0  # the log is kept for it until then
        self.hold_index = 0  # from here on, within bounds; 0: not known
        self.snapshot_bytes = 0  # sent of the snapshot that it fetches

    def sent(self, last: int, size: int) -> None:
        """Entries up to `last` were sent."""
        self._sent.append((last, size))
        self.in_flight_bytes += size

    def answered(self, index: int) -> None:
        """The follower has everything up to `index`."""
        self.needs(index)
        sent = self._sent
        while sent and sent[0][0] <= index:
            self.in_flight_bytes -= sent.popleft()[1]

    def start_over(self) -> None:
        """What is under way no longer counts: a new round begins."""
        self.round += 1
        self._sent.clear()
        self.in_flight_bytes = 0

    def needs(self, index: int) -> None:
        """The follower goes on by the log, from behind the entry at `index`."""
        self.hold_index = index
        self.snapshot_bytes = 0

    def offer(self, first: int, durable: int, until: float) -> None:
        """The follower is behind the log, which begins at `first`. A snapshot is of `durable` or later, unless it is fetching one
        already, whose log is kept."""
        self.offering = True
        self.hold_index = self.hold_index if self.hold_index >= first else durable
        self.alive_until = max(self.alive_until, until)

    def exported(self, size: int, moment: int | None, until: float) -> None:
        """So many bytes of a snapshot were sent; with `moment`, the first ones of one as of that entry. Its transfer may break, and
        go on until then."""
        if moment is not None:
            self.hold_index, self.snapshot_bytes = moment, 0
        self.snapshot_bytes += size
        self.alive_until = until

    def offered(self) -> None:
        """The follower takes entries again."""
        self.offering = False
