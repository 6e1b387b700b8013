"""Feature levels: what every node of a cluster must be able to read before any node writes it. Pure.

A row, a log entry or a call that an older node cannot read belongs to a level. Each node says which levels it can work at; the meta
group says at which level the cluster is (`directory.Raise`), and its leader raises that when every node can follow. It never goes
down: what was written at a level stays. `Node.feature` is the one question that code asks before it writes something of a level;
reading needs no question. docs/upgrade.md says how a format comes in.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Level(NamedTuple):
    """What one level is about."""

    since: str  # the first version that knows it
    brings: str


LEVELS = {
    1: Level("0.1.0", "everything that was there before levels were"),
    2: Level("0.2.0", "nodes join, drain and leave: the meta group's commands 6 to 9, and rows of nodes, homes, level and identity"),
    3: Level("0.3.0", "tokens of clients: the meta group's commands 10 and 11, and their rows"),
}
LEVEL_MIN, LEVEL_MAX = 1, 3  # at which this version can work; a node of LEVEL_MIN reads all that the cluster writes there
MEMBERS = 2  # the level of changes of the nodes
TOKENS = 3  # the level of tokens


class Range(NamedTuple):
    """The levels at which a node can work."""

    low: int
    high: int


def known(bound: int = 0) -> Range:
    """Those of this node. `bound`: its setting feature_level_max."""
    return Range(LEVEL_MIN, min(bound, LEVEL_MAX) if bound else LEVEL_MAX)


def said(low: int, high: int) -> Range:
    """Those of another node, as it says itself; nodes from before levels say nothing."""
    return Range(low or 1, high or 1)


def next_level(now: int, nodes: Iterable[Range]) -> int:
    """The highest level at which all nodes can work, and not below the one that it is now."""
    return max(now, min((node.high for node in nodes), default=now))


def refusal(level: int, node: Range) -> str:
    """Why a node cannot be in a cluster of this level, and what to do; empty if it can."""
    if node.low > level:
        return (f"the cluster is at feature level {level}, and this version works from {node.low} on: "
                "first run a version in between on every node")
    if node.high < level:
        newer = f"version {LEVELS[level].since} or newer" if level in LEVELS else "a newer version, as the other nodes do"
        return (f"the cluster is at feature level {level}; this version knows up to {node.high}, or its setting feature_level_max is "
                f"lower: run {newer}, without a lower feature_level_max")
    return ""
