"""The snapshots that a node sends: few at a time, all together within a rate, and each goes on where its transfer broke.

A snapshot pins the files of its moment, so that there is a limit to how many there are and to how long one waits for a
receiver that has lost its connection: it comes back within seconds, or takes a new one.
"""
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from spillway.cluster.errors import SnapshotInvalid
from spillway.cluster.snapshots import RESUME_SECONDS, Exporter, Position

SNAPSHOT_BYTES_PER_SECOND = 64 << 20  # leaves room for the traffic of the day
RUNNING_MAX = 4  # more at once only make each one slower, and the log that is kept for it longer
KEPT_MAX = 4  # broken ones that wait to go on
STILL_THERE_SECONDS = 1.0
TAKEN_SECONDS = 15.0  # a receiver that does not take a chunk for so long is gone, or its disk is
BURST_SECONDS = 0.05  # what was not used may be used later: an event loop wakes late

Key = tuple[int, str]  # group, who receives it


class Pace:
    """A rate that whoever sends bytes shares, in the order of asking."""

    def __init__(self, bytes_per_second: int) -> None:
        self._bytes_per_second = bytes_per_second
        self._due = 0.0  # when everything that was taken may have been sent

    async def take(self, size: int) -> None:
        """Waits until so many bytes may be sent."""
        now = asyncio.get_running_loop().time()
        self._due = max(self._due, now - BURST_SECONDS) + size / self._bytes_per_second
        await asyncio.sleep(max(0.0, self._due - now))


class _Call:
    """One transfer, as long as its connection lasts."""

    def __init__(self) -> None:
        self.exporter: Exporter | None = None


class Exports:
    """All exports of a node."""

    def __init__(self, begin: Callable[[int], Exporter], bytes_per_second: int) -> None:
        """`begin(group)` gives a group's state as of now."""
        self._begin = begin
        self.pace = Pace(bytes_per_second).take
        self._slots = asyncio.Semaphore(RUNNING_MAX)
        self._running: dict[Key, _Call] = {}
        self._kept: dict[Key, tuple[Exporter, asyncio.TimerHandle]] = {}

    async def send(self, group: int, peer: str, position: Position | None) -> AsyncGenerator[bytes, None]:
        """The chunks of a group's state for a peer: from `position` on if that snapshot is still there, else of a new one, from its
        first chunk on. While it waits for its turn there are empty chunks, so that the receiver knows that it is there. A later call
        for the same group and peer ends an earlier one. Raises StorageFailed."""
        key, call = (group, peer), _Call()
        if key not in self._running:
            async with aclosing(self._slot()) as signs:
                async for _ in signs:
                    yield b""
            if key in self._running:
                self._slots.release()
        if (earlier := self._running.get(key)) is not None:  # it may not have noticed yet that its connection is gone
            call.exporter = earlier.exporter
        self._running[key] = call
        loop, timer = asyncio.get_running_loop(), None
        try:
            exporter = call.exporter = self._exporter(key, call.exporter, position)
            for chunk in exporter:
                await self.pace(len(chunk))
                if self._running.get(key) is not call:
                    return
                timer = loop.call_later(TAKEN_SECONDS, self._end, key, call)
                yield chunk
                timer.cancel()
                if self._running.get(key) is not call:
                    return
        finally:
            if timer is not None:
                timer.cancel()
            self._end(key, call)

    def _end(self, key: Key, call: _Call) -> None:
        """Gives up its place, unless another call has it already."""
        if self._running.get(key) is call:
            del self._running[key]
            self._slots.release()
            if call.exporter is not None and not call.exporter.ended:
                self._keep(key, call.exporter)

    async def _slot(self) -> AsyncGenerator[None, None]:
        """Takes a place among those that run, in the order of asking; gives a sign from time to time until there is one."""
        turn = asyncio.ensure_future(self._slots.acquire())
        taken = False
        try:
            while not turn.done():
                await asyncio.wait((turn,), timeout=STILL_THERE_SECONDS)
                if not turn.done():
                    yield
            taken = True
        finally:
            if not taken and not turn.cancel():
                self._slots.release()

    def _exporter(self, key: Key, exporter: Exporter | None, position: Position | None) -> Exporter:
        """The one to go on with, or a new one."""
        if (kept := self._kept.pop(key, None)) is not None:
            exporter = kept[0]
            kept[1].cancel()
        if exporter is not None:
            if position is not None:
                try:
                    exporter.resume(position)
                    return exporter
                except SnapshotInvalid:
                    pass  # of another moment: a new one it is
            exporter.close()
        return self._begin(key[0])

    def _keep(self, key: Key, exporter: Exporter) -> None:
        """For a while: its receiver may come back."""
        while len(self._kept) >= KEPT_MAX:
            self._drop(next(iter(self._kept)))
        self._kept[key] = exporter, asyncio.get_running_loop().call_later(RESUME_SECONDS, self._drop, key)

    def _drop(self, key: Key) -> None:
        exporter, timer = self._kept.pop(key)
        timer.cancel()
        exporter.close()

    def close(self) -> None:
        """Lets go of those that wait."""
        for key in list(self._kept):
            self._drop(key)

    def __repr__(self) -> str:
        return f"<exports: {len(self._running)} running, {len(self._kept)} kept>"
