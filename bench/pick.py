"""Workload f: what the scheduler costs, by the number of queues that are ready."""
from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

from spillway.broker.core.policy import Limit, Policy
from spillway.broker.core.scheduler import Consumer, Pick, Scheduler

DESTINATIONS = 100
TENANTS = 100  # of each destination
LEASES_OUT = 64  # that are out meanwhile
ROUNDS = 11
MESSAGE_BYTES = 1024
CYCLES_PER_MS = 20  # simulated time: as if there were 20,000 leases a second
WIDE = Limit(per_second=1e9, leases_max=1_000_000)  # looked at for each lease, and never reached
LIMITED = Policy(limit=WIDE, tenant_limit=WIDE)


def measure(queues: int, cycles: int, limited: bool) -> dict[str, Any]:
    """Nanoseconds for one lease (`pick`, `charge`, `settled`, `credit`, `add`) while so many queues are ready, as the median
    of rounds of so many cycles; with a rate and a number of leases for each destination and tenant, or without."""
    policy = LIMITED if limited else Policy()
    scheduler = Scheduler(lambda name: policy)
    for number in range(queues):
        scheduler.add(b"d%d\0t%d\0%d" % (number % DESTINATIONS, number // DESTINATIONS % TENANTS, number))
    consumer = Consumer("bench")
    scheduler.subscribe(consumer, ["*"])
    scheduler.credit(consumer, 10 * LEASES_OUT, 1 << 60)
    subscription = consumer.subscription
    assert subscription is not None
    out: deque[Pick] = deque()
    leases = min(LEASES_OUT, queues // 2)
    now_ms = times = 0
    rounds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter_ns()
        for _ in range(cycles):
            pick = scheduler.pick(subscription, now_ms)
            assert pick is not None
            scheduler.charge(pick, 1, MESSAGE_BYTES, now_ms)
            out.append(pick)
            if len(out) >= leases:
                pick = out.popleft()
                scheduler.settled(pick, now_ms)
                scheduler.credit(consumer, 1, MESSAGE_BYTES)
                scheduler.add(pick.queue)
            times += 1
            if times == CYCLES_PER_MS:
                times = 0
                now_ms += 1
        rounds.append((time.perf_counter_ns() - start) / cycles)
    return {"queues": queues, "limited": limited, "nanoseconds": round(statistics.median(rounds[1:])),
            "slowest_round": round(max(rounds[1:])), "fastest_round": round(min(rounds[1:]))}
