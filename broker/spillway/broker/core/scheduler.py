"""Which queue next: hierarchical start-time fair queueing over destination -> tenant -> queue.

Pure and volatile: it lives on the node that leads the shards and is rebuilt from them. One scheduler serves all
shards that the node leads, so fairness does not depend on how queues hash.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): each flow has a virtual start tag; the smallest goes
next and its tag advances by cost / weight; a flow that returns from idleness starts at the current virtual time,
with neither credit nor debt. Cost is what is scarce: the time that a consumer is held and bytes. It is estimated at
the pick and corrected at the settlement. Between the queues of one tenant plain round robin by bounded runs is
enough (as in deficit round robin, Shreedhar and Varghese 1996): it takes two bytes beside the name of a waiting queue and O(1).

The index (`index`) may hold a queue that has changed since it was added; whoever picks checks it and tells (`charge` or
`discard`), so nothing is ever searched for and removed.

Consumers cannot be preempted: what is taken stays out until its lease ends. So a fair order of turns is not enough, and
four rules say what a flow leaves to others while it has its turn alone:

- A lease that lasts longer than was charged for is charged while it lasts, so whoever has such leases is behind the others
  now, and not when they end.
- The last eighth of the credit is kept from tenants that hold more than an eighth of it already, as long as some tenant of
  the destination that comes and goes was served within a second. So a burst does not make the next one wait for its slots.
- Flows whose leases hang (overdue, or usually held, for ten times as long as is usual and two seconds), and those none of
  whose leases has come back yet, get more than their weighted share of the credit only while nobody else waits and as much
  stays free as the quick leases lately used, with room for chance, and an eighth: tenants among those of their destination,
  destinations among those of their subscription. What is usual is what the quicker flows take: each has a vote, not each
  lease, as leases that hang end together. So leases that hang do not pile up in the moments in which the others have nothing to give.
- Probes of destinations that were down hold no more than an eighth of the credit, or as much as is free beside them. So those
  of many, that take long to fail, do not keep the others waiting.

Guaranteed, then: the others keep their weighted share of the credit (less one lease, as leases are whole) from tenants whose
leases hang, and are not kept waiting by those when they want less than that, at random moments. Not guaranteed: a tenant
whose leases have come back quickly, and then hang, may take more within two seconds, in moments in which the others have
nothing to give; and whoever is alone, or among others that want little, is not held back for those who may come. Both last
no longer than the leases.

Limits (messages a second, leases at a time, and the one that follows how a destination fares) are looked at when a
destination's or tenant's turn comes: if there is nothing left, it leaves the index until a timer or the end of a lease
brings it back. So what is limited costs O(log n) once, whatever stands behind it, and never hides what is not.
"""
from __future__ import annotations

from heapq import heappop, heappush, heapreplace
from math import sqrt

from spillway.broker.core.flows import (
    CLOSED,
    FOR_EVER,
    HALF_OPEN,
    HOLD_MS_START,
    MESSAGES_MAX,
    OPEN,
    PROBING,
    Destination,
    Pick,
    Share,
    Tenant,
)
from spillway.broker.core.index import Index, Waiting
from spillway.broker.core.subscription import USE_MS, USUAL_MS_MIN, Consumer, Subscription

COST_PER_MESSAGE_MS = 0.05  # what a message costs a consumer beside its bytes and time
COST_PER_BYTE_MS = 1 / 65_536  # 64 KiB weigh as much as a millisecond of a consumer's time
HOLD_GAIN = 0.2  # weight of a new observation in the moving average
HOLD_MS_MAX = 3_600_000
HEADROOM = 8  # 1/8 of a subscription's credit is kept from tenants that hold more than 1/8 of it, while others are about
LIGHT_MS = 1000  # a light tenant's lease keeps the headroom for this long
HANG_TIMES = 10  # leases hang once they are held so many times as long as is usual, at least as this
VOTE_MS = 1000  # how often a flow has a vote on what is usual: however many of its leases end at once
# How far a vote moves the estimate. It comes to rest where 27 votes for longer stand against one for shorter: were it a median,
# hanging would be usual where most flows hang, and at the latest when the leases of all of these expire at once.
USUAL_UP, USUAL_DOWN = 1.01, 1.3
_PASSABLE = (OPEN, HALF_OPEN)
USE_MIN = 0.01  # messages of credit; who uses less on average needs nothing kept free
NAP_MS = 100  # after which a flow whose leases hang is looked at again


