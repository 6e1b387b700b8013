"""The directory of destinations: who may create, who may replace, what is refused."""
from __future__ import annotations

from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.broker.core import directory as d
from spillway.broker.core.access import ADMIN, LEASE, PRODUCE, Scope, Token
from spillway.broker.core.errors import CorruptEntry
from spillway.broker.core.policy import Limit, Nack, Policy, TenantPolicy


def put(name: str, create: bool = True, replace: bool = True, etag: int = 0, **policy: int) -> d.PutDestination:
    """A request."""
    return d.PutDestination("node", 7, d.destination(name, Policy(**policy)), create, replace, etag)


def apply(directory: d.Directory, index: int, *puts: d.Command) -> list[int]:
    """Outcomes of a command, through the codec."""
    changes, _, _ = directory.apply(index, d.encode_command(list(puts)))
    assert all((change.origin, change.number) == ("node", 7) for change in changes)
    return [change.outcome for change in changes]


@pytest.mark.parametrize(("exists", "create", "replace", "etag", "outcome"), [
    (False, True, True, 0, d.OK), (False, True, False, 0, d.OK), (False, False, True, 0, d.MISSING),
    (False, True, True, 5, d.ETAG), (False, False, True, 5, d.MISSING),
    (True, True, True, 0, d.OK), (True, True, False, 0, d.EXISTS), (True, False, True, 0, d.OK),
    (True, True, True, 5, d.OK), (True, False, True, 5, d.OK), (True, True, True, 4, d.ETAG),
    (True, True, False, 5, d.EXISTS)])
def test_who_may_change_a_destination(exists: bool, create: bool, replace: bool, etag: int, outcome: int) -> None:
    """Creating needs permission to create, replacing to replace, and an etag must be that of the last change."""
    directory = d.Directory()
    if exists:
        apply(directory, 5, put("a"))
    assert apply(directory, 9, put("a", create, replace, etag, lease_ms=77)) == [outcome]
    found = directory.destinations.get("a")
    assert (found is not None) == (exists or outcome == d.OK)
    if found is not None:
        assert (found.revision, found.policy.lease_ms) == ((9, 77) if outcome == d.OK else (5, Policy().lease_ms))


def test_a_change_tells_what_is_now() -> None:
    """The answer carries the destination as it is after the change, or as it hindered the change."""
    directory = d.Directory()
    (made,), rows, _ = directory.apply(3, d.encode_command([put("a", lease_ms=9)]))
    assert made.record == directory.destinations["a"]
    (refused,), none, _ = directory.apply(4, d.encode_command([put("a", replace=False)]))
    assert refused.record == made.record and none == []
    (missing,), _, _ = directory.apply(5, d.encode_command([put("b", create=False)]))
    assert missing.record is None
    again = d.Directory()
    again.load(iter(rows))
    assert again.destinations == directory.destinations


def test_the_directory_is_full_at_its_limit() -> None:
    """DESTINATIONS_MAX destinations fit, one more does not, and those that are there can still be changed."""
    directory = d.Directory()
    with mock.patch.object(d, "DESTINATIONS_MAX", 2):
        assert apply(directory, 1, put("a"), put("b"), put("c")) == [d.OK, d.OK, d.FULL]
        assert apply(directory, 2, put("a"), put("c")) == [d.OK, d.FULL]


def route(source: str, *targets: str, etag: int = 0, create: bool = True) -> d.PutRoute:
    """A request for a route."""
    return d.PutRoute("node", 7, d.Route(source, 0, tuple(map(d.Target, targets))), create, True, etag)


