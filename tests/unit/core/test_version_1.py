"""What the first version of the shard wrote, byte for byte, is read as it was meant: the rows of a checkpoint, and the log
behind it. It knew no sizes, tenants' rows, options, trims, purges or redrives."""
from __future__ import annotations

import pytest
from spillway.broker.core import rows
from spillway.broker.core.entry import ACK, DEAD, EXPIRED, KEEP, REJECT, VERSION, Enqueue, Entry, decode_entry, encode_entry
from spillway.broker.core.shard import Checkpoint, Effects, Shard
from spillway.broker.core.view import MemoryView

NOW = 1_700_000_000_000
QUEUE, OTHER = b"d\0t\0k", b"d\0t\0l"
BASE = 1 << 20
# QUEUE had "one" (dead), "two" and "three" (leased, tried once) and "four" of producer p; OTHER has "x" and, delayed, "yz".
ROWS = {bytes.fromhex(key): bytes.fromhex(value) for key, value in (line.split() for line in """
64640074000000000000100000 9701c405640074006b01a3626164cf0000018bcfe56801cf0000018bcfe56803c4036f6e65
67640074 9301cf0000018bcfe5684d02
6c0000000000600001 640074006b
6d640074006b000000000000100001 010168e5cf8b010000000000000000000074776f
6d640074006b000000000000100002 010168e5cf8b01000000000000000000007468726565
6d640074006b000000000000100003 010168e5cf8b0100000000000000000000666f7572
6d640074006c000000000000100004 010168e5cf8b010000000000000000000078
6d640074006c000000000000100005 010168e5cf8b010000f469e5cf8b010000797a
7070 930104ce00100000
71640074006b 9c0103ce0010000101cf0000018bcfe56832cf0000018bcfe56801ce006000010200cf0000018bcfe58b28a1639301ce00100000ce00100000
71640074006c 9c0102000000cf0000018bcfe5680100000000a0c0
7364 99010205010600010100
78 9201cf0000018bcfe56806
""".strip().splitlines())}
LOG = {7: bytes.fromhex("9801cf0000018bcfe568079195a1700492c405640074006bc405640074006c92c404666f7572c404666976658101cf0000018bcfe56b84"
                        "9196ce0060000101ce001000010100a0909193c40364007400009090"),
       8: bytes.fromhex("9801cf0000018bcfe58b2990909294ce00600001c300a46c6174659405c23ca0909194c405640074006c02cf0000018bcfe58d1c00"
                        "91a26332")}
ENTRIES = {
    7: Entry(1, NOW + 7, [Enqueue("p", 4, [QUEUE, OTHER], [b"four", b"five"], {1: NOW + 900}, {1: (NOW + 900, 0, b"", 0)})],
             [((6 << 20) + 1, 1, BASE + 1, ACK, 0, "")], gates=[(b"d\0t", 0, 0)]),
    8: Entry(1, NOW + 9_001, expires=[((6 << 20) + 1, DEAD, 0, "late"), (5, KEEP, 60, "")],
             grants=[(OTHER, 2, NOW + 9_500, 0)], consumers=["c2"])}


@pytest.fixture
def view() -> MemoryView:
    """The rows of version 1."""
    made = Checkpoint()
    made.puts = list(ROWS.items())
    found = MemoryView()
    found.commit(made)
    return found


def contents(shard: Shard, name: bytes) -> list[tuple[int, int, bytes, int]]:
    """A queue's messages without the time at which they came."""
    queue = shard.open(name)
    return [] if queue is None else [(m[0], m[2], m[3], m[4]) for m in shard.messages(queue)]


@pytest.mark.parametrize("index", LOG)
def test_entries_read_as_before(index: int) -> None:
    """Delays are options, true and false are fates."""
    assert decode_entry(LOG[index]) == ENTRIES[index]


def test_rows_read_as_before(view: MemoryView) -> None:
    """Messages, leases, gaps, counters, producers, gates and dead letters are there."""
    shard = Shard(view)
    assert contents(shard, QUEUE) == [(BASE + 1, 0, b"two", 0), (BASE + 2, 0, b"three", 0), (BASE + 3, 0, b"four", 0)]
    assert contents(shard, OTHER) == [(BASE + 4, 0, b"x", 0), (BASE + 5, NOW + 500, b"yz", 0)]
    queue = shard.leases[(6 << 20) + 1]
    assert (queue.key, queue.attempts, queue.lease_size, queue.lease_acked, queue.gap) == (QUEUE, 1, 2, 0, (1, BASE, BASE))
    assert shard.producers == {"p": (4, BASE)} and shard.gates == {b"d\0t": (NOW + 77, 2)} and shard.now_ms == NOW + 6
    counters = shard.counters[b"d"]
    assert (counters.queues, counters.messages, counters.leased, counters.dead, counters.enqueued, counters.acked,
            counters.dead_lettered, counters.retried, counters.expired) == (2, 5, 2, 1, 6, 0, 1, 1, 0)
    (_, dead), = shard.dead_letters(b"d", b"t", b"", 9)
    assert dead == rows.DeadRow(1, QUEUE, 1, "bad", NOW + 1, NOW + 3, b"one")


