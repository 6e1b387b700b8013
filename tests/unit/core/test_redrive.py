"""Dead letters that go back, messages whose time has passed, purges, dedup ids: one story each. That they are right in any
mix: see tests/properties."""
from __future__ import annotations

from unittest import mock

import pytest
from spillway.broker.core import rows
from spillway.broker.core import state as state_module
from spillway.broker.core.entry import ACK, DEAD, DISCARD, DONE, GONE, RETRY, Enqueue
from spillway.broker.core.shard import SettleStatus
from spillway.contract.hashing import PART

from tests.unit.core.shard_log import NOW, OTHER, QUEUE, Log, dead_key

BASE = 1 << 20  # sequence of the first entry's first message
NUMBERS = [b"%02d" % n for n in range(80)]


def redrive(log: Log, *keys: bytes) -> list[bool]:
    """Puts dead letters back."""
    return log.apply(redrives=list(keys)).redriven


# -- redrive ----------------------------------------------------------------------------------------------------------


def test_a_redriven_message_goes_before_cold_ones(log: Log, no_cache: None) -> None:
    """The head of a queue that is in the store only is what was put back, and nothing of the rest is lost or read twice."""
    log.enqueue(*NUMBERS)
    keys = log.reject(1)
    log.finish(16)
    log.checkpoint()
    assert redrive(log, *keys) == [True]
    log.enqueue(b"tail")
    assert log.bodies() == [b"00", *NUMBERS[17:], b"tail"]
    log.checkpoint()
    assert log.bodies() == [b"00", *NUMBERS[17:], b"tail"]


def test_a_redriven_message_goes_behind_cold_ones_that_are_older(log: Log, no_cache: None) -> None:
    """What an earlier redrive put back, and a checkpoint took from memory, stays before what is put back now."""
    log.enqueue(*NUMBERS)
    keys = log.reject(30)
    assert redrive(log, *keys[:20]) == [True] * 20
    log.checkpoint()
    assert log.restart().open(QUEUE).front == []  # type: ignore[union-attr]
    assert redrive(log, keys[25]) == [True]
    assert log.bodies() == [*NUMBERS[:20], NUMBERS[25], *NUMBERS[30:]]
    log.checkpoint()
    assert redrive(log, keys[22], keys[29], keys[21]) == [True] * 3
    assert log.finish(26) == [*NUMBERS[:20], *(NUMBERS[n] for n in (21, 22, 25, 29)), *NUMBERS[30:32]]


def test_rows_that_are_dead_already_are_not_read_again(log: Log, no_cache: None) -> None:
    """Between two checkpoints the store still has rows of finished messages, between a redriven head and cold messages."""
    log.enqueue(*NUMBERS[:20], now=NOW)
    log.enqueue(*NUMBERS[20:], now=NOW + 5_000)
    log.checkpoint()
    shard = log.shard
    first, second = log.reject(2)
    queue = shard.queues[QUEUE]
    log.finish(len(queue.front))
    log.finish(16)
    assert not queue.front and queue.cold == 80 - 32
    assert redrive(log, first) == [True]
    log.finish(1)
    assert shard.holds_since(QUEUE, NOW + 5_000) and shard.oldest(b"d") == (QUEUE, NOW + 5_000)
    log.finish(len(queue.front))
    assert not queue.front and queue.cold == 80 - 48
    assert redrive(log, second) == [True]
    assert [m[3] for m in shard.messages(queue)] == [b"01", *NUMBERS[48:]]
    assert log.finish(len(queue.front)) == [b"01", *NUMBERS[48:64]]
    assert shard.holds_since(QUEUE, NOW + 5_000) and shard.oldest(b"d") == (QUEUE, NOW + 5_000)
    assert log.bodies() == NUMBERS[64:]


