"""The meta group on this node: destinations, and changes to them from wherever they are asked for."""
from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from spillway.broker.core import directory as d
from spillway.broker.core.directory import Change, Destination, Directory, Put
from spillway.broker.core.policy import Policy
from spillway.broker.errors import AlreadyExists, EtagMismatch, NotFound, RequestError, Unavailable
from spillway.cluster.machine import Role
from spillway.cluster.state_store import GroupRows

PENDING_MAX = 1024  # changes waiting for the log
DEFAULT_POLICY = Policy()


class MetaRuntime:
    """A GroupMachine for group 0. Every node applies it, so every node can read it."""

    def __init__(self, node_id: str, rows: GroupRows, wake: Callable[[], None]) -> None:
        self.node_id = node_id
        self.rows = rows
        self.directory = Directory()
        self.revision = 0  # grows with every change: caches compare it
        self.leading = False
        self.role = Role.FOLLOWER
        self._wake = wake
        self._numbers = itertools.count(1)
        self._pending: list[Put] = []
        self._waiting: dict[int, asyncio.Future[Change]] = {}
        self._policies: dict[bytes, Policy] = {}
        self.reload()

    def policy(self, destination: bytes) -> Policy:
        """The policy of a destination, the default if it is not (yet) known here."""
        policy = self._policies.get(destination)
        if policy is None:
            known = self.directory.destinations.get(destination.decode())
            policy = known.policy() if known else DEFAULT_POLICY
            if known:
                self._policies[destination] = policy
        return policy

    def get(self, name: str) -> Destination | None:
        """A destination as this node knows it."""
        return self.directory.destinations.get(name)

    async def put(self, destination: Destination, create: bool, replace: bool, etag: int, field: str = "destination",
                  timeout: float = 5.0) -> Destination:
        """Proposes a change on the meta group's leader, which this node must be. Raises AlreadyExists, NotFound,
        EtagMismatch, RequestError, or Unavailable (the outcome may be unknown)."""
        if not self.leading:
            raise Unavailable("this node does not lead the meta group")
        if len(self._pending) >= PENDING_MAX:
            raise Unavailable("too many changes are waiting")
        number = next(self._numbers)
        future: asyncio.Future[Change] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._pending.append(Put(d.VERSION, self.node_id, number, destination, create, replace, etag))
        self._wake()
        try:
            async with asyncio.timeout(timeout):
                change = await future
        except TimeoutError:
            raise Unavailable("the meta group has no quorum; the outcome is unknown") from None
        finally:
            self._waiting.pop(number, None)
        if change.outcome == d.EXISTS:
            raise AlreadyExists(f"{field}.name", f"destination {destination.name!r} exists already")
        if change.outcome == d.MISSING:
            raise NotFound(f"{field}.name", f"destination {destination.name!r} does not exist")
        if change.outcome == d.ETAG:
            raise EtagMismatch(f"{field}.etag", f"{etag} is not current: the destination was changed meanwhile; read it again")
        if change.outcome == d.FULL:
            raise RequestError(f"{field}.name", f"there are {d.DESTINATIONS_MAX} destinations, the most that a cluster keeps")
        assert change.destination is not None
        return change.destination

    # -- GroupMachine --------------------------------------------------------------------------------------------

    def durable_index(self) -> int:
        """See GroupMachine."""
        return self.rows.durable_index

    def collect(self) -> bytes | None:
        """See GroupMachine."""
        if not self._pending:
            return None
        puts, self._pending = self._pending[:64], self._pending[64:]
        return d.encode_command(puts)

    def apply(self, index: int, term: int, command: bytes) -> None:
        """See GroupMachine."""
        changes, rows = self.directory.apply(index, command)
        self.rows.commit(index, term, rows, [], [])
        self.revision += 1
        self._policies.clear()
        for change in changes:
            if change.origin == self.node_id and (future := self._waiting.get(change.number)) and not future.done():
                future.set_result(change)

    def role_changed(self, role: Role, term: int, leader: str | None) -> None:
        """See GroupMachine."""
        self.role = role
        self.leading = role is Role.LEADER
        if not self.leading:
            self._pending.clear()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Unavailable("the meta group's leader changed; the outcome is unknown"))

    def reload(self) -> None:
        """See GroupMachine."""
        self.directory.load(self.rows.scan(b"\0", b"\xff\xff\xff\xff"))
        self.revision += 1
        self._policies.clear()
