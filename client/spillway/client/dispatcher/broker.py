"""The client library as the source of targets and runs."""
from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from spillway.client.client import Client
from spillway.client.dispatcher.source import Run, Target
from spillway.client.errors import DestinationNotFound, SpillwayError
from spillway.client.model import Destination

log = logging.getLogger("spillway.dispatcher")

TIMEOUT_SECONDS = 10.0  # what the broker fills in, too, if a target says nothing
CONCURRENCY_MAX = 16
READS_MAX = 16  # destinations read at a time
READ_SECONDS_MAX = 3.0  # for all that are read at once; the rest is read next time


class _Known(NamedTuple):
    """A destination as it was read."""

    etag: str
    target: Target | None  # None: it has none


class ClientBroker:
    """A `Broker` over a connected client.

    A list of destinations is cheap but leaves secrets out. So each destination is read by itself, when the list shows
    an etag that was not read yet. What cannot be read stays as it is known, or unknown, until it can.
    """

    def __init__(self, client: Client, name: str = "") -> None:
        """`name` is shown to people as the consumer's."""
        self._client = client
        self._name = name or "dispatcher"
        self._known: dict[str, _Known] = {}
        self._unread: set[str] = set()  # those that a warning was given of

    async def targets(self) -> list[Target]:
        """All destinations that have an HTTP target. Raises SpillwayError if they cannot be listed."""
        listed = {destination.name: destination.etag async for destination in self._client.admin.list_destinations()
                  if destination.http is not None}
        self._known = {name: known for name, known in self._known.items() if name in listed}
        self._unread &= listed.keys()
        changed = [name for name, etag in listed.items() if name not in self._known or self._known[name].etag != etag]
        if changed:
            await self._read(changed)
        return [known.target for name in listed if (known := self._known.get(name)) is not None and known.target is not None]

    async def _read(self, names: list[str]) -> None:
        slots = asyncio.Semaphore(READS_MAX)
        tasks = [asyncio.create_task(self._read_one(name, slots)) for name in names]
        try:
            await asyncio.wait(tasks, timeout=READ_SECONDS_MAX)
        finally:
            for task in tasks:
                task.cancel()
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def _read_one(self, name: str, slots: asyncio.Semaphore) -> None:
        async with slots:
            try:
                destination = await self._client.admin.get_destination(name, timeout=READ_SECONDS_MAX)
            except DestinationNotFound:
                self._known.pop(name, None)
                return
            except SpillwayError as e:
                if name not in self._unread:
                    log.warning("destination=%s cannot be read: %s; %s", name, e,
                                "going on with what is known" if name in self._known else "it is not delivered yet")
                self._unread.add(name)
                return
        self._unread.discard(name)
        self._known[name] = _Known(destination.etag, _target(destination))

    @asynccontextmanager
    async def consume(self, destination: str, credit_messages: int, credit_bytes: int, run_messages_max: int,
                      lease_seconds: float) -> AsyncIterator[AsyncIterator[Run]]:
        """A consumer of one destination."""
        async with self._client.consumer([destination], name=self._name, credit_messages=credit_messages,
                                         credit_bytes=credit_bytes, run_messages_max=run_messages_max,
                                         lease_seconds=lease_seconds) as consumer:
            yield consumer.runs()


def _target(destination: Destination) -> Target | None:
    http = destination.http
    if http is None:
        return None
    return Target(destination.name, http.url, http.timeout or TIMEOUT_SECONDS, http.concurrency_max or CONCURRENCY_MAX,
                  tuple(sorted(http.headers.items())), tuple(http.signing_secrets), http.allow_private_addresses,
                  http.redirects_max or 0)
