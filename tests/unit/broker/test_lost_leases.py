"""Which leases a consumer that subscribes again gives back: those that can never arrive, and no others."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from node_world import Context, World, payloads
from spillway.broker.runtime.calls import Call
from spillway.broker.runtime.shard import ShardRuntime
from spillway.broker.telemetry.meters import Meters
from spillway.cluster.machine import Role
from spillway.contract.limits import SETTLEMENTS_PER_REQUEST_MAX
from spillway.v1.queue_service_pb2 import (
    OUTCOME_RELEASE,
    Credit,
    HeldLease,
    LeasedMessage,
    LeasedRun,
    LeaseRequest,
    LeaseResponse,
    Settlement,
    Subscribe,
)

SESSION = "s1"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node that leads everything."""
    made = World(tmp_path)
    made.know("d")
    made.host.lead()
    yield made
    await made.forwarder.close()
    made.store.close()


class Stream(Context):
    """A Lease stream as the node sees it."""

    def __init__(self, world: World, messages: int = 1, **subscribe: object) -> None:
        self.runs: list[LeasedRun] = []
        self.room = asyncio.Event()  # clear: the client reads nothing
        self.room.set()
        self._first = LeaseRequest(subscribe=Subscribe(
            destinations=["d"], credit=Credit(messages=messages, bytes=1 << 20), **{"session": SESSION, **subscribe}))  # type: ignore[arg-type]
        self._end = asyncio.Event()
        self._task = asyncio.ensure_future(world.service.lease(self._requests(), self))

    async def _requests(self) -> AsyncIterator[bytes]:
        yield self._first.SerializeToString()
        await self._end.wait()

    async def write(self, frame: bytes) -> None:
        """As gRPC's context."""
        await self.room.wait()
        self.runs += LeaseResponse.FromString(frame).runs

    async def close(self) -> None:
        """The client hangs up."""
        self._end.set()
        await asyncio.wait_for(self._task, 5)

    async def cancel(self) -> None:
        """The client is gone."""
        self._task.cancel()
        await asyncio.wait((self._task,))


async def turns(world: World) -> None:
    """Everything that is under way comes to rest."""
    for _ in range(6):
        world.host.turn()
        for _ in range(6):
            await asyncio.sleep(0)


async def leased(world: World, stream: Stream, payload: bytes, key: str) -> LeasedRun:
    """Produces a message, which the stream gets."""
    await world.put("d", payload, key=key)
    await turns(world)
    assert payloads(stream.runs) == [payload]
    return stream.runs[0]


def live(world: World, run: LeasedRun) -> bool:
    """Whether a lease stands."""
    return run.fencing_token in world.node.shards[run.shard].state.leases


async def test_a_lease_of_a_stream_that_still_delivers_is_not_lost(world: World) -> None:
    """A consumer has a stream to each node. A lease that is on its way over one of them when another one is opened, so that it is
    not among the held, stays its own; once its stream has ended, it is given back."""
    first = Stream(world, stream=1)
    run = await leased(world, first, b"a", "1")
    second = Stream(world, messages=0, stream=2, streams_open=[1])
    await turns(world)
    assert live(world, run)
    third = Stream(world, messages=0, stream=3, streams_open=[2])
    await turns(world)
    assert not live(world, run)
    for one in (first, second, third):
        await one.close()


async def test_a_subscription_that_comes_late_takes_nothing_from_later_streams(world: World) -> None:
    """What was leased over a stream that the consumer opened after the one that subscribes now cannot be known to it."""
    later = Stream(world, stream=8)
    run = await leased(world, later, b"a", "1")
    earlier = Stream(world, messages=0, stream=7)
    await turns(world)
    assert live(world, run)
    for one in (later, earlier):
        await one.close()


async def test_a_consumer_that_counts_no_streams_has_one_at_a_time(world: World) -> None:
    """Without numbers, each stream takes the place of the one before: what that delivered and is not held was lost."""
    first = Stream(world, messages=2)
    await world.put("d", b"a", key="1")
    await world.put("d", b"b", key="2")
    await turns(world)
    assert sorted(payloads(first.runs)) == [b"a", b"b"]
    await first.close()
    world.now += 10
    held, lost = first.runs
    second = Stream(world, held=[HeldLease(shard=held.shard, fencing_token=held.fencing_token)])
    await turns(world)
    assert live(world, held) and not live(world, lost)
    assert [(r.key, r.messages[0].attempt) for r in second.runs] == [(lost.key, 1)]
    await second.close()


