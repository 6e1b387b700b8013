"""Who may do what: tokens as the meta group stores them, and what their scopes allow. Pure.

A scope allows one kind of action on destinations and tenants that match its patterns, in which '*' stands for any run of characters. What
is asked for may be a pattern, too (consumers subscribe with patterns): it is allowed if everything that it can stand for is.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from spillway.broker.core.bounds import Count, Name, Number, Time

PRODUCE, LEASE, ADMIN = range(3)  # Scope.action
ACTIONS = ("produce", "lease", "admin")
ANY = "*"  # a pattern that everything matches; asked for, it means: all of them
TOKENS_MAX = 10_000  # each costs a few hundred bytes on every node
SCOPES_MAX = 64  # of a token
DIGEST_BYTES = 32
NAMES_LENGTH_MAX = 510  # of a destination and a tenant together
DECISIONS_MAX = 65_536  # remembered for one token


class Scope(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One thing that is allowed."""

    action: Annotated[int, msgspec.Meta(ge=PRODUCE, le=ADMIN)]
    destinations: Name = ANY  # pattern
    tenants: str = ANY  # pattern; "" is the tenant without a name


class Token(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """A token as stored: enough to recognise it, and too little to make it."""

    token_id: Name
    revision: Number
    name: str  # what operators call it
    digest: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]  # SHA-256 of its secret of 256 random bits
    scopes: tuple[Scope, ...]
    created_ms: Time
    expires_ms: Time = 0  # 0: never
    streams_max: Count = 0  # open streams on one node; 0: no limit of its own. So with the others
    messages_per_second: Count = 0
    bytes_in_flight_max: Number = 0


class Pattern:
    """A text in which '*' stands for any run of characters. Not a regular expression: it never backtracks."""

    __slots__ = ("_first", "_last", "_middle", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._first, *middle = text.split("*")
        self._last = middle.pop() if middle else None  # None: no star
        self._middle = middle

    def __repr__(self) -> str:
        return f"<Pattern {self.text!r}>"

    def covers(self, text: str) -> bool:
        """Whether the text matches; of a pattern, whether whatever it stands for does. (A star in it is matched by a star only, as
        nothing else in a pattern matches a star that was not there before.)"""
        if self._last is None:
            return text == self.text
        if len(text) < len(self._first) + len(self._last) or not text.startswith(self._first) or not text.endswith(self._last):
            return False
        at, end = len(self._first), len(text) - len(self._last)
        for part in self._middle:
            found = text.find(part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return True


class Grants:
    """What scopes allow together. One to lease from some tenants only allows nothing: consumers get messages of all. Remembers its
    decisions, for as many pairs of names as fit."""

    __slots__ = ("_decisions", "_scopes", "everything", "scopes")

    def __init__(self, scopes: Sequence[Scope]) -> None:
        self.scopes = tuple(scopes)
        self._scopes: tuple[list[tuple[Pattern, Pattern]], ...] = tuple(
            [(Pattern(s.destinations), Pattern(s.tenants)) for s in scopes
             if s.action == action and (action != LEASE or s.tenants == ANY)] for action in range(len(ACTIONS)))
        self._decisions: dict[tuple[int, str, str], bool] = {}
        self.everything = tuple(any(d.text == ANY and t.text == ANY for d, t in pairs) for pairs in self._scopes)
        """By action: whether it is allowed everywhere."""

    def __repr__(self) -> str:
        return f"<Grants {', '.join(map(described, self.scopes)) or 'nothing'}>"

    def some(self, action: int) -> bool:
        """Whether the action is allowed anywhere at all."""
        return bool(self._scopes[action])

    def allows(self, action: int, destination: str, tenant: str = ANY) -> bool:
        """Whether an action is allowed on a destination, or on all that a pattern stands for, and a tenant, or all of them."""
        key = action, destination, tenant
        known = self._decisions.get(key)
        if known is None:
            known = any(d.covers(destination) and t.covers(tenant) for d, t in self._scopes[action])
            if len(destination) + len(tenant) <= NAMES_LENGTH_MAX:  # else they are no names
                if len(self._decisions) >= DECISIONS_MAX:
                    self._decisions.clear()
                self._decisions[key] = known
        return known

    def settles(self, queue: bytes) -> bool:
        """Whether a lease of a queue may be settled: whoever may lease from its destination may."""
        return self.allows(LEASE, queue[:queue.index(b"\0")].decode())

    def lease_patterns(self) -> list[str]:
        """Of destinations that may be leased from."""
        return [d.text for d, _ in self._scopes[LEASE]]


def of_patterns(patterns: Iterable[str]) -> Grants:
    """The right to lease from destinations, as another node says it."""
    return Grants([Scope(LEASE, pattern) for pattern in patterns])


def described(scope: Scope) -> str:
    """A scope as people write it: "produce", "lease billing-*", "produce billing acme-*"."""
    words = [ACTIONS[scope.action]]
    if scope.destinations != ANY or scope.tenants != ANY:
        words.append(scope.destinations)
    if scope.tenants != ANY:
        words.append(repr(scope.tenants))
    return " ".join(words)
