"""Producers, consumers and operators: what they do comes from the seed, what they are told is checked at once.

They are plain clients of the public protocol. A producer with an id sends again, in order, whatever was not acknowledged; one
without does so with records that have a dedup id, and sends all others once. `applications` are those that use the product's own client.
"""
from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import TYPE_CHECKING, Any

import grpc
from spillway.contract.hashing import queue_key, shard_of
from spillway.v1 import admin_service_pb2 as admin
from spillway.v1 import cluster_service_pb2 as cluster
from spillway.v1.admin_service_pb2_grpc import AdminServiceStub
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub
from spillway.v1.message_pb2 import ERROR_CODE_OUT_OF_SEQUENCE, ERROR_CODE_STALE_TOKEN, ItemError, Message
from spillway.v1.queue_service_pb2 import (
    OUTCOME_ACK,
    OUTCOME_DOWN,
    OUTCOME_EXTEND,
    OUTCOME_REJECT,
    OUTCOME_RELEASE,
    OUTCOME_RETRY,
    OUTCOME_THROTTLED,
    SETTLEMENT_RESULT_OK,
    SETTLEMENT_RESULT_REFUSED,
    AckRequest,
    AckResponse,
    Credit,
    HeldLease,
    LeasedRun,
    LeaseRequest,
    LeaseResponse,
    ProduceRecord,
    ProduceRequest,
    ProduceResponse,
    Settlement,
    Subscribe,
)

from tests.simulation.cluster.loop import Process
from tests.simulation.cluster.rpc import EOF, Channel
from tests.simulation.cluster.violation import Violation

if TYPE_CHECKING:
    from tests.simulation.cluster.world import World

BROKEN = (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError)
REPLY_SECONDS = 15.0  # a client gives an answer up then
CREDIT_BYTES = 1 << 20


class Sent:
    """A record of a producer."""

    __slots__ = ("body", "number", "queue", "record", "shard")

    def __init__(self, record: ProduceRecord, shards: int) -> None:
        self.record = record
        self.queue = queue_key(record.destination, record.tenant, record.key)
        self.shard = shard_of(self.queue, shards)
        self.body = record.message.SerializeToString()
        self.number = 0


class Client:
    """What all have: a name, a process of their own, channels."""

    MAY_RAISE: tuple[type[BaseException], ...] | None = None
    """See Process."""

    def __init__(self, world: World, name: str, rnd: random.Random | None = None) -> None:
        self.world = world
        self.rnd = rnd or random.Random(world.rnd.getrandbits(64))
        self.process = Process(name, self.MAY_RAISE)
        self.channels = {node: Channel(world.rpc, self.process, f"{node}:1") for node in world.names}

    def channel(self) -> Channel:
        """To any node."""
        return self.channels[self.rnd.choice(self.world.names)]

    async def run(self) -> None:
        """What it does."""
        raise NotImplementedError

    def start(self, coroutine: Any) -> None:
        """Runs it as this process."""
        task = self.world.loop.spawn(self.process, coroutine)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.world.failed(error)


class Source(Client):
    """Draws the records that a producer sends to `queues`. `ordered`: each once, in order."""

    def __init__(self, world: World, name: str, queues: list[tuple[str, str, str]], count: int, ordered: bool) -> None:
        super().__init__(world, name)
        self.queues = queues
        self.left = count
        self.ordered = ordered
        self.pending: deque[Sent] = deque()
        """Records without an outcome."""
        self.serial = 0

    @property
    def done(self) -> bool:
        """Everything is acknowledged, or given up."""
        raise NotImplementedError

    def draw(self) -> Sent:
        """The next record."""
        rnd, world = self.rnd, self.world
        self.left -= 1
        self.serial += 1
        destination, tenant, key = rnd.choice(self.queues)
        payload = f"{destination}/{self.process.name}/{self.serial}".encode() + b"." * rnd.choice((0, 0, 20, 300))
        record = ProduceRecord(destination=destination, tenant=tenant, key=key, message=Message(payload=payload))
        if rnd.random() < world.options.delayed:
            record.delay.FromMilliseconds(rnd.choice((5, 300, 4000)))
        if world.options.dedup and rnd.random() < world.options.dedup:
            record.dedup_id = f"{self.process.name}/{self.serial}"
        if world.options.ttl and rnd.random() < world.options.ttl:
            record.ttl.FromMilliseconds(rnd.choice((1, 500, 5000)))
        world.counts["messages sent"] += 1
        return Sent(record, world.options.shards)


