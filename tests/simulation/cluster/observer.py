"""One observer for each shard. It sees every committed entry once, and keeps the naive shard up to date with it: what any
replica, producer or consumer sees is compared with that.

Entries become committed for the observer when the first replica applies them; from then on they must stay.
"""
from __future__ import annotations

from collections import Counter
from typing import Any

from spillway.broker.core import entry as e
from spillway.broker.core.entry import Entry, decode_entry
from spillway.broker.core.outbox import OUTBOX
from spillway.broker.core.rows import sequence_of
from spillway.broker.core.shard import Shard

from tests.properties.naive_shard import OK, NaiveLease, NaiveShard, Outcome
from tests.properties.order_history import Acked, Back, Dropped, Event, Leased, Over, Produced, Purged
from tests.simulation.cluster.violation import Violation


class Observer:
    """Of one shard."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.naive = NaiveShard()
        self.log: dict[int, tuple[int, bytes]] = {}
        self.last = 0
        self.history: list[Event] = []
        self.bodies: dict[int, tuple[bytes, bytes]] = {}  # sequence -> (queue, body) of all that was ever stored
        self.stored: Counter[tuple[str, int]] = Counter()  # (producer, number) -> how often
        self.gone: dict[int, str] = {}  # sequence -> how it went: acked, dead, discarded, purged
        self.acked_by: dict[int, int] = {}  # sequence -> token
        self.digests: dict[int, tuple[int, str]] = {}  # index -> (digest, whose)
        self.totals: dict[int, Any] = {}
        self.live: dict[int, NaiveLease] = {}
        self._ended: set[int] = set()

    def applied(self, node: str, last: int, index: int, term: int, command: bytes) -> bool:
        """A replica applies an entry after `last`; whether it is new."""
        if index <= last:
            raise Violation("history", f"{node} applies entry {index} of shard {self.shard} after {last}")
        known = self.log.get(index)
        if known is not None:
            if known != (term, command):
                raise Violation("history", f"{node} applies another entry {index} of shard {self.shard} than others: term {term} and "
                                f"{len(command)} bytes, not term {known[0]} and {len(known[1])} bytes")
            return False
        if index < self.last:
            raise Violation("history", f"{node} applies entry {index} of shard {self.shard}, which nobody had when {self.last} was applied")
        if any(i in self.log for i in range(max(last + 1, self.last - 64), index)) and last < self.last:
            raise Violation("history", f"{node} applies entry {index} of shard {self.shard} after {last} and leaves out entries")
        self.log[index] = (term, command)
        self.last = index
        self._observe(index, decode_entry(command))
        return True

    # -- the model and its history -------------------------------------------------------------------------------

    def _observe(self, index: int, entry: Entry) -> None:
        naive = self.naive
        leases = {token: (lease, lease.acked) for token, lease in self.live.items()}
        there = {name: [m[0] for m in naive.queues[name].left] if name in naive.queues else []
                 for name in (*(trim[0] for trim in entry.trims), *entry.purges)}
        dead = {key: found for key in {*entry.redrives, *entry.dead_purges} if (found := naive.dead.get(key))}
        out = naive.apply(index, entry)
        for token, *_ in out.released:
            self.live.pop(token, None)
        self._enqueued(index, entry, out)
        self._settled(entry, out, leases)
        for name in there:
            there[name] += [m[0] for m in naive.queues[name].produced if m[0] >> 20 == index] if name in naive.queues else []
        self._removed(entry, out, there, dead, leases)
        for queue in out.granted:
            if queue is not None:
                lease = queue.lease
                assert lease is not None
                self.live[lease.token] = lease
                gap = queue.gap()
                self.history.append(Leased(lease.queue, lease.token, tuple(lease.run),
                                           gap if gap is not None and gap[1] < lease.run[-1] else None))

    def _enqueued(self, index: int, entry: Entry, out: Outcome) -> None:
        sequence = index << 20
        for batch, skipped in zip(entry.enqueues, out.enqueued, strict=True):
            for position, (name, body) in enumerate(zip(batch.queues, batch.bodies, strict=True)):
                number = sequence + position
                if not position >= skipped >= 0 or number in out.duplicates:
                    continue
                if batch.producer:
                    of = (batch.producer, batch.copies[position] if batch.copies is not None else batch.first + position)
                    self.stored[of] += 1
                    if self.stored[of] > 1:
                        raise Violation("I5", f"shard {self.shard} stores number {of[1]} of producer {of[0]!r} twice, in entry {index}")
                if name.endswith(b"\1"):
                    name += b"%x" % number
                self.bodies[number] = (name, body)
                self.history.append(Produced(name, (number,)))
            sequence += len(batch.queues)

    def _end(self, lease: NaiveLease) -> None:
        if lease.token not in self._ended:
            self._ended.add(lease.token)
            self.history.append(Over(lease.queue, lease.token))

    def _settled(self, entry: Entry, out: Outcome, leases: dict[int, tuple[NaiveLease, int]]) -> None:
        over = {token for token, *_ in out.released}
        seen = {token: acked for token, (_, acked) in leases.items()}
        for (token, position, _, outcome, _, _), status in zip(entry.settles, out.settled, strict=True):
            if status != OK:
                continue
            lease = leases[token][0]
            done = seen[token]
            if outcome == e.ACK:
                acked = tuple(lease.run[done:position])
                for sequence in acked:
                    self.gone[sequence] = "acked"
                    self.acked_by[sequence] = token
                self.history.append(Acked(lease.queue, token, acked))
                seen[token] = position
            elif outcome in (e.REJECT, e.DISCARD):
                self._drop(lease.queue, [lease.run[done]], "dead" if outcome == e.REJECT else "discarded")
                seen[token] = done + 1
            if token in over and (outcome != e.ACK or position == len(lease.run)) and outcome != e.EXTEND:
                self._end(lease)
        for token, fate, _, _ in entry.expires:
            if token in over and token not in self._ended:
                lease = leases[token][0]
                if fate:
                    self._drop(lease.queue, [lease.run[seen[token]]], "dead" if fate == e.DEAD else "discarded")
                self._end(lease)

    def _drop(self, queue: bytes, sequences: list[int], how: str) -> None:
        for sequence in sequences:
            self.gone[sequence] = how
        self.history.append(Dropped(queue, tuple(sequences)))

    def _removed(self, entry: Entry, out: Outcome, there: dict[bytes, list[int]], dead: dict[bytes, Any],
                 leases: dict[int, tuple[NaiveLease, int]]) -> None:
        for (name, _, last, fate, _), done in zip(entry.trims, out.trimmed, strict=True):
            if not done:
                continue
            trimmed = [s for s in there[name] if s <= last and s not in self.gone]
            if fate == e.DONE:
                self.gone.update((sequence, "acked") for sequence in trimmed)
            else:
                self._drop(name, trimmed, "dead" if fate == e.DEAD else "discarded")
        for name, count in zip(entry.purges, out.purged, strict=True):
            if count:
                for lease, _ in leases.values():
                    if lease.queue == name and any(token == lease.token for token, *_ in out.released):
                        self._end(lease)
                for sequence in there[name]:
                    self.gone.setdefault(sequence, "purged")
                self.history.append(Purged(name))
        back: dict[bytes, list[int]] = {}
        for key, done in zip(entry.redrives, out.redriven, strict=True):
            if done:
                sequence = sequence_of(key)
                self.gone.pop(sequence, None)
                back.setdefault(dead[key][0], []).append(sequence)
        for name, sequences in back.items():
            self.history.append(Back(name, tuple(sequences)))
        for key in entry.dead_purges:
            if key in dead:
                self.gone[sequence_of(key)] = "purged"

    def ordered(self) -> list[Event]:
        """The history of queues that promise order: the outbox is copied by its owner, without leases."""
        return [event for event in self.history if event.queue != OUTBOX]

    # -- what others see -----------------------------------------------------------------------------------------

    def compare(self, node: str, index: int, shard: Shard) -> None:
        """I6 and I7 of a replica as of an index."""
        digest = shard.digest()
        known = self.digests.setdefault(index, (digest, node))
        if known[0] != digest:
            raise Violation("I6", f"shard {self.shard} as of entry {index} has digest {digest:08x} on {node}, {known[0]:08x} on {known[1]}")
        for name, c in shard.counters.items():
            if c.enqueued + c.redriven != c.messages + c.acked + c.dead_lettered + c.discarded + c.purged:
                raise Violation("I7", f"shard {self.shard} on {node}, destination {name!r}, entry {index}: {c.enqueued} enqueued and "
                                f"{c.redriven} redriven are not {c.messages} waiting or leased, {c.acked} acked, {c.dead_lettered} dead, "
                                f"{c.discarded} discarded and {c.purged} purged")
        if index == self.last:
            self._compare_with_model(node, shard)

    def restored(self, index: int, shard: Shard) -> None:
        """I6 and I7 of a backup as of an index: with the entries after it, it is what all replicas come to."""
        for later in range(index + 1, self.last + 1):
            if later in self.log:
                shard.apply(later, decode_entry(self.log[later][1]))
        self.compare("a backup", self.last, shard)

    def _compare_with_model(self, node: str, shard: Shard) -> None:
        naive = self.naive
        if shard.leases.keys() != self.live.keys():
            raise Violation("I3", f"shard {self.shard} on {node} has leases {sorted(shard.leases.keys() ^ self.live.keys())} too many "
                            "or too few")
        left: Counter[bytes] = Counter()
        for name, queue in naive.queues.items():
            left[name.split(b"\0")[0]] += len(queue.left)
        for name in {*left, *shard.counters}:
            c = shard.counters.get(name)
            totals = naive.totals
            found = (0,) * 6 if c is None else (c.messages, c.enqueued, c.acked, c.dead_lettered, c.expired, c.purged)
            wanted = (left[name], *(totals[name, what] for what in ("enqueued", "acked", "dead", "expired", "purged")))
            if found != wanted:
                raise Violation("I7", f"shard {self.shard} on {node}, destination {name!r}: waiting, enqueued, acked, dead, expired and "
                                f"purged are {found}, must be {wanted}")
