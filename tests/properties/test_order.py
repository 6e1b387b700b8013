"""Order under every mix of outcomes, expiries, redrives and failovers, as consumers see it.

Three replicas apply one log, save at moments of their own and restart from what they saved. One of them leads, until
another does. What its consumers see becomes a history, and that is checked by rules that know nothing of shards.
"""
from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.broker.core.entry import (
    ACK,
    DEAD,
    DISCARD,
    DOWN,
    EXTEND,
    GONE,
    KEEP,
    REJECT,
    RELEASE,
    RETRY,
    THROTTLED,
    VERSION,
    Enqueue,
    Entry,
    decode_entry,
    encode_entry,
)
from spillway.broker.core.errors import CorruptEntry
from spillway.broker.core.queue import Queue
from spillway.broker.core.rows import sequence_of
from spillway.broker.core.shard import Effects, SettleStatus, Shard
from spillway.broker.core.view import MemoryView

from tests.properties import test_shard_mutants as mutants
from tests.properties.order_history import Acked, Back, Dropped, Event, Leased, Over, Produced, Purged, violations
from tests.properties.shard_world import Replica, cache_bytes

QUEUES = [b"d\0t\0", b"d\0t\0k", b"d\0u\0k"]
START_MS = 1_700_000_000_000
SIZES = [1, 1, 2, 3, 8, 40]
OUTCOMES = [ACK] * 6 + [RETRY, RETRY, REJECT, REJECT, DISCARD, RELEASE, THROTTLED, DOWN, EXTEND]


class Lease:
    """What a consumer holds, or held."""

    def __init__(self, queue: Queue, run: list[int]) -> None:
        self.queue = queue.key
        self.token = queue.token
        self.run = run
        self.acked = 0


