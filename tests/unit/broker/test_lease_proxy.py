"""What a node does for a plain client's Lease stream."""
from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from spillway.broker.core.scheduler import Consumer
from spillway.broker.runtime import forward
from spillway.broker.runtime.consumers import Sink
from spillway.broker.runtime.forward import LeaseProxy
from spillway.contract.credits import CreditSplitter
from spillway.contract.limits import CREDIT_BYTES_MAX, CREDIT_MESSAGES_MAX
from spillway.v1.queue_service_pb2 import Credit, LeasedMessage, LeasedRun, LeaseRequest, LeaseResponse, Subscribe

from tests.unit.client.serving import until


def run(token: int, messages: int = 1) -> LeasedRun:
    """Of another node."""
    return LeasedRun(shard=2, fencing_token=token, messages=[LeasedMessage(sequence=9 + i) for i in range(messages)])


class Peer:
    """A stream to another node, which is told what it sends; it ends when it is asked for no more."""

    def __init__(self) -> None:
        self.sends: asyncio.Queue[Any] = asyncio.Queue()
        self.credit = 0
        self.subscribed = asyncio.Event()
        self.ended = asyncio.Event()

    async def write(self, request: bytes) -> None:
        """As gRPC's."""
        self.subscribed.set()
        self.credit += LeaseRequest.FromString(request).credit.messages

    async def done_writing(self) -> None:
        """As gRPC's."""
        self.ended.set()

    async def read(self) -> Any:
        """As gRPC's."""
        return await self.sends.get()

    def cancel(self) -> None:
        """As gRPC's."""

    def send(self, *runs: LeasedRun) -> None:
        """In one frame."""
        self.credit -= sum(len(one.messages) for one in runs)
        self.sends.put_nowait(LeaseResponse(runs=runs).SerializeToString())


class Forwarder:
    """Of node n1, beside n2 and n3."""

    def __init__(self) -> None:
        self.peers = {"n2": Peer(), "n3": Peer()}
        self.node: Any = SimpleNamespace(config=SimpleNamespace(node_id="n1"), members=dict.fromkeys(("n1", *self.peers)), on_members=[],
                                         scheduler=SimpleNamespace(subscribe=lambda consumer, patterns: None))
        self.given_back: list[int] = []

    def link(self, node_id: str) -> Any:
        """As Forwarder's."""
        return SimpleNamespace(channel=SimpleNamespace(stream_stream=lambda method: lambda: self.peers[node_id]))

    def start(self, work: Any) -> asyncio.Task[None]:
        """As Forwarder's."""
        return asyncio.create_task(work)

    def give_back(self, leases: list[LeasedRun]) -> None:
        """As Forwarder's."""
        self.given_back += [lease.fencing_token for lease in leases]

    def proxy(self, credit: int, size: int = 1 << 20, numbered: bool = True) -> tuple[LeaseProxy, Sink]:
        """For a client with so much credit."""
        consumer = Consumer("c")
        sink = Sink(consumer)
        made = LeaseProxy(self, Subscribe(destinations=["d"], credit=Credit(messages=credit, bytes=size)), numbered,  # type: ignore[arg-type]
                          consumer, sink, lambda consumer, messages, size: None)
        made.start()
        return made, sink


def tokens(sink: Sink) -> list[int]:
    """Of the leases that go to the client."""
    return [one.fencing_token for frame in sink.rest() for one in LeaseResponse.FromString(frame).runs]


async def test_credit_that_two_nodes_spend_is_the_clients_once() -> None:
    """It went from one to the other while the one granted a lease on it, which takes longer than usual. Who comes first is served."""
    forwarder = Forwarder()
    proxy, sink = forwarder.proxy(2)
    for peer in forwarder.peers.values():
        await until(peer.subscribed.is_set)
    assert proxy._admit("n1", 1, 1)
    forwarder.peers["n2"].send(run(1), run(2), run(3))
    forwarder.peers["n3"].send(run(4))
    await until(lambda: len(forwarder.given_back) == 3)
    assert tokens(sink) == [1] and sorted(forwarder.given_back) == [2, 3, 4]
    assert not proxy._admit("n1", 1, 1)
    await until(lambda: all(peer.credit <= 0 for peer in forwarder.peers.values()))  # nobody has any left
    proxy.credit(5, 5)
    forwarder.peers["n3"].send(run(5, messages=6), run(6, messages=5))
    await until(lambda: len(forwarder.given_back) == 4)
    assert tokens(sink) == [6] and forwarder.given_back[-1] == 5
    proxy.stop()


