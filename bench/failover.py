"""Workload e: three nodes under load, one is killed and comes back."""
from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spillway.contract.hashing import queue_key, shard_of

from bench.children import Children, Worker, poll
from bench.counters import DELIVERED, FINISH, PRODUCED, READY_CONSUMER, READY_PRODUCER, SENT, STOP, Counters
from bench.failover_load import DESTINATION, TENANT
from bench.history import Delivery, judge
from bench.nodes import Nodes
from bench.outage import Trace, outage, timeline

QUEUES, PER_SECOND, PAYLOAD_BYTES, CREDIT = 200, 2_000.0, 1024, 512
CATCH_UP_SECONDS = 60.0
LEADERS_BACK_SECONDS = 15.0
TIMELINE_BEFORE_SECONDS, TIMELINE_SECONDS = 3.0, 0.1  # for plots
ROLES_AT_WORK = ("leader", "follower")


def measure(directory: Path, seconds: float) -> dict[str, Any]:
    """Runs three nodes for `seconds`, kills the one that leads the most shards, runs on for `seconds` with two, starts it
    again, waits until it has caught up and a little more, and checks everything."""
    counters = Counters()
    with Children() as children:
        nodes = Nodes(directory, 3, children)
        consumer = Worker("record", directory, counters, addresses=nodes.addresses, credit=CREDIT)
        producer = Worker("paced", directory, counters, addresses=nodes.addresses, queues=QUEUES, per_second=PER_SECOND,
                          payload_bytes=PAYLOAD_BYTES)
        children.start(consumer)
        children.start(producer)
        poll(lambda: counters[READY_CONSUMER] and counters[READY_PRODUCER], 60, "the load", children)
        time.sleep(seconds)
        leaders = leaders_of(nodes, "n1")
        victim, led = Counter(leaders.values()).most_common(1)[0]
        survivor = next(n for n in nodes.children if n != victim)
        killed_at = time.monotonic()
        nodes.children[victim].kill()
        time.sleep(seconds)
        restarted_at = time.monotonic()
        nodes.children[victim].start()
        poll(lambda: nodes.status(victim) is not None, CATCH_UP_SECONDS, "the restarted node to answer", children)
        answered_at = time.monotonic()
        poll(lambda: caught_up(nodes, victim), CATCH_UP_SECONDS, "the restarted node to catch up", children)
        caught_up_at = time.monotonic()
        back_at: float | None = None
        try:
            poll(lambda: leaders_of(nodes, survivor) == leaders, LEADERS_BACK_SECONDS, "leaders as before", children)
            back_at = time.monotonic()
        except TimeoutError:
            pass  # allowed: leaders may stay where they are
        time.sleep(2.0)
        end = time.monotonic()
        counters[STOP] = 1
        sent = producer.result(90)
        complete = True
        try:
            poll(lambda: counters[DELIVERED] >= counters[SENT], 30, "every message delivered", children)
        except TimeoutError:
            complete = False
        time.sleep(0.5)  # for what is delivered twice
        counters[FINISH] = 1
        got = consumer.result(60)
        final = leaders_of(nodes, survivor)

    verdict = judge(((n, n % QUEUES) for n in range(len(sent["sent_at"]))), (Delivery(*d[:4]) for d in got["deliveries"]))
    affected = {q for q in range(QUEUES)
                if leaders[shard_of(queue_key(DESTINATION, TENANT, f"k{q}"), len(leaders))] == victim}
    first: dict[int, float] = {}
    for number, _, _, _, at, *_ in got["deliveries"]:
        first.setdefault(number, at)
    traces = [Trace(n, n % QUEUES, at, stored, first.get(n))
              for n, (at, stored) in enumerate(zip(sent["sent_at"], sent["stored_at"], strict=True))]
    around_restart = outage(traces, restarted_at, end)
    slow = {one["number"] for one in around_restart.get("slowest", ())}
    return {
        "leaders_before": dict(Counter(leaders.values())), "victim": victim, "shards_led_by_victim": led,
        "queues_affected": len(affected), "sends_failed": sent["failed"], "send_errors": sent["errors"],
        "stored": counters[PRODUCED], "complete": complete, "stale_settlements": got["stale_settlements"],
        **asdict(verdict), "clean": verdict.clean and not sent["failed"],
        "affected": outage([t for t in traces if t.queue in affected], killed_at, restarted_at),
        "others": outage([t for t in traces if t.queue not in affected], killed_at, restarted_at),
        "all": outage(traces, killed_at, restarted_at),
        "around_restart": around_restart,
        "killed_at_seconds": TIMELINE_BEFORE_SECONDS,
        "restarted_at_seconds": round(restarted_at - killed_at + TIMELINE_BEFORE_SECONDS, 3),
        "timeline": timeline(traces, killed_at - TIMELINE_BEFORE_SECONDS, end - 1.0, TIMELINE_SECONDS),
        "slowest_deliveries_around_restart": [
            {"number": number, "shard": shard, "at": round(at - restarted_at, 3), "fencing_token": token, "attempt": attempt}
            for number, _, shard, _, at, token, attempt in got["deliveries"] if number in slow],
        "restart": {"down_seconds": round(restarted_at - killed_at, 2),
                    "answers_after_seconds": round(answered_at - restarted_at, 2),
                    "caught_up_after_seconds": round(caught_up_at - restarted_at, 2),
                    "leaders_back_after_seconds": None if back_at is None else round(back_at - restarted_at, 2)},
        "leaders_after": dict(Counter(final.values())),
    }


def leaders_of(nodes: Nodes, node: str) -> dict[int, str]:
    """The leader of each shard as a node sees it."""
    topology = nodes.topology(node)
    return {} if topology is None else {shard.shard: shard.leader for shard in topology.shards}


def caught_up(nodes: Nodes, node: str) -> bool:
    """Whether every replica of a node works and has applied what was committed anywhere before it was asked."""
    committed: dict[int, int] = {}
    for other in nodes.children:
        if other != node:
            for group, status in (nodes.status(other) or {}).items():
                committed[group] = max(committed.get(group, 0), status.commit_index)
    replicas = nodes.status(node)
    return replicas is not None and bool(committed) and all(
        status.role in ROLES_AT_WORK and status.applied_index >= committed.get(group, 0)
        for group, status in replicas.items())
