"""Who the nodes are, where shards belong, and getting them there.

The meta group says both (`core.directory`); every node reads it. Its leader decides where shards belong, whenever nodes come, leave,
or stay away for too long, by `cluster.placement`. Each shard's leader brings its own group there, step by step (`cluster.steps`):
there is no plan that could be lost with somebody, and whoever leads next goes on. A node makes the replicas that belong to it, and
ends those of which a leader says that they are of no group any more.
"""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import grpc
import msgspec
from spillway.broker.config import Peer, is_nowhere, members_of
from spillway.broker.core import directory as d
from spillway.broker.core import features
from spillway.broker.errors import BrokerError, NotFound, RequestError, Unavailable
from spillway.cluster.errors import ChangeRefused
from spillway.cluster.placement import Site, place
from spillway.cluster.raft.configuration import ChangeKind, Configuration
from spillway.cluster.steps import HandOver, next_step
from spillway.contract.version import VERSION
from spillway.peer.v1.member_service_pb2 import ClusterMember, JoinRequest, JoinResponse
from spillway.v1.cluster_service_pb2 import GetNodeStatusRequest, GetNodeStatusResponse, GroupStatus

if TYPE_CHECKING:
    from spillway.broker.runtime.forward import Forwarder
    from spillway.broker.runtime.node import Node

log = logging.getLogger(__name__)

STEP_SECONDS = 0.25
ASK_SECONDS = 2.0  # between questions about what other nodes have
CALL_SECONDS = 2.0  # a node that does not answer in that time is not reachable
HAND_OVER_SECONDS = 0.5  # between two: each makes a shard wait for a moment
MOVES_MAX = 1  # groups led by one node that take in a new replica at a time: each may be a copy of a whole shard, and costs its traffic
CALLS_AROUND_MAX = 3  # at once, to look for the cluster
CALL_AROUND_SECONDS = 1.0  # the balance waits for them
META_GROUP = 0
FORMING = "the cluster is only forming; try again"


