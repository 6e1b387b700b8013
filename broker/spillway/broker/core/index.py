"""What the scheduler chooses from: destinations, their tenants and their queues that may be leased now, in the order of their
start tags; gates, holds and timers that take them out and bring them back.

Only what may be leased stands in a heap. Whatever is closed, held or used up leaves it when its turn comes, and is brought
back by the event that ends this: so it costs O(log n) once, whatever stands behind it. Volatile and pure; who goes next is
`scheduler`'s affair.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from spillway.broker.core.flows import CLOSED, FOR_EVER, HALF_OPEN, OPEN, PROBING, Destination, Share, Tenant
from spillway.broker.core.policy import Policy
from spillway.broker.core.subscription import Consumer, Subscription

_PLAIN = Policy()
_PASSABLE = (OPEN, HALF_OPEN)
LINGER_MS = 60_000  # so long after a lease of it came back, a flow that has nothing is still reckoned with
LINGERING_MAX = 32  # of a destination's tenants, and of a subscription's destinations; among more some are always there


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a destination or a tenant waits for; see `Scheduler.waiting`."""

    ready: int = 0  # queues that may be leased
    held: int = 0  # leases out
    hold_until: int = 0  # an operator's or another node's gate: 0 open, -1 for ever, else closed until that ms
    gate: int = OPEN  # what THROTTLED and DOWN did, see `set_gate`
    rate_wait_until_ms: int = 0  # when its rate limit has room again; 0: it has
    leases_max: int = 0  # leases that may be out at a time; 0: unlimited
    leases_full: bool = False  # that is what stops it
    adaptive: int = 0  # of these limits the one that follows how the destination fares, or is pinned; 0: none
    consumers: int = 0  # that lease from the destination
    credit: int = 0  # messages that they can take


