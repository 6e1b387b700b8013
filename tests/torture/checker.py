"""Judges a history by what Spillway promises. Knows nothing of how it keeps it.

The rules, each refused by name; all times are of one clock, and a lease is granted its length before its deadline:

    lost            what was acknowledged is acknowledged by a consumer, among the dead letters, or still in its queue
    invented        nothing is delivered that was not produced like this, or that was refused for certain
    stored twice    a message has one place in its queue: a producer that repeats itself stores nothing twice
    misplaced       the places of a queue's messages are in the order in which they were produced, in one shard
    reordered       messages of an ordered queue are handled for the first time in that order
    overtaken       no message of an ordered queue is given out before all earlier ones are done with
    after ack       once a consumer knows that a message is acknowledged, nobody is given it, and no handler begins with it
    two leases      an ordered queue has one valid lease at a time: until its deadline, or until its consumer ends it
    token           fencing tokens of a queue grow with every lease, and no lease is given out twice
    repeated        a message is given out again only after its lease expired or failed
    robbed          no settlement of a lease that is valid is refused
    dead            only what was rejected, or failed too often, is a dead letter, and nothing that is acknowledged
    books           the broker's counts are the history's
    stuck           once all faults are healed, everything is delivered
"""
from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from tests.torture.history import Event, Queue
from tests.torture.ledger import Lease, Ledger, Message

SLACK = 0.010  # seconds: the broker's times are whole milliseconds
STALE_SLACK = 5.0  # after a fault is healed: for a settlement to be repeated whose answer was lost
EXAMPLES_MAX = 5

RULES = ("lost", "invented", "stored twice", "misplaced", "reordered", "overtaken", "after ack", "two leases", "token", "repeated",
         "robbed", "dead", "books", "stuck")


@dataclass
class Verdict:
    """What a history shows."""

    counts: Counter[str] = field(default_factory=Counter)  # violations by rule
    examples: dict[str, list[str]] = field(default_factory=dict)
    stored: int = 0  # acknowledged to producers
    unsure: int = 0  # of which producers do not know
    delivered: int = 0  # different messages
    leases: int = 0
    redelivered: int = 0
    settlements: int = 0
    stale: int = 0
    dead: int = 0

    def refuse(self, rule: str, text: str) -> None:
        """Notes a violation."""
        assert rule in RULES
        self.counts[rule] += 1
        examples = self.examples.setdefault(rule, [])
        if len(examples) < EXAMPLES_MAX:
            examples.append(text)

    @property
    def clean(self) -> bool:
        """Whether every promise was kept."""
        return not self.counts

    def summary(self) -> dict[str, Any]:
        """For a report."""
        return {"clean": self.clean, "violations": dict(self.counts), "examples": self.examples, "stored": self.stored,
                "unsure": self.unsure, "delivered": self.delivered, "leases": self.leases, "redelivered": self.redelivered,
                "settlements": self.settlements, "stale_settlements": self.stale, "dead_letters": self.dead}


def judge(events: Iterable[Event]) -> Verdict:
    """The verdict on a history, given in order of time."""
    ledger = Ledger(events)
    verdict = Verdict(settlements=ledger.settlements, stale=len(ledger.stale))
    for queue, messages in ledger.queues.items():
        ordered = ledger.destinations[queue[0]].ordered
        leases = sorted(ledger.leases.get(queue, ()), key=lambda lease: lease.token)
        numbers = sorted(messages)
        _produced(verdict, ledger, queue, numbers, messages)
        _fates(verdict, queue, messages, ledger.drained is not None)
        _repeats(verdict, leases)
        if ordered:
            _exclusive(verdict, leases)
            _order(verdict, queue, numbers, messages, leases)
        verdict.leases += len(leases)
    for lease in ledger.twice:
        verdict.refuse("token", f"{_name(lease)} came twice")
    for queue, sequence in ledger.changed:
        verdict.refuse("invented", f"{queue} {sequence} is not as it was produced")
    _robbed(verdict, ledger)
    _books(verdict, ledger)
    if ledger.drained is not True:
        verdict.refuse("stuck", "not everything was delivered after all faults were healed")
    return verdict


def _produced(verdict: Verdict, ledger: Ledger, queue: Queue, numbers: list[int], messages: dict[int, Message]) -> None:
    """Each message is in its queue once, in its place, and was produced."""
    last = 0
    for number in numbers:
        message = messages[number]
        verdict.stored += message.stored_at < inf
        verdict.unsure += message.stored_at == inf and not message.refused
        verdict.delivered += bool(message.starts)
        if message.places and (message.sent_at == inf or message.refused):
            verdict.refuse("invented", f"{queue} {number} was {'refused' if message.refused else 'never sent'}")
        if len(message.places) > 1:
            verdict.refuse("stored twice", f"{queue} {number} is at {sorted(message.places)}")
        if message.places:
            place = min(message.places)
            if place <= last:
                verdict.refuse("misplaced", f"{queue} {number} is at {place}, not behind {last}")
            last = max(last, place)
    shards = ledger.shards.get(queue, set())
    if len(shards) > 1:
        verdict.refuse("misplaced", f"{queue} is in the shards {sorted(shards)}")


