"""The properties of the shard catch what they claim to catch: broken shards do not pass them."""
from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from spillway.broker.core import rows
from spillway.broker.core.entry import ACK, DEAD, DONE, GONE, RETRY, Enqueue, Option, Settle
from spillway.broker.core.errors import CorruptEntry
from spillway.broker.core.queue import Queue
from spillway.broker.core.shard import Checkpoint, Effects, Shard
from spillway.contract.hashing import PART

from tests.properties.shard_world import QUEUES, World, cache_bytes, random_program

PROGRAMS = 60
STEPS = 150


class StoresDuplicates(Shard):
    """Takes a repeated batch for a new one."""

    def _enqueue(self, batch: Enqueue, *rest: Any) -> int:
        known = self.producers.get(batch.producer)
        return super()._enqueue(replace(batch, first=known[0] + 1 if known else batch.first), *rest)


class AcceptsGaps(Shard):
    """Stores a producer's batch although an earlier one is missing."""

    def _enqueue(self, batch: Enqueue, *rest: Any) -> int:
        known = self.producers.get(batch.producer)
        return super()._enqueue(replace(batch, first=min(batch.first, known[0] + 1 if known else 1)), *rest)


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
    """Leaves rows of long queues that were purged."""

    def checkpoint(self) -> Checkpoint:
        made = super().checkpoint()
        made.ranges = []
        return made


class WrongFloor(Shard):
    """Reads the head again that it removed."""

    def _remove_head(self, queue: Queue, count: int) -> int:
        sequence = super()._remove_head(queue, count)
        queue.floor = sequence
        return sequence


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

    def ensure(self, queue: Queue, *rest: Any) -> None:
        queue.front += queue.tail
        queue.tail = []
        super().ensure(queue, *rest)


class SavesNoCounters(Shard):
    """Forgets that messages that come or go change counters."""

    def _weigh(self, queue: Queue, *rest: Any) -> None:
        before = list(self._dirty_counters), queue.counters.dirty
        super()._weigh(queue, *rest)
        self._dirty_counters, queue.counters.dirty = before


class KeepsEmptyQueues(Shard):
    """Leaves an empty queue in memory."""

    def _vanish(self, queue: Queue) -> None:
        super()._vanish(queue)
        self.queues[queue.key] = queue


class ForgetsGaps(Shard):
    """Dead-letters without a word to the successor."""

    def _drop(self, queue: Queue, *rest: Any) -> None:
        super()._drop(queue, *rest)
        queue.gap = None


class DeliversEarly(Shard):
    """Ignores delays."""

    def _enqueue_one(self, name: bytes, body: bytes, sequence: int, option: Option, *rest: Any) -> None:
        super()._enqueue_one(name, body, sequence, (0, *option[1:]), *rest)


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


class ForgetsExpiryOfMessages(Shard):
    """Ignores a message's own time to live."""

    def _enqueue_one(self, name: bytes, body: bytes, sequence: int, option: Option, *rest: Any) -> None:
        super()._enqueue_one(name, body, sequence, (option[0], 0, *option[2:]), *rest)


class TrimsWhateverIsThere(Shard):
    """Takes the leader's word for which messages are the first."""

    def _trim(self, name: bytes, count: int, last: int, *rest: Any) -> bool:
        queue = self.open(name)
        if queue is None or queue.token:
            return False
        count = min(count, queue.count)
        self.ensure(queue, count)
        return super()._trim(name, count, queue.front[count - 1][0], *rest)


class TrimsLeasedQueues(Shard):
    """Takes messages from under a lease."""

    def _trim(self, name: bytes, *rest: Any) -> bool:
        queue = self.open(name)
        token = queue.token if queue is not None else 0
        if queue is None or not token:
            return super()._trim(name, *rest)
        queue.token = 0
        done = super()._trim(name, *rest)
        queue.token = token
        return done


class DiscardsWithoutAGap(Shard):
    """Only what went to the dead letters is told to the successor."""

    def _drop(self, queue: Queue, count: int, fate: int, *rest: Any) -> None:
        gap = queue.gap
        super()._drop(queue, count, fate, *rest)
        if fate != DEAD:
            queue.gap = gap