class Producer(Source):
    """See the module."""

    def __init__(self, world: World, name: str, queues: list[tuple[str, str, str]], count: int, producer_id: str) -> None:
        super().__init__(world, name, queues, count, bool(producer_id))
        self.producer_id = producer_id
        self.numbers: dict[int, int] = {}
        self.waiting = False  # for answers

    @property
    def unsent(self) -> bool:
        """Something is to be sent, for the first time or again."""
        return bool(self.left or self.pending)

    @property
    def done(self) -> bool:
        """Everything is acknowledged, or given up."""
        return not self.unsent and not self.waiting

    def _new(self, count: int) -> None:
        for _ in range(min(count, self.left)):
            sent = self.draw()
            if self.producer_id:
                sent.number = self.numbers[sent.shard] = self.numbers.get(sent.shard, 0) + 1
                sent.record.producer_sequence = sent.number
            self.pending.append(sent)

    async def run(self) -> None:
        """Until all is sent."""
        rnd = self.rnd
        while self.unsent:
            call = self.channel().stream_stream("/spillway.v1.QueueService/Produce")()
            try:
                for _ in range(rnd.choice((3, 10, 40))):
                    if not self.unsent:
                        break
                    if not self.world.calm:
                        await asyncio.sleep(rnd.expovariate(1 / self.world.options.pause))
                    if not self.pending or (self.producer_id and len(self.pending) < 20):
                        self._new(rnd.choice((1, 1, 3, 12)))
                    self.waiting = True
                    if not await self._send(call):
                        await asyncio.sleep(rnd.uniform(0.02, 0.3))
                        break
            except BROKEN:
                await asyncio.sleep(rnd.uniform(0.01, 0.5))
            finally:
                self.waiting = False
                call.cancel()

    async def _send(self, call: Any) -> bool:
        """Some requests at once, as many as chance wants, and their answers; false if something has to be sent again."""
        records = list(self.pending)
        size = max(1, self.rnd.choice((1, 4, 16, 64)))
        batches = [records[i:i + size] for i in range(0, len(records), size)][:4]
        if not self.producer_id:
            for batch in batches:
                for _ in batch:
                    sent = self.pending.popleft()  # whose outcome is unknown is not sent again
                    if sent.record.dedup_id:
                        self.pending.append(sent)
        for batch in batches:
            await call.write(ProduceRequest(producer_id=self.producer_id, records=[s.record for s in batch]).SerializeToString())
        good = True
        for batch in batches:
            async with asyncio.timeout(REPLY_SECONDS):
                data = await call.read()
            if data is EOF:
                return False
            good &= self._answered(batch, ProduceResponse.FromString(data))
        return good

    def _answered(self, batch: list[Sent], response: ProduceResponse) -> bool:
        world = self.world
        if len(response.sequences) != len(batch):
            raise Violation("bug", f"{len(response.sequences)} answers to {len(batch)} records")
        for sent, sequence in zip(batch, response.sequences, strict=True):
            if sequence:
                world.acknowledged(self, sent, sequence)
                if sent in self.pending:
                    self.pending.remove(sent)
        for error in response.errors:
            world.counts[f"produce error {error.code}"] += 1
            if error.code == ERROR_CODE_OUT_OF_SEQUENCE and not self.producer_id:
                raise Violation("bug", "a record without a producer is out of sequence")
        return not response.errors


class Held:
    """A lease that a consumer has."""

    def __init__(self, run: LeasedRun) -> None:
        self.run = run
        self.done = 0  # messages whose acknowledgement was sent


