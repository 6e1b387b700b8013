"""The shard against a naive one: the same entries, the same outcome, whatever is cold, evicted, saved or restarted."""
from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.broker.core.entry import ACK, DISCARD, DOWN, EXTEND, REJECT, RELEASE, RETRY, THROTTLED
from spillway.broker.core.shard import SettleStatus

from tests.properties.shard_world import Step, World, cache_bytes, random_program

BYTE = st.integers(0, 255)
PROGRAMS = st.sampled_from([10, 40, 80]).flatmap(  # the lists that hypothesis draws by itself are too short
    lambda steps: st.lists(st.tuples(BYTE, BYTE, BYTE, BYTE), min_size=steps, max_size=steps))
CACHES = [0, 2_000, 4 << 20]
RARE = ["copies known", "copies refused", "copies taken", "cut leased queues", "deletes of message rows", "duplicates",
        "grants of messages not in memory", "loads of cold messages", "purged", "purges of leased queues",
        "purges of queues partly in the store", "queues that vanish and come back", "range deletes", "redriven",
        "redrives before a cold tail", "redrives behind others", "redrives that leave a gap",
        "restarts with live leases", "tails", "trimmed", "trims of cold messages"]


@pytest.mark.parametrize("cache", CACHES)
@given(program=PROGRAMS, short=st.booleans())
def test_a_shard_does_what_the_naive_one_does(cache: int, program: list[Step], short: bool) -> None:
    """Any short history keeps I2 to I7 on every replica, and restarted replicas equal those that ran on."""
    with cache_bytes(cache):
        World(short=short).run(program)


@pytest.mark.parametrize("cache", CACHES)
def test_long_histories_reach_the_rare_paths(cache: int) -> None:
    """Long histories keep I2 to I7 too, and they do take the rare paths, so this suite proves something about them."""
    reached: Counter[str] = Counter()
    with cache_bytes(cache):
        for seed in range(12):
            reached += World(short=seed % 2 == 1).run(random_program(seed, 400)).reached
    assert [path for path in RARE if not reached[path]] == []
    assert (reached["evicted queues"] > 100) == (cache < 4 << 20)
    for outcome in (ACK, RETRY, THROTTLED, DOWN, REJECT, RELEASE, EXTEND, DISCARD):
        for status in (SettleStatus.OK, SettleStatus.ALREADY, SettleStatus.STALE, SettleStatus.NOT_FIRST):
            if (outcome, status) != (EXTEND, SettleStatus.ALREADY):
                assert reached[f"settlement {outcome} status {status}"], (outcome, status)


@given(seed=st.integers(0, 1 << 32), short=st.booleans())
def test_histories_from_a_seed(seed: int, short: bool) -> None:
    """Whole histories from one random number keep I2 to I7; the profile `long` makes many of them."""
    with cache_bytes(seed % 3 * 1_000):
        World(short=short).run(random_program(seed, 150))
