"""Faults of the network."""
from __future__ import annotations

import time
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

from tests.torture.network import CLIENT, between
from tests.torture.proxy import Link
from tests.torture.world import World


@dataclass(frozen=True)
class Cut:
    """The leader of a shard, and with five nodes another one with it, are cut off from the other nodes: without a word, or by
    resets; the clients reach both sides, or the smaller one no more."""

    kind: ClassVar[str] = "cut"
    needs: ClassVar[str] = "network"
    pick: int
    mode: str
    clients: bool
    seconds: float

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.randrange(1 << 16), chance.choice(("drop", "drop", "refuse")), chance.random() < 0.5, chance.uniform(2.0, 10.0))

    def strike(self, world: World) -> None:
        """See Fault."""
        victim, shards = world.victim(self.pick)
        near = [victim, *[n for n in world.nodes.ids if n != victim][:(len(world.nodes.ids) - 1) // 2 - 1]]
        far = [n for n in world.nodes.ids if n not in near] + ([CLIENT] if self.clients else [])
        with world.fault(self.kind, shards, nodes=near, mode=self.mode, clients=self.clients, seconds=self.seconds):
            world.network.set([*between(near, far), *between(far, near)], self.mode)
            time.sleep(self.seconds)
            world.network.heal()
        world.recover()


@dataclass(frozen=True)
class OneWay:
    """The leader of a shard can be heard by the other nodes and hears nothing, or the other way round."""

    kind: ClassVar[str] = "one-way"
    needs: ClassVar[str] = "network"
    pick: int
    deaf: bool
    seconds: float

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.randrange(1 << 16), chance.random() < 0.5, chance.uniform(2.0, 10.0))

    def strike(self, world: World) -> None:
        """See Fault."""
        victim, shards = world.victim(self.pick)
        with world.fault(self.kind, shards, node=victim, deaf=self.deaf, seconds=self.seconds):
            world.network.set(between(world.nodes.ids, [victim]) if self.deaf else between([victim], world.nodes.ids), "drop")
            time.sleep(self.seconds)
            world.network.heal()
        world.recover()


@dataclass(frozen=True)
class Bad:
    """What the leader of a shard and all others send each other arrives late, or is lost now and then."""

    kind: ClassVar[str] = "bad"
    needs: ClassVar[str] = "network"
    pick: int
    mode: str
    seconds: float

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.randrange(1 << 16), chance.choice(("slow", "lossy")), chance.uniform(3.0, 10.0))

    def strike(self, world: World) -> None:
        """See Fault."""
        victim, shards = world.victim(self.pick)
        with world.fault(self.kind, shards, node=victim, mode=self.mode, seconds=self.seconds):
            world.network.set(_around(victim, world), self.mode)
            time.sleep(self.seconds)
            world.network.heal()
        world.recover()


@dataclass(frozen=True)
class Flapping:
    """The leader of a shard is cut off and connected again, several times."""

    kind: ClassVar[str] = "flapping"
    needs: ClassVar[str] = "network"
    pick: int
    mode: str
    times: tuple[tuple[float, float], ...]  # seconds: cut, connected

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.randrange(1 << 16), chance.choice(("drop", "refuse")),
                   tuple((chance.uniform(0.1, 1.5), chance.uniform(0.1, 1.0)) for _ in range(chance.randint(3, 8))))

    def strike(self, world: World) -> None:
        """See Fault."""
        victim, shards = world.victim(self.pick)
        with world.fault(self.kind, shards, node=victim, mode=self.mode, times=self.times):
            for cut, connected in self.times:
                world.network.set(_around(victim, world), self.mode)
                time.sleep(cut)
                world.network.heal()
                time.sleep(connected)
        world.recover()


def _around(node_id: str, world: World) -> list[Link]:
    """Everything between a node and the others, clients among them."""
    others = [CLIENT, *world.nodes.ids]
    return [*between([node_id], others), *between(others, [node_id])]