class KeepsDiscarded(Shard):
    """Makes dead letters of what should go for good."""

    def _drop(self, queue: Queue, count: int, fate: int, *rest: Any) -> None:
        super()._drop(queue, count, DEAD, *rest)


class ForgetsIds(Shard):
    """Does not save dedup ids."""

    def checkpoint(self) -> Checkpoint:
        self._dedups = {}
        return super().checkpoint()


class RemembersIdsForEver(Shard):
    """Takes a dedup id for known after its time."""

    def _deduplicate(self, digest: bytes, sequence: int, until: int, now: int) -> int:
        return super()._deduplicate(digest, sequence, until, 0)


class RemembersIdsTooLong(Shard):
    """To the millisecond."""

    def _deduplicate(self, digest: bytes, sequence: int, until: int, now: int) -> int:
        return super()._deduplicate(digest, sequence, until, now - 1)


class NeverDeletesIds(Shard):
    """Leaves rows of dedup ids whose time has passed."""

    def checkpoint(self) -> Checkpoint:
        made = super().checkpoint()
        made.deletes = [key for key in made.deletes if key[:1] not in (rows.DEDUP, rows.DEDUP_DUE)]
        return made


class DeletesIdsThatCameBack(Shard):
    """Deletes what a due row names, although the id was used again since."""

    def checkpoint(self) -> Checkpoint:
        due = list(self.view.scan(rows.DEDUP_DUE, rows.dedup_due(self.now_ms)))
        made = super().checkpoint()
        made.deletes += [rows.DEDUP + key[5:] for key, _ in due]
        return made


class DeduplicatesByTheLast(Shard):
    """Tells the sequence that the duplicate would have had."""

    def _deduplicate(self, digest: bytes, sequence: int, until: int, now: int) -> int:
        return sequence if super()._deduplicate(digest, sequence, until, now) else 0


class CopiesTwice(Shard):
    """Takes the copy with the last known number for a new one."""

    def _follow(self, batch: Enqueue, copies: list[int]) -> int:
        if batch.producer in self.copiers:
            epoch, chain, last = self.copiers[batch.producer]
            self.copiers[batch.producer] = (epoch, chain, last - 1)
        return super()._follow(batch, copies)


class CopiesAfterALoss(Shard):
    """Takes a copy whose predecessor has not come."""

    def _follow(self, batch: Enqueue, copies: list[int]) -> int:
        epoch, _, last = self.copiers.get(batch.producer, (0, 0, 0))
        if batch.first and batch.epoch == epoch:
            self.copiers[batch.producer] = (epoch, batch.first, last)
        return super()._follow(batch, copies)


class CopiesOfAnEarlierLife(Shard):
    """Takes what an earlier life of the copier had sent."""

    def _follow(self, batch: Enqueue, copies: list[int]) -> int:
        epoch, _, last = self.copiers.get(batch.producer, (0, 0, 0))
        if batch.epoch < epoch:
            self.copiers[batch.producer] = (batch.epoch, batch.first, last)
        return super()._follow(batch, copies)


class ForgetsCopiers(Shard):
    """Does not save how far a copier came."""

    def checkpoint(self) -> Checkpoint:
        self._dirty_copiers.clear()
        return super().checkpoint()


class DropsWhatIsDone(Shard):
    """Tells of messages that are done as of missing ones."""

    def _trim(self, name: bytes, count: int, last: int, fate: int, *rest: Any) -> bool:
        return super()._trim(name, count, last, GONE if fate == DONE else fate, *rest)


class RedrivesToTheTail(Shard):
    """Puts dead letters behind what waits."""

    def _put_back(self, name: bytes, queue: Queue | None, found: dict[bytes, rows.DeadRow], effects: Effects) -> None:
        waiting = queue is not None
        super()._put_back(name, queue, found, effects)
        queue = self.queues[name]
        if waiting and not queue.cold:
            back = {rows.sequence_of(key) for key in found}
            queue.front.sort(key=lambda message: message[0] in back)


class RedrivesBeforeOlder(Shard):
    """Puts dead letters at the head whatever was put back before."""

    def _put_back(self, name: bytes, queue: Queue | None, found: dict[bytes, rows.DeadRow], effects: Effects) -> None:
        super()._put_back(name, queue, found, effects)
        back = {rows.sequence_of(key) for key in found}
        self.queues[name].front.sort(key=lambda message: message[0] not in back)


