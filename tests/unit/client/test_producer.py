"""The producer against an in-process cluster that moves leaders, breaks streams and refuses records."""
from __future__ import annotations

import asyncio

import pytest
from spillway.client import (
    BufferFull,
    Client,
    Closed,
    DestinationNotFound,
    InternalError,
    InvalidArgument,
    OutcomeUnknown,
    PartialFailure,
    Record,
    ResourceExhausted,
    SendTimeout,
    Unavailable,
    streams,
)
from spillway.contract.hashing import queue_key, shard_of
from spillway.v1 import message_pb2 as m

from tests.unit.client.fake_broker import FakeCluster
from tests.unit.client.serving import serving, until


def shard(destination: str, key: str = "", shards: int = 4) -> int:
    """Where a queue lives."""
    return shard_of(queue_key(destination, "", key), shards)


def key_of(wanted: int, shards: int = 4) -> str:
    """A key of destination "d" that lives on a shard."""
    return next(str(i) for i in range(1000) if shard("d", str(i), shards) == wanted)


async def test_a_record_arrives_with_all_its_fields() -> None:
    """Tenant, key, headers, id and delay reach the broker as given; the receipt names shard and sequence."""
    async with serving() as (cluster, client), client.producer() as producer:
        receipt = await producer.send("d", b"\x00payload", tenant="t", key="k", headers={"a": "ä"}, id="event-1", delay=1.5)
        (record,) = cluster.nodes["n1"].requests[0].records
        assert (record.destination, record.tenant, record.key, record.producer_sequence) == ("d", "t", "k", 1)
        assert record.delay.ToMilliseconds() == 1500
        assert record.message == m.Message(id="event-1", headers={"a": "ä"}, payload=b"\x00payload")
        assert receipt.shard == shard_of(queue_key("d", "t", "k"), 4)
        assert receipt.sequence > 1 and not receipt.duplicate


async def test_records_go_straight_to_their_leaders() -> None:
    """No node has to forward anything."""
    async with serving(3) as (cluster, client), client.producer() as producer:
        for node in cluster.nodes.values():
            node.forwards = False
        receipts = await producer.send_many([Record("d", b"%d" % i, key=str(i)) for i in range(200)])
        assert len(receipts) == 200
        for node in cluster.nodes.values():
            for request in node.requests:
                for record in request.records:
                    assert cluster.leaders[shard("d", record.key)] == node.name
        assert sum(len(r.records) for n in cluster.nodes.values() for r in n.requests) == 200


async def test_sends_before_the_first_topology_are_not_overtaken() -> None:
    """By one that is made just as it arrives, before they have gone on."""
    async with asyncio.timeout(20):
        cluster = await FakeCluster().start()
        async with Client(cluster.addresses) as client, client.producer() as producer:
            sends = [asyncio.ensure_future(producer.send("d", b"%d" % i)) for i in range(10)]

            def arrived(old: object, new: object) -> None:
                if len(sends) == 10:
                    sends.extend(asyncio.ensure_future(producer.send("d", b"%d" % i)) for i in range(10, 20))

            client._router.watch.listen(arrived)
            await until(lambda: len(sends) == 20)
            await asyncio.gather(*sends)
            assert cluster.stored("d") == [b"%d" % i for i in range(20)]
        await cluster.stop()


async def test_a_send_that_does_not_wait_overtakes_none_that_waited_for_the_topology() -> None:
    """It is turned away until those have gone on, as it is before the topology came."""
    async with asyncio.timeout(20):
        cluster = await FakeCluster().start()
        async with Client(cluster.addresses) as client, client.producer() as producer:
            sends = [asyncio.ensure_future(producer.send("d", b"%d" % i)) for i in range(3)]
            refused = []

            def arrived(old: object, new: object) -> None:
                if not refused:
                    with pytest.raises(Unavailable) as error:
                        producer.send_nowait("d", b"early")
                    refused.append(error)

            client._router.watch.listen(arrived)
            await asyncio.gather(*sends)
            assert refused
            await producer.send_nowait("d", b"last")
            assert cluster.stored("d") == [b"0", b"1", b"2", b"last"]
        await cluster.stop()


