"""Tokens that others issue: only those of the keys in the file, for this cluster, as long as they are valid, with what they allow."""
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from spillway.broker.core.access import ADMIN, LEASE, PRODUCE, Scope
from spillway.broker.errors import ConfigError, Unauthenticated
from spillway.broker.services.jwt import LEEWAY_SECONDS, Keys, scopes_of

KEYS: dict[str, tuple[str, Any]] = {
    "e": ("ES256", ec.generate_private_key(ec.SECP256R1())), "d": ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
    "r": ("RS256", rsa.generate_private_key(65537, 2048)), "other": ("ES256", ec.generate_private_key(ec.SECP256R1()))}
SCOPES = [{"action": "produce", "destinations": "a*"}]


def published(*kids: str) -> bytes:
    """A key set."""
    keys = []
    for kid in kids:
        algorithm, key = KEYS[kid]
        made = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key()))
        keys.append({**made, "kid": kid, "alg": algorithm, "use": "sig"})
    return json.dumps({"keys": keys}).encode()


def token(kid: str = "e", signed: str = "", **claims: Any) -> str:
    """A token; claims that are None are left out."""
    algorithm, key = KEYS[signed or kid]
    all_ = {"iss": "i", "aud": ["x", "a"], "exp": time.time() + 60, "sub": "app", "spillway": SCOPES, **claims}
    return jwt.encode({name: value for name, value in all_.items() if value is not None}, key, algorithm, headers={"kid": kid})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with three keys."""
    (made := tmp_path / "jwks").write_bytes(published("e", "d", "r"))
    return made


def keys_of(path: Path) -> Keys:
    """As a node has them."""
    return Keys(str(path), "i", "a")


def test_a_token_lets_in_with_its_scopes_until_it_expires(path: Path) -> None:
    """Of every kind of key."""
    keys, until = keys_of(path), int(time.time()) + 60
    for kid in ("e", "d", "r"):
        principal = keys.principal(token(kid, exp=until), 0)
        assert principal.name == "jwt app" and principal.expires == until + LEEWAY_SECONDS and keys.still(principal)
        assert principal.grants is not None and principal.grants.allows(PRODUCE, "ab") and not principal.grants.allows(PRODUCE, "b")
    assert keys.principal(token(sub=None), 0).name == "jwt without sub"
    assert keys.principal(token(sub="a\nb" + "x" * 500), 0).name == "jwt a?b" + "x" * 97


def test_what_is_not_issued_for_this_cluster_is_refused(path: Path) -> None:
    """Another key, issuer or audience, no end, an end that has come, no signature, a shared secret."""
    keys = keys_of(path)
    none = jwt.encode({"iss": "i", "aud": "a", "exp": time.time() + 60, "spillway": SCOPES}, "", "none", headers={"kid": "e"})
    hmac = jwt.encode({"iss": "i", "aud": "a", "exp": time.time() + 60, "spillway": SCOPES}, "x" * 64, "HS256", headers={"kid": "e"})
    for text, said in ((token("other"), "a key that is not in"), (token("e", signed="other"), "Signature verification failed"),
                       (token("e", signed="r"), "not valid"), (token(iss="x"), "Invalid issuer"), (token(aud="x"), "Audience"),
                       (token(exp=None), "exp"), (token(iss=None), "iss"), (token(aud=None), "aud"),
                       (token(exp=time.time() - 60), "expired"), (token(nbf=time.time() + 60), "not yet valid"),
                       (none, "not valid"), (hmac, "not valid"), ("a.b.c", "not valid"),
                       ("..", "not valid"), (token(spillway=None), "is no list"), (token() + "x", "not valid")):
        with pytest.raises(Unauthenticated, match=said):
            keys.principal(text, 0)


def test_keys_follow_their_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key that is not there any more ends what was signed with it; what cannot be read changes nothing."""
    keys = keys_of(path)
    one, two = keys.principal(token("e"), 0), keys.principal(token("d"), 0)
    assert not keys.poll()
    path.write_bytes(b"{")
    assert not keys.poll() and not keys.poll() and "going on with what was read before" in caplog.text and keys.still(one)
    path.write_bytes(published("d", "other"))
    assert keys.poll() and not keys.still(one) and keys.still(two)
    with pytest.raises(Unauthenticated, match="a key that is not in"):
        keys.principal(token("e"), 0)
    keys.principal(token("other"), 0)


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b'{"keys": 1}', b'{"keys": [{}]}', b'{"keys": [{"kid": "x", "kty": "oct", "k": "AAAA"}]}', b'{"keys": []}',
    b'{"keys": [{"kid": "x", "kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}]}', b"\xff"])
def test_a_file_without_public_keys_is_refused(content: bytes, tmp_path: Path) -> None:
    """At the start."""
    (path := tmp_path / "jwks").write_bytes(content)
    with pytest.raises(ConfigError, match="is no JSON Web Key Set with public keys"):
        keys_of(path)


@pytest.mark.parametrize("claim", [
    None, {}, "produce", [1], [{}], [{"action": "own"}], [{"action": ["produce"]}], [{"action": "produce", "destination": "a"}],
    [{"action": "produce", "destinations": ""}], [{"action": "produce", "destinations": 1}], [{"action": "produce", "tenants": "\0"}],
    [{"action": "lease", "tenants": "t"}], [{"action": "produce"}] * 65, [{"action": "produce", "destinations": "\ud800"}]])
def test_a_claim_of_another_form_allows_nothing(claim: object) -> None:
    """It is refused: what somebody meant is not guessed."""
    with pytest.raises(Unauthenticated, match="'spillway'"):
        scopes_of(claim)


def test_claims_are_scopes() -> None:
    """As tokens of the cluster's own have them."""
    claim = [{"action": "produce", "destinations": "a*", "tenants": ""}, {"action": "lease"}, {"action": "admin", "destinations": "b"}]
    assert scopes_of(claim) == [Scope(PRODUCE, "a*", ""), Scope(LEASE), Scope(ADMIN, "b")]
