"""What fairness means, as checks of any scheduler: `test_fairness` holds ours to them, `test_fairness_mutants` proves that
each of them refuses a scheduler that is not fair."""
from __future__ import annotations

import random
from collections import Counter
from functools import partial

from msgspec.structs import replace
from spillway.broker.core.policy import Policy, TenantPolicy
from spillway.broker.core.scheduler import CLOSED, HALF_OPEN, OPEN, Consumer, Pick

from tests.properties.scheduler_world import Make, Simulation, destination_of, jain, percentile, ten_ms, tenant_of

WINDOW = 5_000  # deliveries
BUSY = 1 << 30  # messages: never all delivered


def weighted(weights: dict[bytes, float]) -> Policy:
    """A policy with weights of tenants."""
    return replace(Policy(), tenants={name.decode(): TenantPolicy(weight=weight) for name, weight in weights.items()})


def tenants_get_their_weights(make: Make, tenants: int, weights: list[float], slots: int, windows: int = 4) -> None:
    """In every window of 5,000 deliveries of one message, each tenant's count is within 2 % or one delivery of what its weight
    gives, the count of all tenants of a weight within 2 %, and Jain's index of counts over weights is at least 0.99. Tenants
    have different numbers of queues."""
    own = {b"t%d" % number: weights[number % len(weights)] for number in range(tenants)}
    sim = Simulation(ten_ms, 1, make)
    sim.policies[b"d"] = weighted(own)
    for number, tenant in enumerate(own):
        for key in range(slots + number % 7 * 5):
            sim.arrive(b"d\0" + tenant + b"\0%d" % key, BUSY)
    sim.consumer(slots, "*")
    sim.run(deliveries=WINDOW)  # all tenants came at the same moment, with the same tag; then their tags are spread
    unit = WINDOW / sum(own.values())
    for _ in range(windows):
        since = len(sim.delivered)
        sim.run(deliveries=WINDOW)
        counts = Counter(tenant_of(queue) for queue, _, _ in sim.delivered[since:since + WINDOW])
        assert jain([counts[tenant] / weight for tenant, weight in own.items()]) >= 0.99
        for tenant, weight in own.items():
            assert abs(counts[tenant] - unit * weight) <= max(1.5, 0.02 * unit * weight), (tenant, weight, counts[tenant])
        for weight in set(weights):
            those = [tenant for tenant in own if own[tenant] == weight]
            got, fair = sum(counts[tenant] for tenant in those), unit * weight * len(those)
            assert abs(got / fair - 1) <= 0.02, (weight, got, fair)


class Mill:
    """Leases one after the other, each held for a millisecond and its queue ready again at once: quick, for many tenants."""

    def __init__(self, make: Make, policy: Policy) -> None:
        self.scheduler = make(lambda name: policy)
        self.consumer = Consumer("c")
        self.scheduler.subscribe(self.consumer, ["*"])
        self.scheduler.credit(self.consumer, 16, 1 << 40)
        self.now = 0

    def serve(self, leases: int) -> list[bytes]:
        """The queues that were served."""
        scheduler, consumer = self.scheduler, self.consumer
        subscription = consumer.subscription
        assert subscription is not None
        found = []
        for _ in range(leases):
            pick = scheduler.pick(subscription, self.now)
            assert pick is not None
            scheduler.charge(pick, 1, 0, self.now)
            self.now += 1
            scheduler.settled(pick, self.now)
            scheduler.credit(consumer, 1, 0)
            scheduler.add(pick.queue)
            found.append(pick.queue)
        return found


def a_hundred_thousand_tenants_take_turns(make: Make) -> None:
    """With more tenants than deliveries in a window, equal means: nobody is served twice before everybody was served once. Then
    in a window of 5,000 deliveries nobody has two, and each tenth of the tenants has a tenth of them within 2 %."""
    tenants, groups = 100_000, 10
    mill = Mill(make, Policy())
    for number in range(tenants):
        for key in range(1 + (number % 10 == 3)):  # a tenth has two queues
            mill.scheduler.add(b"d\0%d\0%d" % (number, key))
    served = mill.serve(2 * tenants)
    for turn in range(2):
        assert len({tenant_of(queue) for queue in served[turn * tenants:(turn + 1) * tenants]}) == tenants
    for begin in range(0, len(served), WINDOW):
        window = Counter(int(tenant_of(queue)) for queue in served[begin:begin + WINDOW])
        assert max(window.values()) == 1
        counts = Counter(tenant % groups for tenant in window)
        assert all(abs(counts[group] * groups / WINDOW - 1) <= 0.02 for group in range(groups)), counts


