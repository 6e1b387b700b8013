"""Faults of disks: full ones, and damaged files."""
from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

from tests.torture.damage import FILES, WAYS, Damage
from tests.torture.nodes import DISK_FREE_BYTES_MIN, Node, tail, until
from tests.torture.world import World

EXIT_DATA, EXIT_FATAL = 3, 70
REMEDIES = ("replace this node by an empty one", "name an empty one", "set it back", "start that node", "name another")
FULL_SECONDS = 15.0  # within which a node that cannot write has noticed; it may have had room enough, too


@dataclass(frozen=True)
class DiskFull:
    """The disk of one node, or of all, is nearly full, so that messages are refused, or has no byte left, so that nodes end; then it is
    freed, and who ended is started again."""

    kind: ClassVar[str] = "disk"
    needs: ClassVar[str] = "disk"
    pick: int
    everywhere: bool
    leave_bytes: int
    seconds: float

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.randrange(1 << 16), chance.random() < 0.4, chance.choice((DISK_FREE_BYTES_MIN // 2, 0)), chance.uniform(1.0, 4.0))

    def strike(self, world: World) -> None:
        """See Fault."""
        victim, shards = world.victim(self.pick)
        victims = world.nodes.ids if self.everywhere else [victim]
        with world.fault(self.kind, world.progress.shards if self.everywhere else shards, nodes=victims, leave_bytes=self.leave_bytes,
                         seconds=self.seconds):
            for node_id in victims:
                world.disks.fill(node_id, self.leave_bytes)
            world.in_effect()
            if not self.leave_bytes:
                deadline = time.monotonic() + FULL_SECONDS
                while any(world.nodes.nodes[n].running for n in victims) and time.monotonic() < deadline:
                    time.sleep(0.1)
            time.sleep(self.seconds)
            for node_id in victims:
                world.disks.free(node_id)
            for node_id in victims:
                node = world.nodes.nodes[node_id]
                if not node.running:
                    _explained(node, (EXIT_DATA, EXIT_FATAL), ("No space left on device",))
                    node.start()
        world.recover()


@dataclass(frozen=True)
class Damaged:
    """A file of a node is damaged while it is down. It starts and is as good as the others, or it refuses and says what to do, which is
    then done. After that another node is stopped, so that nothing goes on without the one that was damaged."""

    kind: ClassVar[str] = "damage"
    needs: ClassVar[str] = ""
    pick: int
    kill: bool
    damage: Damage
    seed: int

    @classmethod
    def planned(cls, chance: Random) -> Self:
        """See Fault."""
        return cls(chance.randrange(1 << 16), chance.random() < 0.5, Damage(chance.choice(list(FILES)), chance.choice(WAYS)),
                   chance.randrange(1 << 16))

    def strike(self, world: World) -> None:
        """See Fault."""
        victim, shards = world.victim(self.pick)
        node = world.nodes.nodes[victim]
        other = next(n for n in world.nodes.nodes.values() if n is not node)
        with world.fault(self.kind, shards, node=victim, damage=f"{self.damage.what}: {self.damage.way}") as at:
            if self.kill:
                node.kill()
            else:
                node.stop()
            world.wait_moving(shards, at)
            done = self.damage.inflict(node.data_dir, Random(self.seed))
            node.start()
            self._outcome(world, node, done)
            # What it holds may turn out to be damaged only when it is needed.
            with_it = time.monotonic()
            other.stop()
            try:
                until("the damaged node carries the others' shards, or ends",
                      lambda: not node.running or self._moving(world, with_it))
            finally:
                other.start()
            if not node.running:
                self._replace(world, node, f"{done}, found while it ran")
        world.recover()

    @staticmethod
    def _moving(world: World, since: float) -> bool:
        world.look()
        return world.progress.moving(world.progress.shards, since)

    def _outcome(self, world: World, node: Node, done: str) -> None:
        """It works, or it refuses and is replaced."""
        until(f"{node.node_id} at work or ended after {done}", lambda: not node.running or world.nodes.healthy())
        if node.running:
            world.notes.append(f"{done or 'nothing to damage'}: {node.node_id} goes on")
        else:
            self._replace(world, node, done)

    @staticmethod
    def _replace(world: World, node: Node, done: str) -> None:
        why = _explained(node, (EXIT_DATA,), REMEDIES)
        world.notes.append(f"{done}: {node.node_id} refused: {why}")
        shutil.rmtree(node.data_dir)
        node.start()
        until(f"{node.node_id} at work after it was replaced", world.nodes.healthy)


def _explained(node: Node, codes: tuple[int, ...], words: tuple[str, ...]) -> str:
    """The end of a node is one that an operator understands: returns what it said. Raises RuntimeError if it is not."""
    assert node.process is not None
    said = node.said()
    line = next((line for line in said.splitlines()[::-1] if any(word in line for word in words)), "")
    if node.process.returncode not in codes or not line or ("Traceback" in said and EXIT_FATAL not in codes):
        raise RuntimeError(f"{node.node_id} ended with {node.process.returncode}, and said neither why nor what to do:\n{tail(node)}")
    return line
