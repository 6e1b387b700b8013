"""The replicated state of the meta group: destinations with their policy, routes, what operators have stopped, tokens, the cluster's
identity and nodes, where each shard belongs, and the feature level. Pure; small enough to be kept whole.

A command is a list of changes, each with the identity of whoever asked; `apply` answers each with a Change that tells what
became of it, so that the node that asked can tell its caller.

Commands and rows are tagged by kind, and a kind never changes its shape once a version with it was released: another shape is another
kind, of a feature level of its own (`core.features`).
"""
from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import msgspec
from spillway.broker.core.access import TOKENS_MAX, Token
from spillway.broker.core.bounds import Count, Name, Number, Time, check_scope, version_of
from spillway.broker.core.errors import RUN_NEWER, CorruptEntry
from spillway.broker.core.features import LEVEL_MIN
from spillway.broker.core.policy import Nack, Policy

DESTINATIONS_MAX = 100_000  # each costs about 1 KiB on every node
ROUTES_MAX = 10_000
HOLDS_MAX = 100_000
FORMER_IDS_MAX = 8  # clients do not run through more restores
NODES_MAX = 14  # all have a replica of the meta group: seven may vote in it, and seven learn
STAYS, DRAINS, GONE = range(3)  # Member.leaving
OK, EXISTS, MISSING, ETAG, FULL, TAKEN, UNKNOWN_TARGET, CYCLE = range(8)  # outcomes of a change
FOR_EVER = 0  # Hold.until of a pause
# First bytes of rows; names have no control characters, so a destination's row is its name.
_ROUTE, _HOLD, _MEMBER, _HOME, _LEVEL, _IDENTITY = b"\x01r", b"\x01h", b"\x01n", b"\x01s", b"\x01l", b"\x01i"
_TOKEN = b"\x01t"
_KIND = b"\x01"


