"""A TCP proxy between the nodes, and between clients and nodes, that can lose what passes through it: where network namespaces
are not allowed, it is the network. `python -m tests.torture.proxy`, a line of JSON for each order, answered by a line.

A link is directed: what A sends to B, on connections of either. Its modes:

    pass    everything arrives
    drop    nothing arrives and nobody is told: bytes wait as if the network repeated them for ever, and come when it heals
    refuse  connections are reset, new ones too
    slow    everything arrives late, and not much of it in a second
    lossy   as over a network that loses packets: what arrives stops now and then for as long as a repetition takes
"""
from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import sys
from typing import Any

PIECE_BYTES = 16 << 10
SLOW_SECONDS = 0.04  # for each piece: a slow link carries 400 KB/s
LOSSY_PART = 0.05  # of the pieces is lost once
LOSSY_SECONDS = 0.2  # the shortest time after which TCP repeats
MODES = ("pass", "drop", "refuse", "slow", "lossy")

Link = tuple[str, str]  # from, to


class Links:
    """The mode of every directed link."""

    def __init__(self, seed: int) -> None:
        self._modes: dict[Link, str] = {}
        self._changed = asyncio.Event()
        self._random = random.Random(seed)

    def mode(self, link: Link) -> str:
        """How a link is."""
        return self._modes.get(link, "pass")

    def set(self, link: Link, mode: str) -> None:
        """Changes a link."""
        assert mode in MODES, mode
        self._modes[link] = mode
        self._changed.set()
        self._changed = asyncio.Event()

    async def open(self, link: Link) -> bool:
        """Waits until a piece may pass; False: the connection is to be reset."""
        while (mode := self.mode(link)) == "drop":
            await self._changed.wait()
        if mode == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        elif mode == "lossy" and self._random.random() < LOSSY_PART:
            await asyncio.sleep(LOSSY_SECONDS)
        return mode != "refuse"

    async def refused(self, one: Link, other: Link) -> None:
        """Returns once either link refuses."""
        while "refuse" not in (self.mode(one), self.mode(other)):
            await self._changed.wait()


class Proxy:
    """Listens for what `source` opens to `target`."""

    def __init__(self, links: Links, source: str, target: str, host: str, port: int) -> None:
        self._links = links
        self._there: Link = (source, target)
        self._back: Link = (target, source)
        self._host, self._port = host, port
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Takes connections from now on."""
        return await asyncio.start_server(self._accept, host, port, limit=PIECE_BYTES)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        tasks: list[asyncio.Task[Any]] = []
        try:
            # What is lost of a handshake is lost in either direction.
            if not (await self._links.open(self._there) and await self._links.open(self._back)):
                return
            there, upstream = await asyncio.open_connection(self._host, self._port, limit=PIECE_BYTES)
            tasks = [asyncio.create_task(self._pump(reader, upstream, self._there)),
                     asyncio.create_task(self._pump(there, writer, self._back)),
                     asyncio.create_task(self._links.refused(self._there, self._back))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # the node is not there: its client is told by a reset
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in (writer, upstream):
                if one is not None:
                    _reset(one)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: Link) -> None:
        """Moves bytes until the connection ends; what it has in hand it delivers first, if the link lets it."""
        try:
            while piece := await reader.read(PIECE_BYTES):
                if not await self._links.open(link):
                    return
                writer.write(piece)
                await writer.drain()
            await self._links.open(link)  # the news of the end is lost like anything else
        except OSError:
            await self._links.open(link)


def _reset(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is not None and not writer.is_closing():
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


async def _serve() -> None:
    """Orders: {"listen": [source, target, host, port, target host, target port]} and {"links": [[source, target, mode], ...]}."""
    links = Links(seed=0)
    servers = []
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        order = json.loads(line)
        if "listen" in order:
            source, target, host, port, target_host, target_port = order["listen"]
            servers.append(await Proxy(links, source, target, target_host, target_port).listen(host, port))
        for source, target, mode in order.get("links", ()):
            links.set((source, target), mode)
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(_serve())
