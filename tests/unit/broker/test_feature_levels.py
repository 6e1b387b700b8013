"""What a node does about the cluster's feature level: when it rises, what waits for it, and who cannot follow."""
from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from spillway.broker.core import directory as d
from spillway.broker.core.features import LEVEL_MAX, MEMBERS, Range
from spillway.broker.errors import Unavailable
from spillway.broker.runtime.balance import Balance
from spillway.broker.runtime.meta import MetaRuntime
from spillway.cluster.errors import StoreRefused
from spillway.cluster.machine import Role


class Rows:
    """A group's rows, in memory, with what was stored and said in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.rows: dict[bytes, bytes] = {}

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """As GroupRows."""
        return iter(sorted(self.rows.items()))

    def commit(self, index: int, term: int, puts: list[tuple[bytes, bytes]], deletes: list[bytes], ranges: list[Any]) -> None:
        """As GroupRows."""
        self.rows.update(puts)
        self.events.append("stored")


def meta(rows: Rows) -> MetaRuntime:
    """The meta group on a node that leads it."""
    runtime = MetaRuntime("n1", rows, lambda: None)  # type: ignore[arg-type]
    runtime.role_changed(Role.LEADER, 1, "n1")
    return runtime


async def raised(runtime: MetaRuntime, level: int) -> None:
    """The level, through the log."""
    task = asyncio.ensure_future(runtime.raise_level(level))
    await asyncio.sleep(0)
    command = runtime.collect()
    assert command is not None
    runtime.apply(1, 1, command)
    await task


async def test_a_level_is_noted_before_it_is_stored() -> None:
    """Whoever starts an older version after a crash in between is told so, and meets nothing that it cannot read."""
    rows = Rows()
    runtime = meta(rows)
    runtime.level_changed = rows.events.append
    await raised(runtime, 2)
    assert rows.events == [2, "stored"] and runtime.feature(2)
    assert MetaRuntime("n1", rows, lambda: None).feature(2)  # type: ignore[arg-type]


async def test_a_level_that_is_not_known_ends_the_node() -> None:
    """It may have come while the node was replaced by an older version: nothing is stored."""
    rows = Rows()
    runtime = meta(rows)

    def refuse(level: int) -> None:
        raise StoreRefused("too high")
    runtime.level_changed = refuse
    with pytest.raises(StoreRefused):
        runtime.apply(1, 1, d.encode_command([d.Raise("n2", 1, 99)]))
    assert rows.rows == {} and rows.events == []


async def test_nothing_of_a_level_is_proposed_below_it() -> None:
    """Whatever asks for it: the last look is where it would be written."""
    runtime = meta(Rows())
    member = d.Member("n4", 0, "p:1", "c:1")
    for change in (runtime.put_member(member, True, False), runtime.drop_member("n4"), runtime.settle({1: ["n1"]})):
        with pytest.raises(Unavailable, match=f"at feature level 1, and this needs {MEMBERS}: upgrade every node"):
            await change
    assert runtime.collect() is None


def balance(peers: dict[str, Range | None], members: dict[str, int] | None = None, level: int = 1) -> tuple[Balance, list[int]]:
    """A leader n1 that knows the newest level, with peers that say what they know, None if there is no connection; and the levels that it
    asks for. `members`: what is to become of the nodes."""
    asked: list[int] = []

    async def raise_level(to: int) -> None:
        asked.append(to)

    directory = SimpleNamespace(level=level, members={
        n: d.Member(n, 0, "p:1", "c:1", leaving=leaving, feature_min=1, feature_max=LEVEL_MAX) for n, leaving in (members or {}).items()})
    hellos = {n: SimpleNamespace(feature_min=said.low, feature_max=said.high) for n, said in peers.items() if said is not None}
    node: Any = SimpleNamespace(
        config=SimpleNamespace(node_id="n1", peers=[]), members=dict.fromkeys(["n1", *peers]), features=Range(1, LEVEL_MAX),
        meta=SimpleNamespace(directory=directory, raise_level=raise_level), host=SimpleNamespace(hello_of=hellos.get),
        feature=lambda of: level >= of)
    return Balance(node), asked


OLD, NEW = Range(0, 0), Range(1, LEVEL_MAX)


@pytest.mark.parametrize(("peers", "members", "asked"), [
    ({"n2": NEW, "n3": NEW}, None, [LEVEL_MAX]),
    ({}, None, [LEVEL_MAX]),  # a cluster of one
    ({"n2": NEW, "n3": OLD}, None, []),
    ({"n2": NEW, "n3": None}, None, []),  # it may be of any version
    ({"n2": NEW, "n3": None}, {"n1": d.STAYS, "n2": d.STAYS, "n3": d.DRAINS}, []),  # whatever it said before
    ({"n2": NEW, "n3": None}, {"n1": d.STAYS, "n2": d.STAYS, "n3": d.GONE}, [LEVEL_MAX])])
async def test_the_level_rises_when_every_node_is_here_and_can_follow(
        peers: dict[str, Range | None], members: dict[str, int] | None, asked: list[int]) -> None:
    """By what present connections say. A node that is to go does not hold the others back."""
    leader, levels = balance(peers, members)
    await leader._raise_level()
    assert levels == asked


async def test_a_level_is_raised_once() -> None:
    """And is not touched by nodes that know less: those are refused."""
    leader, asked = balance({"n2": OLD}, level=LEVEL_MAX)
    await leader._raise_level()
    assert asked == []


@pytest.mark.parametrize(("peers", "says"), [
    ({"n2": OLD, "n3": None}, r"first upgrade every node; it waits for n2 \(knows up to level 1\), n3 \(does not answer\)"),
    ({"n2": NEW}, "it is about to be raised; try again")])
def test_who_changes_the_nodes_too_early_is_told_what_it_waits_for(peers: dict[str, Range | None], says: str) -> None:
    """Nothing else waits."""
    with pytest.raises(Unavailable, match=f"at feature level 1, and nodes join, drain and leave from {MEMBERS} on: {says}"):
        balance(peers)[0].check_members_change()
    balance(peers, level=MEMBERS)[0].check_members_change()
