"""Some faults on a small loaded cluster: the short version of `python -m tests.torture`."""
from __future__ import annotations

from pathlib import Path

from tests.torture.checker import judge
from tests.torture.faults import Fault, Kill, KillAll, KillConsumer
from tests.torture.history import read
from tests.torture.network import Loopback, Network, ProxyNetwork
from tests.torture.network_faults import Cut, OneWay
from tests.torture.run import KINDS, schedule
from tests.torture.world import World

PER_SECOND = 300.0


def strike(directory: Path, network: Network, *faults: Fault) -> World:
    """Inflicts faults on three nodes under load, lets everything be delivered, and ends; every promise was kept."""
    world = World(directory, 3, network, seed=1, per_second=PER_SECOND)
    try:
        world.start()
        for fault in faults:
            fault.strike(world)
        world.finish()
    finally:
        world.close()
    verdict = judge(read(directory))
    assert verdict.clean, verdict.examples
    assert verdict.stored >= verdict.delivered - verdict.unsure > 100
    return world


def test_killed_nodes_and_consumers_lose_nothing(tmp_path: Path) -> None:
    """kill -9 of a leader, of a consumer with leases, and of all nodes at once."""
    strike(tmp_path, Loopback(), Kill(3, at_once=False), KillConsumer(0), KillAll(0.0))


def test_a_network_that_loses_everything_loses_nothing(tmp_path: Path) -> None:
    """A leader that is cut off without a word, from clients and all, and one that is not heard."""
    strike(tmp_path, ProxyNetwork(), Cut(5, "drop", True, 2.0), OneWay(7, False, 2.0))


def test_a_plan_is_its_seeds() -> None:
    """A seed gives the same faults in the same order; every kind is in each round; another seed gives others."""
    def plan(seed: int) -> list[str]:
        faults = schedule(seed, list(KINDS))
        return [repr(next(faults)) for _ in range(3 * len(KINDS))]

    assert plan(1) == plan(1) != plan(2)
    faults = schedule(3, list(KINDS))
    assert {next(faults)[0].kind for _ in KINDS} == set(KINDS)