def test_a_route_leads_somewhere_and_not_back() -> None:
    """Targets must exist, a source is no destination, and no route may lead to its own source, however long the way."""
    directory = d.Directory()
    assert apply(directory, 1, put("a"), put("b"), route("x", "a", "b"), route("y", "x", "a")) == [d.OK] * 4
    changes, rows, _ = directory.apply(2, d.encode_command(
        [route("x", "a", "none"), route("a", "b"), route("z", "z"), route("x", "b", "y"), put("x")]))
    assert [(c.outcome, c.why) for c in changes] == [
        (d.UNKNOWN_TARGET, "1"), (d.TAKEN, ""), (d.CYCLE, "z -> z"), (d.CYCLE, "x -> y -> x"), (d.TAKEN, "")]
    assert rows == [] and [t.destination for t in directory.routes["x"].targets] == ["a", "b"]
    drop = d.DropRoute("node", 7, "x", 0)
    assert apply(directory, 3, drop) == [d.TAKEN]
    assert apply(directory, 4, d.DropRoute("node", 7, "y", 9), d.DropRoute("node", 7, "y", 1), drop, drop) == [
        d.ETAG, d.OK, d.OK, d.MISSING]
    assert not directory.routes


def test_operators_gates_close_and_open() -> None:
    """A pause and a parking are independent; when both are gone, so is the row."""
    directory = d.Directory()

    def hold(**fields: Any) -> tuple[int, int]:
        _, puts, deletes = directory.apply(1, d.encode_command([d.SetHold("node", 7, b"a", **fields)]))
        return len(puts), len(deletes)

    assert hold(pause="why", paused=True) == (1, 0) and hold(park_until=77, park_why="later") == (1, 0)
    assert directory.holds == {b"a": d.Hold(b"a", "why", 77, "later")}
    assert hold(pause="") == (1, 0) and hold(park_until=0) == (0, 1) and not directory.holds


def test_everything_survives_the_store() -> None:
    """What is loaded from the rows is what wrote them."""
    policy = Policy(1, 2, 3, 4, Nack.BLOCK_UNTIL, 5, 6, tenants={"t": TenantPolicy(2.0, Limit(3.0, 4, 5))})
    directory = d.Directory()
    _, rows, _ = directory.apply(1, d.encode_command([
        d.PutDestination("node", 7, d.destination("a", policy, d.HttpTarget("http://a", 1, 2, {"h": "v"}, ("s",))), True, True, 0),
        route("x", "a"), d.SetHold("node", 7, b"a\0t", "why", True)]))
    again = d.Directory()
    again.load(iter(rows))
    assert (again.destinations, again.routes, again.holds) == (directory.destinations, directory.routes, directory.holds)
    assert again.destinations["a"].policy == policy and set(again.holds) == {b"a\0t"}


def test_what_version_1_wrote_is_read() -> None:
    """Rows and commands of destinations as they were before policies had more fields."""
    old = [1, "a", 9, 1, 2, 3, 4, 2, 5, 6, ["http://a", 7, 8]]
    wanted = d.Destination("a", 9, Policy(1, 2, 3, 4, Nack.BLOCK_UNTIL, 5, 6), d.HttpTarget("http://a", 7, 8))
    directory = d.Directory()
    directory.load(iter([(b"a", msgspec.msgpack.encode(old))]))
    assert directory.destinations == {"a": wanted}
    changes, _, _ = directory.apply(11, msgspec.msgpack.encode([[1, "node", 7, old, True, True, 0]]))
    assert [c.outcome for c in changes] == [d.OK] and directory.destinations["a"].revision == 11


@given(garbage=st.binary(max_size=100))
def test_garbage_is_no_command(garbage: bytes) -> None:
    """Random bytes are a command by accident only, and raise nothing but CorruptEntry."""
    for use in (lambda: d.Directory().apply(1, garbage), lambda: d.Directory().load(iter([(b"", garbage)]))):
        try:
            use()
        except CorruptEntry:
            pass


def test_other_kinds_are_refused_whole() -> None:
    """A command or row of a kind that this software does not know changes nothing, nor does a field too many."""
    directory = d.Directory()
    plain = msgspec.msgpack.decode(d.encode_command([put("a")]))
    for spoil in (lambda c: [[99, *c[0][1:]]], lambda c: [*c, [99]], lambda c: [[*c[0], 1]],
                  lambda c: [[*c[0][:3], [99, *c[0][3][1:]], *c[0][4:]]]):
        with pytest.raises(CorruptEntry):
            directory.apply(1, msgspec.msgpack.encode(spoil(plain)))
    with pytest.raises(CorruptEntry):
        d.Directory().load(iter([(b"c", msgspec.msgpack.encode([99, "c"]))]))
    assert directory.destinations == {}


# -- nodes and homes ---------------------------------------------------------------------------------------------


def member(node_id: str, **fields: Any) -> d.Member:
    """A node as somebody says."""
    return d.Member(node_id, 0, "p:1", "c:1", **fields)


def founded(*node_ids: str, homes: dict[int, list[str]] | None = None) -> d.Directory:
    """A directory of a cluster that has been founded, by entry 1."""
    directory = d.Directory()
    rows = tuple(d.Home(shard, 0, tuple(nodes)) for shard, nodes in (homes or {1: list(node_ids)}).items())
    assert apply(directory, 1, d.Settle("node", 7, rows, tuple(map(member, node_ids)), True)) == [d.OK]
    return directory


def test_a_cluster_is_founded_once() -> None:
    """Whoever leads the meta group first says so; the next one is told that it was said."""
    directory = founded("a", "b", "c")
    assert apply(directory, 2, d.Settle("node", 7, (), (member("z"),), True)) == [d.EXISTS]
    assert list(directory.members) == ["a", "b", "c"] and directory.homes[1].nodes == ("a", "b", "c")


def test_nodes_and_homes_are_rows() -> None:
    """What is loaded is what was stored, beside everything else."""
    directory = d.Directory()
    rows: dict[bytes, bytes] = {}
    for index, command in enumerate((
            d.Settle("node", 7, (d.Home(1, 0, ("a",)), d.Home(300, 0, ("b", "a"))), (member("a"), member("b", zone="z")), True),
            put("r"), d.PutMember("node", 7, member("c"), True, False, 0), d.Settle("node", 7, (d.Home(1, 0, ("c", "b")),)),
            d.DropMember("node", 7, "a", 0)), 1):
        changes, puts, deletes = directory.apply(index, d.encode_command([command]))
        rows |= dict(puts)
        for key in deletes:
            del rows[key]
        if index == 5:
            assert changes[0].outcome == d.TAKEN, "shard 300 belongs there"
    again = d.Directory()
    again.load(iter(sorted(rows.items())))
    assert (again.members, again.homes, again.destinations) == (directory.members, directory.homes, directory.destinations)
    assert again.homes[1].nodes == ("c", "b") and again.members["b"].zone == "z"


def test_a_shard_belongs_on_nodes_that_there_are() -> None:
    """One that was removed meanwhile is not settled on; nothing of the command takes effect."""
    directory = founded("a", "b")
    assert apply(directory, 2, d.Settle("node", 7, (d.Home(1, 0, ("b",)), d.Home(2, 0, ("x",))))) == [d.UNKNOWN_TARGET]
    assert directory.homes[1].nodes == ("a", "b") and 2 not in directory.homes


def test_who_may_change_a_node() -> None:
    """As with destinations: create, replace, and the etag."""
    directory = founded("a", "b")
    assert apply(directory, 2, d.PutMember("node", 7, member("a"), True, False, 0)) == [d.EXISTS]
    assert apply(directory, 3, d.PutMember("node", 7, member("c"), False, True, 0)) == [d.MISSING]
    assert apply(directory, 4, d.PutMember("node", 7, member("a", leaving=d.DRAINS), False, True, 9)) == [d.ETAG]
    assert apply(directory, 5, d.PutMember("node", 7, member("a", leaving=d.DRAINS), False, True, 1)) == [d.OK]
    assert (directory.members["a"].leaving, directory.members["a"].revision) == (d.DRAINS, 5)
    assert apply(directory, 6, d.DropMember("node", 7, "x", 0)) == [d.MISSING]


def test_the_feature_level_only_rises_and_is_a_row() -> None:
    """What was written at a level stays readable for those who know it; a lower one would be a lie."""
    directory = d.Directory()
    assert directory.level == 1
    (change,), puts, deletes = directory.apply(1, d.encode_command([d.Raise("node", 7, 2)]))
    assert (change.outcome, change.record, directory.level, deletes) == (d.OK, d.Level(2, 1), 2, [])
    assert apply(directory, 2, d.Raise("node", 7, 1), d.Raise("node", 7, 2)) == [d.EXISTS, d.EXISTS]
    again = d.Directory()
    again.load(iter(puts))
    assert (again.level, again.destinations) == (2, {})
    again.load(iter([]))
    assert again.level == 1


