"""Every transport keeps the guarantees of `spillway.cluster.transport.base`."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest
from spillway.cluster.errors import SnapshotInvalid, WireInvalid

from tests.conformance.transport_links import PATIENCE_SECONDS, GrpcLinks, Links, MemoryLinks, Node

Pair = tuple[Links, Node, Node]


@pytest.fixture(params=[MemoryLinks, GrpcLinks])
async def links(request: pytest.FixtureRequest) -> AsyncIterator[Links]:
    made: Links = request.param()
    yield made
    await made.close()


@pytest.fixture
async def pair(links: Links) -> Pair:
    """Two nodes that are connected."""
    a, b = Node("a"), Node("b")
    await links.add(a)
    await links.add(b)
    await connected(a, b)
    return links, a, b


async def connected(a: Node, b: Node) -> None:
    await a.until(lambda: b.name in a.up)
    await b.until(lambda: a.name in b.up)


async def test_both_sides_learn_who_the_other_is(pair: Pair) -> None:
    """Before the first frame."""
    _, a, b = pair
    assert (a.hellos["b"].incarnation, b.hellos["a"].incarnation) == ("store of b", "store of a")
    assert a.hellos["b"].formed
    assert dict(a.hellos["b"].founders) == {"b": "founder"}


async def test_frames_come_whole_in_order_and_once(pair: Pair) -> None:
    """In both directions at once, small ones and large ones, also empty ones."""
    _, a, b = pair
    random = Random(1)
    frames = [random.randbytes(random.choice((0, 1, 100, 5_000, 300_000))) for _ in range(300)]
    for frame in frames:
        a.send("b", frame)
        b.send("a", frame[::-1])
        if random.random() < 0.1:
            await asyncio.sleep(0)
    await b.until(lambda: len(b.frames) == len(frames))
    await a.until(lambda: len(a.frames) == len(frames))
    assert b.heard("a") == frames
    assert a.heard("b") == [frame[::-1] for frame in frames]


async def test_sending_calls_nobody(pair: Pair) -> None:
    """Neither side's handlers run inside of `send`."""
    _, a, b = pair
    a.send("b", b"x")
    assert b.frames == []
    await b.until(lambda: b.heard("a") == [b"x"])


async def test_nothing_crosses_connections(pair: Pair) -> None:
    """Of each connection the other side gets a beginning without gaps, in that connection, whenever it breaks."""
    links, a, b = pair
    random = Random(2)
    sent: dict[int, list[bytes]] = {}
    for round_ in range(12):
        await connected(a, b)
        epoch = a.up["b"]
        sent[epoch] = []
        for number in range(random.randrange(40)):
            frame = b"%d %d " % (epoch, number) + bytes(random.choice((0, 10_000)))
            sent[epoch].append(frame)
            a.transport.send("b", epoch, frame)
            a.transport.send("b", epoch - 1, b"of an older connection")
            if random.random() < 0.2:
                await asyncio.sleep(0)
        if round_ % 3 == 0 and sent[epoch]:
            await b.until(lambda: b.heard("a"))
        await links.cut("a", "b")
        await a.until(lambda epoch=epoch: a.up.get("b") != epoch)
        await links.heal("a", "b")
    await connected(a, b)
    a.send("b", b"last")
    await b.until(lambda: b.heard("a")[-1:] == [b"last"])
    epochs = {at for _, at, _ in b.frames}
    for at in epochs:
        heard = [frame for frame in b.heard("a", at) if frame != b"last"]
        if heard:
            of = int(heard[0].split()[0])
            assert heard == sent[of][:len(heard)]


async def test_frames_without_a_connection_are_dropped(pair: Pair) -> None:
    """To unknown peers, of unknown epochs, after the end."""
    links, a, b = pair
    a.transport.send("nobody", 1, b"x")
    a.transport.send("b", a.up["b"] + 1, b"x")
    epoch = a.up["b"]
    await links.cut("a", "b")
    await a.until(lambda: a.up.get("b") != epoch)
    a.transport.send("b", epoch, b"x")
    await links.heal("a", "b")
    await connected(a, b)
    a.send("b", b"y")
    await b.until(lambda: b.frames)
    assert b.heard("a") == [b"y"]


