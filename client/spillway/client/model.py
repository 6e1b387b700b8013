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
    deliver_at: datetime | None = None  # not before; aware; instead of `delay`
    ttl: float | None = None  # seconds from the broker's receipt, after which it is not delivered; 1 ms to 366 days
    dedup_id: str = ""  # a second record of the queue with this id is not stored, for the destination's dedup window


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
class Limit:
    """How fast, and how much at a time. None: unlimited."""

    messages_per_second: float | None = None  # deliveries, on average; 0.01 to 1,000,000
    burst: int | None = None  # deliveries at once after a rest; None: what a second gives, at least 1
    leases_max: int | None = None  # leases at a time


@dataclass(frozen=True, slots=True)
class Retention:
    """What may wait before producers are refused with ResourceExhausted. None: unlimited."""

    bytes_max: int | None = None  # bytes of messages waiting or leased
    age_max: float | None = None  # seconds, of the oldest message waiting or leased; 1 s to 366 days


@dataclass(frozen=True, slots=True)
class TenantPolicy:
    """A tenant that differs from the others of its destination."""

    weight: float | None = None  # share of the destination; 0.01 to 100, default 1
    limit: Limit | None = None  # instead of `tenant_limit`; Limit() is unlimited
    retention: Retention | None = None  # instead of `tenant_retention`; Retention() is unlimited


@dataclass(frozen=True, slots=True)
class AdaptiveLimit:
    """Fewer leases at a time while the destination throttles or fails. None takes the broker's default."""

    disabled: bool = False  # never adapts; `pinned` still holds
    floor: int | None = None  # never fewer leases than this; 1 to 1024, default 1
    pinned: int | None = None  # always this many leases; None: adapts


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """How messages of a destination are kept, leased and retried. None takes the broker's default. All times are seconds."""

    run_messages_max: int | None = None  # longest run of one queue in one lease; 1 to 1024, default 64
    lease_seconds: float | None = None  # how long a lease lasts unless extended; 1 s to 12 h, default 30 s
    backoff_base: float | None = None  # before the first retry; 1 ms to 1 h, default 0.2 s
    backoff_cap: float | None = None  # before a retry at most; up to 1 day, default 60 s
    nack_policy: NackPolicy | None = None  # default BLOCK
    attempts_max: int | None = None  # BLOCK_UNTIL only; 1 to 1000
    age_max: float | None = None  # BLOCK_UNTIL only; 1 ms to 366 days
    ordered: bool | None = None  # whether queues keep their order, one lease at a time; default True
    lease_seconds_max: float | None = None  # from the grant, extensions included; `lease_seconds` to 12 h, default 12 h
    dead_letters_kept: bool | None = None  # False: what cannot be delivered is removed and counted; default True
    ttl: float | None = None  # age at which a message is not delivered any more; 1 s to 366 days, default never
    message_bytes_max: int | None = None  # bytes of id, headers and payload; default the node's limit
    limit: Limit | None = None  # of all tenants together
    tenant_limit: Limit | None = None  # of each tenant
    retention: Retention | None = None  # of all tenants together
    tenant_retention: Retention | None = None  # of each tenant
    weight: float | None = None  # share of consumers that lease from several destinations; 0.01 to 100, default 1
    tenants: Mapping[str, TenantPolicy] = field(default_factory=dict, hash=False)  # those that differ; up to 1000
    adaptive_limit: AdaptiveLimit | None = None
    dedup_window: float | None = None  # for how long a `dedup_id` is remembered; 1 s to 7 days, default 10 min
    backoff_factor: float | None = None  # growth from one retry to the next; 1 to 10, default 2
    backoff_jitter: float | None = None  # part of the waiting time that is drawn at random; 0 to 1, default 1


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """Where the HTTP dispatcher sends a destination's messages. None takes the broker's default. Its `repr` leaves out what may
    be secret."""

    url: str  # http:// or https://
    timeout: float | None = None  # seconds per request; 100 ms to 10 min, default 10 s
    concurrency_max: int | None = None  # requests at a time per dispatcher; 1 to 1024, default 16
    headers: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)  # sent with every request; up to 64, 8 KiB
    # "whsec_" and base64 of 24 to 64 bytes; up to 4: requests are signed with each. Missing in `list_destinations`.
    signing_secrets: tuple[str, ...] = field(default=(), repr=False)
    allow_private_addresses: bool = False  # loopback, private and link-local addresses may be called, too
    redirects_max: int | None = None  # redirects (307, 308) that are followed; up to 5, default 0


