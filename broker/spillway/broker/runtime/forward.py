"""From any node to the leaders: pieces of Produce and Ack requests, leases on behalf of plain clients, admin calls.

Forwarded work travels over the peers' port as ordinary QueueService and AdminService calls. Each link keeps one stream
per kind, so what one node forwards to another stays in order.

When a shard's leader changes, what certainly was not stored, and what may be repeated (settlements, and messages of a
producer with an id), is passed on to the new leader, in order, for a bounded time; a plain client notices nothing. Only
messages without a producer id whose outcome is unknown come back as UNAVAILABLE.
"""
from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError
from spillway.broker.core.directory import Destination, destination
from spillway.broker.core.entry import Option
from spillway.broker.core.outbox import decode_promise
from spillway.broker.core.policy import Policy
from spillway.broker.core.scheduler import Consumer
from spillway.broker.errors import AlreadyExists, RequestError, Unavailable
from spillway.broker.runtime.calls import Batch, Call, Release
from spillway.broker.runtime.consumers import Sink
from spillway.cluster.errors import WireInvalid
from spillway.cluster.transport.tls import TlsFiles, TlsInvalid
from spillway.contract.credits import CreditSplitter
from spillway.contract.hashing import PART
from spillway.contract.limits import CREDIT_BYTES_MAX, CREDIT_MESSAGES_MAX
from spillway.peer.v1.member_service_pb2 import JoinRequest, JoinResponse
from spillway.peer.v1.member_service_pb2_grpc import MemberServiceStub
from spillway.peer.v1.queue_view_pb2 import AckScope, ProduceRecordView, ProduceRequestView
from spillway.peer.v1.share_service_pb2_grpc import ShareServiceStub
from spillway.v1.admin_service_pb2 import CreateDestinationRequest
from spillway.v1.admin_service_pb2 import Destination as DestinationProto
from spillway.v1.admin_service_pb2_grpc import AdminServiceStub
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub
from spillway.v1.message_pb2 import ERROR_CODE_UNAVAILABLE, ItemError
from spillway.v1.queue_service_pb2 import (
    OUTCOME_RELEASE,
    SETTLEMENT_RESULT_REFUSED,
    AckRequest,
    AckResponse,
    Credit,
    HeldLease,
    LeasedRun,
    LeaseRequest,
    LeaseResponse,
    ProduceResponse,
    Settlement,
    Subscribe,
)

if TYPE_CHECKING:
    from spillway.broker.runtime.node import Node

log = logging.getLogger(__name__)
Answer = TypeVar("Answer", ProduceResponse, AckResponse, LeaseResponse)

LEADER_WAIT_SECONDS = 5.0  # how long a piece waits for its shard to have a leader
LEADER_POLL_SECONDS = 0.02
WATCH_SECONDS = 0.25  # between looks for a node that hangs; its connections stay open, and say nothing
MOVED_SECONDS_MAX = 1.0  # of silence, once another node is known to lead the shard
SILENCE_SECONDS_MAX = 3.0  # of silence, while Raft hears nothing of the node either
WITHDRAWN_SECONDS = 1.0  # for what was granted on credit that a client has taken back to come
RELEASES_MAX = 1024  # of leases that are given back in a request
LEASES_END_SECONDS = 2.0  # for what another node has granted to a consumer that is gone to come, and be given back
LINK_GRACE_SECONDS = 5.0  # calls over a link that is given up end by themselves: closing it cancels whoever waits on it
_NO_OPTION: Option = (0, 0, b"", 0)
ROTATED_GRACE_SECONDS = 600.0  # consumers' streams over a channel with former certificates: then they are opened anew
NOT_LEADER = "leader"  # field of an ItemError between nodes: refused before anything was done
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20),
                   ("grpc.keepalive_time_ms", 20_000),  # a node that lost its power ends no connection
                   ("grpc.keepalive_timeout_ms", 10_000),
                   ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
                   ("grpc.max_reconnect_backoff_ms", 500),
                   ("grpc.dns_min_time_between_resolutions_ms", 500),  # one that starts again may have another address
                   ("grpc.use_local_subchannel_pool", 1)]


class _Kind(NamedTuple):
    """What there is to do with what a stream carries. Each item is answered, lost or unsent once."""

    whose: Callable[[Any], tuple[Forwarder, int]]  # an item's forwarder and shard
    answered: Callable[[Any, bytes], None]
    lost: Callable[[Any, str], None]  # it was sent, and its outcome is unknown: why
    unsent: Callable[[Any], None]