class Scheduler(Index):
    """See the module. Time comes in as an argument; nothing here reads a clock."""

    # -- picking -------------------------------------------------------------------------------------------------

    def pick(self, subscription: Subscription, now_ms: int) -> Pick | None:
        """The next queue for the next consumer of a subscription, or None if either is lacking. The caller must
        answer with `charge` or `discard` before the next pick, and need not ask while the subscription's heap is empty."""
        round_ = subscription.round
        while round_:
            consumer = round_[0]
            if consumer.messages > 0 and consumer.bytes > 0:
                break
            consumer.active = False
            round_.popleft()
        else:
            return None
        self._now_ms = now_ms
        heap = subscription.heap
        total = subscription.free + subscription.taken
        ceiling = total // HEADROOM  # if credit is scarce, what a tenant may hold and still get some
        if subscription.free > ceiling:
            ceiling = -1
        restrained: list[tuple[float, int, Destination]] = []
        found = None
        if subscription.probers:
            self._let_probe(subscription)
        while heap or self._let_probe(subscription):
            tag, _, destination = heap[0]
            gate = destination.gate
            if gate == HALF_OPEN and subscription.probes_enough():
                subscription.probers[destination] = None
            elif gate in _PASSABLE and not (destination.limited and self._is_full(destination, destination.share)):
                share = subscription.shares[destination]
                start = share.start
                overdue = share.held * now_ms - share.due_sum
                if overdue > 0:
                    start += overdue / destination.weight
                if tag < start:  # it was charged since
                    self._order += 1
                    heapreplace(heap, (start, self._order, destination))
                    continue
                if share.taken * subscription.weights >= total * destination.weight and len(subscription.shares) > 1 and (
                        self._hangs(share, subscription.usual_ms, len(heap) > 1, subscription)):
                    self._sleep(destination, now_ms + NAP_MS)
                else:
                    tenant = self._pick_tenant(destination, subscription, ceiling, total)
                    if tenant is not None:
                        if tag > subscription.virtual:
                            subscription.virtual = tag
                        destination.ready -= 1
                        found = Pick(tenant.ready.popleft(), tenant, consumer,
                                     gate == HALF_OPEN or tenant.gate == HALF_OPEN, subscription, share)
                        if destination.bucket is not None:
                            found.messages_max = destination.bucket.whole()
                        if tenant.bucket is not None:
                            found.messages_max = min(found.messages_max, tenant.bucket.whole())
                        break
                    if destination.heap:  # all its tenants must leave the last credit to others: asked again later
                        restrained.append(heappop(heap))
                        continue
            heappop(heap)
            subscription.queued.discard(destination)
        for entry in restrained:
            heappush(heap, entry)
        return found

    def _pick_tenant(self, destination: Destination, subscription: Subscription, ceiling: int, total: int) -> Tenant | None:
        heap = destination.heap
        now = self._now_ms
        if ceiling >= 0 and (destination.light is None or now - destination.light_ms > LIGHT_MS):
            ceiling = -1
        restrained: list[tuple[float, int, Tenant]] | None = None  # fewer than HEADROOM hold so much
        found = None
        while heap:
            tag, _, tenant = heap[0]
            gate = tenant.gate
            if tenant.ready and gate in _PASSABLE and not (tenant.limited and self._is_full(tenant, destination.share)):
                start = tenant.start
                overdue = tenant.held * now - tenant.due_sum
                if overdue > 0:
                    start += overdue / tenant.weight
                if tag < start:
                    self._order += 1
                    heapreplace(heap, (start, self._order, tenant))
                    continue
                if tenant.taken * destination.weights >= total * tenant.weight and len(destination.tenants) > 1 and (
                        self._hangs(tenant, destination.usual_ms, len(heap) > 1, subscription)):
                    tenant.blocked = True
                    self._sleep(tenant, now + NAP_MS)
                elif 0 <= ceiling < tenant.taken and destination.light is not tenant:
                    if restrained is None:
                        restrained = []
                    restrained.append(heappop(heap))
                    continue
                else:
                    if tag > destination.virtual:
                        destination.virtual = tag
                    found = tenant
                    break
            heappop(heap)
            tenant.queued = False
        if restrained is not None:
            for entry in restrained:
                heappush(heap, entry)
            if found is None:  # nothing else may happen until then
                self._sleep(destination, destination.light_ms + LIGHT_MS + 1)
        return found

    def _hangs(self, flow: Share, usual_ms: float, others: bool, subscription: Subscription) -> bool:
        """Whether a flow, which has its part of the credit, has leases that hang, or may have, and what is free is for the
        others, that wait or may come."""
        patience = HANG_TIMES * max(USUAL_MS_MIN, usual_ms)
        if flow.proven and flow.hold_ms <= patience and flow.held * self._now_ms - flow.due_sum <= flow.held * patience:
            return False
        if others:
            return True
        use = subscription.use(self._now_ms)
        # Who uses some slots on average uses more now and then: of random arrivals hardly ever by more than two deviations.
        room = use + 2 * sqrt(subscription.variance) + (subscription.free + subscription.taken) // HEADROOM
        return use > USE_MIN and subscription.free <= room

    def _is_full(self, who: Destination | Tenant, share: float) -> bool:
        """Whether a hold or a limit stops a destination or a tenant; then it is out of the index until it is woken."""
        until = self._held_until(who) if who.hold else 0
        if not until:
            if 0 < who.slots <= who.held:
                until = FOR_EVER  # the end of a lease wakes it
            elif who.bucket is not None and not who.bucket.available(self._now_ms, share):
                until = who.bucket.ready_ms(share)
            else:
                return False
        who.blocked = True
        if until != FOR_EVER:
            self._sleep(who, until)
        return True

    def _held_until(self, who: Destination | Tenant) -> int:
        return 0 if 0 <= who.hold <= self._now_ms else who.hold

    # -- what becomes of a pick ----------------------------------------------------------------------------------

    def discard(self, pick: Pick) -> None:
        """The picked queue cannot be leased now (it changed since it was added); it has left the index."""

    def charge(self, pick: Pick, messages: int, size: int, now_ms: int) -> None:
        """The picked queue is being leased: takes the consumer's credit and charges tenant and destination."""
        tenant, consumer, subscription, share = pick.tenant, pick.consumer, pick.subscription, pick.share
        destination = tenant.destination
        consumer.messages -= messages
        consumer.bytes -= size
        subscription.round.rotate(-1)
        subscription.free -= messages
        subscription.taken += messages
        tenant.taken += messages
        share.taken += messages
        if not tenant.ready and tenant.taken <= (subscription.free + subscription.taken) // HEADROOM:
            destination.light = tenant
            destination.light_ms = now_ms
        pick.messages = messages
        pick.bytes = size
        pick.since_ms = now_ms
        hold_ms = pick.hold_ms = tenant.hold_ms
        due = pick.due_ms = now_ms + int(hold_ms) + 1  # whole, as sums of floats would lose milliseconds
        cost = hold_ms + messages * COST_PER_MESSAGE_MS + size * COST_PER_BYTE_MS
        destination.held += 1
        tenant.held += 1
        tenant.due_sum += due
        tenant.start += cost / tenant.weight
        share.held += 1
        share.due_sum += due
        share.start += cost / destination.weight
        if destination.bucket is not None:
            destination.bucket.take(messages)
        if tenant.bucket is not None:
            tenant.bucket.take(messages)
        if pick.probe:
            pick.counted = destination.gate == HALF_OPEN
            if pick.counted:
                destination.gate = PROBING
                destination.prober = pick
                subscription.probes += 1
            if tenant.gate == HALF_OPEN:
                tenant.gate = PROBING
                tenant.prober = pick

    def settled(self, pick: Pick, now_ms: int, failed: bool | None = False) -> None:
        """The lease of a charged pick is over: corrects the estimate by what it really cost. `failed` tells whether its
        destination throttled or failed; None: that is not known."""
        tenant, subscription, share, messages = pick.tenant, pick.subscription, pick.share, pick.messages
        destination = tenant.destination
        if failed is not None and (failed or destination.congestion.watching) and not subscription.internal:
            destination.congestion.settled(pick.since_ms, now_ms, destination.held, failed)
            destination.look()
        due = pick.due_ms
        destination.held -= 1
        tenant.held -= 1
        tenant.due_sum -= due
        tenant.taken -= messages
        share.held -= 1
        share.due_sum -= due
        share.taken -= messages
        subscription.taken -= messages
        held_ms = now_ms - pick.since_ms
        if held_ms > HOLD_MS_MAX:
            held_ms = HOLD_MS_MAX
        elif held_ms < 0:
            held_ms = 0
        # A lower tag than the one in the heap is only honoured after the tenant's next turn, but it is not lost:
        # only who returns from idleness is set to the virtual time.
        correction = held_ms - pick.hold_ms
        tenant.start += correction / tenant.weight
        share.start += correction / destination.weight
        tenant.proven = share.proven = True
        tenant.hold_ms += HOLD_GAIN * (held_ms - tenant.hold_ms)
        share.hold_ms += HOLD_GAIN * (held_ms - share.hold_ms)
        if now_ms - tenant.voted_ms >= VOTE_MS:
            tenant.voted_ms = now_ms
            usual = destination.usual_ms
            if held_ms > usual:
                destination.usual_ms = usual * USUAL_UP
            elif usual > HOLD_MS_START:
                destination.usual_ms = usual / USUAL_DOWN
        usual = subscription.usual_ms
        if now_ms - share.voted_ms >= VOTE_MS:
            share.voted_ms = now_ms
            if held_ms > usual:
                subscription.usual_ms = usual * USUAL_UP
            elif usual > USUAL_MS_MIN:
                subscription.usual_ms = usual / USUAL_DOWN
        if held_ms < HANG_TIMES * usual:
            time = held_ms * messages
            subscription.busy += time
            subscription.busy_squares += time * messages
        if now_ms - subscription.busy_ms >= USE_MS:
            subscription.use(now_ms)
        if tenant.blocked:
            self._unblock(tenant)
        if destination.blocked:
            self._unblock(destination)
        if pick.probe:  # unless the gate's owner knows better by now, the next probe may follow
            if pick.counted:
                subscription.probes -= 1
                self._let_probe(subscription)
            if destination.prober is pick:
                destination.prober = None
                destination.gate = HALF_OPEN
            if tenant.prober is pick:
                tenant.prober = None
                tenant.gate = HALF_OPEN
            self._wake_tenant(tenant)


__all__ = ["CLOSED", "HALF_OPEN", "MESSAGES_MAX", "OPEN", "PROBING", "Consumer", "Destination", "Pick", "Scheduler", "Subscription",
           "Tenant", "Waiting"]
