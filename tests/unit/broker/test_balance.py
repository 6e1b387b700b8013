"""Who may join and leave, and what is said to those who may not."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import pytest
from node_world import Refused, World
from several_nodes import PeersContext, finish
from spillway.broker.core import directory as d
from spillway.broker.core import features
from spillway.broker.errors import NotFound, RequestError, Unavailable
from spillway.broker.runtime import balance as balance_module
from spillway.broker.runtime.balance import ASK_SECONDS, MOVES_MAX, Balance, check_addresses, check_departure, check_newcomer
from spillway.broker.services.cluster import ClusterService
from spillway.broker.services.member import MemberService
from spillway.cluster.placement import place
from spillway.cluster.raft.configuration import Change, ChangeKind, Configuration
from spillway.peer.v1.member_service_pb2 import ClusterMember, JoinRequest, JoinResponse
from spillway.peer.v1.member_service_pb2_grpc import MemberServiceServicer, add_MemberServiceServicer_to_server
from spillway.v1 import cluster_service_pb2 as pb


def known(incarnation: str = "i", leaving: int = d.STAYS) -> d.Member:
    return d.Member("n4", 1, "p:1", "c:1", incarnation=incarnation, leaving=leaving)


@pytest.mark.parametrize(("formed", "inside", "member", "running", "refused"), [
    (False, False, None, None, None),  # a new one
    (True, False, None, None, "the data of a cluster, and is no node of this one"),
    (False, True, None, None, "the data of a cluster, and is no node of this one"),  # it was removed meanwhile
    (True, False, known(), "i", None),  # it says what is new
    (False, False, known(), None, None),
    (False, False, known("old"), None, None),  # it lost its disk
    (False, True, known("old"), "i", None),  # it lost its disk, and has recovered
    (True, False, known(""), None, None),  # a founder that had not said
    (True, False, known("old"), None, "has other data"),
    (False, False, known("old"), "old", "running already"),  # two with one id
    (False, True, known("old"), "old", "running already"),
    (False, False, known(leaving=d.GONE), None, "being removed"),
    (False, True, known(leaving=d.GONE), None, None),  # it only says what is new about it
    (True, False, known(leaving=d.DRAINS), None, None)])
def test_who_may_join(formed: bool, inside: bool, member: d.Member | None, running: str | None, refused: str | None) -> None:
    """A new node with an empty directory, and those that are known with their own; a node of the cluster whatever became of its disk,
    as the others have let it in."""
    new = ClusterMember(node_id="n4", incarnation="i")
    if refused is None:
        check_newcomer(new, formed, inside, member, running)
        return
    with pytest.raises(RequestError, match=refused) as caught:
        check_newcomer(new, formed, inside, member, running)
    assert caught.value.field == "node_id"


@pytest.mark.parametrize(("staying", "dead", "replicas", "refused"), [
    ("abcd", "", 3, None), ("ab", "", 1, None),
    ("abc", "", 3, "there are 2 nodes, and shards have 3 replicas; let another node join first"),
    ("ab", "", 3, "there are 1 nodes, and shards have 2 replicas"),
    ("a", "", 3, "the last one"), ("a", "", 1, "the last one"),
    ("abcd", "a", 3, None),  # it is dead itself, and there are enough others
    ("abcd", "d", 3, "without node 'a' there are 2 nodes that answer, and shards have 3 replicas; start d, or let another node join first"),
    ("abcd", "cd", 3, "there are 1 nodes that answer, and shards have 3 replicas; start c, d, or let another"),
    ("abcd", "ad", 3, "there are 2 nodes that answer"), ("abcde", "ad", 3, None), ("ab", "b", 1, "there are 0 nodes that answer")])
def test_who_may_leave(staying: str, dead: str, replicas: int, refused: str | None) -> None:
    """Nobody without whom there were fewer nodes than replicas: its replicas would wait for ever for those that do not answer."""
    there = set(staying) - set(dead)
    if refused is None:
        check_departure("a", list(staying), there, replicas)
        return
    with pytest.raises(RequestError, match=refused):
        check_departure("a", list(staying), there, replicas)


@pytest.mark.parametrize(("peer", "client", "refused"), [
    ("p:2", "c:2", None), ("p:1", "c:2", "peer_address: is p:1, and so is that of node 'n1': choose another one, or remove that"),
    ("p:2", "c:1", "client_address: is c:1")])
def test_two_nodes_are_not_at_one_address(peer: str, client: str, refused: str | None) -> None:
    """The others would take one for the other. A node may stay where it is, or was."""
    members = [d.Member("n1", 1, "p:1", "c:1"), known()]
    members[1] = msgspec.structs.replace(members[1], peer_address="p:4")
    new = ClusterMember(node_id="n4", peer_address=peer, client_address=client)
    if refused is None:
        check_addresses(new, members)
    else:
        with pytest.raises(RequestError, match=refused):
            check_addresses(new, members)


def test_nobody_joins_whom_it_cannot_reach() -> None:
    """A cluster of one that listens anywhere may not have said where that is; it can say so yet."""
    new = ClusterMember(node_id="n4", peer_address="p:4", client_address="c:4")
    with pytest.raises(Unavailable, match=r"'n1' says that it is at 0\.0\.0\.0:7071, where no other node reaches it"):
        check_addresses(new, [d.Member("n1", 1, "0.0.0.0:7071", "c:1")])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    world.node.meta.directory.level = features.MEMBERS
    yield world
    world.store.close()


@pytest.mark.parametrize(("said", "leaving", "shards", "answered"), [
    ({}, d.STAYS, 2, True), ({}, d.DRAINS, 2, True), ({}, d.GONE, 2, False), ({}, d.STAYS, 3, False),
    ({"node_id": "n5"}, d.STAYS, 2, False), ({"incarnation": "other"}, d.STAYS, 2, False), ({"peer_address": "p:2"}, d.STAYS, 2, False)])
async def test_who_is_a_member_already_needs_no_leader(world: World, said: dict[str, str], leaving: int, shards: int,
                                                       answered: bool) -> None:
    """A node that was killed right after it had joined asks again. It may be the very voter without whom the meta group has no leader:
    any node tells it who the others are. Whatever is new about it needs the leader."""
    async def await_meta_leader() -> str:
        raise Unavailable("there is no leader")

    world.node.meta.directory.members.update(n1=d.Member("n1", 1, "p:1", "c:1"), n4=known(leaving=leaving))
    forwarder: Any = SimpleNamespace(await_meta_leader=await_meta_leader)
    member = ClusterMember(**{"node_id": "n4", "peer_address": "p:1", "client_address": "c:1", "incarnation": "i", **said})
    request = JoinRequest(cluster="spillway", member=member, shard_count=shards, replica_count=1)
    joining = MemberService(world.node, forwarder).Join(request, PeersContext())
    if answered:
        assert [m.node_id for m in (await joining).members] == ["n1", "n4"]
    else:
        with pytest.raises(Refused, match="UNAVAILABLE: there is no leader"):
            await joining


@pytest.mark.parametrize(("said", "refused"), [
    ({"peer_address": "0.0.0.0:7071"}, "peer_address: is 0.0.0.0:7071, where no other node reaches it; start it with --advertise"),
    ({"client_address": "[::]:7070"}, "client_address: is"), ({"client_address": "c:0"}, "client_address: is c:0")])
async def test_a_node_that_is_nowhere_does_not_join(world: World, said: dict[str, str], refused: str) -> None:
    """Others would look for it on their own machines."""
    member = ClusterMember(**{"node_id": "n4", "peer_address": "p:1", "client_address": "c:1", **said})
    with pytest.raises(Refused, match=f"INVALID_ARGUMENT: {refused}"):
        await MemberService(world.node, world.forwarder).Join(JoinRequest(cluster="spillway", member=member), PeersContext())


async def test_what_a_node_says_is_newer_than_what_the_operator_said_of_it(tmp_path: Path) -> None:
    """The addresses in --peers win over those in the log when a node starts, as they may all have changed. A node that says another one
    since, as it was removed and has joined at another machine, is there."""
    world = World(tmp_path, peers=["n1=p:1/c:1", "n2=named:2/c:2"])
    statuses: dict[int, Any] = {}
    world.host.status_of = statuses.get  # type: ignore[attr-defined]
    node, told = world.node, []
    node.balance.joined = told.append
    node.meta.directory.members.update(n1=d.Member("n1", 5, "p:1", "c:1"), n2=d.Member("n2", 5, "said:2", "c:2"))

    def follow() -> None:
        node.meta.directory.nodes_revision += 1
        node.balance.follow()

    follow()
    statuses[0] = SimpleNamespace(log_last_index=9)
    node.meta.directory.members["n2"] = d.Member("n2", 9, "logged:2", "c:2")  # of an entry from before it was started
    follow()
    assert told == [] and node.members["n2"].peer_address == "named:2"
    node.meta.directory.members["n2"] = d.Member("n2", 10, "new:2", "c:2")
    follow()
    assert told == [{"n2": "new:2"}] and node.members["n2"].peer_address == "new:2"
    world.store.close()


class Elsewhere(MemberServiceServicer):
    """A node that is asked."""

    def __init__(self, answer: JoinResponse | tuple[grpc.StatusCode, str]) -> None:
        self.answer = answer
        self.asked: list[JoinRequest] = []

    async def Join(self, request: JoinRequest, context: Any) -> JoinResponse:  # type: ignore[override]
        self.asked.append(request)
        if isinstance(self.answer, tuple):
            await context.abort(*self.answer)
        assert isinstance(self.answer, JoinResponse)
        return self.answer


@pytest.mark.parametrize("answer", [
    JoinResponse(members=[ClusterMember(node_id="n1", peer_address="p:1"), ClusterMember(node_id="n2", peer_address="moved:2"),
                          ClusterMember(node_id="n5", peer_address="p:5")]),
    (grpc.StatusCode.NOT_FOUND, "node_id: none of this one"), (grpc.StatusCode.INVALID_ARGUMENT, "cluster_id: another one"),
    (grpc.StatusCode.UNAVAILABLE, "no leader")])
async def test_who_cannot_reach_the_leader_asks_others(tmp_path: Path, answer: JoinResponse | tuple[grpc.StatusCode, str]) -> None:
    """They say where the nodes are, or that this one is none any more, and then it ends; nothing else ends it. Once there is a leader,
    what the meta group says counts again."""
    server = grpc.aio.server()
    there = Elsewhere(answer)
    add_MemberServiceServicer_to_server(there, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    world = World(tmp_path, join=["127.0.0.1:1", f"127.0.0.1:{port}"])
    node = world.node
    node.features = features.known()
    world.host.present = set()  # type: ignore[attr-defined]
    world.host.hello = lambda: SimpleNamespace(incarnation="i")  # type: ignore[attr-defined]
    world.host.cluster_id = "x"
    ended: list[bool] = []
    told: list[dict[str, str]] = []
    node.on_removed = lambda: ended.append(True)
    node.balance.joined = told.append
    node.meta.directory.members.update(n1=d.Member("n1", 1, "p:1", "c:1"), n2=d.Member("n2", 1, "127.0.0.1:1", "c:2"))
    node.meta.revision += 1
    node.balance.follow()
    told.clear()
    await node.balance._introduce(world.forwarder)
    await server.stop(None)
    request, = there.asked
    assert (request.inside, request.cluster_id, request.member.node_id) == (True, "x", "n1")
    if isinstance(answer, JoinResponse):
        assert told == [{"n2": "moved:2", "n5": "p:5"}] and not ended
        node.meta.directory.members["n1"] = d.Member("n1", 1, node.own.peer_address, node.own.client_address, incarnation="i",
                                                     feature_min=node.features.low, feature_max=node.features.high)
        world.host.leader, world.host.present = "n2", {"n2"}  # type: ignore[attr-defined]
        await node.balance._introduce(world.forwarder)
        assert told[1:] == [{"n2": "127.0.0.1:1"}]
    else:
        assert told == [] and ended == [True] * (answer[0] is grpc.StatusCode.NOT_FOUND)
    world.store.close()


async def test_nobody_leaves_a_cluster_that_is_only_forming(world: World) -> None:
    """The nodes have not said yet who they are: that is no reason to say that there is none of that name."""
    with pytest.raises(Unavailable, match="only forming; try again"):
        await world.node.balance.leave("n1", d.DRAINS)
    world.node.meta.directory.members.update(n1=d.Member("n1", 1, "p:1", "c:1"))
    world.node.meta.leading = True
    with pytest.raises(NotFound, match="there is no node 'n2'; there are n1"):
        await finish(world, world.node.balance.leave("n2", d.DRAINS))


async def test_who_watches_hears_of_leaders_of_shards_that_are_elsewhere(world: World) -> None:
    """A node without a replica of a shard, as one that was drained, tells its watchers when the shard's leader changes: clients would
    never ask the new one."""
    watching = asyncio.create_task(world.node.wait_topology(world.node.revision))
    await asyncio.sleep(0)
    for watcher in world.host.watchers:
        watcher(2, "n3", 5)
    await asyncio.wait_for(watching, 10)


async def test_a_destination_more_wakes_nobody_who_watches_the_nodes(world: World) -> None:
    """Hundreds of clients would each get the whole topology built for nothing."""
    node = world.node
    node.balance.follow()
    revision = node.revision
    world.know("orders")
    node.balance.follow()
    assert node.revision == revision
    node.meta.directory.members["n1"] = known()
    node.meta.directory.nodes_revision += 1
    node.balance.follow()
    assert node.revision > revision


async def test_the_topology_is_built_once_for_all_who_watch(world: World) -> None:
    """And is another object only if it is another one."""
    service = ClusterService(world.node, world.forwarder)
    first = service.topology()
    assert service.topology() is first and [s.shard for s in first.shards] == [1, 2]
    world.node.topology_changed()
    assert service.topology() is first
    world.host.lead(1)
    assert service.topology() is not first and service.topology().shards[0].leader == "n1"


class Host:
    """As RaftHost: each group has a leader, n1, and members."""

    def __init__(self, present: str, groups: dict[int, tuple[str, str]]) -> None:
        self.present = {f"n{n}" for n in present}
        self.groups = {number: Configuration(*(tuple(f"n{n}" for n in names) for names in members)) for number, members in groups.items()}
        self.changes: list[tuple[int, str, str]] = []
        self.asked: list[str] = []
        self.able: set[str] = set()

    def status_of(self, group: int) -> Any:
        """As RaftHost."""
        return SimpleNamespace(configuration=self.groups[group], configuration_index=1, commit_index=1) if group in self.groups else None

    def propose_change(self, group: int, change: Change, done: Any) -> None:
        """As RaftHost."""
        self.changes.append((group, change.kind.value, change.node_id))

    def transfer(self, group: int, to: str) -> bool:
        """As RaftHost."""
        self.asked.append(to)
        return to in self.able


def balance(host: Host, homes: dict[int, str], members: dict[str, int], replicas: int = 3) -> Balance:
    """Of node n1, which leads all groups; nodes in `homes` are named by their digit."""
    directory = d.Directory()
    directory.level = features.MEMBERS
    directory.identity = d.Identity("0123456789abcdef", 1)
    directory.members = {n: d.Member(n, 1, "p:1", "c:1", leaving=leaving) for n, leaving in members.items()}
    directory.homes = {shard: d.Home(shard, 1, tuple(f"n{n}" for n in nodes)) for shard, nodes in homes.items()}
    node: Any = SimpleNamespace(
        config=SimpleNamespace(node_id="n1", peers=[], shards=len(homes), replicas=replicas, replace_after_seconds=10), members={},
        host=host, meta=SimpleNamespace(directory=directory, leading=0 in host.groups), feature=lambda level: directory.level >= level,
        shards={number: SimpleNamespace(leading=True) for number in host.groups if number}, stopping=False,
        clock=SimpleNamespace(monotonic=lambda: 0.0))
    return Balance(node)


ALL = dict.fromkeys(["n1", "n2", "n3", "n4"], d.STAYS)


def test_learners_that_are_dead_do_not_hold_up_others() -> None:
    """They may never catch up. Those that do are few at a time."""
    moving = dict.fromkeys(range(1, MOVES_MAX + 1), ("123", "5"))
    host = Host("234", {**moving, 8: ("123", "")})
    balance(host, {**dict.fromkeys(moving, "125"), 8: "124"}, ALL)._lead_groups(0.0)
    assert host.changes == [(8, "add-learner", "n4")]
    host.present.add("n5")
    host.changes.clear()
    balance(host, {**dict.fromkeys(moving, "125"), 8: "124"}, ALL)._lead_groups(0.0)
    assert host.changes == [(number, "promote", "n5") for number in moving]


def test_a_leader_that_leaves_hands_over_to_whoever_can_take_over() -> None:
    """The first one may be recovering, or far behind, for long."""
    host = Host("234", {1: ("1234", "")})
    host.able = {"n3"}
    balance(host, {1: "234"}, ALL)._lead_groups(0.0)
    assert host.asked == ["n2", "n3"]


def test_a_node_that_was_let_go_does_not_come_into_the_meta_group_again() -> None:
    """A new leader of it does not know whom the one before has freed."""
    host = Host("234", {0: ("12", "3")})
    members = {"n1": d.STAYS, "n2": d.GONE, "n3": d.STAYS, "n4": d.GONE, "n5": d.STAYS}
    assert sorted(balance(host, {1: "123"}, members)._meta_wanted(host.groups[0], 0.0)) == ["n1", "n2", "n3", "n5"]


@pytest.mark.parametrize(("dead", "leaving", "steps_back"), [("4", "", "n4"), ("", "5", "n5"), ("4", "5", "n4"), ("", "", None)])
def test_who_is_dead_or_drained_votes_in_the_meta_group_no_longer_than_need_be(dead: str, leaving: str, steps_back: str | None) -> None:
    """With more nodes than voters there are others, which have all that it takes. It stays a member: removed, it would end."""
    names = "12345678"
    host = Host("".join(set(names) - {"1", dead}), {0: ("1234567", "8")})
    of = balance(host, {1: "123"}, {f"n{n}": d.DRAINS if n == leaving else d.STAYS for n in names})
    of._seen.update({f"n{n}": 0.0 if n == dead else 20.0 for n in names})
    of._lead_groups(20.0)
    assert host.changes == ([] if steps_back is None else [(0, "demote", steps_back)])
    host.changes.clear()
    if steps_back is not None:
        host.groups[0] = host.groups[0].after(Change(ChangeKind.DEMOTE, steps_back))
        of._lead_groups(20.0)
        assert host.changes == [(0, "promote", "n8")]
        host.groups[0] = host.groups[0].after(Change(ChangeKind.PROMOTE, "n8"))
        host.changes.clear()
        of._seen[steps_back] = 20.0
        of._lead_groups(20.0)
        assert host.changes == [], "one that is back goes on as it is"


async def test_where_shards_belong_is_found_when_something_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 0.1 s of the loop with many shards: not in each step."""
    found: list[list[str]] = []

    def count(sites: Any, *rest: Any) -> Any:
        found.append([site.node_id for site in sites])
        return place(sites, *rest)
    monkeypatch.setattr(balance_module, "place", count)
    homes = {shard: "".join(n[1] for n in nodes) for shard, nodes in place(sorted(ALL), 4, 3).items()}
    of = balance(Host("234", {0: ("1234", "")}), homes, ALL)
    directory = of._node.meta.directory
    settled: list[set[int]] = []

    async def settle(changed: Any) -> bool:
        settled.append(set(changed))
        directory.homes.update({shard: d.Home(shard, 1, tuple(nodes)) for shard, nodes in changed.items()})
        directory.nodes_revision += 1
        return True
    of._node.meta.settle = settle  # type: ignore[method-assign, assignment]
    for _ in range(3):
        await of._settle(0.0)
    assert found == [sorted(ALL)] and settled == []
    of._seen.update(dict.fromkeys(["n1", "n2", "n3"], 10.0))
    for _ in range(3):
        await of._settle(10.0)
    assert found[1:] == [["n1", "n2", "n3"]] * 2, "n4 is away for too long; what follows from it holds"
    assert settled == [{shard for shard, nodes in homes.items() if "4" in nodes}]


