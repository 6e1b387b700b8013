"""Where shards go: even, apart, and staying there when nodes come and go."""
from __future__ import annotations

import itertools
from collections import Counter
from math import ceil, floor

import pytest
from spillway.cluster.placement import Site, place

Placement = dict[int, list[str]]


def sites(count: int, zones: int = 0, per_host: int = 1) -> list[Site]:
    return [Site(f"node-{n}", f"zone-{n % zones}" if zones else "", f"host-{n // per_host}") for n in range(count)]


def loads(placement: Placement, nodes: list[Site]) -> list[int]:
    count = Counter(itertools.chain.from_iterable(placement.values()))
    return [count[site.node_id] for site in nodes]


def leads(placement: Placement, nodes: list[Site]) -> list[int]:
    count = Counter(replicas[0] for replicas in placement.values())
    return [count[site.node_id] for site in nodes]


def moved(before: Placement, after: Placement) -> Counter[str]:
    """Node -> replicas that it has and had not."""
    return Counter(node for shard in before for node in set(after[shard]) - set(before[shard]))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 7, 9, 12, 20])
@pytest.mark.parametrize("shards", [1, 16, 64, 200])
@pytest.mark.parametrize("replicas", [1, 3, 5])
def test_every_node_has_its_share(nodes: int, shards: int, replicas: int) -> None:
    """Of replicas and of preferred leaders, to one; replicas of a shard are on different nodes."""
    all_nodes = sites(nodes)
    placement = place(all_nodes, shards, replicas)
    assert list(placement) == list(range(1, shards + 1))
    assert all(len(set(r)) == len(r) == min(replicas, nodes) for r in placement.values())
    share = shards * min(replicas, nodes) / nodes
    assert {floor(share), ceil(share)} >= set(loads(placement, all_nodes))
    assert {floor(shards / nodes), ceil(shards / nodes)} >= set(leads(placement, all_nodes))


def test_it_depends_on_the_names_only() -> None:
    """Every node computes the same, in whatever order it knows the others; it is the same in every release."""
    nodes = sites(7, zones=3)
    assert place(nodes, 16, 3) == place(nodes[::-1], 16, 3)
    assert place(["a", "b", "c", "d"], 3, 2) == place([Site("d"), Site("b"), Site("a"), Site("c")], 3, 2)
    assert place(["a", "b", "c", "d", "e"], 5, 3) == {
        1: ["e", "b", "c"], 2: ["a", "d", "e"], 3: ["b", "c", "e"], 4: ["d", "a", "b"], 5: ["c", "a", "d"]}


@pytest.mark.parametrize(("nodes", "zones", "replicas"), [
    (3, 3, 3), (6, 3, 3), (7, 3, 3), (4, 3, 3), (9, 4, 3), (12, 5, 3), (10, 5, 5), (5, 3, 2), (6, 2, 3), (8, 3, 5), (6, 6, 3)])
def test_zones_are_apart(nodes: int, zones: int, replicas: int) -> None:
    """A zone that fails takes as few replicas of a shard as can be; leaders stay even."""
    all_nodes = sites(nodes, zones)
    zone_of = {site.node_id: site.zone for site in all_nodes}
    placement = place(all_nodes, 64, replicas)
    for shard in placement.values():
        in_zone = Counter(zone_of[node] for node in shard)
        assert len(in_zone) == min(zones, replicas)
        assert max(in_zone.values()) == ceil(replicas / zones)
    if nodes % zones == 0 or replicas * ceil(nodes / zones) < nodes:
        assert max(loads(placement, all_nodes)) - min(loads(placement, all_nodes)) <= 1
    for zone in set(zone_of.values()):  # inside of a zone it is always even
        inside = [load for load, site in zip(loads(placement, all_nodes), all_nodes, strict=True) if site.zone == zone]
        assert max(inside) - min(inside) <= 1
    assert max(leads(placement, all_nodes)) - min(leads(placement, all_nodes)) <= 1


