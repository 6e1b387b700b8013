"""The shard's limits and reports, one by one. That it does the right thing at all: see tests/properties."""
from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
from spillway.broker.core import rows
from spillway.broker.core import shard as shard_module
from spillway.broker.core import state as state_module
from spillway.broker.core.entry import (
    ACK,
    EXPIRED,
    EXTEND,
    REJECT,
    RELEASE,
    RETRY,
    Enqueue,
)
from spillway.broker.core.shard import SettleStatus, destination_of, tenant_scope_of

from tests.unit.core.shard_log import NOW, OTHER, QUEUE, Log

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


# -- sequences and producers ------------------------------------------------------------------------------------------


def test_names_come_apart(log: Log) -> None:
    """A queue's name tells its destination and its tenant's scope."""
    assert destination_of(b"d\0t\0k") == b"d"
    assert tenant_scope_of(b"d\0t\0k") == b"d\0t"
    assert tenant_scope_of(b"d\0\0") == b"d\0"


def test_sequences_grow(log: Log) -> None:
    """Sequences are unique and increasing over entries and batches, also where duplicates leave holes."""
    log.enqueue(b"1", b"2")
    log.apply([Enqueue("p", 1, [QUEUE, OTHER, QUEUE], [b"3", b"4", b"5"]), Enqueue("", 0, [OTHER], [b"6"])])
    effects = log.apply([Enqueue("p", 3, [QUEUE, QUEUE], [b"5", b"7"]), Enqueue("p", 9, [QUEUE], [b"!"]),
                         Enqueue("", 0, [QUEUE], [b"8"])])
    assert effects.enqueued == [1, -1, 0]
    assert effects.base == 3 << 20
    shard = log.shard
    assert [(m[0], m[3]) for m in shard.messages(shard.queues[QUEUE])] == [
        (1 << 20, b"1"), (1 << 20 | 1, b"2"), (2 << 20, b"3"), (2 << 20 | 2, b"5"), (3 << 20 | 1, b"7"), (3 << 20 | 3, b"8")]
    everything = [m[0] for q in shard.queues.values() for m in shard.messages(q)]
    assert len(everything) == len(set(everything)) == 8


@pytest.mark.parametrize(("first", "count", "skipped"), [
    (4, 2, 0), (3, 2, 1), (1, 3, 3), (1, 2, 2), (1, 5, 3), (5, 1, -1), (0, 2, 2)])
def test_a_producer_is_heard_once(log: Log, first: int, count: int, skipped: int) -> None:
    """Of a batch after sequence 3, what is known is skipped, what is next is stored, and a gap is refused whole."""
    log.enqueue(b"1", b"2", b"3", producer="p", first=1)
    bodies = [b"new"] * count
    assert log.enqueue(*bodies, producer="p", first=first).enqueued == [skipped]
    stored = count - skipped if skipped >= 0 else 0
    assert log.shard.queues[QUEUE].count == 3 + stored
    assert log.shard.producers["p"][0] == 3 + stored


def test_the_longest_idle_producer_is_forgotten(log: Log) -> None:
    """At the limit a new producer makes the shard forget the one unused for longest, on every replica the same."""
    with mock.patch.object(shard_module, "PRODUCERS_MAX", 3):
        for producer in "abc":
            log.enqueue(b"x", producer=producer, first=1)
        log.checkpoint()
        assert list(log.shard.producers) == ["a", "b", "c"]  # exactly at the limit nobody is forgotten
        assert log.enqueue(b"x", producer="a", first=1).enqueued == [1]  # a duplicate is a use
        log.enqueue(b"y", producer="b", first=9)  # a refused batch is none
        log.enqueue(b"x", producer="d", first=1)
        assert list(log.shard.producers) == ["c", "a", "d"]
        digest = log.shard.digest()
        assert log.restart().digest() == digest
        assert list(log.shard.producers) == ["c", "a", "d"]
        log.checkpoint()
        assert rows.PRODUCER + b"b" not in log.view.rows
        assert list(log.restart().producers) == ["c", "a", "d"]
        log.enqueue(b"x", producer="e", first=1)
        assert list(log.shard.producers) == ["a", "d", "e"]
        assert log.enqueue(b"y", producer="c", first=2).enqueued == [-1]  # forgotten: a gap, not a silent duplicate


# -- leases -----------------------------------------------------------------------------------------------------------


def test_a_grant_takes_at_most_what_is_there(log: Log) -> None:
    """All messages may be leased; one more, none, or a queue that is leased or unknown may not."""
    log.enqueue(b"1", b"2")
    for messages in (3, 0):
        assert log.apply(grants=[(QUEUE, messages, NOW, 0)]).granted == [None]
    assert log.apply(grants=[(OTHER, 1, NOW, 0)]).granted == [None]
    first, second = log.apply(grants=[(QUEUE, 2, NOW, 0), (QUEUE, 1, NOW, 0)]).granted
    assert first is not None and first.lease_size == 2 and second is None


