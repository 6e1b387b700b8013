"""The hand-written encodings, against the generated code."""
from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.client import wire
from spillway.client.errors import InvalidArgument
from spillway.contract.hashing import queue_key, shard_of
from spillway.contract.varint import varint
from spillway.v1 import queue_service_pb2 as q

names = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="*"), max_size=60)


@given(names.filter(bool), names, names, st.binary(max_size=5000), st.dictionaries(names, names, max_size=3), names,
       st.none() | st.floats(0, 7 * 86400), st.none() | st.datetimes(datetime(1970, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - hypothesis wants it naive
       st.none() | st.floats(0.001, 366 * 86400), names, st.integers(1, 1 << 60), names)
def test_a_record_parses_as_what_it_was(destination: str, tenant: str, key: str, payload: bytes, headers: dict[str, str],
                                        id: str, delay: float | None, at: datetime | None, ttl: float | None, dedup_id: str,
                                        number: int, producer: str) -> None:
    """Every field survives, and nothing else appears."""
    name = wire.queue_name(destination, tenant, key, 16)
    if delay is not None:
        at = None
    body = wire.record(name, payload, headers, id, wire.record_options(delay, at, ttl, dedup_id), 1 << 20)
    request = q.ProduceRequest.FromString(wire.produce_head(producer) + body + wire.number(number))
    (record,) = request.records
    assert request.producer_id == producer
    assert (record.destination, record.tenant, record.key, record.producer_sequence) == (destination, tenant, key, number)
    assert (record.message.payload, dict(record.message.headers), record.message.id) == (payload, headers, id)
    assert record.HasField("delay") == (delay is not None)
    if delay is not None:
        assert abs(record.delay.seconds + record.delay.nanos / 1e9 - delay) < 1e-3
        assert 0 <= record.delay.nanos < 1_000_000_000
    assert record.HasField("deliver_at") == (at is not None)
    if at is not None:
        assert abs(record.deliver_at.ToDatetime(UTC) - at) < timedelta(milliseconds=1)
    assert record.HasField("ttl") == (ttl is not None)
    if ttl is not None:
        assert abs(record.ttl.seconds + record.ttl.nanos / 1e9 - ttl) < 1e-3
    assert record.dedup_id == dedup_id
    assert name.shard == shard_of(queue_key(destination, tenant, key), 16)
    rebuilt = q.ProduceRequest.FromString(request.SerializeToString())
    assert rebuilt == request
    # The broker looks at the first byte of a message to see whether there is more than a payload.
    if not headers and not id:
        assert record.message.SerializeToString() == (b"" if not payload else record.message.SerializeToString())


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(1, 7),
       st.none() | st.floats(0, 7 * 86400), st.text(st.characters(exclude_categories=("Cs",)), max_size=600))
def test_a_settlement_parses_as_what_it_was(shard: int, token: int, sequence: int, outcome: int, delay: float | None,
                                            reason: str) -> None:
    """Every field survives; a long reason is cut between characters."""
    request = q.AckRequest.FromString(wire.settlement(shard, token, sequence, outcome, delay, reason))
    (one,) = request.settlements
    assert (one.shard, one.fencing_token, one.sequence, one.outcome) == (shard, token, sequence, outcome)
    assert one.HasField("delay") == (delay is not None)
    assert reason.startswith(one.reason) and len(one.reason.encode()) <= 1024
    assert one.reason == reason or len(one.reason.encode()) > 1020


@pytest.mark.parametrize("seconds", [-0.001, float("inf"), float("nan"), 7 * 86400 + 1])
def test_durations_out_of_range_are_refused(seconds: float) -> None:
    """Naming the field."""
    with pytest.raises(InvalidArgument) as error:
        wire.duration("delay", seconds)
    assert error.value.field == "delay"


@given(st.integers(0, 1 << 63))
def test_varints_are_protobufs(value: int) -> None:
    """As the generated code writes them."""
    assert q.Gap(count=value).SerializeToString() == (b"\x08" + varint(value) if value else b"")


@pytest.mark.parametrize(("options", "field"), [
    ((-1.0, None, None, ""), "delay"),
    ((None, None, 0.0, ""), "ttl"),
    ((None, None, 367 * 86400.0, ""), "ttl"),
    ((None, None, float("nan"), ""), "ttl"),
    ((None, datetime(2030, 1, 1), None, ""), "deliver_at"),  # noqa: DTZ001
    ((1.0, datetime(2030, 1, 1, tzinfo=UTC), None, ""), "deliver_at"),
    ((None, None, None, "a\nb"), "dedup_id"),
    ((None, None, None, "x" * 256), "dedup_id"),
])
def test_wrong_options_are_refused_by_field(options: tuple[float | None, datetime | None, float | None, str], field: str) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidArgument) as refused:
        wire.record_options(*options)
    assert refused.value.field == field
