"""What a Raft group and the state machine on top of it expect of each other.

The group knows nothing of queues; the machine knows nothing of terms and votes. All calls come from the
node's loop, one at a time, inside a turn (see `raft.host`); none may block, await or raise.
"""
from __future__ import annotations

import enum
from typing import Protocol


class Role(enum.Enum):
    """A replica's part in its group."""

    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"          # and its own no-op of this term is applied: it may propose and serve
    RECOVERING = "recovering"  # lost its disk: neither votes nor acknowledges until it has caught up


class GroupMachine(Protocol):
    """The replicated state machine of one group, as the host drives it."""

    def durable_index(self) -> int:
        """Index of the last entry whose effects are durable in the state store. The host replays the log
        from the next one at start, and may drop the log up to here."""

    def apply(self, index: int, term: int, command: bytes) -> None:
        """A committed entry, once, in index order, on every replica. An exception here is a bug in a
        deterministic machine: the host stops the process rather than let replicas diverge."""

    def configured(self, index: int, term: int, configuration: bytes) -> None:
        """A committed entry that says who the members are. The machine stores it with the state as of this entry: a replica
        that takes the state from a snapshot has no log to read it from."""

    def collect(self) -> bytes | None:
        """On a leader only, once a turn after every apply of the turn: the next command to propose, or None.
        Called again in the same turn until it gives None. A command is at most ENTRY_BYTES_MAX bytes. What it returns
        is in the log of this leader's term, but nothing more, until `apply` brings it back."""

    def role_changed(self, role: Role, term: int, leader: str | None) -> None:
        """The replica's role, its group's term or leader changed. A leader that ceases to be one must treat
        every command that it collected and has not seen applied as *unknown*: it may still commit."""

    def reload(self) -> None:
        """The state store's rows of this group were replaced by a snapshot: drop what is in memory."""


ENTRY_BYTES_MAX = 4 << 20  # pysyncobj's chunked path above `appendEntriesBatchSizeBytes` is unsafe (R14)
