"""Headers towards receivers: complete, reversible, and nothing of a tenant's making can break out."""
from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.client.dispatcher.headers import encode, message_headers, request_headers, run_headers


@dataclass
class Gap:
    count: int
    first_sequence: int
    last_sequence: int


@dataclass
class Message:
    sequence: int = 77
    attempt: int = 2
    id: str = "evt-1"
    headers: dict[str, str] = field(default_factory=dict)
    payload: bytes = b"{}"


@dataclass
class Run:
    shard: int = 3
    fencing_token: int = 12345
    destination: str = "crm"
    tenant: str = "acme"
    key: str = "user-1"
    messages: list[Message] = field(default_factory=list)
    gap: Gap | None = None


def headers_of(run: Run, message: Message, gap: Gap | None = None) -> dict[str, str]:
    return request_headers(run_headers(run), run.shard, message, gap)  # type: ignore[arg-type]


def test_complete() -> None:
    """A request says which message it is, of which queue, which attempt, under which lease."""
    assert headers_of(Run(), Message()) == {
        "Content-Type": "application/octet-stream",
        "Spillway-Message-Id": "evt-1",
        "Spillway-Sequence": "77",
        "Spillway-Shard": "3",
        "Spillway-Attempt": "2",
        "Spillway-Fencing-Token": "12345",
        "Spillway-Destination": "crm",
        "Spillway-Tenant": "acme",
        "Spillway-Key": "user-1",
    }


def test_gap_and_missing_id() -> None:
    """A hole before the message is announced; a message without an id has shard and sequence for one."""
    headers = headers_of(Run(), Message(id=""), Gap(2, 70, 75))
    assert headers["Spillway-Gap"] == "count=2, first=70, last=75"
    assert headers["Spillway-Message-Id"] == "3-77"


@pytest.mark.parametrize(("name", "encoded"), [
    ("plain-Name_1.2~x/y:z", "plain-Name_1.2~x/y:z"),
    ("", ""),
    ("100%", "100%25"),
    ("%41", "%2541"),
    (" a b ", "%20a%20b%20"),
    ("Zoë", "Zo%C3%AB"),
    ("日本", "%E6%97%A5%E6%9C%AC"),
    ("a\u2028b", "a%E2%80%A8b"),
    ("x\u0085y", "x%C2%85y"),
])
def test_names(name: str, encoded: str) -> None:
    """Names arrive as printable ASCII."""
    assert encode(name) == encoded
    headers = headers_of(Run(destination=name, tenant=name, key=name), Message(id=name or "x"))
    assert headers["Spillway-Destination"] == headers["Spillway-Tenant"] == headers["Spillway-Key"] == encoded


@given(st.text())
def test_names_can_be_decoded(name: str) -> None:
    """Percent-decoding gives any name back, and no two names look alike."""
    encoded = encode(name)
    assert all(" " < c <= "~" for c in encoded)
    assert unquote(encoded) == name


@pytest.mark.parametrize(("given_headers", "kept"), [
    ({"X-Trace": "1", "traceparent": "00-ab-cd-01"}, {"X-Trace": "1", "traceparent": "00-ab-cd-01"}),
    ({"content-type": "application/json"}, {"Content-Type": "application/json"}),
    ({"CONTENT-TYPE": "a/b", "content-type": "c/d"}, {"Content-Type": "a/b"}),
    ({"Authorization": "Bearer x"}, {"Authorization": "Bearer x"}),
    ({"Spillway-Tenant": "forged", "spillway-anything": "x", "SPILLWAY-KEY": "x"}, {}),
    ({"Host": "internal", "Content-Length": "5", "Transfer-Encoding": "chunked", "Expect": "100-continue"}, {}),
    ({"Connection": "close, X-Hop", "X-Hop": "1", "X-Other": "2"}, {"X-Other": "2"}),
    ({"Keep-Alive": "1", "TE": "trailers", "Trailer": "x", "Upgrade": "h2c", "Proxy-Authorization": "x",
      "Proxy-Connection": "x", "HTTP2-Settings": "x"}, {}),
    ({"X-A": "1\r\nX-B: 2"}, {}),
    ({"X-A": "1\nX-B: 2"}, {}),
    ({"X-A": "1\rX"}, {}),
    ({"X-A": "a\0b", "X-B": "a\x7fb", "X-C": "a\tb", "X-D": "a\x85b", "X-E": "ok"}, {"X-E": "ok"}),
    ({"X-A\r\nX-B": "1", "X A": "1", "": "1", "X:A": "1", "Ünicode": "1", "X-A\0": "1", "(x)": "1"}, {}),
    ({"X" * 257: "1"}, {}),
    ({"X-Name": "Zoë 100%"}, {"X-Name": "Zo%C3%AB 100%"}),
    ({"X-Pad": "  v  ", "X-Empty": ""}, {"X-Pad": "v", "X-Empty": ""}),
    ({"x-dup": "2", "X-Dup": "1"}, {"X-Dup": "1"}),
])
def test_message_headers(given_headers: dict[str, str], kept: dict[str, str]) -> None:
    """Headers of messages are passed on, save those that would forge, frame, route or inject."""
    assert message_headers(given_headers) == kept


@given(st.dictionaries(st.text(), st.text()))
def test_nothing_breaks_out(given_headers: dict[str, str]) -> None:
    """Whatever the headers of a message are, each line of the request is one header in printable ASCII, and those
    of the dispatcher stay as it set them."""
    plain = headers_of(Run(), Message())
    headers = headers_of(Run(), Message(headers=given_headers))
    for name, value in headers.items():
        assert all("!" <= c <= "~" and c != ":" for c in name) and name
        assert all(" " <= c <= "~" for c in value)
    assert {n: v for n, v in headers.items() if n.startswith("Spillway-")} == {
        n: v for n, v in plain.items() if n.startswith("Spillway-")}
    assert len({name.lower() for name in headers}) == len(headers)