async def test_what_comes_after_the_end_is_given_back() -> None:
    """Other nodes are asked for no more, and the streams are read to their end."""
    forwarder = Forwarder()
    proxy, sink = forwarder.proxy(9)
    for peer in forwarder.peers.values():
        await until(peer.subscribed.is_set)
    proxy.stop()
    tasks = list(proxy._leases.values())
    for name, peer in forwarder.peers.items():
        await until(peer.ended.is_set)
        peer.send(run(int(name[1])))
        peer.sends.put_nowait(grpc.aio.EOF)
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert sorted(forwarder.given_back) == [2, 3] and not tokens(sink)
    assert not proxy._admit("n1", 1, 1)


async def test_what_was_granted_on_credit_that_the_client_takes_back_still_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while. It counts on both sides, so the next credit pays it first."""
    forwarder = Forwarder()
    proxy, _ = forwarder.proxy(3)
    proxy.credit(-2, 0)
    assert proxy._admit("n1", 3, 3) and not proxy._admit("n1", 1, 1)
    proxy.credit(2, 0)
    assert not proxy._admit("n1", 1, 1)
    proxy.credit(1, 0)
    assert proxy._admit("n1", 1, 1)
    for _ in range(1000):
        proxy.credit(1, 0)
        proxy.credit(-1 << 60, 0)
        proxy.credit((1 << 60) - 1, 0)
    assert len(proxy._withdrawn) <= 20 and sum(n for _, n in proxy._withdrawn) <= 1000  # no more than there was
    proxy._withdrawn.clear()
    monkeypatch.setattr(forward, "WITHDRAWN_SECONDS", 0.0)
    proxy.credit(3, 0)
    proxy.credit(-2, 0)
    assert not proxy._admit("n1", 3, 3) and proxy._admit("n1", 1, 1)
    proxy.stop()


async def test_bytes_may_be_overdrawn_once() -> None:
    """What several nodes granted on the same bytes comes, up to twice the credit; it is paid first."""
    proxy, _ = Forwarder().proxy(50, size=900)
    assert proxy._admit("n1", 2, 1000) and proxy._admit("n2", 1, 700)
    assert proxy._admit("n3", 1, 300)
    assert not proxy._admit("n3", 1, 10)
    proxy.credit(0, 300)
    assert proxy._admit("n3", 1, 10)
    proxy.stop()


async def test_a_client_has_no_more_credit_than_a_node_gives() -> None:
    """What is beyond it would be given to nodes that do not count it, and be missing for ever."""
    proxy, _ = Forwarder().proxy(1 << 40, size=1 << 60)
    assert (proxy._messages, proxy._bytes) == (CREDIT_MESSAGES_MAX, CREDIT_BYTES_MAX)
    proxy.stop()


@pytest.mark.parametrize("numbered", [True, False])
async def test_a_stream_that_is_over_begins_nowhere_late(numbered: bool) -> None:
    """Where a node numbers the streams, the number of the one that takes its place may be lower; then that would be ended. Clients that
    number them themselves may subscribe for nothing but to say which leases they have."""
    forwarder = Forwarder()
    proxy, _ = forwarder.proxy(9, numbered=numbered)
    tasks = list(proxy._leases.values())
    proxy.stop()
    for peer in forwarder.peers.values():
        peer.sends.put_nowait(grpc.aio.EOF)
    await asyncio.wait_for(asyncio.wait(tasks), 10)
    assert [peer.subscribed.is_set() for peer in forwarder.peers.values()] == [numbered] * 2


async def test_a_node_that_does_not_come_to_an_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leases expire."""
    monkeypatch.setattr(forward, "LEASES_END_SECONDS", 0.05)
    forwarder = Forwarder()
    proxy, _ = forwarder.proxy(9)
    tasks = list(proxy._leases.values())
    proxy.stop()
    await asyncio.wait_for(asyncio.wait(tasks), 10)


async def test_a_client_without_credit_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it gives some there is nothing to split, and nothing wakes to do so."""
    asked = []
    wake_time = CreditSplitter.wake_time
    monkeypatch.setattr(CreditSplitter, "wake_time", lambda self, now: asked.append(now) or wake_time(self, now))
    node: Any = SimpleNamespace(config=SimpleNamespace(node_id="n1"), members={"n1": None}, on_members=[],
                                scheduler=SimpleNamespace(subscribe=lambda consumer, patterns: None))
    consumer = Consumer("c")
    proxy = LeaseProxy(SimpleNamespace(node=node), Subscribe(destinations=["d"], credit=Credit(messages=1, bytes=99)),  # type: ignore[arg-type]
                       False, consumer, Sink(consumer), lambda consumer, messages, size: None)
    proxy.start()
    await asyncio.sleep(0.02)
    assert asked
    assert proxy._admit("n1", 1, 10)
    await asyncio.sleep(0)
    asked.clear()
    await asyncio.sleep(0.05)
    assert not asked
    proxy.credit(1, 10)
    await asyncio.sleep(0.02)
    assert asked
    proxy.stop()
