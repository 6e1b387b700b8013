"""Errors of the pure core.

CoreError
└── CorruptEntry   bytes that this software did not write, or a newer version did (ours: stop, never guess)
"""
from __future__ import annotations


class CoreError(Exception):
    """Base of the core's errors."""


class CorruptEntry(CoreError):
    """A log entry or a row does not decode."""
