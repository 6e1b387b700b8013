"""Numbers the records of one producer on one shard, and decides what to send again. Pure: no I/O, no clock.

The broker takes a producer's records of a shard strictly as 1, 2, 3, ...: a number that it has is acknowledged again,
a gap is refused. That makes retries exactly-once as long as a number means one record for ever. So:

- After any failure nothing new is sent until every batch in flight is answered; then all that is not known to be stored
  is sent again in order, under the numbers it had.
- A refused record leaves a hole. Nothing behind the hole can be stored, so what follows moves up by one. If a copy of
  it went out whose fate is unknown, that copy could still arrive and take another record's number: then the shard gets
  a new producer id ("epoch"), where old copies mean nothing.
- A record that was refused after an attempt with unknown fate leaves a hole that may be none. The records behind it
  are safe to send under a new epoch only if they never went out with unknown fate; the others fail as OutcomeUnknown.
- A shard that refuses the very next number, with nothing before it under way, has forgotten the producer: new epoch, with the same
  condition. With an earlier batch under way it may only have heard of this one first, as brokers pass on to a new leader.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from spillway.client.errors import OutcomeUnknown, SpillwayError
from spillway.client.model import Receipt
from spillway.client.retry import Verdict

DUPLICATE = 1  # what the broker answers in place of a sequence for a record that it had
_receipt = tuple.__new__  # a third of the cost of calling Receipt


class Sink(Protocol):
    """Where the outcome of a record goes. Each position gets exactly one call."""

    def stored(self, position: int, receipt: Receipt) -> None:
        """The record is stored."""

    def failed(self, position: int, error: SpillwayError) -> None:
        """The record failed for good."""


class Entry:
    """One record on its way. Only `Lane` changes it."""

    __slots__ = ("body", "first", "gap", "number", "position", "sent", "sink", "tainted")

    def __init__(self, body: bytes, sink: Sink, position: int) -> None:
        self.body = body  # encoded, but for its number; empty: dropped
        self.sink = sink
        self.position = position
        self.number = 0  # 0: never sent in this epoch
        self.sent = False
        self.tainted = False  # a copy with this number went out whose fate is unknown
        self.first = False  # it went out in a batch before which everything was known to be stored
        self.gap = False  # its last answer was OUT_OF_SEQUENCE, though it was first


class Refusal:
    """Why one record of a batch was not stored."""

    __slots__ = ("error", "verdict")

    def __init__(self, verdict: Verdict, error: SpillwayError) -> None:
        self.verdict = verdict
        self.error = error


class Lane:
    """The records of one producer for one shard, from acceptance to acknowledgement.

    The driver takes batches while `sendable`, and answers each, in order, by `stored`, `mixed` or `broken`. When
    `stuck`, it waits (`impatient`: not at all) and calls `resume`.
    """

    __slots__ = ("_barrier", "_fresh", "_holes", "_parked", "_resend", "_retry", "_tainted_max", "accepted", "acked",
                 "blocked", "impatient", "in_flight", "next", "pending", "pending_bytes", "producer_id", "resolved",
                 "resolved_bytes", "shard")

    def __init__(self, shard: int, producer_id: str, fresh: Callable[[], str]) -> None:
        self.shard = shard
        self.producer_id = producer_id
        self.pending: deque[Entry] = deque()
        self.pending_bytes = 0  # of `pending` and what is to be sent again
        self.in_flight = 0  # batches
        self.blocked = False  # something failed: nothing more goes before `resume`
        self.impatient = False  # it failed in a way that waiting does not improve
        self.next = 1  # the number that the next taken record gets
        self.acked = 0  # the highest number known to be stored: all up to it are
        self.accepted = 0  # records ever added
        self.resolved = 0  # of these, those whose outcome was reported
        self.resolved_bytes = 0  # encoded size of these
        self._fresh = fresh
        self._resend: deque[Entry] = deque()
        self._retry: list[Entry] = []  # failed, in order
        self._parked: list[Entry] = []  # behind a hole whose predecessors are being sent again
        self._barrier = False  # only `_resend` may go
        self._holes: dict[int, bool] = {}  # number of a refused record -> whether it may be stored nevertheless
        self._tainted_max = 0  # highest number of this epoch that ever went out with unknown fate

    def __repr__(self) -> str:
        state = "blocked" if self.blocked else "barrier" if self._barrier else "open"
        return (f"<Lane shard {self.shard} {state}: acked {self.acked}, next {self.next}, {self.in_flight} in flight, "
                f"{len(self.pending) + len(self._resend)} pending, {len(self._retry) + len(self._parked)} failed>")

    def add(self, entry: Entry) -> None:
        """Accepts one more record."""
        self.pending.append(entry)
        self.pending_bytes += len(entry.body)
        self.accepted += 1

    def drop(self, entry: Entry, error: SpillwayError) -> bool:
        """Forgets a record that was never sent; False if it was."""
        if entry.sent or not entry.body:
            return False
        self.pending_bytes -= len(entry.body)
        self._fail(entry, error)
        entry.body = b""
        return True

    @property
    def sendable(self) -> bool:
        """Whether `take` has something to give."""
        return not self.blocked and bool(self._resend or (self.pending and not self._barrier))

    @property
    def stuck(self) -> bool:
        """Whether all that went out is answered and `resume` must be called."""
        return self.blocked and not self.in_flight

    @property
    def idle(self) -> bool:
        """Whether every record's outcome was reported."""
        return self.resolved == self.accepted

    def take(self, records_max: int, bytes_max: int, *, oversize: bool) -> tuple[list[Entry], int]:
        """The next records to send together, numbered: at most `records_max` and `bytes_max` of bodies, though one
        in any case if `oversize`; and the size of their bodies. Counts as a batch in flight unless empty."""
        source = self._resend or self.pending
        taken: list[Entry] = []
        number = self.next
        first = number == self.acked + 1
        room = bytes_max
        while source and len(taken) < records_max:
            entry = source[0]
            size = len(entry.body)
            if size > room and (taken or not oversize):
                break
            source.popleft()
            if not size:
                continue  # dropped
            room -= size
            entry.number = number
            entry.sent = True
            entry.first = first
            number += 1
            taken.append(entry)
        self.next = number
        size = bytes_max - room
        self.pending_bytes -= size
        if taken:
            self.in_flight += 1
        return taken, size

    # -- answers -------------------------------------------------------------------------------------------------

    def stored(self, entries: Sequence[Entry], sequences: Sequence[int]) -> None:
        """A batch was stored completely."""
        self.in_flight -= 1
        shard = self.shard
        size = 0
        for entry, sequence in zip(entries, sequences, strict=True):
            entry.sink.stored(entry.position, _receipt(Receipt, (shard, sequence, False)) if sequence != DUPLICATE
                              else Receipt(shard, 0, True))
            size += len(entry.body)
        self.resolved += len(entries)
        self.resolved_bytes += size
        last = entries[-1].number
        if last > self.acked:
            self.acked = last
        if self._barrier and not self.in_flight and not self._resend and not self.blocked:
            self._rewind()  # all before the hole is stored: now the rest

    def mixed(self, entries: Sequence[Entry], sequences: Sequence[int], refusals: Mapping[int, Refusal]) -> None:
        """A batch was answered, with `refusals` by position in it."""
        self.in_flight -= 1
        patient = False
        for i, entry in enumerate(entries):
            refusal = refusals.get(i)
            if refusal is None:
                self._stored(entry, sequences[i])
                self.acked = max(self.acked, entry.number)
                continue
            verdict = refusal.verdict
            # Of the batch's first record only: its parts may have changed places on the way, and then the others come too early.
            entry.gap = i == 0 and entry.first and verdict is Verdict.OUT_OF_SEQUENCE
            if verdict is Verdict.REFUSED or verdict is Verdict.REFUSED_UNKNOWN:
                self._holes[entry.number] = entry.tainted or verdict is Verdict.REFUSED_UNKNOWN
                self._fail(entry, refusal.error)
                continue
            if verdict is Verdict.UNKNOWN:
                self._taint(entry)
            patient = patient or verdict is not Verdict.OUT_OF_SEQUENCE
            self._retry.append(entry)
        self._block(patient)

    def broken(self, entries: Sequence[Entry]) -> None:
        """A batch got no answer: what became of its records is unknown."""
        self.in_flight -= 1
        for entry in entries:
            entry.gap = False
            self._taint(entry)
        self._retry += entries
        self._block(True)

    def abort(self, entries: Sequence[Entry], error: SpillwayError) -> None:
        """A batch got no answer and would get none anywhere: its records fail."""
        self.in_flight -= 1
        for entry in entries:
            self._taint(entry)
            self._holes[entry.number] = True
            self._fail(entry, error)
        self._block(False)

    def fail_all(self, error: Callable[[bool], SpillwayError]) -> None:
        """Fails whatever is left, by `error(whether it may be stored)`. For closing."""
        for entry in (*self._retry, *self._resend, *self._parked, *self.pending):
            if entry.body:
                self._fail(entry, error(entry.sent))
        for queue in (self._retry, self._resend, self._parked, self.pending):
            queue.clear()
        self.pending_bytes = 0

    def resume(self) -> None:
        """Decides what goes out again, and under which numbers. Call when `stuck`."""
        assert self.stuck, f"{self!r} is not stuck"
        self.blocked = self.impatient = False
        self._rewind()

    # -- decisions -----------------------------------------------------------------------------------------------

    def _rewind(self) -> None:
        # `_retry` holds what failed, `_resend` what was to go again but had not, `_parked` what waits behind a hole;
        # in this order.
        failed: list[Entry] = []
        for entry in (*self._retry, *self._resend, *self._parked):
            if 0 < entry.number <= self.acked:
                self._stored(entry, DUPLICATE)  # a later number was stored, so this one was
            else:
                failed.append(entry)
        self.pending_bytes -= sum(len(entry.body) for entry in self._resend)
        self._retry = []
        self._parked = []
        self._resend.clear()
        self._barrier = False
        self._holes = {number: maybe for number, maybe in self._holes.items() if number > self.acked}
        if failed and failed[0].gap and failed[0].number == self.acked + 1:
            failed = self._new_epoch(failed, unsure=True)
        elif self._holes:
            hole = min(self._holes)
            before = [entry for entry in failed if 0 < entry.number < hole]
            if before:
                self._parked = failed[len(before):]
                self._barrier = True
                failed = before
            else:
                maybe = self._holes[hole]
                if maybe or self._tainted_max > hole:
                    failed = self._new_epoch(failed, unsure=maybe)
                self._holes = {}
        self._resend.extend(failed)
        self.pending_bytes += sum(len(entry.body) for entry in failed)
        self.next = self.acked + 1

    def _new_epoch(self, entries: list[Entry], unsure: bool) -> list[Entry]:
        """Starts over under a new producer id. If it is `unsure` whether records of the old epoch are stored, those
        that may be fail. Returns the others."""
        kept = []
        for entry in entries:
            if unsure and entry.tainted:
                self._fail(entry, OutcomeUnknown(
                    f"shard {self.shard} cannot tell any more whether this record is stored; producer {self.producer_id}"))
                continue
            entry.number = 0
            entry.tainted = entry.gap = False
            kept.append(entry)
        self.producer_id = self._fresh()
        self.acked = 0
        self._tainted_max = 0
        self._holes = {}
        return kept

    def _taint(self, entry: Entry) -> None:
        entry.tainted = True
        self._tainted_max = max(self._tainted_max, entry.number)

    def _block(self, patient: bool) -> None:
        self.impatient = not patient and (self.impatient or not self.blocked)
        self.blocked = True

    def _stored(self, entry: Entry, sequence: int) -> None:
        duplicate = sequence == DUPLICATE
        entry.sink.stored(entry.position, Receipt(self.shard, 0 if duplicate else sequence, duplicate))
        self.resolved += 1
        self.resolved_bytes += len(entry.body)

    def _fail(self, entry: Entry, error: SpillwayError) -> None:
        entry.sink.failed(entry.position, error)
        self.resolved += 1
        self.resolved_bytes += len(entry.body)
