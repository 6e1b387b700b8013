"""Headers of a request to a receiver: pure.

Message headers come from tenants; they must be able neither to forge what the dispatcher says (`Spillway-*`), nor
to touch the connection (hop-by-hop headers, lengths, Host), nor to smuggle a second header or request in. Whatever
is not certain to be harmless is left out; the message is delivered all the same.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

from spillway.client.dispatcher.source import Gap, Message, Run

CONTENT_TYPE = "application/octet-stream"  # if the message does not say; a payload is bytes to us
PREFIX = "spillway-"

# RFC 9110 7.6.1, RFC 2616 13.5.1, and what frames or routes the request.
CONNECTION_HEADERS = frozenset((
    "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "trailers", "transfer-encoding", "upgrade", "http2-settings", "content-length", "host", "expect"))

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Printable ASCII without the space, which ends of headers lose, and the percent sign, which is the escape.
_PRINTABLE = "!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"


def run_headers(run: Run) -> dict[str, str]:
    """The headers that all requests of a run share.

    Names (`Spillway-Message-Id`, `-Destination`, `-Tenant`, `-Key`) are percent-encoded UTF-8 where they are not
    printable ASCII, and so are spaces and percent signs: percent-decoding gives the name back, always.
    """
    return {
        "Spillway-Shard": str(run.shard),
        "Spillway-Fencing-Token": str(run.fencing_token),
        "Spillway-Destination": encode(run.destination),
        "Spillway-Tenant": encode(run.tenant),
        "Spillway-Key": encode(run.key),
    }


def request_headers(shared: Mapping[str, str], shard: int, message: Message, gap: Gap | None = None) -> dict[str, str]:
    """All headers of the request for one message, in ASCII throughout.

    Args:
        shared: `run_headers` of its run.
        shard: its shard.
        message: the message.
        gap: what is missing right before it: the run's gap for the first message, None for the others.
    """
    headers = message_headers(message.headers)
    headers.setdefault("Content-Type", CONTENT_TYPE)
    headers.update(shared)
    headers["Spillway-Message-Id"] = encode(message.id) if message.id else f"{shard}-{message.sequence}"
    headers["Spillway-Sequence"] = str(message.sequence)
    headers["Spillway-Attempt"] = str(message.attempt)
    if gap is not None:
        headers["Spillway-Gap"] = f"count={gap.count}, first={gap.first_sequence}, last={gap.last_sequence}"
    return headers


def message_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The message's own headers, without those that the dispatcher sets, that concern a connection (by their name or
    named by a Connection header), whose name is no HTTP token or whose value has a control character. Of names that
    differ only in case one stays. Values beyond ASCII are percent-encoded UTF-8: there are receivers that take
    single bytes of UTF-8 for line ends (http.client: bpo-22233)."""
    if not headers:
        return {}
    dropped = CONNECTION_HEADERS
    kept: dict[str, tuple[str, str]] = {}
    for name, value in headers.items():
        if name.lower() == "connection":
            dropped = dropped | {option.strip().lower() for option in value.split(",")}
    for name in sorted(headers):
        value = headers[name]
        lower = name.lower()
        if lower in dropped or lower.startswith(PREFIX) or not _TOKEN.fullmatch(name) or _CONTROL.search(value):
            continue
        if lower == "content-type":
            name = "Content-Type"
        kept.setdefault(lower, (name, value.strip() if value.isascii() else encode_beyond_ascii(value.strip())))
    return dict(kept.values())


def encode(name: str) -> str:
    """A name as printable ASCII without spaces; `urllib.parse.unquote` reverses it."""
    return quote(name, safe=_PRINTABLE)


def encode_beyond_ascii(value: str) -> str:
    """The value with everything beyond ASCII percent-encoded, and nothing else."""
    return "".join(c if c.isascii() else quote(c) for c in value)
