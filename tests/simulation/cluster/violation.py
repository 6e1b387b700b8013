"""What a checker says."""
from __future__ import annotations


class Violation(Exception):
    """An invariant does not hold. `rule` is its name: I1 to I7, history, progress, bug."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule
