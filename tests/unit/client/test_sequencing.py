"""The producer's sequencing, against a shard that may answer, lose answers, refuse, forget, and hear old copies late."""
from __future__ import annotations

import itertools
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from spillway.client.errors import InvalidArgument, OutcomeUnknown, SpillwayError, Unavailable
from spillway.client.model import Receipt
from spillway.client.retry import Verdict
from spillway.client.sequencing import Entry, Lane, Refusal

BAD = InvalidArgument("payload", "bad")


class Outcomes:
    """A sink that asserts that every position gets one outcome."""

    def __init__(self) -> None:
        self.receipts: dict[int, Receipt] = {}
        self.errors: dict[int, SpillwayError] = {}

    def stored(self, position: int, receipt: Receipt) -> None:
        assert position not in self.receipts and position not in self.errors
        self.receipts[position] = receipt

    def failed(self, position: int, error: SpillwayError) -> None:
        assert position not in self.receipts and position not in self.errors
        self.errors[position] = error


class Shard:
    """A shard's side of the protocol."""

    def __init__(self) -> None:
        self.log: list[int] = []
        self.last: dict[str, int] = {}

    def offer(self, producer: str, number: int, position: int) -> int | Refusal:
        """Takes strictly the next number, acknowledges older ones again."""
        last = self.last.get(producer, 0)
        if number <= last:
            return 1
        if number != last + 1:
            return Refusal(Verdict.OUT_OF_SEQUENCE, Unavailable("gap"))
        self.last[producer] = number
        self.log.append(position)
        return (len(self.log) + 1) << 20


def make() -> tuple[Lane, Outcomes, Shard]:
    """A lane, its sink and its shard."""
    ids = (f"p{i}" for i in itertools.count(1))
    return Lane(3, "p0", lambda: next(ids)), Outcomes(), Shard()


def fill(lane: Lane, sink: Outcomes, count: int, start: int = 0) -> None:
    """Adds records whose bodies name their position."""
    for position in range(start, start + count):
        lane.add(Entry(b"%d" % position, sink, position))


def take(lane: Lane, records: int) -> list[Entry]:
    """A batch of at most `records`."""
    return lane.take(records, 1 << 20, oversize=True)[0]


def answer(lane: Lane, shard: Shard, entries: list[Entry], bad: frozenset[int] = frozenset()) -> None:
    """The shard takes a batch and the lane hears of it."""
    sequences, refusals = [], {}
    for i, entry in enumerate(entries):
        result = Refusal(Verdict.REFUSED, BAD) if entry.position in bad else shard.offer(
            lane.producer_id, entry.number, entry.position)
        sequences.append(result if isinstance(result, int) else 0)
        if isinstance(result, Refusal):
            refusals[i] = result
    if refusals:
        lane.mixed(entries, sequences, refusals)
    else:
        lane.stored(entries, sequences)


def settle(lane: Lane, shard: Shard, bad: frozenset[int] = frozenset()) -> None:
    """Runs a lane to its end on a good day."""
    for _ in range(1000):
        if lane.stuck:
            lane.resume()
        elif lane.sendable:
            answer(lane, shard, take(lane, 3), bad)
        else:
            break
    assert lane.idle and not lane.in_flight, lane
    assert lane.pending_bytes == 0


def test_numbers_run_on_while_all_is_well() -> None:
    """Batches in flight carry 1, 2, 3, ... and nothing is sent twice."""
    lane, sink, shard = make()
    fill(lane, sink, 5)
    first, second = take(lane, 2), take(lane, 2)
    assert [e.number for e in first + second] == [1, 2, 3, 4]
    answer(lane, shard, first)
    answer(lane, shard, second)
    settle(lane, shard)
    assert shard.log == [0, 1, 2, 3, 4]
    assert [sink.receipts[i].shard for i in range(5)] == [3] * 5
    assert not any(r.duplicate for r in sink.receipts.values())


def test_a_lost_answer_is_recognised_as_a_duplicate() -> None:
    """A batch that was stored but not answered is resent under its numbers and stored once."""
    lane, sink, shard = make()
    fill(lane, sink, 3)
    batch = take(lane, 3)
    for entry in batch:
        shard.offer("p0", entry.number, entry.position)
    lane.broken(batch)
    assert not lane.sendable and lane.stuck
    settle(lane, shard)
    assert shard.log == [0, 1, 2]
    assert all(sink.receipts[i] == Receipt(3, 0, True) for i in range(3))


def test_nothing_new_goes_before_all_in_flight_is_answered() -> None:
    """After a failure the later batches are waited for, then all is resent in order."""
    lane, sink, shard = make()
    fill(lane, sink, 6)
    first, second = take(lane, 2), take(lane, 2)
    lane.mixed(first, [0, 0], {i: Refusal(Verdict.UNKNOWN, Unavailable("moved")) for i in range(2)})
    assert not lane.sendable and not lane.stuck
    answer(lane, shard, second)  # out of sequence
    assert lane.stuck
    lane.resume()
    again = take(lane, 10)
    assert [(e.position, e.number) for e in again] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    answer(lane, shard, again)
    settle(lane, shard)
    assert shard.log == [0, 1, 2, 3, 4, 5]
    assert lane.producer_id == "p0"


