"""Who calls, as its token or its certificate says: `Authenticator` finds out, `current()` tells handlers.

A token is `spw_<id>_<secret>`: the id finds its row in the meta group, and the row has the SHA-256 of the secret. That is enough for 256
random bits; a slow hash would only help against guessing what people have thought up.
"""
from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from spillway.broker.core.access import ADMIN, Grants, Scope, Token
from spillway.broker.core.directory import Directory
from spillway.broker.errors import ConfigError, Unauthenticated
from spillway.contract.files import stamp_of

log = logging.getLogger(__name__)

PREFIX = "spw_"
ID_BYTES, SECRET_BYTES = 6, 32
TOKEN_CHARACTERS_MIN = 20  # of an admin token that people make: 'admin' is none
TOKEN_CHARACTERS_MAX = 16 << 10
SUBJECT_CHARACTERS_MAX = 200
NEWS_SECONDS, POLL_SECONDS = 1.0, 0.05  # how long a token that nobody knows is waited for, and between looks
WAITING_MAX = 64  # calls that wait for theirs; others are refused at once
_NOBODY = bytes(32)  # compared with for ids that there are none of: it takes as long


class Limits(NamedTuple):
    """What one token, or one connection, may use at a time; 0: no limit."""

    streams: int = 0
    messages_per_second: int = 0
    bytes_in_flight: int = 0


class Principal:
    """A caller. `grants` None: it may do everything."""

    __slots__ = ("expires", "grants", "key", "limits", "mark", "name")

    def __init__(self, name: str, grants: Grants | None = None, key: str = "", mark: object = None, expires: float = 0.0,
                 limits: Limits = Limits()) -> None:  # noqa: B008  # it cannot be changed
        self.name = name  # for people: what the audit log says
        self.grants = grants
        self.key = key  # names the token, for its limits; "" without one
        self.mark = mark  # what the token was recognised by: when that is another one, the principal is none any more
        self.expires = expires  # seconds since 1970; 0: never
        self.limits = limits

    def __repr__(self) -> str:
        return f"<Principal {self.name}>"


class Claims(Protocol):
    """What verifies tokens of others, see `jwt`."""

    def principal(self, token: str, now: float) -> Principal:
        """Raises Unauthenticated."""

    def still(self, principal: Principal) -> bool:
        """Whether what it was verified with is still there."""


TRUSTED = Principal("node")  # another node, which has asked itself who calls
_current: ContextVar[Principal] = ContextVar("spillway_principal", default=TRUSTED)


def current() -> Principal:
    """Who makes the call that this task serves."""
    return _current.get()


def enter(principal: Principal) -> None:
    """The task serves this one from now on."""
    _current.set(principal)


def make_token() -> tuple[str, str, bytes]:
    """A new token: its id, itself, its digest."""
    token_id = secrets.token_hex(ID_BYTES)
    secret = base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).decode().rstrip("=")
    return token_id, f"{PREFIX}{token_id}_{secret}", digest_of(secret)


def digest_of(secret: str) -> bytes:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).digest()


class AdminFile:
    """The file with a token that may administer everything: read again when it changes, and of no effect when it is gone."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError if it cannot be read, or has no token."""
        self._path = Path(path)
        self.digest: bytes | None = None
        self._stamp: object = None
        self.poll()
        if self.digest is None:
            raise ConfigError(f"admin_token_file {path} cannot be read, or has no token of {TOKEN_CHARACTERS_MIN} to "
                              f"{TOKEN_CHARACTERS_MAX} characters; make one by: openssl rand -hex 32")

    def poll(self) -> bool:
        """Looks at the file; whether there is another token now."""
        try:
            stamp: object = stamp_of(self._path)
            if stamp == self._stamp:
                return False
            text = self._path.read_bytes().decode(errors="replace").strip()
        except OSError:
            stamp, text = None, ""
        good = TOKEN_CHARACTERS_MIN <= len(text) <= TOKEN_CHARACTERS_MAX and all("!" <= c <= "~" for c in text)
        digest = digest_of(text) if good else None
        changed, self.digest, self._stamp = digest != self.digest, digest, stamp
        if changed and digest is None:
            log.warning("admin_token_file %s has no token any more; the former one is no longer valid", self._path)
        return changed


