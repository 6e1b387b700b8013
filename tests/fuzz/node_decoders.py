"""Decoders of a broker node: requests of clients and of other nodes, answers of other nodes, settings, the data directory."""
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from google.protobuf.message import DecodeError
from msgspec.structs import replace
from spillway.broker import config as config_module
from spillway.broker.config import NodeConfig, load, members_of
from spillway.broker.core import directory as d
from spillway.broker.core.directory import Target
from spillway.broker.core.entry import decode_entry
from spillway.broker.core.policy import Limit, Policy, Retention, TenantPolicy
from spillway.broker.core.scheduler import Consumer
from spillway.broker.datadir import claim
from spillway.broker.errors import ConfigError, DataDirError, RequestError, Unavailable
from spillway.broker.runtime import forward
from spillway.broker.runtime.calls import Batch, Call
from spillway.broker.runtime.consumers import Sink
from spillway.broker.services import gates, names, operations, pages
from spillway.broker.services.admin import AdminService, _dead_token
from spillway.broker.services.destinations import destination_proto, parse_destination
from spillway.broker.services.produce import Intake
from spillway.broker.services.queue import QueueService, _ack_response, _check_subscribe, _parse_lease, _produce_response
from spillway.broker.services.routes import parse_route, route_proto
from spillway.cluster.errors import WireInvalid
from spillway.contract.limits import LEASE_MS_MAX, LEASE_MS_MIN
from spillway.peer.v1.queue_view_pb2 import AckScope, ProduceRecordView, ProduceRequestView
from spillway.peer.v1.share_service_pb2 import SharedScope, ShareRequest
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1.message_pb2 import ERROR_CODE_UNAVAILABLE, ItemError, Message
from spillway.v1.queue_service_pb2 import (
    OUTCOME_ACK,
    OUTCOME_EXTEND,
    OUTCOME_RETRY,
    AckRequest,
    AckResponse,
    Credit,
    HeldLease,
    LeasedMessage,
    LeasedRun,
    LeaseRequest,
    LeaseResponse,
    ProduceRecord,
    ProduceRequest,
    ProduceResponse,
    Settlement,
    Subscribe,
)

from tests.fuzz.core_decoders import HTTP, POLICY
from tests.fuzz.decoder import Decode, Decoder, Rewritten, expect, join, pairs, plain
from tests.unit.broker.node_world import World

NOW = 1_000_000_000_000  # the world's
PEERS = ["n1=127.0.0.1:1/127.0.0.1:2", "n2=127.0.0.1:3/127.0.0.1:4"]
TOLD = 4  # messages of a batch whose answer comes from another node


# -- one node ---------------------------------------------------------------------------------------------------------


class Node:
    """A node that leads both of its shards, has destinations of every kind, a route and leases, and never commits."""

    def __init__(self, world: World, loop: asyncio.AbstractEventLoop) -> None:
        self.world = world
        self.loop = loop
        self.runs: list[LeasedRun] = []
        self.peers = QueueService(world.node, world.forwarder, peer=True)

    async def prepare(self) -> None:
        """Fills it."""
        world = self.world
        world.host.lead()
        world.know("d", "e")
        world.know("l", policy=Policy(message_bytes_max=50, retention=Retention(500, 1_000), limit=Limit(5.0),
                                      tenant_retention=Retention(90)))
        world.know("u", policy=Policy(ordered=False, tenant_limit=Limit(1.0)))
        world.route("r", "d", Target("u", 'headers["h"] == "v"', True))
        for key in "abc":
            await world.put("d", b"1", b"2", b"3", key=key)
        self.runs = await world.take(world.consumer(7))
        await world.put("d", b"4")

    def entries(self) -> None:
        """What waits is made entries, which every follower must be able to read."""
        for runtime in self.world.node.shards.values():
            command = runtime.collect()
            if command is not None:
                made = runtime._in_flight.pop()[0]
                expect(decode_entry(command) == made, made)
            runtime._clear_pending()
            runtime.chores.clear()
        self.world.node.ingress_bytes = 0

    def ingest(self, intake: Intake, data: bytes) -> None:
        """A ProduceRequest; one that first has to create a destination ends there."""
        taken = intake.ingest(1, data)
        if isinstance(taken, Call):
            _produce_response(taken)
        else:
            taken.close()
        self.entries()

    def settle(self, service: QueueService, data: bytes) -> None:
        """An AckRequest."""
        _ack_response(service._settle(data))
        self.entries()


