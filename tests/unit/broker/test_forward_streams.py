"""Streams over which a node passes on what others lead."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from spillway.broker.config import Peer
from spillway.broker.core.scheduler import Consumer
from spillway.broker.errors import Unavailable
from spillway.broker.runtime import forward
from spillway.broker.runtime.balance import ask_status
from spillway.broker.runtime.calls import Batch, Call
from spillway.broker.runtime.consumers import Sink
from spillway.broker.runtime.forward import Forwarder, LeaseProxy, PeerLink
from spillway.v1.cluster_service_pb2 import GetNodeStatusRequest, GetNodeStatusResponse
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceServicer, add_ClusterServiceServicer_to_server
from spillway.v1.message_pb2 import ItemError
from spillway.v1.queue_service_pb2 import Credit, LeaseRequest, ProduceResponse, Subscribe
from spillway.v1.queue_service_pb2_grpc import QueueServiceServicer, add_QueueServiceServicer_to_server

from demo.ports import free_ports


async def test_what_is_sent_over_a_closed_link_fails() -> None:
    """A node that stops closes its links; whoever still passes something on hears that it was not sent, and no task ends with an error of
    its own."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    link = PeerLink("n2", "127.0.0.1:1")
    await link.close()
    unsent: list[object] = []
    link.ack._kind = forward._SETTLEMENTS._replace(unsent=unsent.append)
    link.ack.send(b"", "item")
    task = link.ack._task
    assert task is not None
    await asyncio.wait((task,))
    link.ack._task = None
    del task
    assert unsent == ["item"] and not errors


class Answers:
    """A stream to another node that gives an answer to each request, and then ends."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self._asked = asyncio.Semaphore(0)

    def __call__(self) -> Answers:
        return self

    async def write(self, request: bytes) -> None:
        """As gRPC's."""
        self._asked.release()

    async def read(self) -> Any:
        """As gRPC's."""
        await self._asked.acquire()
        return self._answers.pop(0) if self._answers else grpc.aio.EOF

    def cancel(self) -> None:
        """As gRPC's."""


def stream(answers: Any) -> forward._Stream:
    """A forwarding stream of records over it."""
    link: Any = SimpleNamespace(node_id="n2", channel=SimpleNamespace(stream_stream=lambda method: answers))
    return forward._Stream(link, "Produce", forward._RECORDS)


def batch(records: int) -> Batch:
    """Records of nobody, which must not be sent twice."""
    made = Batch(Call(records, 0, asyncio.get_running_loop(), lambda call: None), "", 0)
    made.names, made.bodies, made.positions = [b"d\0t\0k"] * records, [b""] * records, list(range(records))
    return made


GOOD = ProduceResponse(sequences=[7, 8]).SerializeToString()


@pytest.mark.parametrize("spoilt", [
    b"\xff", b"", ProduceResponse(sequences=[7]).SerializeToString(),
    ProduceResponse(sequences=[7, 0], errors=[ItemError(index=2)]).SerializeToString()])
async def test_work_that_was_answered_with_something_else_is_failed(spoilt: bytes) -> None:
    """Its outcome is unknown, and so is that of what was sent after it; none of it waits for ever."""
    sending = stream(Answers(GOOD, spoilt, GOOD))
    batches = [batch(2) for _ in range(3)]
    for one in batches:
        sending.send(b"", (None, 1, one))
    await asyncio.wait_for(asyncio.gather(*(one.call.done for one in batches)), 5)
    assert batches[0].call.results == [7, 8] and not batches[0].call.errors
    for one in batches[1:]:
        assert [error[0] for error in one.call.errors] == [0, 1]
        assert "the outcome is unknown" in one.call.errors[0][3]


async def test_an_answer_that_nobody_asked_for_ends_the_stream() -> None:
    """It belongs to nothing."""
    answers = Answers(GOOD, GOOD)
    sending = stream(answers)
    one, other = batch(2), batch(2)
    sending.send(b"", (None, 1, one))
    await asyncio.wait_for(one.call.done, 5)
    answers._asked.release()
    assert sending._task is not None
    await asyncio.wait_for(sending._task, 5)
    sending.send(b"", (None, 1, other))  # on a new one, which ends
    await asyncio.wait_for(other.call.done, 5)
    assert other.call.errors


