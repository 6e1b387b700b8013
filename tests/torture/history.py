"""What the processes of a run saw, as JSON lines: each process writes a file of its own, all of them together are the history.

Every line has `at` (seconds of the machine's monotonic clock, which all processes share), `by` (who wrote it) and `kind`:

    destination  destination, ordered, attempts_max (0: none), lease (seconds)
    sent         q, n                         the producer handed message n of queue q = [destination, tenant, key] in
    stored       q, n, shard, seq             it is acknowledged; seq 0 or 1: a repetition was recognised
    failed       q, n, sure, error            it was refused; sure: it is certainly not stored
    lease        q, shard, token, deadline, messages [[n, seq, attempt], ...]   n -1: not as it was produced
    start, end   q, n, shard, token, seq      a handler begins and ends; `at` of a start is when the lease was looked at
    settle       shard, token, seq, outcome   a settlement is handed in
    settled      shard, token, seq, outcome, result   ok, stale (refused), unknown
    closing      the consumer gives back what it holds
    dead, left   q, n, seq                    found among the dead letters, or in its queue, at the end
    books        destination, enqueued, acked, dead, left     the broker's own counts at the end
    fault        number, fault, shards [...], until healed    and `healed` number; `effect` number, if it works only from then on
    drained      complete                     whether everything was delivered at the end

A line is written before what it tells of goes on, with one call to the system: what a killed process did is there.
"""
from __future__ import annotations

import heapq
import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Queue = tuple[str, str, str]  # destination, tenant, key


class Writer:
    """The history of one process."""

    def __init__(self, path: Path, by: str) -> None:
        self._by = by
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, *events: Event) -> None:
        """Appends events; those without a time happen now."""
        now = time.monotonic()
        os.write(self._fd, b"".join([json.dumps({"at": now, "by": self._by} | event, separators=(",", ":")).encode() + b"\n"
                                     for event in events]))

    def close(self) -> None:
        """No more events."""
        os.close(self._fd)


def read(path: Path) -> Iterator[Event]:
    """The events of a file or, in order of time, of all files of a directory. A last line that a kill cut short is left
    out; any other that is no JSON raises ValueError."""
    if path.is_dir():
        return heapq.merge(*(_lines(file) for file in sorted(path.glob("*.jsonl"))), key=_at)
    return _lines(path)


def _lines(path: Path) -> Iterator[Event]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _at(event: Event) -> float:
    at: float = event["at"]
    return at


def payload(queue: Queue, number: int, padding: int = 0) -> bytes:
    """A message that tells where it belongs, and whether it was changed on the way."""
    text = json.dumps([*queue, number]).encode() + b" " * padding
    return text + b"%08x" % zlib.crc32(text)


def number_of(queue: Queue, body: bytes) -> int:
    """The number of a message that came from a queue; -1 if it was never produced to it like this."""
    text, checksum = body[:-8], body[-8:]
    if b"%08x" % zlib.crc32(text) != checksum:
        return -1
    *where, number = json.loads(text)
    return int(number) if tuple(where) == queue else -1
