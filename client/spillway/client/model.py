"""Plain values that go into and come out of the client. Times are seconds as floats, moments are aware datetimes."""
from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple


class Record(NamedTuple):
    """One message to send, for `Producer.send_many`."""

    destination: str
    payload: bytes
    tenant: str = ""
    key: str = ""
    headers: Mapping[str, str] | None = None
    id: str = ""
    delay: float | None = None  # seconds from the broker's receipt; not negative, at most 7 days


class Receipt(NamedTuple):
    """A record is on the disks of a majority of its shard's replicas."""

    shard: int
    sequence: int  # its place in the shard; 0 if the broker recognised a retry, which has no sequence of its own
    duplicate: bool = False  # an earlier attempt had stored it already


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages before the one that carries this went to the dead letters."""

    count: int
    first_sequence: int
    last_sequence: int


class NackPolicy(enum.Enum):
    """What happens to a message that was nacked."""

    BLOCK = 1  # retried for ever; its queue waits behind it
    BLOCK_UNTIL = 2  # as BLOCK up to `attempts_max` or `age_max`, then dead-lettered
    SKIP = 3  # dead-lettered at the first nack


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """How messages of a destination are leased and retried. None takes the broker's default."""

    run_messages_max: int | None = None  # 1 to 1024
    lease_seconds: float | None = None  # 1 s to 12 h
    backoff_base: float | None = None  # seconds; 1 ms to 1 h
    backoff_cap: float | None = None  # seconds; up to 1 day
    nack_policy: NackPolicy | None = None
    attempts_max: int | None = None  # BLOCK_UNTIL only; 1 to 1000
    age_max: float | None = None  # seconds; BLOCK_UNTIL only


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """Where the HTTP dispatcher sends a destination's messages."""

    url: str
    timeout: float | None = None  # seconds per request; 100 ms to 10 min
    concurrency_max: int | None = None  # requests at a time per dispatcher; 1 to 1024


@dataclass(frozen=True, slots=True)
class Destination:
    """What consumers lease from; one per integration."""

    name: str
    policy: DeliveryPolicy = field(default_factory=DeliveryPolicy)
    http: HttpTarget | None = None
    etag: str = ""  # as read; give it back with an update to refuse overwriting someone else's


@dataclass(frozen=True, slots=True)
class DestinationStats:
    """Counts of one destination over all shards. Totals survive restarts."""

    messages: int
    leased: int
    queues: int
    dead_letters: int
    enqueued_total: int
    acked_total: int
    dead_lettered_total: int
    retried_total: int
    expired_total: int
    oldest_enqueue_time: datetime | None
    parked_until_time: datetime | None
    parked_tenants: int
    shards_missing: tuple[int, ...]  # shards that did not answer; empty: the counts are complete


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that could not be delivered."""

    shard: int
    sequence: int
    destination: str
    tenant: str
    key: str
    attempts: int
    reason: str
    enqueue_time: datetime
    dead_time: datetime
    id: str
    headers: Mapping[str, str]
    payload: bytes
