"""How fast and how much at a time: token buckets, lease slots, and a limit that follows how a destination fares. Pure."""
from __future__ import annotations

import math

from spillway.broker.core.policy import Adaptive, Limit

FAILED_SHARE = 0.25  # of the deliveries in a window: beyond it the destination struggles; poison alone rarely makes so many
WELL_SHARE = 0.1  # up to it, it is well; between them the limit stays, or it would swing around what can be taken
WINDOW_MIN = 20  # deliveries that are judged together, at least; as many as leases are out at a time, if that is more
DECREASE = 0.7  # as in CUBIC (RFC 9438): on average nearer to what can be taken than with a half
UNBINDING = 4.0  # a limit so many times what is in use is none
FORGET_MS = 60_000  # after which a limit of a destination without deliveries is forgotten
_EPSILON = 1e-9


class Bucket:
    """A token bucket (as in Turner, "New directions in communications", 1986): `per_second` tokens a second, at most a burst
    of them. `share` is the part of rate and burst that is this node's."""

    __slots__ = ("at_ms", "burst", "rate", "tokens")

    def __init__(self, limit: Limit, now_ms: int) -> None:
        self.rate = limit.per_second / 1000
        self.burst = float(limit.burst) if limit.burst else max(1.0, limit.per_second)
        self.tokens = self.burst
        self.at_ms = now_ms

    def available(self, now_ms: int, share: float) -> int:
        """Whole tokens that are there now."""
        if now_ms > self.at_ms:
            self.tokens += (now_ms - self.at_ms) * self.rate * share
            self.at_ms = now_ms
        full = self.burst * share
        if self.tokens > full:
            self.tokens = full if full > 1.0 else min(self.tokens, 1.0)
        return self.whole()

    def whole(self) -> int:
        """What `available` said last, less what was taken since."""
        return int(self.tokens + _EPSILON) if self.tokens > 0 else 0  # there may be a debt

    def take(self, count: int) -> None:
        """Uses tokens up; may leave a debt."""
        self.tokens -= count

    def ready_ms(self, share: float) -> int:
        """When the next whole token is there."""
        return self.at_ms + max(1, math.ceil((1 - self.tokens) / (self.rate * share) - _EPSILON))

    def is_full(self, now_ms: int, share: float) -> bool:
        """Whether a new bucket would be just the same."""
        self.available(now_ms, share)
        return self.tokens >= max(1.0, self.burst * share) - _EPSILON


def slots(limit: int, share: float) -> int:
    """This node's part of a number of leases, at least one; 0: unlimited."""
    return max(1, int(limit * share + 0.5)) if limit else 0


class Congestion:
    """Additive increase, multiplicative decrease of the leases that are out at a time (Chiu and Jain, "Analysis of the
    increase and decrease algorithms for congestion avoidance", 1989), by the share of deliveries that fail.

    Deliveries are judged in windows, so that what fails together counts as one sign: as in TCP, what was out at a
    decrease says nothing about the new limit. It begins without a limit, and has none again once the limit has grown
    far beyond what is in use. While there is none, the first failure opens a window, and is not counted in it."""

    __slots__ = ("_bad", "_good", "_last_ms", "_since_ms", "_used", "limit", "policy", "watching")

    def __init__(self) -> None:
        self.policy = Adaptive()
        self.limit = math.inf
        self.watching = False  # wants to hear of successes, too
        self._good = self._bad = 0
        self._used = 0  # most leases that were out in this window
        self._since_ms = 0  # leases granted before this moment are not judged
        self._last_ms = 0  # the last judged one ended

    def follow(self, policy: Adaptive) -> None:
        """Takes on other bounds. What was learned stays, within them."""
        self.policy = policy
        if policy.disabled or policy.pinned:
            self.limit = math.inf
            self.watching = False
        self.limit = max(self.limit, float(policy.floor))

    def slots(self, share: float) -> int:
        """Leases that may be out at a time; 0: no limit."""
        if self.policy.pinned:
            return slots(self.policy.pinned, share)
        return 0 if self.limit == math.inf else max(1, int(self.limit))

    def settled(self, granted_ms: int, now_ms: int, held: int, failed: bool) -> None:
        """A lease is over, of `held` that were out with it. Successes need not be told while it is not `watching`."""
        if granted_ms < self._since_ms or self.policy.disabled or self.policy.pinned:
            return
        self._last_ms = now_ms
        if not self.watching:
            self.watching = True
            self._good = self._bad = self._used = 0
            return
        self._used = max(self._used, held)
        if failed:
            self._bad += 1
        else:
            self._good += 1
        judged = self._good + self._bad
        if judged < max(WINDOW_MIN, self._used):
            return
        bad, used = self._bad, self._used
        self._good = self._bad = self._used = 0
        if bad > judged * FAILED_SHARE:
            self.limit = max(float(self.policy.floor), min(self.limit, used) * DECREASE)
            self._since_ms = now_ms + 1
        elif self.limit != math.inf and bad <= judged * WELL_SHARE:
            # Only a limit that was reached has proved that more could be too much.
            self.limit = self.limit + 1 if used >= int(self.limit) else self.limit * 2
            if self.limit > used * UNBINDING and used < int(self.limit):
                self.limit = math.inf
        self.watching = self.limit != math.inf

    def idle(self, now_ms: int) -> bool:
        """Whether what is known is nothing, or old enough to be forgotten."""
        return not self.watching or now_ms - self._last_ms > FORGET_MS
