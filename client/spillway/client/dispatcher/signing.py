"""Signatures of requests as Standard Webhooks 1.0 has them (standardwebhooks.com): pure.

Signed is "id.timestamp.payload", once with each secret, so that a receiver can change over from one to the next. An
id has no full stop: with one, the end of an id could be passed off as the timestamp, and a timestamp as the beginning
of a payload.
"""
from __future__ import annotations

import hmac
import re
from base64 import b64decode, b64encode
from collections.abc import Sequence

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
SIGNATURE_HEADERS = frozenset((ID, TIMESTAMP, SIGNATURE))
SECRET_PREFIX = "whsec_"  # noqa: S105 - it marks secrets
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64  # the specification's

_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)


class Signer:
    """Signs with one or more secrets."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """
        Args:
            secrets: each "whsec_" and base64 of 24 to 64 bytes.

        Raises:
            ValueError: one is not so; the message gives its place, never itself.
        """
        self._keys = [_key(place, secret) for place, secret in enumerate(secrets)]

    def __repr__(self) -> str:
        return f"<Signer: {len(self._keys)} secrets>"

    def headers(self, message_id: str, payload: bytes, now: float) -> dict[str, str]:
        """The three headers of one attempt.

        Args:
            message_id: printable ASCII, the same for all attempts.
            payload: the body, byte for byte.
            now: seconds since 1970; receivers refuse what is some minutes off.
        """
        webhook_id = message_id.replace(".", "%2E")
        timestamp = str(int(now))
        signed = b"%b.%b.%b" % (webhook_id.encode(), timestamp.encode(), payload)
        return {ID: webhook_id, TIMESTAMP: timestamp, SIGNATURE: " ".join(
            "v1," + b64encode(hmac.digest(key, signed, "sha256")).decode() for key in self._keys)}


def _key(place: int, secret: str) -> bytes:
    if secret.startswith(SECRET_PREFIX):
        text = secret.removeprefix(SECRET_PREFIX).rstrip("=")
        if _BASE64.fullmatch(text) and len(text) % 4 != 1:
            key = b64decode(text + "=" * (-len(text) % 4))
            if SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX:
                return key
    raise ValueError(f"signing_secrets[{place}] is not {SECRET_PREFIX!r} and base64 of {SECRET_BYTES_MIN} to"
                     f" {SECRET_BYTES_MAX} bytes")