def asking(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> tuple[Balance, list[str], Any]:
    """A node whose steps are counted and take no time, with parts that ask; what happened; and a forwarder."""
    happened: list[str] = []
    of = balance(Host("", {0: ("1", "")}), {1: "1"}, {"n1": d.STAYS})
    times = iter(range(0, 1 << 30, int(ASK_SECONDS)))
    of._node.clock = SimpleNamespace(monotonic=lambda: float(next(times)))  # type: ignore[assignment]

    async def step() -> None:
        happened.append("step")
    of.step = step  # type: ignore[method-assign]
    monkeypatch.setattr(balance_module, "STEP_SECONDS", 0)
    for name in ("introduce", "end_replicas", "let_go"):
        async def part(forwarder: Any, name: str = name) -> None:
            happened.append(name)
            if name in parts:
                await parts[name]()
        monkeypatch.setattr(of, f"_{name}", part)
    return of, happened, None


async def test_a_silent_peer_holds_up_neither_groups_nor_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks others goes on beside the steps, once at a time, and ends with the node."""
    silent = asyncio.Event()
    cancelled: list[bool] = []

    async def wait() -> None:
        try:
            await silent.wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
    of, happened, forwarder = asking(monkeypatch, end_replicas=wait)
    running = asyncio.create_task(of.run(forwarder))
    while happened.count("step") < 20:
        await asyncio.sleep(0)
    assert [what for what in happened if what != "step"] == ["introduce", "end_replicas"]
    silent.set()
    while happened.count("introduce") < 3:
        await asyncio.sleep(0)
    silent.clear()
    while happened[-1] != "step" or happened.count("end_replicas") == happened.count("let_go"):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.sleep(0)
    assert cancelled == [True]


async def test_what_is_refused_disables_nothing_else(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once to people who can do something about it; who only does not answer now is no news."""
    why: Exception = RequestError("node_id", "choose another")

    async def refuse() -> None:
        raise why
    of, happened, forwarder = asking(monkeypatch, introduce=refuse)
    for _ in range(3):
        await of.ask(forwarder)
    assert happened == ["introduce", "end_replicas", "let_go"] * 3
    for code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE):
        why = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="said elsewhere")
        await of.ask(forwarder)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "cannot say who this node is: node_id: choose another", "cannot say who this node is: INVALID_ARGUMENT: said elsewhere"]