class RedrivesAmongWhatIsInMemory(Shard):
    """Looks for the place of a dead letter among loaded messages only."""

    def _put_back(self, name: bytes, queue: Queue | None, found: dict[bytes, rows.DeadRow], effects: Effects) -> None:
        cold = queue.cold if queue is not None else 0
        if queue is not None:
            queue.cold = 0
        super()._put_back(name, queue, found, effects)
        self.queues[name].cold = cold


class RedrivesIntoLeases(Shard):
    """Puts dead letters before a run that is leased."""

    def _redrive(self, keys: list[bytes], effects: Effects) -> None:
        tokens = []
        for queue in self.leases.values():
            tokens.append((queue, queue.token))
            queue.token = 0
        super()._redrive(keys, effects)
        for queue, token in tokens:
            queue.token = token


class RedrivesAndKeeps(Shard):
    """Leaves the dead letter."""

    def _put_back(self, name: bytes, queue: Queue | None, found: dict[bytes, rows.DeadRow], effects: Effects) -> None:
        puts, gone = dict(self._dead_puts), set(self._dead_gone)
        super()._put_back(name, queue, found, effects)
        self._dead_puts, self._dead_gone = puts, gone


class SavesNoRedriven(Shard):
    """Takes messages that are back for saved."""

    def checkpoint(self) -> Checkpoint:
        self._revived = {}
        return super().checkpoint()


class ForgetsRedrivenBytes(Shard):
    """Counts messages that are back as saved."""

    def _put_back(self, *rest: Any) -> None:
        unsaved = self.unsaved_bytes
        super()._put_back(*rest)
        self.unsaved_bytes = unsaved


class ClosesGapsAtOnce(Shard):
    """Forgets what is missing with the first message that is done, though it was before it."""

    def _ack(self, queue: Queue, *rest: Any) -> None:
        super()._ack(queue, *rest)
        queue.gap = None


class LeavesGapsAsTheyWere(Shard):
    """Says that a message is missing which is back."""

    def _put_back(self, name: bytes, queue: Queue | None, found: dict[bytes, rows.DeadRow], effects: Effects) -> None:
        gap = queue.gap if queue is not None else None
        super()._put_back(name, queue, found, effects)
        self.queues[name].gap = gap


class KeepsAttemptsOfTheOldHead(Shard):
    """Lets a message that is back wait for its successor's next try."""

    def _put_back(self, name: bytes, queue: Queue | None, found: dict[bytes, rows.DeadRow], effects: Effects) -> None:
        before = (queue.attempts, queue.not_before) if queue is not None else (0, 0)
        super()._put_back(name, queue, found, effects)
        self.queues[name].attempts, self.queues[name].not_before = before


class PurgesWithoutRows(Shard):
    """Leaves rows of short queues that were purged."""

    def _purge(self, name: bytes, effects: Effects) -> int:
        deletes = list(self._deletes)
        count = super()._purge(name, effects)
        self._deletes = deletes + [key for key in self._deletes[len(deletes):] if key[:1] != rows.MESSAGE]
        return count


class PurgesWithoutRanges(Shard):
    """Leaves rows of long queues that were purged."""

    def _purge(self, name: bytes, effects: Effects) -> int:
        ranges = list(self._ranges)
        count = super()._purge(name, effects)
        self._ranges = ranges
        return count


class PurgesAndKeepsTheLease(Shard):
    """Leaves the lease of a queue that is gone."""

    def _purge(self, name: bytes, effects: Effects) -> int:
        leases = dict(self.leases)
        count = super()._purge(name, effects)
        self.leases = leases
        return count


class PurgesUnsavedBytes(Shard):
    """Forgets that purged bodies need no row any more."""

    def _purge(self, name: bytes, effects: Effects) -> int:
        unsaved = self.unsaved_bytes
        count = super()._purge(name, effects)
        self.unsaved_bytes = unsaved
        return count


class TenantsOnlyGrow(Shard):
    """Does not take what is gone from a tenant's size."""

    def _weigh(self, queue: Queue, messages: int, size: int) -> None:
        before = queue.tenant.size
        super()._weigh(queue, messages, size)
        queue.tenant.size = max(before, queue.tenant.size)


