"""The proxy loses what it is told to lose, in the direction that it is told."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.torture.proxy import Links, Proxy


class Pair:
    """Both ends of a connection from a to b, and the links between them."""

    def __init__(self, links: Links, port: int) -> None:
        self.links = links
        self.port = port
        self.accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.far_reader, self.far_writer = await self.accepted.get()

    async def passes(self, there: bool, back: bool) -> None:
        """A byte arrives from a at b, and from b at a, or does not."""
        self.writer.write(b"x")
        self.far_writer.write(b"y")
        for reader, expected in ((self.far_reader, there), (self.reader, back)):
            task = asyncio.create_task(reader.read(1))
            if not expected:
                for _ in range(100):  # everything is in this process: what takes longer does not come
                    await asyncio.sleep(0.001)
                assert not task.done()
                task.cancel()
            else:
                assert await task
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    links = Links(seed=1)
    made = Pair(links, 0)
    writers = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await made.accepted.put((reader, writer))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        proxy = Proxy(links, "a", "b", "127.0.0.1", server.sockets[0].getsockname()[1])
        front = await proxy.listen("127.0.0.1", 0)
        made.port = front.sockets[0].getsockname()[1]
        async with front:
            await made.connect()
            try:
                yield made
            finally:
                links.set(("a", "b"), "pass")
                links.set(("b", "a"), "pass")
                for writer in (made.writer, *writers):
                    writer.close()
                await asyncio.sleep(0.05)


async def test_a_link_drops_one_direction_and_delivers_when_it_heals() -> None:
    """A one-way cut loses what goes one way, without a word; what was lost comes when it heals."""
    async with pair() as made:
        await made.passes(True, True)
        made.links.set(("a", "b"), "drop")
        await made.passes(False, True)
        made.links.set(("b", "a"), "drop")
        await made.passes(False, False)
        made.links.set(("a", "b"), "pass")
        made.links.set(("b", "a"), "pass")
        assert await made.far_reader.readexactly(2) == b"xx"
        assert await made.reader.readexactly(1) == b"y"


async def test_a_refusing_link_resets_its_connections() -> None:
    """Both ends are told, and so is who comes anew; healed, connections are taken again."""
    async with pair() as made:
        made.links.set(("a", "b"), "refuse")
        for reader in (made.reader, made.far_reader):
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        made.links.set(("a", "b"), "pass")
        await made.connect()
        await made.passes(True, True)


@pytest.mark.parametrize("mode", ["slow", "lossy"])
async def test_a_bad_link_delivers_everything(mode: str) -> None:
    """A slow or lossy link is late; nothing is missing, and nothing changes places."""
    async with pair() as made:
        made.links.set(("a", "b"), mode)
        body = b"".join(b"%06d" % n for n in range(20_000))
        made.writer.write(body)
        assert await made.far_reader.readexactly(len(body)) == body
