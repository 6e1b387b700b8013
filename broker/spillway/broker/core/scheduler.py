"""Which queue next: hierarchical start-time fair queueing over destination -> tenant -> queue.

Pure and volatile: it lives on the node that leads the shards and is rebuilt from them. One scheduler serves all
shards that the node leads, so fairness does not depend on how queues hash.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): each flow has a virtual start tag; the smallest goes
next and its tag advances by cost / weight; a flow that returns from idleness starts at the current virtual time,
with neither credit nor debt. Cost is what is scarce: the time that a consumer is held and bytes. It is estimated at
the pick and corrected at the settlement. Between the queues of one tenant plain round robin by bounded runs is
enough (as in deficit round robin, Shreedhar and Varghese 1996): it takes two bytes beside the name of a waiting queue and O(1).

Only queues that may be leased stand in the index. Closed gates (a parked destination or tenant) cost O(1) whatever
stands behind them. The index may hold a queue that has changed since it was added; whoever picks checks it and
tells (`charge` or `discard`), so nothing is ever searched for and removed.

No tenant may hold all credit while others are about: consumers cannot be preempted, so a burst that took every slot would
make the next tenant wait for a slot to come free, and slots that were taken together come free together. So the last
eighth of the credit is kept from tenants that hold more than an eighth of it already, as long as some tenant of the
destination that comes and goes was served within a second. Alone, or among others with a backlog, a tenant gets everything.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

from spillway.broker.core.names import NameQueue

COST_PER_MESSAGE_MS = 0.05  # what a message costs a consumer beside its bytes and time
COST_PER_BYTE_MS = 1 / 65_536  # 64 KiB weigh as much as a millisecond of a consumer's time
HOLD_MS_START = 1.0  # first guess of how long a lease is held
HOLD_GAIN = 0.2  # weight of a new observation in the moving average
HOLD_MS_MAX = 3_600_000.0
HEADROOM = 8  # 1/8 of a subscription's credit is kept from tenants that hold more than 1/8 of it, while others are about
LIGHT_MS = 1000  # a light tenant's lease keeps the headroom for this long

OPEN, CLOSED, HALF_OPEN, PROBING = range(4)  # states of a gate


class Tenant:
    """A tenant inside a destination."""

    __slots__ = ("destination", "gate", "held", "hold_ms", "name", "prober", "queued", "ready", "start", "taken",
                 "weight")

    def __init__(self, name: bytes, destination: Destination) -> None:
        self.name = name
        self.destination = destination
        self.ready = NameQueue()  # queues, round robin
        self.start = 0.0  # virtual start tag of its next lease
        self.weight = 1.0
        self.held = 0  # leases out
        self.taken = 0  # messages of these leases
        self.hold_ms = destination.hold_ms
        self.queued = False  # stands in destination.heap
        self.gate = OPEN
        self.prober: Pick | None = None  # what the gate lets through while it is PROBING

    def __repr__(self) -> str:
        return f"<Tenant {self.name!r}: {len(self.ready)} ready, {self.held} held, start {self.start:.1f}>"


class Destination:
    """A destination with work or leases."""

    __slots__ = ("gate", "heap", "held", "hold_ms", "light", "light_ms", "name", "prober", "subscriptions", "tenants", "virtual",
                 "weight")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.tenants: dict[bytes, Tenant] = {}
        self.heap: list[tuple[float, int, Tenant]] = []
        self.virtual = 0.0  # virtual time: start tag of the last pick
        self.weight = 1.0
        self.held = 0
        self.hold_ms = HOLD_MS_START
        self.light: Tenant | None = None  # that was last served while it held little and had nothing more to give
        self.light_ms = 0  # when
        self.gate = OPEN
        self.prober: Pick | None = None
        self.subscriptions: list[Subscription] = []

    def __repr__(self) -> str:
        return f"<Destination {self.name!r}: {len(self.tenants)} tenants, {self.held} held, gate {self.gate}>"


class Consumer:
    """One open Lease stream: what it wants and how much more it can take."""

    __slots__ = ("active", "bytes", "lease_ms", "messages", "name", "run_messages_max", "session", "sink", "subscription")

    def __init__(self, name: str, run_messages_max: int = 0, lease_ms: int = 0, session: str = "") -> None:
        self.name = name  # for people
        self.session = session  # names it across reconnects
        self.run_messages_max = run_messages_max  # 0: the destination's policy
        self.lease_ms = lease_ms  # 0: the destination's policy
        self.sink: object = None  # where its runs go
        self.messages = 0  # credit left; may be negative after a withdrawal raced with a grant
        self.bytes = 0
        self.active = False  # stands in its subscription's round
        self.subscription: Subscription | None = None

    def __repr__(self) -> str:
        return f"<Consumer {self.name!r}: credit {self.messages} messages, {self.bytes} bytes>"


class Subscription:
    """A set of destination patterns, shared by the consumers that asked for exactly this set. It has a virtual time
    of its own, and so each destination a start tag in each subscription: were the tag shared, a destination that one
    subscription has served for long would wait in another, younger one until that has caught up."""

    __slots__ = ("consumers", "free", "globs", "heap", "names", "patterns", "queued", "round", "starts", "taken", "virtual")

    def __init__(self, patterns: frozenset[str]) -> None:
        self.patterns = patterns
        # Not a regular expression: with many stars, one that backtracks would never come to an end.
        self.globs = [tuple(part.encode() for part in p.split("*")) for p in sorted(patterns) if "*" in p]
        self.names = frozenset(p.encode() for p in patterns if "*" not in p)
        self.consumers: set[Consumer] = set()
        self.round: deque[Consumer] = deque()  # those with credit
        self.free = 0  # messages of credit that its consumers have left
        self.taken = 0  # messages out
        self.heap: list[tuple[float, int, Destination]] = []
        self.queued: set[Destination] = set()
        self.starts: dict[Destination, float] = {}  # virtual start tags of their next leases
        self.virtual = 0.0

    def matches(self, destination: bytes) -> bool:
        """Whether a destination's name fits one of the patterns."""
        return destination in self.names or any(_fits(parts, destination) for parts in self.globs)