@dataclass(frozen=True, slots=True)
class Destination:
    """What consumers lease from; one per integration."""

    name: str
    policy: DeliveryPolicy = field(default_factory=DeliveryPolicy)
    http: HttpTarget | None = None
    etag: str = ""  # as read; give it back with an update to refuse overwriting someone else's


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """Who gets a copy."""

    destination: str  # a destination, or the source of another route
    filter: str = ""  # CEL over `headers`, `tenant`, `key` and `id` that gives a bool; up to 4096 bytes; empty: all
    skip_over_budget: bool = False  # while it is over its retention budget: left out and counted, not refused for all


@dataclass(frozen=True, slots=True)
class Route:
    """Copies each message that is produced to `source`, with its tenant and key, to each target."""

    source: str  # a name that producers use as a destination's, and that is none
    targets: tuple[RouteTarget, ...]  # 1 to 64
    etag: str = ""  # as read; give it back with an update to refuse overwriting someone else's


@dataclass(frozen=True, slots=True)
class TokenScope:
    """One thing that a token allows."""

    action: str  # "produce", "lease" or "admin"
    destinations: str = "*"  # a destination, or a pattern in which '*' stands for any run of characters
    tenants: str = "*"  # a tenant, or such a pattern; "" is the tenant without a name. Not with "lease"


@dataclass(frozen=True, slots=True)
class Token:
    """A token, without what is secret in it."""

    token_id: str
    name: str  # what it is for
    scopes: tuple[TokenScope, ...]
    create_time: datetime
    expire_time: datetime | None  # None: never
    streams_max: int = 0  # limits of all that uses it at one node; 0: none
    messages_per_second: int = 0
    bytes_in_flight_max: int = 0


class GateCause(enum.Enum):
    """Why deliveries are stopped."""

    UNKNOWN = 0  # the broker is newer than this client
    PAUSED = 1  # by an operator, until resumed
    PARKED = 2  # by an operator, for a time
    FAILURES = 3  # after THROTTLED or DOWN; then one probe goes out


@dataclass(frozen=True, slots=True)
class Gate:
    """Deliveries of a destination, or of one tenant there, are stopped."""

    tenant: str | None  # None: the whole destination
    cause: GateCause
    until_time: datetime | None  # None: until resumed
    step: int  # times in a row that it closed after THROTTLED or DOWN
    reason: str  # what the operator wrote


