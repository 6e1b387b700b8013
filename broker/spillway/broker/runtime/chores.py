"""What a shard's leader proposes beside traffic: messages whose time has passed, purges, redrives, and what the copier is
done with. Each rides in the entries that traffic fills, some at a time."""
from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from spillway.broker.core import entry as e
from spillway.broker.core.entry import Entry, Trim
from spillway.broker.core.outbox import OUTBOX
from spillway.broker.core.policy import Policy
from spillway.broker.core.queue import Queue
from spillway.broker.core.shard import Effects, destination_of
from spillway.broker.errors import Unavailable

if TYPE_CHECKING:
    from spillway.broker.runtime.shard import ShardRuntime

TRIMS_PER_ENTRY_MAX = 256
TRIM_MESSAGES_MAX = 1024  # of one queue at a time
PURGES_PER_ENTRY_MAX = 256  # queues
REDRIVES_PER_ENTRY_MAX = 512  # dead letters
REDRIVE_BYTES_MAX = 1 << 20  # of their bodies, in one entry: all of them are read when it is applied
DEAD_PURGES_PER_ENTRY_MAX = 512
SWEEP_QUEUES_MAX = 512  # of a shard, per second: messages behind a parked or leased head go, too


class Flight:
    """The chores of one entry."""

    __slots__ = ("dead_purges", "purges", "redrives")

    def __init__(self) -> None:
        self.purges: list[asyncio.Future[int]] = []
        self.redrives: list[asyncio.Future[bool]] = []
        self.dead_purges: list[asyncio.Future[None]] = []