class Cluster:
    """See the module."""

    def __init__(self, seed: int, shard_type: type[Shard] = Shard) -> None:
        self.draw = random.Random(seed)
        self.replicas = [Replica(shard_type, MemoryView()) for _ in range(3)]
        self.leader = 0
        self.log: list[tuple[int, bytes]] = []
        self.now = START_MS
        self.history: list[Event] = []
        self.leases: dict[int, Lease] = {}  # all there ever were
        self.live: dict[int, Lease] = {}
        self.sent = 0  # batches of the producer
        self.kinds: Counter[str] = Counter()
        self.entry = self._new()
        self.runs: dict[bytes, list[int]] = {}  # queue -> sequences that a trim of this entry removes

    def _new(self) -> Entry:
        return Entry(VERSION, self.now, consumers=["c"])

    @property
    def shard(self) -> Shard:
        """The leader's."""
        return self.replicas[self.leader].shard

    def run(self, steps: int) -> Cluster:
        """A random history, then everything that is left is delivered."""
        actions = [self.produce, self.produce, self.lease, self.lease, self.lease, self.settle, self.settle, self.settle,
                   self.settle, self.expire, self.trim, self.redrive, self.redrive, self.save, self.fail_over]
        for _ in range(steps):
            self.draw.choice(actions)()
            if self.draw.random() < 0.8:
                self.commit()
            if self.draw.random() < 0.004:
                self.entry.purges.append(self.draw.choice(QUEUES))
        self.drain()
        return self

    # -- what happens --------------------------------------------------------------------------------------------

    def produce(self) -> None:
        """A batch of a producer, sometimes sent twice; some of its messages have a delay or a time to live."""
        again = self.draw.random() < 0.1 and self.sent
        if not again:
            self.sent += 1
        draw = random.Random(self.sent)  # the same batch again is the same
        size = draw.choice(SIZES)
        queues = [draw.choice(QUEUES) for _ in range(size)]
        options = {0: (self.now + 50, self.now + 500, b"", 0)} if draw.random() < 0.2 else None
        self.entry.enqueues.append(Enqueue(f"p{self.sent}", 1, queues, [b"x" * 50] * size, None, options))

    def lease(self) -> None:
        """The leader leases a run of a queue that has messages and no lease."""
        names = [name for name in self.shard.queue_names(b"d\0", b"", 99) if not self.shard.open(name).token]  # type: ignore[union-attr]
        if not names:
            return
        queue = self.shard.open(self.draw.choice(names))
        assert queue is not None
        messages = self.draw.randint(1, min(queue.count, self.draw.choice([1, 3, 20, 60])))
        self.entry.grants.append((queue.key, messages, self.now + self.draw.choice([10, 1_000]), 0))

    def settle(self) -> None:
        """A consumer settles some of a lease, or all; one in ten is late."""
        late = self.draw.random() < 0.1
        leases = self.leases if late else self.live
        if not leases:
            return
        lease = self.draw.choice(list(leases.values()))
        outcome = self.draw.choice(OUTCOMES)
        position = lease.acked
        if outcome == ACK:
            position = self.draw.choice([len(lease.run), len(lease.run), self.draw.randint(0, len(lease.run) + 1)])
        sequence = lease.run[position - 1] if 0 < position <= len(lease.run) else 0
        self.entry.settles.append((lease.token, position, sequence, outcome, self.now + 20, ""))

    def expire(self) -> None:
        """The deadline of a lease passes, or almost."""
        if not self.live:
            return
        token = self.draw.choice(list(self.live))
        deadline = self.shard.leases[token].deadline
        self.now = max(self.now, deadline - self.draw.randrange(2))
        self.entry.now_ms = self.now
        self.entry.expires.append((token, self.draw.choice([KEEP, KEEP, DEAD, GONE]), self.now, ""))

    def trim(self) -> None:
        """The time of a queue's first messages has passed."""
        name = self.draw.choice(QUEUES)
        queue = self.shard.open(name)
        if queue is None or queue.token or name in self.runs:
            return
        count = self.draw.randint(1, min(queue.count, 20))
        self.shard.ensure(queue, count)
        self.runs[name] = [m[0] for m in queue.front[:count]]
        self.entry.trims.append((name, count, self.runs[name][-1], self.draw.choice([DEAD, GONE]), ""))

    def redrive(self) -> None:
        """Some dead letters come back, in any order."""
        keys = [key for key, _ in self.shard.dead_letters(b"d", None, b"", 99)]
        self.entry.redrives += self.draw.sample(keys, min(len(keys), self.draw.choice([1, 3, 20])))

    def save(self) -> None:
        """A replica saves, and forgets what it may."""
        self.commit()
        self.draw.choice(self.replicas).checkpoint(self.log[-1][0])

    def fail_over(self) -> None:
        """Another replica leads; mostly one that has just started, from what it saved and the log behind that."""
        self.commit()
        self.leader = self.draw.randrange(3)
        replica = self.replicas[self.leader]
        if self.draw.random() < 0.7:
            before = replica.shard.digest()
            replica.shard = replica.restarted(self.log)
            assert replica.shard.digest() == before
            self.kinds["restarts"] += 1

    def drain(self) -> None:
        """All that is left is delivered and acknowledged."""
        self.commit()
        self.entry.settles += [(lease.token, lease.acked, 0, RELEASE, 0, "") for lease in self.live.values()]
        self.commit()
        while names := self.shard.queue_names(b"d\0", b"", 99):
            for name in names:
                self.entry.grants.append((name, min(25, self.shard.open(name).count), self.now + 1_000, 0))  # type: ignore[union-attr]
            self.commit()
            assert self.live, "nothing can be leased"
            for lease in self.live.values():
                self.entry.settles.append((lease.token, len(lease.run), lease.run[-1], ACK, 0, ""))
            self.commit()
        digests = {replica.shard.digest() for replica in self.replicas}
        digests |= {replica.restarted(self.log).digest() for replica in self.replicas}
        assert len(digests) == 1, "replicas differ"

    # -- the log -------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Everybody applies what was gathered; what the leader's clients saw of it becomes history."""
        entry, self.entry = self.entry, self._new()
        index = len(self.log) + 1
        command = encode_entry(entry)
        self.log.append((index, command))
        effects = Effects()
        for number, replica in enumerate(self.replicas):
            replica.shard.apply(index, decode_entry(command), effects if number == self.leader else None)
        self._note(entry, effects)
        self.runs.clear()
        self.now += self.draw.choice([0, 1, 30])
        self.entry.now_ms = self.now

    def _note(self, entry: Entry, effects: Effects) -> None:
        say = self.history.append
        sequence = effects.base
        for batch, skipped in zip(entry.enqueues, effects.enqueued, strict=True):
            for position, name in enumerate(batch.queues):
                if position >= skipped >= 0:
                    say(Produced(name, (sequence + position,)))
            sequence += len(batch.queues)
        over = {token for token, *_ in effects.released}
        for (token, position, _, outcome, _, _), status in zip(entry.settles, effects.settled, strict=True):
            if status != SettleStatus.OK:
                continue
            lease = self.live[token]
            if outcome == ACK:
                say(Acked(lease.queue, token, tuple(lease.run[lease.acked:position])))
                lease.acked = position
            elif outcome in (REJECT, DISCARD):
                say(Dropped(lease.queue, (lease.run[lease.acked],)))
            if token in over and (outcome != ACK or position == len(lease.run)) and outcome != EXTEND:
                self._end(token)
        for token, fate, _, _ in entry.expires:
            if token in over and token in self.live:
                if fate:
                    lease = self.live[token]
                    say(Dropped(lease.queue, (lease.run[lease.acked],)))
                self._end(token)
        for (name, *_), done in zip(entry.trims, effects.trimmed, strict=True):
            if done:
                say(Dropped(name, tuple(self.runs[name])))
        for name, count in zip(entry.purges, effects.purged, strict=True):
            if count:
                for token in [t for t, lease in self.live.items() if lease.queue == name]:
                    self._end(token)
                say(Purged(name))
        back: dict[bytes, list[int]] = {}
        for key, done in zip(entry.redrives, effects.redriven, strict=True):
            if done:
                name = next(e.queue for e in self.history if isinstance(e, Produced) and sequence_of(key) in e.sequences)
                back.setdefault(name, []).append(sequence_of(key))
        for name, sequences in back.items():
            say(Back(name, tuple(sequences)))
        for queue in effects.granted:
            if queue is not None:
                self.shard.ensure(queue, queue.lease_size)
                run = [m[0] for m in queue.front[:queue.lease_size]]
                gap = queue.gap if queue.gap is not None and queue.gap[1] < run[-1] else None
                say(Leased(queue.key, queue.token, tuple(run), gap))
                self.leases[queue.token] = self.live[queue.token] = Lease(queue, run)

    def _end(self, token: int) -> None:
        self.history.append(Over(self.live.pop(token).queue, token))


