"""Which nodes hold which shard: consistent hashing with virtual nodes and bounded loads. Pure and deterministic.

Every node has points on a ring; a shard walks the ring from its own point and takes the first nodes that still have room
(Karger et al., STOC 1997; bounded loads: Mirrokni, Thorup, Zadimoghaddam, SODA 2018). A node more moves about its fair
share of the replicas and little else.
"""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import ceil

from xxhash import xxh3_64_intdigest

VIRTUAL_NODES = 256  # points of a node on the ring: enough that nodes' arcs differ by a few per cent


def place(nodes: Sequence[str], shards: int, replicas: int) -> dict[int, list[str]]:
    """shard (1..shards) -> `replicas` different nodes, the preferred leader first. No node holds more than its even share
    of replicas, rounded up; preferred leaders are spread as evenly. Raises ValueError if there are too few nodes."""
    if not 1 <= replicas <= len(set(nodes)):
        raise ValueError(f"{replicas} replicas need as many nodes; there are {len(set(nodes))}")
    ring = sorted((xxh3_64_intdigest(f"{node}#{i}".encode()), node) for node in sorted(set(nodes)) for i in range(VIRTUAL_NODES))
    points = [point for point, _ in ring]
    room = {node: ceil(shards * replicas / len(set(nodes))) for node in nodes}
    out: dict[int, list[str]] = {}
    for shard in range(1, shards + 1):
        start = bisect_right(points, xxh3_64_intdigest(f"shard {shard}".encode()))
        chosen: list[str] = []
        for spare in (True, False):  # the last shards may find fewer nodes with room than replicas
            for step in range(len(ring)):
                node = ring[(start + step) % len(ring)][1]
                if node not in chosen and (room[node] > 0 or not spare):
                    chosen.append(node)
                    if len(chosen) == replicas:
                        break
            if len(chosen) == replicas:
                break
        for node in chosen:
            room[node] -= 1
        out[shard] = chosen
    _spread_leaders(out)
    return out


def _spread_leaders(placement: dict[int, list[str]]) -> None:
    """Puts the replica first whose node leads the fewest so far; ties keep the ring's order."""
    leads: dict[str, int] = {}
    for nodes in placement.values():
        first = min(nodes, key=lambda n: leads.get(n, 0))
        leads[first] = leads.get(first, 0) + 1
        nodes.remove(first)
        nodes.insert(0, first)
