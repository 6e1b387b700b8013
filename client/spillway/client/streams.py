"""A stream of batches that are answered in order: what Produce and Ack have in common.

One writer and one reader task; at most a few requests in flight; a stream that breaks or hangs gives back what was not
answered. What to send, and what to do with answers, is the subclass's.
"""
from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import grpc
from spillway.client.connection import Health, answers
from spillway.client.errors import InternalError, SpillwayError, Unavailable, from_rpc_error
from spillway.client.retry import is_final
from spillway.v1.message_pb2 import ItemError

log = logging.getLogger("spillway.client")

WATCH_SECONDS = 0.25  # between looks for a stream that hangs
SILENCE_SECONDS_MAX = 5.0  # requests wait, and nothing comes: is the node up? It may only have much to do
QUESTION_SECONDS_MAX = 5.0  # for an answer to that; what is sent again to a node with much to do makes that more
MOVED_SECONDS_MAX = 1.0  # of silence, once another node is known to lead the shard: it is not asked
ANSWER_SECONDS_MAX = 300.0  # a request waits for so long in any case


class Batch:
    """One request. Subclasses add what it carries."""

    __slots__ = ("frame", "sent_at")

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self.sent_at = 0.0


B = TypeVar("B", bound=Batch)


class BatchStream(Generic[B]):
    """Keeps one stream to one node going while there is work."""

    def __init__(self, address: str, health: Health) -> None:
        self.address = address
        self.health = health
        self.in_flight: deque[B] = deque()
        self._work = asyncio.Event()
        self._heard_at = 0.0  # when the node answered something
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name=f"spillway {type(self).__name__} {address}")

    # -- to be provided ------------------------------------------------------------------------------------------

    def channel(self) -> grpc.aio.Channel:
        """The channel that the call goes over."""
        raise NotImplementedError

    def open(self) -> grpc.aio.StreamStreamCall[Any, Any]:
        """Opens the call."""
        raise NotImplementedError

    def token(self) -> str:
        """The token that a call opened now carries."""
        raise NotImplementedError

    def fill(self) -> B | None:
        """The next request, or None if nothing is to be sent now. `wake` makes it be asked again."""
        raise NotImplementedError

    def check(self, batch: B, response: Any) -> None:
        """Raises InternalError unless the response answers the batch, and does nothing."""
        raise NotImplementedError

    def answered(self, batch: B, response: Any) -> None:
        """The oldest batch in flight was answered."""
        raise NotImplementedError

    def broken(self, batches: list[B], error: SpillwayError, final: bool) -> None:
        """The stream ended; `batches` were not answered. `final`: it would end so on any node."""
        raise NotImplementedError

    def moved(self, batch: B) -> bool:
        """Whether this node is known not to be the right one any more for what the batch carries."""
        raise NotImplementedError

    # -- for the owner -------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to send."""
        self._work.set()

    async def close(self) -> None:
        """Ends the stream. What is in flight stays unanswered."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # -- inner ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            try:
                error, final = await self._serve()
            except Exception as bug:  # else whoever waits would wait for ever
                log.exception("bug in the stream to %s", self.address)
                error, final = InternalError(f"{type(bug).__name__}: {bug}"), True
            batches = list(self.in_flight)
            self.in_flight.clear()
            wait = self.health.failed(self.address)
            self.broken(batches, error, final)
            await asyncio.sleep(wait)

    async def _serve(self) -> tuple[SpillwayError, bool]:
        """One call, until it ends. Returns why."""
        token = self.token()
        call = self.open()
        reader = asyncio.create_task(self._read(call))
        writer = asyncio.create_task(self._write(call))
        question: asyncio.Task[bool] | None = None
        try:
            while True:
                waiting = (reader, writer) if question is None else (reader, writer, question)
                await asyncio.wait(waiting, timeout=WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if reader.done() or writer.done():
                    break
                if question is not None and question.done():
                    alive, question = question.result(), None
                    if not alive:
                        return Unavailable(f"{self.address} does not answer"), False
                if self._late():
                    return Unavailable(f"{self.address} does not answer"), False
                if question is None and self._silence() > SILENCE_SECONDS_MAX:
                    question = asyncio.create_task(self._alive())
        finally:
            call.cancel()
            reader.cancel()
            writer.cancel()
            if question is not None:
                question.cancel()
            ended = await asyncio.gather(reader, writer, return_exceptions=True)
        for result in ended:
            if isinstance(result, grpc.aio.AioRpcError):
                return from_rpc_error(result), is_final(result.code()) and self.token() == token  # a new one may be better
        for result in ended:
            if isinstance(result, InternalError):
                return result, True
            if isinstance(result, Exception) and not isinstance(result, asyncio.InvalidStateError):
                raise result  # a bug
        return Unavailable(f"{self.address} ended the stream"), False

    def _late(self) -> bool:
        """Whether the oldest request has waited for too long, whatever the node says."""
        if not self.in_flight:
            return False
        oldest = self.in_flight[0]
        return self._loop.time() - oldest.sent_at > ANSWER_SECONDS_MAX or (self._silence() > MOVED_SECONDS_MAX and self.moved(oldest))

    def _silence(self) -> float:
        """For how many seconds nothing has come although requests wait."""
        return self._loop.time() - max(self.in_flight[0].sent_at, self._heard_at) if self.in_flight else 0.0

    async def _alive(self) -> bool:
        alive = await answers(self.channel(), QUESTION_SECONDS_MAX)
        if alive:
            self._heard_at = self._loop.time()
        return alive

    async def _write(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        work = self._work
        while True:
            batch = self.fill()
            if batch is None:
                work.clear()
                await work.wait()
                continue
            batch.sent_at = self._loop.time()
            self.in_flight.append(batch)
            await call.write(batch.frame)

    async def _read(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        in_flight = self.in_flight
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                return
            self.health.worked(self.address)
            self._heard_at = self._loop.time()
            if not in_flight:
                raise InternalError(f"{self.address} answered what it was not asked")
            self.check(in_flight[0], response)
            self.answered(in_flight.popleft(), response)
            self._work.set()


def check_answer(asked: int, answered: int, errors: Sequence[ItemError]) -> None:
    """Raises InternalError unless an answer is one to so many items."""
    if answered != asked or any(error.index >= asked for error in errors):
        raise InternalError(f"the broker answered {answered} items, and refused {len(errors)}, of a request of {asked}")