def test_a_node_from_before_levels_has_none() -> None:
    """Its row ends where it ended then."""
    directory = d.Directory()
    directory.load(iter([(b"\x01nn1", msgspec.msgpack.encode([1, "n1", 4, "p:1", "c:1", "", "", "i", 0]))]))
    assert directory.members == {"n1": d.Member("n1", 4, "p:1", "c:1", incarnation="i")}
    assert (directory.members["n1"].feature_min, directory.members["n1"].feature_max) == (0, 0)


def test_what_a_newer_version_wrote_is_refused_with_what_to_do() -> None:
    """An unknown kind of command or row, and a later shape of a known one: it is never taken for something else."""
    unknown = msgspec.msgpack.encode([[99, "node", 7, 1]])
    with pytest.raises(CorruptEntry, match="a command of kind 99, and this version knows up to 11: a newer version wrote it; run that one"):
        d.Directory().apply(1, unknown)
    for key, value, says in ((b"\x01zx", [1, "x"], "of a kind that this version does not know: a newer version wrote it"),
                             (b"\x01nn1", [2, "n1"], "has version 2, and this node reads up to 1: a newer version wrote it"),
                             (b"orders", [3, "orders"], "has version 3, and this node reads up to 2: a newer version wrote it")):
        with pytest.raises(CorruptEntry, match=says):
            d.Directory().load(iter([(key, msgspec.msgpack.encode(value))]))


def test_there_are_as_many_nodes_as_the_meta_group_has_members() -> None:
    """Seven voters and seven learners."""
    directory = founded(*(f"n{i}" for i in range(d.NODES_MAX - 1)))
    assert apply(directory, 2, d.PutMember("node", 7, member("x"), True, False, 0)) == [d.OK]
    assert apply(directory, 3, d.PutMember("node", 7, member("y"), True, False, 0)) == [d.FULL]
    assert apply(directory, 4, d.PutMember("node", 7, member("x", zone="z"), False, True, 0)) == [d.OK]


def test_a_node_comes_with_what_belongs_to_it() -> None:
    """Whoever sees a new node sees where shards belong with it, or neither; homes on nodes that left meanwhile are refused whole."""
    directory = founded("a", "b")
    with_c = (d.Home(1, 0, ("c", "a")),)
    assert apply(directory, 2, d.PutMember("node", 7, member("c"), True, False, 0, with_c)) == [d.OK]
    assert directory.homes[1] == d.Home(1, 2, ("c", "a")) and directory.members["c"].revision == 2
    assert apply(directory, 3, d.PutMember("node", 7, member("d"), True, False, 0, (d.Home(1, 0, ("d", "z")),))) == [d.UNKNOWN_TARGET]
    assert directory.homes[1].nodes == ("c", "a") and "d" not in directory.members


def test_what_nodes_and_homes_are_has_a_revision_of_its_own() -> None:
    """It grows with each change of them, and with nothing else: a destination more wakes nobody who watches the nodes."""
    directory = d.Directory()
    member = d.Member("n1", 0, "p:1", "c:1")
    seen = [directory.nodes_revision]

    def grows(index: int, command: d.Command) -> bool:
        apply(directory, index, command)
        seen.append(directory.nodes_revision)
        return seen[-1] > seen[-2]
    assert not grows(1, put("a"))
    assert grows(2, d.PutMember("node", 7, member, True, False, 0))
    assert not grows(3, d.PutMember("node", 7, member, True, False, 0)), "it was refused"
    assert grows(4, d.Settle("node", 7, (d.Home(1, 0, ("n1",)),)))
    assert not grows(5, d.DropMember("node", 7, "n1", 0)), "a shard belongs there"
    assert grows(6, d.PutMember("node", 7, d.Member("n2", 0, "p:2", "c:2"), True, False, 0, (d.Home(1, 0, ("n2",)),)))
    assert grows(7, d.DropMember("node", 7, "n1", 0))
    assert not grows(8, d.Raise("node", 7, 2))
    directory.load(iter(()))
    assert directory.nodes_revision > seen[-1], "a snapshot may have brought anything"


