"""Time as an argument: the only reader of the system's clocks in the cluster layer."""
from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from; a simulator brings its own."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """See Clock."""
        return time.monotonic()
