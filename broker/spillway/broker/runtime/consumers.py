"""Lease streams: what is ready to be sent to one consumer."""
from __future__ import annotations

import asyncio
from collections.abc import Callable

from spillway.broker.core.scheduler import Consumer
from spillway.contract.limits import FRAME_BYTES_SOFT_MAX

_STREAM = "\n"  # between a session and the number of its stream; no session has control characters


def session_of(session: str, stream: int) -> str:
    """How leases name the stream of a session over which they were granted."""
    return f"{session}{_STREAM}{stream}"


def stream_of(consumer: str, session: str) -> int | None:
    """The stream over which a lease of the session was granted, 0 if that was not noted; None: it is another session's."""
    found, separator, stream = consumer.partition(_STREAM)
    if found != session:
        return None
    return int(stream) if separator else 0


def is_over(number: int, stream: int, open_: set[int]) -> bool:
    """Whether the consumer that has begun `stream`, beside those that are open, takes nothing more from its stream `number`."""
    return number < stream and number not in open_


class Sink:
    """Encoded runs on their way to one consumer. Bounded by the credit that the consumer gave: the scheduler sends
    nothing without it, and credit is capped by the service."""

    __slots__ = ("_event", "_frames", "_parts", "_size", "admit", "closed", "consumer", "on_close")

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.closed = False
        self.on_close: Callable[[], None] = lambda: None
        self.admit: Callable[[int, int], bool] | None = None  # whether a run from this node (messages, bytes) may still be sent
        self._parts: list[bytes] = []
        self._size = 0
        self._frames: list[bytes] = []
        self._event = asyncio.Event()

    def push(self, parts: list[bytes], size: int) -> None:
        """One run, as pieces."""
        if self._size and self._size + size > FRAME_BYTES_SOFT_MAX:
            self._frames.append(b"".join(self._parts))
            self._parts = []
            self._size = 0
        self._parts += parts
        self._size += size
        self._event.set()

    def push_frame(self, frame: bytes) -> None:
        """A whole frame from another node."""
        if self._parts:
            self._frames.append(b"".join(self._parts))
            self._parts = []
            self._size = 0
        self._frames.append(frame)
        self._event.set()

    def close(self) -> None:
        """Nothing more will come; wakes the writer."""
        if not self.closed:
            self.closed = True
            self._event.set()
            self.on_close()

    async def frames(self, timeout: float) -> list[bytes]:
        """Frames to send, at most about 1 MiB each; empty after `timeout` seconds (time for a heartbeat) or when closed."""
        if not self._event.is_set() and not self.closed:
            try:
                async with asyncio.timeout(timeout):
                    await self._event.wait()
            except TimeoutError:
                return []
        return self.rest()

    def rest(self) -> list[bytes]:
        """What is to be sent now."""
        frames = self._frames
        if self._parts:
            frames.append(b"".join(self._parts))
            self._parts = []
            self._size = 0
        self._frames = []
        self._event.clear()
        return frames


class LeaseStreams:
    """The open Lease streams of consumers that have sessions."""

    def __init__(self) -> None:
        self._sinks: dict[str, dict[int, Sink]] = {}  # session -> number of the stream -> where it gets its runs

    def begun(self, session: str, stream: int, open_: set[int], sink: Sink) -> None:
        """Nothing more is granted over earlier streams that are not among the open ones: their consumer takes nothing from them."""
        streams = self._sinks.setdefault(session, {})
        for number, former in streams.items():
            if is_over(number, stream, open_):
                former.close()
        streams[stream] = sink

    def ended(self, session: str, stream: int, sink: Sink) -> None:
        """A stream is over; without effect if it has no session, or another one has its number."""
        streams = self._sinks.get(session, {})
        if streams.get(stream) is sink:
            del streams[stream]
            if not streams:
                del self._sinks[session]
