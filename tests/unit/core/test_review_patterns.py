"""Which destinations a subscription's patterns name."""
from __future__ import annotations

import re
import time

from hypothesis import example, given, settings
from hypothesis import strategies as st
from spillway.broker.core.scheduler import Subscription

TEXT = st.text("ab*", min_size=1, max_size=8)


@settings(derandomize=True, deadline=None, database=None, max_examples=500)
@given(st.lists(TEXT, min_size=1, max_size=3), st.text("ab", max_size=8))
@example(["a*a"], "a")
@example(["*aa*a*"], "aaa")
@example(["*ä*"], "öäü")
def test_a_star_is_any_run_of_characters(patterns: list[str], name: str) -> None:
    """As the regular expression says that has '.*' for each star."""
    expected = any(re.fullmatch(".*".join(map(re.escape, p.split("*"))), name, re.DOTALL) for p in patterns)
    assert Subscription(frozenset(patterns)).matches(name.encode()) == expected


def test_many_stars_cost_no_time() -> None:
    """Patterns come from consumers: no pattern may hold up the node, however often it could be tried."""
    began = time.process_time()
    for stars in (20, 60, 127):
        assert not Subscription(frozenset({"*a" * stars + "*b"})).matches(b"a" * 255)
    assert time.process_time() - began < 1
