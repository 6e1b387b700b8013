"""Somebody who changes the members of groups all the time, beside the faults; with random numbers of its own."""
from __future__ import annotations

import random
from typing import Any, Protocol

from spillway.cluster.errors import ChangeRefused
from spillway.cluster.raft.configuration import Change, ChangeKind, Configuration
from spillway.cluster.raft.host import RaftHost
from spillway.cluster.raft.seam import LEADER

LEARNERS_MAX = 2


class Node(Protocol):
    """What is changed of a simulated node."""

    name: str
    alive: bool
    host: RaftHost

    def join(self, group: int) -> None:
        """Gets a replica, if it has none and can have one now."""

    def kick(self) -> None:
        """A turn comes soon."""


class Operator:
    """Adds, promotes, demotes and removes; gives members their replicas, and takes those of nodes that were removed and have not heard
    of it."""

    def __init__(self, world: Any, groups: list[int], voters_min: int) -> None:
        """Of these groups of a simulated world, raft's or the cluster's."""
        self._world = world
        self._groups = groups
        self._voters_min = voters_min
        self._nodes: dict[str, Node] = world.nodes
        self._rnd = random.Random(f"members {world.seed}")

    def start(self) -> None:
        """Goes on until the world is calm."""
        self._world.later(self._rnd.uniform(0.5, 3), self._step)

    def _step(self) -> None:
        world, rnd = self._world, self._rnd
        if world.calm:
            return
        world.later(rnd.expovariate(world.options.changes), self._step)
        number = rnd.choice(self._groups)
        if rnd.random() < 0.3:
            self.reconcile(number)
        leaders = [node for node in self._nodes.values() if node.alive and (group := node.host.groups.get(number)) is not None
                   and group.engine.state == LEADER]
        if not leaders:
            return
        leader = rnd.choice(leaders)
        for _ in range(rnd.choice((1, 1, 1, 2, 3))):  # more than one at once must be refused
            self._change(leader, number)

    def _change(self, leader: Node, number: int) -> None:
        world, rnd = self._world, self._rnd
        change = self._draw(leader.host.groups[number].configuration)
        if change is None or world.forgetful():
            return  # a change now could leave too few who remember
        if change.kind in (ChangeKind.REMOVE, ChangeKind.DEMOTE) and change.node_id == leader.name and rnd.random() < 0.8:
            leader.host.transfer(number)
            leader.kick()
            return
        joins = self._nodes[change.node_id]
        if change.kind is ChangeKind.ADD_LEARNER and rnd.random() < 0.5:
            joins.join(number)
        soon = rnd.uniform(0, 1)

        def done(what: int | ChangeRefused) -> None:
            if isinstance(what, ChangeRefused):
                world.counts[f"refused: {type(what).__name__}"] += 1
                return
            world.counts[f"members: {change.kind.value}"] += 1
            if change.kind is ChangeKind.ADD_LEARNER:
                world.later(soon, lambda: joins.join(number))
        leader.host.propose_change(number, change, done)
        leader.kick()

    def _draw(self, now: Configuration) -> Change | None:
        rnd = self._rnd
        others = [name for name in self._nodes if name not in now]
        kind = rnd.choice((ChangeKind.ADD_LEARNER, ChangeKind.PROMOTE, ChangeKind.PROMOTE, ChangeKind.REMOVE, ChangeKind.DEMOTE))
        if kind is ChangeKind.ADD_LEARNER:
            return Change(kind, rnd.choice(others)) if others and len(now.learners) < LEARNERS_MAX else None
        if kind is ChangeKind.PROMOTE:
            return Change(kind, rnd.choice(now.learners)) if now.learners else None
        if kind is ChangeKind.DEMOTE:
            able = now.voters if self._voters_min < len(now.voters) and len(now.learners) < LEARNERS_MAX else ()
            return Change(kind, rnd.choice(able)) if able else None
        able = now.learners if len(now.voters) <= self._voters_min else (*now.voters, *now.learners)
        return Change(kind, rnd.choice(able)) if able else None

    def reconcile(self, number: int) -> None:
        """Who is a member by the last committed configuration gets a replica; who is none loses the one that it has."""
        index, configuration = self._world.configurations.last(number)
        if configuration is None:
            configuration = Configuration.of(self._world.founders_of(number))
        for node in self._nodes.values():
            if node.name in configuration:
                node.join(number)
            elif node.alive and number in node.host.groups:
                upto = max(other.host.groups[number].engine.commit for other in self._nodes.values()
                           if other.alive and number in other.host.groups)
                node.host.drop_group(number, index, upto)
                node.kick()
