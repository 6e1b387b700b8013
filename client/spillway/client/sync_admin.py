"""Admin calls for threads; see `spillway.client.sync`."""
from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, TypeVar

from spillway.client import client as aio
from spillway.client.admin import PURGE_TIMEOUT_SECONDS, REDRIVE_TIMEOUT_SECONDS
from spillway.client.calls import TIMEOUT_SECONDS
from spillway.client.loop_thread import LoopThread
from spillway.client.model import (
    DeadLetter,
    Destination,
    DestinationStats,
    Explanation,
    Gate,
    Peek,
    Purged,
    RedriveProgress,
    Route,
    Token,
    TokenScope,
    TopTenants,
)

T = TypeVar("T")


class Admin:
    """See `spillway.client.Admin`. Lists are complete here."""

    def __init__(self, client: aio.Client, loop: LoopThread) -> None:
        self._admin = loop.call(lambda: client.admin)
        self._loop = loop

    def create_destination(self, destination: Destination | str, *, timeout: float = TIMEOUT_SECONDS) -> Destination:
        """See `spillway.client.Admin.create_destination`."""
        return self._loop.run(self._admin.create_destination(destination, timeout=timeout))

    def update_destination(self, destination: Destination | str, *, create: bool = False,
                           timeout: float = TIMEOUT_SECONDS) -> Destination:
        """See `spillway.client.Admin.update_destination`."""
        return self._loop.run(self._admin.update_destination(destination, create=create, timeout=timeout))

    def get_destination(self, name: str, *, timeout: float = TIMEOUT_SECONDS) -> Destination:
        """See `spillway.client.Admin.get_destination`."""
        return self._loop.run(self._admin.get_destination(name, timeout=timeout))

    def list_destinations(self, *, timeout: float = TIMEOUT_SECONDS) -> list[Destination]:
        """See `spillway.client.Admin.list_destinations`."""
        return self._listed(self._admin.list_destinations(timeout=timeout))

    def destination_stats(self, name: str, *, timeout: float = TIMEOUT_SECONDS) -> DestinationStats:
        """See `spillway.client.Admin.destination_stats`."""
        return self._loop.run(self._admin.destination_stats(name, timeout=timeout))

    def top_tenants(self, destination: str, limit: int = 10, *, timeout: float = TIMEOUT_SECONDS) -> TopTenants:
        """See `spillway.client.Admin.top_tenants`."""
        return self._loop.run(self._admin.top_tenants(destination, limit, timeout=timeout))

    def explain(self, destination: str, tenant: str | None = None, key: str | None = None, *,
                timeout: float = TIMEOUT_SECONDS) -> Explanation:
        """See `spillway.client.Admin.explain`."""
        return self._loop.run(self._admin.explain(destination, tenant, key, timeout=timeout))

    def peek(self, destination: str, tenant: str, key: str, limit: int = 10, *, timeout: float = TIMEOUT_SECONDS) -> Peek:
        """See `spillway.client.Admin.peek`."""
        return self._loop.run(self._admin.peek(destination, tenant, key, limit, timeout=timeout))

    def purge(self, destination: str, tenant: str | None = None, key: str | None = None, *, dry_run: bool = False,
              timeout: float = PURGE_TIMEOUT_SECONDS) -> Purged:
        """See `spillway.client.Admin.purge`."""
        return self._loop.run(self._admin.purge(destination, tenant, key, dry_run=dry_run, timeout=timeout))

    def list_dead_letters(self, destination: str, *, tenant: str | None = None,
                          timeout: float = TIMEOUT_SECONDS) -> list[DeadLetter]:
        """See `spillway.client.Admin.list_dead_letters`."""
        return self._listed(self._admin.list_dead_letters(destination, tenant=tenant, timeout=timeout))

    def purge_dead_letters(self, destination: str, tenant: str | None = None, *, dry_run: bool = False,
                           timeout: float = PURGE_TIMEOUT_SECONDS) -> int:
        """See `spillway.client.Admin.purge_dead_letters`."""
        return self._loop.run(self._admin.purge_dead_letters(destination, tenant, dry_run=dry_run, timeout=timeout))

    def redrive_dead_letters(self, destination: str, tenant: str | None = None, key: str | None = None, *,
                             messages_per_second: float = 100.0, dry_run: bool = False,
                             timeout: float = REDRIVE_TIMEOUT_SECONDS) -> Iterator[RedriveProgress]:
        """See `spillway.client.Admin.redrive_dead_letters`. An iterator here, too."""
        progress = self._admin.redrive_dead_letters(destination, tenant, key, messages_per_second=messages_per_second,
                                                    dry_run=dry_run, timeout=timeout)

        async def advance() -> RedriveProgress | None:
            return await anext(progress, None)

        async def close() -> None:
            await progress.aclose()  # type: ignore[attr-defined]

        try:
            while (step := self._loop.run(advance())) is not None:
                yield step
        finally:
            self._loop.run(close())

    def pause(self, destination: str, tenant: str | None = None, *, reason: str = "",
              timeout: float = TIMEOUT_SECONDS) -> None:
        """See `spillway.client.Admin.pause`."""
        self._loop.run(self._admin.pause(destination, tenant, reason=reason, timeout=timeout))

    def resume(self, destination: str, tenant: str | None = None, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """See `spillway.client.Admin.resume`."""
        self._loop.run(self._admin.resume(destination, tenant, timeout=timeout))

    def park(self, destination: str, tenant: str | None = None, *, seconds: float, reason: str = "",
             timeout: float = TIMEOUT_SECONDS) -> None:
        """See `spillway.client.Admin.park`."""
        self._loop.run(self._admin.park(destination, tenant, seconds=seconds, reason=reason, timeout=timeout))

    def unpark(self, destination: str, tenant: str | None = None, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """See `spillway.client.Admin.unpark`."""
        self._loop.run(self._admin.unpark(destination, tenant, timeout=timeout))

    def list_gates(self, destination: str, *, timeout: float = TIMEOUT_SECONDS) -> list[Gate]:
        """See `spillway.client.Admin.list_gates`."""
        return self._listed(self._admin.list_gates(destination, timeout=timeout))

    def create_route(self, route: Route, *, timeout: float = TIMEOUT_SECONDS) -> Route:
        """See `spillway.client.Admin.create_route`."""
        return self._loop.run(self._admin.create_route(route, timeout=timeout))

    def update_route(self, route: Route, *, create: bool = False, timeout: float = TIMEOUT_SECONDS) -> Route:
        """See `spillway.client.Admin.update_route`."""
        return self._loop.run(self._admin.update_route(route, create=create, timeout=timeout))

    def get_route(self, source: str, *, timeout: float = TIMEOUT_SECONDS) -> Route:
        """See `spillway.client.Admin.get_route`."""
        return self._loop.run(self._admin.get_route(source, timeout=timeout))

    def list_routes(self, *, timeout: float = TIMEOUT_SECONDS) -> list[Route]:
        """See `spillway.client.Admin.list_routes`."""
        return self._listed(self._admin.list_routes(timeout=timeout))

    def delete_route(self, source: str, *, etag: str = "", timeout: float = TIMEOUT_SECONDS) -> None:
        """See `spillway.client.Admin.delete_route`."""
        self._loop.run(self._admin.delete_route(source, etag=etag, timeout=timeout))

    def create_token(self, name: str, scopes: Sequence[TokenScope], **options: Any) -> tuple[Token, str]:
        """See `spillway.client.Admin.create_token`, whose options these are."""
        return self._loop.run(self._admin.create_token(name, scopes, **options))

    def list_tokens(self, *, timeout: float = TIMEOUT_SECONDS) -> list[Token]:
        """See `spillway.client.Admin.list_tokens`."""
        return self._listed(self._admin.list_tokens(timeout=timeout))

    def revoke_token(self, token_id: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """See `spillway.client.Admin.revoke_token`."""
        self._loop.run(self._admin.revoke_token(token_id, timeout=timeout))

    def _listed(self, found: AsyncIterator[T]) -> list[T]:
        async def listed() -> list[T]:
            return [one async for one in found]

        return self._loop.run(listed())