@pytest.mark.parametrize("session", ["", SESSION])
async def test_what_was_not_sent_to_a_client_that_is_gone_is_ready_again(world: World, session: str) -> None:
    """Of what it was being sent nobody knows whether it came."""
    gone = Stream(world, messages=9, session=session)
    gone.room.clear()
    await world.put("d", b"a", key="1")
    await turns(world)
    await world.put("d", b"b", key="2")
    await turns(world)
    await gone.cancel()
    await turns(world)
    other = Stream(world, messages=9, session="")
    await turns(world)
    assert payloads(other.runs) == [b"b"] and other.runs[0].messages[0].attempt == 1
    await other.close()


async def test_a_client_that_asks_for_no_more_gets_all_that_it_was_granted(world: World) -> None:
    """Also what was granted while something was being sent."""
    last = Stream(world, messages=9)
    last.room.clear()
    for key in "12":
        await world.put("d", key.encode(), key=key)
        await turns(world)
    closing = asyncio.ensure_future(last.close())
    await turns(world)
    last.room.set()
    await closing
    assert payloads(last.runs) == [b"1", b"2"]


async def test_nothing_is_granted_over_a_stream_that_another_one_took_the_place_of(world: World) -> None:
    """Though nobody has told the node yet that it is over."""
    first = Stream(world, messages=9, stream=1)
    beside = Stream(world, messages=0, stream=2, streams_open=[1])
    await turns(world)
    second = Stream(world, messages=9, stream=3, streams_open=[2])
    await turns(world)
    await leased(world, second, b"a", "1")
    assert not first.runs
    for one in (first, beside, second):
        await one.close()
    assert not world.node.lease_streams._sinks


async def test_a_stream_whose_client_takes_nothing_more_is_granted_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it cannot end, as its client does not read: its credit would be spent in vain, lease by lease."""
    first = Stream(world, messages=200, stream=1)
    first.room.clear()
    await world.put("d", b"a", key="1")
    await turns(world)
    second = Stream(world, messages=0, stream=2)
    granted: list[int] = []
    monkeypatch.setattr(ShardRuntime, "grant", lambda self, pick, messages, deadline: granted.append(messages))
    await turns(world)
    await world.put("d", b"b", key="2")
    await turns(world)
    assert not granted
    await first.cancel()
    await second.close()


async def test_what_is_given_back_to_a_leader_that_resigns_reaches_the_next_one(world: World) -> None:
    """Whether it waits, or this node had never heard of the lease, as the next leader granted it."""
    passed: list[tuple[int, int, int]] = []

    def pass_on(shard: int, call: Call, index: int, settlement: Settlement) -> None:
        passed.append((settlement.fencing_token, settlement.sequence, settlement.outcome))
        call.release()
    world.node.pass_on_settlement = pass_on
    stream = Stream(world, session="")
    run = await leased(world, stream, b"a", "1")
    other = LeasedRun(shard=run.shard, fencing_token=run.fencing_token + 1, messages=[LeasedMessage(sequence=5)])
    world.forwarder.give_back([run, other, LeasedRun(shard=99, messages=other.messages), LeasedRun(shard=run.shard)])
    world.node.shards[run.shard].role_changed(Role.FOLLOWER, 2, "n2")
    assert passed == [(run.fencing_token, run.messages[0].sequence, OUTCOME_RELEASE), (other.fencing_token, 5, OUTCOME_RELEASE)]
    await stream.cancel()


async def test_what_another_node_leads_is_given_back_there(world: World) -> None:
    """All of a shard in one request."""
    sent: list[list[Settlement]] = []
    world.node.shards[2].role_changed(Role.FOLLOWER, 2, "n2")
    world.forwarder.ack = lambda shard, call, settlements: sent.append(list(settlements.values()))  # type: ignore[assignment, method-assign]
    world.forwarder.give_back([LeasedRun(shard=2, fencing_token=t, messages=[LeasedMessage(sequence=5 + t)]) for t in (1, 2)])
    assert [[(s.shard, s.fencing_token, s.sequence, s.outcome) for s in one] for one in sent] == [
        [(2, 1, 6, OUTCOME_RELEASE), (2, 2, 7, OUTCOME_RELEASE)]]


async def test_what_is_given_back_fits_requests_and_is_nobodys_mistake(world: World) -> None:
    """However much it is; leases that are over meanwhile are not counted as settled too late."""
    sent: list[int] = []
    world.node.shards[2].role_changed(Role.FOLLOWER, 2, "n2")
    world.forwarder.ack = lambda shard, call, settlements: sent.append(len(settlements))  # type: ignore[assignment, method-assign]
    world.forwarder.give_back([LeasedRun(shard=2, fencing_token=t, messages=[LeasedMessage(sequence=t)]) for t in range(1, 10_000)])
    assert sum(sent) == 9_999 and max(sent) <= SETTLEMENTS_PER_REQUEST_MAX
    meters = world.node.meters = Meters()
    world.forwarder.give_back([LeasedRun(shard=1, fencing_token=5, messages=[LeasedMessage(sequence=5)])])
    await turns(world)
    assert meters.stale == 0
