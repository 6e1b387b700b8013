"""What became of a message, as exceptions: raise one inside `async with message:` to choose the outcome.

They are no errors: nothing is logged, and they do not leave the `async with` block.
"""
from __future__ import annotations


class Outcome(Exception):
    """Base of the outcomes other than success."""

    def __init__(self, *, delay: float | None = None, reason: str = "") -> None:
        super().__init__(reason)
        self.delay = delay  # seconds; None takes the destination's backoff
        self.reason = reason


class Retry(Outcome):
    """It failed: counts an attempt, delivered again after `delay`."""


class Throttled(Outcome):
    """The destination asked this tenant to slow down: no attempt counted, the tenant is parked for `delay`."""


class Down(Outcome):
    """The destination is down: no attempt counted, the destination is parked for `delay`."""


class Reject(Outcome):
    """It can never be delivered: to the dead letters, now."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason=reason)


class Release(Outcome):
    """Give it back: no attempt counted, ready at once."""

    def __init__(self) -> None:
        super().__init__()