@contextmanager
def node() -> Iterator[Node]:
    """A node for as long as it is used."""
    with TemporaryDirectory() as path, asyncio.Runner() as runner:
        loop = runner.get_loop()

        async def make() -> Node:
            world = World(Path(path), peers=PEERS)
            made = Node(world, loop)
            await made.prepare()
            return made

        made = runner.run(make())
        try:
            yield made
        finally:
            made.world.store.close()


def _of_node(decode: Callable[[Node], Callable[[bytes], Awaitable[object]]]) -> Callable[[], Any]:
    """For `Decoder.open`: a function that runs in the loop of a node."""

    @contextmanager
    def opened() -> Iterator[Decode]:
        with node() as made:
            one = decode(made)

            def run(data: bytes) -> None:
                made.loop.run_until_complete(one(data))

            yield run

    return opened


def _intake(peer: bool) -> Callable[[], Any]:
    def decode(made: Node) -> Callable[[bytes], Awaitable[object]]:
        intake = (made.peers if peer else made.world.service)._intake

        async def one(data: bytes) -> None:
            made.ingest(intake, data)

        return one

    return _of_node(decode)


def _settle(made: Node) -> Callable[[bytes], Awaitable[object]]:
    async def one(data: bytes) -> None:
        made.settle(made.world.service, data)
        made.settle(made.peers, data)

    return one


_RECORDS = [
    ProduceRecord(destination="d", tenant="t", key="k", message=Message(payload=b"p"), producer_sequence=1),
    ProduceRecord(destination="u", tenant="t" * 70, message=Message(id="i", headers={"h": "v"}, payload=b"p" * 200), dedup_id="x"),
    ProduceRecord(destination="r", tenant="t", message=Message(headers={"h": "v"})),
    ProduceRecord(destination="l", tenant="t", message=Message(payload=b"p" * 10)),
    ProduceRecord(destination="new", tenant="t\u00e9", message=Message(payload=b"p"))]


def _produce_samples() -> tuple[bytes, ...]:
    _RECORDS[0].delay.FromMilliseconds(1_500)
    _RECORDS[1].deliver_at.FromMilliseconds(NOW + 1_000)
    _RECORDS[2].ttl.FromMilliseconds(2_000)
    return (ProduceRequest(records=_RECORDS).SerializeToString(), ProduceRequest(records=_RECORDS[:4]).SerializeToString(),
            ProduceRequest(producer_id="p", records=_RECORDS[:1] * 3).SerializeToString(),
            *(ProduceRequest(records=[record]).SerializeToString() for record in _RECORDS))


def _peer_samples() -> tuple[bytes, ...]:
    body = Message(payload=b"p").SerializeToString()
    plain_ = ProduceRecordView(destination="d", tenant="t", key="k", message=body, deliver_unix_ms=NOW + 5, expire_unix_ms=NOW + 9,
                               dedup_digest=b"i" * 16, dedup_until_unix_ms=NOW + 70_000)
    copies = [ProduceRecordView(destination=name, tenant="t", key="k", message=body, copy_sequence=5 + i, deliver_unix_ms=NOW + 5)
              for i, name in enumerate(("d", "d", "u"))]
    return (ProduceRequestView(records=[plain_, plain_]).SerializeToString(),
            ProduceRequestView(producer_id="\x022", records=copies[:2], copy_epoch=1 << 20, copy_previous=4).SerializeToString(),
            ProduceRequestView(producer_id="\x022", records=copies[2:], copy_epoch=1 << 20).SerializeToString(), *_produce_samples()[1:4])


@cache
def _leases() -> list[LeasedRun]:
    with node() as made:
        return made.runs


def _settle_samples() -> tuple[bytes, ...]:
    made = []
    for outcome in (OUTCOME_ACK, OUTCOME_RETRY, OUTCOME_EXTEND, 3, 4, 5, 6):
        one = AckRequest()
        for run in _leases():
            settlement = one.settlements.add(shard=run.shard, fencing_token=run.fencing_token, sequence=run.messages[0].sequence,
                                             outcome=outcome, reason="why")  # type: ignore[arg-type]
            settlement.delay.FromMilliseconds(1_000)
        made.append(one.SerializeToString())
    return (*made, AckScope(destinations=["d", "x*"]).SerializeToString() + made[0])


