"""What scopes allow: patterns, and decisions that are remembered."""
from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.broker.core import access
from spillway.broker.core.access import ADMIN, LEASE, PRODUCE, Grants, Pattern, Scope, described, of_patterns

TEXTS = st.text("ab*", max_size=8)
NAMES = st.text("ab", max_size=8)


def naive(pattern: str) -> re.Pattern[str]:
    """The same pattern as a regular expression."""
    return re.compile("".join(".*" if c == "*" else re.escape(c) for c in pattern), re.DOTALL)


@given(TEXTS, NAMES)
def test_a_star_stands_for_any_run_of_characters(pattern: str, name: str) -> None:
    """As a regular expression has it, without backtracking."""
    assert Pattern(pattern).covers(name) == bool(naive(pattern).fullmatch(name))


@given(TEXTS, TEXTS, st.lists(NAMES, min_size=8, max_size=8))
def test_a_pattern_covers_another_one_only_if_it_covers_all_that_one_stands_for(pattern: str, asked: str, runs: list[str]) -> None:
    """Whatever the stars of the one that is asked for stand for."""
    if Pattern(pattern).covers(asked):
        fill = iter(runs)
        assert Pattern(pattern).covers("".join(next(fill) if c == "*" else c for c in asked))


@pytest.mark.parametrize(("pattern", "asked", "covers"), [
    ("*", "*", True), ("a*", "a*", True), ("a*", "ab*", True), ("a*", "*", False), ("a*b", "a*", False), ("*a*", "b*a", True),
    ("a", "a*", False), ("a*a", "a", False), ("", "", True), ("", "a", False), ("*", "", True), ("a-*-b-*", "a-x-b-", True),
    ("**", "*", True)])
def test_patterns(pattern: str, asked: str, covers: bool) -> None:
    """Those that are easily got wrong."""
    assert Pattern(pattern).covers(asked) == covers


def test_scopes_allow_together_what_each_does() -> None:
    """An action needs a scope of its own kind, for the destination and the tenant at once."""
    grants = Grants([Scope(PRODUCE, "a", "t"), Scope(PRODUCE, "b", "*"), Scope(LEASE, "a*"), Scope(ADMIN, "b", "")])
    assert [grants.allows(PRODUCE, d, t) for d, t in (("a", "t"), ("a", "u"), ("b", "u"), ("b", "t"), ("c", "t"))] == [
        True, False, True, True, False]
    assert grants.allows(LEASE, "a") and grants.allows(LEASE, "ab*") and not grants.allows(LEASE, "*") and not grants.allows(LEASE, "b")
    assert grants.allows(ADMIN, "b", "") and not grants.allows(ADMIN, "b") and not grants.allows(ADMIN, "a", "")
    assert grants.everything == (False, False, False) and Grants([Scope(LEASE)]).everything == (False, True, False)
    assert grants.settles(b"ab\0t\0k") and not grants.settles(b"b\0t\0k")
    assert of_patterns(grants.lease_patterns()).settles(b"ab\0t\0k") and not of_patterns(grants.lease_patterns()).settles(b"b\0t\0k")


def test_a_scope_to_lease_from_some_tenants_allows_nothing() -> None:
    """Consumers get messages of all tenants."""
    grants = Grants([Scope(LEASE, "a", "t")])
    assert not grants.some(LEASE) and not grants.allows(LEASE, "a") and not grants.allows(LEASE, "a", "t") and grants.lease_patterns() == []


def test_decisions_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names are asked for, and however long they are."""
    monkeypatch.setattr(access, "DECISIONS_MAX", 10)
    grants = Grants([Scope(PRODUCE, "a*")])
    for n in range(100):
        assert grants.allows(PRODUCE, f"a{n}", "t") and not grants.allows(PRODUCE, "b" * 600, str(n))
        assert len(grants._decisions) <= 10 and not any(len(d) > 510 for _, d, _ in grants._decisions)


def test_scopes_are_told_as_people_write_them() -> None:
    """For lists and errors."""
    assert [described(s) for s in (Scope(PRODUCE), Scope(LEASE, "a*"), Scope(ADMIN, "*", "t"), Scope(PRODUCE, "a", ""))] == [
        "produce", "lease a*", "admin * 't'", "produce a ''"]
