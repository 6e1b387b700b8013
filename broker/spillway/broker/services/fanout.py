"""Who gets a copy of a message that is produced to the source of a route."""
from __future__ import annotations

from typing import NamedTuple

from spillway.broker.core.directory import Directory, Target
from spillway.broker.core.filters import Filter, FilterError, compile_filter
from spillway.v1.message_pb2 import Message

COPIES_MAX = 1024  # of one message


class CopyTo(NamedTuple):
    """One copy."""

    destination: str
    skip_over_budget: bool


class Fanout:
    """The routes that begin at one source, and at those of its targets that are sources themselves. As of one revision of
    the directory."""

    def __init__(self, directory: Directory, source: str) -> None:
        self._source = source
        self._routes: dict[str, list[tuple[Target, Filter | None]]] = {}
        self.broken = ""  # why no message can be taken; empty: all is well
        ends: set[str] = set()
        front = [source]
        while front:
            here = front.pop()
            targets = self._routes[here] = []
            for target in directory.routes[here].targets:
                try:
                    targets.append((target, compile_filter(target.filter) if target.filter else None))
                except FilterError as error:  # it was checked when the route was made, perhaps by another version
                    self.broken = f"the filter of route {here!r} for {target.destination!r} does not compile: {error}"
                if target.destination not in directory.routes:
                    ends.add(target.destination)
                elif target.destination not in self._routes:
                    front.append(target.destination)
        if len(ends) > COPIES_MAX:
            self.broken = f"route {source!r} leads to {len(ends)} destinations; at most {COPIES_MAX}"

    def targets(self, message: Message, tenant: str, key: str) -> tuple[list[CopyTo], list[str]]:
        """Where copies go, each destination once, and those whose filter failed on the message."""
        headers = dict(message.headers)
        chosen: dict[str, CopyTo] = {}
        failed: dict[str, None] = {}
        seen = {self._source}
        front = [self._source]
        while front:
            for target, test in self._routes[front.pop()]:
                if test is not None:
                    try:
                        if not test.matches(headers, tenant, key, message.id):
                            continue
                    except FilterError:
                        failed[target.destination] = None
                        continue
                name = target.destination
                if name not in self._routes:
                    known = chosen.get(name)
                    # Reached on two ways, of which one must not skip: the stricter rule holds.
                    chosen[name] = CopyTo(name, target.skip_over_budget and (known is None or known.skip_over_budget))
                elif name not in seen:
                    seen.add(name)
                    front.append(name)
        return list(chosen.values()), [name for name in failed if name not in chosen and name not in self._routes]
