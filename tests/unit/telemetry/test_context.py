"""Trace context in the bytes of messages."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from spillway.contract.telemetry.context import TraceContext, find, ids_of, is_sampled, of_headers, parse, sampled, write
from spillway.v1.message_pb2 import Message

CONTEXT = TraceContext(0xABC << 100, 0x123, True)
TEXT = write(CONTEXT)
HEADERS = st.dictionaries(st.text(max_size=8), st.text(max_size=300), max_size=4)


@given(st.text(max_size=300), HEADERS, st.binary(max_size=300), st.booleans())
def test_it_is_found_in_the_bytes_as_in_the_object(id_: str, headers: dict[str, str], payload: bytes, traced: bool) -> None:
    """Whatever else is in a message, its header is found, and nothing that only looks like one."""
    if traced:
        headers["traceparent"] = TEXT
    body = Message(id=id_, headers=headers, payload=payload).SerializeToString()
    assert find(body) == (TEXT.encode() if traced else None)
    assert sampled(body) == (TEXT.encode() if traced else None)
    assert ids_of(TEXT.encode()) == (CONTEXT.trace_id.to_bytes(16, "big"), CONTEXT.span_id.to_bytes(8, "big"))


def test_a_payload_that_looks_like_a_header_is_none() -> None:
    """Payloads are never looked into."""
    inner = Message(headers={"traceparent": TEXT}).SerializeToString()
    assert find(Message(payload=inner).SerializeToString()) is None
    assert find(Message(headers={"x": inner.decode("latin-1")}).SerializeToString()) is None
    assert find(Message(headers={"xtraceparent": TEXT, "traceparent": "short"}).SerializeToString()) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_no_error(body: bytes) -> None:
    """What is no message has no context."""
    sampled(body)
    sampled(b"\x12\xff\xff\xff\xff" + body)


def test_what_a_traceparent_may_be() -> None:
    """Version 00, lower case, no zero ids; the flag is the last bit."""
    assert parse(TEXT) == CONTEXT
    assert parse(TEXT[:-2] + "00") == CONTEXT._replace(sampled=False)
    assert parse(TEXT[:-2] + "03") == CONTEXT
    assert [is_sampled(f"{flags:02x}".encode()) for flags in range(256)] == [bool(flags & 1) for flags in range(256)]
    for wrong in (TEXT.upper(), "ff" + TEXT[2:], TEXT[:-1], TEXT + "0", "00-" + "0" * 32 + TEXT[35:], TEXT[:36] + "0" * 16 + "-01", ""):
        assert parse(wrong) is None and of_headers({"traceparent": wrong}) is None
        assert sampled(Message(headers={"traceparent": wrong}).SerializeToString()) is None
    assert of_headers({}) is None
