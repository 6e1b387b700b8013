"""Who asks for leases: consumers, and the subscriptions that consumers with the same patterns share."""
from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spillway.broker.core.flows import Destination, Share

INTERNAL = b"\2"  # what names of the node's own destinations begin with; no pattern of a consumer's stands for one
USUAL_MS_MIN = 200.0  # below it, it does not matter how long leases are usually held
PROBES_PART = 8  # 1/8 of the credit is for probes of destinations that were down, also if nothing else is free
USE_MS = 1000  # over which the credit in use is averaged
USE_FADE_MS = 7000  # in which credit that was used and is not any more counts half

class Consumer:
    """One open Lease stream: what it wants and how much more it can take."""

    __slots__ = ("active", "bytes", "lease_ms", "messages", "name", "run_messages_max", "session", "sink", "subscription")

    def __init__(self, name: str, run_messages_max: int = 0, lease_ms: int = 0, session: str = "") -> None:
        self.name = name  # for people
        self.session = session  # names it across reconnects
        self.run_messages_max = run_messages_max  # 0: the destination's policy
        self.lease_ms = lease_ms  # 0: the destination's policy
        self.sink: object = None  # where its runs go
        self.messages = 0  # credit left; may be negative after a withdrawal raced with a grant
        self.bytes = 0
        self.active = False  # stands in its subscription's round
        self.subscription: Subscription | None = None

    def __repr__(self) -> str:
        return f"<Consumer {self.name!r}: credit {self.messages} messages, {self.bytes} bytes>"


class Subscription:
    """A set of destination patterns, shared by the consumers that asked for exactly this set. It has a virtual time
    of its own, and so each destination a start tag in each subscription: were the tag shared, a destination that one
    subscription has served for long would wait in another, younger one until that has caught up."""

    __slots__ = ("_use", "busy", "busy_ms", "busy_squares", "consumers", "free", "globs", "heap", "internal", "names", "patterns",
                 "probers", "probes", "queued", "round", "shares", "taken", "usual_ms", "variance", "virtual", "weights")

    def __init__(self, patterns: frozenset[str], internal: bool = False) -> None:
        self.patterns = patterns  # its key; no consumer's pattern has a NUL
        self.internal = internal
        if internal:
            patterns = frozenset(p.removeprefix("\0") for p in patterns)
        # Not a regular expression: with many stars, one that backtracks would never come to an end.
        self.globs = [tuple(part.encode() for part in p.split("*")) for p in sorted(patterns) if "*" in p and not internal]
        self.names = frozenset(p.encode() for p in patterns if internal or "*" not in p)
        self.consumers: set[Consumer] = set()
        self.round: deque[Consumer] = deque()  # those with credit
        self.free = 0  # messages of credit that its consumers have left
        self.taken = 0  # messages out
        self.heap: list[tuple[float, int, Destination]] = []
        self.queued: set[Destination] = set()
        self.probes = 0  # leases out that are probes of destinations
        self.probers: dict[Destination, None] = {}  # half open, and not in the heap until there are fewer probes; in order
        self.shares: dict[Destination, Share] = {}  # what each destination had of it
        self.weights = 0.0  # of these destinations
        self.virtual = 0.0
        self.usual_ms = USUAL_MS_MIN  # for how long its quicker destinations hold a lease, or this if that is less
        self.busy = 0  # credit times milliseconds of leases that did not hang, since
        self.busy_squares = 0  # the same with the squares of their credit
        self.busy_ms = 0
        self._use = 0.0
        self.variance = 0.0  # of `use`, if those leases begin at random moments: as of a compound Poisson process

    def matches(self, destination: bytes) -> bool:
        """Whether a destination's name is one of these, or fits one of the patterns."""
        if self.internal:
            return destination in self.names
        return not destination.startswith(INTERNAL) and (
            destination in self.names or any(_fits(parts, destination) for parts in self.globs))

    def probes_enough(self) -> bool:
        """Whether probes of destinations hold their part of the credit, and not less than what is free."""
        return self.probes >= self.free and self.probes * PROBES_PART >= self.free + self.taken

    def use(self, now_ms: int) -> float:
        """Messages of credit that leases which did not hang have used lately: the most of any second, fading."""
        elapsed = now_ms - self.busy_ms
        if elapsed >= USE_MS:
            fade: float = 0.5 ** (elapsed / USE_FADE_MS)
            self._use = max(self.busy / elapsed, self._use * fade)
            self.variance = max(self.busy_squares / elapsed, self.variance * fade)
            self.busy, self.busy_squares, self.busy_ms = 0, 0, now_ms
        return self._use


def _fits(parts: tuple[bytes, ...], name: bytes) -> bool:
    """Whether a name is these parts in order with anything between them. Taking each part where it first occurs leaves the
    most to those behind it, so one pass decides."""
    first, *middle, last = parts
    end = len(name) - len(last)
    at = len(first)
    if end < at or not name.startswith(first) or not name.endswith(last):
        return False
    for part in middle:
        at = name.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True
