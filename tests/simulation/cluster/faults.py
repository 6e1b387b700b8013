"""What goes wrong in a run, when, and for how long: drawn from the seed."""
from __future__ import annotations

import random
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.cluster.node import SimNode
    from tests.simulation.cluster.world import World


class Faults:
    """Of one run. Each method is a kind; it returns false if it has nothing to do."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rnd = world.rnd
        self.context: Context = copy_context()
        self._chance = random.Random(f"hang {world.seed}")
        # An operator that brings what a dead node lacks looks into it.
        self._hangs = not world.options.changes and self._chance.random() < 0.5

    def begin(self) -> None:
        """From now on things go wrong."""
        for kind, rate in self.world.options.faults.items():
            self._next(kind, rate)
        if self._hangs:
            self.world.later(self._chance.uniform(0, self.world.options.seconds), self._hang)

    def _hang(self) -> None:
        """A node hangs, and goes on at some time, or when faults end."""
        node = self.world.nodes[self._chance.choice(self.world.names)]
        if node.started and not self.world.calm:
            self.world.counts["fault: hang"] += 1
            node.hang()
            self.world.later(self._chance.uniform(2.0, 20.0), lambda: None if self.world.calm else node.recover())

    def _next(self, kind: str, rate: float) -> None:
        def strike() -> None:
            if not self.world.calm:
                if getattr(self, "_" + kind)():
                    self.world.counts[f"fault: {kind}"] += 1
                self._next(kind, rate)
        self.world.later(self.rnd.expovariate(rate), strike)

    def _note(self, kind: str, who: str) -> None:
        self.world.trace("fault", who, kind)

    def _node(self) -> SimNode:
        return self.world.nodes[self.rnd.choice(self.world.names)]

    def _pair(self) -> tuple[str, str] | None:
        if len(self.world.names) < 2:
            return None
        a, b = self.rnd.sample(self.world.names, 2)
        return a, b

    def _block(self, a: str, b: str) -> None:
        self.world.network.block(a, b)
        self.world.rpc.block(a, b)

    def _unblock(self, a: str, b: str) -> None:
        self.world.network.unblock(a, b)
        self.world.rpc.unblock(a, b)

    # -- network -------------------------------------------------------------------------------------------------

    def _drop(self) -> bool:
        """A connection breaks and comes back."""
        return self._split(0.01)

    def _partition(self) -> bool:
        """Two nodes do not reach each other for a while."""
        return self._split(self.rnd.uniform(0.2, 5.0))

    def _split(self, seconds: float) -> bool:
        pair = self._pair()
        if pair is None:
            return False
        self._note(f"split {seconds:.3f}", "-".join(pair))
        self._block(*pair)
        self.world.later(seconds, lambda: self._unblock(*pair))
        return True

    def _alone(self) -> bool:
        """A node does not reach any other."""
        node = self._node().name
        others = [n for n in self.world.names if n != node]
        if not others:
            return False
        self._note("alone", node)
        for other in others:
            self._block(node, other)
        self.world.later(self.rnd.uniform(0.5, 6.0), lambda: [self._unblock(node, other) for other in others])
        return True

    def _one_way(self) -> bool:
        """What one node sends to another vanishes, unnoticed, until the connection is found to be dead."""
        pair = self._pair()
        if pair is None:
            return False
        a, b = pair
        self._note("one way", f"{a}-{b}")
        self.world.network.cut(a, b)
        links = self.world.rpc.between(a, b)
        for link in links:
            link.lost.add(a)

        def found() -> None:
            self.world.network.disconnect(a, b)
            self.world.network.connect(a, b)
            for link in links:
                link.reset()
        self.world.later(self.rnd.uniform(0.2, 5.0), found)
        return True

    def _lag(self) -> bool:
        """One direction between two nodes is slow."""
        pair = self._pair()
        if pair is None:
            return False
        self._note("lag", "-".join(pair))
        self.world.lags[pair] = self.rnd.choice((0.05, 0.3, 1.5, 4.0))
        self.world.later(self.rnd.uniform(0.5, 6.0), lambda: self.world.lags.pop(pair, None))
        return True

    def _client_reset(self) -> bool:
        """A client's connection breaks."""
        links = [link for link in self.world.rpc.links.values() if link.client.name not in self.world.nodes]
        if not links:
            return False
        link = self.rnd.choice(links)
        self._note("reset", link.client.name)
        link.reset()
        return True

    def _client_silence(self) -> bool:
        """One direction of a client's connection goes dead, and only later the connection."""
        links = [link for link in self.world.rpc.links.values() if link.client.name not in self.world.nodes]
        if not links:
            return False
        link = self.rnd.choice(links)
        link.lost.add(self.rnd.choice((link.client.name, link.server.process.name)))
        self._note("silence", link.client.name)
        self.world.later(self.rnd.uniform(0.2, 8.0), link.reset)
        return True

    # -- processes -----------------------------------------------------------------------------------------------

    def _restart_later(self, node: SimNode) -> None:
        self.world.later(self.rnd.choice((0.05, 0.5, 3.0)) * self.rnd.uniform(0.5, 1.5), node.recover)

    def _kill(self) -> bool:
        """kill -9, or a power cut: what was not synced may be lost."""
        node = self._node()
        if not node.alive:
            return False
        self._note("kill", node.name)
        node.stop()
        self._restart_later(node)
        return True

    def _kill_leader(self) -> bool:
        """As `kill`, of a node that leads a shard."""
        leaders = [n for n in self.world.nodes.values() if n.started and any(r.leading for r in n.node.shards.values())]
        if not leaders:
            return False
        node = self.rnd.choice(leaders)
        self._note("kill", node.name)
        node.stop()
        self._restart_later(node)
        return True

    def _kill_all(self) -> bool:
        """All at once."""
        self._note("kill all", "")
        for node in self.world.nodes.values():
            if node.alive:
                node.stop()
                self._restart_later(node)
        return True

    def _pause(self) -> bool:
        """SIGSTOP, or a long collection of garbage."""
        node = self._node()
        if not node.started:
            return False
        self._note("pause", node.name)
        self.world.loop.pause(node.process, self.rnd.choice((0.1, 0.7, 2.0, 6.0)))
        return True

    def _restart(self) -> bool:
        """A planned restart: leaderships are handed over first."""
        node = self._node()
        if not node.started or node.process.paused_until > self.world.loop.now:
            return False
        self._note("restart", node.name)
        life = node.life
        self.world.loop.spawn(node.process, node.stop_gently())

        def again() -> None:
            if node.life == life:
                node.stop()
                node.recover()
        self.world.later(self.rnd.uniform(6.0, 8.0), again)
        return True

    def _transfer(self) -> bool:
        """Leaderships move."""
        node = self._node()
        if not node.started:
            return False
        moved = 0

        def move() -> None:
            nonlocal moved
            for group in list(node.host.groups):
                moved += node.host.transfer(group)
        node.process.context.copy().run(move)
        self._note("transfer", node.name)
        return moved > 0

    def _clock(self) -> bool:
        """The time of day jumps, ahead or back."""
        node = self._node()
        node.skew_ms += self.rnd.choice((-30_000, -3_000, -200, 200, 3_000, 30_000))
        self._note("clock", node.name)
        return True

    # -- disks ---------------------------------------------------------------------------------------------------

    def _slow_disk(self) -> bool:
        """Syncs take long."""
        node = self._node()
        node.io_factor = self.rnd.choice((10.0, 100.0, 1000.0))
        self._note("slow disk", node.name)
        self.world.later(self.rnd.uniform(0.5, 4.0), lambda: setattr(node, "io_factor", 1.0))
        return True

    def _sync_fails(self) -> bool:
        """A sync fails, and the process has to end."""
        node = self._node()
        if not node.started:
            return False
        self._note("sync fails", node.name)
        self.rnd.choice((node.disk, node.state_disk)).fails = True
        return True

    def _little_space(self) -> bool:
        """The disk is fuller than the node wants it to be."""
        node = self._node()
        self._note("little space", node.name)
        node.free_bytes = 1 << 20
        self.world.later(self.rnd.uniform(1.0, 5.0), self._freed(node))
        return True

    def _freed(self, node: SimNode) -> Callable[[], None]:
        def freed() -> None:
            node.free_bytes = 1 << 40
            node.disk.full = node.state_disk.full = False
        return freed

    def _no_space(self) -> bool:
        """Writes fail."""
        node = self._node()
        if not node.started:
            return False
        self._note("no space", node.name)
        self.rnd.choice((node.disk, node.state_disk)).full = True
        self.world.later(self.rnd.uniform(1.0, 5.0), self._freed(node))
        return True

    def _flipped_bit(self) -> bool:
        """A row that was synced cannot be read any more. One node at a time: replicas are the remedy."""
        node = self._node()
        if not self.world.may_wipe(node) or not node.whole:
            return False
        disk = self.rnd.choice((node.disk, node.state_disk))
        if not disk.durable:
            return False
        disk.bad.add(self.rnd.choice(sorted(disk.durable)))
        self._note("flipped bit", node.name)
        return True

    def _wipe(self) -> bool:
        """A node comes back without its disks."""
        node = self._node()
        if not self.world.may_wipe(node) or not node.whole:
            return False
        self._note("wipe", node.name)
        node.stop()
        node.wipe()
        self._restart_later(node)
        return True

    KINDS = ("drop", "partition", "alone", "one_way", "lag", "client_reset", "client_silence", "kill", "kill_leader", "kill_all",
             "pause", "restart", "transfer", "clock", "slow_disk", "sync_fails", "little_space", "no_space", "flipped_bit", "wipe")

    # -- the end -------------------------------------------------------------------------------------------------

    def end(self) -> list[SimNode]:
        """Everything is healed, but for a minority of nodes that stays away, dead or hanging: those are returned."""
        world = self.world
        world.lags.clear()
        world.rpc.blocked.clear()
        for i, a in enumerate(world.names):
            for b in world.names[i + 1:]:
                world.network.disconnect(a, b)
                world.network.unblock(a, b)
        for link in list(world.rpc.links.values()):
            if link.lost:
                link.reset()
        away = [node for node in world.nodes.values() if node.hangs]
        stay_so = away and self._can_do_without(away) and all(world.remembers(n) for n in world.nodes.values() if n not in away)
        if not stay_so:
            away = []
            if all(world.remembers(node) for node in world.nodes.values()) and self.rnd.random() < 0.5:
                for node in self.rnd.sample(list(world.nodes.values()), (len(world.names) - 1) // 2):
                    if self._can_do_without([*away, node]):
                        away.append(node)
        for node in world.nodes.values():
            node.io_factor = 1.0
            self._freed(node)()
            node.disk.fails = node.state_disk.fails = False
            if node in away and node.hangs:
                continue
            if node in away and node.started and self._hangs:
                node.hang()
            elif node in away or (node.damaged and world.may_wipe(node)):
                node.stop()
        world.counts["nodes left behind"] += len(away)
        world.counts["nodes left hanging"] += sum(node.hangs for node in away)
        for node in world.nodes.values():
            if node not in away:
                node.recover()
        return away

    def _can_do_without(self, nodes: list[SimNode]) -> bool:
        """Whether every group keeps a majority."""
        return all(2 * sum(node.name in group for node in nodes) < len(group) for group in self.world.voters())

    def replace_damaged(self) -> None:
        """What nobody has read yet: an operator's scrub finds it."""
        for node in self.world.nodes.values():
            if node.started and node.damaged and self.world.may_wipe(node):
                node.stop()
                node.recover()
