"""The shard's limits and reports, one by one. That it does the right thing at all: see tests/properties."""
from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
from spillway.broker.core import shard as shard_module
from spillway.broker.core.entry import (
    REJECT,
    VERSION,
    Enqueue,
    Entry,
    GateChange,
    Grant,
    Settle,
    decode_entry,
    encode_entry,
)
from spillway.broker.core.shard import Effects, Shard
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
              expires: list[tuple[int, bool, int, str]] | None = None, now: int = NOW) -> Effects:
        """One entry, through the codec."""
        entry = Entry(VERSION, now, enqueues or [], settles or [], expires or [], gates or [], grants or [], ["c"])
        self.entries.append((len(self.entries) + 1, encode_entry(entry)))
        effects = Effects()
        self.shard.apply(len(self.entries), decode_entry(self.entries[-1][1]), effects)
        return effects

    def enqueue(self, *bodies: bytes, name: bytes = QUEUE, producer: str = "", first: int = 0) -> Effects:
        """Messages for one queue."""
        return self.apply([Enqueue(producer, first, [name] * len(bodies), list(bodies))])

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


@pytest.fixture
def log() -> Log:
    """An empty shard."""
    return Log()


@pytest.fixture
def no_cache() -> Iterator[None]:
    """A checkpoint forgets what it saved."""
    with mock.patch.object(shard_module, "CACHE_BYTES_MAX", 0):
        yield


# -- found by the properties ------------------------------------------------------------------------------------------


def test_counters_survive_a_rejected_last_message(log: Log) -> None:
    """The counters of a queue that ended by a dead letter are saved, although no acknowledgement changed them."""
    log.enqueue(b"x")
    token = log.grant(1)
    log.checkpoint()
    log.settle(token, 0, REJECT)
    log.checkpoint()
    digest = log.shard.digest()
    shard = log.restart()
    counters = shard.counters[b"d"]
    assert (counters.queues, counters.messages, counters.dead) == (0, 0, 1)
    assert shard.digest() == digest


def test_a_new_leader_finds_queues_that_load_while_it_looks(log: Log, no_cache: None) -> None:
    """A waiting queue that an enqueue loads in the middle of a leader's first look is still told to the scheduler."""
    log.enqueue(b"1", name=QUEUE)
    log.enqueue(b"1", name=OTHER)
    log.checkpoint()
    shard = log.restart()
    ready = shard.ready_queues()
    found = [next(ready)[0]]
    effects = log.enqueue(b"2", name=OTHER)
    assert effects.ready == []
    found += [name for name, _ in ready]
    assert found == [QUEUE, OTHER]


def test_producers_rank_alike_after_a_restart(log: Log) -> None:
    """An empty batch does not make its producer younger: it has no sequence by which a restart could tell."""
    with mock.patch.object(shard_module, "PRODUCERS_MAX", 2):
        log.apply([Enqueue("b", 1, [QUEUE], [b"x"]), Enqueue("z", 1, [], []), Enqueue("a", 1, [QUEUE], [b"x"]),
                   Enqueue("b", 2, [], [])])
        order = list(log.shard.producers)
        log.checkpoint()
        assert list(log.restart().producers) == order == ["b", "a"]
