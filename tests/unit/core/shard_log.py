"""A shard with its rows and its log, for tests that tell one story each."""
from __future__ import annotations

from spillway.broker.core import rows
from spillway.broker.core.entry import (
    ACK,
    REJECT,
    VERSION,
    Enqueue,
    Entry,
    GateChange,
    Grant,
    Option,
    Settle,
    Trim,
    decode_entry,
    encode_entry,
)
from spillway.broker.core.shard import Effects, SettleStatus, Shard, tenant_scope_of
from spillway.broker.core.view import MemoryView

NOW = 1_700_000_000_000
QUEUE = b"d\0t\0k"
OTHER = b"d\0t\0l"


class Log:
    """A shard with its rows and its log."""

    def __init__(self) -> None:
        self.view = MemoryView()
        self.shard = Shard(self.view)
        self.entries: list[tuple[int, bytes]] = []
        self.saved = 0

    def apply(self, enqueues: list[Enqueue] | None = None, settles: list[Settle] | None = None,
              grants: list[Grant] | None = None, gates: list[GateChange] | None = None,
              expires: list[tuple[int, int | bool, int, str]] | None = None, now: int = NOW, trims: list[Trim] | None = None,
              purges: list[bytes] | None = None, redrives: list[bytes] | None = None,
              dead_purges: list[bytes] | None = None) -> Effects:
        """One entry, through the codec."""
        entry = Entry(VERSION, now, enqueues or [], settles or [], expires or [], gates or [], grants or [], ["c"],
                      trims or [], purges or [], redrives or [], dead_purges or [])
        self.entries.append((len(self.entries) + 1, encode_entry(entry)))
        effects = Effects()
        self.shard.apply(len(self.entries), decode_entry(self.entries[-1][1]), effects)
        return effects

    def enqueue(self, *bodies: bytes, name: bytes = QUEUE, producer: str = "", first: int = 0,
                options: dict[int, Option] | None = None, now: int = NOW) -> Effects:
        """Messages for one queue."""
        return self.apply([Enqueue(producer, first, [name] * len(bodies), list(bodies), None, options)], now=now)

    def grant(self, messages: int, name: bytes = QUEUE) -> int:
        """A lease of the head; its token."""
        queue, = self.apply(grants=[(name, messages, NOW + 1_000, 0)]).granted
        assert queue is not None
        return queue.token

    def settle(self, token: int, position: int, outcome: int, sequence: int = 0, argument: int = 0, reason: str = "") -> int:
        """One settlement; its status."""
        status, = self.apply(settles=[(token, position, sequence, outcome, argument, reason)]).settled
        return status

    def checkpoint(self) -> None:
        """Saves."""
        self.view.commit(self.shard.checkpoint())
        self.saved = len(self.entries)

    def restart(self) -> Shard:
        """A new shard over the rows, with the rest of the log."""
        self.shard = Shard(self.view)
        for index, command in self.entries[self.saved:]:
            self.shard.apply(index, decode_entry(command))
        return self.shard

    def reject(self, count: int, name: bytes = QUEUE, reason: str = "no") -> list[bytes]:
        """Dead-letters the first messages, one after the other; the keys of the dead letters."""
        keys = []
        for _ in range(count):
            token = self.grant(1, name)
            queue = self.shard.leases[token]
            self.shard.ensure(queue, 1)
            keys.append(dead_key(name, queue.front[0][0]))
            assert self.settle(token, 0, REJECT, reason=reason) == SettleStatus.OK
        return keys

    def finish(self, count: int, name: bytes = QUEUE) -> list[bytes]:
        """Leases and acknowledges the first messages; their bodies."""
        token = self.grant(count, name)
        queue = self.shard.leases[token]
        self.shard.ensure(queue, count)
        run = queue.front[:count]
        assert self.settle(token, count, ACK, run[-1][0]) == SettleStatus.OK
        return [m[3] for m in run]

    def bodies(self, name: bytes = QUEUE) -> list[bytes]:
        """Of all messages of a queue, in order; also after a restart."""
        self.restart()
        queue = self.shard.open(name)
        return [m[3] for m in self.shard.messages(queue)] if queue is not None else []


def dead_key(name: bytes, sequence: int) -> bytes:
    """The row of a dead letter."""
    return rows.DEAD + tenant_scope_of(name) + b"\0" + sequence.to_bytes(8, "big")
