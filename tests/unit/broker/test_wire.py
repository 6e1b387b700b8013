"""What the broker assembles by hand is what the generated code reads."""
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spillway.broker.core.queue import Counters, Message, Queue, Tenant
from spillway.broker.runtime.wire import gap_field, name_fields, run_parts
from spillway.contract.hashing import PART
from spillway.contract.limits import NAME_BYTES_MAX
from spillway.contract.varint import varint
from spillway.v1 import message_pb2
from spillway.v1.queue_service_pb2 import Gap, LeasedMessage, LeasedRun, LeaseResponse

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
LENGTHS = (0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152)  # where a length takes one more byte, and the last before
quick = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def short(text: str) -> str:
    """As much of a text as a name may have."""
    return text.encode()[:NAME_BYTES_MAX].decode(errors="ignore")


NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=80).map(short),
    st.integers(0, NAME_BYTES_MAX).map(lambda n: "n" * n))
BODIES = st.builds(
    lambda payload, identity, headers: message_pb2.Message(payload=payload, id=identity, headers=headers).SerializeToString(),
    st.one_of(st.binary(max_size=200), st.sampled_from([126, 127, 16_380, 20_000]).map(bytes)), NAMES,
    st.dictionaries(NAMES, NAMES, max_size=3))
MESSAGES = st.lists(st.tuples(U64, U64, U64, BODIES, U64), min_size=1, max_size=5)


def leased(names: tuple[str, str, str], messages: list[Message], token: int = 1, deadline: int = 1, attempts: int = 0,
           gap: tuple[int, int, int] | None = None) -> Queue:
    """A queue under a lease."""
    queue = Queue("\0".join(names).encode(), Counters(names[0].encode()), Tenant(b""))
    queue.front = messages
    queue.token, queue.deadline, queue.attempts, queue.gap = token, deadline, attempts, gap
    return queue


def expected(shard: int, queue: Queue, messages: list[Message]) -> LeasedRun:
    """The same run made with the generated code."""
    destination, tenant, key = queue.key.decode().split("\0")
    run = LeasedRun(shard=shard, fencing_token=queue.token, expire_unix_ms=queue.deadline, destination=destination,
                    tenant=tenant, key=key)
    for position, (sequence, enqueue_ms, _, body, _) in enumerate(messages):
        run.messages.append(LeasedMessage(
            sequence=sequence, enqueue_unix_ms=enqueue_ms, attempt=1 if position else queue.attempts + 1,
            message=message_pb2.Message.FromString(body)))
    if queue.gap is not None and queue.gap[1] < messages[-1][0]:
        run.gap.CopyFrom(Gap(count=queue.gap[0], first_sequence=queue.gap[1], last_sequence=queue.gap[2]))
    return run


def assembled(shard: int, queue: Queue, messages: list[Message]) -> bytes:
    """The bytes of a run in a response; their size is what was promised."""
    parts, size = run_parts(shard, queue, messages)
    frame = b"".join(parts)
    assert len(frame) == size
    return frame


@quick
@given(shard=U32, names=st.tuples(NAMES, NAMES, NAMES), token=U64, deadline=U64, attempts=st.integers(0, (1 << 32) - 2),
       gap=st.none() | st.tuples(U64, U64, U64), messages=MESSAGES)
def test_a_run_parses_as_the_generated_code_would_have_written_it(
        shard: int, names: tuple[str, str, str], token: int, deadline: int, attempts: int,
        gap: tuple[int, int, int] | None, messages: list[Message]) -> None:
    """Whatever names, numbers, gaps, attempts and sizes a run has, the generated code reads back exactly that run."""
    queue = leased(names, messages, token, deadline, attempts, gap)
    assert list(LeaseResponse.FromString(assembled(shard, queue, messages)).runs) == [expected(shard, queue, messages)]


@quick
@given(st.lists(st.tuples(st.tuples(NAMES, NAMES, NAMES), MESSAGES), min_size=1, max_size=4))
def test_runs_one_after_the_other_are_one_response(runs: list[tuple[tuple[str, str, str], list[Message]]]) -> None:
    """A frame is the runs' bytes joined: parsed, it holds all of them in order."""
    queues = [(leased(names, messages), messages) for names, messages in runs]
    frame = b"".join(assembled(i, queue, messages) for i, (queue, messages) in enumerate(queues))
    assert list(LeaseResponse.FromString(frame).runs) == [
        expected(i, queue, messages) for i, (queue, messages) in enumerate(queues)]


@pytest.mark.parametrize("size", LENGTHS)
def test_a_stored_message_of_any_size_passes_unchanged(size: int) -> None:
    """Around every size at which a length needs another byte, the body arrives as it was stored."""
    body = message_pb2.Message(payload=b"x" * size).SerializeToString()
    for cut in {0, min(size, len(body) - size)}:  # the payload, and the whole stored message, of exactly this size
        exact = message_pb2.Message(payload=b"x" * (size - cut)).SerializeToString()
        messages: list[Message] = [(7, 8, 0, exact, 0)]
        queue = leased(("d", "t", "k"), messages)
        run = LeaseResponse.FromString(assembled(3, queue, messages)).runs[0]
        assert run.messages[0].message.payload == b"x" * (size - cut)
        assert run.messages[0].message.SerializeToString() == exact


def test_only_the_head_carries_earlier_attempts() -> None:
    """The head's attempt counts its failures; every message behind it is delivered for the first time."""
    messages: list[Message] = [(n, 0, 0, b"", 0) for n in (4, 5, 6)]
    queue = leased(("d", "t", "k"), messages, attempts=41)
    run = LeaseResponse.FromString(assembled(1, queue, messages)).runs[0]
    assert [m.attempt for m in run.messages] == [42, 1, 1]


def test_a_gap_is_told_once_it_begins() -> None:
    """Redriven messages may come before all that is missing: then there is nothing to tell yet."""
    for first, told in ((4, True), (5, True), (6, False), (7, False)):
        queue = leased(("d", "t", "k"), [(n, 0, 0, b"", 0) for n in (3, 6)], gap=(1, first, 7))
        run = LeaseResponse.FromString(assembled(1, queue, queue.front)).runs[0]
        assert run.HasField("gap") == told


def test_a_message_of_an_unordered_queue_goes_by_the_name_of_the_queue() -> None:
    """The part that makes it a queue of its own is nobody's business."""
    whole: Any = LeasedRun.FromString(name_fields(b"d\0t\0k" + PART + b"1f"))
    assert (whole.destination, whole.tenant, whole.key) == ("d", "t", "k")


@quick
@given(U64)
@example(0)
@example(127)
@example(128)
@example(16_383)
@example(16_384)
@example((1 << 64) - 1)
def test_a_varint_is_the_one_that_protobuf_writes(value: int) -> None:
    """Every unsigned number is written in protobuf's shortest form, and read back by it."""
    assert Gap.FromString(b"\x08" + varint(value)).count == value
    if value:
        assert b"\x08" + varint(value) == Gap(count=value).SerializeToString()


@quick
@given(st.tuples(U64, U64, U64))
def test_a_gap_parses(gap: tuple[int, int, int]) -> None:
    """A gap's count and both ends come back, at any size."""
    found = LeasedRun.FromString(gap_field(gap)).gap
    assert (found.count, found.first_sequence, found.last_sequence) == gap


@quick
@given(st.tuples(NAMES, NAMES, NAMES))
def test_names_parse(names: tuple[str, str, str]) -> None:
    """Destination, tenant and key come back, empty ones and those at the limit, too."""
    found: Any = LeasedRun.FromString(name_fields("\0".join(names).encode()))
    assert (found.destination, found.tenant, found.key) == names