class HttpTarget(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Where the HTTP dispatcher sends a destination's messages."""

    url: str
    timeout_ms: Time = 10_000
    concurrency_max: Count = 16
    headers: dict[str, str] = {}
    signing_secrets: tuple[str, ...] = ()
    allow_private_addresses: bool = False
    redirects_max: Count = 0


class DestinationV1(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """A destination as version 1 stored it."""

    name: Name
    revision: Number
    run_messages_max: Count
    lease_ms: Time
    backoff_base_ms: Time
    backoff_cap_ms: Time
    nack: int
    attempts_max: Count
    age_ms_max: Time
    http: HttpTarget | None = None

    def current(self) -> Destination:
        """As it is stored now."""
        return Destination(self.name, self.revision, Policy(
            self.run_messages_max, self.lease_ms, self.backoff_base_ms, self.backoff_cap_ms, Nack(self.nack),
            self.attempts_max, self.age_ms_max), self.http)


class Destination(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2):
    """A destination as stored."""

    name: Name
    revision: Number  # log index of its last change: its etag
    policy: Policy
    http: HttpTarget | None = None

    def current(self) -> Destination:
        """As it is stored now."""
        return self


def destination(name: str, policy: Policy, http: HttpTarget | None = None) -> Destination:
    """A destination not yet stored."""
    return Destination(name, 0, policy, http)


class Target(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One target of a route."""

    destination: Name
    filter: str = ""  # CEL; "": everything
    skip_over_budget: bool = False


class Route(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """A route as stored."""

    source: Name
    revision: Number
    targets: tuple[Target, ...]


class Hold(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """An operator's closed gate: both may be set."""

    scope: bytes  # destination, or destination NUL tenant
    paused: str | None  # why; None: not paused
    parked_until: Time  # ms since 1970; 0: not parked
    parked_why: str = ""


class Member(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """A node of the cluster."""

    node_id: Name
    revision: Number
    peer_address: str  # host:port, for the other nodes
    client_address: str  # host:port
    zone: str = ""  # "": it shares none with others
    host: str = ""
    incarnation: str = ""  # of its store; "": it has not said
    leaving: Count = STAYS
    feature_min: Count = 0  # levels at which it can work; 0: it has not said
    feature_max: Count = 0


class Home(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """Where a shard belongs; its group follows, one change at a time."""

    shard: Count
    revision: Number
    nodes: tuple[Name, ...]  # the preferred leader first


class Level(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """The cluster's feature level; without one it is LEVEL_MIN."""

    level: Count
    revision: Number


class Identity(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """Which cluster this is: another one may have its name."""

    cluster_id: Name
    revision: Number
    former: tuple[Name, ...] = ()  # of the clusters whose backup it comes from, the latest first


class PutV1(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=1):
    """PutDestination as version 1 wrote it."""

    origin: str
    number: int
    destination: DestinationV1
    create: bool
    replace: bool
    etag: int


class PutDestination(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=2):
    """Creates or replaces a destination."""

    origin: str  # node that proposed it
    number: int  # that node's own number of the request
    destination: Destination
    create: bool  # may create
    replace: bool  # may replace
    etag: int  # if not 0: only if this is the revision now


class PutRoute(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=3):
    """Creates or replaces a route."""

    origin: str
    number: int
    route: Route
    create: bool
    replace: bool
    etag: int


class DropRoute(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=4):
    """Removes a route."""

    origin: str
    number: int
    source: Name
    etag: int


class SetHold(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=5):
    """Changes an operator's gate: only what is not None. `pause` "" resumes, `park_until` 0 unparks."""

    origin: str
    number: int
    scope: bytes
    pause: str | None = None
    paused: bool = False  # with `pause`: whether it pauses
    park_until: Time | None = None
    park_why: str = ""


class PutMember(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=6):
    """Creates or replaces a node, and says where shards belong with it: nobody sees one without the other."""

    origin: str
    number: int
    member: Member
    create: bool
    replace: bool
    etag: int
    homes: tuple[Home, ...] = ()


class DropMember(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=7):
    """Forgets a node."""

    origin: str
    number: int
    node_id: Name
    etag: int


class Settle(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=8):
    """Says where shards belong; those that are not named stay. With `first`, only if nothing has been said so far. It makes the
    cluster's identity, if it has none."""

    origin: str
    number: int
    homes: tuple[Home, ...]
    members: tuple[Member, ...] = ()  # with `first`
    first: bool = False
    cluster_id: str = ""


class Raise(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=9):
    """Raises the feature level. Whoever proposes it has seen that every node can follow."""

    origin: str
    number: int
    level: Count


class PutToken(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=10):
    """Makes a token."""

    origin: str
    number: int
    token: Token


class DropToken(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=11):
    """Ends a token."""

    origin: str
    number: int
    token_id: Name


Command = PutV1 | PutDestination | PutRoute | DropRoute | SetHold | PutMember | DropMember | Settle | Raise | PutToken | DropToken
_COMMANDS = range(1, 12)  # kinds that are read


class _Kind(msgspec.Struct, array_like=True):
    kind: int


_encode = msgspec.msgpack.Encoder().encode
_decode_commands = msgspec.msgpack.Decoder(list[Command]).decode
_decode_destination = msgspec.msgpack.Decoder(DestinationV1 | Destination).decode
_decode_route = msgspec.msgpack.Decoder(Route).decode
_decode_hold = msgspec.msgpack.Decoder(Hold).decode
_decode_member = msgspec.msgpack.Decoder(Member).decode
_decode_home = msgspec.msgpack.Decoder(Home).decode
_decode_identity = msgspec.msgpack.Decoder(Identity).decode
_decode_token = msgspec.msgpack.Decoder(Token).decode
_decode_level = msgspec.msgpack.Decoder(Level).decode
_decode_kinds = msgspec.msgpack.Decoder(list[_Kind]).decode


def encode_command(commands: list[Command]) -> bytes:
    """A log entry of the meta group."""
    return _encode(commands)


class Change(msgspec.Struct):
    """What became of a command."""

    origin: str
    number: int
    outcome: int
    record: Destination | Route | Hold | Member | Level | Token | None = None  # as it is now
    why: str = ""  # what an outcome needs to be understood: the target that is unknown, the cycle


class Directory:
    """All of it."""

    def __init__(self) -> None:
        self.destinations: dict[str, Destination] = {}
        self.routes: dict[str, Route] = {}
        self.holds: dict[bytes, Hold] = {}
        self.members: dict[str, Member] = {}
        self.homes: dict[int, Home] = {}
        self.level = LEVEL_MIN
        self.identity: Identity | None = None
        self.tokens: dict[str, Token] = {}
        self.tokens_revision = 0
        """Grows whenever tokens change, and may when they do not. Not stored, and each node's own."""
        self.nodes_revision = 0
        """Grows whenever members or homes change, and may when they do not: caches compare it. Not stored, and each node's own."""

    @property
    def cluster_id(self) -> str:
        """The cluster's identity; empty if it has none yet."""
        return self.identity.cluster_id if self.identity else ""

    def load(self, rows: Iterator[tuple[bytes, bytes]]) -> None:
        """Replaces everything by stored rows. Raises CorruptEntry."""
        self.destinations, self.routes, self.holds, self.members, self.homes = {}, {}, {}, {}, {}
        self.tokens = {}
        self.tokens_revision += 1
        self.level = LEVEL_MIN
        self.nodes_revision += 1
        self.identity = None
        for key, value in rows:
            try:
                if key.startswith(_ROUTE):
                    route = _decode_route(value)
                    self.routes[route.source] = route
                elif key.startswith(_HOLD):
                    hold = _decode_hold(value)
                    check_scope(hold.scope)
                    self.holds[hold.scope] = hold
                elif key.startswith(_MEMBER):
                    member = _decode_member(value)
                    self.members[member.node_id] = member
                elif key.startswith(_HOME):
                    home = _decode_home(value)
                    self.homes[home.shard] = home
                elif key.startswith(_TOKEN):
                    token = _decode_token(value)
                    self.tokens[token.token_id] = token
                elif key == _LEVEL:
                    self.level = _decode_level(value).level
                elif key == _IDENTITY:
                    self.identity = _decode_identity(value)
                elif key.startswith(_KIND):
                    raise ValueError("it is of a kind that this version does not know")
                else:
                    row = _decode_destination(value).current()
                    self.destinations[row.name] = row
            except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as e:
                raise CorruptEntry(f"the row {key!r} of the directory does not decode: {e}{_newer(key, value)}") from e

    def apply(self, index: int, command: bytes) -> tuple[list[Change], list[tuple[bytes, bytes]], list[bytes]]:
        """Applies a committed command: the changes, rows to put, rows to delete. Raises CorruptEntry for bytes of another
        kind, and then nothing has changed."""
        try:
            commands = [PutDestination(c.origin, c.number, c.destination.current(), c.create, c.replace, c.etag)
                        if isinstance(c, PutV1) else c for c in _decode_commands(command)]
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as e:
            raise CorruptEntry(f"a meta entry of {len(command)} bytes does not decode: {e}{_newer_command(command)}") from e
        for c in commands:
            if isinstance(c, SetHold):
                check_scope(c.scope)
        changes: list[Change] = []
        puts: dict[bytes, bytes] = {}
        deletes: dict[bytes, None] = {}
        for c in commands:
            change = Change(c.origin, c.number, OK)
            if isinstance(c, Settle | PutMember):
                for record in self._settle(c, index, change) if isinstance(c, Settle) else self._put_member(c, index, change):
                    puts[_row_key(record)] = _encode(record)
                    deletes.pop(_row_key(record), None)
                changes.append(change)
                continue
            if isinstance(c, PutDestination):
                key = c.destination.name.encode()
                self._put_destination(c, index, change)
            elif isinstance(c, PutRoute):
                key = _ROUTE + c.route.source.encode()
                self._put_route(c, index, change)
            elif isinstance(c, DropRoute):
                key = _ROUTE + c.source.encode()
                self._drop_route(c, change)
            elif isinstance(c, DropMember):
                key = _MEMBER + c.node_id.encode()
                self._drop_member(c, change)
            elif isinstance(c, PutToken):
                key = _TOKEN + c.token.token_id.encode()
                self._put_token(c, index, change)
            elif isinstance(c, DropToken):
                key = _TOKEN + c.token_id.encode()
                self._drop_token(c, change)
            elif isinstance(c, Raise):
                key = _LEVEL
                self._raise(c, index, change)
            else:
                key = _HOLD + c.scope
                self._set_hold(c, change)
            changes.append(change)
            if change.outcome == OK:
                puts.pop(key, None)
                deletes.pop(key, None)
                if change.record is None:
                    deletes[key] = None
                else:
                    puts[key] = _encode(change.record)
        return changes, list(puts.items()), list(deletes)

    def _put_destination(self, c: PutDestination, index: int, change: Change) -> None:
        name = c.destination.name
        old = self.destinations.get(name)
        change.outcome = _may_put(old, c.create, c.replace, c.etag)
        if change.outcome == OK and old is None:
            if name in self.routes:
                change.outcome = TAKEN
            elif len(self.destinations) >= DESTINATIONS_MAX:
                change.outcome = FULL
        if change.outcome == OK:
            old = self.destinations[name] = msgspec.structs.replace(c.destination, revision=index)
        change.record = old

    def _put_route(self, c: PutRoute, index: int, change: Change) -> None:
        source = c.route.source
        old = self.routes.get(source)
        change.outcome = _may_put(old, c.create, c.replace, c.etag)
        if change.outcome == OK:
            change.outcome, change.why = self._check_route(c.route)
        if change.outcome == OK and old is None and len(self.routes) >= ROUTES_MAX:
            change.outcome = FULL
        if change.outcome == OK:
            old = self.routes[source] = msgspec.structs.replace(c.route, revision=index)
        change.record = old

    def _check_route(self, route: Route) -> tuple[int, str]:
        if route.source in self.destinations:
            return TAKEN, ""
        for number, target in enumerate(route.targets):
            if target.destination == route.source:
                return CYCLE, f"{route.source} -> {route.source}"
            if target.destination not in self.destinations and target.destination not in self.routes:
                return UNKNOWN_TARGET, str(number)
        came_from: dict[str, str] = {}
        front = [route.source]
        while front:
            here = front.pop()
            for target in (route if here == route.source else self.routes[here]).targets:
                name = target.destination
                if name == route.source:
                    path = [name, here]
                    while path[-1] != route.source:
                        path.append(came_from[path[-1]])
                    return CYCLE, " -> ".join(reversed(path))
                if name in self.routes and name not in came_from:
                    came_from[name] = here
                    front.append(name)
        return OK, ""

    def _drop_route(self, c: DropRoute, change: Change) -> None:
        old = self.routes.get(c.source)
        change.outcome = _may_put(old, False, True, c.etag)
        if change.outcome == OK:
            user = next((r.source for r in self.routes.values() if any(t.destination == c.source for t in r.targets)), None)
            if user is not None:
                change.outcome, change.why = TAKEN, user
        if change.outcome == OK:
            del self.routes[c.source]
        else:
            change.record = old

    def _set_hold(self, c: SetHold, change: Change) -> None:
        old = self.holds.get(c.scope)
        paused = old.paused if old else None
        until, why = (old.parked_until, old.parked_why) if old else (0, "")
        if c.pause is not None:
            paused = c.pause if c.paused else None
        if c.park_until is not None:
            until, why = c.park_until, c.park_why
        if paused is None and not until:
            self.holds.pop(c.scope, None)
        elif old is None and len(self.holds) >= HOLDS_MAX:
            change.outcome = FULL
        else:
            change.record = self.holds[c.scope] = Hold(c.scope, paused, until, why)

    def _put_member(self, c: PutMember, index: int, change: Change) -> list[Member | Home]:
        change.record = old = self.members.get(c.member.node_id)
        change.outcome = _may_put(old, c.create, c.replace, c.etag)
        if change.outcome == OK and old is None and len(self.members) >= NODES_MAX:
            change.outcome = FULL
        if change.outcome == OK:
            self._check_homes(c.homes, self.members.keys() | {c.member.node_id}, change)
        if change.outcome != OK:
            return []
        self.nodes_revision += 1
        change.record = self.members[c.member.node_id] = msgspec.structs.replace(c.member, revision=index)
        return [change.record, *self._put_homes(c.homes, index)]

    def _check_homes(self, homes: Sequence[Home], known: Container[str], change: Change) -> None:
        unknown = next((node for home in homes for node in home.nodes if node not in known), None)
        if unknown is not None:
            change.outcome, change.why = UNKNOWN_TARGET, unknown

    def _put_homes(self, homes: Sequence[Home], index: int) -> list[Home]:
        new = [msgspec.structs.replace(home, revision=index) for home in homes]
        self.homes.update({home.shard: home for home in new})
        return new

    def _drop_member(self, c: DropMember, change: Change) -> None:
        old = self.members.get(c.node_id)
        change.outcome = _may_put(old, False, True, c.etag)
        if change.outcome == OK and (home := next((h for h in self.homes.values() if c.node_id in h.nodes), None)) is not None:
            change.outcome, change.why = TAKEN, f"shard {home.shard}"
        if change.outcome == OK:
            del self.members[c.node_id]
            self.nodes_revision += 1
        else:
            change.record = old

    def _put_token(self, c: PutToken, index: int, change: Change) -> None:
        if c.token.token_id in self.tokens:
            change.outcome = EXISTS
        elif len(self.tokens) >= TOKENS_MAX:
            change.outcome = FULL
        else:
            self.tokens_revision += 1
            change.record = self.tokens[c.token.token_id] = msgspec.structs.replace(c.token, revision=index)

    def _drop_token(self, c: DropToken, change: Change) -> None:
        if self.tokens.pop(c.token_id, None) is None:
            change.outcome = MISSING
        else:
            self.tokens_revision += 1

    def _raise(self, c: Raise, index: int, change: Change) -> None:
        if c.level > self.level:
            self.level = c.level
            change.record = Level(c.level, index)
        else:
            change.outcome = EXISTS

    def _settle(self, c: Settle, index: int, change: Change) -> list[Member | Home | Identity]:
        if c.first and self.members:
            change.outcome = EXISTS
            return []
        self._check_homes(c.homes, {m.node_id for m in c.members} if c.first else self.members.keys(), change)
        if change.outcome != OK:
            return []
        self.nodes_revision += 1
        members = [msgspec.structs.replace(member, revision=index) for member in c.members] if c.first else []
        self.members.update({member.node_id: member for member in members})
        made: list[Identity] = []
        if c.cluster_id and self.identity is None:
            self.identity = Identity(c.cluster_id, index)
            made.append(self.identity)
        return [*made, *members, *self._put_homes(c.homes, index)]


def names_nodes(key: bytes) -> bool:
    """Whether a row says who a node is, or where a shard belongs: what a cluster made from a backup must not believe."""
    return key.startswith((_MEMBER, _HOME))


def succeeds(old: Identity, cluster_id: str) -> tuple[bytes, bytes]:
    """The row of a cluster's identity that is made from a backup of another one."""
    former = (old.cluster_id, *old.former)[:FORMER_IDS_MAX]
    return _IDENTITY, _encode(Identity(cluster_id, old.revision, former))


def _newer_command(command: bytes) -> str:
    """What to do about an entry that is refused, if it has a command of a kind that is not known."""
    try:
        kinds = {c.kind for c in _decode_kinds(command)} - {*_COMMANDS}
    except (msgspec.DecodeError, RecursionError):
        return ""
    return f". It has a command of kind {max(kinds)}, and this version knows up to {_COMMANDS[-1]}{RUN_NEWER}" if kinds else ""


def _newer(key: bytes, value: bytes) -> str:
    """The same of a row."""
    version = version_of(value)
    newest = 1 if key.startswith(_KIND) else 2
    if key.startswith(_KIND) and not key.startswith((_ROUTE, _HOLD, _MEMBER, _HOME, _LEVEL, _IDENTITY, _TOKEN)):
        return RUN_NEWER
    return f". It has version {version}, and this node reads up to {newest}{RUN_NEWER}" if version is not None and version > newest else ""


def _row_key(record: Member | Home | Identity) -> bytes:
    if isinstance(record, Identity):
        return _IDENTITY
    return _MEMBER + record.node_id.encode() if isinstance(record, Member) else _HOME + record.shard.to_bytes(4, "big")


def _may_put(old: Destination | Route | Member | None, create: bool, replace: bool, etag: int) -> int:
    if old is not None and not replace:
        return EXISTS
    if old is None and not create:
        return MISSING
    if etag and (old is None or old.revision != etag):
        return ETAG
    return OK