def test_hosts_are_apart_where_zones_are_not() -> None:
    """Two replicas in a zone are not on one machine if it has another."""
    nodes = [Site(f"{zone}{host}{n}", zone, f"{zone}{host}") for zone in "xy" for host in "12" for n in "ab"]
    for shard in place(nodes, 64, 4).values():
        assert len({node[:2] for node in shard}) == 4


def test_a_zone_of_one_node_carries_what_it_must() -> None:
    """Keeping replicas apart comes before even loads."""
    nodes = [Site("a", "x"), Site("b", "y"), *(Site(f"c{n}", "z") for n in range(4))]
    placement = place(nodes, 16, 3)
    assert loads(placement, nodes) == [16, 16, 4, 4, 4, 4]


@pytest.mark.parametrize(("nodes", "shards", "zones"), [
    (3, 16, 0), (4, 16, 0), (5, 16, 0), (5, 16, 3), (6, 64, 3), (4, 64, 0), (8, 64, 0), (8, 64, 4), (8, 256, 0), (12, 256, 3)])
@pytest.mark.parametrize("cluster", ["a", "b", "c"])
def test_a_new_node_moves_its_share(nodes: int, shards: int, zones: int, cluster: str) -> None:
    """At most 1.3/N of the replicas, knowing nothing of the placement before; going back gives the old placement."""
    old = [Site(f"{cluster}{n}", f"zone-{n % zones}" if zones else "") for n in range(nodes)]
    new = Site(f"{cluster}{nodes}", f"zone-{nodes % zones}" if zones else "")
    before, after = place(old, shards, 3), place([*old, new], shards, 3)
    assert sum(moved(before, after).values()) <= 1.3 / nodes * shards * 3
    assert place(old, shards, 3) == before


@pytest.mark.parametrize(("nodes", "shards", "zones"), [
    (1, 16, 0), (2, 16, 0), (3, 16, 0), (4, 16, 3), (5, 16, 3), (8, 16, 0), (12, 16, 0), (12, 16, 4), (20, 64, 0)])
def test_a_new_node_moves_nothing_else_where_the_placement_is_known(nodes: int, shards: int, zones: int) -> None:
    """What the new node takes is all that moves; loads and leaders are as even as ever."""
    everyone = sites(nodes + 1, zones)
    before = place(everyone[:-1], shards, 3)
    after = place(everyone, shards, 3, before)
    replicas = min(3, nodes + 1)
    assert set(moved(before, after)) <= {everyone[-1].node_id}
    assert max(leads(after, everyone)) - min(leads(after, everyone)) <= 1
    if not zones:
        assert {floor(shards * replicas / (nodes + 1)), ceil(shards * replicas / (nodes + 1))} >= set(loads(after, everyone))
    assert place(everyone, shards, 3, after) == after, "nothing moves without a reason"


@pytest.mark.parametrize("zones", [0, 3])
def test_the_replicas_of_a_lost_node_go_to_others_and_no_other_moves(zones: int) -> None:
    """Each survivor takes its part."""
    everyone = sites(9, zones)
    before = place(everyone, 64, 3)
    left = everyone[1:]
    after = place(left, 64, 3, before)
    gone = loads(before, everyone)[0]
    assert gone <= sum(moved(before, after).values()) <= gone + len(left)
    if not zones:
        assert max(loads(after, left)) - min(loads(after, left)) <= 1


def test_a_new_zone_takes_apart_what_had_to_be_together() -> None:
    """Known replicas that share a zone are moved once they need not."""
    two = [Site("a", "x"), Site("b", "x"), Site("c", "y"), Site("d", "y")]
    after = place([*two, Site("e", "z")], 16, 3, place(two, 16, 3))
    zone_of = {"a": "x", "b": "x", "c": "y", "d": "y", "e": "z"}
    assert all({zone_of[node] for node in shard} == {"x", "y", "z"} for shard in after.values())


@pytest.mark.parametrize(("nodes", "shards", "replicas"), [([], 1, 1), (["a"], 0, 1), (["a"], 1, 0), (["a", "a"], 1, 1)])
def test_nonsense_is_refused(nodes: list[str], shards: int, replicas: int) -> None:
    """Before it becomes a placement."""
    with pytest.raises(ValueError):
        place(nodes, shards, replicas)