def test_a_cluster_gets_its_identity_once() -> None:
    """With the first word on who its nodes are, or later if it was founded by a version that made none; it stays, and is a row. One that
    is made from a backup has another, and says whose it continues."""
    directory = d.Directory()
    founding = d.Settle("node", 7, (), (member("a"),), first=True, cluster_id="i")
    _, puts, _ = directory.apply(1, d.encode_command([founding]))
    assert directory.cluster_id == "i"
    assert apply(directory, 2, founding, d.Settle("node", 7, (), cluster_id="j")) == [d.EXISTS, d.OK]
    assert directory.identity == d.Identity("i", 1)
    again = d.Directory()
    again.load(iter(puts))
    assert again.identity == directory.identity
    again.load(iter([d.succeeds(d.Identity("i", 1, ("h",)), "k")]))
    assert again.identity == d.Identity("k", 1, ("i", "h"))
    older = founded("a")
    assert older.cluster_id == ""
    assert apply(older, 2, d.Settle("node", 7, (), cluster_id="i")) == [d.OK]
    assert older.cluster_id == "i"


TOKEN = Token("0a1b2c3d4e5f", 0, "ci", bytes(range(32)), (Scope(PRODUCE, "a*", "t"), Scope(LEASE), Scope(ADMIN, "b", "")),
              1_700_000_000_000, 1_800_000_000_000, 1, 2, 3)
# As level 3 wrote it, byte for byte: the command, and the row.
TOKEN_REST = ("a26369c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f939300a2612aa1749301a12aa12a9302a162a0"
              "cf0000018bcfe56800cf000001a3185c5000010203")
TOKEN_COMMAND = bytes.fromhex("91940aa46e6f6465079b01ac30613162326333643465356600" + TOKEN_REST)
TOKEN_ROW = bytes.fromhex("9b01ac30613162326333643465356607" + TOKEN_REST)


def test_tokens_are_stored_as_level_3_wrote_them() -> None:
    """A shape that was released never changes."""
    command = d.PutToken("node", 7, TOKEN)
    assert d.encode_command([command]) == TOKEN_COMMAND
    directory = d.Directory()
    (change,), rows, gone = directory.apply(7, TOKEN_COMMAND)
    assert (change.outcome, rows, gone) == (d.OK, [(b"\x01t0a1b2c3d4e5f", TOKEN_ROW)], [])
    again = d.Directory()
    again.load(iter(rows))
    assert again.tokens == directory.tokens == {TOKEN.token_id: msgspec.structs.replace(TOKEN, revision=7)}


def test_tokens_are_made_once_and_ended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No id is taken twice; what is gone is gone; there are only so many. Whoever keeps what tokens allow sees each change."""
    directory = d.Directory()
    assert apply(directory, 1, d.PutToken("node", 7, TOKEN), d.PutToken("node", 7, TOKEN)) == [d.OK, d.EXISTS]
    revision = directory.tokens_revision
    drop = d.DropToken("node", 7, TOKEN.token_id)
    (change, none), rows, gone = directory.apply(2, d.encode_command([drop, drop]))
    assert (change.outcome, none.outcome, rows, gone) == (d.OK, d.MISSING, [], [b"\x01t0a1b2c3d4e5f"]) and not directory.tokens
    assert directory.tokens_revision > revision
    monkeypatch.setattr(d, "TOKENS_MAX", 1)
    other = msgspec.structs.replace(TOKEN, token_id="x")
    assert apply(directory, 3, d.PutToken("node", 7, TOKEN), d.PutToken("node", 7, other)) == [d.OK, d.FULL]


@pytest.mark.parametrize("fields", [{"digest": bytes(31)}, {"digest": b""}, {"token_id": ""}, {"scopes": (Scope(3),)},
                                    {"scopes": (Scope(0, ""),)}, {"expires_ms": -1}])
def test_what_is_no_token_is_refused(fields: dict[str, Any]) -> None:
    """Nobody wrote it."""
    with pytest.raises(CorruptEntry):
        d.Directory().apply(1, d.encode_command([d.PutToken("node", 7, msgspec.structs.replace(TOKEN, **fields))]))
