"""The client library as the source of targets and runs."""
from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from spillway.client.client import Client
from spillway.client.dispatcher.source import Run, Target

TIMEOUT_SECONDS = 10.0  # what the broker fills in, too, if a target says nothing
CONCURRENCY_MAX = 16


class ClientBroker:
    """A `Broker` over a connected client."""

    def __init__(self, client: Client, name: str = "") -> None:
        """`name` is shown to people as the consumer's."""
        self._client = client
        self._name = name or "dispatcher"

    async def targets(self) -> list[Target]:
        """All destinations that have an HTTP target. Raises SpillwayError."""
        return [Target(destination.name, destination.http.url, destination.http.timeout or TIMEOUT_SECONDS,
                       destination.http.concurrency_max or CONCURRENCY_MAX)
                async for destination in self._client.admin.list_destinations() if destination.http is not None]

    @asynccontextmanager
    async def consume(self, destination: str, credit_messages: int, credit_bytes: int, run_messages_max: int,
                      lease_seconds: float) -> AsyncIterator[AsyncIterator[Run]]:
        """A consumer of one destination."""
        async with self._client.consumer([destination], name=self._name, credit_messages=credit_messages,
                                         credit_bytes=credit_bytes, run_messages_max=run_messages_max,
                                         lease_seconds=lease_seconds) as consumer:
            yield consumer.runs()