def _fits(parts: tuple[bytes, ...], name: bytes) -> bool:
    """Whether a name is these parts in order with anything between them. Taking each part where it first occurs leaves the
    most to those behind it, so one pass decides."""
    first, *middle, last = parts
    end = len(name) - len(last)
    at = len(first)
    if end < at or not name.startswith(first) or not name.endswith(last):
        return False
    for part in middle:
        at = name.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


class Pick:
    """A queue to lease, for a consumer. `charge` or `discard` it."""

    __slots__ = ("bytes", "consumer", "cost", "messages", "probe", "queue", "since_ms", "subscription", "tenant")

    def __init__(self, queue: bytes, tenant: Tenant, consumer: Consumer, probe: bool, subscription: Subscription) -> None:
        self.queue = queue
        self.tenant = tenant
        self.consumer = consumer
        self.probe = probe  # a gate is half open: lease one message only
        self.subscription = subscription
        self.cost = 0.0
        self.messages = 0
        self.bytes = 0
        self.since_ms = 0


class Scheduler:
    """See the module. Time comes in as an argument; nothing here reads a clock."""

    def __init__(self) -> None:
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
            tenant = destination.tenants[tenant_name] = Tenant(tenant_name, destination)
        tenant.ready.append(queue)
        if not tenant.queued and tenant.gate != CLOSED and tenant.gate != PROBING:
            self._queue_tenant(tenant)

    def _destination(self, name: bytes) -> Destination:
        destination = self.destinations.get(name)
        if destination is None:
            destination = self.destinations[name] = Destination(name)
            destination.subscriptions = [s for s in self.subscriptions.values() if s.matches(name)]
        return destination

    def _tenant(self, destination: Destination, name: bytes) -> Tenant:
        tenant = destination.tenants.get(name)
        if tenant is None:
            tenant = destination.tenants[name] = Tenant(name, destination)
        return tenant

    def _queue_tenant(self, tenant: Tenant) -> None:
        destination = tenant.destination
        if tenant.start < destination.virtual:
            tenant.start = destination.virtual
        tenant.queued = True
        self._order += 1
        heappush(destination.heap, (tenant.start, self._order, tenant))
        if destination.gate != CLOSED and destination.gate != PROBING:
            for subscription in destination.subscriptions:
                if destination not in subscription.queued:
                    self._queue_destination(destination, subscription)

    def _queue_destination(self, destination: Destination, subscription: Subscription) -> None:
        start = subscription.starts[destination] = max(subscription.virtual, subscription.starts.get(destination, 0.0))
        subscription.queued.add(destination)
        self._order += 1
        heappush(subscription.heap, (start, self._order, destination))

    # -- consumers -----------------------------------------------------------------------------------------------

    def subscribe(self, consumer: Consumer, patterns: Iterable[str]) -> None:
        """Adds a consumer, without credit."""
        key = frozenset(patterns)
        subscription = self.subscriptions.get(key)
        if subscription is None:
            subscription = self.subscriptions[key] = Subscription(key)
            for destination in self.destinations.values():
                if subscription.matches(destination.name):
                    destination.subscriptions.append(subscription)
                    if destination.heap and destination.gate in (OPEN, HALF_OPEN):
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
        if consumer.subscription is not None:
            consumer.subscription.free += messages
        if consumer.messages > 0 and consumer.bytes > 0 and not consumer.active and consumer.subscription is not None:
            consumer.active = True
            consumer.subscription.round.append(consumer)

    # -- picking -------------------------------------------------------------------------------------------------

    def pick(self, subscription: Subscription) -> Pick | None:
        """The next queue for the next consumer of a subscription, or None if either is lacking. The caller must
        answer with `charge` or `discard` before the next pick."""
        round_ = subscription.round
        while round_:
            consumer = round_[0]
            if consumer.messages > 0 and consumer.bytes > 0:
                break
            consumer.active = False
            round_.popleft()
        else:
            return None
        heap = subscription.heap
        ceiling = -1  # if credit is scarce, what a tenant may hold and still get some
        share = (subscription.free + subscription.taken) // HEADROOM
        if subscription.free <= share:
            ceiling = share
        restrained: list[tuple[float, int, Destination]] = []
        found = None
        while heap:
            tag, _, destination = heap[0]
            if destination.gate != CLOSED and destination.gate != PROBING:
                start = subscription.starts[destination]
                if tag < start:  # it was charged since
                    heappop(heap)
                    self._order += 1
                    heappush(heap, (start, self._order, destination))
                    continue
                tenant = self._pick_tenant(destination, ceiling)
                if tenant is not None:
                    subscription.virtual = max(subscription.virtual, tag)
                    probe = destination.gate == HALF_OPEN or tenant.gate == HALF_OPEN
                    found = Pick(tenant.ready.popleft(), tenant, consumer, probe, subscription)
                    break
                if destination.heap:  # its turn is a tenant's that must leave the last credit to others: asked again next time
                    restrained.append(heappop(heap))
                    continue
            heappop(heap)
            subscription.queued.discard(destination)
        for entry in restrained:
            heappush(heap, entry)
        return found

    def _pick_tenant(self, destination: Destination, ceiling: int) -> Tenant | None:
        heap = destination.heap
        if ceiling >= 0 and (destination.light is None or self._now_ms - destination.light_ms > LIGHT_MS):
            ceiling = -1
        while heap:
            tag, _, tenant = heap[0]
            if tenant.ready and tenant.gate != CLOSED and tenant.gate != PROBING:
                if tag >= tenant.start:
                    if 0 <= ceiling < tenant.taken and destination.light is not tenant:
                        return None
                    destination.virtual = max(destination.virtual, tag)
                    return tenant
                heappop(heap)
                self._order += 1
                heappush(heap, (tenant.start, self._order, tenant))
            else:
                heappop(heap)
                tenant.queued = False
        return None

    def discard(self, pick: Pick) -> None:
        """The picked queue cannot be leased now (it changed since it was added); it has left the index."""

    def charge(self, pick: Pick, messages: int, size: int, now_ms: int) -> None:
        """The picked queue is being leased: takes the consumer's credit and charges tenant and destination."""
        tenant, consumer = pick.tenant, pick.consumer
        destination = tenant.destination
        consumer.messages -= messages
        consumer.bytes -= size
        subscription = pick.subscription
        subscription.round.rotate(-1)
        subscription.free -= messages
        subscription.taken += messages
        tenant.taken += messages
        self._now_ms = now_ms
        if not tenant.ready and tenant.taken <= (subscription.free + subscription.taken) // HEADROOM:
            destination.light = tenant
            destination.light_ms = now_ms
        pick.messages = messages
        pick.bytes = size
        pick.since_ms = now_ms
        pick.cost = tenant.hold_ms + messages * COST_PER_MESSAGE_MS + size * COST_PER_BYTE_MS
        tenant.held += 1
        destination.held += 1
        tenant.start += pick.cost / tenant.weight
        pick.subscription.starts[destination] += pick.cost / destination.weight
        if pick.probe:
            if destination.gate == HALF_OPEN:
                destination.gate = PROBING
                destination.prober = pick
            if tenant.gate == HALF_OPEN:
                tenant.gate = PROBING
                tenant.prober = pick

    def settled(self, pick: Pick, now_ms: int) -> None:
        """The lease of a charged pick is over: corrects the estimate by what it really cost."""
        tenant = pick.tenant
        destination = tenant.destination
        tenant.held -= 1
        tenant.taken -= pick.messages
        pick.subscription.taken -= pick.messages
        self._now_ms = now_ms
        destination.held -= 1
        held_ms = min(max(0.0, float(now_ms - pick.since_ms)), HOLD_MS_MAX)
        cost = held_ms + pick.messages * COST_PER_MESSAGE_MS + pick.bytes * COST_PER_BYTE_MS
        # A lower tag than the one in the heap is only honoured after the tenant's next turn, but it is not lost:
        # only who returns from idleness is set to the virtual time.
        tenant.start += (cost - pick.cost) / tenant.weight
        pick.subscription.starts[destination] += (cost - pick.cost) / destination.weight
        tenant.hold_ms += HOLD_GAIN * (held_ms - tenant.hold_ms)
        destination.hold_ms += HOLD_GAIN * (held_ms - destination.hold_ms)
        if pick.probe:  # unless the gate's owner knows better by now, the next probe may follow
            if destination.prober is pick:
                destination.prober = None
                destination.gate = HALF_OPEN
            if tenant.prober is pick:
                tenant.prober = None
                tenant.gate = HALF_OPEN
            self._wake_tenant(tenant)

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
        if tenant.gate in (OPEN, HALF_OPEN) and tenant.ready and not tenant.queued:
            self._queue_tenant(tenant)
        self._wake(tenant.destination)

    def _wake(self, destination: Destination) -> None:
        if destination.heap and destination.gate in (OPEN, HALF_OPEN):
            for subscription in destination.subscriptions:
                if destination not in subscription.queued:
                    self._queue_destination(destination, subscription)

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

    # -- upkeep --------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Forgets tenants and destinations that have nothing, hold nothing and owe nothing. Call now and then."""
        for destination in self.destinations.values():
            for _, _, tenant in destination.heap:
                tenant.queued = bool(tenant.ready)
            destination.heap = [e for e in destination.heap if e[2].queued]  # picks tidy up too, while there is credit
            heapify(destination.heap)
            for tenant in list(destination.tenants.values()):
                if not tenant.ready and not tenant.held and tenant.gate == OPEN and (
                        tenant.start <= destination.virtual or not destination.heap):
                    del destination.tenants[tenant.name]
        for subscription in self.subscriptions.values():
            subscription.heap = [e for e in subscription.heap if e[2].heap]
            heapify(subscription.heap)
            subscription.queued = {e[2] for e in subscription.heap}
        for destination in list(self.destinations.values()):
            if not destination.tenants and not destination.held and destination.gate == OPEN and not any(
                    s.heap and s.starts.get(destination, 0.0) > s.virtual for s in destination.subscriptions):
                del self.destinations[destination.name]
                for subscription in destination.subscriptions:
                    subscription.starts.pop(destination, None)

    def remove_shard(self, belongs: set[int], shard_of: Callable[[bytes], int]) -> None:
        """Drops the queues of shards that the node no longer leads. Linear; leadership changes are rare."""
        for destination in self.destinations.values():
            for tenant in destination.tenants.values():
                tenant.ready.retain(lambda queue: shard_of(queue) not in belongs)

