"""What the load is made of: destinations, queues, and what handlers make of messages. The same for every role."""
from __future__ import annotations

import random
import signal
from asyncio import Event, get_running_loop
from collections.abc import Iterator
from dataclasses import dataclass

from spillway.client import DeliveryPolicy, Destination, NackPolicy

from tests.torture import history
from tests.torture.history import Queue

LEASE_SECONDS = 5.0  # as long as a node is frozen: its leases expire meanwhile
LEASE_TOTAL_SECONDS = 8.0  # a forgotten lease ends
BACKOFF_SECONDS, BACKOFF_CAP_SECONDS = 0.02, 0.3
ATTEMPTS_MAX = 3
BLOCKING, GIVING_UP, UNORDERED, PLAIN = "blocking", "giving-up", "unordered", "plain"
CLIENT_DESTINATIONS = (BLOCKING, GIVING_UP, UNORDERED)  # of the product's client; the other one is for bare stubs
TENANTS, KEYS = 4, 6  # of each producer in each destination


def destinations() -> list[Destination]:
    """All, with their policies."""
    def policy(**more: object) -> DeliveryPolicy:
        return DeliveryPolicy(lease_seconds=LEASE_SECONDS, backoff_base=BACKOFF_SECONDS, backoff_cap=BACKOFF_CAP_SECONDS,
                              **more)  # type: ignore[arg-type]
    return [Destination(BLOCKING, policy()), Destination(PLAIN, policy()),
            Destination(GIVING_UP, policy(nack_policy=NackPolicy.BLOCK_UNTIL, attempts_max=ATTEMPTS_MAX)),
            Destination(UNORDERED, policy(ordered=False))]


def described() -> list[history.Event]:
    """The destinations, for the history."""
    return [{"kind": "destination", "destination": d.name, "ordered": d.policy.ordered is not False,
             "attempts_max": d.policy.attempts_max or 0, "lease": LEASE_SECONDS} for d in destinations()]


class Numbers:
    """The messages of one producer: numbered from 0 in each of its queues."""

    def __init__(self, by: str, chosen: tuple[str, ...], seed: int) -> None:
        self._queues: list[Queue] = [(d, f"{by}-{t}", f"k{k}") for d in chosen for t in range(TENANTS) for k in range(KEYS)]
        self._next = dict.fromkeys(self._queues, 0)
        self._random = random.Random(seed)

    def next(self) -> tuple[Queue, int, bytes]:
        """The next message: its queue, its number there, and its payload."""
        queue = self._random.choice(self._queues)
        number = self._next[queue]
        self._next[queue] = number + 1
        return queue, number, history.payload(queue, number, padding=self._random.randrange(400))


@dataclass(frozen=True)
class Outcome:
    """What a handler makes of a message."""

    name: str
    part: float  # of all messages
    delay: float | None = None


OUTCOMES = (Outcome("retry", 0.02), Outcome("reject", 0.008), Outcome("throttled", 0.004, 0.05), Outcome("down", 0.0005, 0.05),
            Outcome("release", 0.008), Outcome("extend", 0.01), Outcome("forget", 0.001))
ACK = Outcome("ack", 1.0)


def outcomes(seed: int) -> Iterator[Outcome]:
    """One outcome after the other; almost all are acknowledgements."""
    chance = random.Random(seed)
    while True:
        value = chance.random()
        for outcome in OUTCOMES:
            if value < outcome.part:
                yield outcome
                break
            value -= outcome.part
        else:
            yield ACK


def stopping() -> Event:
    """Set by SIGTERM: stop what is new, finish what is begun."""
    event = Event()
    get_running_loop().add_signal_handler(signal.SIGTERM, event.set)
    return event
