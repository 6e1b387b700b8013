"""What the scheduler knows of destinations, tenants and picks. Data; the rules are the scheduler's."""
from __future__ import annotations

from spillway.broker.core.limits import Bucket, Congestion, slots
from spillway.broker.core.names import NameQueue
from spillway.broker.core.policy import UNLIMITED, Adaptive, Limit, Policy, TenantPolicy, tenant_limit
from spillway.broker.core.subscription import INTERNAL, Consumer, Subscription

HOLD_MS_START = 1.0  # first guess of how long a lease is held
OPEN, CLOSED, HALF_OPEN, PROBING = range(4)  # states of a gate
MESSAGES_MAX = 1 << 30  # of a pick without a limit
FOR_EVER = -1  # until when an operator's gate is closed that has to be opened again


class Share:
    """What one flow had of a resource: a start tag, and leases that are out, whose time counts while it passes."""

    __slots__ = ("due_sum", "held", "hold_ms", "proven", "start", "taken", "voted_ms")

    def __init__(self) -> None:
        self.start = 0.0  # virtual start tag of its next lease
        self.held = 0  # leases out
        self.taken = 0  # messages of these
        # Of the times (ms) until which they have been charged in advance. So `held * now - due_sum` is owed now for those that
        # last longer, and a flow whose leases hang is behind the others while they do, and not when they end.
        self.due_sum = 0
        self.hold_ms = HOLD_MS_START  # moving average of the times for which its leases are held
        self.proven = False  # a lease of it has come back
        self.voted_ms = 0  # when it last said how long leases are usually held


class Tenant(Share):
    """A tenant inside a destination."""

    __slots__ = ("asleep_until", "blocked", "bucket", "destination", "gate", "hold", "leases_max", "limited", "name", "prober",
                 "queued", "ready", "slots", "weight")

    def __init__(self, name: bytes, destination: Destination, hold: int, now_ms: int) -> None:
        super().__init__()
        self.name = name
        self.destination = destination
        self.ready = NameQueue()  # queues, round robin
        self.hold_ms = destination.usual_ms
        self.queued = False  # stands in destination.heap
        self.gate = OPEN
        self.prober: Pick | None = None  # what the gate lets through while it is PROBING
        self.hold = hold  # operators' gate: 0 open, else closed until then
        self.blocked = False  # by a limit or a hold: does not stand in the heap until woken
        self.asleep_until = 0  # a timer stands for it
        self.weight = 1.0
        self.bucket: Bucket | None = None
        self.leases_max = 0
        self.slots = 0  # leases that may be out at a time, here; 0: no limit
        self.limited = False  # whether there is anything to look at before it is picked
        if destination.special or hold:
            self.follow(now_ms)

    def follow(self, now_ms: int) -> None:
        """Takes on what the destination's policy says of this tenant."""
        policy = self.destination.policy
        name = self.name.decode()
        own = policy.tenants.get(name, _ORDINARY)
        self.weight = own.weight
        limit = tenant_limit(policy, name)
        self.bucket = _bucket(self.bucket, limit, self.destination.share, now_ms)
        self.leases_max = limit.leases_max
        self.look()
        self.limited = limit != UNLIMITED or self.hold != 0

    def look(self) -> None:
        """Finds out how many leases may be out here."""
        self.slots = slots(self.leases_max, self.destination.share)

    def __repr__(self) -> str:
        return f"<Tenant {self.name!r}: {len(self.ready)} ready, {self.held} held, start {self.start:.1f}>"


class Destination:
    """A destination with work or leases."""

    __slots__ = ("asleep_until", "blocked", "bucket", "congestion", "gate", "heap", "held", "hold", "light", "light_ms",
                 "limited", "name", "policy", "prober", "ready", "share", "slots", "special", "subscriptions", "tenants",
                 "usual_ms", "virtual", "weight", "weights")

    def __init__(self, name: bytes, policy: Policy, hold: int, share: float, now_ms: int) -> None:
        self.name = name
        self.tenants: dict[bytes, Tenant] = {}
        self.weights = 0.0  # of all of them
        self.ready = 0  # queues, of all tenants
        self.heap: list[tuple[float, int, Tenant]] = []
        self.virtual = 0.0  # virtual time: start tag of the last pick
        self.held = 0
        self.usual_ms = HOLD_MS_START  # for how long its quicker tenants hold a lease
        self.light: Tenant | None = None  # that was last served while it held little and had nothing more to give
        self.light_ms = 0  # when
        self.gate = OPEN
        self.prober: Pick | None = None
        self.subscriptions: list[Subscription] = []
        self.hold = hold  # as of a tenant
        self.blocked = False
        self.asleep_until = 0
        self.share = share  # of its limits, this node's
        self.slots = 0  # leases that may be out at a time, here; 0: no limit
        self.bucket: Bucket | None = None
        self.congestion = Congestion()
        self.follow(policy, now_ms)

    def follow(self, policy: Policy, now_ms: int) -> None:
        """Takes on a policy."""
        self.policy = policy
        self.weight = policy.weight
        self.bucket = _bucket(self.bucket, policy.limit, self.share, now_ms)
        self.congestion.follow(self._adaptive())
        self.special = bool(policy.tenants) or policy.tenant_limit != UNLIMITED
        self.look()

    def _adaptive(self) -> Adaptive:
        # How the node itself fares says nothing about an endpoint.
        return _NEVER if self.name.startswith(INTERNAL) else self.policy.adaptive

    def look(self) -> None:
        """Finds out whether there is anything to look at before it is picked, and how many leases may be out here."""
        own, adaptive = slots(self.policy.limit.leases_max, self.share), self.congestion.slots(self.share)
        self.slots = min(own, adaptive) if own and adaptive else own or adaptive
        self.limited = self.hold != 0 or self.policy.limit != UNLIMITED or self.slots > 0

    def __repr__(self) -> str:
        return f"<Destination {self.name!r}: {len(self.tenants)} tenants, {self.held} held, gate {self.gate}>"


_ORDINARY = TenantPolicy()
_NEVER = Adaptive(disabled=True)


def _bucket(old: Bucket | None, limit: Limit, share: float, now_ms: int) -> Bucket | None:
    """The bucket for a limit; what is in the old one, at the old rate until now, stays in it."""
    if not limit.per_second:
        return None
    bucket = Bucket(limit, now_ms)
    if old is not None:
        old.available(now_ms, share)
        bucket.tokens = min(bucket.tokens, old.tokens)
        bucket.at_ms = old.at_ms
    return bucket


class Pick:
    """A queue to lease, for a consumer. `charge` or `discard` it."""

    __slots__ = ("bytes", "consumer", "counted", "due_ms", "hold_ms", "messages", "messages_max", "probe", "queue", "share", "since_ms",
                 "subscription", "tenant")

    def __init__(self, queue: bytes, tenant: Tenant, consumer: Consumer, probe: bool, subscription: Subscription,
                 share: Share) -> None:
        self.queue = queue
        self.tenant = tenant
        self.consumer = consumer
        self.probe = probe  # a gate is half open: lease one message only
        self.subscription = subscription
        self.share = share  # its destination's, of the subscription
        self.messages_max = MESSAGES_MAX  # lease no more: limits; at least 1
        # Set by `charge`; there are too many picks to set them twice.
        self.hold_ms: float  # what it was charged for being held
        self.counted: bool  # of a probe: as one of its destination
        self.messages: int
        self.bytes: int
        self.since_ms: int  # when it was granted
        self.due_ms: int  # until when it was expected to be held
