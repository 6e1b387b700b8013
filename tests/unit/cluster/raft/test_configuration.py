"""Configurations: what may follow what, and their bytes."""
from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.cluster.errors import ChangeInvalid
from spillway.cluster.raft.configuration import LEARNERS_MAX, VOTERS_MAX, Change, ChangeKind, Configuration, decode_configuration

ADD, PROMOTE, DEMOTE, REMOVE = ChangeKind.ADD_LEARNER, ChangeKind.PROMOTE, ChangeKind.DEMOTE, ChangeKind.REMOVE
ABC = Configuration.of(["c", "a", "b"])


def test_a_node_comes_as_a_learner_and_goes_as_anything() -> None:
    """One step at a time; the order of the ids is always the same."""
    learner = ABC.after(Change(ADD, "aa"))
    assert learner == Configuration(("a", "b", "c"), ("aa",)) and learner.quorum == ABC.quorum == 2
    voter = learner.after(Change(PROMOTE, "aa"))
    assert voter == Configuration(("a", "aa", "b", "c")) and voter.quorum == 3
    assert voter.after(Change(DEMOTE, "aa")) == learner
    assert voter.after(Change(REMOVE, "aa")) == learner.after(Change(REMOVE, "aa")) == ABC
    assert "aa" in learner and "aa" not in ABC


@pytest.mark.parametrize(("before", "change", "why"), [
    (ABC, Change(ADD, "a"), "member already"), (ABC, Change(ADD, ""), "1 to 255"), (ABC, Change(ADD, "x" * 256), "1 to 255"),
    (ABC, Change(PROMOTE, "a"), "voter already"), (ABC, Change(PROMOTE, "d"), "not a member"),
    (ABC, Change(REMOVE, "d"), "not a member"), (Configuration(("a",), ("b",)), Change(REMOVE, "a"), "only voter"),
    (Configuration(("a",), tuple(f"l{i}" for i in range(LEARNERS_MAX))), Change(ADD, "z"), "8 learners"),
    (Configuration(("a", "b"), tuple(f"l{i}" for i in range(LEARNERS_MAX))), Change(DEMOTE, "a"), "8 learners"),
    (Configuration(("a",), ("b",)), Change(DEMOTE, "a"), "only voter"), (Configuration(("a",), ("b",)), Change(DEMOTE, "b"), "already"),
    (ABC, Change(DEMOTE, "d"), "not a member"),
    (Configuration(tuple(f"v{i}" for i in range(VOTERS_MAX)), ("z",)), Change(PROMOTE, "z"), "7 voters"),
])
def test_nonsense_is_refused(before: Configuration, change: Change, why: str) -> None:
    """With the reason."""
    with pytest.raises(ChangeInvalid, match=why):
        before.after(change)


def test_what_a_newer_version_wrote_is_not_read_in_part() -> None:
    """A configuration with more to it would be another one without that: it is said what to run."""
    with pytest.raises(ValueError, match=r"3 parts; this version reads 2: a newer one wrote it; run that one"):
        decode_configuration(msgspec.msgpack.encode([["a"], [], ["witness"]]))


@given(st.lists(st.text("abcdef", min_size=1, max_size=3), unique=True, min_size=1, max_size=8), st.integers(1, 4))
def test_bytes_are_read_back(nodes: list[str], voters: int) -> None:
    """The same configuration has the same bytes."""
    configuration = Configuration(tuple(sorted(nodes[:voters])), tuple(sorted(nodes[voters:])))
    assert decode_configuration(configuration.encode()) == configuration


@pytest.mark.parametrize("data", [
    b"", b"x", b"\x92\x91\xa1a", ABC.encode() + b"\0", *map(msgspec.msgpack.encode, (
        [["b", "a"], []], [["a", "a"], []], [["a"], ["a"]], [[""], []], [["x" * 256], []], [[f"{i}" for i in range(8)], []],
        [["a"], [f"{i}" for i in range(9)]], [["a"]], [["a"], [], []], [[1], []], {"voters": ["a"], "learners": []}))])
def test_other_bytes_are_refused(data: bytes) -> None:
    """As ValueError, whatever they are."""
    with pytest.raises(ValueError):
        decode_configuration(data)


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Nothing else comes out."""
    try:
        assert decode_configuration(data).encode()
    except ValueError:
        pass
