"""Decoders of what says who may do what: requests for tokens, tokens themselves, claims and keys of others."""
from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from google.protobuf.message import DecodeError
from spillway.broker.core import directory as d
from spillway.broker.core.access import ADMIN, LEASE, PRODUCE, Grants, Scope, Token
from spillway.broker.errors import ConfigError, RequestError, Unauthenticated
from spillway.broker.native_log import explained
from spillway.broker.services.jwt import Keys, scopes_of
from spillway.broker.services.principal import AdminFile, Authenticator, digest_of
from spillway.broker.services.tokens import parse_token, token_proto
from spillway.v1 import token_pb2 as pb

from tests.fuzz.decoder import Decode, Decoder, Rewritten, expect, plain

NOW = 1_700_000_000_000
SECRET = "spw_0123456789ab_" + "s" * 43
STORED = Token("0123456789ab", 0, "t", digest_of("s" * 43), (Scope(LEASE, "a*"),), NOW)
JWKS = json.dumps({"keys": [{"kty": "EC", "crv": "P-256", "x": "gqWPqugA7eSi0LIqFV7N8zpLPde6dWsnd1u0K7lt9Eg", "kid": "k1",
                             "y": "up8vduoTbVo8PIbaWriU0dEUEJnnR-N-Wb0ClkQG6vM", "use": "sig", "alg": "ES256"}]}).encode()
# Signed once with the key, for the issuer i and the audience a, until 2100.
JWT = (b"eyJhbGciOiJFUzI1NiIsImtpZCI6ImsxIiwidHlwIjoiSldUIn0."
       b"eyJpc3MiOiJpIiwiYXVkIjoiYSIsImV4cCI6NDEwMjQ0NDgwMCwic3ViIjoiYXBwIiwic3BpbGx3YXkiOlt7ImFjdG"
       b"lvbiI6ImxlYXNlIiwiZGVzdGluYXRpb25zIjoiYSoifV19."
       b"IiPXjRoi0sHnByAOupUiTaAqp5B548cImInlPXjxKlNuMZpymVnxjAQM2KmiZjPZcZ5539JDyn83o9KhVEZGEg")
CLAIMS = ([{"action": "produce"}, {"action": "lease", "destinations": "a*"}, {"action": "admin", "destinations": "b", "tenants": ""}], [])


def _token_request(data: bytes) -> None:
    """What is stored of a request is what was asked for, and goes through the log."""
    token = parse_token(pb.CreateTokenRequest.FromString(data), "id", bytes(32), NOW)
    directory = d.Directory()
    (change,), rows, _ = directory.apply(1, d.encode_command([d.PutToken("n1", 1, token)]))
    expect(change.outcome == d.OK, token)
    again = d.Directory()
    again.load(iter(rows))
    expect(again.tokens == directory.tokens, token)
    shown = token_proto(again.tokens["id"])
    expect(len(shown.scopes) == len(token.scopes), shown)
    shown.SerializeToString()


def _token_samples() -> tuple[bytes, ...]:
    request = pb.CreateTokenRequest(name="ci", limits=pb.TokenLimits(streams_max=1, messages_per_second=2, bytes_in_flight_max=3), scopes=[
        pb.TokenScope(action=pb.TOKEN_ACTION_PRODUCE, destinations="billing-*", tenants="a*"), pb.TokenScope(action=pb.TOKEN_ACTION_LEASE),
        pb.TokenScope(action=pb.TOKEN_ACTION_ADMIN, destinations="b", tenants="")])
    request.ttl.FromMilliseconds(90_000)
    return request.SerializeToString(), pb.CreateTokenRequest(scopes=[pb.TokenScope(action=pb.TOKEN_ACTION_ADMIN)]).SerializeToString()


class _Context:
    """A call with one header."""

    def __init__(self, data: bytes) -> None:
        self._value = data.decode("latin-1")

    def invocation_metadata(self) -> Any:
        """As gRPC has it."""
        return (("authorization", self._value),)


@contextmanager
def _authorization() -> Iterator[Decode]:
    """The header: whoever is let in has the token that is stored."""
    with TemporaryDirectory() as name:
        (jwks := Path(name) / "jwks").write_bytes(JWKS)
        (admin := Path(name) / "admin").write_text("an-admin-token-of-enough-characters")
        directory = d.Directory()
        directory.apply(1, d.encode_command([d.PutToken("n1", 1, STORED)]))
        authenticator = Authenticator(True, lambda: directory, lambda: NOW / 1000, AdminFile(str(admin)), Keys(str(jwks), "i", "a"))

        def decode(data: bytes) -> None:
            principal = asyncio.run(authenticator.identify(_Context(data)))
            expect(any(part in data for part in (SECRET.encode(), b"an-admin-token", JWT[:100])), principal)

        yield decode


def _claims(data: bytes) -> None:
    """The claim, as JSON has it."""
    try:
        claim = json.loads(data)
    except (ValueError, RecursionError):
        return
    scopes = scopes_of(claim)
    grants = Grants(scopes)
    for action in (PRODUCE, LEASE, ADMIN):
        grants.allows(action, "a", "t")
    d.encode_command([d.PutToken("n1", 1, Token("id", 0, "", bytes(32), tuple(scopes), NOW))])  # they are what may be stored, too


@contextmanager
def _jwks() -> Iterator[Decode]:
    with TemporaryDirectory() as name, Rewritten(Path(name) / "jwks") as file:

        def decode(data: bytes) -> None:
            file.write(data)
            Keys(str(file.path), "i", "a").principal(JWT.decode(), NOW / 1000)

        yield decode


def _line(data: bytes) -> None:
    expect(len(explained(data.decode(errors="replace"))) <= len(data) + 100, data)


def decoders() -> list[Decoder]:
    """All of them."""
    services = "spillway.broker.services."
    return [
        Decoder("token-request", plain(_token_request), (RequestError, DecodeError), _token_samples(),
                (services + "tokens", services + "names", "spillway.broker.core.access")),
        Decoder("authorization", _authorization, (Unauthenticated,), (f"Bearer {SECRET}".encode(),
                                                                      b"Bearer an-admin-token-of-enough-characters", b"Bearer " + JWT),
                (services + "principal", services + "jwt")),
        Decoder("token-claims", plain(_claims), (Unauthenticated,), tuple(json.dumps(claim).encode() for claim in CLAIMS),
                (services + "jwt", "spillway.broker.core.access")),
        Decoder("key-set", _jwks, (ConfigError, Unauthenticated), (JWKS,), (services + "jwt",)),
        Decoder("line-of-grpc", plain(_line), (), (
            b"I1129 02:47:18.9 30703 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: error:1000007d:SSL "
            b"routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: certificate has expired",), ("spillway.broker.native_log",)),
    ]
