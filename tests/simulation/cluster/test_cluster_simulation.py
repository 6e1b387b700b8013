"""Some seeds of the simulated cluster, the seeds that once found a bug, and what the simulation sees when a rule is broken."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.__main__ import REPLAY, some
from tests.simulation.cluster.mutations import first_failure
from tests.simulation.cluster.world import World

ROOT = Path(__file__).parents[3]


def _run(seeds: range) -> None:
    _, failures = some(seeds)
    assert not failures, "; ".join(f"{REPLAY.format(seed)}: {what[:300]}" for seed, what in failures)


@pytest.mark.parametrize("first", range(0, 30, 10))
def test_a_cluster_keeps_its_promises_whatever_fails(first: int) -> None:
    """I1 to I7 under every fault, and once faults end everything comes to rest, delivered."""
    _run(range(first, first + 10))


@pytest.mark.parametrize("seed", [
    22, 79,  # a deposed leader said that a lease was over which it had not heard of
    48,  # an outbox was put away by a checkpoint, and its copies stayed in it
    170,  # damage in the log was taken for its end
    6530,  # an operator's call met damage, and the node went on
    30978,  # a replica that was no member hid the leader from its node
    30101, 1656,  # a replica that was removed and not told stayed, for an entry that only it had
    630, 2252,  # a replica that was no member any more followed a dead leader, and its node sent everything there
    2007,  # a replica went by a membership that its leader could not commit, and was taken for a new member
    2839,  # a replica was dropped, dropped again after a crash, and made anew in between
    723,  # a node that had lost its disk was not allowed to say so, and looked after nothing else from then on
    3909,  # a checkpoint could not be stored, and a turn came before the node ended
    5248,  # an operator's question to a node that stopped ended in an error without a name
    618,  # a voter had its demotion before that was committed, and its vote was out of reach
    1255,  # a client took a node that had much to do for dead, and sent everything again, for ever
    1192,  # a client took a batch whose parts had changed places for one of a producer that is forgotten
    15572, 19484,  # not the product: a node stayed away while another one had forgotten the same shard
    301,  # a gate stayed half-open on a node without a message to probe with, and held up all others
])
def test_seeds_that_found_a_bug(seed: int) -> None:
    """They pass. A change of the simulation makes another run of a seed, so each bug has a test of its own, too."""
    _run(range(seed, seed + 1))


@pytest.mark.parametrize(("name", "rule"), [
    ("I1, answered before it is replicated", "I1"),
    ("I1, a backup of the last checkpoint", "I1"),
    ("I2, a run backwards", "I2"),
    ("I2, retries behind others", "I2"),
    ("I3, tokens used again", "I3"),
    ("I4, delivered after its acknowledgement", "I4"),
    ("I5, producers are forgotten", "I5"),
    ("I5, dedup ids are forgotten", "I5"),
    ("I6, a clock of one's own", "I6"),
    ("I7, a counter that is short", "I7"),
    ("client, other numbers for copies", "I5"),
    ("client, records overtake", "I2"),
    ("client, credit leaks", "progress"),
    ("client, nothing is said at the end", "left behind"),
    ("credit is spent twice", "credit"),
    ("what came too late is kept", "left behind"),
    ("a change is answered too early", "bug"),
])
def test_a_broken_invariant_is_seen(name: str, rule: str) -> None:
    """By its own checker, within forty seeds. They take one or two now, eighteen at most, but every change of the product deals the seeds
    anew."""
    found = first_failure(name, seeds=40, by=rule)
    assert found is not None and found[1] == rule, found


@pytest.mark.parametrize(("number", "applications"), [(5, False), (7, True)])
def test_a_seed_is_a_run(number: int, applications: bool) -> None:
    """Byte for byte the same trace, in processes that order their sets in different ways, and have run other seeds before or not."""
    command = [sys.executable, "-m", "tests.simulation", "--seed", str(number), "--trace"]
    traces = [subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
              for seed in ("1", "2")]
    assert traces[0] == traces[1] and traces[0].count(b"\n") > 100
    for seed in (number + 1, number):
        world = World(seed)
        world.run()
    assert world.options.applications is applications
    assert f"trace {world.digest};".encode() in traces[0]
