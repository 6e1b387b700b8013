"""Refusals in the log, and what gRPC's lines about handshakes mean."""
from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest
from spillway.broker.native_log import explained
from spillway.broker.services.audit import Audit
from spillway.broker.services.refusals import EVERY_SECONDS, KINDS_MAX, Counter, Refusals


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_kind_is_told_once_in_a_while_with_how_many_there_were() -> None:
    """The first at once, the others by their number."""
    clock = Clock()
    counter = Counter(clock)
    assert [counter.note("a") for _ in range(5)] == [0, None, None, None, None] and counter.note("b") == 0
    clock.now = EVERY_SECONDS
    assert counter.note("a") == 4 and counter.note("a") is None


def test_a_flood_of_kinds_is_only_counted() -> None:
    """Whoever makes up a new kind each time fills neither the log nor memory."""
    clock = Clock()
    counter = Counter(clock)
    told = [counter.note(str(n)) for n in range(10_000)]
    assert sum(t is not None for t in told) == KINDS_MAX and len(counter._said) == KINDS_MAX
    clock.now = EVERY_SECONDS
    assert counter.note("more") == 10_000 - KINDS_MAX
    assert len(counter._said) <= KINDS_MAX


def test_refusals_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """With where they happened."""
    refusals = Refusals(logging.getLogger("x"), "peer_listen")
    for _ in range(3):
        refusals.note("why")
    assert caplog.messages == ["peer_listen: refused: why"]


class Call:
    """What the audit log asks of a call."""

    def peer(self) -> str:
        """As gRPC has it."""
        return "ipv4:127.0.0.1:1234"


def test_the_audit_log_is_json_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Every call that was made has its line; those that were refused share one."""
    caplog.set_level(logging.INFO, "spillway.audit")
    audit = Audit()
    call: Any = Call()
    for _ in range(3):
        audit.done("token x", call, "/spillway.v1.AdminService/PauseDelivery", "destination=d\n", "OK")
        audit.refused("unknown", call, "/spillway.v1.AdminService/PauseDelivery", "", "UNAUTHENTICATED", "no " * 1000)
    lines = [json.loads(line) for line in caplog.messages]
    assert [line["result"] for line in lines] == ["OK", "UNAUTHENTICATED", "OK", "OK"]
    assert lines[0] | {"time": ""} == {"time": "", "who": "token x", "from": "ipv4:127.0.0.1:1234", "method": "AdminService/PauseDelivery",
                                       "target": "destination=d\n", "result": "OK"}
    assert lines[0]["time"].endswith("Z") and len(lines[1]["why"]) == 300 and not any("\n" in line for line in caplog.messages)


@pytest.mark.parametrize(("line", "meaning"), [
    ("Handshake failed with error SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: Invalid certificate "
     "verification context", "a connection without TLS"),
    ("Handshake failed with error SSL_ERROR_SSL: error:100000c0:SSL routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid",
     "a connection without a certificate"),
    ("Handshake failed with error SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: certificate has "
     "expired", "a certificate that is not valid here: certificate has expired"),
    ("Handshake failed with error SSL_ERROR_SSL: error:10000418:SSL routines:OPENSSL_internal:TLSV1_ALERT_UNKNOWN_CA: x",
     "the other side does not take the certificate of this node: tlsv1 alert unknown ca"),
    ("Handshake failed with error SSL_ERROR_SSL: error:1:SSL routines:OPENSSL_internal:SOMETHING_ELSE: x",
     "a TLS handshake that failed: something else"), ("No match found for server name: n1", "")])
def test_lines_of_grpc_are_explained(line: str, meaning: str) -> None:
    """Those about handshakes."""
    assert explained(line).startswith(meaning) and bool(explained(line)) == bool(meaning)


def test_what_else_native_code_writes_is_passed_on() -> None:
    """To where standard error went before, as Python's own is; a flood holds up nobody."""
    code = """
import logging, os, sys, time
from spillway.broker.native_log import sort_out
sort_out()
logging.basicConfig(stream=sys.stderr, level="INFO")
remark = "I1129 02:47:18.901446   30703 ssl_transport_security.cc:2563] "
failed = "Handshake failed with error SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: x"
for _ in range(10_000):
    try:
        os.write(2, (remark + failed + "\\n").encode())
    except BlockingIOError:
        pass
while True:
    try:
        os.write(2, (remark + "of no interest\\nfrom native code\\n").encode())
        break
    except BlockingIOError:
        time.sleep(0.01)
print("from Python", file=sys.stderr)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdin is not None
        seen: list[str] = []
        while not {"from native code", "from Python"} <= set(seen):
            line = process.stderr.readline()
            assert line, seen
            seen.append(line.strip())
        process.stdin.close()
    assert len(seen) == 3 and any("TLS: refused: a certificate that is not valid here: x" in line for line in seen)