class Authenticator:
    """Finds out who calls."""

    def __init__(self, required: bool, directory: Callable[[], Directory], now: Callable[[], float], admin: AdminFile | None = None,
                 claims: Claims | None = None, behind: Callable[[], bool] = lambda: False) -> None:
        """`required`: callers need a token. `now`: seconds since 1970. `behind`: whether there may be tokens that are not known here."""
        self._required = required
        self._directory = directory
        self._now = now
        self._admin = admin
        self._claims = claims
        self._behind = behind
        self._waiting = 0
        self._known: dict[str, tuple[Token, Grants]] = {}  # by token id; grants remember their decisions

    async def identify(self, context: Any) -> Principal:
        """Who makes a call, by its metadata and its connection. Raises Unauthenticated."""
        if not self._required:
            return Principal(subject_of(context) or "anonymous")
        given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if not given:
            raise Unauthenticated("no token: this cluster asks for one (metadata `authorization: Bearer TOKEN`; the client's token_file, "
                                  "the command's --token-file)")
        kind, _, token = given[0].partition(" ") if isinstance(given[0], str) else ("", "", "")
        token = token.strip()
        if len(given) > 1 or kind.lower() != "bearer" or not 0 < len(token) <= TOKEN_CHARACTERS_MAX:
            raise Unauthenticated("the metadata `authorization` must be there once, as: Bearer TOKEN")
        if self._admin is not None and self._admin.digest is not None and hmac.compare_digest(digest_of(token), self._admin.digest):
            return Principal("admin_token_file", Grants([Scope(ADMIN)]), "admin_token_file", self._admin.digest)
        if token.startswith(PREFIX):
            return await self._stored(token)
        if self._claims is not None and token.count(".") == 2:
            return self._claims.principal(token, self._now())
        raise Unauthenticated("the token is not valid")

    async def _stored(self, token: str) -> Principal:
        token_id, _, secret = token.removeprefix(PREFIX).partition("_")
        row = self._directory().tokens.get(token_id)
        if row is None and self._behind() and self._waiting < WAITING_MAX:  # it may have been made a moment ago, at another node
            self._waiting += 1
            try:
                for _ in range(int(NEWS_SECONDS / POLL_SECONDS)):
                    await asyncio.sleep(POLL_SECONDS)
                    if (row := self._directory().tokens.get(token_id)) is not None:
                        break
            finally:
                self._waiting -= 1
        if not hmac.compare_digest(digest_of(secret), row.digest if row else _NOBODY) or row is None:
            raise Unauthenticated("the token is not valid, or was revoked")
        if row.expires_ms and row.expires_ms <= self._now() * 1000:
            raise Unauthenticated(f"the token {token_id} has expired")
        known = self._known.get(token_id)
        if known is None or known[0] is not row:
            self._known = {key: value for key, value in self._known.items() if key in self._directory().tokens}
            known = self._known[token_id] = row, Grants(row.scopes)
        return Principal(f"token {token_id} ({row.name})" if row.name else f"token {token_id}", known[1], token_id, row.digest,
                         row.expires_ms / 1000, Limits(row.streams_max, row.messages_per_second, row.bytes_in_flight_max))

    def refusal(self, principal: Principal) -> str:
        """Why somebody who was let in before is not any more; empty if it is."""
        if principal.expires and principal.expires <= self._now():
            return "the token has expired"
        if principal.key == "admin_token_file":
            return "" if self._admin is not None and self._admin.digest == principal.mark else "the admin token was changed"
        if isinstance(principal.mark, bytes):
            row = self._directory().tokens.get(principal.key)
            return "" if row is not None and row.digest == principal.mark else "the token was revoked"
        if principal.mark is not None and self._claims is not None:
            return "" if self._claims.still(principal) else "the key of the token is not valid any more"
        return ""


def subject_of(context: Any) -> str:
    """Whom a client's certificate is of; empty without one."""
    found = context.auth_context()
    for name in ("x509_subject", "x509_common_name"):
        for value in found.get(name, ()):
            if value:
                text = value.decode(errors="replace")
                return "certificate " + "".join(c if c.isprintable() else "?" for c in text)[:SUBJECT_CHARACTERS_MAX]
    return ""
