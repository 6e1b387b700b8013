"""What a node may say of leases while it thinks that it leads: another one may lead already, and know more."""
from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from node_world import World
from spillway.broker.runtime.calls import Call
from spillway.cluster.machine import Role
from spillway.v1.message_pb2 import ERROR_CODE_STALE_TOKEN
from spillway.v1.queue_service_pb2 import OUTCOME_ACK, OUTCOME_EXTEND, OUTCOME_RETRY, SETTLEMENT_RESULT_REFUSED, AckRequest, Settlement


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node that leads everything."""
    made = World(tmp_path)
    made.know("d")
    made.host.lead()
    yield made
    await made.forwarder.close()
    made.store.close()


def settle(world: World, outcome: int, **fields: Any) -> Call:
    """Of a lease that this node has never heard of."""
    settlement = Settlement(shard=1, fencing_token=77 << 20, sequence=76 << 20, outcome=outcome, **fields)  # type: ignore[arg-type]
    call: Call = world.service._settle(AckRequest(settlements=[settlement]).SerializeToString())
    return call


@pytest.mark.parametrize("outcome", [OUTCOME_ACK, OUTCOME_RETRY, OUTCOME_EXTEND])
async def test_only_the_log_says_that_a_lease_is_over(world: World, outcome: int) -> None:
    """Not what this node has applied so far: the lease may be a later leader's."""
    call = settle(world, outcome)
    assert not call.done.done()
    world.host.turn()
    assert call.done.done() and call.results == [SETTLEMENT_RESULT_REFUSED] and call.errors[0][1] == ERROR_CODE_STALE_TOKEN


@pytest.mark.parametrize("proposed", [False, True])
async def test_a_deposed_leader_passes_it_on(world: World, proposed: bool) -> None:
    """To whoever leads now, as it came."""
    passed: list[Settlement] = []
    world.node.pass_on_settlement = lambda shard, call, index, settlement: passed.append(settlement)
    retry = Settlement(reason="busy")
    retry.delay.FromMilliseconds(1500)
    calls = [settle(world, OUTCOME_ACK), settle(world, OUTCOME_RETRY, delay=retry.delay, reason="busy"), settle(world, OUTCOME_EXTEND)]
    if proposed:
        assert world.host.machines[1].collect() is not None
    world.host.machines[1].role_changed(Role.FOLLOWER, 2, "n2")
    assert [(s.shard, s.fencing_token, s.sequence, s.outcome, s.reason) for s in passed] == [
        (1, 77 << 20, 76 << 20, outcome, reason) for outcome, reason in (
            (OUTCOME_ACK, ""), (OUTCOME_RETRY, "busy"), (OUTCOME_EXTEND, ""))]
    assert [s.delay.ToMilliseconds() for s in passed] == [0, 1500, 0]
    assert not any(call.done.done() for call in calls)