def a_hundred_thousand_tenants_have_weights(make: Make) -> None:
    """With weights 1 and 2 and more tenants than deliveries in a window, a window is one turn of all: as many deliveries as
    the sum of the weights. The two groups share it 1 to 2 within 2 %, and each tenant has its weight, give or take one."""
    tenants = 100_000
    names = [b"%d" % number for number in range(tenants)]
    mill = Mill(make, weighted({name: 1.0 + number % 2 for number, name in enumerate(names)}))
    for name in names:
        mill.scheduler.add(b"d\0" + name + b"\0")
    mill.serve(tenants)  # from the same tag, each has one first
    counts = Counter(int(tenant_of(queue)) for queue in mill.serve(tenants * 3 // 2))
    heavy = sum(count for tenant, count in counts.items() if tenant % 2)
    assert abs(heavy / tenants - 1) <= 0.02, heavy
    assert all(abs(counts[number] - (1 + number % 2)) <= 1 for number in range(tenants))


def consumer_time_is_shared(make: Make) -> None:
    """A tenant whose leases take ten times as long gets the same time of the consumers as the other, within 2 %."""
    sim = Simulation(lambda queue, _: 100.0 if tenant_of(queue) == b"slow" else 10.0, 1, make)
    for key in range(30):
        sim.arrive(b"d\0slow\0%d" % key, BUSY)
        sim.arrive(b"d\0fast\0%d" % key, BUSY)
    sim.consumer(4, "d")
    sim.run(until=100_000)
    share = sim.share(tenant_of, time=True)
    assert abs(share[b"slow"] * 2 - 1) <= 0.02, share


def keys_are_no_advantage(make: Make, slots: int) -> None:
    """A tenant with 100,000 keys gets as much as one with a single key, within 2 %, in every window of 5,000 deliveries. A key
    is leased once at a time, so one key can have at most one slot: the consumer has no more than two."""
    sim = Simulation(ten_ms, 1, make)
    for key in range(100_000):
        sim.arrive(b"d\0many\0%d" % key, BUSY)
    sim.arrive(b"d\0one\0", BUSY)
    sim.consumer(slots, "d")
    for _ in range(3):
        since = len(sim.delivered)
        sim.run(deliveries=WINDOW)
        share = sim.share(tenant_of, since=since)
        assert abs(share.get(b"one", 0) * 2 - 1) <= 0.02, share


LEASE_MS = 30_000.0  # a lease that hangs expires then


def queue_of(where: str, who: bytes, key: int) -> bytes:
    """A queue of a tenant of one destination, or of a destination with one tenant."""
    return b"d\0" + who + b"\0%d" % key if where == "tenant" else who + b"\0t\0%d" % key


def who_of(queue: bytes) -> bytes:
    """The tenant or destination, by what `queue_of` made of it."""
    return tenant_of(queue) if queue.startswith(b"d\0") else destination_of(queue)


def expires(pick: Pick) -> bool | None:
    """A lease that expires says nothing about its destination."""
    return None if who_of(pick.queue).startswith(b"h") else False


def beside_hanging(make: Make, hold: float, run: int = 1) -> Simulation:
    """Leases, of so many messages, of h... hang until they expire; the others' take so long."""
    sim = Simulation(lambda queue, _: LEASE_MS if who_of(queue).startswith(b"h") else hold, run, make)
    sim.fails = expires
    return sim


def hanging_ones_have_no_more_than_their_share(make: Make, where: str, hanging: int, working: int, slots: int) -> None:
    """All with a backlog from the same moment on: in every ten seconds after the first, each working tenant or destination gets
    at least 95 % of its share of the consumer's time, although what the hanging ones take they keep for 30 s."""
    sim = beside_hanging(make, 50.0)
    names = [b"h%d" % n for n in range(hanging)] + [b"w%d" % n for n in range(working)]
    for key in range(slots):
        for name in names:
            sim.arrive(queue_of(where, name, key), BUSY)
    sim.consumer(slots, "*")
    sim.run(until=71_000)
    fair = slots / len(names) * 10_000 / 50
    for begin in range(1_000, 71_000, 10_000):
        got = sim.served(who_of, begin, begin + 10_000)
        for name in names[hanging:]:
            assert got[name] >= 0.95 * fair, (begin, name, got[name], fair)


def hanging_ones_do_not_pile_up(make: Make, where: str = "tenant", slots: int = 16, hold: float = 50.0, hanging: int = 1,
                                use: float = 0.4, seed: int = 5, run: int = 1) -> None:
    """A working tenant or destination asks, at random moments, for a part of the slots that is less than its share; hanging ones
    have a backlog beside it, and time to take all that is free whenever the other has nothing to give. The working one still
    gets 95 % of what it asks for, in every ten seconds after they came, also when all hanging leases have ended at once,
    after 30 s. What it asks for counts until one lease before the end of such a span."""
    draw = random.Random(seed)
    sim = beside_hanging(make, hold, run)
    sim.consumer(slots, "*")
    asked, when = [], 0.0
    while when < 103_000:
        when += draw.expovariate(use * slots / hold)
        asked.append(when)
        sim.at(when, partial(sim.arrive, queue_of(where, b"w", len(asked)), run))
    sim.at(3_000.0, lambda: [sim.arrive(queue_of(where, b"h%d" % number, key), BUSY)
                             for key in range(100) for number in range(hanging)] and None)
    sim.run(until=103_000)
    for begin in range(3_000, 103_000, 10_000):
        got = sim.served(who_of, begin, begin + 10_000)[b"w"]
        want = run * sum(begin - hold <= t < begin + 10_000 - hold for t in asked)
        assert got >= 0.95 * want, (begin, got, want)


def what_was_taken_alone_comes_back(make: Make) -> None:
    """A hanging tenant that was alone has taken every slot. From the end of these leases on, whoever came meanwhile gets at
    least 95 % of its share."""
    slots = 16
    sim = beside_hanging(make, 50.0)
    sim.consumer(slots, "d")
    for key in range(100):
        sim.arrive(b"d\0h\0%d" % key, BUSY)
    sim.run(until=5_000)
    assert sim.out[b"d"] == slots  # nothing is left idle
    for key in range(100):
        sim.arrive(b"d\0w\0%d" % key, BUSY)
    sim.run(until=121_000)
    for begin in range(31_000, 121_000, 10_000):
        got = sim.served(tenant_of, begin, begin + 10_000)[b"w"]
        assert got >= 0.95 * slots / 2 * 10_000 / 50, (begin, got)


def a_tenant_among_idle_ones_gets_everything(make: Make) -> None:
    """No slot stays free: a tenant with a backlog of leases that take as long as is usual has all of them, although a hundred
    others, that came and went, are known, and nothing was swept."""
    sim = Simulation(ten_ms, 1, make)
    for number in range(100):
        sim.arrive(b"d\0%d\0" % number, 3)
    sim.consumer(16, "d")
    sim.run(until=2_000)
    for key in range(50):
        sim.arrive(b"d\0busy\0%d" % key, BUSY)
    sim.run(until=12_000)
    got = sim.served(tenant_of, 4_000, 12_000)[b"busy"]
    assert got >= 0.99 * 16 * 8_000 / 10, got


def a_burst_does_not_delay_others(make: Make) -> None:
    """The p99 of a quiet tenant's time to be done beside a burst a thousand times as large is at most 1.2 times what it is
    alone. Its messages come at times that have nothing to do with the ends of the burst's leases."""
    def p99(burst: int) -> float:
        draw = random.Random(3)
        sim = Simulation(lambda queue, _: 10.0 + draw.random(), 1, make)
        sim.consumer(16, "d")
        quiet = [0.0]
        for number in range(200):
            quiet.append(quiet[-1] + 20 + 60 * draw.random())
            sim.at(quiet[-1], lambda number=number: sim.arrive(b"d\0quiet\0%d" % number, 1))
        sim.at(500.0, lambda: [sim.arrive(b"d\0burst\0%d" % (n % 1000), 200) for n in range(burst * 200 // 200)] and None)
        sim.run(until=quiet[-1] + 100)
        times = [t for queue, some in sim.latencies.items() if tenant_of(queue) == b"quiet" for t in some]
        assert len(times) == 200
        return percentile(times, 0.99)

    alone, beside = p99(0), p99(1_000)
    assert beside <= 1.2 * alone, (alone, beside)


def dead_destinations_cost_the_others_nothing(make: Make) -> None:
    """A thousand destinations ask for 95 % of the consumers' time, four fifths of it for one half; then the other half goes down:
    each lease fails after 100 ms and closes the gate, and a probe is let through after one second, then two, four... The
    others are served at least 98 % as much as in a world in which nobody goes down, in every five seconds from one second
    after on, although the first probes of all alone would take all slots for a second."""
    slots, hold, seconds = 50, 50.0, 32

    def served(down: bool) -> Simulation:
        sim = Simulation(lambda queue, _: 100.0 if dead(queue) else hold, 1, make)
        steps: Counter[bytes] = Counter()

        def dead(queue: bytes) -> bool:
            return down and queue.startswith(b"down") and sim.now >= 1_000

        def ended(pick: Pick, failed: bool | None) -> None:
            name = pick.tenant.destination.name
            if failed:
                if sim.scheduler.gate(name) != CLOSED:
                    sim.scheduler.set_gate(name, CLOSED)
                    sim.at(sim.now + min(60_000.0, 1_000.0 * 2 ** steps[name]), lambda: sim.scheduler.set_gate(name, HALF_OPEN))
                    steps[name] += 1
            elif pick.probe:
                sim.scheduler.set_gate(name, OPEN)

        sim.fails = lambda pick: dead(pick.queue)
        sim.ended = ended
        draw = random.Random(11)
        when, key = 0.0, 0
        while when < seconds * 1_000:
            when += draw.expovariate(0.95 * slots / hold)
            key += 1
            queue = b"%s%d\0t\0%d" % (b"up" if draw.random() < 0.8 else b"down", draw.randrange(500), key)
            sim.at(when, lambda queue=queue: sim.arrive(queue, 1))
        sim.consumer(slots, "*")
        sim.run(until=seconds * 1_000.0)
        return sim

    well, ill = served(False), served(True)
    for begin in range(2_000, seconds * 1_000, 5_000):
        before, now = (sum(count for name, count in sim.served(destination_of, begin, begin + 5_000).items() if name.startswith(b"up"))
                       for sim in (well, ill))
        assert now >= 0.98 * before, (begin, now, before)
