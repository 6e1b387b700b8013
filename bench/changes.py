"""Workload h: a cluster that changes under a constant load. Nodes join, one is drained, one is killed and replaced, all are restarted."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spillway.v1 import cluster_service_pb2 as pb

from bench.children import Children, Worker, poll
from bench.counters import DELIVERED, FINISH, READY_CONSUMER, READY_PRODUCER, SENT, STOP, Counters
from bench.history import Delivery, judge
from bench.nodes import Nodes
from bench.outage import Trace, outage

QUEUES, PAYLOAD_BYTES = 200, 1024
CREDIT = 4096  # more than a second of the load: with little credit the consumer, split over five nodes, is what limits
REPLACE_SECONDS = 5
CHANGE_SECONDS = 120.0
CALM_SECONDS = 3.0  # before, between and after
STATUS_SECONDS = 0.25  # between questions how far a change is: an answer costs every node something


def measure(directory: Path, per_second: float) -> dict[str, Any]:
    """Three nodes become five, n2 is drained and taken back, n3 is killed and its replicas go to others, then all are restarted one by
    one; at `per_second` messages of 1 KiB all the time. What each change cost its worst message, and whether all came in order."""
    counters = Counters()
    spans: list[tuple[str, float, float]] = []
    with Children() as children:
        nodes = Nodes(directory, 3, children, ["--replace-after-seconds", str(REPLACE_SECONDS)])
        consumer = Worker("record", directory, counters, addresses=nodes.addresses, credit=CREDIT)
        producer = Worker("paced", directory, counters, addresses=nodes.addresses, queues=QUEUES, per_second=per_second,
                          payload_bytes=PAYLOAD_BYTES)
        children.start(consumer)
        children.start(producer)
        poll(lambda: counters[READY_CONSUMER] and counters[READY_PRODUCER], 60, "the load", children)

        def change(name: str, do: Callable[[], None], done: Callable[[pb.GetClusterStatusResponse], bool]) -> None:
            def is_done() -> bool:
                status = nodes.cluster()
                return status is not None and done(status)
            time.sleep(CALM_SECONDS)
            begin = time.monotonic()
            do()
            poll(is_done, CHANGE_SECONDS, name, step=STATUS_SECONDS)
            spans.append((name, begin, time.monotonic()))

        begin = time.monotonic()
        time.sleep(2 * CALM_SECONDS)
        spans.append(("none", begin, time.monotonic()))
        change("n4 joins", lambda: nodes.join("n4"), lambda status: settled(status, 4))
        change("n5 joins", lambda: nodes.join("n5"), lambda status: settled(status, 5))
        change("n2 is drained", lambda: nodes.drain("n2"), lambda status: settled(status, 5) and not replicas(status, "n2"))
        change("n3 is killed, and replaced", nodes.children["n3"].kill,
               lambda status: settled(status, 5, "n3") and not replicas(status, "n3"))
        change("n3 comes back", nodes.children["n3"].start, lambda status: settled(status, 5) and replicas(status, "n3") > 0)
        for node in list(nodes.children):
            def restart(node: str = node) -> None:
                nodes.children[node].end()
                nodes.children[node].start()
            change(f"{node} is restarted", restart, lambda status: settled(status, 5))
        time.sleep(CALM_SECONDS)
        counters[STOP] = 1
        sent = producer.result(90)
        complete = True
        try:
            poll(lambda: counters[DELIVERED] >= counters[SENT], 60, "every message delivered", children)
        except TimeoutError:
            complete = False
        time.sleep(0.5)  # for what is delivered twice
        counters[FINISH] = 1
        got = consumer.result(60)

    verdict = judge(((n, n % QUEUES) for n in range(len(sent["sent_at"]))), (Delivery(*d[:4]) for d in got["deliveries"]))
    first: dict[int, float] = {}
    for number, _, _, _, at, *_ in got["deliveries"]:
        first.setdefault(number, at)
    traces = [Trace(n, n % QUEUES, at, stored, first.get(n))
              for n, (at, stored) in enumerate(zip(sent["sent_at"], sent["stored_at"], strict=True))]
    return {
        "per_second": per_second, "queues": QUEUES, "sends_failed": sent["failed"], "send_errors": sent["errors"], "complete": complete,
        "stale_settlements": got["stale_settlements"], **asdict(verdict), "clean": verdict.clean and not sent["failed"],
        "changes": [{"change": name, "seconds": round(until - since, 2), **outage(traces, since, until)} for name, since, until in spans],
    }


def settled(status: pb.GetClusterStatusResponse, nodes: int, silent: str = "") -> bool:
    """Whether so many nodes, all but one answering, have what belongs to them, and lead what they should."""
    return (len(status.nodes) == nodes and all(n.reachable or n.node.id == silent for n in status.nodes)
            and all(g.leader == g.wanted[0] and not g.moving for g in status.groups if g.group))


def replicas(status: pb.GetClusterStatusResponse, node: str) -> int:
    """How many replicas of shards a node has."""
    return next(n.replicas for n in status.nodes if n.node.id == node)
