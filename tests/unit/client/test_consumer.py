"""The consumer against an in-process cluster that moves leaders, breaks streams, drains and takes leases away."""
from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from spillway.client import (
    Client,
    Closed,
    ConsumerState,
    Down,
    Gap,
    InternalError,
    InvalidArgument,
    LeasedRun,
    PermissionDenied,
    Producer,
    Record,
    Reject,
    Release,
    Retry,
    SpillwayError,
    StaleLease,
    Throttled,
)
from spillway.client import consumer as consumer_module
from spillway.client.retry import Backoff
from spillway.contract.hashing import queue_key, shard_of
from spillway.v1 import message_pb2 as m
from spillway.v1 import queue_service_pb2 as q

from tests.unit.client.fake_broker import FakeCluster
from tests.unit.client.serving import serving, until


async def send(client: Client, count: int, keys: int = 1, size: int = 0) -> None:
    """Fills destination d with messages 0, 1, ... over some keys."""
    async with client.producer() as producer:
        await producer.send_many([Record("d", b"%d" % i + bytes(size), key=str(i % keys)) for i in range(count)])


def committed(cluster: FakeCluster, outcome: int) -> int:
    """How many settlements of a kind were committed."""
    return sum(1 for one in cluster.settlements if one[0] == outcome)


async def test_messages_come_with_all_their_fields() -> None:
    """What was produced, and where it stands."""
    async with serving() as (cluster, client):
        async with client.producer() as producer:
            receipt = await producer.send("d", b"payload", tenant="t", key="k", headers={"a": "b"}, id="i")
        async with client.consumer("d", name="me") as consumer:
            message = await consumer.next_message(5)
            assert message is not None
            assert (message.destination, message.tenant, message.key, message.id) == ("d", "t", "k", "i")
            assert dict(message.headers) == {"a": "b"} and message.payload == b"payload"
            assert (message.shard, message.sequence, message.attempt) == (receipt.shard, receipt.sequence, 1)
            assert message.fencing_token > 0 and message.gap is None and message.enqueue_time.year == 1970
            await message.ack()
            assert not any(cluster.queues.values())
        (subscribe,) = cluster.nodes["n1"].subscriptions
        assert subscribe.local_only and subscribe.consumer == "me" and subscribe.session


async def test_each_queue_comes_in_order_from_all_nodes() -> None:
    """Three nodes, many queues: all arrive, each in order, and credit is never exceeded."""
    async with serving(3) as (cluster, client):
        await send(client, 500, keys=20)
        seen: dict[str, list[int]] = {}
        async with client.consumer(["nothing", "d*"], credit_messages=16) as consumer:
            async for message in consumer:
                async with message:
                    seen.setdefault(message.key, []).append(int(message.payload))
                if sum(map(len, seen.values())) == 500:
                    break
        assert all(got == sorted(got) for got in seen.values())
        assert not any(cluster.queues.values()) and not cluster.leases
        assert cluster.outstanding_high <= 16


@pytest.mark.parametrize("credit", [1, 2, 3, 5])
async def test_little_credit_serves_all_nodes(credit: int) -> None:
    """Fewer messages of credit than nodes: it goes round, nothing stalls, nothing more is out than allowed. A delivery that crossed a
    withdrawal by more than its rest is given back at once."""
    async with serving(3) as (cluster, client):
        await send(client, 60, keys=12)
        high, left = 0, 60
        async with client.consumer("d", credit_messages=credit) as consumer:
            while left > 0:
                run = await consumer.next_run(10)
                assert run is not None, f"it stalls, and {left} messages are left"
                high = max(high, len(consumer._live))
                left -= len(run)
                run.ack()
        given_back = sum(outcome == q.OUTCOME_RELEASE for outcome, _, _ in cluster.settlements)  # late for a withdrawal, on a busy machine
        assert high <= credit + given_back and cluster.outstanding_high <= credit + given_back
        assert not any(cluster.queues.values())


