"""What a history says of each message and each lease, gathered for `checker` to judge. Judges nothing itself."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from tests.torture.history import Event, Queue

ACK, EXTEND, REJECT, RETRY = "ack", "extend", "reject", "retry"


@dataclass(slots=True)
class Message:
    """One message of one queue."""

    sent_at: float = inf
    stored_at: float = inf
    refused: bool = False  # certainly not stored
    places: set[int] = field(default_factory=set)  # sequences under which it was seen
    starts: list[float] = field(default_factory=list)  # of handlers
    ack_sent_at: float = inf
    ack_confirmed_at: float = inf
    reject_confirmed_at: float = inf
    done_at: float = inf  # earliest moment at which it may be done with: acknowledged, or dead
    may_be_dead: bool = False
    dead: bool = False
    left: bool = False

    @property
    def exists(self) -> bool:
        """Whether it was in its queue for certain."""
        return self.stored_at < inf or bool(self.places)


@dataclass(slots=True)
class Lease:
    """One run of one queue that a consumer got."""

    queue: Queue
    shard: int
    token: int
    by: str
    at: float
    granted: float
    deadline: float  # the latest that is certain: extensions count once they are confirmed
    items: list[tuple[int, int, int]]  # number, sequence, attempt
    acks: list[tuple[int, float]] = field(default_factory=list)  # up to which sequence, when handed in
    acked: list[tuple[int, float]] = field(default_factory=list)  # likewise, when that was confirmed
    nacks: list[tuple[int, float]] = field(default_factory=list)  # what ends the lease: of which sequence, when handed in
    closing_at: float = inf

    @property
    def end(self) -> float:
        """Until then it is certainly valid: its deadline, or the moment at which its consumer began to end it."""
        last = self.items[-1][1]
        return min([self.deadline, self.closing_at, *(at for _, at in self.nacks), *(at for upto, at in self.acks if upto >= last)])

    def back(self, sequence: int) -> float:
        """The earliest moment at which an unsettled message of it may be given to somebody again."""
        return min([self.deadline, self.closing_at, *(at for first, at in self.nacks if first <= sequence)])


@dataclass(slots=True)
class Destination:
    """How it delivers."""

    ordered: bool
    attempts_max: int
    lease: float


@dataclass(slots=True)
class Stale:
    """A settlement that was refused: the lease was over already."""

    lease: Lease
    sent_at: float
    at: float
    over_by: float  # when the lease may have ended, this settlement apart


class Ledger:
    """Everything in a history, by message and by lease."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.destinations: dict[str, Destination] = {}
        self.queues: dict[Queue, dict[int, Message]] = {}
        self.leases: dict[Queue, list[Lease]] = {}
        self.shards: dict[Queue, set[int]] = {}
        self.stale: list[Stale] = []
        self.twice: list[Lease] = []  # leases that came twice
        self.changed: list[tuple[Queue, int]] = []  # deliveries of what nobody produced: queue, sequence
        self.books: dict[str, Event] = {}
        self.faults: dict[int, tuple[Event, float]] = {}  # number -> the fault, until when it lasted
        self.drained: bool | None = None
        self.settlements = 0
        self._leases: dict[tuple[int, int], Lease] = {}
        self._settles: dict[tuple[int, int, int, str], tuple[float, float]] = {}  # -> when first handed in, seconds
        self._held: dict[str, list[Lease]] = {}
        for event in events:
            handler = getattr(self, "_" + event["kind"], None)
            if handler is None:
                raise ValueError(f"unknown kind of event: {event}")
            handler(event)

    def message(self, queue: Queue, number: int) -> Message:
        """A message, new if need be."""
        return self.queues.setdefault(queue, {}).setdefault(number, Message())

    # -- events --------------------------------------------------------------------------------------------------

    def _destination(self, event: Event) -> None:
        self.destinations[event["destination"]] = Destination(event["ordered"], event["attempts_max"], event["lease"])

    def _sent(self, event: Event) -> None:
        self.message(_queue(event), event["n"]).sent_at = event["at"]

    def _stored(self, event: Event) -> None:
        queue = _queue(event)
        message = self.message(queue, event["n"])
        message.stored_at = event["at"]
        self.shards.setdefault(queue, set()).add(event["shard"])
        if event["seq"] > 1:
            message.places.add(event["seq"])

    def _failed(self, event: Event) -> None:
        self.message(_queue(event), event["n"]).refused = event["sure"]

    def _lease(self, event: Event) -> None:
        queue = _queue(event)
        lease_seconds = self.destinations[queue[0]].lease
        lease = Lease(queue, event["shard"], event["token"], event["by"], event["at"], event["deadline"] - lease_seconds,
                      event["deadline"], [(n, seq, attempt) for n, seq, attempt in event["messages"]])
        if (event["shard"], event["token"]) in self._leases:
            self.twice.append(lease)
            return
        self._leases[event["shard"], event["token"]] = lease
        self.leases.setdefault(queue, []).append(lease)
        self._held.setdefault(lease.by, []).append(lease)
        self.shards.setdefault(queue, set()).add(lease.shard)
        destination = self.destinations[queue[0]]
        for n, seq, attempt in lease.items:
            if n < 0:
                self.changed.append((queue, seq))
                continue
            message = self.message(queue, n)
            message.places.add(seq)
            if destination.attempts_max and attempt >= destination.attempts_max:  # if the lease expires
                self._may_be_dead(message, lease.deadline)

    def _start(self, event: Event) -> None:
        if event["n"] >= 0:
            self.message(_queue(event), event["n"]).starts.append(event["at"])

    def _end(self, event: Event) -> None:
        pass

    def _settle(self, event: Event) -> None:
        self.settlements += 1
        key = (event["shard"], event["token"], event["seq"], event["outcome"])
        lease = self._leases[key[0], key[1]]
        at, outcome, upto = event["at"], event["outcome"], event["seq"]
        self._settles.setdefault(key, (at, event.get("seconds", 0.0)))
        if outcome == EXTEND:
            return
        if outcome == ACK:
            lease.acks.append((upto, at))
            for n, seq, _ in lease.items:
                if n >= 0 and seq <= upto:
                    message = self.message(lease.queue, n)
                    message.ack_sent_at = min(message.ack_sent_at, at)
                    message.done_at = min(message.done_at, at)
            return
        lease.nacks.append((upto, at))
        attempts_max = self.destinations[lease.queue[0]].attempts_max
        for n, seq, attempt in lease.items:
            if n >= 0 and seq == upto and (outcome == REJECT or (
                    outcome == RETRY and attempts_max and attempt >= attempts_max)):
                self._may_be_dead(self.message(lease.queue, n), at)

    def _settled(self, event: Event) -> None:
        key = (event["shard"], event["token"], event["seq"], event["outcome"])
        lease = self._leases[key[0], key[1]]
        sent_at, seconds = self._settles[key]
        at, outcome, upto, result = event["at"], event["outcome"], event["seq"], event["result"]
        if result == "stale":
            others = [one for one in (*lease.nacks, *lease.acks) if one[1] < sent_at]
            self.stale.append(Stale(lease, sent_at, at, min([lease.deadline, lease.closing_at, *(t for _, t in others)])))
        if result != "ok":
            return
        if outcome == EXTEND:
            lease.deadline = max(lease.deadline, sent_at + seconds)
        if outcome == ACK:
            lease.acked.append((upto, at))
        for n, seq, _ in lease.items:
            if n < 0:
                continue
            message = self.message(lease.queue, n)
            if outcome == ACK and seq <= upto:
                message.ack_confirmed_at = min(message.ack_confirmed_at, at)
            elif outcome == REJECT and seq == upto:
                message.reject_confirmed_at = min(message.reject_confirmed_at, at)

    def _closing(self, event: Event) -> None:
        for lease in self._held.pop(event["by"], ()):
            lease.closing_at = min(lease.closing_at, event["at"])

    def _dead(self, event: Event) -> None:
        message = self.message(_queue(event), event["n"])
        message.dead = True
        message.places.add(event["seq"])

    def _left(self, event: Event) -> None:
        message = self.message(_queue(event), event["n"])
        message.left = True
        message.places.add(event["seq"])

    def _books(self, event: Event) -> None:
        self.books[event["destination"]] = event

    def _fault(self, event: Event) -> None:
        self.faults[event["number"]] = (event, inf)

    def _effect(self, event: Event) -> None:
        pass

    def _healed(self, event: Event) -> None:
        self.faults[event["number"]] = (self.faults[event["number"]][0], event["at"])

    def _drained(self, event: Event) -> None:
        self.drained = event["complete"]

    @staticmethod
    def _may_be_dead(message: Message, at: float) -> None:
        message.may_be_dead = True
        message.done_at = min(message.done_at, at)


def _queue(event: Event) -> Queue:
    destination, tenant, key = event["q"]
    return destination, tenant, key
