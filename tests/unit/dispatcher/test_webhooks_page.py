"""The page for receivers: its code runs and does what it says, its tables are those of the program."""
from __future__ import annotations

import re
import sqlite3
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from spillway.client.dispatcher.outcome import Action, decide
from spillway.client.dispatcher.signing import Signer

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "webhooks.md").read_text()
NEW, OLD, OTHER = ("whsec_" + b64encode(bytes([i]) * 32).decode() for i in range(3))


@pytest.fixture
def code() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "webhooks.md", "exec"), names)
    return names


def test_verify(code: dict[str, Any]) -> None:
    """The example accepts what the dispatcher signs, with either secret of a change, and nothing else."""
    verify, body = code["verify"], b'{"a": "\xff"}'
    headers = Signer([NEW, OLD]).headers("evt.1", body, 1000.5)
    assert verify([NEW], headers, body, now=1001) and verify([OLD], headers, body, now=1001)
    assert verify([OTHER, NEW], headers, body, now=1300) and verify([NEW], headers, body, now=700)
    assert not verify([OTHER], headers, body, now=1001)
    assert not verify([NEW], headers, body + b" ", now=1001)
    assert not verify([NEW], headers, body, now=1301) and not verify([NEW], headers, body, now=699)
    assert not verify([NEW], headers, body), "by the clock it is long past"
    for name in headers:
        assert not verify([NEW], {**headers, name: "1" + headers[name]}, body, now=1001)
        assert not verify([NEW], {n: v for n, v in headers.items() if n != name}, body, now=1001)
    assert not verify([NEW], {**headers, "webhook-timestamp": "soon"}, body, now=1001)
    assert not verify([NEW], {**headers, "webhook-signature": "v1,ü"}, body, now=1001)


def test_receive(code: dict[str, Any]) -> None:
    """The example applies each message once and in order, whatever comes again or late, and nothing if applying fails."""
    applied: list[bytes] = []
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE queues(queue TEXT PRIMARY KEY, token INTEGER NOT NULL, sequence INTEGER NOT NULL)")

    def receive(token: int, sequence: int, key: str = "k") -> int:
        headers = {"spillway-destination": "d", "spillway-tenant": "t", "spillway-key": key,
                   "spillway-fencing-token": str(token), "spillway-sequence": str(sequence)}
        status = code["receive"](db, headers, b"%d" % sequence, applied.append)
        assert isinstance(status, int)
        return status

    assert [receive(1, 10), receive(1, 11), receive(2, 11), receive(2, 12)] == [204] * 4
    assert [receive(1, 12), receive(1, 13)] == [409] * 2, "the old lease's requests come late"
    assert receive(2, 13) == 204 and receive(1, 10, "other") == 204
    assert applied == [b"10", b"11", b"12", b"13", b"10"]

    def fail(body: bytes) -> None:
        raise OSError

    with pytest.raises(OSError):
        code["receive"](db, {"spillway-destination": "d", "spillway-tenant": "t", "spillway-key": "k",
                             "spillway-fencing-token": "3", "spillway-sequence": "14"}, b"14", fail)
    assert receive(3, 14) == 204 and applied[-1] == b"14"
    db.close()


OUTCOMES = {"delivered": Action.ACK, "the tenant is throttled": Action.THROTTLED, "failed attempt": Action.RETRY,
            "parked": Action.DOWN, "dead letter": Action.REJECT}


def test_answers() -> None:
    """Every status has the outcome of its row in the page's table: the one that names it, else the one of its class."""
    table = re.search(r"## Answers\n\n\| answer \| outcome \|\n\| --- \| --- \|\n(.*?)\n\n", PAGE, re.DOTALL)
    assert table is not None
    rows = [line.split("|")[1:3] for line in table[1].splitlines()]
    cells = [(answer, next((action for start, action in OUTCOMES.items() if outcome.strip().startswith(start)), None))
             for answer, outcome in rows]
    for status in range(200, 600):
        named = [action for answer, action in cells if re.search(rf"\b{status}\b(?! with)", answer)]
        of_class = [action for answer, action in cells if f"{status // 100}xx" in answer]
        assert [decide(status, {}, None, 0.0).action] == (named or of_class), status
    assert "503 with `Retry-After`" in cells[1][0]
    assert decide(503, {"Retry-After": "1"}, None, 0.0).action is cells[1][1] is Action.THROTTLED


def test_headers_are_on_the_page() -> None:
    """The page names every header that a request may have of the dispatcher."""
    source = (Path(__file__).resolve().parents[3] / "client/spillway/client/dispatcher/headers.py").read_text()
    names = set(re.findall(r'"Spillway-([A-Za-z-]+)"', source))
    assert len(names) >= 9
    assert [name for name in names if f"-{name}`" not in PAGE] == []