def told(cluster: Cluster) -> Counter[str]:
    """How much of everything a history has."""
    found = Counter(type(event).__name__ for event in cluster.history)
    gaps = [event.gap for event in cluster.history if isinstance(event, Leased) and event.gap]
    found["gaps"] = len(gaps)
    found["wide gaps"] = sum(gap[0] > 1 for gap in gaps)
    return found + cluster.kinds


@pytest.mark.parametrize("cache", [0, 1_000, 1 << 20])
@given(seed=st.integers(0, 1 << 32), steps=st.sampled_from([20, 60, 150]))
def test_order_holds_whatever_happens(cache: int, seed: int, steps: int) -> None:
    """First deliveries and acknowledgements of a queue come in the order of production, redriven messages before all that
    is behind them, and consumers are told exactly what is missing."""
    with cache_bytes(cache):
        cluster = Cluster(seed).run(steps)
    assert violations(cluster.history, drained=True) == []


def test_histories_have_everything() -> None:
    """The histories are not empty of what they should mix."""
    found: Counter[str] = Counter()
    with cache_bytes(0):
        for seed in range(20):
            found += told(Cluster(seed).run(200))
    for kind in ("Produced", "Leased", "Acked", "Over", "Dropped", "Back", "Purged", "gaps", "wide gaps", "restarts"):
        assert found[kind] > 10, (kind, found)


@pytest.mark.parametrize("mutant", [
    mutants.RetriesBehindOthers, mutants.ForgetsGaps, mutants.DiscardsWithoutAGap, mutants.LeasesTwice, mutants.WrongFloor,
    mutants.ReusesTokens, mutants.TailOvertakes, mutants.RedrivesToTheTail, mutants.RedrivesBeforeOlder,
    mutants.RedrivesAmongWhatIsInMemory, mutants.LeavesGapsAsTheyWere, mutants.ClosesGapsAtOnce,
    mutants.TakesStaleTokens, mutants.ForgetsToDeleteRows], ids=lambda mutant: mutant.__name__)
def test_a_shard_out_of_order_is_seen(mutant: type[Shard]) -> None:
    """By the history of its consumers alone, or because it cannot go on."""
    with cache_bytes(0):
        for seed in range(60):
            try:
                if violations(Cluster(seed, mutant).run(150).history, drained=True):
                    return
            except (AssertionError, LookupError, CorruptEntry):
                return
    pytest.fail(f"{mutant.__name__} was in order")


Q = b"d\0t\0k"
FIVE = Produced(Q, (1, 2, 3, 4, 5))


