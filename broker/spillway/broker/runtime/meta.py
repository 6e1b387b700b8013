"""The meta group on this node: destinations, and changes to them from wherever they are asked for."""
from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence

from spillway.broker.core import directory as d
from spillway.broker.core import features
from spillway.broker.core.access import TOKENS_MAX, Token
from spillway.broker.core.directory import Change, Command, Destination, Directory, Home, Member, Route
from spillway.broker.core.policy import Policy
from spillway.broker.errors import AlreadyExists, EtagMismatch, NotFound, RequestError, Unavailable
from spillway.cluster.machine import Role
from spillway.cluster.state_store import GroupRows

PENDING_MAX = 1024  # changes waiting for the log
COMMANDS_PER_ENTRY_MAX = 64
ENTRY_BYTES_SOFT_MAX = 1 << 20  # a destination or a route has up to some 400 KiB
DEFAULT_POLICY = Policy()
NO_ETAG = 1 << 62  # no revision ever is: what asks for it changes nothing
DIRECTORY_ROWS = b"\0", b"\xff\xff\xff\xff"  # from, to


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
        self._pending: list[Command] = []
        self._waiting: dict[int, asyncio.Future[Change]] = {}
        self._policies: dict[bytes, Policy] = {}
        self.changed: Callable[[], None] = lambda: None  # called after every change
        self.level_changed: Callable[[int], None] = lambda level: None
        """Told of a new feature level BEFORE it is stored. What it raises ends the node."""
        self.reload()

    def policy(self, destination: bytes) -> Policy:
        """The policy of a destination, the default if it is not (yet) known here."""
        policy = self._policies.get(destination)
        if policy is None:
            known = self.directory.destinations.get(destination.decode())
            policy = known.policy if known else DEFAULT_POLICY
            if known:
                self._policies[destination] = policy
        return policy

    def get(self, name: str) -> Destination | None:
        """A destination as this node knows it."""
        return self.directory.destinations.get(name)

    async def put(self, destination: Destination, create: bool, replace: bool, etag: int,
                  field: str = "destination") -> Destination:
        """Creates or replaces a destination. Raises AlreadyExists, NotFound, EtagMismatch, RequestError, or Unavailable (the
        outcome may be unknown)."""
        change = await self._change(lambda number: d.PutDestination(self.node_id, number, destination, create, replace, etag))
        if change.outcome == d.TAKEN:
            raise AlreadyExists(f"{field}.name", f"{destination.name!r} is the source of a route")
        _check(change.outcome, f"destination {destination.name!r}", f"{field}.name", f"{field}.etag", etag)
        if change.outcome == d.FULL:
            raise RequestError(f"{field}.name", f"there are {d.DESTINATIONS_MAX} destinations, the most that a cluster keeps")
        assert isinstance(change.record, Destination)
        return change.record

    async def put_route(self, route: Route, create: bool, replace: bool, etag: int) -> Route:
        """Creates or replaces a route. Raises as `put`."""
        change = await self._change(lambda number: d.PutRoute(self.node_id, number, route, create, replace, etag))
        if change.outcome == d.TAKEN:
            raise RequestError("route.source", f"{route.source!r} is a destination")
        if change.outcome == d.UNKNOWN_TARGET:
            target = route.targets[int(change.why)].destination
            raise RequestError(f"route.targets[{change.why}].destination",
                               f"{target!r} is neither a destination nor the source of a route; create it first")
        if change.outcome == d.CYCLE:
            raise RequestError("route.targets", f"is a cycle of routes: {change.why}")
        _check(change.outcome, f"a route of {route.source!r}", "route.source", "route.etag", etag)
        if change.outcome == d.FULL:
            raise RequestError("route.source", f"there are {d.ROUTES_MAX} routes, the most that a cluster keeps")
        assert isinstance(change.record, Route)
        return change.record

    async def drop_route(self, source: str, etag: int) -> None:
        """Removes a route. Raises NotFound, EtagMismatch, RequestError if another route leads to it, Unavailable."""
        change = await self._change(lambda number: d.DropRoute(self.node_id, number, source, etag))
        _check(change.outcome, f"a route of {source!r}", "source", "etag", etag)
        if change.outcome == d.TAKEN:
            raise RequestError("source", f"is a target of the route of {change.why!r}; change that one first")

    async def hold(self, scope: bytes, pause: str | None = None, paused: bool = False, park_until: int | None = None,
                   park_why: str = "") -> None:
        """Changes an operator's gate; see directory.SetHold. Raises RequestError, Unavailable."""
        change = await self._change(
            lambda number: d.SetHold(self.node_id, number, scope, pause, paused, park_until, park_why))
        if change.outcome == d.FULL:
            raise RequestError("tenant", f"{d.HOLDS_MAX} are paused or parked, the most that a cluster keeps")

    async def put_member(self, member: Member, create: bool, replace: bool, etag: int = 0,
                         homes: Mapping[int, Sequence[str]] | None = None) -> Member:
        """Creates or replaces a node of the cluster, and says at once where shards belong with it. Raises AlreadyExists, NotFound,
        EtagMismatch, RequestError, Unavailable."""
        self._require(features.MEMBERS)
        rows = _homes(homes or {})
        change = await self._change(lambda number: d.PutMember(self.node_id, number, member, create, replace, etag, rows))
        if change.outcome == d.UNKNOWN_TARGET:
            raise Unavailable(f"node {change.why} left meanwhile; try again")
        _check(change.outcome, f"node {member.node_id!r}", "node_id", "node_id", etag)
        if change.outcome == d.FULL:
            raise RequestError("node_id", f"there are {d.NODES_MAX} nodes, the most that a cluster has; remove one first")
        assert isinstance(change.record, Member)
        return change.record

    async def drop_member(self, node_id: str, etag: int = 0) -> None:
        """Forgets a node of the cluster. Raises NotFound, EtagMismatch, RequestError if a shard belongs there, Unavailable."""
        self._require(features.MEMBERS)
        change = await self._change(lambda number: d.DropMember(self.node_id, number, node_id, etag))
        _check(change.outcome, f"node {node_id!r}", "node_id", "node_id", etag)
        if change.outcome == d.TAKEN:
            raise RequestError("node_id", f"{change.why} belongs on node {node_id!r}; drain it first")

    async def settle(self, homes: Mapping[int, Sequence[str]], first: Sequence[Member] = (), cluster_id: str = "") -> bool:
        """Says where shards belong, with `first` who the nodes are, and with `cluster_id` which cluster this is, if it has no identity;
        false if the nodes were said before, or a shard belongs on one that is none. Raises Unavailable."""
        self._require(features.MEMBERS)
        rows = _homes(homes)
        change = await self._change(lambda number: d.Settle(self.node_id, number, rows, tuple(first), bool(first), cluster_id))
        return change.outcome == d.OK

    async def put_token(self, token: Token) -> Token:
        """Makes a token. Raises RequestError, Unavailable."""
        self._require(features.TOKENS)
        change = await self._change(lambda number: d.PutToken(self.node_id, number, token))
        _check(change.outcome, f"token {token.token_id!r}", "token_id", "token_id", 0)
        if change.outcome == d.FULL:
            raise RequestError("name", f"there are {TOKENS_MAX} tokens, the most that a cluster keeps; revoke some first")
        assert isinstance(change.record, Token)
        return change.record

    async def drop_token(self, token_id: str) -> None:
        """Ends a token. Raises NotFound, Unavailable."""
        self._require(features.TOKENS)
        change = await self._change(lambda number: d.DropToken(self.node_id, number, token_id))
        _check(change.outcome, f"token {token_id!r}", "token_id", "token_id", 0)

    async def raise_level(self, level: int) -> None:
        """Raises the cluster's feature level; the caller has seen that every node can follow. Raises Unavailable."""
        await self._change(lambda number: d.Raise(self.node_id, number, level))

    async def barrier(self) -> None:
        """Waits until everything that was answered before is applied here, by an entry without a change that every version reads. Raises
        Unavailable."""
        await self._change(lambda number: d.DropRoute(self.node_id, number, "barrier", NO_ETAG))

    def feature(self, level: int) -> bool:
        """Whether what came with a feature level may be written."""
        return self.directory.level >= level

    def _require(self, level: int) -> None:
        """The last look before something of a level is written. Raises Unavailable."""
        if not self.feature(level):
            raise Unavailable(f"the cluster is at feature level {self.directory.level}, and this needs {level}: upgrade every node")

    async def _change(self, make: Callable[[int], Command], timeout: float = 5.0) -> Change:
        """Proposes a change on the meta group's leader, which this node must be."""
        if not self.leading:
            raise Unavailable("this node does not lead the meta group")
        if len(self._pending) >= PENDING_MAX:
            raise Unavailable("too many changes are waiting")
        number = next(self._numbers)
        future: asyncio.Future[Change] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._pending.append(make(number))
        self._wake()
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise Unavailable("the meta group has no quorum; the outcome is unknown") from None
        finally:
            self._waiting.pop(number, None)

    # -- GroupMachine --------------------------------------------------------------------------------------------

    def durable_index(self) -> int:
        """See GroupMachine."""
        return self.rows.durable_index

    def collect(self) -> bytes | None:
        """See GroupMachine."""
        if not self._pending:
            return None
        size = count = 0
        for command in self._pending[:COMMANDS_PER_ENTRY_MAX]:
            size += len(d.encode_command([command]))
            if count and size > ENTRY_BYTES_SOFT_MAX:
                break
            count += 1
        some, self._pending = self._pending[:count], self._pending[count:]
        return d.encode_command(some)

    def apply(self, index: int, term: int, command: bytes) -> None:
        """See GroupMachine."""
        level = self.directory.level
        changes, puts, deletes = self.directory.apply(index, command)
        if self.directory.level != level:
            self.level_changed(self.directory.level)
        self.rows.commit(index, term, puts, deletes, [])
        self.revision += 1
        self._policies.clear()
        self.changed()
        for change in changes:
            if change.origin == self.node_id and (future := self._waiting.get(change.number)) and not future.done():
                future.set_result(change)

    def configured(self, index: int, term: int, configuration: bytes) -> None:
        """See GroupMachine."""
        self.rows.configure(index, configuration)
        self.rows.commit(index, term, [], [], [])

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
        level = self.directory.level
        self.directory.load(self.rows.scan(*DIRECTORY_ROWS))
        if self.directory.level != level:
            self.level_changed(self.directory.level)
        self.revision += 1
        self._policies.clear()
        self.changed()


def _homes(homes: Mapping[int, Sequence[str]]) -> tuple[Home, ...]:
    return tuple(Home(shard, 0, tuple(nodes)) for shard, nodes in homes.items())


def _check(outcome: int, what: str, name_field: str, etag_field: str, etag: int) -> None:
    """Raises what an outcome means."""
    if outcome == d.EXISTS:
        raise AlreadyExists(name_field, f"{what} exists already")
    if outcome == d.MISSING:
        raise NotFound(name_field, f"{what} does not exist")
    if outcome == d.ETAG:
        raise EtagMismatch(etag_field, f"{etag} is not current: it was changed meanwhile; read it again")