class Index:
    """See the module. Time comes in as an argument; nothing here reads a clock."""

    def __init__(self, policy_of: Callable[[bytes], Policy] = lambda name: _PLAIN) -> None:
        self._policy_of = policy_of  # a destination's policy, by its name
        self._holds: dict[bytes, int] = {}  # scope -> until, of operators' gates
        self._node_shares: dict[bytes, float] = {}  # destination -> part of its limits that is this node's
        self._sleepers: list[tuple[int, int, Destination | Tenant]] = []  # (due ms, order, who)
        self.destinations: dict[bytes, Destination] = {}
        self.subscriptions: dict[frozenset[str], Subscription] = {}
        self._order = 0  # ties go to whoever came first
        self._now_ms = 0  # the last time that was told

    # -- queues --------------------------------------------------------------------------------------------------

    def add(self, queue: bytes) -> None:
        """A queue may be leased. It goes behind the others of its tenant."""
        cut = queue.index(b"\0")
        name = queue[:cut]
        destination = self.destinations.get(name)
        if destination is None:
            destination = self._destination(name)
        tenant_name = queue[cut + 1:queue.index(b"\0", cut + 1)]
        tenant = destination.tenants.get(tenant_name)
        if tenant is None:
            tenant = self._tenant(destination, tenant_name)
        tenant.ready.append(queue)
        destination.ready += 1
        if not tenant.queued and not tenant.blocked and tenant.gate in _PASSABLE:
            self._queue_tenant(tenant)

    def _destination(self, name: bytes) -> Destination:
        destination = self.destinations.get(name)
        if destination is None:
            destination = self.destinations[name] = Destination(
                name, self._policy_of(name), self._holds.get(name, 0), self._node_shares.get(name, 1.0), self._now_ms)
            destination.subscriptions = [s for s in self.subscriptions.values() if s.matches(name)]
        return destination

    def _tenant(self, destination: Destination, name: bytes) -> Tenant:
        tenant = destination.tenants.get(name)
        if tenant is None:
            hold = self._holds.get(destination.name + b"\0" + name, 0) if self._holds else 0
            tenant = destination.tenants[name] = Tenant(name, destination, hold, self._now_ms)
            destination.weights += tenant.weight
        return tenant

    def _queue_tenant(self, tenant: Tenant) -> None:
        destination = tenant.destination
        if tenant.start < destination.virtual:
            tenant.start = destination.virtual
        tenant.queued = True
        self._order += 1
        heappush(destination.heap, (tenant.start, self._order, tenant))
        if destination.gate != CLOSED and destination.gate != PROBING and not destination.blocked:
            for subscription in destination.subscriptions:
                if destination not in subscription.queued:
                    self._queue_destination(destination, subscription)

    def _queue_destination(self, destination: Destination, subscription: Subscription) -> None:
        share = subscription.shares.get(destination)
        if share is None:
            share = subscription.shares[destination] = Share()
            subscription.weights += destination.weight
        if share.start < subscription.virtual:
            share.start = subscription.virtual
        subscription.queued.add(destination)
        self._order += 1
        heappush(subscription.heap, (share.start, self._order, destination))

    # -- consumers -----------------------------------------------------------------------------------------------

    def subscribe(self, consumer: Consumer, patterns: Iterable[str], internal: bool = False) -> None:
        """Adds a consumer, without credit. An internal one, of the node itself, gives plain names, among them such as no
        other consumer can have, and says nothing about how a destination fares."""
        key = frozenset("\0" + p for p in patterns) if internal else frozenset(patterns)
        subscription = self.subscriptions.get(key)
        if subscription is None:
            subscription = self.subscriptions[key] = Subscription(key, internal)
            for destination in self.destinations.values():
                if subscription.matches(destination.name):
                    destination.subscriptions.append(subscription)
                    if destination.heap and destination.gate in (OPEN, HALF_OPEN) and not destination.blocked:
                        self._queue_destination(destination, subscription)
        subscription.consumers.add(consumer)
        consumer.subscription = subscription

    def unsubscribe(self, consumer: Consumer) -> None:
        """Removes a consumer; its leases run on."""
        subscription = consumer.subscription
        if subscription is None:
            return
        consumer.subscription = None
        subscription.free -= consumer.messages
        consumer.messages = 0
        subscription.consumers.discard(consumer)
        if consumer.active:
            consumer.active = False
            subscription.round.remove(consumer)
        if not subscription.consumers:
            del self.subscriptions[subscription.patterns]
            for destination in self.destinations.values():
                if subscription in destination.subscriptions:
                    destination.subscriptions.remove(subscription)

    def credit(self, consumer: Consumer, messages: int, size: int) -> None:
        """Adds to a consumer's credit; negative amounts take back."""
        consumer.messages += messages
        consumer.bytes += size
        subscription = consumer.subscription
        if subscription is None:
            return
        subscription.free += messages
        if consumer.messages > 0 and consumer.bytes > 0 and not consumer.active:
            consumer.active = True
            subscription.round.append(consumer)
        if subscription.probers:
            self._let_probe(subscription)

    # -- policies, holds and timers ---------------------------------------------------------------------------------

    def policy_changed(self, name: bytes) -> None:
        """Takes on a destination's new policy, at once."""
        destination = self.destinations.get(name)
        if destination is None:
            return
        for subscription in destination.subscriptions:
            if destination in subscription.shares:
                subscription.weights -= destination.weight
        destination.follow(self._policy_of(name), self._now_ms)
        for subscription in destination.subscriptions:
            if destination in subscription.shares:
                subscription.weights += destination.weight
        destination.weights = 0.0
        for tenant in destination.tenants.values():
            tenant.follow(self._now_ms)
            destination.weights += tenant.weight
            self._unblock(tenant)
        self._unblock(destination)

    def set_share(self, name: bytes, share: float) -> None:
        """Which part of a destination's limits, and of its tenants', is this node's: above 0, at most 1."""
        assert 0 < share <= 1, share
        if self._node_shares.get(name, 1.0) == share:
            return
        if share == 1.0:
            del self._node_shares[name]
        else:
            self._node_shares[name] = share
        destination = self.destinations.get(name)
        if destination is not None:
            for who in (destination, *(destination.tenants.values() if destination.special else ())):
                if who.bucket is not None:
                    who.bucket.available(self._now_ms, destination.share)  # what came in until now came with the old one
            destination.share = share
            destination.look()
            self._unblock(destination)
            if destination.special:
                for tenant in destination.tenants.values():
                    tenant.look()
                    if tenant.blocked:
                        self._unblock(tenant)

    def hold(self, scope: bytes, until_ms: int) -> None:
        """Closes the operators' gate of a destination (`name`) or tenant (`name NUL tenant`) until a time, or with -1 until it
        is opened, or opens it with 0. It closes independently of `set_gate`."""
        if until_ms:
            self._holds[scope] = until_ms
        elif self._holds.pop(scope, 0) == 0:
            return
        name, separator, tenant_name = scope.partition(b"\0")
        destination = self.destinations.get(name)
        if destination is None:
            return
        if separator:
            tenant = destination.tenants.get(tenant_name)
            if tenant is not None:
                tenant.hold = until_ms
                tenant.follow(self._now_ms)
                self._unblock(tenant)
            return
        destination.hold = until_ms
        destination.look()
        self._unblock(destination)

    def wake_due(self, now_ms: int) -> None:
        """Brings back what a timer stands for: refilled buckets, holds that are over."""
        self._now_ms = max(self._now_ms, now_ms)
        sleepers = self._sleepers
        while sleepers and sleepers[0][0] <= now_ms:
            due, _, who = heappop(sleepers)
            if who.asleep_until == due:
                who.asleep_until = 0
                self._unblock(who)

    def next_wake_ms(self) -> int | None:
        """When `wake_due` has something to do next."""
        return self._sleepers[0][0] if self._sleepers else None

    def _sleep(self, who: Destination | Tenant, until: int) -> None:
        if not who.asleep_until or until < who.asleep_until:
            who.asleep_until = until
            self._order += 1
            heappush(self._sleepers, (until, self._order, who))

    def _unblock(self, who: Destination | Tenant) -> None:
        """Asked again when its turn comes."""
        who.blocked = False
        if isinstance(who, Tenant):
            self._wake_tenant(who)
        else:
            self._wake(who)

    # -- gates ---------------------------------------------------------------------------------------------------

    def set_gate(self, scope: bytes, state: int) -> None:
        """Opens, half-opens or closes the gate of a destination (`name`) or tenant (`name NUL tenant`)."""
        name, separator, tenant_name = scope.partition(b"\0")
        destination = self._destination(name)
        if separator:
            tenant = self._tenant(destination, tenant_name)
            tenant.gate = state
            tenant.prober = None
            self._wake_tenant(tenant)
            return
        destination.gate = state
        destination.prober = None
        self._wake(destination)

    def _wake_tenant(self, tenant: Tenant) -> None:
        if tenant.gate in (OPEN, HALF_OPEN) and tenant.ready and not tenant.queued and not tenant.blocked:
            self._queue_tenant(tenant)
        self._wake(tenant.destination)

    def _wake(self, destination: Destination) -> None:
        if destination.heap and destination.gate in (OPEN, HALF_OPEN) and not destination.blocked:
            for subscription in destination.subscriptions:
                if destination not in subscription.queued:
                    self._queue_destination(destination, subscription)

    def _let_probe(self, subscription: Subscription) -> bool:
        """Brings back a destination that waits with its probe, if there is one and there are not enough probes. Whatever makes
        room for one does this at once: nobody asks a subscription whose heap is empty."""
        probers = subscription.probers
        while probers and not subscription.probes_enough():
            destination = next(iter(probers))
            del probers[destination]
            if destination.gate == HALF_OPEN and destination.heap and not destination.blocked and (
                    destination not in subscription.queued):
                self._queue_destination(destination, subscription)
                return True
        return False

    def gate(self, scope: bytes) -> int:
        """The state of a gate."""
        name, separator, tenant_name = scope.partition(b"\0")
        destination = self.destinations.get(name)
        if destination is None:
            return OPEN
        if not separator:
            return destination.gate
        tenant = destination.tenants.get(tenant_name)
        return OPEN if tenant is None else tenant.gate

    # -- what it looks like --------------------------------------------------------------------------------------

    def demand(self, name: bytes) -> float:
        """Leases of a destination that could be out here now, were there no limits."""
        destination = self.destinations.get(name)
        return 0.0 if destination is None else float(destination.held + destination.ready)

    def leases_limit(self, name: bytes) -> int:
        """Leases of a destination that may be out at a time here; 0: no limit."""
        destination = self.destinations.get(name)
        return 0 if destination is None else destination.slots

    def waiting(self, scope: bytes) -> Waiting:
        """What a destination (`name`) or a tenant (`name NUL tenant`) waits for."""
        name, separator, tenant_name = scope.partition(b"\0")
        hold = self._holds.get(scope, 0)
        if 0 < hold <= self._now_ms:
            hold = 0
        destination = self.destinations.get(name)
        if destination is None:
            matching = [s for s in self.subscriptions.values() if s.matches(name)]
            return Waiting(hold_until=hold, consumers=sum(len(s.consumers) for s in matching), credit=sum(s.free for s in matching))
        consumers = sum(len(s.consumers) for s in destination.subscriptions)
        credit = sum(s.free for s in destination.subscriptions)
        who: Destination | Tenant = destination
        ready, adaptive = destination.ready, destination.congestion.slots(destination.share)
        if separator:
            tenant = destination.tenants.get(tenant_name)
            if tenant is None:
                return Waiting(hold_until=hold, consumers=consumers, credit=credit)
            who, ready, adaptive = tenant, len(tenant.ready), 0
        bucket = who.bucket
        dry = bucket is not None and not bucket.available(self._now_ms, destination.share)
        return Waiting(ready, who.held, hold, who.gate, bucket.ready_ms(destination.share) if dry and bucket is not None else 0,
                       who.slots, 0 < who.slots <= who.held, adaptive, consumers, credit)

    # -- upkeep --------------------------------------------------------------------------------------------------

    def sweep(self, now_ms: int = 0) -> None:
        """Forgets tenants and destinations that have nothing, hold nothing and owe nothing. Call now and then. Some that come
        and go stay known for a while: were they forgotten whenever they have nothing for a moment, flows whose leases hang
        would take their share in it."""
        now = self._now_ms = max(self._now_ms, now_ms)
        for destination in self.destinations.values():
            for _, _, tenant in destination.heap:
                tenant.queued = bool(tenant.ready)
            destination.heap = [e for e in destination.heap if e[2].queued]  # picks tidy up too, while there is credit
            heapify(destination.heap)
            lingering = 0 if destination.held or destination.ready else LINGERING_MAX  # for whom, if nobody is there?
            for tenant in list(destination.tenants.values()):
                if not tenant.ready and not tenant.held and tenant.gate == OPEN and (
                        tenant.start <= destination.virtual or not destination.heap) and (
                        tenant.bucket is None or tenant.bucket.is_full(now, destination.share)):
                    if lingering < LINGERING_MAX and tenant.proven and now - tenant.voted_ms < LINGER_MS:
                        lingering += 1
                        continue
                    del destination.tenants[tenant.name]
                    destination.weights -= tenant.weight
            if not destination.tenants:
                destination.weights = 0.0  # what rounding left behind
        for subscription in self.subscriptions.values():
            subscription.heap = [e for e in subscription.heap if e[2].heap]
            heapify(subscription.heap)
            subscription.queued = {e[2] for e in subscription.heap}
            subscription.probers = {d: None for d in subscription.probers if d.gate == HALF_OPEN and d.heap}
            if not subscription.shares:
                subscription.weights = 0.0  # what rounding left behind
        guests: Counter[Subscription] = Counter()  # destinations that stay for a while
        for destination in list(self.destinations.values()):
            if not destination.tenants and not destination.held and destination.gate == OPEN and (
                    destination.bucket is None or destination.bucket.is_full(now, destination.share)) and (
                    destination.congestion.idle(now)) and not any(
                    s.heap and destination in s.shares and s.shares[destination].start > s.virtual
                    for s in destination.subscriptions) and not _lingers(destination, guests, now):
                del self.destinations[destination.name]
                for subscription in destination.subscriptions:
                    if subscription.shares.pop(destination, None) is not None:
                        subscription.weights -= destination.weight
        self._holds = {scope: until for scope, until in self._holds.items() if until == FOR_EVER or until > now}
        self._sleepers = [s for s in self._sleepers if s[2].asleep_until == s[0]]
        heapify(self._sleepers)

    def remove_shard(self, belongs: set[int], shard_of: Callable[[bytes], int]) -> None:
        """Drops the queues of shards that the node no longer leads. Linear; leadership changes are rare."""
        for destination in self.destinations.values():
            for tenant in destination.tenants.values():
                tenant.ready.retain(lambda queue: shard_of(queue) not in belongs)
            destination.ready = sum(len(tenant.ready) for tenant in destination.tenants.values())


def _lingers(destination: Destination, guests: Counter[Subscription], now: int) -> bool:
    for subscription in destination.subscriptions:
        share = subscription.shares.get(destination)
        if share is not None and share.proven and now - share.voted_ms < LINGER_MS and (
                len(subscription.shares) > 1 and guests[subscription] < LINGERING_MAX):
            guests[subscription] += 1
            return True
    return False
