"""Names and durations that callers send: what passes, and what each refusal says."""
from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from spillway.broker.errors import RequestError
from spillway.broker.services.names import check_destination, check_name, duration_ms


@pytest.mark.parametrize("name", ["a", "n" * 255, "é" * 127, "a b", " ", "ü/ö?&=#%", "\u00a0", "\U0001f4a7", "x*y"])
def test_any_printable_name_up_to_255_bytes_passes(name: str) -> None:
    """Names are free: any characters but control characters, 1 to 255 bytes of UTF-8."""
    check_name("key", name)


@pytest.mark.parametrize(("name", "says"), [
    ("", "key: must not be empty"),
    ("n" * 256, "key: has 256 bytes; at most 255"),
    ("é" * 128, "key: has 256 bytes; at most 255"),
    ("a\0b", "key: has the control character '\\x00'"),
    ("\n", "key: has the control character '\\n'"),
    ("a\x1f", "key: has the control character '\\x1f'"),
    ("\x7f", "key: has the control character '\\x7f'"),
    ("\x80", "key: has the control character '\\x80'"),
    ("\x9f", "key: has the control character '\\x9f'"),
])
def test_a_name_that_is_refused_says_field_and_reason(name: str, says: str) -> None:
    """Empty, too long (in bytes, not characters) or with a control character: the error names the field and what is wrong."""
    with pytest.raises(RequestError) as caught:
        check_name("key", name)
    assert (caught.value.field, str(caught.value)) == ("key", says)


def test_an_optional_name_may_be_empty() -> None:
    """Where the caller allows it, the empty name passes; other rules stay."""
    check_name("tenant", "", empty=True)
    with pytest.raises(RequestError, match="control character"):
        check_name("tenant", "\t", empty=True)


@pytest.mark.parametrize("name", ["*", "a*", "a*b"])
def test_a_destination_is_no_pattern(name: str) -> None:
    """A star is for Lease's patterns only; the error says so."""
    with pytest.raises(RequestError, match=r"^name: has a '\*'; patterns are for Lease only$"):
        check_destination("name", name)


@pytest.mark.parametrize(("seconds", "nanos", "ms"), [
    (0, 1_000_000, 1), (0, 1, 1), (0, 999_999, 1), (0, 1_000_001, 2), (1, 0, 1000), (1, 500_000_000, 1500), (60, 0, 60_000)])
def test_a_duration_is_rounded_up_to_whole_milliseconds(seconds: int, nanos: int, ms: int) -> None:
    """Nobody waits less than asked for; both limits are inside."""
    assert duration_ms("delay", Duration(seconds=seconds, nanos=nanos), 1, 60_000) == ms


@pytest.mark.parametrize(("duration", "says"), [
    (Duration(seconds=-1), "delay: must not be negative"),
    (Duration(nanos=-1), "delay: must not be negative"),
    (Duration(seconds=1, nanos=-1), "delay: must not be negative"),
    (Duration(), "delay: is 0 s; it must be 0.001 s to 60 s"),
    (Duration(seconds=60, nanos=1), "delay: is 60.001 s; it must be 0.001 s to 60 s"),
    (Duration(seconds=(1 << 63) - 1), "it must be 0.001 s to 60 s"),
])
def test_a_duration_outside_of_its_limits_names_them(duration: Duration, says: str) -> None:
    """The error names the field, the value and both limits in seconds."""
    with pytest.raises(RequestError) as caught:
        duration_ms("delay", duration, 1, 60_000)
    assert caught.value.field == "delay" and says in str(caught.value)