def test_a_leased_queue_takes_nothing_back(log: Log) -> None:
    """A run under a lease is what it is; the dead letter stays one until the lease is over."""
    log.enqueue(b"1", b"2")
    keys = log.reject(1)
    token = log.grant(1)
    assert redrive(log, *keys) == [False]
    assert log.shard.dead_letter(keys[0]) is not None
    log.settle(token, 0, RETRY, argument=NOW)
    assert redrive(log, *keys) == [True]
    assert log.shard.dead_letter(keys[0]) is None
    assert log.bodies() == [b"1", b"2"]


def test_a_dead_letter_goes_back_once(log: Log) -> None:
    """Asked twice in one entry, and again later, and for what never was one."""
    log.enqueue(b"1", b"2")
    keys = log.reject(1)
    assert redrive(log, *keys, *keys, dead_key(QUEUE, 1), dead_key(OTHER, BASE)) == [True, False, False, False]
    assert redrive(log, *keys) == [False]
    assert log.shard.counters[b"d"].redriven == 1
    assert log.bodies() == [b"1", b"2"]


def test_a_dead_letter_goes_back_to_a_queue_that_is_gone(log: Log) -> None:
    """Its queue is there again, its rows are, too."""
    log.enqueue(b"1")
    keys = log.reject(1)
    log.checkpoint()
    effects = log.apply(redrives=keys)
    assert effects.redriven == [True] and effects.ready == [QUEUE]
    log.checkpoint()
    assert log.bodies() == [b"1"]
    assert [k for k in log.view.rows if k[:1] == rows.DEAD] == []


def test_a_head_that_stays_keeps_its_attempts(log: Log) -> None:
    """A message put back behind the head does not make it new, one before it does."""
    log.enqueue(b"1", b"2", b"3")
    keys = log.reject(2)
    redrive(log, keys[0])
    log.settle(log.grant(1), 0, RETRY, argument=NOW + 500)
    redrive(log, keys[1])
    queue = log.shard.queues[QUEUE]
    assert (queue.attempts, queue.not_before) == (1, NOW + 500)
    log.apply(settles=[(log.grant(1), 0, 0, DISCARD, 0, "")])
    log.settle(log.grant(1), 0, RETRY, argument=NOW + 500)
    keys = log.reject(1)
    log.settle(log.grant(1), 0, RETRY, argument=NOW + 500)
    redrive(log, *keys)
    assert (queue.attempts, queue.not_before) == (0, 0)


def test_redriven_bodies_count_as_unsaved(log: Log) -> None:
    """They are in memory only, so they bring the next checkpoint nearer, until they are finished, purged or saved."""
    log.enqueue(b"12345", b"678", b"9")
    log.checkpoint()
    keys = log.reject(2)
    assert log.shard.unsaved_bytes == 0
    redrive(log, *keys)
    assert log.shard.unsaved_bytes == 8
    log.finish(1)
    assert log.shard.unsaved_bytes == 3
    log.apply(purges=[QUEUE])
    assert log.shard.unsaved_bytes == 0
    assert log.bodies() == []


# -- gaps -------------------------------------------------------------------------------------------------------------


def test_a_gap_shrinks_as_its_messages_come_back(log: Log) -> None:
    """What is put back is not missing any more; the rest is, until the first message behind it is done."""
    log.enqueue(*NUMBERS[:6])
    keys = log.reject(4)
    assert log.shard.queues[QUEUE].gap == (4, BASE, BASE + 3)
    redrive(log, keys[0])
    assert log.shard.queues[QUEUE].gap == (3, BASE + 1, BASE + 3)
    log.finish(1)
    assert log.shard.queues[QUEUE].gap == (3, BASE + 1, BASE + 3)  # not told yet to the message that they are missing before
    redrive(log, keys[2])
    assert log.shard.queues[QUEUE].gap == (2, BASE + 1, BASE + 3)
    redrive(log, keys[3])
    assert log.shard.queues[QUEUE].gap == (1, BASE + 1, BASE + 2)
    log.checkpoint()
    log.restart()
    log.finish(2)
    assert log.shard.queues[QUEUE].gap is None