class TenantsStay(Shard):
    """Leaves the rows of tenants that have nothing."""

    def checkpoint(self) -> Checkpoint:
        made = super().checkpoint()
        made.deletes = [key for key in made.deletes if key[:1] != rows.TENANT]
        return made


class TenantsAreLost(Shard):
    """Does not save what tenants have."""

    def checkpoint(self) -> Checkpoint:
        made = super().checkpoint()
        made.puts = [put for put in made.puts if put[0][:1] != rows.TENANT]
        return made


class OrdersTheUnordered(Shard):
    """Puts all messages of an unordered queue into one."""

    def _enqueue(self, batch: Enqueue, *rest: Any) -> int:
        names = [name + b"0" if name[-1:] == PART else name for name in batch.queues]
        return super()._enqueue(replace(batch, queues=names), *rest)


class LeavesTheMark(Shard):
    """Does not replace the mark of an unordered queue where the message has options."""

    def _enqueue_one(self, name: bytes, body: bytes, sequence: int, *rest: Any) -> None:
        super()._enqueue_one(name + b"0" if name[-1:] == PART else name, body, sequence, *rest)


class ForgetsDeadPurges(Shard):
    """Counts a dead letter as gone and leaves it."""

    def _purge_dead(self, key: bytes) -> None:
        row = self.dead_letter(key)
        if row is not None:
            self._counters(row.queue.split(b"\0")[0]).dead -= 1


def mutants() -> list[type[Shard]]:
    """All of this module's broken shards."""
    return [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, Shard) and kind is not Shard]


def everybody_saves(world: World) -> None:
    """Checkpoints of all replicas."""
    world.commit(0, 0, 0)
    for replica in range(3):
        world.checkpoint(replica, 0, 0)


def an_id_comes_back(world: World) -> None:
    """A dedup id is used again once its time has passed, and remembered for longer than the first time."""
    for remembered in (300, 70_000):
        world.enqueues.append(Enqueue("", 0, QUEUES[:1], [b"x"], None, {0: (0, 0, b"id", world.now + remembered)}))
        everybody_saves(world)
        world.now += 400
    world.now += 60_000
    everybody_saves(world)


def some_come_back(world: World) -> None:
    """Of forty messages thirty are dropped, and come back a few at a time; some are finished before the next come."""
    name = QUEUES[0]
    world.enqueues.append(Enqueue("", 0, [name] * 40, [b"%d" % i for i in range(40)]))
    everybody_saves(world)
    world.trims.append((name, 30, world.naive.queues[name].left[29][0], DEAD, "old"))
    everybody_saves(world)
    for chosen in (slice(3, 24), slice(2, 4), slice(5, 6), slice(0, 2), slice(3, None)):
        world.redrives += sorted(world.naive.dead)[chosen]
        everybody_saves(world)
        run = world.naive.queues[name].left[:3]
        world.grants.append((name, 3, world.now + 1_000, 0))
        everybody_saves(world)
        world.settles.append((world.naive.live()[0].token, 2, run[1][0], ACK, 0, ""))
        world.commit(0, 0, 0)
        world.settles.append((world.naive.live()[0].token, 2, run[1][0], RETRY, 0, ""))
        everybody_saves(world)


STORIES = [an_id_comes_back, some_come_back]


@pytest.mark.parametrize("mutant", mutants(), ids=lambda kind: kind.__name__)
def test_a_broken_shard_is_caught(mutant: type[Shard]) -> None:
    """A shard with this defect fails within a few random histories or one of the stories."""
    with pytest.raises((AssertionError, LookupError, CorruptEntry)):
        tell_everything(mutant)


def test_the_histories_fail_for_no_other_reason() -> None:
    """The same histories pass with the real shard."""
    tell_everything(Shard)


def tell_everything(kind: type[Shard]) -> None:
    """All histories and stories."""
    with cache_bytes(0):
        for seed in range(PROGRAMS):
            World(kind, short=seed % 2 == 0).run(random_program(seed, STEPS))
        for story in STORIES:
            world = World(kind)
            story(world)
            world.run([])
