"""What one connection, or one token, may use at this node at a time: open streams, records a second, bytes of requests not answered.

Who opens one stream too many is refused (RESOURCE_EXHAUSTED, with RetryInfo). Who produces too fast, or has too much under way, is not
read from until there is room again, and HTTP/2's flow control passes that on: nothing is lost, and what waits in this process is the one
request of each stream that was read last.
"""
from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar

from spillway.broker.errors import TooMuch
from spillway.broker.services.principal import Limits, Principal

IDLE_SECONDS = 2.0  # an account without streams is kept so long: closing a stream must not fill its bucket
RETRY_SECONDS = 1.0  # after which a refused stream may be tried again
WAIT_SECONDS_MAX = 60.0  # for the bucket, at a time


class Account:
    """What one connection or one token uses."""

    __slots__ = ("_bucket", "_filled", "_room", "bytes", "idle_since", "limits", "streams", "what")

    def __init__(self, what: str, limits: Limits, now: float) -> None:
        self.what = what  # for messages
        self.limits = limits
        self.streams = 0
        self.bytes = 0
        self.idle_since = now
        self._bucket = float(limits.messages_per_second)  # records that may come at once: those of a second
        self._filled = now
        self._room = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Account of {self.what}: {self.streams} streams, {self.bytes} bytes>"

    def open(self) -> None:
        """One more stream. Raises TooMuch."""
        most = self.limits.streams
        if most and self.streams >= most:
            raise TooMuch(f"{self.what} has {self.streams} open streams, the most that it may have at one node; close some, or share them",
                          RETRY_SECONDS)
        self.streams += 1

    def close(self, now: float) -> None:
        """One stream less."""
        self.streams -= 1
        self.idle_since = now

    async def wait_for_bytes(self, size: int) -> None:
        """Until a request of so many bytes may be under way; the only one always may."""
        most = self.limits.bytes_in_flight
        while most and self.bytes and self.bytes + size > most:
            self._room.clear()
            await self._room.wait()

    def hold(self, size: int) -> None:
        """So many bytes more (or, negative, less) are under way."""
        self.bytes += size
        if size < 0:
            self._room.set()

    def spend(self, records: int, now: float) -> float:
        """So many records came; for how many seconds no more may."""
        rate = self.limits.messages_per_second
        if not rate:
            return 0.0
        self._bucket = min(float(rate), self._bucket + (now - self._filled) * rate) - records
        self._filled = now
        return min(WAIT_SECONDS_MAX, max(0.0, -self._bucket / rate))


class Quota:
    """What one stream uses, in the accounts of its connection and its token."""

    __slots__ = ("_accounts", "_clock", "_held")

    def __init__(self, accounts: tuple[Account, ...], clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock
        self._held = 0

    async def wait_for_bytes(self, size: int) -> None:
        """Until a request of so many bytes may be under way."""
        for account in self._accounts:
            await account.wait_for_bytes(size)

    def hold(self, size: int) -> None:
        """So many bytes more (or, negative, less) are under way."""
        self._held += size
        for account in self._accounts:
            account.hold(size)

    def spend(self, records: int) -> float:
        """So many records came; for how many seconds no more may."""
        now = self._clock()
        return max(account.spend(records, now) for account in self._accounts)

    def end(self) -> None:
        """The stream is over: what it held is free."""
        self.hold(-self._held)
        for account in self._accounts:
            account.close(self._clock())


class Quotas:
    """All accounts of a node."""

    def __init__(self, per_connection: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_connection = per_connection
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def open(self, connection: str, principal: Principal) -> Quota | None:
        """A stream of a connection; None if nothing limits it. Raises TooMuch."""
        wanted = []
        if any(self._per_connection):
            wanted.append(self._account("c " + connection, f"connection {connection}", self._per_connection))
        if principal.key and any(principal.limits):
            wanted.append(self._account("t " + principal.key, principal.name, principal.limits))
        if not wanted:
            return None
        for i, account in enumerate(wanted):
            try:
                account.open()
            except TooMuch:
                for opened in wanted[:i]:
                    opened.close(self._clock())
                raise
        return Quota(tuple(wanted), self._clock)

    def _account(self, key: str, what: str, limits: Limits) -> Account:
        account = self._accounts.get(key)
        if account is None or account.limits != limits:
            now = self._clock()
            self._accounts = {k: a for k, a in self._accounts.items() if a.streams or now - a.idle_since < IDLE_SECONDS}
            account = self._accounts[key] = Account(what, limits, now)
        return account


_quota: ContextVar[Quota | None] = ContextVar("spillway_quota", default=None)


def current_quota() -> Quota | None:
    """Of the stream that this task serves; None if nothing limits it."""
    return _quota.get()


def enter_quota(quota: Quota | None) -> None:
    """The task serves a stream with this one."""
    _quota.set(quota)
