"""Time as an argument: the only reader of the system's clocks in the cluster layer and in a node."""
from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from; a simulator brings its own."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""

    def unix_ms(self) -> int:
        """Milliseconds since 1970; an operator, or NTP, may set it back."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """See Clock."""
        return time.monotonic()

    def unix_ms(self) -> int:
        """See Clock."""
        return time.time_ns() // 1_000_000