class Consumer(Client):
    """Leases from some destinations and settles with outcomes from the seed. Once the world is calm it acknowledges all."""

    def __init__(self, world: World, name: str, patterns: list[str], session: bool) -> None:
        super().__init__(world, name)
        self.patterns = patterns
        self.session = f"s-{name}" if session else ""
        self.held: dict[tuple[int, int], Held] = {}

    async def run(self) -> None:
        """For ever."""
        rnd = self.rnd
        while True:
            lease = self.channel().stream_stream("/spillway.v1.QueueService/Lease")()
            ack = self.channel().stream_stream("/spillway.v1.QueueService/Ack")()
            try:
                await self._consume(lease, ack)
            except BROKEN:
                self.world.counts["streams broken"] += 1
            finally:
                lease.cancel()
                ack.cancel()
            if not self.session or rnd.random() < 0.3:
                self.held.clear()  # forgotten: they expire, or, with a session, are given back
            await asyncio.sleep(rnd.uniform(0.01, 0.4))

    async def _consume(self, lease: Any, ack: Any) -> None:
        rnd, world = self.rnd, self.world
        calm = world.calm
        subscribe = Subscribe(destinations=self.patterns, consumer=self.process.name, session=self.session,
                              credit=Credit(messages=200 if calm else rnd.choice((1, 5, 40)), bytes=CREDIT_BYTES),
                              run_messages_max=0 if calm else rnd.choice((0, 0, 1, 3)))
        subscribe.lease_duration.FromMilliseconds(rnd.choice((1000, 2000, 5000)))
        if self.session:
            subscribe.held.extend(HeldLease(shard=s, fencing_token=t) for s, t in self.held)
        await lease.write(LeaseRequest(subscribe=subscribe).SerializeToString())
        credit = subscribe.credit.messages
        for held in list(self.held.values()):  # of an earlier stream
            await self._work(held, ack)
        patience = 12.0 if world.calm else rnd.choice((2.0, 6.0, 12.0))
        frugal = not calm and rnd.random() < 0.3  # gives no more credit, and looks whether it is sent more all the same
        for _ in range(rnd.choice((5, 30, 100))):
            if world.calm and not calm:
                return  # to take more at a time
            async with asyncio.timeout(patience if credit else 0.5):
                data = await lease.read()
            if data is EOF:
                return
            response = LeaseResponse.FromString(data)
            messages = 0
            for run in response.runs:
                world.delivered(self, run)
                held = self.held[run.shard, run.fencing_token] = Held(run)
                messages += len(run.messages)
            credit -= messages
            if credit < 0:
                raise Violation("credit", f"{self.process.name} was sent {-credit} messages beyond its credit")
            if world.calm:
                await self._acknowledge_all(ack)
            for run in response.runs:
                held = self.held.get((run.shard, run.fencing_token))
                if held is not None:
                    await self._work(held, ack)
            if messages and not frugal:
                credit += messages
                await lease.write(LeaseRequest(credit=Credit(messages=messages, bytes=CREDIT_BYTES)).SerializeToString())

    async def _acknowledge_all(self, ack: Any) -> None:
        """Whatever is held, in one request: a calm consumer keeps up."""
        settlements = [Settlement(shard=held.run.shard, fencing_token=held.run.fencing_token, sequence=held.run.messages[-1].sequence,
                                  outcome=OUTCOME_ACK) for held in self.held.values()]
        self.held.clear()
        if settlements:
            await ack.write(AckRequest(settlements=settlements).SerializeToString())
            async with asyncio.timeout(REPLY_SECONDS):
                data = await ack.read()
            if data is not EOF:
                for settlement, result in zip(settlements, AckResponse.FromString(data).results, strict=True):
                    if result == SETTLEMENT_RESULT_OK:
                        self._settled(settlement)
                for error in AckResponse.FromString(data).errors:
                    self._refused(settlements[error.index], error)

    async def _work(self, held: Held, ack: Any) -> None:
        """Settles a lease, message by message or some at a time; or lets it hang."""
        rnd, world = self.rnd, self.world
        run = held.run
        key = run.shard, run.fencing_token
        calm = world.calm
        if not calm and rnd.random() < world.options.hang:
            self.held.pop(key, None)
            world.counts["leases left to expire"] += 1
            return
        at = held.done
        while at < len(run.messages):
            if not calm:
                await asyncio.sleep(rnd.choice((0.0, 0.001, 0.02, 0.2 if rnd.random() < 0.1 else 0.0)))
            step = len(run.messages) - at if calm else rnd.randint(1, len(run.messages) - at)
            at += step
            outcome = OUTCOME_ACK if calm or rnd.random() < world.options.success else rnd.choice(
                (OUTCOME_RETRY, OUTCOME_RETRY, OUTCOME_THROTTLED, OUTCOME_DOWN, OUTCOME_REJECT, OUTCOME_RELEASE, OUTCOME_EXTEND))
            first, last = run.messages[held.done], run.messages[at - 1]
            message = last if outcome == OUTCOME_ACK else first
            settlement = Settlement(shard=run.shard, fencing_token=run.fencing_token, sequence=message.sequence, outcome=outcome,
                                    reason="simulated" if outcome in (OUTCOME_RETRY, OUTCOME_REJECT) else "")
            if outcome in (OUTCOME_RETRY, OUTCOME_THROTTLED, OUTCOME_DOWN) and rnd.random() < 0.7:
                settlement.delay.FromMilliseconds(rnd.choice((1, 50, 1000)))
            world.counts[f"outcome {outcome}"] += 1
            result = await self._settle(ack, settlement, run)
            if outcome == OUTCOME_EXTEND and result != SETTLEMENT_RESULT_REFUSED:
                at = held.done
                if rnd.random() < 0.5:
                    continue
            held.done = at
            if result == SETTLEMENT_RESULT_REFUSED or outcome != OUTCOME_ACK:
                break
        self.held.pop(key, None)

    async def _settle(self, ack: Any, settlement: Settlement, run: LeasedRun) -> int:
        again = 2 if self.rnd.random() < 0.05 else 1
        for _ in range(again):
            await ack.write(AckRequest(settlements=[settlement]).SerializeToString())
        result = 0
        for number in range(again):
            async with asyncio.timeout(REPLY_SECONDS):
                data = await ack.read()
            if data is EOF:
                raise TimeoutError
            response = AckResponse.FromString(data)
            if len(response.results) != 1:
                raise Violation("bug", f"{len(response.results)} answers to one settlement")
            if not number:
                result = response.results[0]
            if response.results[0] == SETTLEMENT_RESULT_OK:
                self._settled(settlement)
            for error in response.errors:
                self._refused(settlement, error)
        return result

    def _settled(self, settlement: Settlement) -> None:
        self.world.settled(self, settlement.shard, settlement.fencing_token, settlement.outcome, settlement.sequence)

    def _refused(self, settlement: Settlement, error: ItemError) -> None:
        if error.code == ERROR_CODE_STALE_TOKEN:
            self.world.over(settlement.shard, settlement.fencing_token)