class _Stream:
    """A forwarding stream: requests out, answers back in the same order. A node that hangs leaves its connections open, so who waits for
    one that does not lead the shard any more, or that nobody hears of, waits no longer."""

    def __init__(self, link: PeerLink, method: str, kind: _Kind) -> None:
        self._link = link
        self._method = method
        self._kind = kind
        self._out: deque[tuple[bytes, Any]] = deque()
        self._waiting: deque[tuple[float, Any]] = deque()  # since when, what
        self._some = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._heard_at = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._hangs: asyncio.Future[str] | None = None  # of the present call: done with why it is given up

    def send(self, request: bytes, item: Any) -> None:
        """Sends a request; what becomes of `item` its kind is told later."""
        self._out.append((request, item))
        self._some.set()
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        if self._watch is None:
            self._watch = loop.call_later(WATCH_SECONDS, self._look)

    def _look(self) -> None:
        """Gives up a call that nothing is to be hoped for from."""
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(WATCH_SECONDS, self._look) if self._waiting or self._out else None
        if self._waiting and self._hangs is not None and not self._hangs.done() and (why := self._given_up(loop.time())):
            self._hangs.set_result(why)

    def _given_up(self, now: float) -> str:
        """Why to wait no longer; empty if there is no reason. A node that Raft hears of may only have much to do, so only what waits first
        counts: what is sent again makes that more."""
        since, first = self._waiting[0]
        silence = now - max(since, self._heard_at)
        if silence <= MOVED_SECONDS_MAX:
            return ""
        forwarder, node_id = self._kind.whose(first)[0], self._link.node_id
        there = forwarder.node.host.in_touch(node_id)
        for _, item in (self._waiting[0],) if there else self._waiting:
            shard = self._kind.whose(item)[1]
            if (leader := forwarder.node.leader_of(shard)) not in (None, node_id):
                return f"it does not answer, and node {leader} leads shard {shard} now"
        return "it does not answer" if not there and silence > SILENCE_SECONDS_MAX else ""

    async def _run(self) -> None:
        while await self._serve():
            pass

    async def _serve(self) -> bool:
        """One call, until it ends; true if it ended, with everything answered, as the link has another channel now."""
        channel = self._link.channel
        why, moved = "the stream ended", False
        tasks: list[asyncio.Task[None]] = []
        call: Any = None
        try:
            call = channel.stream_stream(f"/spillway.v1.QueueService/{self._method}")()
            hangs = self._hangs = asyncio.get_running_loop().create_future()
            reader, writer = tasks = [asyncio.create_task(self._read(call, channel)), asyncio.create_task(self._write(call, channel))]
            await asyncio.wait((reader, writer, hangs), return_when=asyncio.FIRST_COMPLETED)
            moved = not reader.done() and not hangs.done() and not writer.cancelled() and writer.exception() is None
            if hangs.done():
                why = hangs.result()
        except grpc.aio.UsageError as error:  # the channel is closed
            why = str(error)
        finally:
            self._hangs = None
            if call is not None:
                call.cancel()
            for task in tasks:
                task.cancel()
            for ended in reversed(await asyncio.gather(*tasks, return_exceptions=True)):  # the reader knows better
                if isinstance(ended, grpc.aio.AioRpcError):
                    why = ended.details() or "broken"
                elif isinstance(ended, Exception):
                    why = str(ended)
                    if not isinstance(ended, (asyncio.InvalidStateError, grpc.aio.UsageError, WireInvalid)):
                        log.error("bug in the stream to node %s", self._link.node_id, exc_info=ended)
            if not moved:
                self._give_back(why)
        return moved

    def _give_back(self, why: str) -> None:
        waiting, out = [item for _, item in self._waiting], [item for _, item in self._out]
        self._waiting.clear()
        self._out.clear()
        for item in waiting:
            self._kind.lost(item, f"node {self._link.node_id}: {why}; the outcome is unknown")
        for item in out:
            self._kind.unsent(item)

    async def _write(self, call: Any, channel: grpc.aio.Channel) -> None:
        """Sends what there is, until the link has another channel and everything is answered: what was sent is answered before anything
        goes another way, so that it stays in order."""
        while True:
            while self._out and self._link.channel is channel:
                request, item = self._out.popleft()
                self._waiting.append((asyncio.get_running_loop().time(), item))
                await call.write(request)
            if self._link.channel is not channel and not self._waiting:
                return
            self._some.clear()
            await self._some.wait()

    async def _read(self, call: Any, channel: grpc.aio.Channel) -> None:
        while True:
            data = await call.read()
            if data is grpc.aio.EOF:
                return
            if not self._waiting:
                raise WireInvalid("it answered what it was not asked")
            self._heard_at = asyncio.get_running_loop().time()
            self._kind.answered(self._waiting[0][1], data)  # raises before anything is taken: then it is lost with all others
            self._waiting.popleft()
            if not self._waiting and self._link.channel is not channel:
                self._some.set()

    def move(self) -> None:
        """The link has another channel."""
        self._some.set()

    def stop(self) -> None:
        """Ends the stream; what waits is lost."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._task is not None:
            self._task.cancel()


class PeerLink:
    """Calls to one other node."""

    def __init__(self, node_id: str, address: str, tls: TlsFiles | None = None) -> None:
        self.node_id = node_id
        self.address = address
        self._tls = tls
        self._connect()
        self.produce = _Stream(self, "Produce", _RECORDS)
        # Copies of routes have a stream of their own: what is forwarded on the other may wait for copies that come back here.
        self.copies = _Stream(self, "Produce", _RECORDS)
        self.ack = _Stream(self, "Ack", _SETTLEMENTS)

    def _connect(self) -> None:
        self.channel = _channel(self.node_id, self.address, self._tls)
        self.admin = AdminServiceStub(self.channel)
        self.share = ShareServiceStub(self.channel)
        self.cluster = ClusterServiceStub(self.channel)
        self.member = MemberServiceStub(self.channel)

    def rotate(self) -> grpc.aio.Channel:
        """Makes a new channel, with new certificates, for whatever begins from now on; returns the former one, to be closed when what
        it carries has ended."""
        former = self.channel
        self._connect()
        for stream in (self.produce, self.copies, self.ack):
            stream.move()
        return former

    async def close(self, grace: float | None = None) -> None:
        """Ends all calls; those that are answered within `grace` seconds are not cancelled."""
        self.produce.stop()
        self.copies.stop()
        self.ack.stop()
        await self.channel.close(grace)


def _channel(node_id: str, address: str, tls: TlsFiles | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return tls.channel(address, node_id, CHANNEL_OPTIONS)


class Forwarder:
    """All links of a node."""

    def __init__(self, node: Node, tls: TlsFiles | None = None) -> None:
        self.node = node
        self._tls = tls
        self._links: dict[str, PeerLink] = {}
        self._leaderless: dict[int, deque[Callable[[str | None], None]]] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._closed = False
        # Takes in a ProduceRequest of another node: (stream, bytes) -> Call or an awaitable of one. The peers' service sets it.
        self.local: Callable[[int, bytes], Any]
        node.pass_on = self._pass_on
        node.pass_on_settlement = self._pass_on_settlement
        node.on_members.append(self._follow_members)

    def link(self, node_id: str) -> PeerLink:
        """The link to another node. Raises Unavailable if it is none of the cluster, or this one stops."""
        if self._closed:
            raise Unavailable("this node stops")
        link = self._links.get(node_id)
        if link is None:
            member = self.node.members.get(node_id)
            if member is None:
                raise Unavailable(f"node {node_id} is none of the cluster")
            link = self._links[node_id] = PeerLink(node_id, member.peer_address, self._tls)
        return link

    def _follow_members(self) -> None:
        """Ends links to nodes that are none any more, or are elsewhere; what waits there is passed on or failed."""
        members = self.node.members
        for node_id, link in list(self._links.items()):
            if node_id not in members or members[node_id].peer_address != link.address:
                del self._links[node_id]
                self.start(link.close(LINK_GRACE_SECONDS))

    def rotate(self) -> None:
        """There are new certificates: links are made anew, and lose nothing of what is under way."""
        for link in self._links.values():
            self.start(link.rotate().close(ROTATED_GRACE_SECONDS))

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Does something beside all else; until the node stops, at most."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task

    async def close(self) -> None:
        """Ends all links."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        for link in list(self._links.values()):
            await link.close()

    def _with_leader(self, shard: int, act: Callable[[str | None], None]) -> None:
        """Calls `act` with the shard's leader (not this node), now or as soon as there is one, else with None. In order
        per shard."""
        if self._closed:
            act(None)
            return
        waiting = self._leaderless.get(shard)
        if waiting is not None:
            waiting.append(act)
            return
        leader = self.node.leader_of(shard)
        if leader is not None and leader != self.node.config.node_id:
            act(leader)
            return
        self._leaderless[shard] = deque([act])
        self.start(self._await_leader(shard))

    async def _await_leader(self, shard: int) -> None:
        leader = None
        for _ in range(int(LEADER_WAIT_SECONDS / LEADER_POLL_SECONDS)):
            leader = self.node.leader_of(shard)
            if leader is not None:
                break
            await asyncio.sleep(LEADER_POLL_SECONDS)
        for act in self._leaderless.pop(shard):
            act(leader)

    # -- Produce and Ack -----------------------------------------------------------------------------------------

    def _pass_on(self, shard: int, batch: Batch) -> None:
        """A batch for a shard that this node leads no more, of which nothing is stored, or which may be repeated. Another node's
        goes back to that one, which asks the new leader: streams answer in order, so two nodes that passed on to each
        other what they had from each other could wait for ever."""
        if not batch.call.peer:
            self.produce(shard, batch)
            return
        # The sender takes it that nothing is stored. If only a part of its request comes back, and nobody would recognise the
        # rest, it must not send all of it again.
        certain = batch.producer or len(batch.positions) == len(batch.call.results)
        for position in batch.positions:
            batch.call.fail(position, ERROR_CODE_UNAVAILABLE, NOT_LEADER if certain else "",
                            f"shard {shard}: the leader changed; the outcome is unknown")
        batch.call.release()

    def _pass_on_settlement(self, shard: int, call: Call, index: int, settlement: Settlement) -> None:
        """As `_pass_on`, of a settlement; it may always be repeated."""
        if not call.peer:
            self.ack(shard, call, {index: settlement})
            return
        call.results[index] = SETTLEMENT_RESULT_REFUSED
        call.fail(index, ERROR_CODE_UNAVAILABLE, NOT_LEADER, f"this node does not lead shard {shard}")
        call.release()

    def produce(self, shard: int, batch: Batch) -> None:
        """Sends a batch to its shard's leader; answers through its call."""
        now = asyncio.get_running_loop().time()
        if not batch.give_up:
            batch.give_up = now + LEADER_WAIT_SECONDS
        elif now > batch.give_up:
            _produce_failed(batch, f"shard {shard}: its leader keeps changing, or does not answer")
            return

        def act(leader: str | None) -> None:
            if leader is None:
                _produce_failed(batch, f"shard {shard} has no leader")
            elif leader == self.node.config.node_id:
                if batch.copies is None and batch.promised is None:
                    self._take_in(shard, batch)
                else:
                    self.node.shards[shard].enqueue(0, batch)
                    self.node.host.wake(shard)
            elif leader not in self.node.members:
                asyncio.get_running_loop().call_later(LEADER_POLL_SECONDS, self.produce, shard, batch)
            else:
                link = self.link(leader)
                (link.produce if batch.copies is None else link.copies).send(self._encode(batch), (self, shard, batch))

        self._with_leader(shard, act)

    def _take_in(self, shard: int, batch: Batch) -> None:
        """This node has come to lead the shard since the batch was made: takes it in as another node's, as what only the leader
        decides (routes, budgets) was not decided for it."""
        taken = self.local(0, self._encode(batch))

        async def answer() -> None:
            call = taken if isinstance(taken, Call) else await taken
            await call.done
            errors = [ItemError(index=i, code=code, field=field, description=text)
                      for i, code, field, text in sorted(call.errors)]
            _produced((self, shard, batch), ProduceResponse(sequences=call.results, errors=errors).SerializeToString())

        self.start(answer())

    def _encode(self, batch: Batch) -> bytes:
        request = ProduceRequestView(producer_id=batch.producer)
        copies, options, promised = batch.copies, batch.options, batch.promised
        if copies is not None:
            request.copy_epoch = batch.epoch
            request.copy_previous = batch.first
        for i, (name, body) in enumerate(zip(batch.names, batch.bodies, strict=True)):
            deliver, expire, digest, until = options.get(i, _NO_OPTION) if options else _NO_OPTION
            if promised and i in promised:
                promise = decode_promise(body)
                deliver, expire = promise.deliver, promise.expire
                name, body = promised[i]
            names = name.partition(PART)[0].decode().split("\0")
            record = ProduceRecordView(destination=names[0], tenant=names[1], key=names[2], message=body)
            if copies is not None:
                record.copy_sequence = copies[i]
            elif batch.producer:
                record.producer_sequence = batch.first + i
            if deliver or expire:
                record.deliver_unix_ms = deliver
                record.expire_unix_ms = expire
            if digest:
                record.dedup_digest = digest
                record.dedup_until_unix_ms = until
            request.records.append(record)
        return request.SerializeToString()

    def ack(self, shard: int, call: Call, settlements: dict[int, Settlement], give_up: float = 0.0) -> None:
        """Sends settlements of one shard, by their index in the call, to its leader; answers through the call, which waits
        for one release."""
        now = asyncio.get_running_loop().time()
        give_up = give_up or now + LEADER_WAIT_SECONDS
        item = _Acks(self, shard, call, settlements, give_up)
        if now > give_up:
            _ack_failed(item, f"shard {shard}: its leader keeps changing, or does not answer")
            return

        def act(leader: str | None) -> None:
            if leader is None:
                _ack_failed(item, f"shard {shard} has no leader")
            elif leader == self.node.config.node_id:
                runtime = self.node.shards[shard]
                for index, s in settlements.items():
                    delay = s.delay.ToMilliseconds() if s.HasField("delay") else -1
                    runtime.settle(call, index, s.fencing_token, s.sequence, s.outcome, delay, s.reason)
                self.node.host.wake(shard)
                call.release()
            elif leader not in self.node.members:
                asyncio.get_running_loop().call_later(LEADER_POLL_SECONDS, self.ack, shard, call, settlements, give_up)
            else:
                scope = b"" if call.grants is None else AckScope(destinations=call.grants.lease_patterns()).SerializeToString()
                request = AckRequest(settlements=settlements.values())
                self.link(leader).ack.send(scope + request.SerializeToString(), item)

        self._with_leader(shard, act)

    def give_back(self, runs: Iterable[LeasedRun]) -> None:
        """Leases will not come to their consumer: they are released, and count no attempt. Where nobody leads the shard, they run on."""
        node = self.node
        shards: dict[int, list[LeasedRun]] = {}
        for run in runs:
            if run.messages and 1 <= run.shard <= node.config.shards:
                shards.setdefault(run.shard, []).append(run)
        for shard, lost in ((s, all_[i:i + RELEASES_MAX]) for s, all_ in shards.items() for i in range(0, len(all_), RELEASES_MAX)):
            call = Release(len(lost), asyncio.get_running_loop())
            runtime = node.shards.get(shard)
            if runtime is not None and runtime.leading:
                for i, run in enumerate(lost):
                    runtime.settle(call, i, run.fencing_token, run.messages[0].sequence, OUTCOME_RELEASE, -1, "")
                node.host.wake(shard)
            else:
                self.ack(shard, call, {i: Settlement(shard=shard, fencing_token=run.fencing_token, sequence=run.messages[0].sequence,
                                                     outcome=OUTCOME_RELEASE) for i, run in enumerate(lost)})

    # -- Admin ---------------------------------------------------------------------------------------------------

    async def await_meta_leader(self) -> str:
        """Node id of the meta group's leader, as soon as there is one. Raises Unavailable after a while."""
        deadline = asyncio.get_running_loop().time() + LEADER_WAIT_SECONDS
        while True:
            try:
                return self.meta_leader()
            except Unavailable:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(LEADER_POLL_SECONDS)

    async def await_leader(self, shard: int) -> str:
        """Node id of a shard's leader, as soon as there is one. Raises Unavailable after a while."""
        deadline = asyncio.get_running_loop().time() + LEADER_WAIT_SECONDS
        while (leader := self.node.leader_of(shard)) is None:
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(f"shard {shard} has no leader")
            await asyncio.sleep(LEADER_POLL_SECONDS)
        return leader

    def meta_leader(self) -> str:
        """Node id of the meta group's leader. Raises Unavailable."""
        if self.node.meta.leading:
            return self.node.config.node_id
        leader = self.node.host.leader_of(0)[0]
        if leader is None or leader == self.node.config.node_id:
            raise Unavailable("the meta group has no leader")
        return leader

    async def join_at(self, address: str, request: JoinRequest, timeout: float) -> JoinResponse | grpc.aio.AioRpcError:
        """What whoever is at an address answers; it need not be a node of the cluster. Raises Unavailable if that one cannot be trusted."""
        node_id = ""
        if self._tls is not None:  # no node is expected there: any that the authority vouches for will do
            try:
                names = await self._tls.names_at(address)
            except TlsInvalid as error:
                raise Unavailable(str(error)) from None
            if not names:
                raise Unavailable(f"nobody answers at {address}" if names is None else f"the certificate at {address} names nobody")
            node_id = names[0]
        channel = _channel(node_id, address, self._tls)
        try:
            answer: JoinResponse = await MemberServiceStub(channel).Join(request, timeout=timeout)
            return answer
        except grpc.aio.AioRpcError as error:
            return error
        finally:
            await channel.close()

    async def ensure_destination(self, name: str) -> Destination | None:
        """The destination, created with defaults if need be, and known on this node; None if it is the source of a route, of
        which this node had not heard. Raises Unavailable or RequestError."""
        node = self.node
        deadline = asyncio.get_running_loop().time() + LEADER_WAIT_SECONDS
        while True:
            known = node.meta.get(name)
            if known is not None or name in node.meta.directory.routes:
                return known
            try:
                leader = self.meta_leader()
                if leader == node.config.node_id:
                    return await node.meta.put(destination(name, Policy()), create=True, replace=False, etag=0)
                await self.link(leader).admin.CreateDestination(
                    CreateDestinationRequest(destination=DestinationProto(name=name)), timeout=LEADER_WAIT_SECONDS)
            except AlreadyExists:
                pass
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    raise RequestError("destination.name", error.details() or "refused") from None
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS and asyncio.get_running_loop().time() > deadline:
                    raise Unavailable(f"the meta group's leader does not answer: {error.details()}") from None
            except Unavailable:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable("the meta group is behind on this node")
            await asyncio.sleep(LEADER_POLL_SECONDS)


