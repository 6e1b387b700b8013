"""How messages leave a queue other than one by one, and come back: acknowledged runs, messages whose time has passed, purges,
dead letters and their redrive. The part of the shard's state machine below leases and settlements.
"""
from __future__ import annotations

from bisect import bisect_left

from spillway.broker.core import rows
from spillway.broker.core.entry import DEAD, DONE, RELEASE
from spillway.broker.core.queue import Message, Queue
from spillway.broker.core.state import ShardState, destination_of, tenant_scope_of


class Effects:
    """What an entry did, for the leader. Released only after the entry is committed (which `apply` implies)."""

    __slots__ = ("base", "delayed", "duplicates", "enqueued", "gates", "granted", "purged", "ready", "redriven", "released",
                 "settled", "trimmed")

    def __init__(self) -> None:
        self.base = 0  # sequence of the entry's first message
        self.enqueued: list[int] = []  # per Enqueue: messages skipped as duplicates, or -1 out of sequence
        self.settled: list[int] = []  # per Settle: SettleStatus
        self.ready: list[bytes] = []  # queues that may be leased now
        self.delayed: list[tuple[int, bytes]] = []  # (ms since 1970, queue): ready then
        self.granted: list[Queue | None] = []  # per Grant: the queue, freshly leased; None if refused
        self.released: list[tuple[int, bytes, int]] = []  # (token, queue, outcome) of leases that ended
        self.gates: list[tuple[bytes, int, int]] = []  # (scope, until, step) that changed
        self.duplicates: dict[int, int] = {}  # sequence that a record would have had -> that of the one with its dedup id
        self.trimmed: list[bool] = []  # per Trim: whether it was done
        self.purged: list[int] = []  # per purge: messages removed
        self.redriven: list[bool] = []  # per redrive: whether the dead letter is back; not while its queue is leased