async def test_a_late_message_at_an_idle_node_does_not_wait_long() -> None:
    """With one credit that goes round, a message that comes after a long silence is there in a moment."""
    async with serving(3) as (_cluster, client), client.producer() as producer:
        async with client.consumer("d", credit_messages=1) as consumer:
            waits = []
            for i in range(12):
                await producer.send("d", b"x", key=str(i))
                started = asyncio.get_running_loop().time()
                message = await consumer.next_message(5)
                assert message is not None
                waits.append(asyncio.get_running_loop().time() - started)
                await message.ack()
        assert min(waits) < 1.0, waits  # 45 ms at most on an idle machine; how long they are in truth test_credits tells


@pytest.mark.parametrize(("raised", "outcome"), [
    (None, q.OUTCOME_ACK), (Retry(delay=1.0, reason="r"), q.OUTCOME_RETRY), (Throttled(delay=1.0), q.OUTCOME_THROTTLED),
    (Down(delay=1.0), q.OUTCOME_DOWN), (Reject("r"), q.OUTCOME_REJECT), (Release(), q.OUTCOME_RELEASE),
    (ValueError("broken"), q.OUTCOME_RETRY)])
async def test_the_block_decides_the_outcome(raised: Exception | None, outcome: int) -> None:
    """`async with message:` settles by how it ends, and keeps the exception."""
    async with serving() as (cluster, client):
        await send(client, 1)
        settlements: list[q.Settlement] = []

        def note(settlement: q.Settlement) -> None:
            settlements.append(settlement)

        cluster.refuse_settlement = note
        async with client.consumer("d") as consumer:
            message = await consumer.next_message(5)
            assert message is not None
            async with message:
                if raised is not None:
                    raise raised
            await until(lambda: settlements)
        assert settlements[0].outcome == outcome
        assert settlements[0].HasField("delay") == (getattr(raised, "delay", None) is not None)
        if isinstance(raised, ValueError):
            assert settlements[0].reason == "ValueError: broken"


async def test_a_cancelled_handler_gives_its_message_back() -> None:
    """Cancellation passes through the block and releases."""
    async with serving() as (cluster, client):
        await send(client, 1)
        async with client.consumer("d") as consumer:
            message = await consumer.next_message(5)
            assert message is not None
            with pytest.raises(asyncio.CancelledError):
                async with message:
                    raise asyncio.CancelledError
            await until(lambda: committed(cluster, q.OUTCOME_RELEASE))


async def test_an_outcome_chosen_inside_the_block_stands() -> None:
    """Whatever happens after it."""
    async with serving() as (cluster, client):
        await send(client, 1)
        async with client.consumer("d") as consumer:
            message = await consumer.next_message(5)
            assert message is not None
            async with message:
                await message.reject("no")
            assert [s[0] for s in cluster.settlements] == [q.OUTCOME_REJECT]


async def test_runs_are_settled_as_a_whole_or_by_prefix() -> None:
    """ack(upto) keeps the rest; retry ends the lease at the first unsettled message."""
    async with serving() as (_cluster, client):
        await send(client, 10)
        async with client.consumer("d") as consumer:
            run = await consumer.next_run(5)
            assert run is not None and len(run) == 10 and run.payloads[3] == b"3"
            await run.ack(run.messages[2])
            await run.ack(run.messages[4].sequence)
            assert consumer.credits.messages_out == 5
            await run.retry(delay=0.0, reason="try again")
            assert consumer.credits.messages_out == 0 or (await consumer.next_run(5)) is not None
            with pytest.raises(StaleLease):
                await run.ack()
            with pytest.raises(ValueError, match="not of"):
                LeasedRun.ack(run, 1) if not run.ended else run._position(1)


