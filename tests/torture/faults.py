"""Faults of processes. Each is a plan, drawn from a seed, that can strike a world and is over when `strike` returns."""
from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Protocol, Self

from tests.torture.nodes import tail
from tests.torture.world import World

FREEZE_SECONDS = 5.0


class Fault(Protocol):
    """One fault."""

    kind: ClassVar[str]
    needs: ClassVar[str]
    """What it needs beside processes: "network", "disk", or nothing."""

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """One of the kind."""

    def strike(self, world: World) -> None:
        """Inflicts it, heals it, and waits until the cluster is as before. Raises TimeoutError or RuntimeError if that fails."""


@dataclass(frozen=True)
class Kill:
    """kill -9 of the leader of a shard. It is started again at once, or once the others have taken over."""

    kind: ClassVar[str] = "kill"
    needs: ClassVar[str] = ""
    pick: int
    at_once: bool

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.randrange(1 << 16), chance.random() < 0.3)

    def strike(self, world: World) -> None:
        """See Fault."""
        victim, shards = world.victim(self.pick)
        with world.fault(self.kind, shards, node=victim, at_once=self.at_once) as at:
            world.nodes.kill_at_once([victim])
            if not self.at_once:
                world.wait_moving(shards, at)
            world.nodes.nodes[victim].start()
            world.wait_moving(shards, at)
        world.recover()


@dataclass(frozen=True)
class KillAll:
    """kill -9 of all nodes at once."""

    kind: ClassVar[str] = "kill-all"
    needs: ClassVar[str] = ""
    down_seconds: float

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.choice((0.0, 0.0, 2.0)))

    def strike(self, world: World) -> None:
        """See Fault."""
        with world.fault(self.kind, world.progress.shards, down_seconds=self.down_seconds) as at:
            world.nodes.kill_at_once(world.nodes.ids)
            time.sleep(self.down_seconds)
            for node in world.nodes.nodes.values():
                node.start()
            world.wait_moving(world.progress.shards, at)
        world.recover()


@dataclass(frozen=True)
class Freeze:
    """SIGSTOP of the leader of a shard, and SIGCONT when its leases have expired and another one leads."""

    kind: ClassVar[str] = "stop"
    needs: ClassVar[str] = ""
    pick: int

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.randrange(1 << 16))

    def strike(self, world: World) -> None:
        """See Fault."""
        victim, shards = world.victim(self.pick)
        with world.fault(self.kind, shards, node=victim):
            world.nodes.signal(victim, signal.SIGSTOP)
            time.sleep(FREEZE_SECONDS)
            world.nodes.signal(victim, signal.SIGCONT)
        world.recover()


@dataclass(frozen=True)
class Rolling:
    """SIGTERM and start of one node after the other, as in an upgrade."""

    kind: ClassVar[str] = "rolling"
    needs: ClassVar[str] = ""

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls()

    def strike(self, world: World) -> None:
        """See Fault."""
        for node in world.nodes.nodes.values():
            shards = [shard for shard, leader in world.nodes.leaders().items() if leader == node.node_id]
            with world.fault(self.kind, shards, node=node.node_id) as at:
                code = node.stop()
                if code:
                    raise RuntimeError(f"{node.node_id} ended with {code} after SIGTERM:\n{tail(node)}")
                world.wait_moving(shards, at)
                node.start()
                world.nodes.wait_healthy()
        world.recover()


@dataclass(frozen=True)
class KillConsumer:
    """kill -9 of a consumer, which holds leases; another one takes its place."""

    kind: ClassVar[str] = "consumer"
    needs: ClassVar[str] = ""
    pick: int

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.randrange(1 << 16))

    def strike(self, world: World) -> None:
        """See Fault."""
        victim = world.consumers.pop(self.pick % len(world.consumers))
        with world.fault(self.kind, (), role=victim.role, name=victim.name) as at:
            victim.kill()
            world.start_consumer(victim.role)
            world.wait_moving(world.progress.shards, at)