def test_a_later_answer_proves_an_earlier_record() -> None:
    """If number 3 is stored, numbers 1 and 2 are: they are not sent again."""
    lane, sink, shard = make()
    fill(lane, sink, 3)
    first, second = take(lane, 2), take(lane, 1)
    for entry in first:
        shard.offer("p0", entry.number, entry.position)
    lane.mixed(first, [0, 0], {i: Refusal(Verdict.UNKNOWN, Unavailable("moved")) for i in range(2)})
    answer(lane, shard, second)
    lane.resume()
    assert lane.idle and sink.receipts[0].duplicate and sink.receipts[1].duplicate


def test_records_behind_a_refused_one_move_up() -> None:
    """A refused record frees its number; those in flight behind it come back and are renumbered."""
    lane, sink, shard = make()
    fill(lane, sink, 5)
    batches = [take(lane, 2), take(lane, 2)]
    for batch in batches:
        answer(lane, shard, batch, frozenset({1}))
    assert lane.stuck and lane.impatient
    lane.resume()
    again = take(lane, 10)
    assert [(e.position, e.number) for e in again] == [(2, 2), (3, 3)]
    answer(lane, shard, again)
    settle(lane, shard)
    assert shard.log == [0, 2, 3, 4]
    assert sink.errors == {1: BAD} and lane.producer_id == "p0"


def test_a_number_is_not_reused_while_an_old_copy_may_arrive() -> None:
    """Record 1 is refused, record 2 goes out in a stream that breaks: it gets a new epoch, as its old copy may come."""
    lane, sink, shard = make()
    fill(lane, sink, 4)
    first, second = take(lane, 2), take(lane, 1)
    answer(lane, shard, first, frozenset({1}))
    zombie = [(lane.producer_id, e.number, e.position) for e in second]
    lane.broken(second)
    lane.resume()
    assert lane.producer_id == "p1"
    answer(lane, shard, take(lane, 1))
    for old in zombie:
        shard.offer(*old)
    settle(lane, shard)
    assert shard.log == [0, 2, 3]


def test_who_was_overtaken_is_not_forgotten() -> None:
    """While a leader changes, brokers may pass on a later batch before an earlier one, which is stored afterwards: that the later one
    was refused then says nothing of what the shard remembers, and what had gone out before with unknown fate goes on as itself."""
    lane, sink, shard = make()
    fill(lane, sink, 4)
    first = take(lane, 2)
    lane.broken(first)
    lane.resume()
    first, second = take(lane, 1), take(lane, 1)  # both may be stored, as far as anybody knows
    answer(lane, shard, second)  # refused: the first one is still on its way
    answer(lane, shard, first)
    settle(lane, shard)
    assert shard.log == [0, 1, 2, 3] and not sink.errors and lane.producer_id == "p0"


def test_a_forgotten_producer_starts_over() -> None:
    """A shard that refuses the very next number has forgotten the producer: new id, from 1."""
    lane, sink, shard = make()
    fill(lane, sink, 4)
    answer(lane, shard, take(lane, 2))
    shard.last.clear()
    settle(lane, shard)
    assert lane.producer_id == "p1" and shard.log == [0, 1, 2, 3]


def test_a_forgotten_producer_with_unknown_outcomes_says_so() -> None:
    """What may be stored under the forgotten id is not sent again, but reported as unknown; the rest goes on."""
    lane, sink, shard = make()
    fill(lane, sink, 4)
    answer(lane, shard, take(lane, 1))
    unsure = take(lane, 1)
    lane.broken(unsure)
    shard.last.clear()
    settle(lane, shard)
    assert isinstance(sink.errors[1], OutcomeUnknown)
    assert shard.log == [0, 2, 3]


def test_a_refusal_after_an_unknown_attempt_does_not_lose_the_next_record() -> None:
    """If the refused record had been stored after all, its number must not be given to another."""
    lane, sink, shard = make()
    fill(lane, sink, 3)
    batch = take(lane, 2)
    shard.offer("p0", 1, 0)  # stored, unanswered
    lane.broken(batch)
    lane.resume()
    answer(lane, shard, take(lane, 1), frozenset({0}))  # now it is refused
    settle(lane, shard, frozenset({0}))
    assert sink.errors.keys() >= {0}
    assert 2 in shard.log and shard.log.count(2) == 1
    assert isinstance(sink.errors.get(1), OutcomeUnknown)


def test_a_record_that_never_went_out_can_be_dropped() -> None:
    """Dropping keeps numbers without gaps; what went out cannot be dropped."""
    lane, sink, shard = make()
    entries = [Entry(b"x", sink, i) for i in range(3)]
    for entry in entries:
        lane.add(entry)
    batch = take(lane, 1)
    assert not lane.drop(entries[0], BAD)
    assert lane.drop(entries[1], BAD) and not lane.drop(entries[1], BAD)
    answer(lane, shard, batch)
    settle(lane, shard)
    assert shard.log == [0, 2] and sink.errors == {1: BAD}


