"""What consumers of a shard's queues saw, and whether it is in order: a checker that knows nothing of how shards work.

A history is a list of events in the order of the log. Messages are known by their sequences, which grow along a queue.
"""
from __future__ import annotations

from dataclasses import dataclass, field

Gap = tuple[int, int, int]  # count, first, last


@dataclass(frozen=True)
class Produced:
    """Messages were stored at the end of a queue."""

    queue: bytes
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class Leased:
    """A consumer got a run of messages, and was told what is missing before it or in it."""

    queue: bytes
    token: int
    sequences: tuple[int, ...]
    gap: Gap | None = None


@dataclass(frozen=True)
class Acked:
    """Messages of a lease are done."""

    queue: bytes
    token: int
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class Over:
    """A lease is over."""

    queue: bytes
    token: int


@dataclass(frozen=True)
class Dropped:
    """Messages went to the dead letters, or for good."""

    queue: bytes
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class Back:
    """Dead letters were put back."""

    queue: bytes
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class Purged:
    """A queue was emptied by an operator."""

    queue: bytes


Event = Produced | Leased | Acked | Over | Dropped | Back | Purged


@dataclass
class _Queue:
    open: set[int] = field(default_factory=set)  # may be leased
    dropped: set[int] = field(default_factory=set)
    acked: set[int] = field(default_factory=set)
    back: set[int] = field(default_factory=set)  # were dropped once
    seen: set[int] = field(default_factory=set)  # were leased once
    last: int = 0  # produced
    last_first: int = 0  # of messages that were never dropped: the one that was leased for the first time last
    last_acked: int = 0  # likewise
    token: int = 0
    leased: list[int] = field(default_factory=list)  # under the live lease, not yet acked
    live: bool = False
    # What may be missing: one set, or two where the marker's ends are not exact, as something in it is back
    missing: list[frozenset[int]] = field(default_factory=lambda: [frozenset()])
    exact: bool = True


def violations(history: list[Event], drained: bool = False) -> list[str]:
    """What is wrong with a history. With `drained` all queues must be empty at its end."""
    queues: dict[bytes, _Queue] = {}
    wrong: list[str] = []
    for number, event in enumerate(history):
        queue = queues.setdefault(event.queue, _Queue())
        wrong += [f"event {number}, {event}: {text}" for text in _event(queue, event)]
        if len(queue.missing) == 1 and not queue.missing[0]:
            queue.exact = True
    if drained:
        wrong += [f"{name!r}: {len(queue.open)} messages were never done" for name, queue in queues.items() if queue.open]
    return wrong


def _event(queue: _Queue, event: Event) -> list[str]:
    if isinstance(event, Produced):
        wrong = [f"{s} is not behind {queue.last}" for s in event.sequences if s <= queue.last]
        queue.last = max(queue.last, *event.sequences)
        queue.open.update(event.sequences)
        return wrong
    if isinstance(event, Leased):
        return _leased(queue, event)
    if isinstance(event, Acked):
        return _acked(queue, event)
    if isinstance(event, Dropped):
        wrong = [] if queue.open >= set(event.sequences) else ["dropped what is not there"]
        queue.open -= set(event.sequences)
        queue.dropped |= set(event.sequences)
        queue.leased = [s for s in queue.leased if s not in event.sequences]
        queue.missing = [missing | set(event.sequences) for missing in queue.missing]
        return _forget(queue, wrong)
    if isinstance(event, Back):
        wrong = [] if queue.dropped >= set(event.sequences) else ["put back what was not dropped"]
        if queue.live:
            wrong.append("put back under a lease")
        queue.dropped -= set(event.sequences)
        queue.open |= set(event.sequences)
        queue.back |= set(event.sequences)
        if any(missing & set(event.sequences) for missing in queue.missing):
            queue.exact = False
        queue.missing = [missing - set(event.sequences) for missing in queue.missing]
        return wrong
    if isinstance(event, Over):
        wrong = [] if queue.live and queue.token == event.token else ["the end of a lease that is none"]
        queue.live = False
        queue.leased = []
        return wrong
    queue.open.clear()
    return _forget(queue, [])


def _leased(queue: _Queue, event: Leased) -> list[str]:
    wrong = []
    if queue.live:
        wrong.append("a second lease")
    if event.token <= queue.token:
        wrong.append("a token that does not grow")
    if not event.sequences:
        wrong.append("an empty lease")
    wrong += [f"{s} was acknowledged" for s in event.sequences if s in queue.acked]
    wrong += [f"{s} was dropped" for s in event.sequences if s in queue.dropped]
    if list(event.sequences) != sorted(queue.open)[:len(event.sequences)]:
        wrong.append("not the first messages of the queue, in order")
    for s in event.sequences:
        if s not in queue.seen and s not in queue.back:
            if s <= queue.last_first:
                wrong.append(f"the first delivery of {s} comes after that of {queue.last_first}")
            queue.last_first = s
    queue.seen.update(event.sequences)
    queue.token, queue.live, queue.leased = event.token, True, list(event.sequences)
    possible = [missing for missing in queue.missing if _tells(event, missing, queue.exact)]
    if possible:
        queue.missing = possible
    else:
        wrong.append(f"missing is one of {[sorted(m) for m in queue.missing]}")
    return wrong


def _tells(event: Leased, missing: frozenset[int], exact: bool) -> bool:
    """Whether the consumer is told what is missing."""
    gap = event.gap
    if gap is None:
        return all(s > event.sequences[-1] for s in missing) if event.sequences else True
    if not missing or gap[0] != len(missing):
        return False
    if exact:
        return gap[1:] == (min(missing), max(missing))
    return gap[1] <= min(missing) and max(missing) <= gap[2]


def _acked(queue: _Queue, event: Acked) -> list[str]:
    wrong = []
    if not queue.live or queue.token != event.token:
        wrong.append("acknowledged under a lease that is over")
    elif list(event.sequences) != queue.leased[:len(event.sequences)]:
        wrong.append("acknowledged out of order")
    wrong += [f"{s} was acknowledged before" for s in event.sequences if s in queue.acked]
    for s in event.sequences:
        if s not in queue.back:
            if s <= queue.last_acked:
                wrong.append(f"{s} is acknowledged after {queue.last_acked}")
            queue.last_acked = s
    queue.leased = queue.leased[len(event.sequences):]
    queue.acked.update(event.sequences)
    queue.open -= set(event.sequences)
    last = max(event.sequences)
    passed = [missing for missing in queue.missing if all(s < last for s in missing)]
    if passed and queue.exact:
        queue.missing = [frozenset()]
    elif passed:  # it may be told once more, as nobody knows where exactly it ends
        queue.missing = list({*queue.missing, frozenset[int]()})
    return _forget(queue, wrong)


def _forget(queue: _Queue, wrong: list[str]) -> list[str]:
    """A queue that is empty knows of no gap: there is nobody to be told."""
    if not queue.open:
        queue.missing = [frozenset()]
    return wrong