class Balance:
    """Of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._revision = -1  # of the nodes that are followed
        self._informed = False
        self._named = members_of(node.config) if node.config.peers else {}  # where nodes are, as the operator says
        self._logged: int | None = None  # last entry of the meta group's log when this node started
        self._called_around = 0  # addresses of others that were called for want of the meta group's leader
        self._told_around = False  # the transport has addresses that others told, not those of the directory
        self._seen: dict[str, float] = {}  # when another node was connected last
        self._asked_at = -1e9
        self._handed_at = -1e9
        self._changing = asyncio.Lock()  # of one change of the nodes at a time: each is judged by what the one before has made
        self._freed: set[str] = set()  # nodes that leave, and that no shard's group has as a member any more
        self._placed: tuple[int, frozenset[str]] | None = None  # with this revision of the nodes, and these there, all is where it belongs
        self._warned: dict[str, str] = {}  # part of the work -> why it was refused last
        self.joined: Callable[[dict[str, str]], None] = lambda peers: None
        """Told the other nodes' addresses when they change; for the transport."""

    # -- what is wanted ------------------------------------------------------------------------------------------

    def homes(self) -> dict[int, list[str]]:
        """Where shards belong: shard -> node ids, the preferred leader first."""
        homes = self._node.meta.directory.homes
        if not homes:
            return self._node.founded
        return {shard: list(home.nodes) for shard, home in homes.items()}

    def follow(self) -> None:
        """Takes note of who the nodes are, when that may have changed."""
        node = self._node
        if self._informed != node.knows_members:
            self._informed = node.knows_members
            node.topology_changed()
        if self._logged is None and self._named and (meta := node.host.status_of(META_GROUP)) is not None:
            self._logged = meta.log_last_index
        if self._revision == node.meta.directory.nodes_revision:
            return  # whoever watches the topology is not woken by what else the meta group says, as by each new destination
        self._revision = node.meta.directory.nodes_revision
        known = node.meta.directory.members
        if (cluster_id := node.meta.directory.cluster_id) and cluster_id != node.host.cluster_id:
            node.host.keep_cluster(cluster_id)
        if not known:
            return
        members = {m.node_id: self._where(m) for m in known.values()}
        if members != node.members:
            came, left = members.keys() - node.members.keys(), node.members.keys() - members.keys()
            if came or left:
                log.info("the nodes are %s%s%s", ", ".join(sorted(members)), f"; new: {', '.join(sorted(came))}" if came else "",
                         f"; gone: {', '.join(sorted(left))}" if left else "")
            node.members = members
            self.joined(self._others())
            node.members_changed()
        node.topology_changed()

    def _where(self, member: d.Member) -> Peer:
        """Where a node is: as the operator has said to this one, until that one has said something since this one was started."""
        named = self._named.get(member.node_id)
        if named is not None and (self._logged is None or member.revision <= self._logged):
            return named
        return Peer(member.node_id, member.peer_address, member.client_address)

    def _others(self) -> dict[str, str]:
        """Node ids and peer addresses of all other nodes."""
        node = self._node
        return {peer.node_id: peer.peer_address for peer in node.members.values() if peer.node_id != node.config.node_id}

    def leaving(self, node_id: str) -> bool:
        """Whether a node is to have no replicas."""
        member = self._node.meta.directory.members.get(node_id)
        return member is not None and member.leaving != d.STAYS

    # -- the loop ------------------------------------------------------------------------------------------------

    async def run(self, forwarder: Forwarder) -> None:
        """Steps, again and again. What needs the answers of other nodes is asked beside them, once at a time: a silent peer must not
        hold up those groups that have nothing to do with it."""
        asking: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.sleep(STEP_SECONDS)
                await self.step()
                if asking is not None and asking.done():
                    asking.result()  # what is a bug ends the node
                    asking = None
                now = self._node.clock.monotonic()
                if asking is None and now - self._asked_at >= ASK_SECONDS and not self._node.stopping:
                    self._asked_at = now
                    asking = asyncio.get_running_loop().create_task(self.ask(forwarder))
        finally:
            if asking is not None:
                asking.cancel()

    async def step(self) -> None:
        """Everything that may be done now, without asking other nodes."""
        node = self._node
        now = node.clock.monotonic()
        for peer in (*node.host.present, node.config.node_id):
            self._seen[peer] = now
        self.follow()
        if node.stopping:
            return
        self._make_replicas()
        self._lead_groups(now)
        if node.meta.leading:
            await self._part("raise the feature level", self._raise_level())
            await self._part("say where shards belong", self._settle(now))
        else:
            self._freed = set()  # another one: what is still being asked for does not count when this node leads again

    async def ask(self, forwarder: Forwarder) -> None:
        """Everything that needs the answers of other nodes."""
        node = self._node
        await self._part("say who this node is", self._introduce(forwarder))
        await self._part("end replicas", self._end_replicas(forwarder))
        if node.meta.leading and node.feature(features.MEMBERS):
            await self._part("let nodes go", self._let_go(forwarder))

    async def _part(self, what: str, work: Awaitable[None]) -> None:
        """Does a part, on which no other one depends. What is refused goes on being refused: it is said to people, once."""
        try:
            await work
        except (BrokerError, grpc.aio.AioRpcError) as error:
            why = str(error)
            if isinstance(error, grpc.aio.AioRpcError):
                why = f"{error.code().name}: {error.details()}"
            refused = isinstance(error, RequestError) or (
                isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.INVALID_ARGUMENT)
            log.log(logging.WARNING if refused and self._warned.get(what) != why else logging.DEBUG, "cannot %s: %s", what, why)
            if refused:
                self._warned[what] = why

    def _make_replicas(self) -> None:
        node = self._node
        for shard, nodes in self.homes().items():
            if node.config.node_id in nodes and shard not in node.shards and shard not in node.host.ended():
                log.info("shard %d: this node takes a replica", shard)
                node.add_replica(shard, [])

    def _in_touch(self, node_id: str) -> bool:
        return node_id == self._node.config.node_id or node_id in self._node.host.present

    def _lead_groups(self, now: float) -> None:
        """One step for each group that this node leads."""
        node = self._node
        own = node.config.node_id
        wanted = self.homes()
        led = [number for number, runtime in node.shards.items() if runtime.leading]
        if node.meta.leading:
            led.append(META_GROUP)
        statuses = {number: status for number in led if (status := node.host.status_of(number)) is not None}
        # One that does not answer copies nothing, and may never: nobody waits for it.
        moves = sum(any(map(self._in_touch, status.configuration.learners)) for n, status in statuses.items() if n != META_GROUP)
        for number, status in statuses.items():
            if status.configuration_index > status.commit_index:
                continue
            nodes = self._meta_wanted(status.configuration, now) if number == META_GROUP else wanted.get(number, [])
            if not nodes:
                continue
            step = next_step(status.configuration, nodes, own, self._in_touch)
            if step is None:
                continue
            if isinstance(step, HandOver):
                if now - self._handed_at >= HAND_OVER_SECONDS and any(node.host.transfer(number, to) for to in step.to):
                    self._handed_at = now
                continue
            if step.kind is ChangeKind.ADD_LEARNER and number != META_GROUP:
                if moves >= MOVES_MAX:
                    continue
                moves += 1
            what = f"group {number}: {step.kind.value} {step.node_id}"

            def done(outcome: int | ChangeRefused, what: str = what) -> None:
                if isinstance(outcome, ChangeRefused):
                    log.debug("%s: %s", what, outcome)
                else:
                    log.info("%s", what)
            node.host.propose_change(number, step, done)

    def _meta_wanted(self, group: Configuration, now: float) -> list[str]:
        """Whoever is in the meta group goes on; all others come in. Voters first, so that they stay voters, but those that leave, and
        then those that are away for long, last: with more nodes than voters, others vote for them. This node leads, and stays so."""
        node = self._node
        members = node.meta.directory.members
        # Of those that are to be gone, one that is no member was let go already, maybe by another leader: it does not come again.
        stay = [n for n in members if members[n].leaving != d.GONE or (n in group and n not in self._freed)]
        rank = {n: 2 if self._away(n, now) else int(members[n].leaving != d.STAYS) for n in stay}
        own = node.config.node_id
        return sorted(stay, key=lambda n: (n != own, rank[n], n not in group.voters, n not in group.learners, n))

    # -- replicas here -------------------------------------------------------------------------------------------

    async def _end_replicas(self, forwarder: Forwarder) -> None:
        """Ends replicas that are members of no group any more and were not told, or never became one."""
        node = self._node
        own = node.config.node_id
        wanted = self.homes()
        doubtful = [n for n, r in node.shards.items() if own not in wanted.get(n, ()) and not r.leading]
        by_leader: dict[str, list[int]] = {}
        for number in doubtful:
            leader = node.host.leader_of(number)[0]
            if leader is not None and leader != own and leader in node.members:
                by_leader.setdefault(leader, []).append(number)
        leaders = sorted(by_leader)
        for leader, status in zip(leaders, await asyncio.gather(*(ask_status(node, forwarder, n) for n in leaders)), strict=True):
            for group in status.groups if status is not None else ():
                if group.group in by_leader[leader] and _tells_members(group) and own not in group.voters and own not in group.learners:
                    node.host.drop_group(group.group, group.configuration_index, group.commit_index)

    def introduction(self) -> ClusterMember:
        """This node, as it says itself."""
        node = self._node
        own = node.own
        return ClusterMember(node_id=own.node_id, peer_address=own.peer_address, client_address=own.client_address,
                             zone=node.config.zone, host=node.config.host, incarnation=node.host.hello().incarnation,
                             feature_min=node.features.low, feature_max=node.features.high)

    async def _introduce(self, forwarder: Forwarder) -> None:
        """Tells the meta group what is new about this node. Where its leader cannot be reached, it may be that others look for this node
        where it was once, or this one for them, or that it was removed: others that answer know."""
        node = self._node
        known = node.meta.directory.members.get(node.config.node_id)
        if known is None:
            return
        mine = self.introduction()
        request = JoinRequest(cluster=node.config.cluster, member=mine, inside=True, shard_count=node.config.shards,
                              replica_count=node.config.replicas, cluster_id=node.cluster_id)
        leader = node.host.leader_of(META_GROUP)[0]
        if leader is None or not self._in_touch(leader):
            await self._call_around(forwarder, request)
            return
        if self._told_around:
            self._told_around = False
            self.joined(self._others())
        if said_of(known) != mine:
            leader = forwarder.meta_leader()
            if leader == node.config.node_id:
                await self.join(request)
            else:
                await forwarder.link(leader).member.Join(request, timeout=CALL_SECONDS)

    async def _call_around(self, forwarder: Forwarder, request: JoinRequest) -> None:
        """Asks some of those that may be nodes of the cluster, the next ones each time."""
        node = self._node
        there = list(dict.fromkeys((*node.config.join, *self._others().values(), *(
            m.peer_address for m in node.meta.directory.members.values() if m.node_id != node.config.node_id))))
        some = [there[(self._called_around + n) % len(there)] for n in range(min(len(there), CALLS_AROUND_MAX))]
        self._called_around += len(some)
        calls = (forwarder.join_at(address, request, CALL_AROUND_SECONDS) for address in some)
        for address, answer in zip(some, await asyncio.gather(*calls), strict=True):
            if isinstance(answer, JoinResponse):
                told = {m.node_id: m.peer_address for m in answer.members if not self._in_touch(m.node_id)
                        and (m.node_id not in self._named or node.members.get(m.node_id) != self._named[m.node_id])}
                self._told_around = True
                self.joined({**self._others(), **told})
                return
            if answer.code() is grpc.StatusCode.NOT_FOUND:
                log.info("asked %s: %s", address, answer.details())
                node.removed_from_cluster()
                return
            log.log(logging.WARNING if answer.code() is grpc.StatusCode.INVALID_ARGUMENT else logging.DEBUG,
                    "the meta group's leader is not in reach; asked %s: %s", address, answer.details())

    def knows(self, request: JoinRequest) -> bool:
        """Whether a node that asks to join is one of the cluster already, and there is nothing new about it. The meta group may have no
        leader without it."""
        config = self._node.config
        known = self._node.meta.directory.members.get(request.member.node_id)
        return (known is not None and known.leaving != d.GONE and said_of(known) == request.member
                and request.cluster_id in ("", self._node.cluster_id)
                and (request.cluster, request.shard_count, request.replica_count) == (config.cluster, config.shards, config.replicas))

    # -- the meta group's leader ---------------------------------------------------------------------------------

    async def join(self, request: JoinRequest) -> None:
        """Makes a node one of the cluster, or notes what is new about one; on the meta group's leader. Raises RequestError, which says
        what to do, or Unavailable."""
        async with self._changing:
            await self._join(request)

    async def _join(self, request: JoinRequest) -> None:
        node = self._node
        config, new = node.config, request.member
        directory = node.meta.directory
        self.check_members_change()
        if not directory.members:
            raise Unavailable(FORMING)
        if request.cluster != config.cluster:
            raise RequestError("cluster", f"this is cluster {config.cluster!r}, not {request.cluster!r}; join the other one")
        if request.cluster_id not in ("", node.cluster_id):
            raise RequestError("cluster_id", f"is {request.cluster_id}, and this is another cluster {config.cluster!r}, {node.cluster_id}")
        if request.inside and new.node_id not in directory.members:
            await node.meta.barrier()  # who is told that it was removed ends: a leader that was deposed must not say so
        known = directory.members.get(new.node_id)
        for setting, theirs, ours in (("shards", request.shard_count, config.shards), ("replicas", request.replica_count, config.replicas)):
            if theirs != ours:
                raise RequestError(setting, f"is {theirs}, and {ours} in this cluster, for ever; start the node with --{setting} {ours}")
        if why := features.refusal(directory.level, features.said(new.feature_min, new.feature_max)):
            raise RequestError("feature_max", why)
        there = node.host.hello() if new.node_id == config.node_id else node.host.hello_of(new.node_id)
        check_newcomer(new, request.formed, request.inside, known, None if there is None else there.incarnation)
        if not request.inside:
            check_addresses(new, directory.members.values())
        if known is None or said_of(known) != new:
            leaving = d.STAYS if known is None else known.leaving
            await self._put_member(
                d.Member(new.node_id, 0, new.peer_address, new.client_address, new.zone, new.host, new.incarnation, leaving,
                         new.feature_min, new.feature_max), known)

    async def leave(self, node_id: str, leaving: int) -> None:
        """Says what is to become of a node: STAYS, DRAINS or GONE. On the meta group's leader. Raises NotFound, RequestError,
        Unavailable."""
        async with self._changing:
            await self._leave(node_id, leaving)

    async def _leave(self, node_id: str, leaving: int) -> None:
        node = self._node
        self.check_members_change()
        members = node.meta.directory.members
        if not members:
            raise Unavailable(FORMING)
        await node.meta.barrier()  # what a leader before this one changed counts, and this one may not have applied it yet
        members = node.meta.directory.members
        known = members.get(node_id)
        if known is None:
            raise NotFound("node_id", f"there is no node {node_id!r}; there are {', '.join(sorted(members))}")
        if leaving == known.leaving:
            return
        if known.leaving == d.GONE:
            raise RequestError("node_id", f"node {node_id!r} is being removed, and that cannot be undone; let it join again afterwards")
        if leaving != d.STAYS and known.leaving == d.STAYS:
            check_departure(node_id, [m.node_id for m in members.values() if m.leaving == d.STAYS],
                            {m.node_id for m in self._there(members, node.clock.monotonic())}, node.config.replicas)
        await self._put_member(msgspec.structs.replace(known, leaving=leaving), known)

    async def _put_member(self, member: d.Member, known: d.Member | None) -> None:
        node = self._node
        changed = self._elsewhere({**node.meta.directory.members, member.node_id: member}, node.clock.monotonic())
        await node.meta.put_member(member, create=known is None, replace=known is not None, etag=0 if known is None else known.revision,
                                   homes=changed)

    def _there(self, members: Mapping[str, d.Member], now: float) -> list[d.Member]:
        """Those that stay, and are not away for so long that they are replaced."""
        return [m for m in members.values() if m.leaving == d.STAYS and not self._away(m.node_id, now)]

    def _away(self, node_id: str, now: float) -> bool:
        return now - self._seen.setdefault(node_id, now) >= self._node.config.replace_after_seconds

    def _elsewhere(self, members: Mapping[str, d.Member], now: float) -> dict[int, list[str]]:
        """Where shards belong that belong elsewhere, with these nodes; shard -> node ids. 0.1 s with 1024 shards."""
        config = self._node.config
        stay = self._there(members, now)
        if len(stay) < config.replicas:
            stay = [m for m in members.values() if m.leaving == d.STAYS]
        if not stay:
            return {}
        homes = self.homes()
        placed = place([Site(m.node_id, m.zone, m.host) for m in stay], config.shards, min(config.replicas, len(stay)), homes)
        return {shard: nodes for shard, nodes in placed.items() if homes.get(shard) != nodes}

    async def _settle(self, now: float) -> None:
        """Says who the nodes are, first, and then where shards belong, when that is elsewhere."""
        node = self._node
        directory = node.meta.directory
        if not node.feature(features.MEMBERS):
            return
        if not directory.members:
            founders = [d.Member(p.node_id, 0, p.peer_address, p.client_address) for p in node.members.values()]
            await node.meta.settle(node.founded, first=founders, cluster_id=self._identity())
            return
        if not directory.cluster_id:  # it was founded by a version that made none
            await node.meta.settle({}, cluster_id=self._identity())
        given = directory.nodes_revision, frozenset(m.node_id for m in self._there(directory.members, now))
        if given == self._placed:
            return
        changed = self._elsewhere(directory.members, now)
        if changed:
            log.info("%d shards belong elsewhere now", len(changed))
            await node.meta.settle(changed)
        else:
            self._placed = given

    def _identity(self) -> str:
        """Of the cluster, for ever: a new one, unless this node has founded it alone, or restored it."""
        return self._node.cluster_id or f"{int(self._node.random() * (1 << 53)):016x}"

    def _levels(self) -> dict[str, features.Range | None]:
        """The levels at which the nodes can work, as they say; None: there is no connection. Those that are to go do not count."""
        node = self._node
        members = node.meta.directory.members
        found: dict[str, features.Range | None] = {}
        for node_id in [m.node_id for m in members.values() if m.leaving != d.GONE] or node.members:
            hello = node.host.hello_of(node_id)
            found[node_id] = None if hello is None else features.said(hello.feature_min, hello.feature_max)
        found[node.config.node_id] = node.features
        return found

    async def _raise_level(self) -> None:
        """Takes the cluster to the highest feature level at which all nodes can work. What a node said before does not count: it may
        run another version now, and would be lost with an entry that it cannot read."""
        node = self._node
        found = [levels for levels in self._levels().values() if levels is not None]
        if len(found) < len(self._levels()):
            return
        level = features.next_level(node.meta.directory.level, found)
        if level != node.meta.directory.level:
            log.info("feature level %d: every node knows it", level)
            await node.meta.raise_level(level)

    def check_members_change(self) -> None:
        """Whether nodes may come and go at the cluster's feature level. Raises Unavailable, which says who holds it back."""
        node = self._node
        if node.feature(features.MEMBERS):
            return
        behind = [f"{n} (does not answer)" if levels is None else f"{n} (knows up to level {levels.high})"
                  for n, levels in sorted(self._levels().items()) if levels is None or levels.high < features.MEMBERS]
        raise Unavailable(f"the cluster is at feature level {node.meta.directory.level}, and nodes join, drain and leave from "
                          f"{features.MEMBERS} on: " + (f"first upgrade every node; it waits for {', '.join(behind)}" if behind else
                                                        "it is about to be raised; try again"))

    async def _let_go(self, forwarder: Forwarder) -> None:
        """Finds nodes that are to be removed and have nothing any more; forgets those that the meta group has let go, too."""
        node = self._node
        members = node.meta.directory.members
        going = {m.node_id for m in members.values() if m.leaving == d.GONE}
        freed = self._freed
        freed &= going
        meta = node.host.status_of(META_GROUP)
        if meta is not None and meta.configuration_index <= meta.commit_index:
            for node_id in sorted(freed - {*meta.configuration.voters, *meta.configuration.learners}):
                await node.meta.drop_member(node_id)
        if going - freed and not any(n in home for home in self.homes().values() for n in going - freed):
            freed |= going - await self._members_of_shards(forwarder)

    async def _members_of_shards(self, forwarder: Forwarder) -> set[str]:
        """Node ids that are members of any shard's group, as the groups' leaders say. Raises Unavailable if one is unknown."""
        node = self._node
        found: set[str] = set()
        unknown = set(range(1, node.config.shards + 1))
        leaders = sorted({leader for shard in unknown if (leader := node.leader_of(shard)) is not None})
        for status in await asyncio.gather(*(ask_status(node, forwarder, leader) for leader in leaders)):
            for group in status.groups if status is not None else ():
                if group.group in unknown and _tells_members(group):
                    unknown.discard(group.group)
                    found.update(group.voters, group.learners)
        if unknown:
            raise Unavailable(f"shard {min(unknown)} has no leader, or its members change")
        return found


