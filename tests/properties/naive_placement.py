"""A naive choice of nodes, to compare the real one with: after every move it looks at everything again."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from spillway.cluster.placement import Site, _distances

_RING = 1 << 64
Edges = dict[tuple[int, int], tuple[int, int]]  # (from, to) -> (cost, shard)


def place(nodes: Sequence[Site], shards: int, replicas: int, previous: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """As placement.place, where that raises nothing."""
    sites = sorted(nodes, key=lambda site: site.node_id)
    numbers = {site.node_id: number for number, site in enumerate(sites)}
    distances = _distances(list(numbers), shards)
    domains = [(site.zone or f"\0{site.node_id}", site.host or f"\0{site.node_id}") for site in sites]
    kept = [[numbers[node] for node in previous.get(shard, ()) if node in numbers] for shard in range(1, shards + 1)]
    taken = _choose(distances, [list(range(len(sites)))] * shards, domains, kept, min(replicas, len(sites)))
    leaders = _choose(distances, taken, [("", "")] * len(sites), [own[:1] for own in kept], 1)
    return {shard + 1: [sites[n].node_id for n in sorted(own, key=lambda n: (n != leaders[shard][0], distances[shard][n]))]
            for shard, own in enumerate(taken)}


def _choose(distances: list[list[int]], candidates: list[list[int]], domains: list[tuple[str, str]], kept: list[list[int]],
            count: int) -> list[list[int]]:
    """[shard]: nodes."""
    def shared(others: Sequence[int], node: int) -> tuple[int, int]:
        return (sum(domains[other][0] == domains[node][0] for other in others),
                sum(domains[other] == domains[node] for other in others))

    taken: list[list[int]] = []
    for shard, able in enumerate(candidates):
        own: list[int] = []
        for _ in range(count):
            own.append(min((node for node in able if node not in own), key=lambda node: (
                shared(own, node), node not in kept[shard], distances[shard][node], node)))
        taken.append(own)

    def edges() -> Edges:
        found: Edges = {}
        for shard, own in enumerate(taken):
            for source in own:
                others = [node for node in own if node != source]
                for target in candidates[shard]:
                    if target not in own and shared(others, target) <= shared(others, source):
                        cost = max(1, (_RING if any(kept) else 0) + distances[shard][target] - distances[shard][source])
                        found[source, target] = min(found.get((source, target), (cost, shard)), (cost, shard))
        return found

    while True:
        load = [sum(node in own for own in taken) for node in range(len(domains))]
        path = next((path for full in sorted(set(load), reverse=True) if (path := _path(edges(), load, full))), None)
        if path is None:
            return taken
        for shard, source, target in path:
            taken[shard] = [node for node in taken[shard] if node != source] + [target]


def _path(edges: Edges, load: list[int], full: int) -> list[tuple[int, int, int]] | None:
    """(shard, from, to): the cheapest way from a node of that load to one with at least two fewer that moves no shard twice."""
    reached = [(0, node, -1, -1) for node in range(len(load)) if load[node] == full]
    came: dict[int, list[tuple[int, int, int]]] = {}
    while reached:
        reached.sort()
        cost, node, shard, source = reached.pop(0)
        if node not in came:
            path = came[node] = [*came[source], (shard, source, node)] if source >= 0 else []
            if load[node] <= full - 2 and len({shard for shard, _, _ in path}) == len(path):
                return path
            reached += [(cost + step, target, moved, node) for (at, target), (step, moved) in edges.items()
                        if at == node and target not in came]
    return None
