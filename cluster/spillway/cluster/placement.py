"""Which nodes hold which shard: consistent hashing with virtual nodes and bounded loads. Pure and deterministic.

Every node has points on a ring, every shard has one (Karger et al., STOC 1997). A replica belongs on the node whose next
point is nearest, and loads are bounded (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, 2016). They
send the overflow to the next node with room, in order of arrival. Here it goes where it costs the least distance, over
several nodes if need be (cheapest paths, as in minimum-cost flow), which makes loads even to one replica and moves less.

From nothing but the nodes' names, a node more moves about 1/N of the replicas when each node holds many, and up to 2.5/N
with 16 shards on a dozen nodes: even loads then leave few ways. With the placement so far as a start, it moves what the new
node takes and nothing else.

Failure domains come first: replicas of a shard are in as many zones, and within a zone on as many hosts, as there are.
Loads are as even as that allows.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from xxhash import xxh3_64_intdigest

VIRTUAL_NODES = 256  # points of a node on the ring: its share of the ring then differs by a few per cent
_RING = 1 << 64


@dataclass(frozen=True, slots=True)
class Site:
    """A node and what it may fail together with. Nodes without a zone, or host, share none with others."""

    node_id: str
    zone: str = ""
    host: str = ""


def place(nodes: Iterable[Site | str], shards: int, replicas: int,
          previous: Mapping[int, Sequence[str]] | None = None) -> dict[int, list[str]]:
    """shard (1..shards) -> node ids of its replicas, the preferred leader first.

    `replicas` different nodes, or all nodes if there are fewer. No two replicas of a shard are in one zone while zones
    suffice. Where zones leave the choice, nodes hold an even share of replicas, to one; preferred leaders are even to one
    as well. The order of `nodes` does not matter. `previous` is the placement so far: replicas and leaders stay unless one
    of these rules moves them. Raises ValueError for fewer than one node, shard or replica, or for two nodes of one id."""
    sites = sorted((node if isinstance(node, Site) else Site(node) for node in nodes), key=lambda site: site.node_id)
    if not sites or shards < 1 or replicas < 1:
        raise ValueError(f"nothing to place: {len(sites)} nodes, {shards} shards, {replicas} replicas")
    numbers = {site.node_id: number for number, site in enumerate(sites)}
    if len(numbers) < len(sites):
        raise ValueError("two nodes have one id")
    distances = _distances(list(numbers), shards)
    domains = [(site.zone or f"\0{site.node_id}", site.host or f"\0{site.node_id}") for site in sites]
    kept = [[numbers[node] for node in (previous or {}).get(shard, ()) if node in numbers] for shard in range(1, shards + 1)]
    chosen = _Choice(distances, [list(range(len(sites)))] * shards, domains, kept, min(replicas, len(sites)))
    chosen.balance()
    leaders = _Choice(distances, chosen.taken, [("", "")] * len(sites), [nodes[:1] for nodes in kept], 1)
    leaders.balance()
    return {shard + 1: [sites[n].node_id for n in sorted(taken, key=lambda n: (n != leader, distances[shard][n]))]
            for shard, (taken, (leader,)) in enumerate(zip(chosen.taken, leaders.taken, strict=True))}


def _distances(node_ids: Sequence[str], shards: int) -> list[list[int]]:
    """[shard][node]: how far the ring goes on from the shard's point to the node's next one."""
    points = [sorted(xxh3_64_intdigest(f"{node_id}#{i}".encode()) for i in range(VIRTUAL_NODES)) for node_id in node_ids]
    found = []
    for shard in range(1, shards + 1):
        start = xxh3_64_intdigest(f"shard {shard}".encode())
        found.append([(own[bisect_left(own, start) % VIRTUAL_NODES] - start) % _RING for own in points])
    return found


class _Choice:
    """For each shard, `count` of its candidates: those kept and the nearest ones, then balanced."""

    def __init__(self, distances: list[list[int]], candidates: list[list[int]], domains: list[tuple[str, str]],
                 kept: list[list[int]], count: int) -> None:
        """[shard][node] for distances, [shard] for candidates and kept; domains are (zone, host) of nodes."""
        self._distances = distances
        self._candidates = candidates
        self._domains = domains
        self._apart = count == 1 or len({zone for zone, _ in domains}) == len(domains)  # no two replicas can share anything
        self._kept = kept
        self._move_cost = _RING if any(kept) else 0  # one long move is better than two short ones, where moves count
        self.taken = [self._nearest(shard, count) for shard in range(len(distances))]
        """[shard]: nodes."""
        self._load = [0] * len(domains)
        for nodes in self.taken:
            for node in nodes:
                self._load[node] += 1

    def balance(self) -> None:
        """Moves replicas along the cheapest paths from fuller to emptier nodes, until none are two apart that can be
        brought closer."""
        if max(self._load) - min(self._load) < 2:
            return
        edges = _Edges(len(self._load))
        for shard in range(len(self.taken)):
            edges.put(shard, self._edges_of(shard))
        edges.settle(range(len(self._load)))
        while path := self._cheapest_path(edges):
            changed: set[int] = set()
            for shard, source, target in path:
                changed.update(self.taken[shard], (target,))
                self.taken[shard].remove(source)
                self.taken[shard].append(target)
            self._load[path[0][1]] -= 1
            self._load[path[-1][2]] += 1
            for shard, _, _ in path:
                edges.put(shard, self._edges_of(shard))
            edges.settle(changed)

    def _nearest(self, shard: int, count: int) -> list[int]:
        taken: list[int] = []
        kept, distances = self._kept[shard], self._distances[shard]
        rest = sorted(self._candidates[shard], key=lambda node: (node not in kept, distances[node], node))
        if self._apart:
            return rest[:count]
        while len(taken) < count:
            best = min(rest, key=lambda node: self._shared(taken, node))  # the first of equals
            rest.remove(best)
            taken.append(best)
        return taken

    def _shared(self, taken: Iterable[int], node: int) -> tuple[int, int]:
        """How many of the nodes are in the node's zone, and on its host."""
        zone, host = self._domains[node]
        zones = hosts = 0
        for other in taken:
            if self._domains[other][0] == zone:
                zones += 1
                hosts += self._domains[other][1] == host
        return zones, hosts

    def _edges_of(self, shard: int) -> Iterator[tuple[int, int, int]]:
        """(from, to, cost) of each replica of a shard that can move, its domains shared with no more others. Costs are positive, also
        where a node is nearer: a cheapest path then visits no node twice."""
        taken, distances = self.taken[shard], self._distances[shard]
        free = [node for node in self._candidates[shard] if node not in taken]
        for source in taken:
            base = self._move_cost - distances[source]
            targets = free
            if not self._apart:
                others = [node for node in taken if node != source]
                shared = self._shared(others, source)
                targets = [node for node in free if self._shared(others, node) <= shared]
            for target in targets:
                yield source, target, max(1, base + distances[target])

    def _cheapest_path(self, edges: _Edges) -> list[tuple[int, int, int]]:
        """(shard, from, to) of each move on the cheapest way from one of the fullest nodes that can give to one that holds
        at least two fewer; empty if there is none (Dijkstra)."""
        least = min(self._load)
        for load in sorted(set(self._load), reverse=True):
            if load < least + 2:
                break
            heap = [(0, node, -1, -1) for node, own in enumerate(self._load) if own == load]
            came: dict[int, tuple[int, int]] = {}  # node -> (shard, from)
            while heap:
                cost, node, shard, source = heappop(heap)
                if node in came:
                    continue
                came[node] = shard, source
                if self._load[node] <= load - 2:
                    path = _walk(came, node)
                    if len({shard for shard, _, _ in path}) == len(path):
                        return path
                for target, (step, moved) in edges.cheapest[node].items():
                    if target not in came:
                        heappush(heap, (cost + step, target, moved, node))
        return []