class StallCause(enum.Enum):
    """Why a queue, tenant or destination is not moving."""

    UNKNOWN = 0  # the broker is newer than this client
    NONE = 1  # it is moving, or its turn is near
    EMPTY = 2  # there are no messages
    PAUSED = 3  # an operator paused it
    PARKED = 4  # an operator parked it, or THROTTLED or DOWN did
    LEASED = 5  # its head is leased
    BACKOFF = 6  # its head failed and waits
    DELAYED = 7  # its head is not to be delivered yet
    LIMIT = 8  # a rate or concurrency limit is used up
    NO_CONSUMER = 9  # nobody subscribes
    NO_CREDIT = 10  # consumers are there, but take nothing now
    NO_QUORUM = 11  # its shard has no leader


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a queue, tenant or destination is not moving, and when it will have drained."""

    sentence: str  # for people, with names and times
    cause: StallCause
    until_time: datetime | None  # when that ends by itself; None: unknown or never
    messages: int  # waiting or leased
    drain_time: datetime | None  # when they will have been delivered at the present rate; None: unknown


@dataclass(frozen=True, slots=True)
class PeekedMessage:
    """A message that waits or is leased; looking at it changed nothing."""

    sequence: int
    enqueue_time: datetime
    deliver_time: datetime | None  # not delivered before; None: at once
    expire_time: datetime | None  # not delivered after; None: the policy's `ttl` alone decides
    attempts: int  # that failed
    leased: bool
    id: str
    headers: Mapping[str, str] = field(hash=False)
    payload: bytes


class Peek(NamedTuple):
    """The head of one queue."""

    messages: tuple[PeekedMessage, ...]  # oldest first
    total: int  # messages in the whole queue


class Purged(NamedTuple):
    """What a purge removed, or would remove."""

    messages: int
    queues: int


class RedriveProgress(NamedTuple):
    """How far a redrive is."""

    redriven: int  # dead letters put back so far
    done: bool  # everything that was there at the start is back


class TenantStats(NamedTuple):
    """What a tenant has waiting or leased in a destination."""

    tenant: str
    messages: int
    message_bytes: int


class TopTenants(NamedTuple):
    """The tenants with the most messages, those with the most first."""

    tenants: tuple[TenantStats, ...]
    shards_missing: tuple[int, ...]  # shards that did not answer; empty: the counts are complete


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
    message_bytes: int = 0  # of `messages`
    ttl_expired_total: int = 0  # also in `dead_lettered_total` or `discarded_total`
    purged_total: int = 0
    redriven_total: int = 0
    discarded_total: int = 0  # removed instead of kept as dead letters
    deduplicated_total: int = 0  # records recognised by their `dedup_id`
    queues_ready: int = 0  # that may be leased now, were gates and limits open
    queues_waiting: int = 0  # for the end of a backoff or delay
    queues_leased: int = 0
    paused: bool = False  # the whole destination
    leases_limit: int = 0  # leases that may be out at a time, over all nodes; 0: unlimited
    consumers: int = 0  # that lease from it
    acked_per_second: float = 0.0  # over the last half minute or so
    overflowed_total: int = 0  # copies that routes left out


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


class NodeState(enum.IntEnum):
    """What is to become of a node."""

    UNSPECIFIED = 0  # the broker is newer than this client
    ACTIVE = 1
    DRAINING = 2  # its replicas move, or have moved, to others
    REMOVING = 3  # as draining, and then it leaves


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node of the cluster."""

    id: str
    address: str  # host:port for clients
    zone: str
    host: str
    state: NodeState
    reachable: bool
    version: str  # "" unless it answered
    replicas: int  # of shards
    leads: int  # shards
    feature_max: int = 0  # highest feature level at which it can work; 0 unless it answered


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One replica that answered."""

    node: str
    applied_index: int
    lag: int  # entries that the leader had committed and this one had not applied
    role: str = ""  # "leader", "follower", "candidate" or "recovering"; "": told by a node of an older version


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One Raft group."""

    group: int  # 0: meta; else the shard
    leader: str  # "": nobody says that it leads
    term: int
    wanted: tuple[str, ...]  # where its replicas belong, the preferred leader first
    voters: tuple[str, ...]
    learners: tuple[str, ...]  # that are catching up
    replicas: tuple[ReplicaReport, ...]
    moving: bool  # its members are not yet those wanted


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that an operator should know."""

    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """How a cluster is."""

    cluster: str
    nodes: tuple[NodeReport, ...]
    groups: tuple[GroupReport, ...]
    problems: tuple[Problem, ...]
    feature_level: int = 1  # what may be written, as every node can read it

    @property
    def moving(self) -> int:
        """How many shards are on their way to other nodes."""
        return sum(group.moving for group in self.groups)


@dataclass(frozen=True, slots=True)
class BackupProgress:
    """How far a backup, or its verification, is."""

    groups_done: int
    groups: int  # 0: not known yet
    bytes: int  # of the files
