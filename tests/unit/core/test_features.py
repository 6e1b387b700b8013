"""Feature levels: when a cluster's rises, and who cannot be in it."""
from __future__ import annotations

import re

import pytest
from spillway.broker.core import features as f
from spillway.contract.version import VERSION

Range = f.Range


@pytest.mark.parametrize(("now", "nodes", "level"), [
    (1, [Range(1, 2), Range(1, 2)], 2),
    (1, [Range(1, 2), Range(1, 1), Range(1, 3)], 1),  # one is behind
    (2, [Range(1, 1), Range(1, 3)], 2),  # it never goes down
    (2, [Range(2, 5), Range(1, 4)], 4),  # several at once
    (3, [], 3)])
def test_the_level_is_one_that_all_nodes_know(now: int, nodes: list[Range], level: int) -> None:
    """As high as the last of them, and never lower than it was."""
    assert f.next_level(now, nodes) == level


def test_who_said_nothing_is_from_before_levels() -> None:
    """A missing field of a hello is 0."""
    assert f.said(0, 0) == Range(1, 1)
    assert f.said(2, 3) == Range(2, 3)


def test_an_operator_holds_a_node_back() -> None:
    """By a setting; more than it knows it never says."""
    assert f.known() == f.known(0) == f.known(99) == Range(f.LEVEL_MIN, f.LEVEL_MAX)
    assert f.known(1) == Range(f.LEVEL_MIN, 1)


@pytest.mark.parametrize(("level", "node", "says"), [
    (1, Range(1, 1), ""), (2, Range(1, 2), ""), (2, Range(2, 3), ""),
    (2, Range(1, 1), "is at feature level 2; this version knows up to 1, or its setting feature_level_max is lower: run version 0.2.0 or"),
    (99, Range(1, 2), "is at feature level 99; this version knows up to 2, .*: run a newer version, as the other nodes do"),
    (1, Range(2, 3), "is at feature level 1, and this version works from 2 on: first run a version in between on every node")])
def test_who_cannot_be_in_a_cluster_is_told_what_to_do(level: int, node: Range, says: str) -> None:
    """Too old, held back, or too new."""
    assert re.search(says, f.refusal(level, node)) if says else f.refusal(level, node) == ""


def test_the_table_is_complete() -> None:
    """Every level that this version can work at says since when it is known, and the newest one is no later than this version."""
    assert [*f.LEVELS] == [*range(f.LEVEL_MIN, f.LEVEL_MAX + 1)]
    since = [tuple(map(int, level.since.split("."))) for level in f.LEVELS.values()]
    assert since == sorted(since) and since[-1] <= tuple(map(int, VERSION.split(".")))
    assert f.MEMBERS in f.LEVELS
