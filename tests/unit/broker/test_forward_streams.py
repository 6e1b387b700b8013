"""Streams over which a node passes on what others lead."""
from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from spillway.broker.runtime import forward
from spillway.broker.runtime.calls import Batch, Call
from spillway.broker.runtime.forward import PeerLink
from spillway.v1.message_pb2 import ItemError
from spillway.v1.queue_service_pb2 import ProduceResponse


async def test_what_is_sent_over_a_closed_link_fails() -> None:
    """A node that stops closes its links; whoever still passes something on is told, and no task ends with an error of its own."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    link = PeerLink("n2", "127.0.0.1:1")
    await link.close()
    failed: list[tuple[object, str]] = []
    link.ack._fail = lambda item, why: failed.append((item, why))
    link.ack.send(b"", "item")
    task = link.ack._task
    assert task is not None
    await asyncio.wait((task,))
    link.ack._task = None
    del task
    assert [item for item, _ in failed] == ["item"] and not errors


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


def stream(answers: Answers, answer: Callable[[Any, bytes], None], lost: Callable[[Any, str], None]) -> forward._Stream:
    """A forwarding stream over it."""
    link: Any = SimpleNamespace(node_id="n2", channel=SimpleNamespace(stream_stream=lambda method: answers))
    return forward._Stream(link, "Produce", answer, lost)


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
    sending = stream(Answers(GOOD, spoilt, GOOD), forward._produced, forward._produce_lost)
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
    sending = stream(answers, forward._produced, forward._produce_lost)
    one, other = batch(2), batch(2)
    sending.send(b"", (None, 1, one))
    await asyncio.wait_for(one.call.done, 5)
    answers._asked.release()
    assert sending._task is not None
    await asyncio.wait_for(sending._task, 5)
    sending.send(b"", (None, 1, other))  # on a new one, which ends
    await asyncio.wait_for(other.call.done, 5)
    assert other.call.errors