def test_tokens_grow(log: Log) -> None:
    """Every grant has a higher token than all before, also within an entry and after a restart."""
    log.enqueue(b"1")
    log.enqueue(b"1", name=OTHER)
    tokens = []
    for _ in range(3):
        granted = log.apply(grants=[(QUEUE, 1, NOW + 9, 0), (OTHER, 1, NOW + 9, 0)]).granted
        tokens += [queue.token for queue in granted if queue is not None]
        log.apply(settles=[(token, 0, 0, RELEASE, 0, "") for token in tokens[-2:]])
        log.checkpoint()
        log.restart()
    assert len(tokens) == 6
    assert all(a < b for a, b in pairwise(tokens))


def test_a_lease_ends_exactly_at_its_deadline(log: Log) -> None:
    """One millisecond before the deadline an expiry does nothing."""
    log.enqueue(b"1")
    token = log.grant(1)
    deadline = NOW + 1_000
    assert log.apply(expires=[(token, False, 0, "")], now=deadline - 1).released == []
    assert log.apply(expires=[(token, False, 0, "")], now=deadline).released == [(token, QUEUE, EXPIRED)]


def test_an_extension_never_shortens(log: Log) -> None:
    """A deadline moves forward only; a lease that is over is not extended."""
    log.enqueue(b"1", b"2")
    token = log.grant(2)
    assert log.settle(token, 0, EXTEND, argument=NOW + 5_000) == SettleStatus.OK
    assert log.settle(token, 0, EXTEND, argument=NOW + 4_000) == SettleStatus.OK
    assert log.shard.leases[token].deadline == NOW + 5_000
    log.settle(token, 2, ACK, sequence=(1 << 20) + 1)
    assert log.settle(token, 0, EXTEND, argument=NOW + 9_000) == SettleStatus.STALE


def test_positions_have_exact_limits(log: Log) -> None:
    """A run of 3 is acknowledged up to 3 and not up to 4; only its first unsettled message can be nacked."""
    log.enqueue(b"1", b"2", b"3", b"4")
    token = log.grant(3)
    base = 1 << 20
    assert log.settle(token, 4, ACK, base + 3) == SettleStatus.NOT_FIRST
    assert log.settle(token, 0, ACK) == SettleStatus.ALREADY
    assert log.settle(token, 1, RETRY, base) == SettleStatus.NOT_FIRST
    assert log.settle(token, 2, ACK, base + 1) == SettleStatus.OK
    assert log.settle(token, 2, ACK, base + 1) == SettleStatus.ALREADY
    assert log.settle(token, 1, RETRY, base) == SettleStatus.NOT_FIRST
    assert log.settle(token, 3, REJECT, base + 2) == SettleStatus.NOT_FIRST
    assert log.settle(token, 3, ACK, base + 2) == SettleStatus.OK
    assert log.settle(token, 3, ACK, base + 2) == SettleStatus.ALREADY
    assert log.settle(token, 4, ACK, base + 3) == SettleStatus.STALE
    assert log.shard.queues[QUEUE].count == 1


def test_recent_leases_are_remembered(log: Log) -> None:
    """A repeated settlement is told from a stale one for the last SETTLED_MAX leases that were settled, not for more."""
    with mock.patch.object(shard_module, "SETTLED_MAX", 2):
        log.enqueue(b"1", b"2", b"3")
        tokens = []
        for position in range(3):
            tokens.append(log.grant(1))
            log.settle(tokens[-1], 1, ACK, (1 << 20) + position)
        assert [log.settle(token, 1, ACK) for token in tokens] == [
            SettleStatus.STALE, SettleStatus.ALREADY, SettleStatus.ALREADY]
        assert len(log.shard.settled) == 2


# -- dead letters and gaps --------------------------------------------------------------------------------------------


def reject(log: Log, name: bytes, *, reason: str = "no") -> None:
    """Dead-letters the head."""
    token = log.grant(1, name)
    assert log.settle(token, log.shard.leases[token].lease_acked, REJECT, reason=reason) == SettleStatus.OK