@pytest.mark.parametrize("saved", [(), (7,), (8,), (7, 8)])
def test_the_log_goes_on(view: MemoryView, saved: tuple[int, ...]) -> None:
    """Entries of version 1 do what they did, and what is saved then is read again."""
    shard = Shard(view)
    effects = {index: Effects() for index in LOG}
    for index, command in LOG.items():
        shard.apply(index, decode_entry(command), effects[index])
        if index in saved:
            view.commit(shard.checkpoint())
            digest = shard.digest()
            shard = Shard(view)
            assert shard.digest() == digest
    assert effects[7].enqueued == [1] and effects[7].settled == [1]
    assert effects[8].released == [((6 << 20) + 1, QUEUE, EXPIRED)]
    assert contents(shard, QUEUE) == [(BASE + 3, 0, b"four", 0)]
    assert shard.queues[QUEUE].gap == (1, BASE + 2, BASE + 2)
    five = (7 << 20) + 1
    assert contents(shard, OTHER) == [(BASE + 4, 0, b"x", 0), (BASE + 5, NOW + 500, b"yz", 0), (five, NOW + 900, b"five", 0)]
    assert [row.reason for _, row in shard.dead_letters(b"d", None, b"", 9)] == ["bad", "late"]
    assert shard.gates == {} and list(shard.leases) == [(8 << 20) + 1]


def test_a_dead_letter_of_version_1_comes_back(view: MemoryView) -> None:
    """And is not missing any more."""
    shard = Shard(view)
    shard.apply(7, Entry(VERSION, NOW, settles=[((6 << 20) + 1, 0, 0, REJECT, 0, "")]))
    (key, _), *_ = shard.dead_letters(b"d", None, b"", 9)
    assert shard.queues[QUEUE].gap == (2, BASE, BASE + 1)
    shard.apply(8, Entry(VERSION, NOW, redrives=[key]))
    assert [m[2] for m in contents(shard, QUEUE)] == [b"one", b"three", b"four"]
    assert shard.queues[QUEUE].gap == (1, BASE + 1, BASE + 1)


@pytest.mark.parametrize("touched", [False, True])
def test_what_was_not_counted_is_measured(view: MemoryView, touched: bool) -> None:
    """Sizes of queues, tenants and destinations are those of the messages; nothing is below zero when they go."""
    shard = Shard(view)
    assert (shard.counters[b"d"].size, shard.tenant(b"d\0t")) == (15, (5, 15))
    assert shard.top_tenants(b"d", 9) == [(5, 15, b"d\0t")]
    if touched:
        shard.apply(7, Entry(VERSION, NOW, [Enqueue("", 0, [OTHER], [b"1234567"])]))
        assert (shard.counters[b"d"].size, shard.tenant(b"d\0t")) == (22, (6, 22))
        view.commit(shard.checkpoint())
        shard = Shard(view)
        assert (shard.counters[b"d"].size, shard.tenant(b"d\0t")) == (22, (6, 22))
    shard.apply(8, Entry(VERSION, NOW, purges=[QUEUE]))
    shard.apply(9, Entry(VERSION, NOW, trims=[(OTHER, 1, BASE + 4, DEAD, "")]))
    assert shard.tenant(b"d\0t") == ((2, 9) if touched else (1, 2))
    view.commit(shard.checkpoint())
    shard = Shard(view)
    shard.apply(10, Entry(VERSION, NOW, purges=[OTHER]))
    assert (shard.counters[b"d"].size, shard.tenant(b"d\0t"), shard.top_tenants(b"d", 9)) == (0, (0, 0), [])
    view.commit(shard.checkpoint())
    assert not any(key[:1] == rows.TENANT for key in view.rows)


def test_delays_count_from_the_start_of_the_batch() -> None:
    """Also where its first messages were known already."""
    shard = Shard(MemoryView())
    shard.apply(1, Entry(VERSION, 5, [Enqueue("p", 1, [QUEUE], [b"a"])]))
    entry = Entry(1, 5, [Enqueue("p", 1, [QUEUE] * 3, [b"a", b"b", b"c"], {0: 70, 2: 90, 7: 99})])
    shard.apply(2, decode_entry(encode_entry(entry)))
    assert [m[1:3] for m in contents(shard, QUEUE)] == [(0, b"a"), (0, b"b"), (90, b"c")]