def test_a_message_dropped_again_is_missing_again(log: Log) -> None:
    """Also when later ones are: the gap begins with the first of them."""
    log.enqueue(*NUMBERS[:4])
    keys = log.reject(3)
    redrive(log, keys[0])
    log.reject(1)
    assert log.shard.queues[QUEUE].gap == (3, BASE, BASE + 2)
    redrive(log, *keys)
    assert log.shard.queues[QUEUE].gap is None


def test_what_was_told_is_not_told_again(log: Log) -> None:
    """A gap has what was dropped since the last one was told, and loses none of it by the return of others."""
    log.enqueue(*NUMBERS[:5])
    keys = log.reject(2)  # 0 and 1
    log.finish(1)  # 2 is told about them
    redrive(log, keys[0])
    log.reject(2)  # 0 and 3
    gap = (2, BASE, BASE + 3)
    assert log.shard.queues[QUEUE].gap == gap
    redrive(log, keys[1])
    assert log.shard.queues[QUEUE].gap == gap
    log.checkpoint()
    log.restart()
    redrive(log, keys[0])
    assert log.shard.queues[QUEUE].gap == (1, BASE + 1, BASE + 3)


def test_a_discarded_message_leaves_a_gap_and_no_dead_letter(log: Log) -> None:
    """Order matters to its successor whether or not the body is kept."""
    log.enqueue(b"1", b"2")
    assert log.settle(log.grant(1), 0, DISCARD) == SettleStatus.OK
    assert log.shard.queues[QUEUE].gap == (1, BASE, BASE)
    counters = log.shard.counters[b"d"]
    assert (counters.discarded, counters.dead, counters.dead_lettered, counters.messages) == (1, 0, 0, 1)
    assert log.shard.dead_letters(b"d", None, b"", 9) == []


# -- times to live ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [(QUEUE, 2, BASE, DEAD, ""), (QUEUE, 1, BASE + 1, DEAD, ""), (QUEUE, 4, BASE + 3, DEAD, ""),
                                  (QUEUE, 0, 0, DEAD, ""), (QUEUE, 0, BASE + 2, DEAD, ""), (OTHER, 1, BASE, DEAD, "")])
def test_a_trim_of_what_is_not_there_does_nothing(log: Log, trim: tuple[bytes, int, int, int, str]) -> None:
    """The leader decided it for a head that is not the head any more."""
    log.enqueue(b"1", b"2", b"3")
    assert log.apply(trims=[trim]).trimmed == [False]
    assert log.bodies() == [b"1", b"2", b"3"]
    assert log.shard.counters[b"d"].ttl_expired == 0


def test_a_trim_takes_the_first_messages(log: Log, no_cache: None) -> None:
    """Kept as dead letters or not; the first keeps its attempts; not while the queue is leased."""
    log.enqueue(*NUMBERS[:30])
    log.settle(log.grant(1), 0, RETRY, argument=NOW + 9)
    log.checkpoint()
    token = log.grant(1)
    assert log.apply(trims=[(QUEUE, 2, BASE + 1, DEAD, "old")]).trimmed == [False]
    log.settle(token, 0, RETRY, argument=NOW + 9)
    effects = log.apply(trims=[(QUEUE, 20, BASE + 19, DEAD, "old"), (QUEUE, 2, BASE + 21, GONE, "old")])
    assert effects.trimmed == [True, True] and effects.ready == [QUEUE, QUEUE]
    assert [(row.body, row.attempts, row.reason) for _, row in log.shard.dead_letters(b"d", None, b"", 99)] == [
        (body, 0 if i else 2, "old") for i, body in enumerate(NUMBERS[:20])]
    counters = log.shard.counters[b"d"]
    assert (counters.ttl_expired, counters.dead_lettered, counters.discarded) == (22, 20, 2)
    assert log.shard.queues[QUEUE].gap == (22, BASE, BASE + 21)
    assert log.bodies() == NUMBERS[22:30]
    assert log.apply(trims=[(QUEUE, 8, BASE + 29, GONE, "old")]).ready == []
    assert log.shard.queues == {}


