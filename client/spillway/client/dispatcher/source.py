"""Where runs come from: what the dispatcher needs of a broker, and no more.

The client library fulfils these protocols; tests fulfil them with a list.
"""
from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Target:
    """A destination that is delivered by HTTP. Its `repr` shows nothing that may be secret."""

    destination: str
    url: str = field(repr=False)
    timeout: float  # seconds per request, redirects included
    concurrency_max: int
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # sent with every request
    signing_secrets: tuple[str, ...] = field(default=(), repr=False)  # "whsec_" and base64; none: requests are not signed
    allow_private_addresses: bool = False
    redirects_max: int = 0


class Message(Protocol):
    """One leased message."""

    @property
    def sequence(self) -> int:
        """Its place in the shard."""

    @property
    def attempt(self) -> int:
        """1 for the first delivery."""

    @property
    def id(self) -> str:
        """The producer's id; may be empty."""

    @property
    def headers(self) -> Mapping[str, str]:
        """As produced."""

    @property
    def payload(self) -> bytes:
        """As produced."""


class Gap(Protocol):
    """Messages before the run that went to the dead letters."""

    @property
    def count(self) -> int:
        """How many."""

    @property
    def first_sequence(self) -> int:
        """The first of them."""

    @property
    def last_sequence(self) -> int:
        """The last of them."""


class Run(Protocol):
    """A lease of consecutive messages of one queue. Settling methods hand the settlement in at once; awaiting what they
    return waits until it is committed, and raises StaleLease if the lease was lost, or another SpillwayError. Whoever
    gives out runs keeps their leases from expiring."""

    @property
    def shard(self) -> int:
        """Its shard."""

    @property
    def fencing_token(self) -> int:
        """Grows with every lease of the queue."""

    @property
    def destination(self) -> str:
        """The queue's destination."""

    @property
    def tenant(self) -> str:
        """The queue's tenant."""

    @property
    def key(self) -> str:
        """The queue's key."""

    @property
    def messages(self) -> Sequence[Message]:
        """Oldest first."""

    @property
    def gap(self) -> Gap | None:
        """What is missing before the first message."""

    @property
    def ended(self) -> bool:
        """Whether it is settled, or the lease turned out to be lost."""

    def seconds_left(self) -> float:
        """Until the lease ends, by the caller's clock; negative if it ended."""

    def ack(self, upto: int) -> Awaitable[None]:
        """This message and all before it are delivered."""

    def retry(self, delay: float | None, reason: str) -> Awaitable[None]:
        """The first unsettled message failed; None: the destination's backoff."""

    def throttled(self, delay: float | None) -> Awaitable[None]:
        """The receiver asked the tenant to slow down."""

    def down(self, delay: float | None) -> Awaitable[None]:
        """The receiver cannot be reached."""

    def reject(self, reason: str) -> Awaitable[None]:
        """The first unsettled message can never be delivered."""

    def release(self) -> Awaitable[None]:
        """What is unsettled goes back untouched."""

    def extend(self, seconds: float) -> Awaitable[None]:
        """The lease shall last this long from now."""


class Broker(Protocol):
    """A connection to a broker."""

    async def targets(self) -> list[Target]:
        """All destinations that have an HTTP target, as they are now; asked for about once a second. Raises
        SpillwayError."""

    def consume(self, destination: str, credit_messages: int, credit_bytes: int, run_messages_max: int,
                lease_seconds: float) -> AbstractAsyncContextManager[AsyncIterator[Run]]:
        """A consumer of one destination. Iterating raises SpillwayError if the subscription ended for good; leaving
        gives back what was received and not taken."""
