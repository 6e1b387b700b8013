"""The checker refuses what it must: one broken history for each rule, made from one that it accepts."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.torture.checker import RULES, Verdict, judge
from tests.torture.history import Event, Queue, Writer, number_of, payload, read

LEASE = 5.0
Q: Queue = ("d", "t", "k")


def destination(name: str = "d", ordered: bool = True) -> Event:
    return {"at": 0.0, "by": "run", "kind": "destination", "destination": name, "ordered": ordered, "attempts_max": 3, "lease": LEASE}


def produced(at: float, n: int, seq: int, q: Queue = Q, shard: int = 1) -> list[Event]:
    return [{"at": at, "by": "p", "kind": "sent", "q": q, "n": n},
            {"at": at + 0.1, "by": "p", "kind": "stored", "q": q, "n": n, "shard": shard, "seq": seq}]


def leased(at: float, token: int, *messages: tuple[int, int, int], q: Queue = Q, by: str = "c") -> Event:
    return {"at": at + 0.05, "by": by, "kind": "lease", "q": q, "shard": 1, "token": token, "deadline": at + LEASE, "messages": messages}


def handled(at: float, token: int, n: int, seq: int, q: Queue = Q, by: str = "c") -> Event:
    return {"at": at, "by": by, "kind": "start", "q": q, "shard": 1, "token": token, "n": n, "seq": seq}


def settled(at: float, token: int, seq: int, outcome: str = "ack", result: str = "ok", by: str = "c", seconds: float = 0.0) -> list[Event]:
    common = {"by": by, "shard": 1, "token": token, "seq": seq, "outcome": outcome}
    return [{"at": at, "kind": "settle", "seconds": seconds, **common}, {"at": at + 0.1, "kind": "settled", "result": result, **common}]


def ended(enqueued: int, acked: int, dead: int = 0, left: int = 0, complete: bool = True) -> list[Event]:
    return [{"at": 99.0, "by": "run", "kind": "books", "destination": "d", "enqueued": enqueued, "acked": acked, "dead": dead,
             "left": left},
            {"at": 99.0, "by": "run", "kind": "drained", "complete": complete}]


def dead(n: int, seq: int) -> Event:
    return {"at": 98.0, "by": "run", "kind": "dead", "q": Q, "n": n, "seq": seq}


def history(*parts: Event | list[Event]) -> list[Event]:
    """A history from its parts, in order of time."""
    events = [event for part in parts for event in (part if isinstance(part, list) else [part])]
    return sorted(events, key=lambda event: event["at"])


def refused(*parts: Event | list[Event]) -> set[str]:
    """The rules that a history breaks."""
    return set(judge(history(*parts)).counts)


THREE = [destination(), *produced(1, 0, 10), *produced(1.2, 1, 11), *produced(1.4, 2, 12)]


def good() -> list[Event]:
    """Three messages: one is acknowledged, the second fails once, the third is rejected."""
    return history(THREE, leased(2, 100, (0, 10, 1), (1, 11, 1), (2, 12, 1)), handled(2.1, 100, 0, 10), settled(2.2, 100, 10),
                   handled(2.3, 100, 1, 11), settled(2.4, 100, 11, "retry"),
                   leased(3, 101, (1, 11, 2), (2, 12, 1)), handled(3.1, 101, 1, 11), settled(3.2, 101, 11),
                   handled(3.3, 101, 2, 12), settled(3.4, 101, 12, "reject"), dead(2, 12), ended(3, 2, 1))


def test_a_good_history_is_accepted() -> None:
    """Retries, dead letters and redeliveries are no violation, and they are counted."""
    verdict = judge(good())
    assert verdict.clean, verdict.examples
    assert (verdict.stored, verdict.delivered, verdict.leases, verdict.redelivered, verdict.dead) == (3, 3, 2, 2, 1)


def test_an_expired_lease_and_a_refused_settlement_are_accepted() -> None:
    """A lease that expired comes again, what its consumer still says is refused; a message of which the producer does not
    know whether it is stored may be there or not."""
    verdict = judge(history(
        THREE[:3], [{"at": 1.5, "by": "p", "kind": "sent", "q": Q, "n": 1}, {"at": 1.6, "by": "p", "kind": "sent", "q": Q, "n": 2},
                    {"at": 1.7, "by": "p", "kind": "failed", "q": Q, "n": 1, "sure": False, "error": "?"},
                    {"at": 1.7, "by": "p", "kind": "failed", "q": Q, "n": 2, "sure": True, "error": "full"}],
        leased(2, 100, (0, 10, 1)), handled(2.1, 100, 0, 10), leased(7.1, 101, (0, 10, 2), by="other"),
        handled(7.2, 101, 0, 10, by="other"), settled(7.3, 100, 10, result="stale"), settled(7.4, 101, 10, by="other"), ended(1, 1)))
    assert verdict.clean, verdict.examples
    assert (verdict.unsure, verdict.stale) == (1, 1)


BROKEN: dict[str, Callable[[], list[set[str]]]] = {
    "lost": lambda: [
        # Stored and never seen again.
        refused(destination(), produced(1, 0, 10), ended(1, 0)) - {"books"},
        # Rejected, and not among the dead letters.
        refused(destination(), produced(1, 0, 10), leased(2, 100, (0, 10, 1)), handled(2.1, 100, 0, 10),
                settled(2.2, 100, 10, "reject"), ended(1, 0)) - {"books"}],
    "invented": lambda: [
        # Delivered and never sent.
        refused(destination(), leased(2, 100, (0, 10, 1)), handled(2.1, 100, 0, 10), settled(2.2, 100, 10), ended(1, 1)),
        # Refused for certain, and delivered.
        refused(destination(), {"at": 1, "by": "p", "kind": "sent", "q": Q, "n": 0},
                {"at": 1.1, "by": "p", "kind": "failed", "q": Q, "n": 0, "sure": True, "error": "full"},
                leased(2, 100, (0, 10, 1)), handled(2.1, 100, 0, 10), settled(2.2, 100, 10), ended(1, 1)),
        # Not as it was produced.
        refused(good(), leased(4, 103, (-1, 13, 1)), settled(4.2, 103, 13))],
    "stored twice": lambda: [
        refused(destination(), produced(1, 0, 10), leased(2, 100, (0, 10, 1)), settled(2.2, 100, 10),
                leased(3, 101, (0, 11, 1)), settled(3.2, 101, 11), ended(1, 1))],
    "misplaced": lambda: [
        # The second one stands before the first.
        refused(destination(), produced(1, 0, 11), produced(1.2, 1, 10), leased(2, 100, (1, 10, 1)), settled(2.1, 100, 10),
                leased(3, 101, (0, 11, 1)), settled(3.1, 101, 11), ended(2, 2)) - {"overtaken"},
        # One queue in two shards.
        refused(destination(), produced(1, 0, 10), produced(1.2, 1, 11, shard=2), leased(2, 100, (0, 10, 1), (1, 11, 1)),
                settled(2.1, 100, 11), ended(2, 2))],
    "reordered": lambda: [
        refused(THREE[:5], leased(2, 100, (0, 10, 1), (1, 11, 1)), handled(2.2, 100, 1, 11), handled(2.3, 100, 0, 10),
                settled(2.4, 100, 11), ended(2, 2))],
    "overtaken": lambda: [
        # The first one is still waiting to be tried again.
        refused(THREE[:5], leased(2, 100, (0, 10, 1)), handled(2.1, 100, 0, 10), settled(2.2, 100, 10, "retry"),
                leased(3, 101, (1, 11, 1)), handled(3.1, 101, 1, 11), settled(3.2, 101, 11),
                leased(4, 102, (0, 10, 2)), settled(4.1, 102, 10), ended(2, 2)),
        # One is missing in the middle of a run.
        refused(THREE, leased(2, 100, (0, 10, 1), (2, 12, 1)), settled(2.2, 100, 12), leased(3, 101, (1, 11, 1)),
                settled(3.2, 101, 11), ended(3, 3))],
    "after ack": lambda: [
        # Given out again after the acknowledgement was confirmed.
        refused(THREE[:3], leased(2, 100, (0, 10, 1)), handled(2.1, 100, 0, 10), settled(2.2, 100, 10),
                leased(8, 101, (0, 10, 2)), settled(8.1, 101, 10), ended(1, 1)),
        # Handled again by the one whose lease was over.
        refused(THREE[:3], leased(2, 100, (0, 10, 1)), leased(7.1, 101, (0, 10, 2), by="other"), handled(7.2, 101, 0, 10, by="other"),
                settled(7.3, 101, 10, by="other"), handled(7.5, 100, 0, 10), ended(1, 1)),
        # Still there at the end.
        refused(THREE[:3], leased(2, 100, (0, 10, 1)), settled(2.2, 100, 10),
                {"at": 98, "by": "run", "kind": "left", "q": Q, "n": 0, "seq": 10}, ended(1, 0, 0, 1)) - {"books"}],
    "two leases": lambda: [
        # Two consumers have different messages of one queue.
        refused(THREE[:5], leased(2, 100, (0, 10, 1)), leased(3, 101, (1, 11, 1), by="other"), settled(3.2, 101, 11, by="other"),
                settled(3.4, 100, 10), ended(2, 2)) - {"overtaken"},
        # Its consumer had made the lease longer.
        refused(THREE[:3], leased(2, 100, (0, 10, 1)), settled(6, 100, 0, "extend", seconds=LEASE),
                leased(7.1, 101, (0, 10, 2), by="other"), settled(7.2, 101, 10, by="other"), ended(1, 1)) - {"repeated"}],
    "token": lambda: [
        refused(THREE[:5], leased(2, 100, (0, 10, 1)), settled(2.2, 100, 10), leased(3, 99, (1, 11, 1)), settled(3.2, 99, 11),
                ended(2, 2)) - {"two leases", "overtaken"},
        refused(THREE[:3], leased(2, 100, (0, 10, 1)), leased(2.1, 100, (0, 10, 1), by="other"), settled(2.2, 100, 10), ended(1, 1))],
    "repeated": lambda: [
        # The consumer's settlement is under way; until the deadline nobody else may have the message.
        refused(destination(ordered=False), produced(1, 0, 10), leased(2, 100, (0, 10, 1)), settled(2.2, 100, 10, result="unknown"),
                leased(3, 101, (0, 10, 1), by="other"), settled(3.2, 101, 10, by="other"), ended(1, 1))],
    "robbed": lambda: [
        refused(THREE[:3], leased(2, 100, (0, 10, 1)), settled(2.2, 100, 10, result="stale"), ended(1, 1))],
    "dead": lambda: [
        # Nobody rejected it.
        refused(THREE[:3], leased(2, 100, (0, 10, 1)), settled(2.2, 100, 10, "retry"), dead(0, 10), ended(1, 0, 1)),
        # It was acknowledged.
        refused(THREE[:3], leased(2, 100, (0, 10, 1)), settled(2.2, 100, 10), dead(0, 10), ended(1, 0, 1)) - {"books"}],
    "books": lambda: [refused(good()[:-2], ended(*counts)) for counts in (
        (4, 2, 1), (3, 1, 1), (3, 2, 0), (3, 2, 1, 1))],
    "stuck": lambda: [refused(good()[:-2], ended(3, 2, 1, complete=False)), refused(good()[:-1])],
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_history_is_refused_by_its_rule(rule: str) -> None:
    """Each rule refuses what breaks it, and nothing else does."""
    found = BROKEN[rule]()
    assert found == [{rule}] * len(found)


def test_a_settlement_during_a_fault_may_be_refused() -> None:
    """Whose first answer was lost with all nodes is told "stale"; that is no violation."""
    fault = [{"at": 2.15, "by": "run", "kind": "fault", "number": 1, "fault": "all", "shards": [1]},
             {"at": 3.0, "by": "run", "kind": "healed", "number": 1}]
    assert not refused(THREE[:3], leased(2, 100, (0, 10, 1)), settled(2.2, 100, 10, result="stale"), fault, ended(1, 1))


def test_histories_of_several_processes_are_one(tmp_path: Path) -> None:
    """Files are read in order of time; a line that a kill cut short is left out, another damaged one is an error."""
    one, other = Writer(tmp_path / "a.jsonl", "a"), Writer(tmp_path / "b.jsonl", "b")
    one.write({"kind": "x", "at": 1.0}, {"kind": "x", "at": 3.0})
    other.write({"kind": "x", "at": 2.0})
    one.close()
    other.close()
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"kind": "x", "at"')
    assert [(event["at"], event["by"]) for event in read(tmp_path)] == [(1.0, "a"), (2.0, "b"), (3.0, "a")]
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(json.JSONDecodeError):
        list(read(tmp_path))


def test_a_payload_knows_its_queue() -> None:
    """A message that was changed, or is in another queue, has no number."""
    body = payload(Q, 7, padding=20)
    assert number_of(Q, body) == 7
    assert number_of(("d", "t", "other"), body) == -1
    assert number_of(Q, body.replace(b"7", b"8", 1)) == -1


def test_examples_are_few() -> None:
    """A verdict keeps the first examples of each rule, and counts all."""
    verdict = Verdict()
    for n in range(20):
        verdict.refuse("lost", str(n))
    assert verdict.counts["lost"] == 20 and verdict.examples["lost"] == ["0", "1", "2", "3", "4"] and not verdict.clean