class Leader(QueueServiceServicer, ClusterServiceServicer):
    """Another node, over a real connection."""

    def __init__(self, port: int = 0) -> None:
        self.leases = 0
        self.leased = asyncio.Event()
        self.answer = asyncio.Event()
        self.asked = asyncio.Event()
        self.server = grpc.aio.server()
        add_QueueServiceServicer_to_server(self, self.server)
        add_ClusterServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"

    async def Lease(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        """A stream that never ends."""
        await context.read()
        self.leases += 1
        self.leased.set()
        await asyncio.Event().wait()

    async def Produce(self, request_iterator: Any, context: Any) -> AsyncIterator[ProduceResponse]:  # type: ignore[override]
        """Stores everything, when it is told to."""
        async for request in request_iterator:
            self.asked.set()
            await self.answer.wait()
            yield ProduceResponse(sequences=[7] * len(request.records))

    async def GetNodeStatus(self, request: Any, context: Any) -> GetNodeStatusResponse:  # type: ignore[override]
        """When it is told to."""
        self.asked.set()
        await self.answer.wait()
        return GetNodeStatusResponse(node="n2")


async def moved(node: Any, to: Leader) -> None:
    """The other node is elsewhere now."""
    node.members = {"n1": None, "n2": Peer("n2", to.address, "")}
    for follow in node.on_members:
        follow()


@pytest.fixture
async def leaders() -> AsyncIterator[tuple[Leader, Leader]]:
    both = Leader(), Leader()
    for leader in both:
        await leader.server.start()
    yield both
    for leader in both:
        await leader.server.stop(None)


def a_node() -> Any:
    """That calls it."""
    return SimpleNamespace(config=SimpleNamespace(node_id="n1"), members={}, on_members=[], leader_of=lambda shard: "n2",
                           scheduler=SimpleNamespace(subscribe=lambda consumer, patterns: None),
                           host=SimpleNamespace(in_touch=lambda node_id: True))


async def test_who_waits_for_an_answer_of_a_node_that_moves_gets_it(leaders: tuple[Leader, Leader]) -> None:
    """To close its link cancels what waits there, and with it the task that does: the balance, for one, would end for good."""
    here, there = leaders
    node = a_node()
    forwarder = Forwarder(node)
    await moved(node, here)
    asking = asyncio.ensure_future(forwarder.link("n2").cluster.GetNodeStatus(GetNodeStatusRequest(), timeout=30))
    await asyncio.wait_for(here.asked.wait(), 30)
    await moved(node, there)
    await asyncio.sleep(0.1)
    here.answer.set()
    assert (await asking).node == "n2"
    await forwarder.close()


async def test_a_node_that_is_back_is_asked_though_its_link_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC connects again after a while only. Raft hears of the node already, so it is no longer away."""
    monkeypatch.setattr(forward, "CHANNEL_OPTIONS", [("grpc.initial_reconnect_backoff_ms", 1500), ("grpc.min_reconnect_backoff_ms", 1500)])
    there = [False]
    port = free_ports(1)[0]
    node = a_node()
    node.host.in_touch = lambda node_id: there[0]
    node.members = {"n1": None, "n2": Peer("n2", f"127.0.0.1:{port}", "")}
    forwarder = Forwarder(node)
    assert await ask_status(node, forwarder, "n2") is None
    leader = Leader(port)
    leader.answer.set()
    await leader.server.start()
    there[0] = True
    found = await ask_status(node, forwarder, "n2")
    assert found is not None and found.node == "n2"
    await forwarder.close()
    await leader.server.stop(None)


async def test_leases_of_a_node_that_moves_are_asked_for_where_it_is(leaders: tuple[Leader, Leader],
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream over the former link is cancelled, not the task that reads it; that one ends when it is told to."""
    monkeypatch.setattr(forward, "LINK_GRACE_SECONDS", 0.1)
    here, there = leaders
    node = a_node()
    forwarder = Forwarder(node)
    await moved(node, here)
    consumer = Consumer("c")
    proxy = LeaseProxy(forwarder, Subscribe(destinations=["d"]), False, consumer, Sink(consumer), lambda consumer, messages, size: None)
    proxy.start()
    await asyncio.wait_for(here.leased.wait(), 30)
    await moved(node, there)
    await asyncio.wait_for(there.leased.wait(), 30)
    task = proxy._leases["n2"]
    proxy.stop()
    await asyncio.wait((task,), timeout=30)
    assert task.done()
    await forwarder.close()


class Full(Answers):
    """A stream to another node that hangs: there is room for the first request only."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0
        self.room = asyncio.Event()
        self.written: list[LeaseRequest] = []

    async def write(self, request: bytes) -> None:
        """As gRPC's."""
        self.requests += 1
        if self.requests > 1:
            await self.room.wait()
        self.written.append(LeaseRequest.FromString(request))


async def test_a_node_that_hangs_keeps_no_credit_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is to have adds up until it can be told."""
    full = Full()
    node = a_node()
    node.members = {"n1": None, "n2": Peer("n2", "127.0.0.1:1", "")}
    forwarder = Forwarder(node)
    monkeypatch.setattr(forwarder, "link", lambda node_id: SimpleNamespace(channel=SimpleNamespace(stream_stream=lambda method: full)))
    consumer = Consumer("c")
    given = [0]

    def give_local(consumer: Consumer, messages: int, size: int) -> None:
        given[0] += messages
    proxy = LeaseProxy(forwarder, Subscribe(destinations=["d"], credit=Credit(messages=8, bytes=1 << 20)), False, consumer, Sink(consumer),
                       give_local)
    proxy.start()
    for _ in range(20):  # the client takes all that this node has, and gives new credit for it
        async with asyncio.timeout(10):
            while given[0] < 2:
                await asyncio.sleep(0.001)
        taken, given[0] = given[0], 0
        assert proxy._admit("n1", taken, taken)
        proxy.credit(taken, taken)
    full.room.set()
    async with asyncio.timeout(10):
        while len(full.written) < 2:
            await asyncio.sleep(0.001)
    assert full.written[0].HasField("subscribe") and 0 < sum(w.credit.messages for w in full.written[1:]) <= 8
    proxy.stop()
    await forwarder.close()


@pytest.mark.parametrize("producer", ["p", ""])
async def test_nobody_waits_for_a_node_that_hangs_and_leads_no_more(leaders: tuple[Leader, Leader], producer: str) -> None:
    """What may be repeated goes to the new leader; of the rest it is said that the outcome is unknown."""
    hangs, leads = leaders
    leads.answer.set()
    leader = ["n2"]
    node = a_node()
    node.leader_of = lambda shard: leader[0]
    node.members = {"n1": None, "n2": Peer("n2", hangs.address, ""), "n3": Peer("n3", leads.address, "")}
    forwarder = Forwarder(node)
    sent = batch(2)
    sent.producer = producer
    forwarder.produce(1, sent)
    await asyncio.wait_for(hangs.asked.wait(), 30)
    leader[0] = "n3"
    await asyncio.wait_for(sent.call.done, 30)
    assert leads.asked.is_set() is bool(producer)
    if producer:
        assert sent.call.results == [7, 7] and not sent.call.errors
    else:
        assert "node n2: it does not answer, and node n3 leads shard 1 now; the outcome is unknown" in sent.call.errors[0][3]
    await forwarder.close()


class Stuck(Answers):
    """A stream to another node that hangs: there is room for the first request only, and who writes does not hear that it is cancelled."""

    async def write(self, request: bytes) -> None:
        """As gRPC's."""
        if self._asked.locked():
            self._asked.release()
        else:
            await asyncio.Event().wait()

    async def read(self) -> Any:
        """As gRPC's."""
        await asyncio.Event().wait()


async def test_what_was_not_sent_to_a_node_that_hangs_goes_on(leaders: tuple[Leader, Leader]) -> None:
    """Whatever it is; of what was under way the outcome is unknown. That another node leads any of its shards will do, if Raft does not
    hear of the node."""
    _, leads = leaders
    leads.answer.set()
    leader = {1: "n2", 2: "n2"}
    node = a_node()
    node.leader_of = leader.__getitem__
    node.host.in_touch = lambda node_id: False
    node.members = {"n1": None, "n2": Peer("n2", "127.0.0.1:1", ""), "n3": Peer("n3", leads.address, "")}
    forwarder = Forwarder(node)
    link = forwarder.link("n2")
    link.channel = SimpleNamespace(stream_stream=lambda method: Stuck(), close=link.channel.close)  # type: ignore[assignment]
    first, second, third = batch(2), batch(2), batch(2)
    for shard, sent in ((1, first), (2, second), (2, third)):
        forwarder.produce(shard, sent)
    leader[2] = "n3"
    await asyncio.wait_for(asyncio.gather(*(sent.call.done for sent in (first, second, third))), 30)
    for lost in (first, second):
        assert "node n2: it does not answer, and node n3 leads shard 2 now; the outcome is unknown" in lost.call.errors[0][3]
    assert third.call.results == [7, 7] and not third.call.errors
    await forwarder.close()


async def test_nobody_waits_for_a_node_that_raft_does_not_hear_of(leaders: tuple[Leader, Leader], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have lost its power, so that nothing ever ends the connection. One that Raft hears of has much to do."""
    monkeypatch.setattr(forward, "MOVED_SECONDS_MAX", 0.1)
    monkeypatch.setattr(forward, "SILENCE_SECONDS_MAX", 0.2)
    hangs, _ = leaders
    touch = [True]
    node = a_node()
    node.host = SimpleNamespace(in_touch=lambda node_id: touch[0])
    node.members = {"n1": None, "n2": Peer("n2", hangs.address, "")}
    forwarder = Forwarder(node)
    sent = batch(2)
    forwarder.produce(1, sent)
    await asyncio.wait_for(hangs.asked.wait(), 30)
    await asyncio.sleep(3 * forward.WATCH_SECONDS)
    assert not sent.call.errors
    touch[0] = False
    await asyncio.wait_for(sent.call.done, 30)
    assert "node n2: it does not answer; the outcome is unknown" in sent.call.errors[0][3]
    await forwarder.close()


async def test_a_node_that_stops_makes_no_links() -> None:
    """What is passed on then fails as if there were no leader; nobody meets a closed channel."""
    node = a_node()
    node.members = {"n2": Peer("n2", "127.0.0.1:1", "")}
    forwarder = Forwarder(node)
    forwarder.link("n2")
    await forwarder.close()
    with pytest.raises(Unavailable, match="this node stops"):
        forwarder.link("n2")
    leaders: list[str | None] = []
    forwarder._with_leader(1, leaders.append)
    assert leaders == [None]
