"""Errors of the pure core.

CoreError
└── CorruptEntry   bytes that this software did not write, or a newer version did (ours: stop, never guess)
"""
from __future__ import annotations

RUN_NEWER = ": a newer version wrote it; run that one"


def newer(version: int, newest: int) -> str:
    """What to do about something of a version that is not read, if a newer software wrote it."""
    return RUN_NEWER if version > newest else ""


class CoreError(Exception):
    """Base of the core's errors."""


class CorruptEntry(CoreError):
    """A log entry or a row does not decode."""
