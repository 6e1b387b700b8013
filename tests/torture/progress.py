"""Whether shards store and deliver, and how long they did not: from a history, while it is written or afterwards."""
from __future__ import annotations

import json
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spillway.contract.hashing import queue_key, shard_of

from tests.torture.history import Event

LOOK_AHEAD = 4096  # of messages sent later, one may have been stored earlier


class Progress:
    """When messages of each shard were sent, and when they were stored and delivered for the first time."""

    def __init__(self, shards: int) -> None:
        self.shards = list(range(1, shards + 1))
        self.counts: dict[str, int] = defaultdict(int)  # events by kind
        self._shard_of: dict[tuple[str, str, str], int] = {}
        self._sent: dict[tuple[str, str, str, int], int] = {}  # -> its place in the lists of its shard
        self._sent_at: dict[int, list[float]] = {shard: [] for shard in self.shards}
        self._stored_at: dict[int, list[float | None]] = {shard: [] for shard in self.shards}
        self._delivered_at: dict[int, list[float | None]] = {shard: [] for shard in self.shards}

    def feed(self, event: Event) -> None:
        """One more event; each process's own in order."""
        kind = event["kind"]
        self.counts[kind] += 1
        if kind == "sent":
            destination, tenant, key = event["q"]
            queue = (destination, tenant, key)
            shard = self._shard_of.get(queue)
            if shard is None:
                shard = self._shard_of[queue] = shard_of(queue_key(*queue), len(self.shards))
            self._sent[*queue, event["n"]] = len(self._sent_at[shard])
            self._sent_at[shard].append(event["at"])
            self._stored_at[shard].append(None)
            self._delivered_at[shard].append(None)
        elif kind == "stored":
            self._note(self._stored_at, event["q"], event["n"], event["at"])
        elif kind == "lease":
            for number, _, _ in event["messages"]:
                self._note(self._delivered_at, event["q"], number, event["at"])

    def _note(self, times: dict[int, list[float | None]], queue: list[str], number: int, at: float) -> None:
        destination, tenant, key = queue
        place = self._sent.get((destination, tenant, key, number))
        if place is not None:  # else it is for the checker
            found = times[self._shard_of[destination, tenant, key]]
            if found[place] is None:
                found[place] = at

    def stored(self, shard: int, since: float) -> float | None:
        """When the first message was stored that was sent at `since` or later; None: not yet."""
        return self._first(self._stored_at, shard, since)

    def delivered(self, shard: int, since: float) -> float | None:
        """When the first message was delivered that was sent at `since` or later; None: not yet."""
        return self._first(self._delivered_at, shard, since)

    def _first(self, times: dict[int, list[float | None]], shard: int, since: float) -> float | None:
        start = bisect_left(self._sent_at[shard], since)
        best: float | None = None
        for at in times[shard][start:start + LOOK_AHEAD]:
            if at is not None and (best is None or at < best):
                best = at
        return best

    def moving(self, shards: Iterable[int], since: float) -> bool:
        """Whether every one of the shards stored and delivered something that was sent at `since` or later."""
        return all(self.stored(s, since) is not None and self.delivered(s, since) is not None for s in shards)


class Tail:
    """Reads on in the files of a directory."""

    def __init__(self, directory: Path, feed: Callable[[Event], None]) -> None:
        self._directory = directory
        self._feed = feed
        self._offsets: dict[Path, int] = {}

    def read(self) -> None:
        """Feeds what was written since the last time. Producers' lines first: what is stored was sent before."""
        lines: list[Event] = []
        for path in sorted(self._directory.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                text = file.read()
            whole = text.rpartition(b"\n")[0]
            if whole:
                self._offsets[path] = self._offsets.get(path, 0) + len(whole) + 1
                lines += [json.loads(line) for line in whole.split(b"\n")]
        lines.sort(key=lambda event: event["at"])
        for event in lines:
            self._feed(event)


def outages(progress: Progress, faults: Iterable[Event]) -> dict[str, dict[str, Any]]:
    """By kind of fault: how many, and the seconds from its beginning until every shard that it concerns stored, and delivered,
    something that was sent after it. Worst and median of the faults; `never`: in how many it did not happen."""
    found: dict[str, list[tuple[float | None, float | None]]] = defaultdict(list)
    for fault in faults:
        at = fault["at"]
        waits = [tuple(None if end is None else end - at for end in (progress.stored(s, at), progress.delivered(s, at)))
                 for s in fault["shards"]]
        found[fault["fault"]].append((_worst(w[0] for w in waits), _worst(w[1] for w in waits)))
    return {kind: {"faults": len(waits), "stored": _summary([w[0] for w in waits]), "delivered": _summary([w[1] for w in waits])}
            for kind, waits in sorted(found.items())}


def _worst(waits: Iterable[float | None]) -> float | None:
    known = list(waits)
    return None if not known or None in known else max(w for w in known if w is not None)


def _summary(waits: list[float | None]) -> dict[str, Any]:
    known = [w for w in waits if w is not None]
    return {"worst": round(max(known), 3) if known else None, "median": round(statistics.median(known), 3) if known else None,
            "never": len(waits) - len(known)}