def _tells_members(group: GroupStatus) -> bool:
    """Whether it is the group's leader that says who its members are, and they are for good. Nodes of 0.1.0 do not say."""
    return group.role == "leader" and group.configuration_index <= group.commit_index and bool(group.voters)


def said_of(member: d.Member) -> ClusterMember:
    """What a node said of itself."""
    return ClusterMember(node_id=member.node_id, peer_address=member.peer_address, client_address=member.client_address,
                         zone=member.zone, host=member.host, incarnation=member.incarnation, feature_min=member.feature_min,
                         feature_max=member.feature_max)


def check_newcomer(new: ClusterMember, formed: bool, inside: bool, known: d.Member | None, running: str | None) -> None:
    """Whether a node may be one of this cluster; see JoinRequest. `known`: what is known under its id; `running`: the store of the node
    of that id that runs, as far as is known. Raises RequestError with what to do; NotFound for one that takes itself for a member."""
    if known is None:
        if formed or inside:
            refusal = NotFound if inside else RequestError
            raise refusal("node_id", f"node {new.node_id!r} has the data of a cluster, and is no node of this one: it is another "
                          "cluster's, or was removed. Start it with an empty data_dir")
        return
    if running is not None and running != new.incarnation:
        raise RequestError("node_id", f"a node {new.node_id!r} is running already; choose another node_id")
    if known.leaving == d.GONE and not inside:  # until it is gone, the others need to know where it is
        raise RequestError("node_id", f"node {new.node_id!r} is being removed; wait until it is gone, and start with an empty data_dir")
    if formed and known.incarnation not in ("", new.incarnation):
        raise RequestError("node_id", f"node {new.node_id!r} of this cluster has other data; start it with its own data_dir, or an empty "
                           "one")


