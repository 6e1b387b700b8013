"""One virtual queue in memory. It exists only while the queue has messages, and only while something happens
to it: a queue that merely waits is rows in the store (see `rows`).

    front     messages in memory from the head on
    cold      how many follow that are only in the store
    tail      messages in memory after those; empty unless cold > 0
"""
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spillway.broker.core.meter import Meter

# (sequence, enqueue time ms, deliver not before ms or 0, body, deliver not after ms or 0)
Message = tuple[int, int, int, bytes, int]


class Tenant:
    """What one tenant of one destination has in one shard; see rows.TenantRow."""

    __slots__ = ("dirty", "messages", "scope", "size", "stored")

    def __init__(self, scope: bytes) -> None:
        self.scope = scope
        self.messages = self.size = 0
        self.stored = False  # has a row
        self.dirty = False


class Counters:
    """Counters of one destination in one shard; see rows.StatsRow."""

    __slots__ = ("acked", "dead", "dead_lettered", "deduplicated", "dirty", "discarded", "enqueued", "expired", "leased",
                 "leases", "messages", "meter", "name", "overflowed", "purged", "queues", "redriven", "retried", "size", "ttl_expired")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.queues = self.messages = self.leased = self.dead = 0
        self.leases = 0  # live ones; as `leased`, which is of messages, it is not stored but counted
        self.enqueued = self.acked = self.dead_lettered = self.retried = self.expired = 0
        self.size = self.ttl_expired = self.purged = self.redriven = self.discarded = self.deduplicated = self.overflowed = 0
        self.dirty = False
        self.meter: Meter | None = None  # while this node leads the shard, and somebody wants metrics


class Queue:
    """A queue's state. Only `shard` changes it."""

    __slots__ = ("attempts", "cold", "consumer", "counters", "deadline", "dirty", "floor", "front", "gap",
                 "gap_since", "granting", "key", "lease_acked", "lease_row", "lease_size", "not_before", "persisted", "size", "stored",
                 "tail", "tenant", "token")

    def __init__(self, key: bytes, counters: Counters, tenant: Tenant) -> None:
        self.key = key
        self.counters = counters
        self.tenant = tenant
        self.size = 0  # bytes of the bodies of all messages
        self.front: list[Message] = []
        self.tail: list[Message] = []
        self.cold = 0
        self.floor = 0  # rows of the store below this sequence are dead
        self.persisted = 0  # messages up to this sequence have rows
        self.attempts = 0  # of the head
        self.not_before = 0
        self.token = 0  # of the live lease; 0: none
        self.lease_size = 0
        self.lease_acked = 0
        self.deadline = 0
        self.consumer = ""
        # Count, first and last sequence of what was dropped, until a message behind all of them is acknowledged
        self.gap: tuple[int, int, int] | None = None
        self.gap_since = 0  # index of the entry with which it began
        self.stored = False  # has a queue row
        self.lease_row = 0  # token of its lease row
        self.dirty = False  # differs from its rows
        self.granting = False  # leader only, volatile: a grant is in the log but not applied

    @property
    def count(self) -> int:
        """Messages in the queue, leased ones included."""
        return len(self.front) + self.cold + len(self.tail)

    def __repr__(self) -> str:
        lease = f", lease {self.token} {self.lease_acked}/{self.lease_size} to {self.consumer}" if self.token else ""
        return f"<Queue {self.key!r}: {self.count} messages, {self.attempts} attempts{lease}>"
