"""What arrived at one destination, in order of arrival, at 13 bytes per request."""
from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import NamedTuple

ACCEPTED, REFUSED, STALE = range(3)
"""Answered with success; answered with an error; recognised by its fencing token as sent under an old lease, and
dropped."""


class Arrival(NamedTuple):
    """One request."""

    tenant: str
    key: str
    number: int  # of the event
    checksum: int  # CRC-32 of the payload
    verdict: int


class History:
    """Arrivals of one destination."""

    def __init__(self) -> None:
        self.queues: dict[tuple[str, str], int] = {}
        self.counts = [0, 0, 0]  # by verdict
        self._queue = array("I")
        self._number = array("I")
        self._checksum = array("I")
        self._verdict = array("B")

    def __len__(self) -> int:
        return len(self._number)

    def add(self, tenant: str, key: str, number: int, checksum: int, verdict: int) -> None:
        """Notes an arrival."""
        self._queue.append(self.queues.setdefault((tenant, key), len(self.queues)))
        self._number.append(number)
        self._checksum.append(checksum)
        self._verdict.append(verdict)
        self.counts[verdict] += 1

    def __iter__(self) -> Iterator[Arrival]:
        names = list(self.queues)
        for queue, number, checksum, verdict in zip(self._queue, self._number, self._checksum, self._verdict, strict=True):
            yield Arrival(*names[queue], number, checksum, verdict)

    def dump(self) -> bytes:
        """As JSON, for another process."""
        return json.dumps([list(self.queues), *(column.tolist() for column in (
            self._queue, self._number, self._checksum, self._verdict))]).encode()

    @classmethod
    def load(cls, text: bytes) -> History:
        """From `dump`."""
        names, *columns = json.loads(text)
        history = cls()
        for queue, number, checksum, verdict in zip(*columns, strict=True):
            tenant, key = names[queue]
            history.add(tenant, key, number, checksum, verdict)
        return history
