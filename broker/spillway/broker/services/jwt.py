"""Tokens that somebody else issues: JSON Web Tokens, verified with the keys of a file, once for each call or stream, whose streams end when
they expire.

What a token allows is in its claim `spillway`, a list of scopes:

    "spillway": [{"action": "produce", "destinations": "billing-*", "tenants": "acme"}, {"action": "lease", "destinations": "hooks"}]

`destinations` and `tenants` are patterns, "*" if they are missing. Needs PyJWT with cryptography (the extra `jwt`).
"""
from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from spillway.broker.core.access import ACTIONS, ANY, LEASE, SCOPES_MAX, Grants, Scope
from spillway.broker.errors import ConfigError, RequestError, Unauthenticated
from spillway.broker.services.names import check_name
from spillway.broker.services.principal import Principal
from spillway.contract.files import stamp_of

log = logging.getLogger(__name__)

# Signatures only: with a shared secret everybody who verifies could issue.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
CLAIM = "spillway"
LEEWAY_SECONDS = 5.0  # clocks differ
KEYS_MAX = 100
SUBJECT_CHARACTERS_MAX = 100


class Keys:
    """The keys of a file (a JSON Web Key Set), read again when it changes: `Claims` of Authenticator."""

    def __init__(self, path: str, issuer: str, audience: str) -> None:
        """Raises ConfigError."""
        try:
            import jwt
        except ImportError:
            raise ConfigError("jwt_jwks_file needs the 'jwt' extra: pip install 'spillway[jwt]'") from None
        self._jwt = jwt
        self._path = Path(path)
        self._issuer = issuer
        self._audience = audience
        self._keys: dict[str, tuple[Any, str]] = {}  # by id: the key, and its text
        self._stamp: object = None
        self.poll()
        if not self._keys:
            raise ConfigError(f"jwt_jwks_file {path} is no JSON Web Key Set with public keys that have a kid")

    def poll(self) -> bool:
        """Looks at the file; whether there are other keys now. What cannot be read is left."""
        try:
            stamp: object = stamp_of(self._path)
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            keys = self._parsed(self._path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            if self._keys:
                log.error("jwt_jwks_file %s: %s; going on with what was read before", self._path, error)
            return False
        changed, self._keys = keys != self._keys, keys
        return changed

    def _parsed(self, data: bytes) -> dict[str, tuple[Any, str]]:
        """Raises ValueError."""
        listed = json.loads(data)
        if not isinstance(listed, dict) or not isinstance(listed.get("keys"), list) or len(listed["keys"]) > KEYS_MAX:
            raise ValueError(f"it is no JSON Web Key Set of at most {KEYS_MAX} keys")
        out = {}
        for one in listed["keys"]:
            if not isinstance(one, dict) or not isinstance(one.get("kid"), str) or one.get("use", "sig") != "sig":
                continue
            if one.get("kty") == "oct":
                raise ValueError(f"the key {one['kid']!r} is a shared secret; give public keys")
            try:
                out[one["kid"]] = self._jwt.PyJWK.from_dict(one), json.dumps(one, sort_keys=True)
            except (self._jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
                raise ValueError(f"the key {one['kid']!r}: {error}") from None
        return out

    def principal(self, token: str, now: float) -> Principal:
        """See Claims."""
        jwt = self._jwt
        try:
            key, text = self._keys[jwt.get_unverified_header(token).get("kid", "")]
            claims = jwt.decode(token, key, algorithms=ALGORITHMS, issuer=self._issuer, audience=self._audience, leeway=LEEWAY_SECONDS,
                                options={"require": ["exp", "iss", "aud"]})
        except KeyError:
            raise Unauthenticated("the token is signed with a key that is not in jwt_jwks_file") from None
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the token has expired") from None
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise Unauthenticated(f"the token is not valid: {error}") from None
        scopes = scopes_of(claims.get(CLAIM))
        subject = claims.get("sub")
        name = subject if isinstance(subject, str) else "without sub"
        name = "".join(c if c.isprintable() else "?" for c in name)[:SUBJECT_CHARACTERS_MAX]
        return Principal(f"jwt {name}", Grants(scopes), f"jwt {name}", text, float(claims["exp"]) + LEEWAY_SECONDS)

    def still(self, principal: Principal) -> bool:
        """See Claims."""
        return any(text == principal.mark for _, text in self._keys.values())


def scopes_of(claim: object) -> list[Scope]:
    """What a claim allows. Raises Unauthenticated for one of another form: what somebody meant to allow is not guessed."""
    if not isinstance(claim, list) or len(claim) > SCOPES_MAX:
        raise Unauthenticated(f"the token's claim {CLAIM!r} is no list of at most {SCOPES_MAX} scopes")
    out = []
    for i, one in enumerate(claim):
        if not isinstance(one, dict) or one.get("action") not in ACTIONS or not one.keys() <= {"action", "destinations", "tenants"}:
            raise Unauthenticated(f"the token's claim {CLAIM!r} has no scope at {i}: it needs an action ({', '.join(ACTIONS)}), and may "
                                  "have destinations and tenants")
        action, patterns = ACTIONS.index(one["action"]), [one.get("destinations", ANY), one.get("tenants", ANY)]
        try:
            for field, pattern in zip(("destinations", "tenants"), patterns, strict=True):
                if not isinstance(pattern, str):
                    raise RequestError(field, "is no text")
                check_name(field, pattern, empty=field == "tenants")
        except (RequestError, UnicodeEncodeError) as error:
            raise Unauthenticated(f"the token's claim {CLAIM!r}, scope {i}: {error}") from None
        if action == LEASE and patterns[1] != ANY:
            raise Unauthenticated(f"the token's claim {CLAIM!r}, scope {i}: a scope to lease is for all tenants")
        out.append(Scope(action, *patterns))
    return out