async def test_sends_that_wait_for_the_buffer_are_not_overtaken() -> None:
    """By one that is made in the moment in which there is room for both."""
    async with serving() as (cluster, client), client.producer(in_flight_bytes_max=3000) as producer:
        async def one_after_the_other() -> None:
            await producer.send("d", b"0" + bytes(2700))
            await producer.send("d", b"2")

        first = asyncio.ensure_future(one_after_the_other())
        await asyncio.sleep(0)
        await asyncio.gather(producer.send("d", b"1" + bytes(200)), first)
        assert [payload[:1] for payload in cluster.stored("d")] == [b"0", b"1", b"2"]


async def test_a_send_that_is_cancelled_in_its_moment_gives_the_room_back_once() -> None:
    """When room comes for one that is cancelled and has not heard of either."""
    async with serving() as (_, client), client.producer(in_flight_bytes_max=3000) as producer:
        first = asyncio.ensure_future(producer.send("d", bytes(2700)))
        second = asyncio.ensure_future(producer.send("d", bytes(2700)))
        await until(lambda: producer._vacancy)
        second.cancel()
        producer._vacated()
        await asyncio.wait((first, second))
        await producer.flush()
        assert producer._room == producer._room_max


async def test_while_a_request_is_in_flight_the_next_fills() -> None:
    """Many single sends travel in few requests."""
    async with serving() as (cluster, client), client.producer() as producer:
        node = cluster.nodes["n1"]
        node.hang.clear()
        futures = []
        for i in range(200):
            futures.append(producer.send_nowait("d", b"%d" % i))
            await asyncio.sleep(0)
        node.hang.set()
        await asyncio.gather(*futures)
        assert cluster.stored("d") == [b"%d" % i for i in range(200)]
        assert len(node.requests) <= 4, [len(r.records) for r in node.requests]


async def test_linger_waits_for_company() -> None:
    """With a linger, sends of some turns of the loop travel together; flush does not wait for it."""
    async with serving() as (cluster, client), client.producer(linger=30.0) as producer:
        futures = []
        for i in range(10):
            futures.append(producer.send_nowait("d", b"%d" % i))
            await asyncio.sleep(0)
        assert not cluster.nodes["n1"].requests
        await producer.flush()
        assert [len(r.records) for r in cluster.nodes["n1"].requests] == [10]
        assert all(f.done() for f in futures)


async def test_frames_stay_below_a_mebibyte() -> None:
    """A large batch is cut by bytes and by records, in order."""
    async with serving() as (cluster, client), client.producer() as producer:
        await producer.send_many([Record("d", bytes(100_000)) for _ in range(50)])
        await producer.send_many([Record("d", b"") for _ in range(9000)])
        requests = cluster.nodes["n1"].requests
        assert max(r.ByteSize() for r in requests) <= 1 << 20
        assert max(len(r.records) for r in requests) <= 4096
        numbers = [x.producer_sequence for r in requests for x in r.records]
        assert numbers == list(range(1, 9051))


async def test_a_lost_answer_stores_nothing_twice() -> None:
    """The stream dies after the shard stored the records: they are resent, recognised, and acknowledged."""
    async with serving() as (cluster, client), client.producer() as producer:
        await producer.send("d", b"0")
        cluster.nodes["n1"].swallow_answers = 2
        receipts = await producer.send_many([Record("d", b"%d" % i) for i in range(1, 50)])
        assert cluster.stored("d") == [b"%d" % i for i in range(50)]
        assert any(r.duplicate for r in receipts)


async def test_an_answer_to_something_else_fails_what_it_was_for() -> None:
    """Nobody waits for ever for what a broken node answered; the next record gets through."""
    async with serving() as (cluster, client), client.producer() as producer:
        cluster.nodes["n1"].spoil_answers = 1
        with pytest.raises(InternalError, match="answered 0 items"):
            await producer.send("d", b"1", timeout=10)
        await producer.send("d", b"2", timeout=10)


