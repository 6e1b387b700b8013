"""Where shards go does not depend on how fast it is found."""
from __future__ import annotations

import sys
from types import FrameType

from hypothesis import given
from hypothesis import strategies as st
from spillway.cluster.placement import Site, place

from tests.properties import naive_placement

NODES = st.lists(st.builds(Site, st.sampled_from("abcdefghijkl"), st.sampled_from(["", "x", "y", "z"]), st.sampled_from(["", "1", "2"])),
                 min_size=1, max_size=9, unique_by=lambda site: site.node_id)
ALONE = st.lists(st.builds(Site, st.sampled_from("abcdefghijkl")), min_size=1, max_size=9, unique_by=lambda site: site.node_id)


@given(st.lists(NODES | ALONE, min_size=1, max_size=4), st.integers(1, 20), st.integers(1, 5))
def test_it_is_where_the_naive_choice_puts_it(sets: list[list[Site]], shards: int, replicas: int) -> None:
    """Whatever nodes come and go: the placement of a cluster never changes because the way to it does."""
    placement: dict[int, list[str]] = {}
    for nodes in sets:
        expected = naive_placement.place(nodes, shards, replicas, placement)
        assert place(nodes, shards, replicas, placement) == expected
        placement = expected


def calls(shards: int, before: int, after: int) -> int:
    """How many functions are called to place shards on other nodes than before."""
    nodes = [Site(f"n{n}") for n in range(max(before, after))]
    placement = place(nodes[:before], shards, 3)
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    outer = sys.getprofile()
    sys.setprofile(profile)
    try:
        place(nodes[:after], shards, 3, placement)
    finally:
        sys.setprofile(outer)
    return count


def test_twice_as_many_shards_are_twice_the_work() -> None:
    """Each move costs what one shard has to say, not all of them: it is the meta leader's event loop that waits."""
    for before, after in ((3, 5), (13, 14), (14, 13)):
        assert calls(512, before, after) < 2.5 * calls(256, before, after)
