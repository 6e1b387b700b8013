"""Runs a program of small random steps on several replicas of a shard and on the naive one, and compares them.

A step is four integers below 256, so hypothesis shrinks programs well and a seeded generator makes them fast. What a
step means is decided here against the naive state: "acknowledge two messages of the third live lease".

Replica 0 leads: it loads bodies as the runtime does, and its effects are checked. The others only apply, checkpoint at
moments of their own, and restart.
"""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from spillway.broker.core import rows
from spillway.broker.core import state as state_module
from spillway.broker.core.entry import (
    ACK,
    DEAD,
    DISCARD,
    DONE,
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
    Grant,
    Settle,
    Trim,
    decode_entry,
    encode_entry,
)
from spillway.broker.core.shard import Checkpoint, Effects, Shard, View
from spillway.broker.core.view import MemoryView
from spillway.contract.hashing import PART

from tests.properties.naive_shard import OK, NaiveLease, NaiveQueue, NaiveShard, Outcome

Step = tuple[int, int, int, int]
Program = Sequence[Step]

QUEUES = [b"d\0t\0", b"d\0t\0k", b"d\0t\0kk", b"d\0t \0k", b"d\0u\0k", b"dd\0t\0k", b"dd\0t\0", "é\0☃\0k".encode()]
PRODUCERS = ["p", "pp", "q"]
RUNS = [1, 1, 1, 2, 3, 5, 17, 90]  # messages enqueued at once; the last makes runs that checkpoints cut
RUNS_SHORT = [1, 1, 1, 1, 1, 1, 2, 3]  # queues that become empty again and again
TICKS_MS = [1, 7, 200, 1_000, 40_000, -500]
OUTCOMES = [ACK, ACK, ACK, ACK, ACK, RETRY, THROTTLED, DOWN, REJECT, DISCARD, RELEASE, EXTEND]
REPLICAS = 3
START_MS = 1_700_000_000_000


class Store(View):
    """What a replica's rows are kept in."""

    def commit(self, checkpoint: Checkpoint) -> None:
        """Takes a checkpoint."""


class Replica:
    """A shard, its rows, and the index that these hold."""

    def __init__(self, shard_type: type[Shard], store: Store) -> None:
        self.shard_type = shard_type
        self.store = store
        self.shard = shard_type(store)
        self.saved = 0

    def checkpoint(self, index: int) -> None:
        """Saves the state as of `index`."""
        self.store.commit(self.shard.checkpoint())
        self.saved = index

    def restarted(self, log: list[tuple[int, bytes]]) -> Shard:
        """A new shard over the rows, with the rest of the log applied."""
        shard = self.shard_type(self.store)
        for index, command in log:
            if index > self.saved:
                shard.apply(index, decode_entry(command))
        return shard


