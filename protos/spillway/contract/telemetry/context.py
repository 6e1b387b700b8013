"""W3C trace context in message headers: `traceparent` and `tracestate`.

A message is stored as the bytes in which it came, and so is its trace context: it is there after days and retries. Here it is
read from those bytes, without making an object of the message.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
LENGTH = 55  # of a traceparent of version 00
_HEADERS, _PAYLOAD = 0x12, 0x1A  # tags of spillway.v1.Message: headers = 2 (a map), payload = 3
_ENTRY = b"\x0a\x0btraceparent\x12\x37"  # key = 1, value = 2 of a map's entry, the value being of 55 bytes
_FORM = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII)
_SAMPLED_FORM = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f][13579bdf]")
_STATE_BYTES_MAX = 512
_LOOK_BYTES = 4096  # beyond, fields are walked over: a search through a large payload takes longer
_YES = frozenset(bytes((c,)) for c in b"13579bdf")


class TraceContext(NamedTuple):
    """Where in which trace something was created."""

    trace_id: int
    span_id: int
    sampled: bool


def parse(traceparent: str) -> TraceContext | None:
    """What a traceparent says; None if it says nothing that version 00 of the standard allows."""
    found = _FORM.fullmatch(traceparent)
    if found is None:
        return None
    return TraceContext(int(found[1], 16), int(found[2], 16), bool(int(found[3], 16) & 1))


def write(context: TraceContext) -> str:
    """The traceparent of a context."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{'01' if context.sampled else '00'}"


def of_headers(headers: Mapping[str, str]) -> TraceContext | None:
    """The context in a message's headers, None if there is none."""
    found = headers.get(TRACEPARENT)
    return None if found is None or len(found) != LENGTH else parse(found)


def state_of_headers(headers: Mapping[str, str]) -> str:
    """What vendors say of the trace; empty if nothing, or more than they may."""
    state = headers.get(TRACESTATE, "")
    return state if len(state) <= _STATE_BYTES_MAX else ""


def find(message: bytes) -> bytes | None:
    """The traceparent of an encoded spillway.v1.Message, as it came; None if there is none of 55 bytes. Walks over the fields before
    the payload and looks into none of them but headers."""
    at, end = 0, len(message)
    try:
        while at < end:
            tag = message[at]
            if tag & 7 != 2 or tag >= 0x80:
                return None  # no field of this version
            size, at = message[at + 1], at + 2
            if size >= 0x80:
                size, shift = size & 0x7F, 7
                while True:
                    byte = message[at]
                    at += 1
                    size |= (byte & 0x7F) << shift
                    if byte < 0x80:
                        break
                    shift += 7
            if tag == _HEADERS and message.startswith(_ENTRY, at) and size == len(_ENTRY) + LENGTH:
                return message[at + len(_ENTRY):at + size]
            at += size
    except IndexError:
        pass
    return None


def is_sampled(traceparent: bytes) -> bool:
    """Whether a traceparent's flag says so: looks at one character. What else is wrong with it is found out by `parse`."""
    return traceparent[-1] in b"13579bdf"


def sampled(message: bytes) -> bytes | None:
    """The traceparent of an encoded message if it is of a sampled trace, else None; see `ids_of`. Most are told from one character:
    what looks like a traceparent and says no is taken at its word, even in a place where it is none."""
    at = message.find(_ENTRY, 0, _LOOK_BYTES)
    if at < 0:
        if len(message) <= _LOOK_BYTES:
            return None
    elif message[at + len(_ENTRY) + LENGTH - 1:at + len(_ENTRY) + LENGTH] not in _YES:
        return None
    found = find(message)
    return found if found is not None and _SAMPLED_FORM.fullmatch(found) else None


def ids_of(traceparent: bytes) -> tuple[bytes, bytes]:
    """Ids of trace and span in a traceparent that `sampled` gave."""
    text = traceparent.decode("ascii")
    return bytes.fromhex(text[3:35]), bytes.fromhex(text[36:52])