class Removals(ShardState):
    """The state of one shard, and what shortens its queues."""

    @staticmethod
    def _head_done(queue: Queue, sequence: int) -> None:
        """The messages up to `sequence` are done, and what is behind them was not tried yet."""
        queue.attempts = 0
        queue.not_before = 0
        if queue.gap is not None and queue.gap[2] < sequence:  # a redriven message may come before what is missing
            queue.gap = None

    def _remove_head(self, queue: Queue, count: int) -> int:
        """Removes the first `count` messages; returns the sequence of the last of them."""
        if len(queue.front) < count:
            self.ensure(queue, count)
        front = queue.front
        persisted = queue.persisted
        gone = front[:count]
        if gone[0][0] <= persisted:
            self._deletes += [rows.message_key(queue.key, m[0]) for m in gone if m[0] <= persisted]
        revived = self._revived.get(queue.key) if self._revived else None
        size = 0
        for m in gone:
            size += len(m[3])
            if m[0] > persisted:
                self.unsaved_bytes -= len(m[3])
            elif revived and m[0] in revived:
                revived.remove(m[0])
                self.unsaved_bytes -= len(m[3])
        del front[:count]
        self._weigh(queue, -count, -size)
        sequence = gone[-1][0]
        queue.floor = sequence + 1
        if not queue.cold and queue.tail:
            front += queue.tail
            queue.tail = []
        return sequence

    def _head_changed(self, queue: Queue, effects: Effects) -> None:
        """Reports when the queue may be leased; called whenever it has no lease and its head or time changed. A head
        that is not in memory is taken as due: whoever picks the queue loads it and looks again."""
        if queue.token:
            return
        front = queue.front
        due = max(queue.not_before, front[0][2]) if front else queue.not_before
        if due > self.now_ms:
            effects.delayed.append((due, queue.key))
        else:
            effects.ready.append(queue.key)

    def _vanish(self, queue: Queue) -> None:
        """An empty queue costs nothing: no row, no memory."""
        del self.queues[queue.key]
        self._dirty.pop(queue.key, None)
        queue.counters.queues -= 1  # they are saved, as its last messages went
        if queue.stored:
            self._gone.add(queue.key)
            self._stored_queues -= 1
        if queue.lease_row:
            self._deletes.append(rows.lease_key(queue.lease_row))

    def _drop_head(self, queue: Queue, fate: int, attempts: int, reason: str, now: int) -> None:
        """The head of a leased queue goes to the dead letters, or for good; its successor will say that something is missing
        before it."""
        queue.counters.leased -= 1
        queue.lease_acked += 1  # it is out of the lease, as an acknowledged message is
        self._drop(queue, 1, fate, attempts, reason, now)

    def _drop(self, queue: Queue, count: int, fate: int, attempts: int, reason: str, now: int) -> None:
        """The first `count` messages go to the dead letters, or for good."""
        self.ensure(queue, count)
        counters = queue.counters
        prefix = rows.DEAD + tenant_scope_of(queue.key) + b"\0"
        sequence = 0
        for sequence, enqueue_ms, _, body, _ in queue.front[:count]:
            if fate == DEAD:
                key = prefix + sequence.to_bytes(8, "big")
                self._dead_puts[key] = rows.encode_row(
                    rows.DeadRow(rows.VERSION, queue.key, attempts, reason, enqueue_ms, now, body, self._index))
                self._dead_gone.discard(key)
                counters.dead += 1
                counters.dead_lettered += 1
            else:
                counters.discarded += 1
            gap = queue.gap
            if gap is None:
                queue.gap = (1, sequence, sequence)
                queue.gap_since = self._index
            else:  # redriven and dropped again, a message may be before the others
                queue.gap = (gap[0] + 1, min(gap[1], sequence), max(gap[2], sequence))
            attempts = 0
        self._remove_head(queue, count)
        queue.attempts = 0
        queue.not_before = 0

    def _trim(self, name: bytes, count: int, last: int, fate: int, reason: str, now: int, effects: Effects) -> bool:
        """Drops messages whose time to live has passed, or that are done without a lease, unless the queue's head is not as
        the leader saw it."""
        queue = self.open(name)
        if queue is None or queue.token or not 1 <= count <= queue.count:
            return False
        self.ensure(queue, count)
        if queue.front[count - 1][0] != last:
            return False
        counters = queue.counters
        if fate == DONE:
            counters.acked += count
            self._head_done(queue, self._remove_head(queue, count))
        else:
            counters.ttl_expired += count
            self._drop(queue, count, fate, queue.attempts, reason, now)
        self._touch(queue)
        if queue.front or queue.cold:
            self._head_changed(queue, effects)
        else:
            self._vanish(queue)
        return True

    def _purge(self, name: bytes, effects: Effects) -> int:
        """Removes all messages of a queue; its lease ends."""
        queue = self.open(name)
        if queue is None:
            return 0
        count = queue.count
        if queue.token:
            del self.leases[queue.token]
            queue.counters.leases -= 1
            if queue.counters.meter is not None:
                queue.counters.meter.outcomes[RELEASE] += 1
            queue.counters.leased -= queue.lease_size - queue.lease_acked
            effects.released.append((queue.token, name, RELEASE))
            queue.token = 0
        persisted = queue.persisted
        revived = self._revived.pop(name, ())
        self.unsaved_bytes -= sum(len(m[3]) for m in (*queue.front, *queue.tail) if m[0] > persisted or m[0] in revived)
        if count <= 16:  # many short queues must not leave a range each for every later read to look at
            self.ensure(queue, count)
            self._deletes += [rows.message_key(name, m[0]) for m in queue.front if m[0] <= persisted]
        elif persisted:
            self._ranges.append((rows.message_key(name, 0), rows.message_end(name)))
        queue.counters.purged += count
        self._weigh(queue, -count, -queue.size)
        self._vanish(queue)
        return count

    def _redrive(self, keys: list[bytes], effects: Effects) -> None:
        """Dead letters go back to their queues, before what was behind them."""
        back: dict[bytes, dict[bytes, rows.DeadRow]] = {}
        for key in keys:
            rows.check_dead(key)
            row = self.dead_letter(key)
            if row is not None:
                back.setdefault(row.queue, {})[key] = row
        done: set[bytes] = set()
        for name, found in back.items():
            queue = self.open(name)
            if queue is None or not queue.token:
                self._put_back(name, queue, found, effects)
                done.update(found)
        for key in keys:
            effects.redriven.append(key in done)
            done.discard(key)  # who asks twice in one entry is told once

    def _put_back(self, name: bytes, queue: Queue | None, found: dict[bytes, rows.DeadRow], effects: Effects) -> None:
        """Dead letters become messages of their queue again, in order of sequence as all messages are."""
        # Their age begins anew: else what limits it would end them again at once.
        messages: list[Message] = sorted((rows.sequence_of(key), self.now_ms, 0, row.body, 0) for key, row in found.items())
        last = messages[-1][0]
        if queue is None:
            queue = self.queues[name] = self._queue(name)
            queue.counters.queues += 1
        # What is before them is an earlier redrive's. At least one is needed: between its row and theirs the store may still
        # have rows of messages that are gone.
        while queue.cold and (not queue.front or queue.front[-1][0] < last):
            self.ensure(queue, 2 * len(queue.front) + 1)
        front = queue.front
        head = front[0][0] if front else 0
        start, end = bisect_left(front, messages[0]), bisect_left(front, messages[-1])
        front[start:end] = sorted((*messages, *front[start:end]))
        queue.floor = front[0][0]
        if queue.floor != head:
            queue.attempts = queue.not_before = 0
        if queue.gap is not None:
            queue.gap = _without(queue.gap, [rows.sequence_of(k) for k, row in found.items() if row.dead_at >= queue.gap_since])
        # As if saved: nobody must take them for new ones. The rows are written with the next checkpoint.
        queue.persisted = max(queue.persisted, last)
        self._revived.setdefault(name, set()).update(message[0] for message in messages)
        size = sum(len(message[3]) for message in messages)
        self.unsaved_bytes += size
        for key in found:
            self._purge_dead(key)
        queue.counters.redriven += len(messages)
        self._weigh(queue, len(messages), size)
        self._touch(queue)
        self._head_changed(queue, effects)

    def _purge_dead(self, key: bytes) -> None:
        """Removes a dead letter."""
        row = self.dead_letter(key)
        if row is not None:
            self._dead_puts.pop(key, None)
            self._dead_gone.add(key)
            self._counters(destination_of(row.queue)).dead -= 1

    def _touch(self, queue: Queue) -> None:
        if not queue.dirty:
            queue.dirty = True
            self._dirty[queue.key] = queue
        counters = queue.counters
        if not counters.dirty:
            counters.dirty = True
            self._dirty_counters.append(counters)


def _without(gap: tuple[int, int, int], back: list[int]) -> tuple[int, int, int] | None:
    """A gap marker once some of what is missing is back. Its count is exact; what is missing may begin later and end
    earlier than it says, as nobody remembers what lay between."""
    _, first, last = gap
    back = sorted(sequence for sequence in back if first <= sequence <= last)
    for sequence in back:
        if sequence == first:
            first += 1
    for sequence in reversed(back):
        if sequence == last:
            last -= 1
    count = gap[0] - len(back)
    return (count, first, last) if count else None
