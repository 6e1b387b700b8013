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


class Sink:
    """Encoded runs on their way to one consumer. Bounded by the credit that the consumer gave: the scheduler sends
    nothing without it, and credit is capped by the service."""

    __slots__ = ("_event", "_frames", "_parts", "_size", "closed", "consumer", "tap")

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.closed = False
        self.tap: Callable[[int, int], None] | None = None  # told of (messages, bytes) of each run from this node
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
        self.closed = True
        self._event.set()

    async def frames(self, timeout: float) -> list[bytes]:
        """Frames to send, at most about 1 MiB each; empty after `timeout` seconds (time for a heartbeat) or when closed."""
        if not self._event.is_set():
            try:
                async with asyncio.timeout(timeout):
                    await self._event.wait()
            except TimeoutError:
                return []
        frames = self._frames
        if self._parts:
            frames.append(b"".join(self._parts))
            self._parts = []
            self._size = 0
        self._frames = []
        self._event.clear()
        return frames
