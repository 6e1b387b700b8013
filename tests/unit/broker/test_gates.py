"""Gates of a node: closed as long as a shard that it leads says so, and no longer."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from spillway.broker.config import NodeConfig
from spillway.broker.core import scheduler as sched
from spillway.broker.core.entry import VERSION, Entry, encode_entry
from spillway.broker.runtime.node import Node
from spillway.cluster.machine import Role
from spillway.cluster.state_store import StateStore

SCOPE = b"d\0t"
FAR = 1 << 44  # ms since 1970: long after any test


class Host:
    """As RaftHost, without groups: the test is the consensus."""

    def __init__(self) -> None:
        self.machines: dict[int, Any] = {}

    def fatal(self, error: BaseException) -> None:
        """As RaftHost."""
        raise error

    def ended(self) -> list[int]:
        """As RaftHost."""
        return []

    def has_replica(self, number: int, founders: list[str]) -> bool:
        """As RaftHost."""
        return True

    def add_group(self, number: int, nodes: list[str], machine: Any) -> None:
        """As RaftHost."""
        self.machines[number] = machine

    def wake(self, number: int) -> None:
        """As RaftHost."""

    def on_leadership(self, callback: Any) -> None:
        """As RaftHost."""

    def leader_of(self, number: int) -> tuple[str | None, int]:
        """As RaftHost."""
        return None, 1


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node with replicas of two shards, leading neither."""
    store = StateStore(tmp_path / "state")
    node = Node(NodeConfig(data_dir=str(tmp_path), shards=2, replicas=1), store, Host(),  # type: ignore[arg-type]
                {1: ["n1"], 2: ["n1"]})
    yield node
    store.close()


def park(node: Node, *shards: int) -> None:
    """A scope is parked in some shards; then the node is made leader of all."""
    for shard in shards:
        node.shards[shard].apply(1, 1, encode_entry(Entry(VERSION, 1, gates=[(SCOPE, FAR, 1)])))
    for runtime in node.shards.values():
        runtime.role_changed(Role.LEADER, 2, "n1")


def lose(node: Node, shard: int) -> None:
    """Another node leads a shard from now on."""
    node.shards[shard].role_changed(Role.FOLLOWER, 3, "n2")


def parked(node: Node) -> bool:
    """Whether the node counts the scope as parked; the scheduler must agree."""
    assert (SCOPE in node.gates) == (node.scheduler.gate(SCOPE) == sched.CLOSED)
    return SCOPE in node.gates


def test_a_gate_goes_with_the_leadership_of_its_shard(node: Node) -> None:
    """Who leads the shard next keeps its gate; here nothing is parked any more, nor counted as such for ever."""
    park(node, 1)
    assert parked(node)
    lose(node, 1)
    assert not parked(node)


def test_a_gate_stays_while_another_shard_keeps_it(node: Node) -> None:
    """A scope parked by two shards stays parked when the node loses one of them."""
    park(node, 1, 2)
    lose(node, 1)
    assert parked(node)
    lose(node, 2)
    assert not parked(node)


def test_a_leader_that_comes_back_parks_again(node: Node) -> None:
    """The gate is the shard's: whoever leads it closes it, for as long as it said."""
    park(node, 1)
    lose(node, 1)
    node.shards[1].role_changed(Role.LEADER, 4, "n1")
    assert parked(node) and node.gates[SCOPE][0] == FAR
