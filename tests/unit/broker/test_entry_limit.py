"""An entry that takes everything to its limit stays below what the log may carry."""
from __future__ import annotations

from spillway.broker.core import entry as e
from spillway.broker.core import rows
from spillway.broker.core.entry import Enqueue, Entry, encode_entry
from spillway.broker.runtime import chores, shard
from spillway.broker.runtime.node import TURN_BYTES
from spillway.broker.services.produce import BATCH_BYTES_MAX
from spillway.cluster.machine import ENTRY_BYTES_MAX
from spillway.contract.hashing import PART
from spillway.contract.limits import FRAME_BYTES_MAX, NAME_BYTES_MAX


def test_the_largest_entry_fits_the_log() -> None:
    """Batches just below the target, then one with the largest payload that can be configured and options for all of its
    messages, settlements, expiries, grants and chores at their limits: together below ENTRY_BYTES_MAX."""
    name = b"\0".join([b"n" * NAME_BYTES_MAX] * 3)
    dead = rows.dead_prefix(*name.split(b"\0")[:2]) + bytes(8)
    payload_max = FRAME_BYTES_MAX // 2
    count = BATCH_BYTES_MAX // 65
    body = b"b"
    last = Enqueue("p" * 64, 1 << 60, [b"\0d\0"] * count + [name], [body] * count + [b"x" * payload_max],
                   None, dict.fromkeys(range(count + 1), (1 << 44, 1 << 44, bytes(16), 1 << 44)))
    first = Enqueue("p" * 64, 1 << 60, [name], [b"x" * TURN_BYTES])
    settle: e.Settle = (1 << 62, 1024, 1 << 62, e.REJECT, 1 << 44, "")
    entry = Entry(
        e.VERSION, 1 << 44, [first, last], [settle] * (shard.SETTLES_PER_ENTRY_BYTES // shard.SETTLE_BYTES),
        [(1 << 62, True, 1 << 44, "1000 attempts failed")] * shard.EXPIRES_PER_ENTRY_MAX, [(name, 1 << 44, 1000)],
        [(name, 1024, 1 << 44, i) for i in range(shard.GRANTS_PER_ENTRY_MAX)], ["s" * 64] * shard.GRANTS_PER_ENTRY_MAX,
        [(name + PART + b"f" * 16, 1024, 1 << 62, e.DEAD, "its time to live has passed")] * (chores.TRIMS_PER_ENTRY_MAX + 1),
        [name + PART + b"f" * 16] * chores.PURGES_PER_ENTRY_MAX, [dead] * chores.REDRIVES_PER_ENTRY_MAX,
        [dead] * chores.DEAD_PURGES_PER_ENTRY_MAX, [(b"n" * NAME_BYTES_MAX, 1 << 20)] * chores.TRIM_MESSAGES_MAX)
    assert len(encode_entry(entry)) < ENTRY_BYTES_MAX
    assert len(encode_entry(Entry(e.VERSION, 1, settles=[settle] * 100))) <= 100 * shard.SETTLE_BYTES + 32
