"""The properties of the shard catch what they claim to catch: broken shards do not pass them."""
from __future__ import annotations

from typing import Any

import pytest
from spillway.broker.core.entry import RETRY, Settle
from spillway.broker.core.queue import Queue
from spillway.broker.core.shard import Checkpoint, Effects, Shard

from tests.properties.shard_world import World, cache_bytes, random_program

PROGRAMS = 60
STEPS = 150


class StoresDuplicates(Shard):
    """Takes a repeated batch for a new one."""

    def _enqueue(self, producer: str, first: int, *rest: Any) -> int:
        known = self.producers.get(producer)
        return super()._enqueue(producer, known[0] + 1 if known else first, *rest)


class AcceptsGaps(Shard):
    """Stores a producer's batch although an earlier one is missing."""

    def _enqueue(self, producer: str, first: int, *rest: Any) -> int:
        known = self.producers.get(producer)
        return super()._enqueue(producer, min(first, known[0] + 1 if known else 1), *rest)


class KeepsLeaseAfterExpiry(Shard):
    """Counts an expiry and leaves the lease."""

    def _expire(self, queue: Queue, *rest: Any) -> None:
        queue.counters.expired += 1
        queue.counters.retried += 1


class ExpiresEarly(Shard):
    """Ends a lease whose time is not over."""

    def apply(self, index: int, entry: Any, effects: Effects | None = None) -> None:
        for token, *_ in entry.expires:
            if token in self.leases:
                self.leases[token].deadline = 0
        super().apply(index, entry, effects)


class ForgetsToDeleteRows(Shard):
    """Leaves rows of finished messages, leases and queues."""

    def checkpoint(self) -> Checkpoint:
        made = super().checkpoint()
        made.deletes = []
        return made


class ForgetsToDeleteRanges(Shard):
    """Leaves rows of messages that were acknowledged unseen."""

    def checkpoint(self) -> Checkpoint:
        made = super().checkpoint()
        made.ranges = []
        return made


class WrongFloor(Shard):
    """Reads the head again that it removed."""

    def _remove_head(self, queue: Queue, count: int, sequence: int) -> None:
        super()._remove_head(queue, count, sequence)
        queue.floor = sequence


class TakesStaleTokens(Shard):
    """Settles the live lease by whatever token."""

    def _settle(self, settle: Settle, now: int, effects: Effects) -> int:
        token = settle[0] if settle[0] in self.leases else next(iter(self.leases), settle[0])
        return super()._settle((token, *settle[1:]), now, effects)


class RetriesBehindOthers(Shard):
    """Puts a retried message behind its successors, as most brokers do."""

    def _settle(self, settle: Settle, now: int, effects: Effects) -> int:
        queue = self.leases.get(settle[0])
        status = super()._settle(settle, now, effects)
        if queue is not None and settle[3] == RETRY and len(queue.front) > 1:
            queue.front.append(queue.front.pop(0))
        return status


class LeasesTwice(Shard):
    """Grants a queue that is leased."""

    def _grant(self, name: bytes, *rest: Any) -> Queue | None:
        queue = self.open(name)
        if queue is not None:
            queue.token = 0
        return super()._grant(name, *rest)


class ReusesTokens(Shard):
    """Numbers leases within the entry only."""

    def _grant(self, name: bytes, messages: int, deadline: int, consumer: str, token: int) -> Queue | None:
        return super()._grant(name, messages, deadline, consumer, token & 0xFFFFF)


class SavesNoTail(Shard):
    """Takes messages behind cold ones for saved."""

    def checkpoint(self) -> Checkpoint:
        for queue in self._dirty.values():
            if queue.tail:
                queue.persisted = queue.tail[-1][0]
        return super().checkpoint()


class TailOvertakes(Shard):
    """Puts new messages before the cold ones."""

    def ensure(self, queue: Queue, messages: int) -> None:
        queue.front += queue.tail
        queue.tail = []
        super().ensure(queue, messages)


class SavesNoCountersOfTheVanished(Shard):
    """Forgets that a queue's end changes counters."""

    def _vanish(self, queue: Queue) -> None:
        before = list(self._dirty_counters), queue.counters.dirty
        super()._vanish(queue)
        self._dirty_counters, queue.counters.dirty = before


class KeepsEmptyQueues(Shard):
    """Leaves an empty queue in memory."""

    def _vanish(self, queue: Queue) -> None:
        super()._vanish(queue)
        self.queues[queue.key] = queue


class ForgetsGaps(Shard):
    """Dead-letters without a word to the successor."""

    def _dead_letter(self, queue: Queue, *rest: Any) -> None:
        super()._dead_letter(queue, *rest)
        queue.gap = None


class DeliversEarly(Shard):
    """Ignores delays."""

    def _delay(self, *_: Any) -> None:
        pass


class WakesNobody(Shard):
    """Does not report a queue that may be leased again."""

    def _head_changed(self, *_: Any) -> None:
        pass


class ClockGoesBack(Shard):
    """Believes whatever clock the leader has."""

    def apply(self, index: int, entry: Any, effects: Effects | None = None) -> None:
        self.now_ms = 0
        super().apply(index, entry, effects)


class ForgetsProducers(Shard):
    """Does not save producers' sequences."""

    def checkpoint(self) -> Checkpoint:
        self._dirty_producers.clear()
        return super().checkpoint()


MUTANTS = [StoresDuplicates, AcceptsGaps, KeepsLeaseAfterExpiry, ExpiresEarly, ForgetsToDeleteRows, ForgetsToDeleteRanges,
           WrongFloor, TakesStaleTokens, RetriesBehindOthers, LeasesTwice, ReusesTokens, SavesNoTail, TailOvertakes,
           SavesNoCountersOfTheVanished, KeepsEmptyQueues, ForgetsGaps, DeliversEarly, WakesNobody, ClockGoesBack,
           ForgetsProducers]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_shard_is_caught(mutant: type[Shard]) -> None:
    """A shard with this defect fails within a few random histories."""
    with cache_bytes(0):
        for seed in range(PROGRAMS):
            try:
                World(mutant, short=seed % 2 == 0).run(random_program(seed, STEPS))
            except (AssertionError, LookupError):
                return
    pytest.fail(f"{mutant.__name__} passed {PROGRAMS} histories")


def test_the_histories_fail_for_no_other_reason() -> None:
    """The same histories pass with the real shard."""
    with cache_bytes(0):
        for seed in range(PROGRAMS):
            World(Shard, short=seed % 2 == 0).run(random_program(seed, STEPS))