def check_addresses(new: ClusterMember, members: Iterable[d.Member]) -> None:
    """Whether a node that joins and those that are there can reach each other. Raises RequestError if it says that it is where another one
    is; Unavailable if one of these does not say where it is, which it may do yet."""
    for member in members:
        if member.node_id == new.node_id:
            continue
        for name in ("peer_address", "client_address"):
            address = getattr(member, name)
            if is_nowhere(address):
                raise Unavailable(f"node {member.node_id!r} says that it is at {address}, where no other node reaches it; start it again "
                                  "with --advertise peerhost:port/clienthost:port")
            if address == getattr(new, name):
                raise RequestError(name, f"is {address}, and so is that of node {member.node_id!r}: choose another one, or remove that "
                                   "node first if it is gone for good")


def check_departure(node_id: str, staying: list[str], there: Collection[str], replicas: int) -> None:
    """Whether one of those that stay may leave; `there`: those that answer, or did not long ago. Raises RequestError with what to do."""
    if len(staying) <= 1:
        raise RequestError("node_id", f"node {node_id!r} is the last one, and has the only replicas; let another node join first")
    left = sorted(n for n in staying if n != node_id)
    need = min(replicas, len(staying))
    if len(left) < need:
        raise RequestError("node_id", f"without node {node_id!r} there are {len(left)} nodes, and shards have {need} replicas; let another "
                           "node join first")
    silent = [n for n in left if n not in there]
    if len(left) - len(silent) < need:  # its replicas would wait for those that are dead, for ever
        raise RequestError("node_id", f"without node {node_id!r} there are {len(left) - len(silent)} nodes that answer, and shards have "
                           f"{need} replicas; start {', '.join(silent)}, or let another node join first")