# -- purges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 16, 17, 40])
@pytest.mark.parametrize("saved", [0, 2, 20])
def test_a_purge_leaves_nothing(log: Log, no_cache: None, count: int, saved: int) -> None:
    """A leased queue, saved, not saved, or in part; what comes later is all there is."""
    log.enqueue(*NUMBERS[:min(saved, count)])
    if saved:
        log.checkpoint()
    if count > saved:
        log.enqueue(*NUMBERS[saved:count])
    token = log.grant(1)
    log.checkpoint()
    log.enqueue(b"new")
    effects = log.apply(purges=[QUEUE, QUEUE, OTHER])
    assert effects.purged == [count + 1, 0, 0]
    assert [(t, name) for t, name, _ in effects.released] == [(token, QUEUE)]
    assert log.settle(token, 1, ACK, BASE) == SettleStatus.STALE
    assert log.shard.unsaved_bytes == 0
    log.enqueue(b"later")
    log.checkpoint()
    assert log.bodies() == [b"later"]
    assert {k[:1] for k in log.view.rows} == {rows.QUEUE, rows.MESSAGE, rows.STATS, rows.TENANT, rows.CLOCK}
    assert sum(k[:1] == rows.MESSAGE for k in log.view.rows) == 1
    assert log.shard.tenant(b"d\0t") == (1, 5)


def test_dead_letters_go_for_good(log: Log) -> None:
    """Saved ones and new ones."""
    log.enqueue(b"1", b"2", b"3")
    keys = log.reject(1)
    log.checkpoint()
    keys += log.reject(1)
    log.apply(dead_purges=[*keys, dead_key(QUEUE, 99)])
    assert log.shard.counters[b"d"].dead == 0
    assert log.shard.dead_letters(b"d", None, b"", 9) == []
    assert redrive(log, *keys) == [False, False]
    log.checkpoint()
    assert [k for k in log.view.rows if k[:1] == rows.DEAD] == []


# -- dedup ids --------------------------------------------------------------------------------------------------------


def test_an_id_is_remembered_until_its_time(log: Log) -> None:
    """Through a checkpoint and a restart, to the millisecond; then it belongs to the next message."""
    until = NOW + 70_000
    log.enqueue(b"1", options={0: (0, 0, b"id", until)})
    for now in (NOW, until - 1):
        assert log.enqueue(b"2", options={0: (0, 0, b"id", now + 70_000)}, now=now).duplicates == {
            len(log.entries) << 20: BASE}
        log.checkpoint()
        log.restart()
    assert log.enqueue(b"3", options={0: (0, 0, b"id", until + 70_000)}, now=until).duplicates == {}
    assert log.bodies() == [b"1", b"3"]
    assert log.shard.counters[b"d"].deduplicated == 2
    last = (len(log.entries) << 20)
    assert log.enqueue(b"4", options={0: (0, 0, b"id", until)}, now=until).duplicates == {last + BASE: last}


def test_ids_are_bounded_on_disk(log: Log) -> None:
    """However many come between two checkpoints, those whose time has passed go."""
    with mock.patch.object(state_module, "DEDUPS_FORGOTTEN_MAX", 3):
        most = 0
        for minute in range(20):
            for i in range(10):
                log.enqueue(b"x", options={0: (0, 0, b"%d %d" % (minute, i), NOW + minute * 60_000 + 60_000)},
                            now=NOW + minute * 60_000)
            log.checkpoint()
            most = max(most, sum(k[:1] in (rows.DEDUP, rows.DEDUP_DUE) for k in log.view.rows))
        assert most <= 2 * 3 * 10
        for _ in range(20):
            log.apply(now=NOW + 3_600_000)
            log.checkpoint()
        assert [k for k in log.view.rows if k[:1] in (rows.DEDUP, rows.DEDUP_DUE)] == []


