"""Refusals in the log: each kind once in a while, with how many there were, so that a flood of them fills no disk."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable

EVERY_SECONDS = 60.0  # between two lines of one kind
KINDS_MAX = 100  # with a line in that time; others are only counted
TEXT_CHARACTERS_MAX = 500


class Counter:
    """Which occurrences of a kind are worth a line. Not for threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}  # kind -> when it was said, how often it came since
        self._untold = 0

    def note(self, kind: str) -> int | None:
        """None if the occurrence is not worth a line; else how many there were without one since the last line of the kind, and of kinds
        that got none at all."""
        now = self._clock()
        at, count = self._said.get(kind, (float("-inf"), 0))
        if now - at < EVERY_SECONDS:
            self._said[kind] = at, count + 1
            return None
        if kind not in self._said and len(self._said) >= KINDS_MAX:
            self._untold += sum(n for t, n in self._said.values() if now - t >= EVERY_SECONDS)
            self._said = {old: seen for old, seen in self._said.items() if now - seen[0] < EVERY_SECONDS}
            if len(self._said) >= KINDS_MAX:
                self._untold += 1
                return None
        self._said[kind] = now, 0
        count, self._untold = count + self._untold, 0
        return count


class Refusals:
    """What was refused at one place."""

    def __init__(self, log: logging.Logger, where: str) -> None:
        self._log = log
        self._where = where
        self._counter = Counter()

    def note(self, why: str, kind: str = "") -> None:
        """Logs a refusal, unless one of its kind was logged lately. `kind`: what is the same about such refusals; by default the whole
        text."""
        count = self._counter.note(kind or why)
        if count is not None:
            self._log.warning("%s: refused: %s%s", self._where, why[:TEXT_CHARACTERS_MAX],
                              f" ({count} more that were not logged)" if count else "")
