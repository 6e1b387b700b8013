"""Refusals in the log: each kind once in a while, with how many there were, so that a flood of them fills no disk."""
from __future__ import annotations

import logging
import time

EVERY_SECONDS = 60.0  # between two lines that say the same
KINDS_MAX = 100  # different lines in that time; further ones are only counted
TEXT_CHARACTERS_MAX = 500


class Refusals:
    """What was refused at one port. Not for threads."""

    def __init__(self, log: logging.Logger, where: str) -> None:
        self._log = log
        self._where = where
        self._said: dict[str, tuple[float, int]] = {}  # kind -> when it was said, how often it came since
        self._untold = 0

    def note(self, why: str, kind: str = "") -> bool:
        """Counts a refusal, and logs it if none of its kind was for a while; true if it did. `kind`: what is the same about such
        refusals; by default the whole text."""
        kind, now = kind or why, time.monotonic()
        at, count = self._said.get(kind, (float("-inf"), 0))
        if now - at < EVERY_SECONDS:
            self._said[kind] = at, count + 1
            return False
        if kind not in self._said and len(self._said) >= KINDS_MAX:
            self._said = {old: seen for old, seen in self._said.items() if now - seen[0] < EVERY_SECONDS}
            if len(self._said) >= KINDS_MAX:
                self._untold += 1
                return False
        self._said[kind] = now, 0
        more = (f" ({count} more like it since the last time)" if count else "") + (
            f" ({self._untold} others were not logged)" if self._untold else "")
        self._untold = 0
        self._log.warning("%s: refused: %s%s", self._where, why[:TEXT_CHARACTERS_MAX], more)
        return True