class Operator(Client):
    """Creates destinations, changes policies, pauses, purges and redrives."""

    ACTIONS: tuple[str, ...] = ("update", "update", "pause", "resume", "redrive", "redrive", "purge", "unpark", "stats", "peek", "explain")
    RATE = 0.7  # actions in a second
    idle = True
    finished = False

    async def create(self, destinations: list[admin.Destination], routes: list[admin.Route]) -> None:
        """What the run needs."""
        for destination in destinations:
            await self._call("CreateDestination", admin.CreateDestinationRequest(destination=destination))
        for route in routes:
            await self._call("CreateRoute", admin.CreateRouteRequest(route=route))

    async def run(self) -> None:
        """Something now and then, until the world is calm."""
        rnd, world = self.rnd, self.world
        self.idle = False
        names = [d.name for d in world.destinations]
        while not world.calm:
            await asyncio.sleep(rnd.expovariate(self.RATE))
            name = rnd.choice(names)
            what = rnd.choice(self.ACTIONS)
            world.counts[f"operator: {what}"] += 1
            if what == "purge":
                if not world.options.purges:
                    continue
                world.purged.add(name)
            await self._act(what, name)
        self.idle = True

    async def finish(self) -> None:
        """Opens what is closed, and lifts all limits: what is left is to be delivered soon."""
        while not self.idle:
            await asyncio.sleep(0.05)
        for destination in self.world.destinations:
            await self._open(admin.Destination(name=destination.name, policy=admin.DeliveryPolicy(ordering=destination.policy.ordering)))
        self.finished = True

    async def _open(self, destination: admin.Destination) -> None:
        await self._call("UpdateDestination", admin.UpdateDestinationRequest(destination=destination))
        await self._call("ResumeDelivery", admin.ResumeDeliveryRequest(destination=destination.name))

    async def _act(self, what: str, name: str) -> None:
        """One of the actions, on a destination."""
        match what:
            case "update":
                destination = self.world.draw_destination(self.rnd, name)
                await self._call("UpdateDestination", admin.UpdateDestinationRequest(destination=destination))
            case "pause":
                await self._call("PauseDelivery", admin.PauseDeliveryRequest(destination=name, reason="simulated"))
            case "resume":
                await self._call("ResumeDelivery", admin.ResumeDeliveryRequest(destination=name))
            case "redrive":
                await self._call("RedriveDeadLetters", admin.RedriveDeadLettersRequest(destination=name, messages_per_second=1000))
            case "purge":
                await self._call("PurgeMessages", admin.PurgeMessagesRequest(destination=name))
            case "unpark":
                await self._call("UnparkDelivery", admin.UnparkDeliveryRequest(destination=name))
            case "stats":
                await self._call("GetDestinationStats", admin.GetDestinationStatsRequest(name=name))
            case "peek":
                await self._call("PeekMessages", admin.PeekMessagesRequest(destination=name, tenant="t0", key="k0"))
            case "explain":
                await self._call("Explain", admin.ExplainRequest(destination=name))

    async def _call(self, method: str, request: Any) -> Any:
        """One call, again until it is answered; None if it was refused."""
        while True:
            try:
                call = getattr(AdminServiceStub(self.channel()), method)(request, timeout=10.0)
                if method == "RedriveDeadLetters":
                    return [part async for part in call]
                return await call
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                    if self.world.calm or method == "CreateDestination":
                        await asyncio.sleep(self.rnd.uniform(0.05, 0.5))
                        continue
                    return None
                if error.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
                    raise Violation("bug", f"{method}: {error.code().name}: {error.details()}") from None
                return None