def _lease(data: bytes) -> None:
    """The first request of a Lease stream, or one that follows it."""
    request = _parse_lease(data)
    kind = request.WhichOneof("request")
    if kind == "subscribe":
        _check_subscribe(request.subscribe)
        if request.subscribe.HasField("lease_duration"):
            names.duration_ms("lease_duration", request.subscribe.lease_duration, LEASE_MS_MIN, LEASE_MS_MAX)
        expect(len({(h.shard, h.fencing_token) for h in request.subscribe.held}) <= len(data), data)
    elif kind == "credit":
        expect(-(1 << 63) <= request.credit.messages < 1 << 63, data)


def _lease_samples() -> tuple[bytes, ...]:
    subscribe = Subscribe(destinations=["d", "e*"], consumer="c", credit=Credit(messages=5, bytes=1 << 20), run_messages_max=3,
                          session="s" * 32, held=[HeldLease(shard=1, fencing_token=5 << 20)])
    subscribe.lease_duration.FromMilliseconds(5_000)
    return (LeaseRequest(subscribe=subscribe).SerializeToString(),
            LeaseRequest(credit=Credit(messages=-5, bytes=1 << 40)).SerializeToString())


# -- what other nodes tell ---------------------------------------------------------------------------------------------


def _share(made: Node) -> Callable[[bytes], Awaitable[object]]:
    world = made.world
    number = 0

    async def one(data: bytes) -> None:
        nonlocal number
        request = ShareRequest.FromString(data)
        number += 1
        request.number = number
        shares = world.node.shares
        shares.told(request).SerializeToString()
        await shares.divide_limits()
        (await shares.report()).SerializeToString()
        for name in (b"l", b"d", b"u"):
            shares.refusal(world.node.policy(name), name, name + b"\0t", 10)
        await world.admin("ListGates", pb.ListGatesRequest(destination="d"))
        await world.admin("Explain", pb.ExplainRequest(destination="l", tenant="t"))
        for scope in list(shares._remote_gates):
            world.node.remote_hold(scope, 0)
        shares._remote_gates.clear()

    return one


def _share_samples() -> tuple[bytes, ...]:
    scopes = [SharedScope(scope=b"l", message_bytes=400, oldest_unix_ms=NOW - 5_000, demand=2.5),
              SharedScope(scope=b"l\0t", message_bytes=80, oldest_unix_ms=NOW - 5), SharedScope(scope=b"u", demand=1.0),
              SharedScope(scope=b"d", parked_until_unix_ms=NOW + 5_000), SharedScope(scope=b"d\0t", opened=True)]
    return (ShareRequest(node_id="n2", number=1, scopes=scopes, asked=[b"l\0t", b"d\0t"]).SerializeToString(),)


def _answers(kind: str) -> Callable[[], Any]:
    def decode(made: Node) -> Callable[[bytes], Awaitable[object]]:
        forwarder, loop = made.world.forwarder, made.loop

        async def one(data: bytes) -> None:
            """An answer to what was passed on: it is taken whole, or not at all and then somebody may fail what waits for it."""
            call = Call(TOLD + 2, 10, loop, lambda call: None, False)
            call.waiting = 2
            if kind == "produce":
                batch = Batch(call, "", 0)
                batch.names, batch.bodies = [b"d\0t\0k"] * TOLD, [b""] * TOLD
                batch.positions = [0, 2, 3, 5]
                item: Any = (forwarder, 1, batch)
                answer = forward._produced
            else:
                settlements = {index: Settlement(shard=1, sequence=index) for index in (0, 2, 3, 5)}
                item = forward._Acks(forwarder, 1, call, settlements, loop.time() + 60)
                answer = forward._acked
            with mock.patch.object(loop, "call_later", lambda seconds, act, *rest: None):
                try:
                    answer(item, data)
                except WireInvalid:
                    expect(call.waiting == 2 and not call.errors and not any(call.results), "half of an answer was taken")
                    raise
            expect(call.waiting <= 2, call.waiting)
            if not call.waiting:
                (_produce_response if kind == "produce" else _ack_response)(call)

        return one

    return _of_node(decode)


_ERRORS = [ItemError(index=1, code=ERROR_CODE_UNAVAILABLE, field="records[1].tenant", description="why"),
           ItemError(index=3, code=ERROR_CODE_UNAVAILABLE, field="leader", description="moved")]