class _Acks:
    """Settlements of one shard on their way."""

    __slots__ = ("call", "forwarder", "give_up", "settlements", "shard")

    def __init__(self, forwarder: Forwarder, shard: int, call: Call, settlements: dict[int, Settlement],
                 give_up: float) -> None:
        self.forwarder = forwarder
        self.shard = shard
        self.call = call
        self.settlements = settlements
        self.give_up = give_up


def _parsed(kind: type[Answer], data: bytes) -> Answer:
    """What another node sent. Raises WireInvalid."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise WireInvalid(f"it sent what does not parse as {kind.DESCRIPTOR.full_name}") from None


def _check_answer(asked: int, answered: int, errors: Sequence[ItemError]) -> None:
    """Raises WireInvalid for an answer to something else than so many items."""
    if answered != asked:
        raise WireInvalid(f"it answered {answered} items of {asked}")
    for error in errors:
        if error.index >= asked:
            raise WireInvalid(f"it refused item {error.index} of {asked}")


def _batch_of(item: tuple[Forwarder, int, Batch]) -> tuple[Forwarder, int]:
    return item[:2]


def _acks_of(item: _Acks) -> tuple[Forwarder, int]:
    return item.forwarder, item.shard


def _produced(item: tuple[Forwarder, int, Batch], data: bytes) -> None:
    forwarder, shard, batch = item
    response = _parsed(ProduceResponse, data)
    _check_answer(len(batch.positions), len(response.sequences), response.errors)
    if response.errors and response.errors[0].field == NOT_LEADER:  # then nothing of it was stored
        asyncio.get_running_loop().call_later(LEADER_POLL_SECONDS, forwarder.produce, shard, batch)
        return
    call = batch.call
    for position, sequence in zip(batch.positions, response.sequences, strict=True):
        call.results[position] = sequence
    for error in response.errors:
        position = batch.positions[error.index]
        field = error.field.replace(f"records[{error.index}]", f"records[{position}]", 1)
        call.fail(position, error.code, field, error.description)
    call.release()


def _produce_lost(item: tuple[Forwarder, int, Batch], why: str) -> None:
    if item[2].producer:  # may be repeated
        _produce_again(item)
    else:
        _produce_failed(item[2], why)


def _produce_again(item: tuple[Forwarder, int, Batch]) -> None:
    forwarder, shard, batch = item
    asyncio.get_running_loop().call_later(LEADER_POLL_SECONDS, forwarder.produce, shard, batch)


def _produce_failed(batch: Batch, why: str) -> None:
    for position in batch.positions:
        batch.call.fail(position, ERROR_CODE_UNAVAILABLE, "", why)
    batch.call.release()


def _acked(item: _Acks, data: bytes) -> None:
    call, indexes = item.call, list(item.settlements)
    response = _parsed(AckResponse, data)
    _check_answer(len(indexes), len(response.results), response.errors)
    moved = {indexes[e.index]: item.settlements[indexes[e.index]] for e in response.errors if e.field == NOT_LEADER}
    if moved:
        call.waiting += 1
        asyncio.get_running_loop().call_later(
            LEADER_POLL_SECONDS, item.forwarder.ack, item.shard, call, moved, item.give_up)
    for index, result in zip(indexes, response.results, strict=True):
        call.results[index] = result
    for error in response.errors:
        index = indexes[error.index]
        if index in moved:
            continue
        field = error.field.replace(f"settlements[{error.index}]", f"settlements[{index}]", 1)
        call.fail(index, error.code, field, error.description)
    call.release()


def _acks_again(item: _Acks) -> None:
    asyncio.get_running_loop().call_later(
        LEADER_POLL_SECONDS, item.forwarder.ack, item.shard, item.call, item.settlements, item.give_up)


def _ack_failed(item: _Acks, why: str) -> None:
    call = item.call
    for index in item.settlements:
        call.results[index] = SETTLEMENT_RESULT_REFUSED
        call.fail(index, ERROR_CODE_UNAVAILABLE, "", why)
    call.release()


_RECORDS = _Kind(_batch_of, _produced, _produce_lost, _produce_again)
_SETTLEMENTS = _Kind(_acks_of, _acked, lambda item, why: _acks_again(item), _acks_again)  # they may be repeated


def _raise_own_cancellation() -> None:
    """After a CancelledError of a call: raises it if it is the task that was cancelled, not the call, because its link was closed."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise asyncio.CancelledError