class Drainer(Client):
    """Drains nodes and takes them back, with random numbers of its own. One or none is left drained in the end."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, random.Random(f"drains {world.seed}"))
        self.finished = not world.options.drains

    async def run(self) -> None:
        """Now and then, until the world is calm; then until it is as it is to be left."""
        rnd, world = self.rnd, self.world
        while not world.calm:
            await asyncio.sleep(rnd.expovariate(world.options.drains))
            await self._call(rnd.choice(("DrainNode", "DrainNode", "UndrainNode")), rnd.choice(world.names))
        drained = rnd.choice((None, *world.names))
        for name in world.names:
            while name != drained and not await self._call("UndrainNode", name):
                await asyncio.sleep(0.2)
        self.finished = True

    async def _call(self, method: str, name: str) -> bool:
        """Whether it was answered; too few nodes are left for some drains."""
        request = cluster.DrainNodeRequest if method == "DrainNode" else cluster.UndrainNodeRequest
        try:
            await getattr(ClusterServiceStub(self.channel()), method)(request(node_id=name), timeout=10.0)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
                raise Violation("bug", f"{method}: {error.code().name}: {error.details()}") from None
            return error.code() is grpc.StatusCode.INVALID_ARGUMENT
        self.world.counts[f"members: {'drain' if method == 'DrainNode' else 'undrain'}"] += 1
        return True