def test_the_digest_knows_ids(log: Log) -> None:
    """Replicas that remember other ids are not equal, those that hold other remains of forgotten ones are."""
    digests = set()
    for ids in ([b"a"], [b"b"]):
        one = Log()
        one.enqueue(b"1", options={0: (0, 0, ids[0], NOW + 60_000)})
        digests.add(one.shard.digest())
        one.checkpoint()
        digests.add(one.restart().digest())
    assert len(digests) == 2


# -- unordered destinations, copies -----------------------------------------------------------------------------------


def test_each_message_of_an_unordered_queue_is_a_queue(log: Log) -> None:
    """With options or without; a dead letter goes back to its own."""
    name = QUEUE + PART
    log.enqueue(b"1", b"2", name=name)
    log.enqueue(b"3", b"4", name=name, options={1: (NOW + 5, 0, b"", 0)})
    names = [name + b"%x" % n for n in (BASE, BASE + 1, 2 * BASE, 2 * BASE + 1)]
    assert sorted(log.shard.queues) == sorted(names)
    assert log.shard.tenant(b"d\0t") == (4, 4)
    keys = log.reject(1, names[1])
    assert names[1] not in log.shard.queues
    log.checkpoint()
    assert redrive(log, *keys) == [True]
    assert log.bodies(names[1]) == [b"2"]
    assert log.shard.queue_names(QUEUE + PART, b"", 9) == sorted(names)


def test_copies_are_taken_once_whatever_their_numbers(log: Log) -> None:
    """Numbers grow with gaps; each life of the copier may begin again, and what does not follow is refused."""
    def copy(epoch: int, previous: int, *numbers: int) -> list[int]:
        return log.apply([Enqueue("route", previous, [QUEUE] * len(numbers), [b"%d" % n for n in numbers],
                                  copies=list(numbers), epoch=epoch)]).enqueued

    assert copy(1, 0, 3, 7, 20) == [0]
    assert copy(1, 0, 3, 7, 20) == [3]
    assert copy(2, 0, 3, 7, 20) == [3]
    assert copy(1, 20, 21) == [-1]
    assert copy(2, 22, 23) == [-1]
    log.checkpoint()
    assert copy(2, 20, 21) == [0]
    assert copy(3, 7, 20) == [-1]
    assert copy(3, 0, 7, 20, 21, 22) == [3]
    assert log.bodies() == [b"3", b"7", b"20", b"21", b"22"]


def test_copies_follow_each_other(log: Log) -> None:
    """In a copier's life each piece names the copy before it. One that is missing, or of an earlier life, makes the rest wait,
    and what is known is not taken again; a restart changes nothing."""
    def copy(epoch: int, before: int, *numbers: int) -> int:
        log.checkpoint()
        log.restart()
        return log.apply([Enqueue("route", before, [QUEUE] * len(numbers), [b"%d" % n for n in numbers], None, None,
                                  list(numbers), epoch)]).enqueued[0]

    assert copy(5, 0, 3, 7) == 0
    assert copy(5, 9, 12) == -1  # 9 is missing
    assert copy(5, 7, 9) == 0
    assert copy(5, 0, 3, 7) == 2
    assert copy(5, 9, 12) == 0
    assert copy(6, 12, 15) == -1  # a life begins with nothing before it
    assert copy(6, 0, 9, 12, 14) == 2
    assert copy(5, 12, 14, 15) == -1  # that life is over
    assert copy(6, 14, 15) == 0
    assert log.bodies() == [b"3", b"7", b"9", b"12", b"14", b"15"]


def test_what_is_done_is_acknowledged_and_not_missing(log: Log) -> None:
    """An outbox is emptied without a lease, and nobody is told of a gap."""
    log.enqueue(b"1", b"2", b"3")
    assert log.apply(trims=[(QUEUE, 2, BASE + 1, DONE, "")]).trimmed == [True]
    counters = log.shard.counters[b"d"]
    assert (counters.acked, counters.ttl_expired, counters.discarded, counters.messages) == (2, 0, 0, 1)
    assert log.shard.queues[QUEUE].gap is None