@pytest.mark.parametrize(("text", "history"), [
    ("in order", [FIVE, Leased(Q, 1, (2,))]),
    ("in order", [FIVE, Leased(Q, 1, (1, 3))]),
    ("in order", [FIVE, Leased(Q, 1, (2, 1))]),
    ("first delivery of 1 comes after that of 2", [FIVE, Leased(Q, 1, (2, 1))]),
    ("not behind", [FIVE, Produced(Q, (4,))]),
    ("second lease", [FIVE, Leased(Q, 1, (1,)), Leased(Q, 2, (1,))]),
    ("does not grow", [FIVE, Leased(Q, 2, (1,)), Over(Q, 2), Leased(Q, 2, (1,))]),
    ("empty lease", [FIVE, Leased(Q, 1, ())]),
    ("1 was acknowledged", [FIVE, Leased(Q, 1, (1,)), Acked(Q, 1, (1,)), Over(Q, 1), Leased(Q, 2, (1, 2))]),
    ("2 was dropped", [FIVE, Dropped(Q, (1, 2)), Leased(Q, 1, (2, 3), (2, 1, 2))]),
    ("lease that is over", [FIVE, Leased(Q, 1, (1,)), Over(Q, 1), Acked(Q, 1, (1,))]),
    ("lease that is over", [FIVE, Leased(Q, 2, (1,)), Acked(Q, 1, (1,))]),
    ("out of order", [FIVE, Leased(Q, 1, (1, 2)), Acked(Q, 1, (2,))]),
    ("before", [FIVE, Leased(Q, 1, (1, 2)), Acked(Q, 1, (1,)), Acked(Q, 1, (1,))]),
    ("lease that is none", [FIVE, Over(Q, 1)]),
    ("not there", [FIVE, Dropped(Q, (6,))]),
    ("not dropped", [FIVE, Back(Q, (1,))]),
    ("under a lease", [FIVE, Dropped(Q, (1,)), Leased(Q, 1, (2,), (1, 1, 1)), Back(Q, (1,))]),
    ("in order", [FIVE, Dropped(Q, (1, 2)), Back(Q, (2,)), Leased(Q, 1, (3, 2), (1, 1, 1))]),
    ("missing", [FIVE, Dropped(Q, (1, 2)), Leased(Q, 1, (3,))]),
    ("missing", [FIVE, Dropped(Q, (1, 2)), Leased(Q, 1, (3,), (1, 1, 2))]),
    ("missing", [FIVE, Dropped(Q, (1, 2)), Leased(Q, 1, (3,), (2, 1, 1))]),
    ("missing", [FIVE, Dropped(Q, (1, 2)), Leased(Q, 1, (3,), (2, 0, 2))]),
    ("missing", [FIVE, Leased(Q, 1, (1,), (1, 1, 1))]),
    ("missing", [FIVE, Dropped(Q, (1,)), Back(Q, (1,)), Leased(Q, 1, (1,), (1, 1, 1))]),
    ("missing", [FIVE, Dropped(Q, (1, 2)), Back(Q, (1,)), Leased(Q, 1, (1, 3))]),
    ("missing", [FIVE, Dropped(Q, (1,)), Leased(Q, 1, (2,), (1, 1, 1)), Over(Q, 1), Leased(Q, 2, (2,))]),
    ("missing", [FIVE, Dropped(Q, (1,)), Leased(Q, 1, (2,), (1, 1, 1)), Acked(Q, 1, (2,)), Over(Q, 1),
                 Leased(Q, 2, (3,), (1, 1, 1))]),
    ("never done", [FIVE]),
])
def test_the_checker_sees_what_is_wrong(text: str, history: list[Event]) -> None:
    """Each rule, broken by a history of a few events."""
    assert any(text in wrong for wrong in violations(history, drained=True))


@pytest.mark.parametrize("history", [
    [FIVE, Leased(Q, 1, (1, 2, 3)), Acked(Q, 1, (1, 2)), Over(Q, 1), Leased(Q, 2, (3, 4, 5)), Acked(Q, 2, (3, 4, 5)), Over(Q, 2)],
    [FIVE, Dropped(Q, (1, 2)), Leased(Q, 1, (3,), (2, 1, 2)), Acked(Q, 1, (3,)), Over(Q, 1), Back(Q, (1,)),
     Leased(Q, 2, (1, 4, 5)), Acked(Q, 2, (1, 4, 5)), Over(Q, 2), Back(Q, (2,)), Purged(Q)],
    [FIVE, Dropped(Q, (1, 2)), Back(Q, (1,)), Leased(Q, 1, (1,)), Acked(Q, 1, (1,)), Over(Q, 1),
     Leased(Q, 2, (3, 4, 5), (1, 2, 2)), Acked(Q, 2, (3, 4, 5)), Over(Q, 2)],
])
def test_the_checker_lets_pass_what_is_right(history: list[Event]) -> None:
    """Prefixes, gaps that were told, messages that came back."""
    assert violations(history, drained=True) == []