def test_closing_says_what_may_be_stored() -> None:
    """fail_all tells sent records from unsent ones and leaves nothing."""
    lane, sink, _ = make()
    fill(lane, sink, 3)
    lane.broken(take(lane, 1))
    told: list[bool] = []

    def error(sent: bool) -> SpillwayError:
        told.append(sent)
        return BAD

    lane.fail_all(error)
    assert told == [True, False, False] and lane.idle


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_exactly_once_in_order_whatever_happens(data: st.DataObject) -> None:
    """Under every mix of faults each acknowledged record is stored once, order is kept, and nothing refused is stored."""
    lane, sink, shard = make()
    total = data.draw(st.integers(1, 12))
    bad = data.draw(st.frozensets(st.integers(0, total - 1), max_size=3))
    flight: deque[list[Entry]] = deque()
    zombies: list[tuple[str, int, int]] = []
    added = 0
    for _ in range(data.draw(st.integers(0, 40))):
        step = data.draw(st.sampled_from(["add", "take", "answer", "lose", "break", "late", "unavailable", "full", "resume",
                                          "forget"]))
        if step == "add" and added < total:
            fill(lane, sink, 1, added)
            added += 1
        elif step == "take" and lane.sendable:
            batch = take(lane, data.draw(st.integers(1, 4)))
            if batch:
                flight.append(batch)
        elif step == "answer" and flight:
            answer(lane, shard, flight.popleft(), bad)
        elif step in ("lose", "break") and flight:
            while flight:  # the stream takes all with it
                batch = flight.popleft()
                copies = [(lane.producer_id, e.number, e.position) for e in batch if e.position not in bad]
                if step == "lose":
                    for copy in copies:
                        shard.offer(*copy)
                else:
                    zombies += copies
                lane.broken(batch)
        elif step == "late" and zombies:
            shard.offer(*zombies.pop(data.draw(st.integers(0, len(zombies) - 1))))
        elif step == "unavailable" and flight:
            batch = flight.popleft()
            if data.draw(st.booleans()):
                for e in batch:
                    if e.position not in bad:
                        shard.offer(lane.producer_id, e.number, e.position)
            lane.mixed(batch, [0] * len(batch), {i: Refusal(Verdict.UNKNOWN, Unavailable("")) for i in range(len(batch))})
        elif step == "full" and flight:
            batch = flight.popleft()
            lane.mixed(batch, [0] * len(batch), {i: Refusal(Verdict.NOT_STORED, Unavailable("")) for i in range(len(batch))})
        elif step == "resume" and lane.stuck:
            lane.resume()
        elif step == "forget" and not flight and (lane.acked or set(shard.log) <= sink.receipts.keys()):
            # Else number 1 is stored, unanswered and forgotten: no protocol with these messages could know it again.
            shard.last.clear()
            zombies.clear()
    while flight:
        answer(lane, shard, flight.popleft(), bad)
    fill(lane, sink, total - added, added)
    settle(lane, shard, bad)
    for zombie in zombies:
        shard.offer(*zombie)
    assert len(shard.log) == len(set(shard.log)), "stored twice"
    assert shard.log == sorted(shard.log), "out of order"
    assert sink.receipts.keys() | sink.errors.keys() == set(range(total))
    assert set(sink.receipts) <= set(shard.log), "acknowledged but not stored"
    assert not bad & set(shard.log)
    for position, error in sink.errors.items():
        assert position in bad or isinstance(error, OutcomeUnknown)


def test_a_batch_whose_parts_changed_places_is_sent_again() -> None:
    """A node that loses its leadership passes on what it had not proposed before it learns what became of what it had: the second half of a
    batch is refused as out of sequence, and then the first one is stored. The shard has forgotten nobody, so nothing is in doubt."""
    lane, sink, shard = make()
    fill(lane, sink, 4)
    entries = take(lane, 4)
    lane.mixed(entries, [0] * 4, {i: Refusal(Verdict.UNKNOWN, Unavailable("the leader changed")) for i in range(4)})
    lane.resume()
    entries = take(lane, 4)
    assert all(entry.tainted for entry in entries)
    late = [shard.offer(lane.producer_id, entry.number, entry.position) for entry in entries[2:]]
    early = [shard.offer(lane.producer_id, entry.number, entry.position) for entry in entries[:2]]
    answers = [*early, *late]
    lane.mixed(entries, [one if isinstance(one, int) else 0 for one in answers],
               {i: one for i, one in enumerate(answers) if isinstance(one, Refusal)})
    settle(lane, shard)
    assert not sink.errors and sorted(sink.receipts) == [0, 1, 2, 3] and shard.log == [0, 1, 2, 3] and lane.producer_id == "p0"
