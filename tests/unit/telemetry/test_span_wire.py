"""Spans written by hand are what the protocol's generated code reads."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from spillway.contract.telemetry.span_wire import INTERNAL, Attribute, envelope, named, request, span

TEXT = st.text(max_size=5000)
NUMBER = st.integers(0, (1 << 63) - 1)


@given(st.integers(1, (1 << 128) - 1), st.integers(1, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), TEXT, NUMBER, NUMBER,
       st.dictionaries(TEXT, TEXT, max_size=3), st.dictionaries(TEXT, NUMBER, max_size=3), st.booleans(), st.integers(1, 3))
def test_a_request_is_read_as_it_was_meant(trace_id: int, span_id: int, parent: int, name: str, begin: int, end: int, texts: dict[str, str],
                                           numbers: dict[str, int], failed: bool, count: int) -> None:
    """Every field, whatever its length."""
    attributes = b"".join([*(Attribute(k).text(v) for k, v in texts.items()), *(Attribute(k).number(v) for k, v in numbers.items())])
    ids = trace_id.to_bytes(16, "big"), span_id.to_bytes(8, "big"), parent.to_bytes(8, "big") if parent else b""
    data = span(*ids, named(name) + attributes, begin, end, failed)
    got = ExportTraceServiceRequest.FromString(request(envelope({"service.name": name}, "scope", "1", "schema"), [data] * count))
    [resource] = got.resource_spans
    [attribute] = resource.resource.attributes
    assert (attribute.key, attribute.value.string_value, resource.schema_url) == ("service.name", name, "schema")
    [scope] = resource.scope_spans
    assert (scope.scope.name, scope.scope.version, scope.schema_url, len(scope.spans)) == ("scope", "1", "schema", count)
    expected = Span(trace_id=trace_id.to_bytes(16, "big"), span_id=span_id.to_bytes(8, "big"), name=name, kind=INTERNAL,  # type: ignore[arg-type]
                    start_time_unix_nano=begin, end_time_unix_nano=end, flags=0x301 if parent else 0x101)
    if parent:
        expected.parent_span_id = parent.to_bytes(8, "big")
    for key, text in texts.items():
        expected.attributes.add(key=key).value.string_value = text
    for key, number in numbers.items():
        expected.attributes.add(key=key).value.int_value = number
    if failed:
        expected.status.code = 2
    assert scope.spans[0] == expected