class _LeaseStream:
    """A stream of leases from another node. Credit adds up while an earlier one cannot be written: nobody waits for a node that hangs."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._messages = 0  # of credit to be given
        self._bytes = 0
        self._closing = False
        self._some = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    def give(self, messages: int, size: int) -> None:
        """Gives (or takes back) credit."""
        self._messages += messages
        self._bytes += size
        self._wake()

    def close(self) -> None:
        """Asks for no more; what is granted already still comes, and then the end."""
        self._closing = True
        self._wake()

    def _wake(self) -> None:
        self._some.set()
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            messages, size = self._messages, self._bytes
            self._messages = self._bytes = 0
            try:
                if self._closing:
                    await self._call.done_writing()
                    return
                if messages or size:
                    await self._call.write(LeaseRequest(credit=Credit(messages=messages, bytes=size)).SerializeToString())
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                return  # the reader sees the end of the stream
            except asyncio.CancelledError:
                _raise_own_cancellation()
                return

    def end(self) -> None:
        """Ends the stream."""
        self._call.cancel()
        if self._writer is not None:
            self._writer.cancel()


class LeaseProxy:
    """Leases from every node on behalf of a plain client: its credit is split over the nodes, its frames merged. Credit that moves
    from one node to another may be spent by both; what comes then and is too much, and what comes after the end, is given back.
    `numbered`: the client numbers its streams itself."""

    def __init__(self, forwarder: Forwarder, subscribe: Subscribe, numbered: bool, consumer: Consumer, sink: Sink,
                 give_local: Callable[[Consumer, int, int], None]) -> None:
        self._forwarder = forwarder
        self._subscribe = subscribe
        self._numbered = numbered
        self._consumer = consumer
        self._sink = sink
        self._give_local = give_local
        self._loop = asyncio.get_running_loop()
        self._messages = 0  # credit that the client gave in all, less what was delivered
        self._bytes = 0
        self._bytes_high = 0  # the most that it ever was
        self._withdrawn: deque[tuple[float, int]] = deque()  # until when, how many messages that the client took back may still come
        self._splitter: CreditSplitter[str] | None = None
        self._local = forwarder.node.config.node_id
        self._streams: dict[str, _LeaseStream] = {}
        self._leases: dict[str, asyncio.Task[None]] = {}
        self._rebalancing: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._stopped = False

    def start(self) -> None:
        """Subscribes here and at all other nodes; streams that break are opened again."""
        node = self._forwarder.node
        node.scheduler.subscribe(self._consumer, list(self._subscribe.destinations))
        self._sink.admit = lambda messages, size: self._admit(self._local, messages, size)
        node.on_members.append(self._follow_members)
        self._follow_members()
        self._rebalancing = self._loop.create_task(self._rebalance())
        self.credit(self._subscribe.credit.messages, self._subscribe.credit.bytes)

    def _follow_members(self) -> None:
        """Subscribes at nodes that came, and no longer at those that are gone."""
        peers = self._forwarder.node.members.keys() - {self._local}
        for peer in sorted(self._leases.keys() - peers):
            self._leases.pop(peer).cancel()
        for peer in sorted(peers - self._leases.keys()):
            self._leases[peer] = self._forwarder.start(self._lease(peer))

    def stop(self) -> None:
        """Ends all streams, once what was granted over them has come."""
        if self._stopped or self._rebalancing is None:
            return
        self._stopped = True
        self._forwarder.node.on_members.remove(self._follow_members)
        self._rebalancing.cancel()
        for peer, task in self._leases.items():
            if not self._numbered and peer not in self._streams:
                task.cancel()  # another node's number for a stream that comes after this one may be lower
            timer = self._loop.call_later(LEASES_END_SECONDS, task.cancel)
            task.add_done_callback(lambda _, timer=timer: timer.cancel())  # type: ignore[misc]
        for stream in self._streams.values():
            stream.close()

    def credit(self, messages: int, size: int) -> None:
        """The client gives (or takes back) credit. What other nodes have granted on what it takes back still comes."""
        if messages < 0 < self._messages:
            self._withdraw(min(-messages, self._messages))
        self._messages = min(self._messages + messages, CREDIT_MESSAGES_MAX)
        self._bytes = min(self._bytes + size, CREDIT_BYTES_MAX)
        self._bytes_high = max(self._bytes_high, self._bytes)
        splitter = self._splitter
        if splitter is None:
            if self._messages <= 0 or self._bytes <= 0:
                return
            splitter = self._splitter = CreditSplitter(self._messages, self._bytes)
            splitter.add(self._local, self._loop.time())
            for peer in self._streams:
                splitter.add(peer, self._loop.time())
        self._split_anew(splitter)

    def _withdraw(self, messages: int) -> None:
        until, step = self._loop.time() + WITHDRAWN_SECONDS, WITHDRAWN_SECONDS / 16  # however often, there are few steps
        if self._withdrawn and until < (last := self._withdrawn[-1])[0] + step:
            self._withdrawn[-1] = last[0], last[1] + messages
        else:
            self._withdrawn.append((until, messages))
        self._forget_withdrawn()

    def _forget_withdrawn(self) -> None:
        now = self._loop.time()
        while self._withdrawn and self._withdrawn[0][0] <= now:
            self._withdrawn.popleft()

    def _split_anew(self, splitter: CreditSplitter[str]) -> None:
        # What is delivered is the client's: it gives new credit for it. So the total is what is left to deliver.
        splitter.messages_max = max(0, self._messages)
        splitter.bytes_max = max(0, self._bytes)
        self._changed.set()

    def _admit(self, node_id: str, messages: int, size: int) -> bool:
        """A node has used so much of its credit. Whether the client has as much left, and it may go there. Bytes may be overdrawn, by as
        much as the client has given: messages are large or small, and to give back what came a moment too early helps nobody."""
        splitter = self._splitter
        self._forget_withdrawn()
        if splitter is not None:
            splitter.delivered(node_id, messages, size, self._loop.time())
            splitter.settled(messages, size)
        late = max(0, messages - max(0, self._messages))
        admitted = not self._stopped and late <= sum(n for _, n in self._withdrawn) and self._bytes + self._bytes_high > 0
        if admitted:
            while late:
                until, withdrawn = self._withdrawn.popleft()
                if withdrawn > late:
                    self._withdrawn.appendleft((until, withdrawn - late))
                late -= min(late, withdrawn)
            self._messages -= messages
            self._bytes -= size
        if splitter is not None:
            self._split_anew(splitter)
        return admitted

    async def _rebalance(self) -> None:
        while True:
            self._changed.clear()
            splitter = self._splitter
            timeout = None
            if splitter is not None:
                now = self._loop.time()
                for change in splitter.plan(now):
                    self._give(change.node, change.messages, change.bytes)
                if splitter.messages_max and splitter.bytes_max:  # else there is nothing to split until there is more
                    wake = splitter.wake_time(now)
                    timeout = None if wake is None else max(0.001, wake - now)
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _give(self, node_id: str, messages: int, size: int) -> None:
        if node_id == self._local:
            self._give_local(self._consumer, messages, size)
        elif (stream := self._streams.get(node_id)) is not None:
            stream.give(messages, size)

    async def _lease(self, peer: str) -> None:
        subscribe = Subscribe()
        subscribe.CopyFrom(self._subscribe)
        subscribe.ClearField("credit")
        subscribe.local_only = True
        held = [HeldLease(shard=h.shard, fencing_token=h.fencing_token) for h in self._subscribe.held]
        wait = LEADER_POLL_SECONDS
        while True:
            try:
                channel = self._forwarder.link(peer).channel
            except Unavailable:
                return
            call: Any = channel.stream_stream("/spillway.v1.QueueService/Lease")()
            stream = _LeaseStream(call)
            try:
                del subscribe.held[:]
                subscribe.held.extend(held)
                await call.write(LeaseRequest(subscribe=subscribe).SerializeToString())
                self._streams[peer] = stream
                if self._splitter is not None:
                    self._splitter.add(peer, self._loop.time())
                    self._changed.set()
                if self._stopped:
                    stream.close()
                while True:
                    frame = await call.read()
                    if frame is grpc.aio.EOF:
                        break
                    self._pass_on(peer, frame)
                    wait = LEADER_POLL_SECONDS
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                pass
            except asyncio.CancelledError:
                _raise_own_cancellation()
            except WireInvalid as error:
                log.warning("a lease stream to node %s is opened again: %s", peer, error)
            finally:
                stream.end()
                self._streams.pop(peer, None)
                if self._splitter is not None:
                    self._splitter.remove(peer)
                    self._changed.set()
            if self._stopped:
                return
            # Which leases the client still holds is not known here any more; a session must not have them taken away.
            subscribe.session = ""
            held = []
            await asyncio.sleep(wait)
            if self._stopped:
                return
            wait = min(wait * 2, 0.5)

    def _pass_on(self, peer: str, frame: bytes) -> None:
        runs = _parsed(LeaseResponse, frame).runs
        admitted: list[LeasedRun] = []
        rejected: list[LeasedRun] = []
        for run in runs:
            if run.messages:
                fits = self._admit(peer, len(run.messages), sum(m.message.ByteSize() for m in run.messages))
                (admitted if fits else rejected).append(run)
        self._forwarder.give_back(rejected)
        if admitted:
            self._sink.push_frame(frame if len(admitted) == len(runs) else LeaseResponse(runs=admitted).SerializeToString())
