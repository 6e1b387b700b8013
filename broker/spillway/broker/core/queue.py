"""One virtual queue in memory. It exists only while the queue has messages, and only while something happens
to it: a queue that merely waits is rows in the store (see `rows`).

    front     messages in memory from the head on
    cold      how many follow that are only in the store
    tail      messages in memory after those; empty unless cold > 0
"""
from __future__ import annotations

# (sequence, enqueue time ms, deliver not before ms, body)
Message = tuple[int, int, int, bytes]


class Counters:
    """Counters of one destination in one shard; see rows.StatsRow."""

    __slots__ = ("acked", "dead", "dead_lettered", "dirty", "enqueued", "expired", "leased", "messages", "name", "queues",
                 "retried")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.queues = self.messages = self.leased = self.dead = 0
        self.enqueued = self.acked = self.dead_lettered = self.retried = self.expired = 0
        self.dirty = False


class Queue:
    """A queue's state. Only `shard` changes it."""

    __slots__ = ("attempts", "cold", "consumer", "counters", "deadline", "dirty", "floor", "front", "gap", "granting",
                 "key", "lease_acked", "lease_row", "lease_size", "not_before", "persisted", "stored", "tail", "token")

    def __init__(self, key: bytes, counters: Counters) -> None:
        self.key = key
        self.counters = counters
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
        self.gap: tuple[int, int, int] | None = None
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
