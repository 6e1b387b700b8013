"""The hand-written encodings, against the generated code."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.client import wire
from spillway.client.errors import InvalidArgument
from spillway.contract.hashing import queue_key, shard_of
from spillway.v1 import queue_service_pb2 as q

names = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="*"), max_size=60)


@given(names.filter(bool), names, names, st.binary(max_size=5000), st.dictionaries(names, names, max_size=3), names,
       st.none() | st.floats(0, 7 * 86400), st.integers(1, 1 << 60), names)
def test_a_record_parses_as_what_it_was(destination: str, tenant: str, key: str, payload: bytes, headers: dict[str, str],
                                        id: str, delay: float | None, number: int, producer: str) -> None:
    """Every field survives, and nothing else appears."""
    name = wire.queue_name(destination, tenant, key, 16)
    body = wire.record(name, payload, headers, id, delay, 1 << 20)
    request = q.ProduceRequest.FromString(wire.produce_head(producer) + body + wire.number(number))
    (record,) = request.records
    assert request.producer_id == producer
    assert (record.destination, record.tenant, record.key, record.producer_sequence) == (destination, tenant, key, number)
    assert (record.message.payload, dict(record.message.headers), record.message.id) == (payload, headers, id)
    assert record.HasField("delay") == (delay is not None)
    if delay is not None:
        assert abs(record.delay.seconds + record.delay.nanos / 1e9 - delay) < 1e-3
        assert 0 <= record.delay.nanos < 1_000_000_000
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
    assert q.Gap(count=value).SerializeToString() == (b"\x08" + wire.varint(value) if value else b"")