async def test_the_rest_of_a_run_comes_again_after_a_retry() -> None:
    """Order survives: the failed message comes first again, with attempt 2, then the others."""
    async with serving() as (_cluster, client):
        await send(client, 6)
        got: list[tuple[int, int]] = []
        async with client.consumer("d") as consumer:
            async for message in consumer:
                async with message:
                    got.append((int(message.payload), message.attempt))
                    if got[-1] == (2, 1):
                        raise Retry(delay=0.0)
                if len(got) == 7:
                    break
        assert got == [(0, 1), (1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (5, 1)]


async def test_messages_of_a_run_may_finish_in_any_order() -> None:
    """An ack goes out once all before it are done; awaiting it waits for that."""
    async with serving() as (cluster, client):
        await send(client, 4)
        async with client.consumer("d") as consumer:
            run = await consumer.next_run(5)
            assert run is not None
            messages = run.messages
            late = messages[2].ack()
            await messages[0].ack()
            assert not late.done and [s[0] for s in cluster.settlements] == [q.OUTCOME_ACK]
            await messages[1].ack()
            await late
            assert [s[2] for s in cluster.settlements] == [messages[i].sequence for i in range(3)]
            await messages[3].ack()
            assert not cluster.leases


async def test_an_early_nack_takes_later_outcomes_with_it() -> None:
    """What was done behind a failed message is delivered again; whoever awaits its ack hears StaleLease."""
    async with serving() as (_cluster, client):
        await send(client, 3)
        async with client.consumer("d") as consumer:
            run = await consumer.next_run(5)
            assert run is not None
            late = run.messages[2].ack()
            await run.messages[0].retry(delay=0.0)
            with pytest.raises(StaleLease):
                await late
            again = await consumer.next_run(5)
            assert again is not None and again.payloads == [b"0", b"1", b"2"]


async def test_a_lost_answer_to_an_ack_is_success() -> None:
    """The settlement is sent again and found to be done."""
    async with serving() as (cluster, client):
        await send(client, 5)
        cluster.nodes["n1"].swallow_acks = 2
        async with client.consumer("d") as consumer:
            run = await consumer.next_run(5)
            assert run is not None
            await run.ack()
        assert committed(cluster, q.OUTCOME_ACK) == 1 and not any(cluster.queues.values())


async def test_an_answer_to_something_else_fails_the_settlement() -> None:
    """A broken node's answer says nothing: it is not taken for a commit."""
    async with serving() as (cluster, client), client.producer() as producer:
        await producer.send("d", b"1")
        async with client.consumer("d") as consumer:
            run = await consumer.next_run(5)
            assert run is not None
            cluster.nodes["n1"].spoil_answers = 1
            with pytest.raises(InternalError, match="answered 0 items"):
                await run.ack()


async def test_a_settlement_follows_its_shard() -> None:
    """UNAVAILABLE at the old leader, committed at the new one; an ack and the retry behind it keep their order."""
    async with serving(2) as (cluster, client):
        for node in cluster.nodes.values():
            node.forwards = False
        async with client.consumer("d") as consumer:
            await until(lambda: consumer.state is ConsumerState.CONSUMING)
            await send(client, 4)
            run = await consumer.next_run(5)
            assert run is not None
            other = "n2" if cluster.leaders[run.shard] == "n1" else "n1"
            cluster.leaders[run.shard] = ""
            ack, retry = run.ack(run.messages[0]), run.retry(delay=0.0)
            await until(lambda: sum(n.ack_requests for n in cluster.nodes.values()) >= 2)
            assert not cluster.settlements
            await cluster.move(run.shard, other)
            await ack
            await retry
            assert [s[0] for s in cluster.settlements] == [q.OUTCOME_ACK, q.OUTCOME_RETRY]


async def test_a_stale_lease_is_raised_or_reported() -> None:
    """Awaited: StaleLease. Not awaited: on_stale. Either way its credit comes back."""
    async with serving() as (cluster, client):
        await send(client, 2, keys=2)
        stale: list[tuple[LeasedRun, SpillwayError]] = []
        async with client.consumer("d", on_stale=lambda run, error: stale.append((run, error))) as consumer:
            first, second = await consumer.next_run(5), await consumer.next_run(5)
            assert first is not None and second is not None
            cluster.expire()
            with pytest.raises(StaleLease):
                await first.ack()
            assert not stale
            second.ack()
            await until(lambda: stale)
            assert stale[0][0] is second and isinstance(stale[0][1], StaleLease)


async def test_leases_are_extended_until_settled() -> None:
    """At half of their time, in the background, with the duration that the consumer asked for."""
    async with serving() as (cluster, client):
        await send(client, 1)
        async with client.consumer("d", lease_seconds=1.0) as consumer:
            run = await consumer.next_run(5)
            assert run is not None
            before = run.expire_at
            await until(lambda: committed(cluster, q.OUTCOME_EXTEND) >= 1)
            await until(lambda: run.expire_at > before)
            assert 0.5 < run.seconds_left() <= 1.0
            await run.extend(5.0)
            assert run.seconds_left() > 4.5
            await run.ack()


async def test_a_lease_that_cannot_be_extended_is_reported() -> None:
    """The handler hears of it by on_stale, before it is done."""
    async with serving() as (cluster, client):
        await send(client, 1)
        stale: list[LeasedRun] = []
        async with client.consumer("d", lease_seconds=1.0, on_stale=lambda run, error: stale.append(run)) as consumer:
            run = await consumer.next_run(5)
            cluster.refuse_settlement = lambda s: m.ItemError(code=m.ERROR_CODE_STALE_TOKEN, description="gone")
            await until(lambda: stale)
            assert stale == [run] and run is not None and run.ended
            assert consumer.credits.messages_out == 0


async def test_extension_ends_at_lease_total_max(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that hangs does not keep its message for ever."""
    async with serving() as (cluster, client):
        await send(client, 1)
        async with client.consumer("d", lease_seconds=4.0, lease_total_max=0.1) as consumer:
            run = await consumer.next_run(5)
            assert run is not None
            await until(lambda: "lease_total_max" in caplog.text)
            assert committed(cluster, q.OUTCOME_EXTEND) == 0


async def test_closing_gives_back_what_was_not_handled() -> None:
    """Undelivered, unhandled and partly handled runs are released; nothing stays leased."""
    async with serving(2) as (cluster, client):
        await send(client, 100, keys=10)
        async with client.consumer("d") as consumer:
            message = await consumer.next_message(5)
            assert message is not None
            async with message:
                pass
            await until(lambda: len(consumer._live) == 10)
        assert not cluster.leases
        assert sum(len(v) for v in cluster.queues.values()) == 99
        assert consumer.state is ConsumerState.CLOSED
        with pytest.raises(Closed):
            await consumer.next_run(1)
        assert [x async for x in consumer.runs()] == [] and [x async for x in consumer] == []


async def test_iterating_ends_when_another_task_closes() -> None:
    """Waiting iterators end quietly."""
    async with serving() as (_cluster, client):
        consumer = client.consumer("d")

        async def iterate() -> int:
            return len([run async for run in consumer.runs()])

        tasks = [asyncio.create_task(iterate()) for _ in range(3)]
        await until(lambda: len(consumer._waiters) == 3)
        await consumer.close()
        assert await asyncio.gather(*tasks) == [0, 0, 0]


@pytest.mark.parametrize("greets", [True, False], ids=["open", "not yet open"])
async def test_what_is_on_its_way_to_a_consumer_that_closes_is_given_back(greets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node is told what has come, so that the rest is ready again at once, and not when its lease expires."""
    monkeypatch.setattr(consumer_module, "OPENING_SECONDS", 60.0)
    monkeypatch.setattr(consumer_module, "CLOSE_READ_SECONDS", 0.2 if greets else 5.0)
    async with serving() as (cluster, client):
        node = cluster.nodes["n1"]
        node.greets = greets
        async with client.consumer("d") as consumer:
            await until(lambda: bool(node.streams))
            assert not greets or await until(lambda: consumer.state is ConsumerState.CONSUMING) is None
            node.flowing.clear()
            await send(client, 3)
            await until(lambda: bool(cluster.leases))
        assert not cluster.leases and not cluster.settlements
        last = node.subscriptions[-1]
        assert (len(node.subscriptions), list(last.streams_open), last.credit.messages) == (2, [], 0)


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "hangs"])
async def test_a_consumer_that_closes_gives_back_what_an_old_leader_did_not_deliver(dies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes before it subscribes anew at the new leader, which is told all the same, once nothing comes from the old one any more."""
    monkeypatch.setattr(consumer_module, "CLOSE_READ_SECONDS", 0.2)
    async with serving(2) as (cluster, client):
        old, new = cluster.nodes.values()
        cluster.leaders = dict.fromkeys(cluster.leaders, old.name)
        await cluster.tell()
        async with client.consumer("d") as consumer:
            await until(lambda: consumer.state is ConsumerState.CONSUMING and not consumer._moved and consumer._resubscribe_timer is None)
            monkeypatch.setattr(consumer_module, "RESUBSCRIBE_SECONDS", 60.0)
            old.flowing.clear()
            await send(client, 3)
            await until(lambda: bool(cluster.leases))
            if dies:
                await old.stop()
            cluster.leaders = dict.fromkeys(cluster.leaders, new.name)
            await cluster.tell()
            await until(lambda: new.name in consumer._moved)
        assert not cluster.leases and not cluster.settlements


async def test_a_consumer_that_has_all_says_nothing_more_when_it_closes() -> None:
    """Its streams ended in order."""
    async with serving(2) as (cluster, client):
        await send(client, 3)
        async with client.consumer("d") as consumer:
            await until(lambda: consumer.state is ConsumerState.CONSUMING)
            assert await consumer.next_run(5) is not None
        assert not cluster.leases and [len(node.subscriptions) for node in cluster.nodes.values()] == [1, 1]


async def test_a_broken_stream_is_opened_again_with_what_is_held(caplog: pytest.LogCaptureFixture) -> None:
    """A restarted node gets the session's leases named: those are kept, lost ones are given back at once."""
    async with serving() as (cluster, client):
        await send(client, 2, keys=2)
        async with client.consumer("d") as consumer:
            runs = [await consumer.next_run(5), await consumer.next_run(5)]
            node = cluster.nodes["n1"]
            lost = next(iter(cluster.leases.values()))
            lost_run = next(r for r in runs if r is not None and r.fencing_token == lost.token)
            consumer._live.pop(lost_run)  # as if it had never arrived
            await node.stop()
            await until(lambda: consumer.state is ConsumerState.DEGRADED)
            await node.start()
            await until(lambda: consumer.state is ConsumerState.CONSUMING)
            again = await consumer.next_run(5)
            assert again is not None and again.key == lost_run.key
            held = node.subscriptions[-1].held
            assert len(held) == 1 and held[0].fencing_token != lost.token
            assert len([r for r in caplog.records if r.levelno == logging.WARNING and "lost its stream" in r.message]) == 1


async def test_a_shard_that_moves_is_consumed_at_its_new_leader() -> None:
    """And what the old leader granted without delivering is asked for there."""
    async with serving(2) as (cluster, client), client.producer() as producer, client.consumer("d") as consumer:
        await until(lambda: consumer.state is ConsumerState.CONSUMING)
        for shard in range(1, 5):
            await cluster.move(shard, "n2")
        await producer.send_many([Record("d", b"x", key=str(i)) for i in range(20)])
        got = 0
        while got < 20:
            run = await consumer.next_run(5)
            assert run is not None
            got += len(run)
            run.ack()
        await until(lambda: len(cluster.nodes["n2"].subscriptions) == 2)


@pytest.mark.parametrize("moves", [1, 2])
async def test_a_delivery_that_a_move_overtakes_is_no_lease(moves: int) -> None:
    """What an old leader granted and still brings, when the new one was asked for it already, is not handed out: that lease is
    given back, and somebody else may have the message. A shard that moves to and fro changes nothing of that."""
    async with serving(2) as (cluster, client), client.producer() as producer, client.consumer("d") as consumer:
        await until(lambda: consumer.state is ConsumerState.CONSUMING)
        shard, slow = 1, cluster.nodes["n1"]
        assert cluster.leaders[shard] == "n1"
        key = next(str(i) for i in range(100) if shard_of(queue_key("d", "", str(i)), 4) == shard)
        slow.flowing.clear()
        await producer.send("d", b"x", key=key)
        await until(lambda: cluster.leases)
        for leader in ("n2", "n1")[:moves]:
            opened = len(cluster.nodes[leader].subscriptions)
            await cluster.move(shard, leader)
            await until(lambda node=cluster.nodes[leader], n=opened: len(node.subscriptions) > n)  # type: ignore[misc]
        slow.flowing.set()
        run = await consumer.next_run(5)
        assert run is not None and (run.shard, run.fencing_token) in cluster.leases
        await run.ack()
        assert await consumer.next_run(0.2) is None and not cluster.leases


async def test_a_lease_that_arrives_after_its_end_is_not_handed_out() -> None:
    """A node that stood still delivers what it had granted before: somebody else has it by then."""
    async with serving() as (cluster, client), client.consumer("d") as consumer:
        await until(lambda: consumer.state is ConsumerState.CONSUMING)
        cluster.lease_ms = 50
        cluster.nodes["n1"].flowing.clear()
        await send(client, 1)
        await until(lambda: cluster.leases)
        late = next(iter(cluster.leases))
        await asyncio.sleep(0.06)  # its time passes
        cluster.expire()
        cluster.lease_ms = 30_000
        await cluster.pump()
        cluster.nodes["n1"].flowing.set()
        run = await consumer.next_run(5)
        assert run is not None and (run.shard, run.fencing_token) != late
        await run.ack()
        assert not consumer._live and consumer.credits.messages_out == 0


async def test_a_lease_that_seems_to_be_over_is_made_sure_of() -> None:
    """Where the client's clock is ahead of the broker's, every lease looks as if it had ended: it is extended, then handed out."""
    async with serving() as (cluster, client), client.consumer("d") as consumer:
        cluster.lease_ms = -10_000
        await send(client, 1)
        run = await consumer.next_run(5)
        assert run is not None and committed(cluster, q.OUTCOME_EXTEND)
        await run.ack()
        assert not consumer._live and consumer.credits.messages_out == 0


async def test_an_extension_counts_from_when_it_was_asked_for() -> None:
    """The answer may take its time; the broker counts from when it was asked, or later."""
    async with serving() as (cluster, client):
        await send(client, 1)
        async with client.consumer("d") as consumer:
            run = await consumer.next_run(5)
            assert run is not None
            cluster.refuse_settlement = lambda s: m.ItemError(code=m.ERROR_CODE_UNAVAILABLE)
            extension = run.extend(100.0)
            asked = consumer.time()
            await asyncio.sleep(0.2)
            cluster.refuse_settlement = lambda s: None
            await extension
            assert run.expire_at <= asked + 100.0


async def test_a_draining_node_is_left() -> None:
    """Its leases can be settled, and the consumer goes on elsewhere."""
    async with serving(2) as (cluster, client), client.producer() as producer, client.consumer("d") as consumer:
        await producer.send_many([Record("d", b"x", key=str(i)) for i in range(8)])
        runs = [await consumer.next_run(5) for _ in range(8)]
        await cluster.nodes["n1"].drain()
        for shard in range(1, 5):
            await cluster.move(shard, "n2")
        await until(lambda: not cluster.nodes["n1"].streams)
        for run in runs:
            assert run is not None
            await run.ack()
        await producer.send_many([Record("d", b"y", key=str(i)) for i in range(8)])
        for _ in range(8):
            run = await consumer.next_run(5)
            assert run is not None
            await run.ack()
        assert consumer.credits.messages_out == 0


async def test_acks_do_not_wait_for_credit() -> None:
    """All credit is used up by handlers that hang: the others' acks are committed."""
    async with serving() as (_cluster, client):
        await send(client, 4, keys=4)
        async with client.consumer("d", credit_messages=4) as consumer:
            runs = [await consumer.next_run(5) for _ in range(4)]
            assert runs[3] is not None
            await asyncio.wait_for(asyncio.ensure_future(runs[3].ack()), 5)


async def test_byte_credit_holds_messages_back_but_lets_large_ones_pass() -> None:
    """Messages larger than all the byte credit come one by one."""
    async with serving() as (_cluster, client):
        await send(client, 6, keys=6, size=5000)
        async with client.consumer("d", credit_bytes=1000) as consumer:
            for _ in range(6):
                run = await consumer.next_run(5)
                assert run is not None and len(consumer._live) == 1
                await run.ack()


async def test_a_surplus_delivery_is_given_back() -> None:
    """A lease that crossed a withdrawal by too much is released at once, uncounted."""
    async with serving() as (cluster, client), client.consumer("d", credit_messages=1) as consumer:
        await until(lambda: consumer.state is ConsumerState.CONSUMING)
        (stream,) = cluster.nodes["n1"].streams
        stream.messages += 1  # the node's own idea
        await send(client, 2, keys=2)
        run = await consumer.next_run(5)
        assert run is not None
        await until(lambda: committed(cluster, q.OUTCOME_RELEASE) and len(consumer._live) == 1)
        await run.ack()


async def test_gaps_are_told() -> None:
    """What went to the dead letters before a message."""
    async with serving() as (cluster, client), client.consumer("d") as consumer:
        await until(lambda: cluster.nodes["n1"].streams)
        run = q.LeasedRun(shard=1, fencing_token=9, expire_unix_ms=1 << 50, destination="d",
                          gap=q.Gap(count=2, first_sequence=3, last_sequence=4))
        run.messages.add(sequence=5, message=m.Message(payload=b"a"))
        run.messages.add(sequence=6, message=m.Message(payload=b"b"))
        cluster.nodes["n1"].streams[0].out.put_nowait(q.LeaseResponse(runs=[run]))
        got = await consumer.next_run(5)
        assert got is not None and got.messages[0].gap is not None
        assert got.messages[0].gap == Gap(2, 3, 4)
        assert got.messages[1].gap is None


@pytest.mark.parametrize(("options", "field"), [
    ({"destinations": []}, "destinations"), ({"destinations": ["a", ""]}, "destinations[1]"), ({"name": "\n"}, "name"),
    ({"credit_messages": 0}, "credit_messages"), ({"credit_messages": 1 << 17}, "credit_messages"),
    ({"credit_bytes": 0}, "credit_bytes"), ({"run_messages_max": 1025}, "run_messages_max"),
    ({"lease_seconds": 0.5}, "lease_seconds")])
async def test_wrong_options_are_refused(options: dict[str, object], field: str) -> None:
    """InvalidArgument names the option."""
    async with serving() as (_, client):
        with pytest.raises(InvalidArgument) as error:
            client.consumer(**{"destinations": "d", **options})  # type: ignore[arg-type]
        assert error.value.field == field


async def test_a_leader_that_cannot_be_reached_is_leased_from_through_another_node() -> None:
    """Its address does not answer from here: another node forwards, until it does."""
    async with serving(2) as (cluster, client):
        await send(client, 8, keys=8)
        dead = cluster.nodes["n1"]
        await dead.stop()
        async with client.consumer("d") as consumer:
            got = 0
            while got < 8:
                run = await consumer.next_run(8)
                assert run is not None
                await run.ack()
                got += len(run)
            assert not cluster.nodes["n2"].subscriptions[-1].local_only
            await dead.start()
            await until(lambda: consumer.state is ConsumerState.CONSUMING and consumer._forwarded is None)
            await send(client, 8, keys=8)
            for _ in range(8):
                run = await consumer.next_run(5)
                assert run is not None
                await run.ack()


async def test_a_node_that_is_back_is_leased_from_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it leads again: it is not waited for as after its last failure, and no other node is asked to stand in meanwhile, for which
    all streams would have to begin anew."""
    class Patient(Backoff):
        def next(self) -> float:
            return 60.0

    monkeypatch.setattr("spillway.client.consumer.FORWARD_SECONDS", 0.3)
    monkeypatch.setattr("spillway.client.consumer.Backoff", Patient)
    async with serving(2) as (cluster, client), client.consumer("d") as consumer:
        await until(lambda: consumer.state is ConsumerState.CONSUMING)
        stream = consumer._streams["n2"]
        for shard in range(1, 5):
            await cluster.move(shard, "n1")
        await cluster.nodes["n2"].stop()
        await until(lambda: stream.failing_since is not None)
        await asyncio.sleep(0.4)  # longer than a leader may be unreachable
        await cluster.nodes["n2"].start()
        for shard in range(1, 5):
            await cluster.move(shard, "n2")
        await send(client, 8, keys=8)
        for _ in range(8):
            run = await consumer.next_run(5)
            assert run is not None
            await run.ack()
        assert all(s.local_only for node in cluster.nodes.values() for s in node.subscriptions)


async def test_a_refused_subscription_is_raised() -> None:
    """Whoever iterates gets the broker's error, and nothing is tried again."""
    async with serving() as (cluster, client):
        cluster.nodes["n1"].refuse_lease = (grpc.StatusCode.PERMISSION_DENIED, "no right to lease d")
        async with client.consumer("d") as consumer:
            with pytest.raises(PermissionDenied, match="no right"):
                async for _ in consumer:
                    pass


async def test_several_tasks_share_a_consumer() -> None:
    """Each message goes to one of them."""
    async with serving(2) as (cluster, client):
        await send(client, 200, keys=50)
        got: list[bytes] = []
        async with client.consumer("d", credit_messages=20) as consumer:

            async def work() -> None:
                async for run in consumer.runs():
                    got.extend(run.payloads)
                    await run.ack()

            workers = [asyncio.create_task(work()) for _ in range(5)]
            await until(lambda: not any(cluster.queues.values()))
            await consumer.close()
            await asyncio.gather(*workers)
        assert sorted(map(int, got)) == list(range(200))


async def test_produce_and_consume_through_changing_leaders() -> None:
    """Leaders change all the time: everything arrives, in order, and redeliveries only follow lost leases."""
    async with serving(3) as (cluster, client), client.producer() as producer:
        for node in cluster.nodes.values():
            node.forwards = False
        done: dict[str, list[int]] = {str(k): [] for k in range(8)}

        async def feed(to: Producer) -> None:
            for i in range(150):
                await to.send_many([Record("d", b"%d" % i, key=str(k)) for k in range(8)])

        async def shuffle() -> None:
            for i in range(12):
                await asyncio.sleep(0.03)
                await cluster.move(1 + i % 4, f"n{1 + i % 3}")

        async with client.consumer("d", credit_messages=32) as consumer:
            tasks = [asyncio.create_task(feed(producer)), asyncio.create_task(shuffle())]
            async for run in consumer.runs():
                numbers = [int(p) for p in run.payloads]
                try:
                    await run.ack()
                except StaleLease:
                    continue
                done[run.key] += numbers
                if sum(map(len, done.values())) == 1200:
                    break
            await asyncio.gather(*tasks)
        assert all(numbers == list(range(150)) for numbers in done.values())


async def test_waits_that_end_without_a_run_leave_nothing_behind() -> None:
    """However often they do; and who waits then still gets what comes."""
    async with serving() as (_, client), client.consumer("d") as consumer:
        for _ in range(20):
            assert await consumer.next_run(timeout=0.001) is None
        assert not consumer._waiters
        first, second = (asyncio.create_task(consumer.next_run()) for _ in range(2))
        await until(lambda: len(consumer._waiters) == 2)
        first.cancel()
        await send(client, 1)
        run = await second
        assert run is not None and run.payloads == [b"0"] and not consumer._waiters
