"""Seeds of the simulation, and what it sees when a safety rule is off."""
from __future__ import annotations

import pytest
from spillway.cluster.errors import StoreRefused
from spillway.cluster.raft.journal import LogViolation

from tests.simulation.raft.checkers import Violation
from tests.simulation.raft.mutations import first_failure
from tests.simulation.raft.world import World

REPLAY = "python -m tests.simulation.raft --seed {}"
BATCH = 10


def _run(seeds: range) -> None:
    for seed in seeds:
        try:
            World(seed).run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}; replay: {REPLAY.format(seed)}") from error


@pytest.mark.parametrize("first", range(0, 40, BATCH))
def test_nothing_is_lost_whatever_fails(first: int) -> None:
    """Under every fault nothing acknowledged is lost and replicas agree; healed, the cluster goes on."""
    _run(range(first, first + BATCH))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 10_300, BATCH))
def test_nothing_is_lost_in_many_seeds(first: int) -> None:
    """As above, with more seeds."""
    _run(range(first, first + BATCH))


@pytest.mark.parametrize("name", [
    "release before sync",  # R2
    "compact applied",  # R5
    "apply again",  # R6
    "any epoch",  # R8
    "never trim", "trim without clamp", "trim without claim",  # R10
    "every vote",  # R11
    "forget install",  # R16
    "two changes", "change before no-op", "forget members", "learners count", "members stay", "snapshot without members",  # R17
    "wiped is fresh",  # R18
])
def test_a_missing_rule_is_seen(name: str) -> None:
    """Without the rule the simulation fails within two hundred seeds. Most take a few, the slowest some seventy: room is left, because
    every change of the product deals the seeds anew. Scenarios that chance hardly finds are in tests/unit/cluster/raft."""
    found = first_failure(name, seeds=200)
    assert found is not None and isinstance(found[1], (Violation, LogViolation, StoreRefused)), found


def test_a_seed_is_a_run() -> None:
    """The same seed does the same, so that a failure can be replayed."""
    counts = [World(5).run() for _ in range(2)]
    assert counts[0] == counts[1]