class _Edges:
    """The cheapest replica to move from each node to each other one.

    A move changes what one shard allows, and nothing else. So each pair of nodes has a heap of all replicas that could move: what a
    shard allowed before goes when it comes up, and a move costs what one shard has to say, however many shards there are."""

    def __init__(self, nodes: int) -> None:
        self.cheapest: list[dict[int, tuple[int, int]]] = [{} for _ in range(nodes)]
        """[node]: other node -> (cost, shard)."""
        self._heaps: list[list[list[tuple[int, int, int]]]] = [[[] for _ in range(nodes)] for _ in range(nodes)]
        """[from][to]: (cost, shard, version of what the shard allows)."""
        self._versions: dict[int, int] = {}

    def put(self, shard: int, edges: Iterable[tuple[int, int, int]]) -> None:
        """What a shard allows now: (from, to, cost); `cheapest` follows with `settle`."""
        version = self._versions[shard] = self._versions.get(shard, 0) + 1
        for source, target, cost in edges:
            heappush(self._heaps[source][target], (cost, shard, version))

    def settle(self, nodes: Iterable[int]) -> None:
        """Brings `cheapest` up to date for nodes from which other replicas can move, or to other nodes."""
        versions = self._versions
        for source in nodes:
            cheapest = self.cheapest[source]
            for target, heap in enumerate(self._heaps[source]):
                while heap and versions[heap[0][1]] != heap[0][2]:
                    heappop(heap)
                if heap:
                    cheapest[target] = heap[0][:2]
                else:
                    cheapest.pop(target, None)


def _walk(came: dict[int, tuple[int, int]], node: int) -> list[tuple[int, int, int]]:
    path = []
    while came[node][1] >= 0:
        shard, source = came[node]
        path.append((shard, source, node))
        node = source
    return path[::-1]
