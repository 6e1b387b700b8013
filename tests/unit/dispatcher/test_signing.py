"""Signatures, against the specification's example, its authors' library, and what a receiver writes by hand."""
from __future__ import annotations

import time
from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.client.dispatcher.signing import SIGNATURE_HEADERS, Signer
from standardwebhooks import Webhook, WebhookVerificationError

NEW, OLD, OTHER = ("whsec_" + b64encode(bytes([i]) * 32).decode() for i in range(3))


def test_example() -> None:
    """The signature is the one that all libraries of Standard Webhooks are tested with."""
    headers = Signer(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]).headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', 1614265330.9)
    assert headers == {"webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek", "webhook-timestamp": "1614265330",
                       "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}
    assert headers.keys() == SIGNATURE_HEADERS


def test_rotation() -> None:
    """With two secrets a receiver that has either one accepts the request, one that has neither refuses it."""
    headers = Signer([NEW, OLD]).headers("evt-1", b"{}", time.time())
    assert len(headers["webhook-signature"].split(" ")) == 2
    for secret in (NEW, OLD):
        Webhook(secret).verify(b"{}", headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(b"{}", headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(NEW).verify(b"{ }", headers)


@given(st.text(st.characters(codec="utf-8")), st.from_regex(r"[!-~]{1,40}", fullmatch=True))
def test_any_payload_and_id(payload: str, message_id: str) -> None:
    """Whatever is signed, the authors' library verifies it (if it is text; the library takes no other)."""
    headers = Signer([NEW]).headers(message_id, payload.encode(), time.time())
    Webhook(NEW).verify(payload.encode(), headers, json_parse=False)


def test_no_id_passes_for_a_timestamp() -> None:
    """Two requests whose id, time and payload differ do not have the same bytes signed."""
    first = Signer([NEW]).headers("a", b"17.x", 5.0)
    second = Signer([NEW]).headers("a.5", b"x", 17.0)
    assert first["webhook-signature"] != second["webhook-signature"]
    assert second["webhook-id"] == "a%2E5"


@pytest.mark.parametrize("size", [24, 25, 26, 32, 63, 64])
@pytest.mark.parametrize("padded", [True, False])
def test_sizes(size: int, padded: bool) -> None:
    """Secrets have 24 to 64 bytes, with or without the padding of base64."""
    text = b64encode(bytes(size)).decode()
    headers = Signer(["whsec_" + (text if padded else text.rstrip("="))]).headers("1", b"1", time.time())
    Webhook(bytes(size)).verify(b"1", headers)


@pytest.mark.parametrize("secret", [
    "", "whsec_", "whsec_" + b64encode(bytes(23)).decode(), "whsec_" + b64encode(bytes(65)).decode(),
    b64encode(bytes(32)).decode(), "whsec_" + "ab-_" * 8, "whsec_" + "A" * 41, "whsec_" + "ü" * 40, "WHSEC_" + "A" * 40,
    "whsec_" + "AAAA=AAA" * 5, "whsec_" + "AAAA\n" * 8, "whsk_" + "A" * 40])
def test_unusable(secret: str) -> None:
    """A secret that is none is refused by its place; it is not shown."""
    with pytest.raises(ValueError, match=r"^signing_secrets\[1\] is not") as caught:
        Signer([NEW, secret])
    assert len(secret) < 10 or secret not in str(caught.value)
    assert NEW not in repr(Signer([NEW]))