async def test_a_bug_where_others_are_asked_ends_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere: the loop ends with it."""
    async def fail() -> None:
        raise KeyError("a bug")
    of, _, forwarder = asking(monkeypatch, let_go=fail)
    with pytest.raises(KeyError):
        await of.run(forwarder)


async def test_a_leader_that_does_not_answer_hides_no_other() -> None:
    """A replica here that is no member ends as soon as its own leader says so."""
    dropped: list[int] = []
    host = Host("23", {})
    of = balance(host, {1: "234", 2: "234"}, ALL)
    node: Any = of._node
    node.members = ALL
    node.shards = {1: SimpleNamespace(leading=False), 2: SimpleNamespace(leading=False)}
    node.host = SimpleNamespace(leader_of=lambda n: (f"n{n + 1}", 1), drop_group=lambda group, *_: dropped.append(group),
                                in_touch=lambda node_id: False)

    def link(leader: str) -> Any:
        async def status(request: Any, timeout: float, wait_for_ready: bool) -> pb.GetNodeStatusResponse:
            if leader == "n2":
                raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata(), grpc.aio.Metadata())
            return pb.GetNodeStatusResponse(groups=[pb.GroupStatus(group=2, role="leader", voters=["n2", "n3", "n4"])])
        return SimpleNamespace(cluster=SimpleNamespace(GetNodeStatus=status))
    await of._end_replicas(SimpleNamespace(link=link))  # type: ignore[arg-type]
    assert dropped == [2]
    with pytest.raises(Unavailable, match="shard 1 has no leader"):
        node.leader_of = lambda n: f"n{n + 1}"
        await of._members_of_shards(SimpleNamespace(link=link))  # type: ignore[arg-type]


async def test_a_drain_is_judged_by_who_is_there() -> None:
    """Not by who is only called a member: n4 is away for so long that it is replaced."""
    of = balance(Host("23", {0: ("1234", "")}), {1: "123"}, ALL)
    of._seen.update(n1=20.0, n2=20.0, n3=20.0, n4=0.0)
    of._node.clock = SimpleNamespace(monotonic=lambda: 20.0)  # type: ignore[assignment]
    put: list[tuple[str, int, int]] = []
    members = of._node.meta.directory.members

    async def put_member(member: d.Member, etag: int, **rest: Any) -> None:
        put.append((member.node_id, member.leaving, etag))

    async def barrier() -> None:  # an earlier leader had changed it
        members["n4"] = msgspec.structs.replace(members["n4"], revision=9)
    of._node.meta.put_member, of._node.meta.barrier = put_member, barrier  # type: ignore[method-assign, assignment]
    with pytest.raises(RequestError, match="start n4, or let another node join first"):
        await of.leave("n3", d.DRAINS)
    await of.leave("n4", d.GONE)
    assert put == [("n4", d.GONE, 9)]


@pytest.mark.parametrize("why", ["joins", "recovers"])
async def test_a_node_that_does_not_know_the_others_yet_names_no_nodes(world: World, why: str) -> None:
    """Its meta replica has not caught up: who believed that it is alone would forget all others. Those who watch hear when it knows."""
    service = ClusterService(world.node, world.forwarder)
    world.node.balance.follow()
    assert service.topology().shard_count == 2
    if why == "recovers":
        world.host.recovering = True
    else:
        world.node.config = msgspec.structs.replace(world.node.config, join=["127.0.0.1:7071"])
    world.node.balance.follow()
    assert (service.topology().cluster, service.topology().shard_count, len(service.topology().nodes)) == ("spillway", 0, 0)
    watching = asyncio.create_task(world.node.wait_topology(world.node.revision))
    await asyncio.sleep(0)
    world.node.meta.directory.members.update(n1=d.Member("n1", 1, "p:1", "c:1"))
    world.node.meta.leading = True
    world.node.balance.follow()
    await asyncio.wait_for(watching, 10)
    assert service.topology().shard_count == 2
