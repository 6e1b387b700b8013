"""What native code writes to standard error, sorted out. gRPC says there, and nowhere else, why it refuses a connection: a line for each,
without limit, that only its developers understand. Here they become the log's lines, each kind once in a while, with how many there were.

Everything else that is written there is passed on, but for gRPC's remarks (level INFO), which are asked for because of those lines.
"""
from __future__ import annotations

import faulthandler
import io
import logging
import os
import re
import sys
import threading

from spillway.broker.services.refusals import Refusals

log = logging.getLogger(__name__)

LINE_BYTES_MAX = 64 << 10
_REMARK = re.compile(rb"[IW]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (\S+)\] ?(.*)")
_FAILED = re.compile(r"Handshake failed with error \w+: error:[0-9a-f]+:SSL routines:[^:]*:([A-Z0-9_]+): ?(.*)")
_WITHOUT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "UNEXPECTED_MESSAGE")


def explained(line: str) -> str:
    """What gRPC's line about a handshake means; empty for any other line."""
    found = _FAILED.search(line)
    if found is None:
        return ""
    reason, detail = found.groups()
    if reason in _WITHOUT_TLS:
        return "a connection without TLS, or something at an address of ours that speaks none"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "a connection without a certificate, to a port that demands one"
    if reason == "CERTIFICATE_VERIFY_FAILED":
        return f"a certificate that is not valid here: {detail}"
    if "ALERT" in reason:
        return f"the other side does not take the certificate of this node: {reason.lower().replace('_', ' ')}"
    return f"a TLS handshake that failed: {reason.lower().replace('_', ' ')}"


def sort_out() -> None:
    """Takes standard error of native code in this process, from now on; gRPC must not be loaded yet. Python's own, `sys.stderr`, goes where
    it went before."""
    os.environ["GRPC_VERBOSITY"] = "INFO"  # the level of those lines, whatever the command line has set
    real = os.dup(2)
    reads, writes = os.pipe()
    os.set_blocking(writes, False)  # whoever writes may hold the interpreter, which the reader waits for: a line is lost instead
    os.dup2(writes, 2)
    os.close(writes)
    sys.stderr = io.TextIOWrapper(os.fdopen(real, "wb"), errors="backslashreplace", line_buffering=True)
    faulthandler.enable(sys.stderr)  # what a crash says must not be left in the pipe
    threading.Thread(target=_read, args=(reads, real), name="spillway native log", daemon=True).start()


def _read(reads: int, real: int) -> None:
    refusals = Refusals(log, "TLS")
    rest = b""
    while some := os.read(reads, LINE_BYTES_MAX):
        *lines, rest = (rest + some).split(b"\n")
        lines += [rest] if len(rest) > LINE_BYTES_MAX else []
        rest = b"" if len(rest) > LINE_BYTES_MAX else rest
        for line in lines:
            remark = _REMARK.match(line)
            if remark is None:
                os.write(real, line + b"\n")
            elif why := explained(line.decode(errors="replace")):
                refusals.note(why)
            elif line.startswith(b"W") and b"log.cc" not in remark.group(1):  # log.cc: that INFO is a lot
                os.write(real, line + b"\n")