async def test_a_leader_change_in_the_middle_keeps_order() -> None:
    """Records of the moved shard follow it to the new leader, the others go on."""
    async with serving(3) as (cluster, client), client.producer() as producer:
        for node in cluster.nodes.values():
            node.forwards = False
        keys = [key_of(s) for s in (1, 2, 3, 4)]
        sends = []
        for i in range(400):
            sends += [producer.send_nowait("d", b"%d" % i, key=key) for key in keys]
            if i % 40 == 20:
                await cluster.move(1 + i // 40 % 4, f"n{1 + (i // 40 + 1) % 3}")
            await asyncio.sleep(0)
        await asyncio.gather(*sends)
        for key in keys:
            assert cluster.stored("d", key=key) == [b"%d" % i for i in range(400)]


async def test_a_killed_leader_is_left_for_the_next() -> None:
    """Its connection breaks, another node leads: nothing is lost, doubled or reordered."""
    async with serving(3) as (cluster, client), client.producer() as producer:
        key = key_of(1)
        sends = [asyncio.create_task(producer.send("d", b"%d" % i, key=key)) for i in range(50)]
        await until(lambda: len(cluster.stored("d", key=key)) > 0)
        await cluster.nodes["n1"].stop()
        for s in (1, 4):
            await cluster.move(s, "n2")
        sends += [asyncio.create_task(producer.send("d", b"%d" % i, key=key)) for i in range(50, 100)]
        await asyncio.gather(*sends)
        assert cluster.stored("d", key=key) == [b"%d" % i for i in range(100)]


async def test_an_unreachable_leader_is_reached_through_another_node() -> None:
    """The leader's address does not answer from here: any other node forwards."""
    async with serving(2) as (cluster, client), client.producer() as producer:
        await cluster.nodes["n1"].stop()
        receipts = await producer.send_many([Record("d", b"x", key=str(i)) for i in range(20)])
        assert len(receipts) == 20
        assert not cluster.nodes["n1"].requests


async def test_a_hanging_leader_is_left_once_another_leads() -> None:
    """It accepts requests and answers none (as after SIGSTOP): when the shard moves, so do the records."""
    async with serving(2) as (cluster, client), client.producer() as producer:
        key = key_of(1)
        await producer.send("d", b"0", key=key)
        cluster.nodes["n1"].hang.clear()
        send = asyncio.create_task(producer.send("d", b"1", key=key))
        await until(lambda: len(producer._streams[cluster.nodes["n1"].address].in_flight) == 1)
        await cluster.move(1, "n2")
        assert not (await send).duplicate
        cluster.nodes["n1"].hang.set()
        assert cluster.stored("d", key=key) == [b"0", b"1"]


async def test_no_leader_for_a_while_only_delays() -> None:
    """UNAVAILABLE is retried until there is a leader."""
    async with serving() as (cluster, client), client.producer() as producer:
        s = shard("d")
        cluster.leaders[s] = ""
        await cluster.tell()
        send = asyncio.create_task(producer.send("d", b"x"))
        await until(lambda: len(cluster.nodes["n1"].requests) >= 2)
        await cluster.move(s, "n1")
        assert (await send).sequence
        assert cluster.stored("d") == [b"x"]


async def test_a_change_of_leader_that_the_watch_missed_is_asked_for() -> None:
    """The old leader says UNAVAILABLE and the watched node says nothing: others know."""
    async with serving(3) as (cluster, client), client.producer() as producer:
        for node in cluster.nodes.values():
            node.forwards = False
        key = key_of(1)
        await producer.send("d", b"0", key=key)
        cluster.leaders[1] = "n2"
        cluster.terms[1] += 1
        await producer.send("d", b"1", key=key)
        assert cluster.stored("d", key=key) == [b"0", b"1"]


async def test_a_refused_record_fails_alone() -> None:
    """The records behind it, in flight with their old numbers, are renumbered and stored in order."""
    async with serving() as (cluster, client), client.producer() as producer:
        cluster.refuse = lambda r: m.ItemError(code=m.ERROR_CODE_INVALID_ARGUMENT, field="payload", description="bad") if (
            r.message.payload.startswith(b"bad")) else None
        cluster.nodes["n1"].hang.clear()
        futures = []
        for i in range(100):
            futures.append(producer.send_nowait("d", b"bad%d" % i if i % 10 == 5 else b"%d" % i))
            await asyncio.sleep(0)
        cluster.nodes["n1"].hang.set()
        results = await asyncio.gather(*futures, return_exceptions=True)
        for i, result in enumerate(results):
            assert isinstance(result, InvalidArgument) == (i % 10 == 5), (i, result)
        assert cluster.stored("d") == [b"%d" % i for i in range(100) if i % 10 != 5]
        assert len(cluster.producers) == 1, "no new epoch was needed"


async def test_a_batch_with_refusals_reports_each() -> None:
    """PartialFailure has the receipts of the others and an error per refused record."""
    async with serving() as (cluster, client), client.producer() as producer:
        cluster.refuse = lambda r: m.ItemError(code=m.ERROR_CODE_DESTINATION_NOT_FOUND, description="no") if (
            r.destination == "missing") else None
        with pytest.raises(PartialFailure) as failure:
            await producer.send_many([Record("missing" if i == 2 else "d", b"%d" % i) for i in range(5)])
        assert isinstance(failure.value.errors[2], DestinationNotFound) and len(failure.value.errors) == 1
        assert [r is None for r in failure.value.receipts] == [False, False, True, False, False]


async def test_a_forgotten_producer_starts_over() -> None:
    """A shard that does not know the producer any more gets a new id; nothing is lost."""
    async with serving() as (cluster, client), client.producer() as producer:
        await producer.send("d", b"0")
        cluster.producers.clear()
        await producer.send_many([Record("d", b"%d" % i) for i in range(1, 10)])
        assert cluster.stored("d") == [b"%d" % i for i in range(10)]


async def test_a_full_disk_is_waited_for() -> None:
    """RESOURCE_EXHAUSTED is retried; a timeout ends the wait."""
    async with serving() as (cluster, client), client.producer() as producer:
        full = m.ItemError(code=m.ERROR_CODE_RESOURCE_EXHAUSTED, description="the disk is nearly full")
        cluster.refuse = lambda r: full
        with pytest.raises(SendTimeout) as timeout:
            await producer.send("d", b"0", timeout=0.05)
        assert timeout.value.outcome_unknown
        cluster.refuse = lambda r: None
        await producer.send("d", b"1")
        assert cluster.stored("d") == [b"0", b"1"]
        assert issubclass(ResourceExhausted, Exception)


@pytest.mark.parametrize(("arguments", "field"), [
    ({"destination": ""}, "destination"), ({"destination": "a*"}, "destination"), ({"destination": "a\n"}, "destination"),
    ({"destination": "x" * 256}, "destination"), ({"tenant": "é" * 128}, "tenant"), ({"key": "\x7f"}, "key"),
    ({"key": "\ud800"}, "key"), ({"id": "\x00"}, "id"), ({"headers": {"a": "b" * 70_000}}, "headers"),
    ({"delay": -1.0}, "delay"), ({"delay": 8 * 86400.0}, "delay"), ({"delay": float("nan")}, "delay"),
    ({"payload": bytes((1 << 20) + 1)}, "payload"), ({"payload": "text"}, "payload"), ({"tenant": None}, "tenant"),
])
async def test_wrong_fields_are_refused_before_anything_is_sent(arguments: dict[str, object], field: str) -> None:
    """InvalidArgument names the field, for single sends and in batches."""
    async with serving() as (cluster, client), client.producer() as producer:
        given = {"destination": "d", "payload": b"x", **arguments}
        with pytest.raises(InvalidArgument) as error:
            await producer.send(**given)  # type: ignore[arg-type]
        assert error.value.field == field
        with pytest.raises(InvalidArgument) as error:
            await producer.send_many([Record("d", b"fine"), Record(**given)])  # type: ignore[arg-type]
        assert error.value.field == f"records[1].{field}"
        assert not cluster.nodes["n1"].requests


async def test_a_full_buffer_makes_senders_wait_in_line() -> None:
    """send waits, send_nowait raises BufferFull, and order is that of the calls."""
    async with serving() as (cluster, client), client.producer(in_flight_bytes_max=3000) as producer:
        cluster.nodes["n1"].hang.clear()
        sends = [asyncio.create_task(producer.send("d", b"%03d" % i + bytes(600))) for i in range(20)]
        await until(lambda: producer._vacancy)
        with pytest.raises(BufferFull):
            producer.send_nowait("d", b"x")
        many = asyncio.create_task(producer.send_many([Record("d", b"%03d" % i + bytes(600)) for i in range(20, 40)]))
        cluster.nodes["n1"].hang.set()
        await asyncio.gather(*sends, many)
        assert [p[:3] for p in cluster.stored("d")] == [b"%03d" % i for i in range(40)]
        assert producer._room == producer._room_max
        await producer.send("d", bytes(10_000))  # larger than the buffer: alone, but it passes


async def test_a_batch_that_waits_for_the_buffer_stays_together() -> None:
    """Sends that come while it has handed in a part only go behind all of it."""
    async with serving() as (cluster, client), client.producer(in_flight_bytes_max=3000) as producer:
        cluster.nodes["n1"].hang.clear()
        many = asyncio.create_task(producer.send_many([Record("d", b"%03d" % i + bytes(600)) for i in range(20)]))
        await until(lambda: producer._vacancy)
        sends = [asyncio.create_task(producer.send("d", b"%03d" % i + bytes(600))) for i in range(20, 30)]
        await until(lambda: producer._in_line == 11)
        cluster.nodes["n1"].hang.set()
        await asyncio.gather(many, *sends)
        assert [p[:3] for p in cluster.stored("d")] == [b"%03d" % i for i in range(30)]
        assert producer._room == producer._room_max


async def test_a_cancelled_sender_gives_its_place_away() -> None:
    """Cancelling one that waits for room neither blocks nor leaks."""
    async with serving() as (cluster, client), client.producer(in_flight_bytes_max=2000) as producer:
        cluster.nodes["n1"].hang.clear()
        sends = [asyncio.create_task(producer.send("d", bytes(900))) for _ in range(6)]
        await until(lambda: producer._in_line == 5)
        sends[1].cancel()
        sends[3].cancel()
        cluster.nodes["n1"].hang.set()
        results = await asyncio.gather(*sends, return_exceptions=True)
        assert [isinstance(r, asyncio.CancelledError) for r in results] == [False, True, False, True, False, False]
        assert producer._room == producer._room_max


async def test_a_node_that_has_much_to_do_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers easy questions, so what it has not answered yet is not sent again: that would make it more."""
    monkeypatch.setattr(streams, "SILENCE_SECONDS_MAX", 0.1)
    async with serving() as (cluster, client), client.producer() as producer:
        node = cluster.nodes["n1"]
        await producer.send("d", b"first")
        node.hang.clear()
        send = asyncio.create_task(producer.send("d", b"second"))
        await asyncio.sleep(1.5)
        node.hang.set()
        receipt = await send
        assert not receipt.duplicate and [r.records[0].message.payload for r in node.requests] == [b"first", b"second"]


async def test_a_node_that_answers_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an easy question: another one gets what it had, and passes it on."""
    monkeypatch.setattr(streams, "SILENCE_SECONDS_MAX", 0.1)
    monkeypatch.setattr(streams, "QUESTION_SECONDS_MAX", 0.2)
    async with serving(2) as (cluster, client), client.producer() as producer:
        key = next(str(i) for i in range(1000) if cluster.leaders[shard("d", str(i))] == "n1")
        await producer.send("d", b"first", key=key)
        node, other = cluster.nodes["n1"], cluster.nodes["n2"]
        node.hang.clear()
        node.answers.clear()
        await producer.send("d", b"second", key=key)
        assert [r.records[0].message.payload for r in other.requests] == [b"second"]
        assert cluster.stored("d", key=key) == [b"first", b"second"]
        node.hang.set()
        node.answers.set()


async def test_a_timeout_says_whether_the_outcome_is_unknown() -> None:
    """Never sent: forgotten. Sent: it may become stored."""
    async with serving() as (cluster, client), client.producer() as producer:
        await producer.send("d", b"connected")
        cluster.nodes["n1"].hang.clear()
        with pytest.raises(SendTimeout) as sent:
            await producer.send("d", b"first", timeout=0.2)
        assert sent.value.outcome_unknown
        second = producer.send_nowait("d", b"second")  # in flight as well
        await until(lambda: len(producer._streams[cluster.nodes["n1"].address].in_flight) == 2)
        with pytest.raises(SendTimeout) as unsent:
            await producer.send("d", b"third", timeout=0.05)
        assert not unsent.value.outcome_unknown
        with pytest.raises(PartialFailure) as many:
            await producer.send_many([Record("d", b"fourth")], timeout=0.05)
        assert isinstance(many.value.errors[0], SendTimeout) and not many.value.errors[0].outcome_unknown
        cluster.nodes["n1"].hang.set()
        await second
        await producer.send("d", b"fifth")
        assert cluster.stored("d") == [b"connected", b"first", b"second", b"fifth"]


async def test_a_cancelled_send_that_never_went_out_is_forgotten() -> None:
    """Cancellation is no way to lose count."""
    async with serving() as (cluster, client), client.producer() as producer:
        cluster.nodes["n1"].hang.clear()
        for _ in range(2):
            producer.send_nowait("d", b"x").add_done_callback(lambda f: f.exception())
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(producer.send("d", b"cancelled"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        cluster.nodes["n1"].hang.set()
        await producer.send("d", b"last")
        assert cluster.stored("d") == [b"x", b"x", b"last"]
        assert producer._room == producer._room_max


async def test_closing_flushes() -> None:
    """Leaving the block waits for what was handed in."""
    async with serving() as (cluster, client):
        async with client.producer() as producer:
            future = producer.send_nowait("d", b"x")
        assert future.done() and cluster.stored("d") == [b"x"]
        with pytest.raises(Closed):
            await producer.send("d", b"y")
        with pytest.raises(Closed):
            producer.send_nowait("d", b"y")


async def test_closing_without_an_answer_tells_what_is_unknown() -> None:
    """After close_timeout, what went out is OutcomeUnknown and what did not is Closed."""
    async with serving() as (cluster, client):
        async with client.producer(close_timeout=0.2) as producer:
            cluster.nodes["n1"].hang.clear()
            futures = []
            for sent in (1, 2, 2, 2):  # no more wait for answers at a time
                futures.append(producer.send_nowait("d", b"x"))
                await until(lambda sent=sent: sum(len(stream.in_flight) for stream in producer._streams.values()) == sent)
            await until(lambda: cluster.nodes["n1"].received)
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(r) for r in results] == [OutcomeUnknown, OutcomeUnknown, Closed, Closed]
        cluster.nodes["n1"].hang.set()


async def test_closing_turns_waiting_senders_away() -> None:
    """Whoever waits for room or for the topology when the producer closes hears Closed, and nothing is sent later."""
    async with serving() as (cluster, client):
        async with client.producer(in_flight_bytes_max=1000, close_timeout=0.1) as producer:
            cluster.nodes["n1"].hang.clear()
            sends = [asyncio.create_task(producer.send("d", bytes(700))) for _ in range(3)]
            await until(lambda: producer._in_line == 2 and cluster.nodes["n1"].received)
        results = await asyncio.gather(*sends, return_exceptions=True)
        assert [type(r) for r in results] == [OutcomeUnknown, Closed, Closed]
        async with client.producer(in_flight_bytes_max=1000) as producer:
            batch = asyncio.gather(producer.send_many([Record("d", bytes(700)) for _ in range(3)]))
            await until(lambda: producer._in_line == 1)
            closing = asyncio.create_task(producer.close())
            await until(lambda: producer.closed)
            cluster.nodes["n1"].hang.set()
            await closing
        with pytest.raises(PartialFailure) as failure:
            await batch
        assert [receipt is not None for receipt in failure.value.receipts] == [True, False, False]
        assert {i: type(error) for i, error in failure.value.errors.items()} == {1: Closed, 2: Closed}
        assert producer._room == producer._room_max
    async with Client("127.0.0.1:1") as client:
        async with client.producer() as producer:
            send = asyncio.create_task(producer.send("d", b"x"))
            await asyncio.sleep(0)
        with pytest.raises(Closed):
            await send


async def test_without_a_cluster_sends_wait_and_time_out() -> None:
    """Nobody answers: send_nowait refuses, send waits for its timeout, wait_ready says what is missing."""
    async with Client("127.0.0.1:1") as client, client.producer() as producer:
        with pytest.raises(Unavailable):
            producer.send_nowait("d", b"x")
        with pytest.raises(SendTimeout) as timeout:
            await producer.send("d", b"x", timeout=0.1)
        assert not timeout.value.outcome_unknown
        with pytest.raises(Unavailable, match="none of"):
            await client.wait_ready(0.1)


async def test_a_named_producer_is_unique_all_the_same() -> None:
    """Two producers of one name have ids of their own: numbers restart with each."""
    async with serving() as (cluster, client):
        for payload in (b"a", b"b"):
            async with client.producer(producer_id="worker") as producer:
                await producer.send("d", payload)
                assert producer.producer_id.startswith("worker-")
        assert cluster.stored("d") == [b"a", b"b"]
        with pytest.raises(InvalidArgument):
            client.producer(producer_id="x" * 60)