def test_dead_letters_are_listed_in_pages(log: Log) -> None:
    """Pages of dead letters, saved and not yet saved, follow each other by tenant and sequence and miss none."""
    names = [b"d\0t\0k", b"d\0t\0l", b"d\0s\0k", b"d\0tt\0k", b"dd\0t\0k"]
    for round_ in range(3):
        for name in names:
            log.enqueue(b"%d" % round_, name=name)
            reject(log, name)
        if round_ == 1:
            log.checkpoint()
    shard = log.shard
    whole = shard.dead_letters(b"d", None, b"", 100)
    assert [(row.queue.split(b"\0")[1], row.body) for _, row in whole] == [
        (tenant, body) for tenant, queues in ((b"s", 1), (b"t", 2), (b"tt", 1))
        for body in (b"0", b"1", b"2") for _ in range(queues)]
    for limit in (1, 2, 5, 11, 12, 13):
        pages, after = [], b""
        while page := shard.dead_letters(b"d", None, after, limit):
            assert len(page) <= limit
            pages += page
            after = page[-1][0]
        assert pages == whole
    assert [row.queue for _, row in shard.dead_letters(b"d", b"t", b"", 4)] == [names[0], names[1]] * 2
    assert shard.dead_letters(b"d", b"u", b"", 4) == shard.dead_letters(b"x", None, b"", 4) == []
    assert shard.dead_letters(b"d", None, b"", 0) == []
    log.checkpoint()
    assert log.restart().dead_letters(b"d", None, b"", 100) == whole


def test_a_dead_letter_tells_its_story(log: Log) -> None:
    """A dead letter keeps queue, attempts, reason, times and body."""
    log.enqueue(b"poison")
    token = log.grant(1)
    log.settle(token, 0, RETRY, argument=NOW)
    token = log.grant(1)
    log.apply(settles=[(token, 0, 0, REJECT, 0, "bad")], now=NOW + 7)
    (_, row), = log.shard.dead_letters(b"d", b"t", b"", 9)
    assert row == rows.DeadRow(rows.VERSION, QUEUE, 2, "bad", NOW, NOW + 7, b"poison", 5)


def test_a_gap_is_told_until_its_successor_is_done(log: Log, no_cache: None) -> None:
    """Dead letters in a row make one gap marker of the next message; it survives a retry and a restart, and an
    acknowledgement ends it."""
    log.enqueue(b"1", b"2", b"3", b"4")
    base = 1 << 20
    reject(log, QUEUE)
    assert log.shard.queues[QUEUE].gap == (1, base, base)
    log.checkpoint()
    log.restart()
    reject(log, QUEUE)
    token = log.grant(2)
    assert log.shard.leases[token].gap == (2, base, base + 1)
    log.settle(token, 0, RETRY, argument=NOW)
    token = log.grant(2)
    assert log.shard.leases[token].gap == (2, base, base + 1)
    log.settle(token, 1, ACK, base + 2)
    assert log.shard.leases[token].gap is None


def test_an_empty_queue_remembers_no_gap(log: Log) -> None:
    """A gap has no successor to be told to when the queue ends with it: an empty queue costs nothing."""
    log.enqueue(b"1")
    reject(log, QUEUE)
    log.enqueue(b"2")
    assert log.shard.queues[QUEUE].gap is None


def test_a_dead_letter_is_read_from_the_store(log: Log, no_cache: None) -> None:
    """A replica that never loaded a body dead-letters the same bytes as its leader."""
    log.enqueue(b"body")
    token = log.grant(1)
    log.checkpoint()
    assert log.shard.queues[QUEUE].front == [] or log.restart().queues[QUEUE].front == []
    log.settle(token, 0, REJECT)
    (_, row), = log.shard.dead_letters(b"d", b"t", b"", 9)
    assert row.body == b"body"


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_cache_has_a_limit(log: Log) -> None:
    """A checkpoint keeps whole queues up to CACHE_BYTES_MAX, each counted with 512 bytes beside its bodies."""
    for number in range(10):
        log.enqueue(b"x" * 88, name=b"d\0t\0%d" % number)
    with mock.patch.object(state_module, "CACHE_BYTES_MAX", 600 * 4):
        log.checkpoint()
    assert len(log.shard.queues) == 4
    with mock.patch.object(state_module, "CACHE_BYTES_MAX", 600 * 4 - 1):
        log.checkpoint()
    assert len(log.shard.queues) == 3


def test_a_queue_with_a_grant_under_way_stays(log: Log, no_cache: None) -> None:
    """What the leader granted but has not seen applied is not evicted: its messages are about to be sent."""
    log.enqueue(b"1")
    log.shard.queues[QUEUE].granting = True
    log.checkpoint()
    assert list(log.shard.queues) == [QUEUE]


def test_a_message_that_lives_between_checkpoints_costs_no_row(log: Log) -> None:
    """Enqueued and acknowledged between two checkpoints, a message writes no row and deletes none."""
    log.enqueue(b"1")
    log.settle(log.grant(1), 1, ACK, 1 << 20)
    made = log.shard.checkpoint()
    assert {k[:1] for k, _ in made.puts} == {rows.STATS, rows.CLOCK}
    assert made.deletes == made.ranges == []
    assert log.shard.unsaved_bytes == 0