def _fates(verdict: Verdict, queue: Queue, messages: dict[int, Message], stock: bool) -> None:
    """What became of every message; without `stock` nobody looked what is left at the end."""
    for number, message in messages.items():
        confirmed = message.ack_confirmed_at < inf
        verdict.dead += message.dead
        if stock and message.stored_at < inf and message.ack_sent_at == inf and not message.dead and not message.left:
            verdict.refuse("lost", f"{queue} {number}, stored at {message.stored_at:.3f}, was never acknowledged and is gone")
        if stock and message.reject_confirmed_at < inf and not message.dead:
            verdict.refuse("lost", f"{queue} {number} was rejected and is not among the dead letters")
        if confirmed and message.left:
            verdict.refuse("after ack", f"{queue} {number} was acknowledged and is still in its queue")
        if message.dead and (confirmed or not message.may_be_dead):
            verdict.refuse("dead", f"{queue} {number} is a dead letter and was {'acknowledged' if confirmed else 'not rejected'}")
        for at in message.starts:
            if at > message.ack_confirmed_at:
                verdict.refuse("after ack", f"{queue} {number} was handled at {at:.3f}, known to be acknowledged at "
                                            f"{message.ack_confirmed_at:.3f}")


def _repeats(verdict: Verdict, leases: list[Lease]) -> None:
    """A message is given out again when its last lease is over, and never once it is acknowledged."""
    before: dict[int, Lease] = {}  # sequence -> the lease under which it was given out last
    acked: dict[int, float] = {}
    for lease in leases:
        for _, sequence, _ in lease.items:
            last = before.get(sequence)
            if last is not None:
                verdict.redelivered += 1
                if lease.granted < last.back(sequence) - SLACK:
                    verdict.refuse("repeated", f"{sequence} of {_name(lease)} while {_name(last)} has it until "
                                               f"{last.back(sequence):.3f}")
                if lease.granted > acked.get(sequence, inf) + SLACK:
                    verdict.refuse("after ack", f"{sequence} of {_name(lease)} was known to be acknowledged at "
                                                f"{acked[sequence]:.3f}")
            before[sequence] = lease
        for upto, at in lease.acked:
            for _, sequence, _ in lease.items:
                if sequence <= upto:
                    acked[sequence] = min(acked.get(sequence, inf), at)


def _exclusive(verdict: Verdict, leases: list[Lease]) -> None:
    """One lease after the other."""
    for one, other in itertools.pairwise(leases):
        if other.granted < one.granted - SLACK:
            verdict.refuse("token", f"{_name(other)} is older than {_name(one)}")
        if other.granted < one.end - SLACK:
            verdict.refuse("two leases", f"{_name(other)} while {_name(one)} is valid until {one.end:.3f}")


def _order(verdict: Verdict, queue: Queue, numbers: list[int], messages: dict[int, Message], leases: list[Lease]) -> None:
    """First come, first handled; and nothing moves before what is ahead of it is done with."""
    latest, latest_number = -inf, -1
    done_by: dict[int, float] = {}  # when everything before a message was done with
    previous: dict[int, int] = {}  # the message before it
    done, last = -inf, -1
    for number in numbers:
        message = messages[number]
        if message.starts:
            first = min(message.starts)
            if first < latest:
                verdict.refuse("reordered", f"{queue} {number} was first handled at {first:.3f}, {latest_number} at {latest:.3f}")
            if first > latest:
                latest, latest_number = first, number
        done_by[number], previous[number] = done, last
        if message.exists:
            done, last = max(done, message.done_at), number
    for lease in leases:
        before = -1  # the message of the lease before this one
        for number, _, _ in lease.items:
            waiting = number in done_by and before < 0 and done_by[number] > lease.granted + SLACK
            ahead = previous.get(number, -1)
            while 0 <= before < ahead:  # what is missing in the run
                waiting |= messages[ahead].done_at > lease.granted + SLACK
                ahead = previous[ahead]
            if waiting:
                verdict.refuse("overtaken", f"{_name(lease)} has {number} before the ones up to {previous[number]} were done with")
            before = number


def _robbed(verdict: Verdict, ledger: Ledger) -> None:
    """Settlements of valid leases are taken. A repeated one may be refused where the memory of the first was lost with all
    nodes; so those under way during a fault are not looked at."""
    for stale in ledger.stale:
        disturbed = any(fault["at"] <= stale.at and stale.sent_at <= until + STALE_SLACK
                        for fault, until in ledger.faults.values())
        if not disturbed and stale.at < stale.over_by - SLACK:
            verdict.refuse("robbed", f"{_name(stale.lease)}: a settlement was refused at {stale.at:.3f}, before {stale.over_by:.3f}")


def _books(verdict: Verdict, ledger: Ledger) -> None:
    """The broker counted what the processes saw."""
    for destination, books in ledger.books.items():
        messages = [m for queue, found in ledger.queues.items() if queue[0] == destination for m in found.values()]
        exist = sum(m.exists for m in messages)
        sure = sum(m.ack_confirmed_at < inf for m in messages)
        maybe = sum(m.ack_sent_at < inf for m in messages)
        dead = sum(m.dead for m in messages)
        left = sum(m.left for m in messages)
        if books["enqueued"] != exist:
            verdict.refuse("books", f"{destination}: the broker stored {books['enqueued']}, there were {exist}")
        if not sure <= books["acked"] <= maybe:
            verdict.refuse("books", f"{destination}: the broker counts {books['acked']} acknowledged, of {sure} to {maybe}")
        if (books["dead"], books["left"]) != (dead, left):
            verdict.refuse("books", f"{destination}: the broker counts {books['dead']} dead letters and {books['left']} waiting, "
                                    f"there are {dead} and {left}")
        if books["enqueued"] != books["acked"] + books["dead"] + books["left"]:
            verdict.refuse("books", f"{destination}: {books['enqueued']} stored are not {books['acked']} acknowledged + "
                                    f"{books['dead']} dead + {books['left']} waiting")


def _name(lease: Lease) -> str:
    return (f"lease {lease.token} of {lease.queue} (shard {lease.shard}, {lease.by}, {lease.granted:.3f} to {lease.deadline:.3f}, "
            f"sequences {[seq for _, seq, _ in lease.items][:4]})")
