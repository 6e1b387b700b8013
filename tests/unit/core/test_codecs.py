"""Entries and rows as bytes: what was written is read, anything else is refused by the one declared error."""
from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.broker.core import rows
from spillway.broker.core.bounds import COUNT_MAX, NUMBER_MAX, TIME_MS_MAX
from spillway.broker.core.entry import VERSION, Enqueue, Entry, decode_entry, encode_entry
from spillway.broker.core.errors import CorruptEntry

UNSIGNED = st.integers(0, (1 << 64) - 1)
NUMBER = st.integers(0, NUMBER_MAX)
COUNT = st.integers(0, COUNT_MAX)
TIME = st.integers(0, TIME_MS_MAX)
NAME = st.binary(max_size=20)
TEXT = st.text(max_size=10)
PART = st.text(st.characters(min_codepoint=0x20, exclude_categories=["Cs", "Cc"]), max_size=5)
QUEUES = st.tuples(PART, PART, PART).map(lambda parts: "\0".join(parts).encode())
SCOPES = QUEUES.map(lambda queue: queue[:queue.rindex(b"\0")]) | PART.map(str.encode)
DEAD_KEYS = NAME.map(rows.DEAD.__add__)
ROWS = [rows.QueueRow, rows.StatsRow, rows.TenantRow, rows.ProducerRow, rows.CopierRow, rows.GateRow, rows.ClockRow, rows.DeadRow]
SAMPLES: dict[type, msgspec.Struct] = {
    rows.QueueRow: rows.QueueRow(1, 3, 1 << 40, 2, 99, 98, 7 << 20, 3, 1, 1_000, "c", (2, 5, 6), 77, 9),
    rows.StatsRow: rows.StatsRow(1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    rows.TenantRow: rows.TenantRow(1, 2, 3_000),
    rows.ProducerRow: rows.ProducerRow(1, 17, 5 << 20),
    rows.CopierRow: rows.CopierRow(1, 3 << 20, 17, 1 << 40),
    rows.GateRow: rows.GateRow(1, 1_000, 3),
    rows.ClockRow: rows.ClockRow(1, 1_700_000_000_000),
    rows.DeadRow: rows.DeadRow(1, b"d\0t\0k", 3, "no", 5, 6, b"\0body\xff", 12),
}


@st.composite
def enqueues(draw: st.DrawFn) -> Enqueue:
    """A batch of a producer."""
    records = draw(st.lists(st.tuples(QUEUES, NAME), max_size=4))
    return Enqueue(draw(TEXT), draw(UNSIGNED), [r[0] for r in records], [r[1] for r in records], None,
                   draw(st.none() | st.dictionaries(st.integers(0, 3), st.tuples(TIME, TIME, NAME, TIME), max_size=3)),
                   draw(st.none() | st.lists(UNSIGNED, min_size=len(records), max_size=len(records))), draw(UNSIGNED))


ENTRIES = st.builds(
    Entry, st.just(VERSION), TIME, st.lists(enqueues(), max_size=3),
    st.lists(st.tuples(UNSIGNED, UNSIGNED, UNSIGNED, st.integers(1, 8), TIME, TEXT), max_size=3),
    st.lists(st.tuples(UNSIGNED, st.integers(0, 2), TIME, TEXT), max_size=3),
    st.lists(st.tuples(SCOPES, TIME, COUNT), max_size=3),
    st.lists(st.tuples(NAME, UNSIGNED, TIME, st.integers(0, 2)), max_size=3), st.lists(TEXT, min_size=3, max_size=3),
    st.lists(st.tuples(NAME, UNSIGNED, UNSIGNED, st.integers(1, 3), TEXT), max_size=3), st.lists(NAME, max_size=3),
    st.lists(DEAD_KEYS, max_size=3), st.lists(DEAD_KEYS, max_size=3), st.lists(st.tuples(SCOPES, COUNT), max_size=3))


@given(entry=ENTRIES)
def test_an_entry_survives_the_log(entry: Entry) -> None:
    """Decoding gives back the encoded entry."""
    assert decode_entry(encode_entry(entry)) == entry


@given(garbage=st.binary(max_size=200))
def test_garbage_is_no_entry(garbage: bytes) -> None:
    """Random bytes are an entry by accident only, and raise nothing but CorruptEntry."""
    try:
        decode_entry(garbage)
    except CorruptEntry:
        pass


@given(entry=ENTRIES, where=st.integers(0, 1 << 20), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_entry_is_read_or_refused(entry: Entry, where: int, byte: int, cut: bool) -> None:
    """A flipped byte or a cut end gives some entry or CorruptEntry, never another error."""
    command = bytearray(encode_entry(entry))
    command[where % len(command)] = byte
    try:
        decode_entry(bytes(command[:where % len(command)] if cut else command))
    except CorruptEntry:
        pass


@pytest.mark.parametrize("version", [0, 3, -1, 255])
def test_entries_of_other_versions_are_refused(version: int) -> None:
    """A version that this software does not know is never guessed at."""
    with pytest.raises(CorruptEntry, match=f"version {version}"):
        decode_entry(encode_entry(Entry(version, 0)))


def test_queues_and_bodies_must_match() -> None:
    """An enqueue with a body too few is refused before it is applied."""
    with pytest.raises(CorruptEntry, match="another number"):
        decode_entry(encode_entry(Entry(VERSION, 0, [Enqueue("", 0, [b"d\0t\0", b"d\0t\0"], [b"x"])])))
    with pytest.raises(CorruptEntry, match="another number"):
        decode_entry(encode_entry(Entry(VERSION, 0, [Enqueue("c", 0, [b"d\0t\0"], [b"x"], copies=[1, 2])])))



@pytest.mark.parametrize("tail", [b"\x05", b"\x91" * 100_000 + b"\x00"], ids=["number", "deep"])
def test_a_field_too_many_is_refused(tail: bytes) -> None:
    """Whoever added a field without raising the version is told so, however deep it is."""
    entry = encode_entry(Entry(VERSION, 0))
    with pytest.raises(CorruptEntry):
        decode_entry(bytes((entry[0] + 1,)) + entry[1:] + tail)
    row = rows.encode_row(SAMPLES[rows.ClockRow])
    with pytest.raises(CorruptEntry):
        rows.decode_row(rows.ClockRow, bytes((row[0] + 1,)) + row[1:] + tail)


@pytest.mark.parametrize("kind", ROWS)
def test_rows_survive_the_store(kind: type[Any]) -> None:
    """Decoding gives back the encoded row."""
    assert rows.decode_row(kind, rows.encode_row(SAMPLES[kind])) == SAMPLES[kind]


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_other_versions_are_refused(kind: type[Any]) -> None:
    """A row's version that this software does not know is never guessed at."""
    for version in (0, 2):
        value = rows.encode_row(msgspec.structs.replace(SAMPLES[kind], version=version))
        with pytest.raises(CorruptEntry, match=f"version {version}"):
            rows.decode_row(kind, value)


@given(garbage=st.binary(max_size=100), kind=st.sampled_from(ROWS))
def test_garbage_is_no_row(garbage: bytes, kind: type[Any]) -> None:
    """Random bytes are a row by accident only, and raise nothing but CorruptEntry."""
    try:
        rows.decode_row(kind, garbage)
    except CorruptEntry:
        pass


@given(where=st.integers(0, 100), byte=st.integers(0, 255), cut=st.integers(0, 100), kind=st.sampled_from(ROWS))
def test_a_damaged_row_is_read_or_refused(where: int, byte: int, cut: int, kind: type[Any]) -> None:
    """A flipped byte or a cut end gives some row or CorruptEntry, never another error."""
    value = bytearray(rows.encode_row(SAMPLES[kind]))
    value[where % len(value)] = byte
    try:
        rows.decode_row(kind, bytes(value[:cut]))
    except CorruptEntry:
        pass


@given(sequence=NUMBER, enqueue_ms=TIME, deliver_ms=TIME, body=st.binary(max_size=50), expire_ms=st.just(0) | TIME)
def test_messages_survive_the_store(sequence: int, enqueue_ms: int, deliver_ms: int, body: bytes, expire_ms: int) -> None:
    """A message row gives back sequence, times and body, byte for byte."""
    message = (sequence, enqueue_ms, deliver_ms, body, expire_ms)
    assert rows.decode_message(rows.message_key(b"d\0t\0k", sequence), rows.encode_message(message)) == message


@given(garbage=st.binary(max_size=40))
def test_garbage_is_no_message(garbage: bytes) -> None:
    """A message row that is too short, of another version or of a time beyond any raises CorruptEntry."""
    size = {1: 17, 2: 25}.get(garbage[0] if garbage else 0, 99)
    if len(garbage) >= size and max(int.from_bytes(garbage[at:at + 8], "little") for at in range(1, size, 8)) <= TIME_MS_MAX:
        rows.decode_message(b"mq\0" + b"\0" * 8, garbage)
    else:
        with pytest.raises(CorruptEntry):
            rows.decode_message(b"mq\0" + b"\0" * 8, garbage)


@given(one=QUEUES, other=QUEUES, sequence=NUMBER, last=NUMBER)
def test_queues_do_not_share_message_rows(one: bytes, other: bytes, sequence: int, last: int) -> None:
    """The range of a queue's message rows holds all of its rows, in order of sequence, and none of another queue's."""
    start, end = rows.message_key(one, 0), rows.message_end(one)
    assert start <= rows.message_key(one, sequence) < end
    assert (rows.message_key(one, sequence) < rows.message_key(one, last)) == (sequence < last)
    assert rows.sequence_of(rows.message_key(one, sequence)) == sequence
    if one != other:
        assert not start <= rows.message_key(other, sequence) < end


@given(sequence=NUMBER, until=st.integers(0, 1 << 47), digest=st.binary(min_size=16, max_size=16))
def test_ids_survive_the_store(sequence: int, until: int, digest: bytes) -> None:
    """A dedup row gives back what it was made of; its other key sorts by the minute and ends with the digest."""
    assert rows.decode_dedup(rows.dedup_row(sequence, until)) == (sequence, until)
    key = rows.dedup_due(until, digest)
    assert key[5:] == digest
    assert rows.dedup_due(until) <= key < rows.dedup_due(until + 60_000)


@given(garbage=st.binary(max_size=20))
def test_garbage_is_no_id(garbage: bytes) -> None:
    """A dedup row of another length, or for a time beyond any, raises CorruptEntry."""
    if len(garbage) == 16 and int.from_bytes(garbage[8:], "big") <= TIME_MS_MAX:
        rows.decode_dedup(garbage)
    else:
        with pytest.raises(CorruptEntry):
            rows.decode_dedup(garbage)


def test_what_a_newer_version_wrote_says_what_to_run() -> None:
    """It is no damage: nobody should replace a node for it."""
    newer = "a newer version wrote it; run that one"
    with pytest.raises(CorruptEntry, match=rf"a log entry has version {VERSION + 1}; this node reads \(1, {VERSION}\): {newer}"):
        decode_entry(msgspec.msgpack.encode([VERSION + 1, 5, "more"]))
    with pytest.raises(CorruptEntry, match=f"a GateRow has version 2; this node reads 1: {newer}"):
        rows.decode_row(rows.GateRow, msgspec.msgpack.encode([2, 5, 6, 7]))
    with pytest.raises(CorruptEntry, match="does not decode"):
        rows.decode_row(rows.GateRow, msgspec.msgpack.encode([1, 5, 6, 7]))