class World:
    """See the module."""

    def __init__(self, shard_type: type[Shard] = Shard, store: Callable[[], Store] = MemoryView,
                 short: bool = False) -> None:
        self.naive = NaiveShard()
        self.queues = QUEUES[::3] if short else QUEUES
        self.runs = RUNS_SHORT if short else RUNS
        self.replicas = [Replica(shard_type, store()) for _ in range(REPLICAS)]
        self.log: list[tuple[int, bytes]] = []
        self.index = 0
        self.now = START_MS
        self.bodies = 0
        self.sent: dict[tuple[str, int], int] = {}  # (producer, sequence) -> how often it was stored
        self.announced: dict[bytes, int] = {}  # queue -> when the leader's scheduler will look at it
        self.rebuild: Iterator[tuple[bytes, int]] | None = None  # a new leader still looks for what is ready
        self.reached: Counter[str] = Counter()  # which rare paths were taken
        self.copier = (1, 0)  # of a route: its life, and the number of its last copy in it
        self.copied = 0
        self.seen_tokens: dict[bytes, int] = {}
        self.delivered: dict[bytes, list[int]] = {}  # queue -> sequences in order of their first delivery
        self.finished: set[int] = set()  # sequences acknowledged, dead or purged
        self.purged: set[int] = set()  # sequences that a purge may have removed
        self._clear()

    def _clear(self) -> None:
        self.enqueues: list[Enqueue] = []
        self.settles: list[Settle] = []
        self.expires: list[tuple[int, int | bool, int, str]] = []
        self.trims: list[Trim] = []
        self.purges: list[bytes] = []
        self.redrives: list[bytes] = []
        self.dead_purges: list[bytes] = []
        self.gates: list[tuple[bytes, int, int]] = []
        self.grants: list[Grant] = []
        self.assumed: dict[str, int] = {}  # last sequence of a producer, this entry included

    @property
    def leader(self) -> Shard:
        """The replica whose effects count."""
        return self.replicas[0].shard

    def run(self, program: Program) -> World:
        """All steps, then the proof that all replicas, restarted or not, are equal."""
        for kind, a, b, c in program:
            self.step(kind, a, b, c)
        self.commit(0, 0, 0)
        self._rebuild_some(1 << 30)
        self._check_announced()
        self.audit()
        return self

    def step(self, kind: int, a: int, b: int, c: int) -> None:
        """One step of a program."""
        STEPS[kind % len(STEPS)](self, a, b, c)

    # -- steps ---------------------------------------------------------------------------------------------------

    def commit(self, a: int, b: int, c: int) -> None:
        """Applies what was gathered, everywhere."""
        entry = Entry(VERSION, self.now, self.enqueues, self.settles, self.expires, self.gates, self.grants, ["c1", "c2"],
                      self.trims, self.purges, self.redrives, self.dead_purges, [(b"d", 2)] if a % 5 == 4 else [])
        self._clear()
        self.index += 1 + a % 3  # other things stand in the log too
        command = encode_entry(entry)
        self.log.append((self.index, command))
        before = None
        if not entry.enqueues and not entry.expires and not entry.gates and not entry.grants and entry.settles and not (
                entry.trims or entry.purges or entry.redrives):
            before = self._leases()
        self._note(entry)
        expected = self.naive.apply(self.index, entry)
        effects = Effects()
        self.leader.apply(self.index, entry, effects)
        for replica in self.replicas[1:]:
            replica.shard.apply(self.index, decode_entry(command))
        assert effects.base == self.index << 20
        self._check_effects(entry, expected, effects)
        self._check_deliveries(entry, effects)
        self.check_memory(self.leader)
        if before is not None and not any(status == OK for status in effects.settled):
            assert self._leases() == before, "a refused settlement changed a lease"

    def _note(self, entry: Entry) -> None:
        """Rare paths that an entry is about to take."""
        for replica in self.replicas:
            shard = replica.shard
            for name in entry.purges:
                queue = shard.queues.get(name)
                if queue is not None:
                    self.reached["purges of leased queues"] += bool(queue.token)
                    self.reached["purges of queues partly in the store"] += queue.cold > 0 and bool(queue.tail)
            for key in entry.redrives:
                name = self.naive.dead[key][0]
                sequence = int.from_bytes(key[-8:], "big")
                queue = shard.queues.get(name)
                left = self.naive.queues[name].left
                self.reached["redrives behind others"] += bool(left) and left[0][0] < sequence
                if queue is not None:
                    self.reached["redrives before a cold tail"] += queue.cold > 0 and bool(queue.tail)
                    self.reached["redrives between cold messages"] += queue.cold > 0 and left[0][0] < sequence and (
                        not queue.front or queue.front[-1][0] < sequence)
                    self.reached["redrives that leave a gap"] += queue.gap is not None
            for trim in entry.trims:
                queue = shard.queues.get(trim[0])
                self.reached["trims of cold messages"] += queue is not None and len(queue.front) < trim[1]

    def _leases(self) -> list[tuple[int, int, int, int]]:
        return sorted((q.token, q.lease_acked, q.deadline, q.count) for q in self.leader.leases.values())

    def enqueue(self, a: int, b: int, c: int) -> None:
        """One to many messages of one producer for one or several queues; its numbers right, repeated or with a gap."""
        count = self.runs[b % 8]
        stride = (b >> 3) % 3
        names = [self.queues[(a + i * stride) % len(self.queues)] for i in range(count)]
        producer, first = "", 0
        if c % 4:
            producer = PRODUCERS[c % 4 - 1]
            last = self.assumed.get(producer, self.naive.producers.get(producer, 0))
            first = [last + 1, last + 1, last + 1, max(1, last - 1), max(1, last + 1 - count), last + 2][(c >> 2) % 6]
            if first <= last + 1:
                self.assumed[producer] = max(last, first + count - 1)
        bodies = []
        for i in range(count):
            self.bodies += 1
            bodies.append(f"{producer}:{first + i}:{self.bodies}".encode() + b"\0\xff" * (self.bodies % 40))
        options = None
        if b >> 6 == 3:
            options = {(a + i) % count: ((self.now + 50 * (i + 1)) * (c >> 5 & 1), (self.now + 200) * (c >> 6 & 1),
                                         b"id %d" % (a % 5) if c >> 7 else b"", self.now + 300 + 70_000 * (a & 1))
                       for i in range(min(2, count))}
            known = self.naive.ids.get(b"id %d" % (a % 5))
            if c >> 7 and known and b & 1:
                self.now = max(self.now, known[1] - (c & 1))  # the last millisecond of an id, or the first after it
        if a % 11 == 10:
            names = [name + PART for name in names]
        copies = None
        epoch = 0
        if producer and a % 13 > 10:
            producer = "route"
            epoch, chain = self.copier
            if c >> 5 & 3 == 0:  # another life, which begins with what may be there already
                epoch, chain = epoch + 1, 0
                copies = [max(1, self.copied - 4) + 3 * i for i in range(count)]
            else:
                copies = [chain + 1 + 3 * i for i in range(count)]
            first = chain
            if c & 28 == 4:  # something was lost before it
                first += 1
            elif c & 28 == 8:  # it comes from an earlier life
                epoch -= 1
            elif c & 28 == 12 and c & 3 and chain > 3 * count:  # it comes again
                first, copies = chain - 3 * count, [chain - 3 * (count - i - 1) for i in range(count)]
            else:
                self.copier = (epoch, copies[-1])
                self.copied = max(self.copied, copies[-1])
        self.enqueues.append(Enqueue(producer, first, names, bodies, None, options, copies, epoch))

    def grant(self, a: int, b: int, c: int) -> None:
        """A lease; mostly one that is possible."""
        free = [n for n in self.naive.nonempty() if self.naive.queues[n].lease is None]
        name = free[a % len(free)] if free and c % 16 else self.queues[a % len(self.queues)]
        queue = self.naive.queues.get(name)
        count = len(queue.left) if queue else 0
        messages = [1, 1 + b % 4, 1 + b % 80, count][(b >> 6) % 4]
        messages = min(messages, count) if c % 7 else [0, count + 1, -1][c % 3]
        loaded = self.leader.open(name)
        if loaded is not None:
            if c & 1:
                self.leader.ensure(loaded, max(1, messages))
            loaded.granting = True
        self.grants.append((name, messages, self.now + 10 * (b + 1), a % 2))

    def _choose(self, a: int, c: int) -> NaiveLease | None:
        live = self.naive.live()
        if c % 8 == 7 or not live:
            old = list(self.naive.leases.values())
            return old[a % len(old)] if old else None
        return live[a % len(live)]

    def settle(self, a: int, b: int, c: int) -> None:
        """A settlement of a live or old lease, at the right or a wrong position."""
        outcome = OUTCOMES[b % len(OUTCOMES)]
        lease = self._choose(a, c)
        if lease is None:
            self.settles.append((a << 20, 1, a, outcome, 0, ""))
            return
        size, acked = len(lease.run), lease.acked
        if outcome == ACK:
            position = [size, acked + 1, acked + 2, size // 2, acked, size + 1, 0, size][(c >> 3) % 8]
        else:
            position = [acked, acked, acked, acked, acked, acked - 1, acked + 1, size][(c >> 3) % 8]
        sequence = lease.run[position - 1] if 1 <= position <= size else 12345
        argument = {RETRY: self.now + b % 3 * 100, THROTTLED: self.now + b, DOWN: self.now + b,
                    EXTEND: self.now + (b - 100) * 100}.get(outcome, 0)
        self.settles.append((lease.token, position, sequence, outcome, argument, f"because {b % 3}"))

    def expire(self, a: int, b: int, c: int) -> None:
        """A lease is held to be over; sometimes too early."""
        lease = self._choose(a, c)
        if lease is None:
            return
        if b & 1:
            self.now = max(self.now, lease.deadline)
        self.expires.append((lease.token, [KEEP, DEAD, KEEP, GONE][b >> 1 & 3], self.now + b % 5 * 20, "took too long"))

    def trim(self, a: int, b: int, c: int) -> None:
        """Messages whose time has passed; sometimes not as the leader saw them."""
        names = self.naive.nonempty()
        if not names:
            return
        name = names[a % len(names)]
        left = self.naive.queues[name].left
        count = min(1 + b % 20, len(left))
        self.trims.append((name, count + (c % 9 == 8), left[count - 1][0] + (c % 11 == 10),
                           [GONE, DEAD, DEAD, DONE][c & 3], "too old"))

    def purge(self, a: int, b: int, c: int) -> None:
        """A queue is emptied, leased or not, there or not."""
        names = [*self.naive.nonempty(), *self.queues]
        if b % 3 and not self.naive.queues.get(names[a % len(names)], NaiveQueue()).lease:
            return
        self.purges.append(names[a % len(names)])

    def redrive(self, a: int, b: int, c: int) -> None:
        """Dead letters come back, or go for good."""
        keys = sorted(self.naive.dead)
        if not keys:
            return
        start = a % len(keys)
        chosen = keys[start:start + 1 + b % 9]
        if c % 8 == 7:
            self.dead_purges += chosen
        else:
            self.redrives += chosen + (chosen[:1] if c % 8 == 6 else [])

    def gate(self, a: int, b: int, c: int) -> None:
        """A gate closes or opens."""
        destination, tenant, _ = self.queues[a % len(self.queues)].split(b"\0")
        self.gates.append((destination if b & 1 else destination + b"\0" + tenant, self.now + b if c & 1 else 0, b % 5))

    def tick(self, a: int, b: int, c: int) -> None:
        """Time moves; the leader's clock may go back."""
        self.now += TICKS_MS[a % len(TICKS_MS)]

    def load(self, a: int, b: int, c: int) -> None:
        """The leader looks into a queue, as for a lease that then does not come."""
        queue = self.leader.open(self.queues[a % len(self.queues)])
        if queue is not None:
            self.reached["loads of cold messages"] += queue.cold > 0
            self.leader.ensure(queue, 1 + b % 100)

    def checkpoint(self, a: int, b: int, c: int) -> None:
        """A replica saves; sometimes while an entry is under way."""
        if b & 1:
            self.commit(0, 0, 0)
        replica = self.replicas[a % REPLICAS]
        held = {q.key: len(q.front) for q in replica.shard.queues.values()}
        made = replica.shard.checkpoint()
        self.reached["range deletes"] += len(made.ranges)
        self.reached["deletes of message rows"] += any(k[:1] == b"m" for k in made.deletes)
        self.reached["queues that vanish and come back"] += len(
            {k for k in made.deletes if k[:1] == b"q"} & {k for k, _ in made.puts})
        replica.store.commit(made)
        replica.saved = self.log[-1][0] if self.log else 0
        self.reached["evicted queues"] += len(held) - len(replica.shard.queues)
        self.reached["cut leased queues"] += any(
            len(q.front) < held[q.key] and q.cold > 64 for q in replica.shard.queues.values() if q.key in held)
        self.check_rows(replica)

    def restart(self, a: int, b: int, c: int) -> None:
        """A replica forgets what it has in memory; restarted, it is what it was."""
        self.commit(0, 0, 0)
        replica = self.replicas[a % REPLICAS]
        fresh = replica.restarted(self.log)
        assert replica.restarted(self.log).digest() == replica.shard.digest(), "a restarted replica differs"
        replica.shard = fresh
        self.reached["restarts with live leases"] += bool(fresh.leases)
        if replica is self.replicas[0]:
            self.naive.remembered = {t: (n, i) for t, (n, i) in self.naive.remembered.items() if i > replica.saved}
            self.announced = {}
            self.rebuild = fresh.ready_queues()
            self._rebuild_some(c % 4)
        self.check_memory(fresh)

    # -- checks --------------------------------------------------------------------------------------------------

    def _check_effects(self, entry: Entry, expected: Outcome, effects: Effects) -> None:
        assert effects.enqueued == expected.enqueued
        assert effects.settled == expected.settled
        assert effects.released == expected.released
        assert effects.gates == expected.gates
        assert effects.duplicates == expected.duplicates
        assert effects.trimmed == expected.trimmed
        assert effects.purged == expected.purged
        assert effects.redriven == expected.redriven
        for what in ("duplicates", "trimmed", "purged", "redriven"):
            self.reached[what] += sum(bool(x) for x in getattr(effects, what))
        assert [q is not None for q in effects.granted] == [q is not None for q in expected.granted]
        for batch, skipped in zip(entry.enqueues, effects.enqueued, strict=True):
            self.reached["copies taken"] += batch.copies is not None and 0 <= skipped < len(batch.copies)
            self.reached["copies known"] += batch.copies is not None and skipped == len(batch.copies)
            self.reached["copies refused"] += batch.copies is not None and skipped < 0
            if batch.producer and skipped >= 0:
                numbers = batch.copies or range(batch.first, batch.first + len(batch.bodies))
                for sequence in numbers[skipped:]:
                    key = (batch.producer, sequence)
                    self.sent[key] = self.sent.get(key, 0) + 1
                    assert self.sent[key] == 1, f"I5: {key} was stored twice"
        for settle, status in zip(entry.settles, effects.settled, strict=True):
            self.reached[f"settlement {settle[3]} status {status}"] += 1
        for token, _, outcome in effects.released:
            self.reached["leases that ended"] += 1
            assert token in self.naive.leases, outcome

    def _check_deliveries(self, entry: Entry, effects: Effects) -> None:
        """I2, I3, I4 as a consumer sees them; what the leader's scheduler is told suffices to find all work."""
        for expected in self.naive.queues.values():
            left = {m[0] for m in expected.left}
            self.finished = {s for s in self.finished if s not in left}  # but for redriven ones
            self.finished.update(m[0] for m in expected.produced if m[0] not in left)
        for name, queue in zip(entry.purges, effects.purged, strict=True):
            if queue:
                self.purged.update(m[0] for m in self.naive.queues[name].produced)
        for name in effects.ready:
            self.announced[name] = 0
        for due, name in effects.delayed:
            self.announced[name] = min(due, self.announced.get(name, due))
        for queue in effects.granted:
            if queue is None:
                continue
            name = queue.key
            self.announced.pop(name, None)
            assert queue.token > self.seen_tokens.get(name, 0), "I3: a fencing token did not grow"
            self.seen_tokens[name] = queue.token
            self.reached["grants of messages not in memory"] += len(queue.front) < queue.lease_size
            self.leader.ensure(queue, queue.lease_size)
            run = queue.front[:queue.lease_size]
            lease = self.naive.queues[name].lease
            assert lease is not None
            assert run == self.naive.queues[name].left[:len(lease.run)], "messages changed on their way"
            assert self.finished.isdisjoint(m[0] for m in run), "I4: delivered after its acknowledgement"
            first = self.delivered.setdefault(name, [])
            produced = [m[0] for m in self.naive.queues[name].produced]
            open_before = sorted(s for s in first if s not in self.finished)
            known = set(first)
            again = [m[0] for m in run if m[0] in known]
            assert again == open_before[:len(again)], "I2: a redelivery was overtaken"
            ahead = [m[0] for m in run if m[0] not in known and open_before and m[0] < open_before[-1]]
            assert self.naive.excused.issuperset(ahead), "I2: a redelivery was overtaken"
            if len(again) < len(open_before):
                assert all(m[0] < open_before[len(again)] for m in run), "I2: a redelivery was overtaken"
            first += [m[0] for m in run if m[0] not in known]
            plain = [s for s in first if s not in self.naive.excused and s not in self.purged]
            assert plain == [s for s in produced if s not in self.naive.excused and s not in self.purged][:len(plain)], (
                "I2: a first delivery is out of order")
        self._rebuild_some(2)
        self._check_announced()

    def _rebuild_some(self, count: int) -> None:
        if self.rebuild is None:
            return
        for _ in range(count):
            name, due = next(self.rebuild, (b"", 0))
            if not name:
                self.rebuild = None
                return
            queue = self.naive.queues[name]
            if queue.left and queue.lease is None:
                self.announced[name] = min(due, self.announced.get(name, due))

    def _check_announced(self) -> None:
        if self.rebuild is not None:
            return
        for name, queue in self.naive.queues.items():
            if not queue.left:
                self.announced.pop(name, None)
            elif queue.lease is None:
                due = self.announced.get(name)
                assert due is not None, f"{name!r} has messages and nobody will look at it"
                assert due <= max(queue.due(), self.naive.now), f"{name!r} will be looked at too late"

    def check_memory(self, shard: Shard) -> None:
        """The shard's state is the naive one's, whatever of it is in memory."""
        naive = self.naive
        assert shard.now_ms == naive.now
        assert shard.gates == naive.gates
        assert {p: k[0] for p, k in shard.producers.items()} == naive.producers
        assert list(shard.producers) == list(naive.producers), "producers would be forgotten in another order"
        for copier, came in naive.copies.items():
            life = max((one for one, _ in came), default=0)
            assert not came or shard.copiers[copier] == (
                life, max(number for one, number in came if one == life), max(number for _, number in came))
        assert set(shard.leases) == {lease.token for lease in naive.live()}, "I3: live leases differ"
        unsaved = 0
        for name, queue in naive.queues.items():
            state = shard.queues.get(name)
            if state is None:
                stored = shard.view.get(rows.queue_key(name)) is not None and name not in shard._gone
                assert stored == bool(queue.left), f"{name!r} is lost"
                assert queue.lease is None, f"{name!r} is leased and not in memory"
                continue
            assert queue.left, f"{name!r} is empty and takes memory"
            self.reached["tails"] += bool(state.tail)
            messages = shard.messages(state)
            assert messages == queue.left, f"messages of {name!r} differ"
            assert state.count == len(messages)
            assert (state.attempts, state.not_before, state.gap) == (queue.attempts, queue.not_before, queue.gap())
            lease = queue.lease
            assert (state.token, state.lease_size, state.lease_acked, state.deadline, state.consumer) == (
                (lease.token, len(lease.run), lease.acked, lease.deadline, lease.consumer) if lease
                else (0, *(getattr(state, f) for f in ("lease_size", "lease_acked", "deadline", "consumer"))))
            if lease:
                assert shard.leases[lease.token] is state
            revived = shard._revived.get(name, ())
            unsaved += sum(len(m[3]) for m in messages
                           if m[0] in revived or shard.view.get(rows.message_key(name, m[0])) is None)
            assert state.size == sum(len(m[3]) for m in messages)
        assert shard.unsaved_bytes == unsaved
        self._check_counters(shard)

    def _check_counters(self, shard: Shard) -> None:
        """I7."""
        for destination in {n.split(b"\0")[0] for n in self.naive.queues}:
            c = shard.counters[destination]
            queues = [q for n, q in self.naive.queues.items() if n.split(b"\0")[0] == destination]
            total = self.naive.totals
            assert (c.enqueued, c.acked, c.dead_lettered, c.retried, c.expired, c.ttl_expired, c.purged, c.redriven,
                    c.discarded, c.deduplicated, c.overflowed) == tuple(
                total[destination, name] for name in ("enqueued", "acked", "dead", "retried", "expired", "ttl", "purged",
                                                      "redriven", "discarded", "deduplicated", "overflowed"))
            assert c.dead == sum(n.split(b"\0")[0] == destination for n, *_ in self.naive.dead.values())
            assert c.size == sum(len(m[3]) for q in queues for m in q.left)
            assert c.queues == sum(bool(q.left) for q in queues)
            assert c.messages == sum(len(q.left) for q in queues)
            assert c.leased == sum(len(q.lease.run) - q.lease.acked for q in queues if q.lease)
            assert c.enqueued + c.redriven == c.messages + c.acked + c.dead_lettered + c.discarded + c.purged
            tenants = {b"\0".join(n.split(b"\0")[:2]) for n in self.naive.queues if n.split(b"\0")[0] == destination}
            expected = []
            for scope in tenants:
                left = [m for n, q in self.naive.queues.items() if n.startswith(scope + b"\0") for m in q.left]
                assert shard.tenant(scope) == (len(left), sum(len(m[3]) for m in left))
                if left:
                    expected.append((*shard.tenant(scope), scope))
            assert shard.top_tenants(destination, 99) == sorted(expected, reverse=True)
            assert shard.queue_names(destination + b"\0", b"", 1 << 20) == sorted(
                n for n, q in self.naive.queues.items() if q.left and n.split(b"\0")[0] == destination)
            oldest = shard.oldest(destination)
            heads = [q.left[0][1] for q in queues if q.left]
            assert (oldest and oldest[1]) == (min(heads) if heads else None)

    def check_rows(self, replica: Replica) -> None:
        """After a checkpoint the rows are exactly the state: nothing is missing and nothing is left of what is over."""
        naive = self.naive
        found = {kind: dict(replica.store.scan(kind, bytes((kind[0] + 1,)))) for kind in (
            rows.QUEUE, rows.MESSAGE, rows.LEASE, rows.DEAD, rows.PRODUCER, rows.STATS, rows.GATE, rows.CLOCK, rows.TENANT,
            rows.DEDUP, rows.DEDUP_DUE, rows.COPIER)}
        assert set(found[rows.QUEUE]) == {rows.queue_key(n) for n in naive.nonempty()}, "queue rows"
        assert {k: rows.decode_message(k, v) for k, v in found[rows.MESSAGE].items()} == {
            rows.message_key(n, m[0]): m for n, q in naive.queues.items() for m in q.left}, "message rows"
        assert found[rows.LEASE] == {rows.lease_key(lease.token): lease.queue for lease in naive.live()}, "lease rows"
        assert set(found[rows.PRODUCER]) == {rows.PRODUCER + p.encode() for p in naive.producers}, "producer rows"
        assert set(found[rows.COPIER]) == {rows.COPIER + c.encode() for c, came in naive.copies.items() if came}, "copier rows"
        assert set(found[rows.GATE]) == {rows.GATE + scope for scope in naive.gates}, "gate rows"
        assert set(found[rows.TENANT]) == {
            rows.TENANT + b"\0".join(n.split(b"\0")[:2]) for n in naive.nonempty()}, "tenant rows"
        live = {rows.DEDUP + digest: known for digest, known in naive.ids.items() if known[1] > naive.now}
        ids = {k: rows.decode_dedup(v) for k, v in found[rows.DEDUP].items()}
        assert live.items() <= ids.items(), "dedup rows"
        assert all(rows.dedup_due(until, k[1:]) in found[rows.DEDUP_DUE] for k, (_, until) in ids.items()), "ids stay for ever"
        assert all(until // 60_000 >= naive.now // 60_000 for _, until in ids.values()), "ids stay for ever"
        assert {k[:1] == b"v" and int.from_bytes(k[1:5], "big") >= naive.now // 60_000 for k in found[rows.DEDUP_DUE]} <= {True}
        dead = {}
        for key, (name, message, attempts, reason, now, index) in naive.dead.items():
            dead[key] = rows.DeadRow(rows.VERSION, name, attempts, reason, message[1], now, message[3], index)
        assert {k: rows.decode_row(rows.DeadRow, v) for k, v in found[rows.DEAD].items()} == dead, "dead letters"
        self.check_memory(replica.shard)

    def audit(self) -> None:
        """I6: replicas that saved, loaded and forgot at different moments are one."""
        for replica in self.replicas:
            self.check_memory(replica.shard)
            for name, queue in self.naive.queues.items():
                assert replica.shard.holds_since(name, queue.left[0][1] if queue.left else 0) == bool(queue.left)
        digests = {replica.restarted(self.log).digest() for replica in self.replicas}
        digests |= {replica.shard.digest() for replica in self.replicas}
        assert len(digests) == 1, "I6: replicas differ"
        for replica in self.replicas:
            replica.checkpoint(self.index)
            self.check_rows(replica)
        digests |= {replica.shard.digest() for replica in self.replicas}
        assert len(digests) == 1, "I6: a checkpoint changed the state"
        everything = list(self.naive.dead.values())
        for destination in {n.split(b"\0")[0] for n, *_ in everything}:
            listed = self.leader.dead_letters(destination, None, b"", 1 << 30)
            assert [(row.queue.split(b"\0")[1], row.body) for _, row in listed] == sorted(
                ((n.split(b"\0")[1], m[3]) for n, m, *_ in everything if n.split(b"\0")[0] == destination),
                key=lambda found: (found[0], next(m[0] for _, m, *_ in everything if m[3] == found[1])))


STEPS: list[Callable[[World, int, int, int], None]] = [
    World.commit, World.enqueue, World.grant, World.settle, World.commit, World.enqueue, World.grant, World.settle,
    World.commit, World.enqueue, World.grant, World.settle, World.expire, World.tick, World.checkpoint, World.commit,
    World.checkpoint, World.load, World.restart, World.gate, World.trim, World.redrive, World.redrive,
    World.purge]


def random_program(seed: int, length: int) -> list[Step]:
    """A program from a seed."""
    draw = random.Random(seed)
    return [(draw.randrange(256), draw.randrange(256), draw.randrange(256), draw.randrange(256)) for _ in range(length)]


@contextmanager
def cache_bytes(limit: int) -> Iterator[None]:
    """Shards keep so many bytes across a checkpoint."""
    with mock.patch.object(state_module, "CACHE_BYTES_MAX", limit):
        yield

