"""The guard's rules on hand-built messages, and on every small log."""
from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from spillway.cluster.raft.guard import Guard


class Log:
    """A LogView from index `first` on."""

    def __init__(self, terms: list[int], first: int = 1, commit: int = 1) -> None:
        self.terms = terms
        self.first = first
        self.last = first + len(terms) - 1
        self.commit = commit

    def term_at(self, index: int) -> int | None:
        """See LogView."""
        return self.terms[index - self.first] if self.first <= index <= self.last else None

    def term_start(self, index: int) -> int:
        """See LogView."""
        while index > self.first and self.term_at(index - 1) == self.term_at(index):
            index -= 1
        return index


def _append(prev: int, term: int, terms: list[int], commit: int = 0) -> dict[str, Any]:
    return {"type": "append_entries", "term": 9, "prevLogIdx": prev, "prevLogTerm": term, "commit_index": commit,
            "entries": [(b"\0%d" % t, prev + 1 + i, t) for i, t in enumerate(terms)]}


def test_what_is_there_is_skipped() -> None:
    """R10: the library sees only what is new, after the last entry that agrees."""
    trimmed, claim = Guard(Log([1, 1, 2, 2])).trim(_append(1, 1, [1, 2, 2, 3, 3]))
    assert (trimmed["prevLogIdx"], trimmed["prevLogTerm"]) == (4, 2)
    assert [e[1:] for e in trimmed["entries"]] == [(5, 3), (6, 3)]
    assert claim == 7


def test_nothing_new_deletes_nothing() -> None:
    """R10: an append that ends within the log is delivered at its end; the answer and the commit index name only what it
    verified."""
    trimmed, claim = Guard(Log([1, 1, 2, 2, 2])).trim(_append(1, 1, [1, 2], commit=5))
    assert (trimmed["prevLogIdx"], trimmed["prevLogTerm"], trimmed["entries"]) == (5, 2, [])
    assert trimmed["commit_index"] == 3
    assert claim == 4


def test_a_heartbeat_verifies_what_it_names() -> None:
    """The rule-3 clamp and answer: a heartbeat at 2 neither commits nor claims the tail, which may be another leader's."""
    trimmed, claim = Guard(Log([1, 1, 1, 1])).trim(_append(2, 1, [], commit=4))
    assert trimmed["commit_index"] == 2
    assert claim == 3


def test_a_conflict_is_cut_where_it_begins() -> None:
    """Only what conflicts goes."""
    trimmed, claim = Guard(Log([1, 1, 2, 2])).trim(_append(1, 1, [1, 3]))
    assert (trimmed["prevLogIdx"], [e[1:] for e in trimmed["entries"]], claim) == (2, [(3, 3)], 4)


def test_a_mismatch_commits_nothing_and_says_where_to_go_on() -> None:
    """The hint is the start of the conflicting term, but above what is committed; after a shorter log it is its end."""
    guard = Guard(Log([1, 1, 2, 2, 2, 2], commit=2))
    trimmed, claim = guard.trim(_append(6, 3, [3], commit=7))
    assert (trimmed["commit_index"], trimmed["entries"], claim) == (0, [], 3)
    assert trimmed["prevLogIdx"] == 7  # where the log has nothing
    assert Guard(Log([1, 1, 2, 2, 2, 2], commit=4)).hint(6) == 5
    assert guard.trim(_append(20, 3, []))[1] == 7


def test_what_is_compacted_is_known_to_agree() -> None:
    """Below the first entry everything is committed: skipped without a look."""
    guard = Guard(Log([2, 2, 2], first=10, commit=11))
    trimmed, claim = guard.trim(_append(5, 1, [1, 1]))
    assert (trimmed["prevLogIdx"], trimmed["entries"], claim) == (12, [], 8)
    trimmed, claim = guard.trim(_append(8, 1, [1, 2, 2, 2, 3]))
    assert (trimmed["prevLogIdx"], [e[1:] for e in trimmed["entries"]], claim) == (12, [(13, 3)], 14)


def _library(log: list[int], first: int, m: dict[str, Any]) -> tuple[list[int], bool]:
    """What pysyncobj does with an append: the log after it, and whether it succeeded."""
    at = m["prevLogIdx"] - first
    if not 0 <= at < len(log) or log[at] != m["prevLogTerm"]:
        return log, False
    return log[:at + 1] + [e[2] for e in m["entries"]], True


def test_every_small_log_and_append() -> None:
    """Against Raft's rule, exhaustively: an append deletes an entry only if one before or at it conflicts; afterwards the
    log agrees with the leader up to what the answer claims, and to what may be committed."""
    logs = [list(t) for n in range(1, 5) for t in product((1, 2), repeat=n) if list(t) == sorted(t)]
    for mine, theirs in product(logs, [[1, *t] for t in logs]):
        mine = [1, *mine]
        agree = 0
        while agree < min(len(mine), len(theirs)) and mine[agree] == theirs[agree]:
            agree += 1
        if any(a == b for a, b in zip(mine[agree:], theirs[agree:], strict=False)):
            continue  # no two such logs can be: an entry with the same index and term has the same ones before it
        for prev in range(1, len(theirs) + 1):
            for end in range(prev, len(theirs) + 1):
                m = _append(prev, theirs[prev - 1], theirs[prev:end], commit=len(theirs))
                trimmed, claim = Guard(Log(mine)).trim(m)
                after, success = _library(mine, 1, trimmed)
                if prev > agree:
                    assert not success
                    assert after == mine
                    assert trimmed["commit_index"] == 0
                    assert claim is not None
                    assert claim <= prev
                    continue
                assert success
                assert claim == end + 1
                assert after[:end] == theirs[:end]
                assert trimmed["commit_index"] == end
                if end <= agree:
                    assert after == mine, "a log that agrees lost entries"


@pytest.mark.parametrize(("answer", "kept"), [
    ({"sender_term": 4, "reset": False, "round": 1}, None),
    ({"sender_term": 6, "reset": True, "round": 1}, None),
    ({"sender_term": 5, "reset": True, "round": 3}, True),
    ({"sender_term": 5, "reset": True, "round": 2}, False),
    ({"sender_term": 5, "reset": False, "round": 2}, False)])
def test_answers_of_other_terms_and_rounds(answer: dict[str, Any], kept: bool | None) -> None:
    """R10b: another term's answer is dropped. R10a: a reset of an older round is a plain answer."""
    judged = Guard(Log([1])).judge(answer, term=5, round_now=3)
    assert (None if judged is None else judged["reset"]) is kept


def test_a_vote_counts_once_per_voter_and_term() -> None:
    """R11."""
    guard = Guard(Log([1]))
    assert [guard.first_vote(v, t) for v, t in (("a", 2), ("a", 2), ("b", 2), ("a", 3), ("a", 3))] == [
        True, False, True, True, False]
