"""What nodes tell each other: parts of limits, gates that others keep closed, budgets that count what is elsewhere."""
from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_world import Problem, World, payloads
from spillway.broker.core.policy import Limit, Policy, Retention
from spillway.broker.runtime import shares
from spillway.broker.runtime.shares import share
from spillway.peer.v1.share_service_pb2 import SharedScope, ShareRequest
from spillway.v1.queue_service_pb2 import OUTCOME_ACK, OUTCOME_DOWN

SECOND = 1000


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node of a cluster of three that leads everything."""
    made = World(tmp_path)
    made.node.members = dict.fromkeys(("n1", "n2", "n3"), next(iter(made.node.members.values())))
    made.know("d")
    made.host.lead()
    yield made
    await made.forwarder.close()
    made.store.close()


def tell(world: World, number: int, *scopes: SharedScope, node: str = "n2", asked: tuple[bytes, ...] = ()) -> Any:
    """Another node's part."""
    return world.node.shares.told(ShareRequest(node_id=node, number=number, scopes=scopes, asked=asked))


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=9))
def test_parts_of_a_limit_add_up_to_no_more_than_it(demands: list[float]) -> None:
    """Of the nodes that have work; one that has none keeps a little, so that it can start."""
    parts = [share(own, [d for j, d in enumerate(demands) if j != i and d > 0], len(demands)) for i, own in enumerate(demands)]
    working = [part for part, own in zip(parts, demands, strict=True) if own > 0]
    assert sum(working) <= 1 + 1e-9 and all(0 < part <= 1 for part in parts)
    if working:
        assert sum(working) == pytest.approx(1)
        assert min(working) >= shares.DEMAND_MIN / (1 + shares.DEMAND_MIN * len(working)) - 1e-9


async def test_a_gate_that_another_node_keeps_closed_is_closed_here(world: World) -> None:
    """Until that one says that it is open, or says nothing any more for a while."""
    consumer = world.consumer(100)
    tell(world, 1, SharedScope(scope=b"d", parked_until_unix_ms=world.now + 60 * SECOND))
    await world.put("d", b"x")
    assert not await world.take(consumer)
    tell(world, 2)
    assert not await world.take(consumer)
    tell(world, 3, SharedScope(scope=b"d", opened=True))
    assert payloads(await world.take(consumer)) == [b"x"]
    tell(world, 4, SharedScope(scope=b"d\0t", parked_until_unix_ms=world.now + 60 * SECOND))
    await world.put("d", b"y", key="other")
    assert not await world.take(consumer)
    world.now += shares.GATE_LINGER_MS + 1
    tell(world, 5)
    assert payloads(await world.take(consumer)) == [b"y"]


async def test_a_node_that_closed_a_gate_itself_probes_though_another_has_closed_it_too(world: World) -> None:
    """Or each would wait for the other."""
    consumer = world.consumer(100)
    await world.put("d", b"x")
    run, = await world.take(consumer)
    world.settle(run, OUTCOME_DOWN)
    until, _ = world.node.gates[b"d"]
    tell(world, 1, SharedScope(scope=b"d", parked_until_unix_ms=world.now + 60 * SECOND))
    world.tick(until - world.now)
    run, = await world.take(consumer)
    world.settle(run, OUTCOME_ACK)
    request = await world.node.shares.report()
    assert [(s.scope, s.opened) for s in request.scopes] == [(b"d", True)]


async def test_a_half_open_gate_without_a_probe_holds_up_no_other_node(world: World) -> None:
    """The node that closed it may have no message left to probe with: the others then go on, and find out for themselves."""
    consumer = world.consumer(100)
    await world.put("d", b"x")
    run, = await world.take(consumer)
    world.settle(run, OUTCOME_DOWN)
    world.node.scheduler.unsubscribe(consumer)

    async def closed() -> bool:
        report = await world.node.shares.report()
        return any(scope.scope == b"d" and scope.parked_until_unix_ms > world.now for scope in report.scopes)

    assert await closed()
    until, _ = world.node.gates[b"d"]
    world.tick(until - world.now + 1)
    assert await closed(), "a probe may come in a moment"
    world.tick(shares.PROBE_MS)
    assert not await closed()


async def test_a_gate_handed_over_stays_closed_until_the_new_keeper_speaks(world: World) -> None:
    """Its shard is led by another node now."""
    consumer = world.consumer(100)
    for key in range(20):
        await world.put("d", b"x", key=str(key))
    run, *others = await world.take(consumer)
    for other in others:
        world.settle(other)
    world.settle(run, OUTCOME_DOWN)
    shard = world.node.shards[run.shard]
    shard.leading = False
    world.node.forget_gates([b"d"])
    await world.put("d", b"y", key="0")
    await world.put("d", b"y", key="1")
    assert not await world.take(consumer)
    shard.leading = True


async def test_old_news_is_no_news(world: World) -> None:
    """A request that was overtaken, one of an unknown node, one of this node."""
    closed = SharedScope(scope=b"d", parked_until_unix_ms=world.now + 60 * SECOND)
    tell(world, 5)
    tell(world, 4, closed)
    tell(world, 9, closed, node="stranger")
    tell(world, 9, closed, node="n1")
    await world.put("d", b"x")
    assert payloads(await world.take(world.consumer(1))) == [b"x"]


async def test_a_budget_counts_what_others_have_until_they_fall_silent(world: World) -> None:
    """Bytes of the destination; those of a tenant are asked for."""
    world.know("d", policy=Policy(retention=Retention(bytes_max=1000), tenant_retention=Retention(bytes_max=500)))
    tell(world, 1, SharedScope(scope=b"d", message_bytes=950))
    with pytest.raises(Problem):
        await world.put("d", bytes(98))
    world.now += shares.FORGET_MS + 1
    await world.put("d", bytes(98))
    request = await world.node.shares.report()
    assert list(request.asked) == [b"d\0t"]
    assert [(s.scope, s.message_bytes) for s in request.scopes] == [(b"d", 100)]
    answer = tell(world, 2, asked=(b"d\0t", b"d\0nobody", b"d"))
    assert [(s.scope, s.message_bytes) for s in answer.scopes] == [(b"d\0t", 100)]


async def test_an_old_message_stops_producers_of_its_destination_or_tenant(world: World) -> None:
    """A budget of age."""
    world.know("d", policy=Policy(retention=Retention(age_ms_max=60 * SECOND), tenant_retention=Retention(age_ms_max=10 * SECOND)))
    await world.put("d", b"x")
    world.now += 11 * SECOND
    await world.node.shares.look_at_ages()
    with pytest.raises(Problem) as refused:
        await world.put("d", b"y")
    assert "tenant 't'" in refused.value.description and "longer than 10 s (retention.age_max)" in refused.value.description
    await world.put("d", b"y", tenant="other")
    world.now += 50 * SECOND
    await world.node.shares.look_at_ages()
    with pytest.raises(Problem) as refused:
        await world.put("d", b"y", tenant="third")
    assert "destination 'd'" in refused.value.description


async def test_a_limit_is_divided_as_others_tell_their_demand(world: World) -> None:
    """As soon as they do."""
    world.know("d", policy=Policy(limit=Limit(leases_max=10)))
    for key in range(30):
        await world.put("d", b"x", key=str(key))
    world.consumer(0)
    tell(world, 1, SharedScope(scope=b"d", demand=30.0))
    await world.node.shares.divide_limits()
    assert world.node.scheduler.leases_limit(b"d") == 5
    tell(world, 2, SharedScope(scope=b"d", demand=270.0))
    await world.node.shares.divide_limits()
    assert world.node.scheduler.leases_limit(b"d") == 1
