"""What is ready for one consumer: bounded frames, in order, waking whoever writes them."""
from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from spillway.broker.core.scheduler import Consumer
from spillway.broker.runtime.consumers import Sink
from spillway.contract.limits import FRAME_BYTES_SOFT_MAX

LONG = 30.0  # seconds: a test that waits this long has failed


def sink() -> Sink:
    """The sink of some consumer."""
    return Sink(Consumer("c"))


async def test_runs_of_one_turn_leave_as_one_frame() -> None:
    """What was pushed before the writer looks is joined: one write for many leases."""
    out = sink()
    out.push([b"a", b"b"], 2)
    out.push([b"c"], 1)
    assert await out.frames(LONG) == [b"abc"]


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 3 << 19), st.booleans()), max_size=12))
def test_frames_keep_order_and_size(runs: list[tuple[int, bool]]) -> None:
    """Runs and foreign frames leave in the order of their coming; a frame passes 1 MiB only if one run alone does."""
    async def body() -> None:
        out = sink()
        sent = []
        for number, (size, foreign) in enumerate(runs):
            data = bytes((number,)) * size
            sent.append(data)
            if foreign:
                out.push_frame(data)
            else:
                out.push([data[:1], data[1:]], size)
        out.close()
        frames = await out.frames(LONG)
        assert b"".join(frames) == b"".join(sent)
        assert all(len(f) <= FRAME_BYTES_SOFT_MAX or f in sent for f in frames)
        assert all(data in frames for data, (_, foreign) in zip(sent, runs, strict=True) if foreign)

    asyncio.run(body())


async def test_a_run_that_fills_a_frame_exactly_shares_it() -> None:
    """The limit itself is inside; one byte more starts another frame."""
    out = sink()
    out.push([b"x" * (FRAME_BYTES_SOFT_MAX - 1)], FRAME_BYTES_SOFT_MAX - 1)
    out.push([b"y"], 1)
    out.push([b"z"], 1)
    assert [len(f) for f in await out.frames(LONG)] == [FRAME_BYTES_SOFT_MAX, 1]


async def test_a_quiet_stream_gives_time_for_a_heartbeat() -> None:
    """Nothing to send: an empty answer after the timeout, again and again, and what comes later still arrives."""
    out = sink()
    assert await out.frames(0.001) == []
    assert await out.frames(0.001) == []
    out.push([b"late"], 4)
    assert await out.frames(LONG) == [b"late"]
    assert await out.frames(0.001) == []


async def test_a_waiting_writer_is_woken_by_a_run_and_by_a_frame() -> None:
    """The writer sleeps until something comes, whichever way it comes."""
    out = sink()
    for push in (lambda: out.push([b"r"], 1), lambda: out.push_frame(b"r")):
        writer = asyncio.create_task(out.frames(LONG))
        await asyncio.sleep(0)
        assert not writer.done()
        push()
        assert await writer == [b"r"]


async def test_closing_wakes_the_writer_with_what_is_left() -> None:
    """A close ends the wait at once; runs pushed before it are still handed out."""
    out = sink()
    writer = asyncio.create_task(out.frames(LONG))
    await asyncio.sleep(0)
    out.close()
    assert await writer == [] and out.closed
    left = sink()
    left.push([b"left"], 4)
    left.close()
    assert await left.frames(LONG) == [b"left"] and left.closed