def _frames(made: Node) -> Callable[[bytes], Awaitable[object]]:
    """Leases of another node on their way through this one."""

    async def one(data: bytes) -> None:
        consumer = Consumer("c")
        sink = consumer.sink = Sink(consumer)
        proxy = forward.LeaseProxy(made.world.forwarder, Subscribe(credit=Credit(messages=9, bytes=9_000)), False, consumer, sink,
                                   lambda consumer, messages, size: None)
        proxy.credit(9, 9_000)
        proxy._pass_on("n2", data)

    return one


def _run() -> LeasedRun:
    message = Message(id="m", headers={"h": "v"}, payload=b"p")
    return LeasedRun(shard=1, fencing_token=5, expire_unix_ms=NOW, destination="d", tenant="t", key="k", messages=[
        LeasedMessage(sequence=i, attempt=1, enqueue_unix_ms=NOW, message=message) for i in (1, 2)])


# -- admin ------------------------------------------------------------------------------------------------------------


def _text(data: bytes) -> str | None:
    """What a string of the protocol can be."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _token(data: bytes) -> None:
    if (text := _text(data)) is None:
        return
    for read in (pages.token_bytes, pages.token_name, gates._key_of_token, lambda text: _dead_token(text, 16)):
        try:
            read(text)
        except RequestError:
            if len(data) % 2:  # each may refuse what another one takes
                raise


def _etag(data: bytes) -> None:
    if (text := _text(data)) is not None:
        expect(0 <= names.parse_etag("etag", text) < 1 << 64, text)


def _shards(made: Node) -> Callable[[bytes], Awaitable[object]]:
    service = AdminService(made.world.node, made.world.forwarder, peer=True)

    class Context:
        def __init__(self, value: str | None) -> None:
            self._value = value

        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return () if self._value is None else ((operations.SHARDS_METADATA, self._value),)

    async def one(data: bytes) -> None:
        context = Context(data[1:].decode("latin-1") if data else None)
        expect(service._shards_asked_for(context), data)
        plan = await service._plan(context)
        expect(set(plan) == {"n1"}, plan)

    return one


def _destination(data: bytes) -> None:
    """A destination that is accepted is applied, stored and shown by every node."""
    made = parse_destination(pb.Destination.FromString(data))
    directory = d.Directory()
    (change,), puts, _ = directory.apply(1, d.encode_command([d.PutDestination("n1", 1, made, True, False, 0)]))
    expect(change.outcome == d.OK, made)
    again = d.Directory()
    again.load(iter(puts))
    expect(again.destinations == directory.destinations, made)
    shown = destination_proto(again.destinations[made.name])
    expect(parse_destination(pb.Destination.FromString(shown.SerializeToString())) == made, made)


def _route(data: bytes) -> None:
    """As a destination."""
    made = parse_route(pb.Route.FromString(data))
    directory = d.Directory()
    targets = [d.PutDestination("n1", 1, d.destination(target.destination, Policy()), True, True, 0) for target in made.targets]
    change = directory.apply(1, d.encode_command([*targets, d.PutRoute("n1", 2, made, True, False, 0)]))[0][-1]
    expect(change.outcome in (d.OK, d.TAKEN, d.CYCLE), made)
    expect(parse_route(route_proto(made)) == made, made)




def destination_sample() -> pb.Destination:
    """One with everything. The core takes ages that are shorter than what may be asked for."""
    return destination_proto(d.destination("d", replace(POLICY, tenants={"t": TenantPolicy(0.5, Limit(2.0), Retention(5, 6_000))}), HTTP))


def route_sample() -> pb.Route:
    """One with everything."""
    return pb.Route(source="r", etag="7", targets=[
        pb.RouteTarget(destination="d", filter='tenant == "t"', over_budget=pb.OVER_BUDGET_SKIP),
        pb.RouteTarget(destination="e", filter='headers.h.matches("a+")')])


# -- settings ---------------------------------------------------------------------------------------------------------

_TOML = b"""node_id = "n2"
listen = "[::1]:7070"
peers = ["n1=a:1/b:2", "n2=c:3/d:4"]  # both
shards = 32
auto_create = false
payload_bytes_max = 1_000_000
log_level = 'debug'
"""


@contextmanager
def _config() -> Iterator[Decode]:
    parser, fields = config_module.parser(), config_module._fields()
    with ExitStack() as stack:
        name = stack.enter_context(TemporaryDirectory())
        stack.enter_context(mock.patch.object(config_module, "parser", lambda: parser))
        stack.enter_context(mock.patch.object(config_module, "_fields", lambda: fields))
        file = stack.enter_context(Rewritten(Path(name) / "spillway.toml"))

        def decode(data: bytes) -> None:
            """A settings file; or, with a first byte of 0, variables of the environment."""
            if data[:1] == b"\0":
                found = {"SPILLWAY_" + key.decode("latin-1"): value.decode("utf-8", "surrogateescape") for key, value in pairs(data[1:])
                         if key != b"CONFIG"}
                config = load((), found)
            else:
                file.write(data)
                config = load(("--config", str(file.path)), {})
            expect(members_of(config), config)

        yield decode


def _config_samples() -> tuple[bytes, ...]:
    return (_TOML, b"\0" + join((b"NODE_ID", b"n7", b"SHARDS", b"5", b"AUTO_CREATE", b"no", b"PEERS", b"n7=a:1/b:2, n8=c:3/d:4",
                                 b"LISTEN", b"0.0.0.0:1", b"ALLOW_INSECURE", b"1", b"DISK_FREE_BYTES_MIN", b"0")))


@contextmanager
def _data_dir() -> Iterator[Decode]:
    with TemporaryDirectory() as name:
        settings = NodeConfig(data_dir=name)
        claim(settings)
        with Rewritten(Path(name) / "node.json") as file:

            def decode(data: bytes) -> None:
                file.write(data)
                claim(settings)

            yield decode


_NODE_JSON = b'{"format": 1, "node_id": "n1", "cluster": "spillway", "shards": 16, "replicas": 3}'


def decoders() -> list[Decoder]:
    """All of them."""
    request, peer = (RequestError,), (WireInvalid,)
    services, runtime = "spillway.broker.services.", "spillway.broker.runtime."
    produce = (services + "produce", services + "names", services + "fanout")
    answer = ProduceResponse(sequences=[1, 2, 3, 4]), ProduceResponse(sequences=[1, 0, 3, 0], errors=_ERRORS)
    acked = AckResponse(results=[1, 2, 1, 1]), AckResponse(results=[1, 3, 1, 3], errors=_ERRORS)
    return [
        Decoder("produce-request", _intake(peer=False), request, _produce_samples(), produce),
        Decoder("produce-request-of-peer", _intake(peer=True), request, _peer_samples(), produce),
        Decoder("ack-request", _of_node(_settle), request, _settle_samples(), (services + "queue", services + "names")),
        Decoder("lease-request", plain(_lease), request, _lease_samples(), (services + "queue", services + "names")),
        # What gRPC cannot parse it refuses by itself.
        Decoder("share-request", _of_node(_share), (DecodeError,), _share_samples(), (runtime + "shares",)),
        Decoder("produce-answer-of-peer", _answers("produce"), peer, tuple(a.SerializeToString() for a in answer), (runtime + "forward",)),
        Decoder("ack-answer-of-peer", _answers("ack"), peer, tuple(a.SerializeToString() for a in acked), (runtime + "forward",)),
        Decoder("lease-frame-of-peer", _of_node(_frames), peer, (LeaseResponse(runs=[_run(), _run()]).SerializeToString(),
                                                                 LeaseResponse(draining=True).SerializeToString()), (runtime + "forward",)),
        Decoder("shards-of-peer", _of_node(_shards), (RequestError, Unavailable), (b".1,2", b".2"), (services + "operations",)),
        Decoder("page-token", plain(_token), request, (pages.token(b"\0\0\0\1dd\0t").encode(), pages.token(b"\1\2tenant").encode(), b""),
                (services + "pages", services + "gates", services + "admin")),
        Decoder("etag", plain(_etag), request, (b"17", b""), (services + "names",)),
        Decoder("destination-request", plain(_destination), (RequestError, DecodeError), (
            destination_sample().SerializeToString(), pb.Destination(name="d").SerializeToString()),
                (services + "destinations",)),
        Decoder("route-request", plain(_route), (RequestError, DecodeError), (route_sample().SerializeToString(),),
                (services + "routes", "spillway.broker.core.filters")),
        Decoder("config", _config, (ConfigError,), _config_samples(), ("spillway.broker.config",)),
        Decoder("data-directory", _data_dir, (DataDirError,), (_NODE_JSON,), ("spillway.broker.datadir",)),
    ]