async def ask_status(node: Node, forwarder: Forwarder, node_id: str) -> GetNodeStatusResponse | None:
    """What a node says of itself in ClusterService.GetNodeStatus, this one or another; None if it does not answer."""
    if node_id == node.config.node_id:
        return node_status(node)
    try:
        # One that Raft hears of is up: the link may only have to wait before it connects again.
        answer: GetNodeStatusResponse = await forwarder.link(node_id).cluster.GetNodeStatus(
            GetNodeStatusRequest(), timeout=CALL_SECONDS, wait_for_ready=node.host.in_touch(node_id))
    except (grpc.aio.AioRpcError, Unavailable) as error:
        log.debug("node %s does not say how it is: %s", node_id, error)
        return None
    return answer


def node_status(node: Node) -> GetNodeStatusResponse:
    """What a node says of itself in ClusterService.GetNodeStatus."""
    out = GetNodeStatusResponse(node=node.config.node_id, version=VERSION, feature_min=node.features.low, feature_max=node.features.high,
                                feature_level=node.meta.directory.level)
    for group, s in sorted(node.host.status().items()):
        out.groups.add(group=group, role=s.role.value, leader=s.leader or "", term=s.term, commit_index=s.commit_index,
                       applied_index=s.applied_index, durable_index=s.durable_index,
                       log_first_index=s.log_first_index, log_last_index=s.log_last_index,
                       voters=s.configuration.voters, learners=s.configuration.learners, configuration_index=s.configuration_index)
    return out