class Chores:
    """Of one shard."""

    def __init__(self, runtime: ShardRuntime) -> None:
        self._runtime = runtime
        self._sweep_at: dict[bytes, bytes] = {}  # destination -> queue at which the sweep goes on
        self.expiring: dict[bytes, None] = {}  # destinations that got messages with a time to live of their own
        self.clear()

    def clear(self) -> None:
        """Nothing is proposed (any more); whoever waits is told to ask again."""
        for purge in getattr(self, "_purges", []):
            _fail(purge[1])
        for redrive in getattr(self, "_redrives", []):
            _fail(redrive[1])
        for dead in getattr(self, "_dead_purges", []):
            _fail(dead[1])
        self._trims: list[Trim] = []
        self._copied: Trim | None = None
        self._overflows: list[tuple[bytes, int]] = []
        self._purges: list[tuple[bytes, asyncio.Future[int]]] = []
        self._redrives: list[tuple[bytes, asyncio.Future[bool], int]] = []
        self._dead_purges: list[tuple[bytes, asyncio.Future[None]]] = []

    @property
    def waiting(self) -> bool:
        """Whether something waits for an entry."""
        return bool(self._trims or self._copied or self._purges or self._redrives or self._dead_purges)

    # -- what is asked for ---------------------------------------------------------------------------------------

    def trim(self, queue: Queue, policy: Policy, now: int) -> bool:
        """Proposes to remove the messages at the head of an unleased queue whose time has passed; false if there are none."""
        ttl = policy.ttl_ms
        count = last = 0
        for sequence, enqueue_ms, _, _, expire in queue.front[:TRIM_MESSAGES_MAX]:
            if not (0 < expire <= now or 0 < ttl <= now - enqueue_ms):
                break
            count += 1
            last = sequence
        if not count:
            return False
        queue.granting = True
        self._trims.append((queue.key, count, last, e.GONE if policy.discard else e.DEAD, "its time to live has passed"))
        return True

    def copied(self, count: int, last: int, overflows: list[tuple[bytes, int]]) -> None:
        """The first messages of the outbox have all their copies."""
        self._copied = (OUTBOX, count, last, e.DONE, "")
        self._overflows = overflows

    def purge(self, name: bytes) -> asyncio.Future[int]:
        """Removes a queue's messages; the result is how many there were."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self._runtime.leading:
            self._purges.append((name, future))
        else:
            _fail(future)
        return future

    def redrive(self, key: bytes, size: int) -> asyncio.Future[bool]:
        """Puts a dead letter of `size` bytes back; the result is false if its queue is leased just now, or it is gone."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._runtime.leading:
            self._redrives.append((key, future, size))
        else:
            _fail(future)
        return future

    def purge_dead(self, key: bytes) -> asyncio.Future[None]:
        """Removes a dead letter."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._runtime.leading:
            self._dead_purges.append((key, future))
        else:
            _fail(future)
        return future

    def sweep(self, now: int) -> bool:
        """Looks at some queues of destinations with a time to live, as most are not picked while their gate is closed or
        their head waits; true if something has to go."""
        runtime = self._runtime
        state = runtime.state
        budget = SWEEP_QUEUES_MAX
        found = False
        for destination in dict.fromkeys((*runtime.node.ttl_destinations(), *self.expiring)):
            counters = state.counters.get(destination)
            if counters is None or not counters.queues:
                self.expiring.pop(destination, None)
                continue
            policy = runtime.node.policy(destination)
            names = state.queue_names(destination + b"\0", self._sweep_at.get(destination, b""), budget)
            if len(names) == budget:
                self._sweep_at[destination] = names[-1]
            else:
                self._sweep_at.pop(destination, None)
            for name in names:
                queue = state.open(name)
                if queue is not None and not queue.token and not queue.granting:
                    state.ensure(queue, 1)
                    if self.trim(queue, policy, now):
                        found = True
            budget -= len(names)
            if budget <= 0:
                break
        return found

    # -- entries -------------------------------------------------------------------------------------------------

    def fill(self, entry: Entry) -> Flight:
        """Puts what waits into an entry, up to its limits."""
        flight = Flight()
        entry.trims = self._trims[:TRIMS_PER_ENTRY_MAX]
        del self._trims[:TRIMS_PER_ENTRY_MAX]
        if self._copied is not None:
            entry.trims.append(self._copied)
            entry.overflows = self._overflows
            self._copied = None
            self._overflows = []
        for name, purge in self._purges[:PURGES_PER_ENTRY_MAX]:
            entry.purges.append(name)
            flight.purges.append(purge)
        del self._purges[:PURGES_PER_ENTRY_MAX]
        size = taken = 0
        for key, redrive, length in self._redrives[:REDRIVES_PER_ENTRY_MAX]:
            size += length
            if taken and size > REDRIVE_BYTES_MAX:
                break
            taken += 1
            entry.redrives.append(key)
            flight.redrives.append(redrive)
        del self._redrives[:taken]
        for key, dead in self._dead_purges[:DEAD_PURGES_PER_ENTRY_MAX]:
            entry.dead_purges.append(key)
            flight.dead_purges.append(dead)
        del self._dead_purges[:DEAD_PURGES_PER_ENTRY_MAX]
        return flight

    def applied(self, entry: Entry, flight: Flight, effects: Effects) -> None:
        """The entry is applied."""
        runtime = self._runtime
        for trim, done in zip(entry.trims, effects.trimmed, strict=True):
            if trim[0] == OUTBOX:
                runtime.copier.trimmed()
                continue
            queue = runtime.state.queues.get(trim[0])
            if queue is not None:
                queue.granting = False
                if not done and not queue.token:  # as it is leased, it is ready when that is over
                    effects.ready.append(trim[0])
        for purge, count in zip(flight.purges, effects.purged, strict=True):
            _tell(purge, count)
        for redrive, back in zip(flight.redrives, effects.redriven, strict=True):
            _tell(redrive, back)
        for dead in flight.dead_purges:
            _tell(dead, None)

    @staticmethod
    def lost(flight: Flight) -> None:
        """The entry may never be applied."""
        futures: list[asyncio.Future[Any]] = [*flight.purges, *flight.redrives, *flight.dead_purges]
        for future in futures:
            _fail(future)

    def note(self, name: bytes) -> None:
        """A message with a time to live of its own went into this queue."""
        self.expiring[destination_of(name)] = None


def _tell(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(Unavailable("the shard's leader changed; ask again"))
        future.exception()  # nobody need look