@pytest.mark.parametrize("receiver", ["a", "b"])
async def test_a_frame_of_unknown_shape_ends_the_connection(pair: Pair, receiver: str) -> None:
    """And what follows it in the connection is not delivered."""
    links, a, b = pair
    to, sender = (a, b) if receiver == "a" else (b, a)
    epochs = a.up["b"], b.up["a"]

    def refuse(peer: str, frame: bytes) -> None:
        if frame == b"bad":
            raise WireInvalid("bad")

    to.on_frame = refuse
    for frame in (b"good", b"bad", b"late"):
        sender.send(to.name, frame)
    await a.until(lambda: a.up.get("b") != epochs[0])
    await b.until(lambda: b.up.get("a") != epochs[1])
    assert to.heard(sender.name) == [b"good"]
    await links.heal("a", "b")
    await connected(a, b)
    sender.send(to.name, b"again")
    await to.until(lambda: to.heard(sender.name) == [b"good", b"again"])


async def test_three_nodes_are_three_connections(links: Links) -> None:
    """One that breaks does not touch the others."""
    a, b, c = nodes = [Node(name) for name in "abc"]
    for node in nodes:
        await links.add(node)
    for one, other in ((a, b), (a, c), (b, c)):
        await connected(one, other)
    epoch, kept = b.up["a"], a.up["c"]
    await links.cut("a", "b")
    await b.until(lambda: b.up.get("a") != epoch)
    assert a.up["c"] == kept
    a.send("c", b"to c")
    await c.until(lambda: c.heard("a") == [b"to c"])
    await links.heal("a", "b")
    await connected(a, b)


async def test_a_snapshot_comes_in_order(pair: Pair) -> None:
    """From either side, of the group that was asked for, for whoever asked."""
    _, a, b = pair
    assert await a.fetch("b", 7) == [b"7 0 for a", b"7 1 for a", b"7 2 for a"]
    assert await b.fetch("a", 0) == [b"0 0 for b", b"0 1 for b", b"0 2 for b"]


async def test_a_snapshot_needs_a_connection(pair: Pair) -> None:
    """Which shows that the peer is who it should be."""
    _, a, _ = pair
    with pytest.raises(SnapshotInvalid):
        await a.fetch("c")


async def test_a_snapshot_that_breaks_is_an_error(pair: Pair) -> None:
    """Not an end: with the connection, and wherever it is broken."""
    links, a, b = pair

    async def endless(group: int, peer: str) -> AsyncIterator[bytes]:
        while True:
            yield b"chunk"
            await asyncio.sleep(0)

    b.chunks = endless
    chunks = a.transport.fetch_snapshot("b", 1)
    assert await anext(chunks) == b"chunk"
    await links.cut("a", "b")
    with pytest.raises(SnapshotInvalid):
        async for _ in chunks:
            pass


async def test_a_source_that_fails_is_an_error(pair: Pair) -> None:
    """The receiver must not take what came for everything."""
    _, a, b = pair

    async def failing(group: int, peer: str) -> AsyncIterator[bytes]:
        yield b"chunk"
        raise SnapshotInvalid("the state is being replaced")

    b.chunks = failing
    chunks = a.transport.fetch_snapshot("b", 1)
    assert await anext(chunks) == b"chunk"
    with pytest.raises(SnapshotInvalid, match="the state is being replaced"):
        await anext(chunks)
    assert "b" in a.up, "frames go on"


async def test_a_receiver_that_loses_interest_stops_the_source(pair: Pair) -> None:
    """Nothing of the transfer runs on."""
    _, a, b = pair
    stopped = asyncio.Event()

    async def endless(group: int, peer: str) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(100_000)
                await asyncio.sleep(0)
        finally:
            stopped.set()

    b.chunks = endless
    chunks = a.transport.fetch_snapshot("b", 1)
    await anext(chunks)
    await chunks.aclose()  # type: ignore[attr-defined]
    del chunks
    async with asyncio.timeout(PATIENCE_SECONDS):
        await stopped.wait()


async def test_a_closed_transport_is_gone_for_the_others(pair: Pair) -> None:
    """It is told nothing more itself, and nothing of it runs on."""
    _, a, b = pair
    b.quiet = True
    await b.transport.close()
    await a.until(lambda: "b" not in a.up)
    a.transport.send("b", 1, b"x")
    b.transport.send("a", b.up["a"], b"x")
    assert a.frames == []
