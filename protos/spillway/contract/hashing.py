"""Which shard a queue belongs to: the one rule that clients and brokers must share."""
from __future__ import annotations

from xxhash import xxh3_64_intdigest

SEPARATOR = b"\0"
PART = b"\1"  # in an unordered destination each message is a queue of its own: the queue's name, this, the message's number


def queue_key(destination: str, tenant: str, key: str) -> bytes:
    """The queue's name as bytes: `destination NUL tenant NUL key`. Names have no control characters,
    so no two queues share one, and queues of a destination, and of a tenant in it, sort together."""
    return f"{destination}\0{tenant}\0{key}".encode()


def shard_of(queue: bytes, shard_count: int) -> int:
    """The shard (1..shard_count) of a queue named by `queue_key`, or of a part of it."""
    return 1 + xxh3_64_intdigest(queue.partition(PART)[0]) % shard_count
