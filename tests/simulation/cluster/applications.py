"""Producers, consumers and operators that use the product's own client, as applications do: everything of it is real but the network,
the clock and chance."""
from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

import grpc
from spillway.broker.services.changes import BEHIND_SECONDS
from spillway.client import (
    Admin,
    AlreadyExists,
    BufferFull,
    Client,
    Closed,
    Consumer,
    ConsumerState,
    Destination,
    DestinationNotFound,
    GateCause,
    InvalidArgument,
    LeasedRun,
    OutcomeUnknown,
    PartialFailure,
    Producer,
    Receipt,
    Record,
    SendTimeout,
    Settlement,
    SpillwayError,
    StaleLease,
    Unavailable,
    retry,
    security,
)
from spillway.client import consumer as consumer_module
from spillway.client import producer as producer_module
from spillway.client.admin_wire import destination_from_pb, route_from_pb
from spillway.v1 import admin_service_pb2 as admin_pb
from spillway.v1.queue_service_pb2 import OUTCOME_ACK, OUTCOME_RELEASE, AckRequest, Credit, LeaseRequest, LeaseResponse, Subscribe
from spillway.v1.queue_service_pb2 import LeasedRun as LeasedRunProto
from spillway.v1.queue_service_pb2 import Settlement as SettlementProto

from tests.simulation.cluster import clients
from tests.simulation.cluster.backups import shard_in
from tests.simulation.cluster.clients import Sent, Source
from tests.simulation.cluster.loop import PROCESS, Process
from tests.simulation.cluster.node import START_MS, Secrets
from tests.simulation.cluster.rpc import EOF
from tests.simulation.cluster.violation import Violation

if TYPE_CHECKING:
    from tests.simulation.cluster.world import World

T = TypeVar("T")
U = TypeVar("U")

UNANSWERED_MAX = 60  # records of a producer
HELD_MAX = 8  # runs that a consumer's handlers have at a time
PATIENT_SECONDS = 3600.0  # a producer that is closed waits for all
HASTY_SECONDS = 0.1  # or gives up what is not stored soon


class _Application(clients.Client):
    """What both have: a clock that may be wrong, and pauses."""

    MAY_RAISE = (SpillwayError, grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError, Violation)

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.skew_seconds = self.rnd.choice((0.0, 0.0, -20.0, -1.5, 1.5, 20.0))

    def client(self) -> Client:
        """Of the product."""
        addresses = [f"{name}:1" for name in self.world.names]
        self.rnd.shuffle(addresses)
        return Client(addresses)

    def task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """In this process; its errors end the run."""
        task = asyncio.get_running_loop().create_task(coroutine)
        task.add_done_callback(self._ended)
        return task

    def stall(self) -> None:
        """Now and then the process stands still for a while."""
        if not self.world.calm and self.rnd.random() < 0.01:
            self.world.counts["applications paused"] += 1
            self.world.loop.pause(self.process, self.rnd.choice((0.05, 0.5, 2.0, 6.0)))


class ProducingApplication(Source, _Application):
    """Sends in all ways that a Producer has. Each record comes to one of the ends that its documentation names, and that is true.
    Those with a dedup id are sent until they are stored."""

    def __init__(self, world: World, name: str, queues: list[tuple[str, str, str]], count: int) -> None:
        super().__init__(world, name, queues, count, ordered=True)
        self._finished = False
        self._hasty = False
        self._doubtful: set[bytes] = set()
        """Payloads that the present producer may have on their way, and nobody waits for."""
        self._again: deque[Sent] = deque()
        """Records with a dedup id that are to be sent once more."""

    @property
    def done(self) -> bool:
        """See Source."""
        return self._finished

    @property
    def unsent(self) -> int:
        """Records that are to be sent, for the first time or again."""
        return self.left + len(self._again)

    async def run(self) -> None:
        """Until all is sent, by one Producer after another."""
        rnd, world = self.rnd, self.world
        async with self.client() as client:
            while self.unsent:
                hasty = not world.calm and rnd.random() < 0.1
                async with client.producer(linger=rnd.choice((0.0, 0.0, 0.02)), in_flight_bytes_max=rnd.choice((2000, 64 << 20)),
                                           producer_id=rnd.choice((None, self.process.name)),
                                           close_timeout=HASTY_SECONDS if hasty else PATIENT_SECONDS) as producer:
                    await self._send_some(producer, rnd.choice((5, 40, self.unsent)))
                    if rnd.random() < 0.2:
                        await producer.flush()
                    elif rnd.random() < 0.8:
                        while self.pending:
                            await asyncio.sleep(0.02)
                    self._hasty = hasty
                await asyncio.sleep(0.1)  # whoever waits for an outcome hears it
                self._hasty = False
                if hasty:
                    world.late_payloads |= self._doubtful
                self._doubtful.clear()
                if self.pending:
                    raise Violation("bug", f"{self.process.name} closed its producer, and {len(self.pending)} records have no outcome")
        self._finished = True

    async def _send_some(self, producer: Producer, count: int) -> None:
        rnd, world = self.rnd, self.world
        until = max(0, self.unsent - count)
        while self.unsent > until:
            if not world.calm:
                await asyncio.sleep(rnd.expovariate(1 / world.options.pause))
                self.stall()
            while len(self.pending) >= UNANSWERED_MAX:
                await asyncio.sleep(0.02)
            timeout = None if world.calm or rnd.random() < 0.9 else rnd.choice((0.02, 0.5, 4.0))
            what = rnd.random()
            if what < 0.4:
                self._cancel_some(self.task(self._send(producer, self._next(), timeout)))
                await asyncio.sleep(0)  # it is handed in before the next one is
            elif what < 0.7:
                records = [self._next() for _ in range(min(self.unsent, rnd.choice((2, 5, 30))))]
                if records:
                    self._cancel_some(self.task(self._send_many(producer, records, timeout)))
                    await asyncio.sleep(0)
            elif what < 0.95:
                self._send_nowait(producer, self._next())
                if self._again:
                    await asyncio.sleep(0.01)  # there may have been no room
            else:
                await producer.flush()

    def _cancel_some(self, sending: asyncio.Task[None]) -> None:
        if not self.world.calm and self.rnd.random() < 0.05:
            asyncio.get_running_loop().call_later(self.rnd.choice((0.0, 0.002, 0.3)), sending.cancel)

    def _next(self) -> Sent:
        """A new record, or one once more."""
        if self._again and (not self.left or self.rnd.random() < 0.5):
            self.world.counts["sends repeated"] += 1
            sent = self._again.popleft()
        else:
            sent = self.draw()
            if sent.record.dedup_id and self.rnd.random() < 0.1:
                self._repeat(sent)
        self.pending.append(sent)
        return sent

    def _repeat(self, sent: Sent) -> None:
        """Until it is known to be stored; once and somewhere, as nobody knows which copy counts."""
        self.world.late_payloads.add(sent.record.message.payload)
        self._again.append(sent)

    @staticmethod
    def _fields(sent: Sent) -> dict[str, Any]:
        """What all ways to send take of a record."""
        record = sent.record
        return {"destination": record.destination, "payload": record.message.payload, "tenant": record.tenant, "key": record.key,
                "delay": record.delay.ToTimedelta().total_seconds() if record.HasField("delay") else None,
                "ttl": record.ttl.ToTimedelta().total_seconds() if record.HasField("ttl") else None, "dedup_id": record.dedup_id}

    async def _send(self, producer: Producer, sent: Sent, timeout: float | None) -> None:
        try:
            receipt = await producer.send(**self._fields(sent), timeout=timeout)
        except SpillwayError as error:
            self._failed(sent, error)
        except asyncio.CancelledError:
            self._cancelled([sent])
        else:
            self._stored(sent, receipt)

    async def _send_many(self, producer: Producer, records: list[Sent], timeout: float | None) -> None:
        try:
            receipts: Sequence[Receipt | None] = await producer.send_many([Record(**self._fields(sent)) for sent in records],
                                                                                 timeout=timeout)
            errors: Mapping[int, SpillwayError] = {}
        except PartialFailure as failure:
            receipts, errors = failure.receipts, failure.errors
        except (SendTimeout, Closed) as error:  # before any was handed in
            receipts, errors = [None] * len(records), dict.fromkeys(range(len(records)), error)
        except asyncio.CancelledError:
            self._cancelled(records)
            return
        for i, (sent, receipt) in enumerate(zip(records, receipts, strict=True)):
            if (receipt is None) != (i in errors):
                raise Violation("bug", f"record {i} of {self.process.name} has receipt {receipt} and error {errors.get(i)!r}")
            if receipt is not None:
                self._stored(sent, receipt)
            else:
                self._failed(sent, errors[i])

    def _send_nowait(self, producer: Producer, sent: Sent) -> None:
        try:
            future = producer.send_nowait(**self._fields(sent))
        except (BufferFull, Unavailable):
            self.world.counts["sends without room"] += 1
            self._refused(sent)
            return

        def concluded(done: asyncio.Future[Receipt]) -> None:
            error = done.exception()
            try:
                if error is None:
                    self._stored(sent, done.result())
                elif isinstance(error, SpillwayError):
                    self._failed(sent, error)
                else:
                    raise error
            except Exception as wrong:
                self.world.failed(wrong)
        future.add_done_callback(concluded)

    def _stored(self, sent: Sent, receipt: Receipt) -> None:
        self.pending.remove(sent)
        if receipt.shard != sent.shard or bool(receipt.sequence) == receipt.duplicate:
            raise Violation("bug", f"{receipt} for a record of shard {sent.shard}")
        if receipt.duplicate:
            self.world.counts["receipts of duplicates"] += 1
        self.world.acknowledged(self, sent, 1 if receipt.duplicate else receipt.sequence)

    def _cancelled(self, records: list[Sent]) -> None:
        """Those that went out may be stored."""
        self.world.counts["sends cancelled"] += len(records)
        for sent in records:
            self._unknown(sent)

    def _failed(self, sent: Sent, error: SpillwayError) -> None:
        """A record fails here only because its time is over, or because the producer is closed: no destination is missing, no node
        forgets a producer."""
        if isinstance(error, SendTimeout):
            self.world.counts["sends timed out"] += 1
        elif isinstance(error, Closed):
            self.world.counts["sends turned away at the end"] += 1
        elif isinstance(error, OutcomeUnknown) and self._hasty:
            self.world.counts["sends given up at the end"] += 1
        else:
            raise Violation("bug", f"a record of {self.process.name} failed: {type(error).__name__}: {error}")
        if isinstance(error, OutcomeUnknown) or (isinstance(error, SendTimeout) and error.outcome_unknown):
            self._unknown(sent)
        else:
            self._refused(sent)

    def _unknown(self, sent: Sent) -> None:
        """It may be, or become, stored."""
        self.pending.remove(sent)
        if sent.record.dedup_id:
            self._repeat(sent)
        else:
            self._doubtful.add(sent.record.message.payload)

    def _refused(self, sent: Sent) -> None:
        """It is not stored, the client says."""
        self.pending.remove(sent)
        if sent.record.dedup_id:
            self._repeat(sent)
        else:
            self.world.refused_payloads.add(sent.record.message.payload)


class ConsumingApplication(_Application):
    """Takes runs and settles them in all ways that a Consumer has. Once the world is calm it acknowledges all. It may be killed; then
    another one takes its place."""

    def __init__(self, world: World, name: str, patterns: list[str]) -> None:
        super().__init__(world, name)
        self.patterns = patterns
        self.lasting = self.rnd.random() < 0.5
        """Whether a consumer that faults have hit has to go on by itself once they are over; otherwise a new one takes its place."""
        self.consumer: Consumer | None = None

    async def run(self) -> None:
        """For ever."""
        rnd, world = self.rnd, self.world
        while True:
            async with self.client() as client:
                while True:
                    calm = world.calm
                    async with client.consumer(
                            self.patterns, name=self.process.name, credit_messages=200 if calm or self.lasting else rnd.choice((1, 5, 40)),
                            run_messages_max=0 if calm else rnd.choice((0, 0, 1, 3)), lease_seconds=rnd.choice((None, 1.0, 2.0, 5.0)),
                            lease_total_max=3600.0 if calm else rnd.choice((3.0, 3600.0)), on_stale=self._stale) as consumer:
                        self.consumer = consumer
                        await self._consume(consumer, calm)
                        self.consumer = None
                    if not calm and rnd.random() < 0.3:
                        break
            await asyncio.sleep(rnd.uniform(0.01, 0.4))

    @property
    def unwell(self) -> str:
        """What is wrong with its consumer now; once all is delivered and all nodes are up, nothing may be."""
        consumer = self.consumer
        if consumer is None:
            return f"{self.process.name} has no consumer"
        credits = consumer.credits
        well = consumer.state is ConsumerState.CONSUMING and not consumer._live and not credits.messages_out and (
            not credits.bytes_out and len(consumer._waiters) <= 1)
        return "" if well else repr(consumer)

    async def _consume(self, consumer: Consumer, calm: bool) -> None:
        """Until chance ends it, or the world is calm; a lasting one goes on then, and for ever."""
        rnd, world = self.rnd, self.world
        handlers: dict[asyncio.Task[None], None] = {}

        def over() -> bool:
            return calm != world.calm and not self.lasting

        left = rnd.choice((5, 30, 100))
        while (left or world.calm) and not over():
            left = max(0, left - 1)
            self.stall()
            if not world.calm and rnd.random() < 0.01:
                world.later(0.0, self._kill)
            run = await consumer.next_run(timeout=0.5)
            if run is None:
                continue
            world.delivered(self, run._pb)
            handler = self.task(self._handle(run))
            handlers[handler] = None
            handler.add_done_callback(lambda done: handlers.pop(done, None))
            while len(handlers) >= (1 if not world.calm and rnd.random() < 0.5 else HELD_MAX) and not over():
                await asyncio.wait(list(handlers), timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
        if not calm and rnd.random() < 0.5:
            return  # handlers are still at work
        while handlers and not over():
            await asyncio.wait(list(handlers), timeout=0.1)

    def _kill(self) -> None:
        """The process is gone, with all that it had; another one starts soon."""
        world = self.world
        world.counts["applications killed"] += 1
        world.trace("kill", self.process.name, "")
        world.loop.kill(self.process)
        world.rpc.died(self.process)
        self.process = Process(self.process.name, self.MAY_RAISE)
        self.consumer = None
        world.later(self.rnd.uniform(0.1, 1.0), lambda: self.start(self.run()))

    async def _handle(self, run: LeasedRun) -> None:
        """Settles a run: as a whole, by prefixes or message by message."""
        rnd, world = self.rnd, self.world
        if not world.calm and rnd.random() < world.options.hang:
            world.counts["handlers that hang"] += 1
            await asyncio.sleep(rnd.choice((1.5, 4.0, 8.0)))  # the consumer extends the lease, up to its limit
        elif not world.calm:
            await asyncio.sleep(rnd.choice((0.0, 0.001, 0.02, 0.2 if rnd.random() < 0.1 else 0.0)))
        try:
            if world.calm:
                await self._told(run.ack(), run.messages[-1].sequence)
            elif rnd.random() < world.options.success:
                await rnd.choice((self._ack_all, self._ack_prefixes, self._ack_messages, self._ack_unawaited))(run)
            else:
                await self._end(run)
        except Closed:
            world.counts["settlements of a closed consumer"] += 1

    async def _ack_all(self, run: LeasedRun) -> None:
        await self._told(run.ack(), run.messages[-1].sequence)

    async def _ack_unawaited(self, run: LeasedRun) -> None:
        run.ack()

    async def _ack_prefixes(self, run: LeasedRun) -> None:
        at = 0
        while at < run.count and not run.ended:
            at = self.rnd.randint(at + 1, run.count)
            await self._told(run.ack(run.messages[at - 1].sequence), run.messages[at - 1].sequence)
            if self.rnd.random() < 0.2 and not run.ended:
                await self._told(run.extend(self.rnd.choice((None, 1.0, 3.0))))

    async def _ack_messages(self, run: LeasedRun) -> None:
        """In any order; they go out in theirs."""
        messages = list(run.messages)
        self.rnd.shuffle(messages)
        for message in messages:
            async with message:
                await asyncio.sleep(self.rnd.choice((0.0, 0.0, 0.01)))
        if self.rnd.random() < 0.5:
            await asyncio.sleep(0.05)

    async def _end(self, run: LeasedRun) -> None:
        rnd = self.rnd
        if run.count > 1 and rnd.random() < 0.5:
            upto = run.messages[rnd.randrange(run.count - 1)].sequence
            acked = run.ack(upto)
            if rnd.random() < 0.5:
                await self._told(acked, upto)
        if run.ended:
            return
        delay = rnd.choice((None, 0.001, 0.05, 1.0))
        settlement = rnd.choice((lambda: run.retry(delay, "simulated"), lambda: run.throttled(delay), lambda: run.down(delay),
                                 lambda: run.reject("simulated"), run.release))()
        self.world.counts[f"outcome {settlement.outcome}"] += 1
        if rnd.random() < 0.7:
            await self._told(settlement)

    async def _told(self, settlement: Settlement, acked: int = 0) -> None:
        """Waits for an outcome; `acked` is the last sequence that it acknowledges."""
        run = settlement.run
        ended = settlement.done  # by this process itself
        try:
            await settlement
        except StaleLease as error:
            if not ended:
                self._stale(run, error)
        else:
            self.world.settled(self, run.shard, run.fencing_token, settlement.outcome, acked if settlement.outcome == OUTCOME_ACK else 0)

    def _stale(self, run: LeasedRun, error: SpillwayError) -> None:
        """The broker says that a lease is over. The consumer takes what is raised for the application's bug."""
        if isinstance(error, StaleLease):
            try:
                self.world.over(run.shard, run.fencing_token)
            except Violation as violation:
                self.world.failed(violation)
        elif not isinstance(error, Closed):
            self.world.failed(Violation("bug", f"{self.process.name} cannot settle: {type(error).__name__}: {error}"))


class OperatingApplication(_Application, clients.Operator):
    """An operator with the client's Admin."""

    ACTIONS = (*clients.Operator.ACTIONS, "get", "list", "gates", "dead letters", "tenants", "backup")
    RATE = 4.0

    async def create(self, destinations: list[admin_pb.Destination], routes: list[admin_pb.Route]) -> None:
        """See Operator."""
        async with self.client() as client:
            for destination in map(destination_from_pb, destinations):
                await self._until_done(partial(client.admin.create_destination, destination))
            for route in map(route_from_pb, routes):
                await self._until_done(partial(client.admin.create_route, route))

    async def _until_done(self, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        while True:
            try:
                await call()
            except AlreadyExists:
                return  # an answer was lost
            except Unavailable:
                self.world.counts["operator: again"] += 1
                await asyncio.sleep(self.rnd.uniform(0.05, 0.5))
            else:
                return

    async def _open(self, destination: admin_pb.Destination) -> None:
        async with self.client() as client:
            await self._until_done(partial(client.admin.update_destination, destination_from_pb(destination)))
            await self._until_done(partial(client.admin.resume, destination.name))

    async def run(self) -> None:
        """See Operator."""
        async with self.client() as self._client:
            await super().run()

    async def _act(self, what: str, name: str) -> None:
        """See Operator. Of all that the client raises, only Unavailable is to be expected, and that there is no dead letter to redrive."""
        try:
            await self._ask(self._client, what, name)
        except Unavailable:
            self.world.counts["operator: unavailable"] += 1
        except DestinationNotFound as error:
            if what != "redrive" or "dead letter" not in str(error):
                raise

    async def _ask(self, client: Client, what: str, name: str) -> None:
        admin = client.admin
        match what:
            case "update":
                wanted = destination_from_pb(self.world.draw_destination(self.rnd, name))
                stored, found = await self._read_back(client, admin.update_destination(wanted), admin.get_destination(name))
                self._same(wanted, stored)
                if found is not None:
                    self._same(stored, found)
            case "get":
                await admin.get_destination(name)
            case "list":
                found = [destination.name async for destination in admin.list_destinations()]
                if found != sorted(d.name for d in self.world.destinations):
                    raise Violation("bug", f"there are destinations {found}")
            case "pause":
                _, paused = await self._read_back(client, admin.pause(name, reason="simulated"), self._paused(admin, name))
                if paused is False:
                    raise Violation("bug", f"{name!r} was paused, and is not")
            case "resume":
                _, paused = await self._read_back(client, admin.resume(name), self._paused(admin, name))
                if paused is True:
                    raise Violation("bug", f"{name!r} was resumed, and is paused")
            case "redrive":
                done = False
                async for progress in admin.redrive_dead_letters(name, messages_per_second=1000):
                    done = progress.done
                if not done:
                    raise Violation("bug", "a redrive ended before it was done")
            case "purge":
                await admin.purge(name)
            case "unpark":
                await admin.unpark(name)
            case "stats":
                await admin.destination_stats(name)
            case "peek":
                await admin.peek(name, "t0", "k0")
            case "explain":
                await admin.explain(name)
            case "gates":
                async for _ in admin.list_gates(name):
                    pass
            case "dead letters":
                async for _ in admin.list_dead_letters(name):
                    pass
            case "tenants":
                await admin.top_tenants(name)
            case "backup":
                with TemporaryDirectory() as directory:
                    await self._back_up(client, Path(directory, "backup"))

    async def _back_up(self, client: Client, directory: Path) -> None:
        """Everything that was acknowledged before is in it, and what is in it is what the log says."""
        acks = list(self.world.acks)
        manifest = await client.cluster.back_up(directory)
        self.world.counts["backups"] += 1
        for group in manifest.groups:
            if group.group:
                last = max((sequence >> 20 for _, sent, sequence in acks if sent.shard == group.group), default=0)
                if group.index < last:
                    raise Violation("I1", f"a backup has shard {group.group} as of entry {group.index}, and {last} was acknowledged before")
                self.world.observers[group.group].restored(group.index, shard_in(directory, group))

    async def _read_back(self, client: Client, change: Coroutine[Any, Any, T], read: Coroutine[Any, Any, U]) -> tuple[T, U | None]:
        """What a change gives, and what is there behind it; None if that is no wonder: another node may be behind, and one that could not
        come to know soon what it passed on."""
        assert client._router is not None
        router, began = client._router, self.world.loop.now
        try:
            changed = await change
            soon, node = self.world.loop.now - began < BEHIND_SECONDS, self._node(router.answered)
            found = await read
        finally:
            read.close()
        return changed, found if soon and self._node(router.answered) == node else None

    def _node(self, address: str) -> tuple[str, int]:
        """A node between two of its starts."""
        return address, self.world.nodes[address.partition(":")[0]].life

    @staticmethod
    async def _paused(admin: Admin, name: str) -> bool:
        return any([gate.cause is GateCause.PAUSED and gate.tenant is None async for gate in admin.list_gates(name)])

    @staticmethod
    def _same(wanted: Destination, found: Destination) -> None:
        """What is left open has a default."""
        of, there = asdict(wanted.policy), asdict(found.policy)
        if other := {field: (value, there[field]) for field, value in of.items() if value is not None and value != there[field]}:
            raise Violation("bug", f"destination {wanted.name!r} has other policies than were stored: {other}")


class DrainingApplication(_Application, clients.Drainer):
    """Drains nodes and takes them back with the client's Cluster."""

    async def _call(self, method: str, name: str) -> bool:
        """See Drainer."""
        async with self.client() as client:
            try:
                await (client.cluster.drain if method == "DrainNode" else client.cluster.undrain)(name)
            except Unavailable:
                return False
            except InvalidArgument:
                return True
        self.world.counts[f"members: {'drain' if method == 'DrainNode' else 'undrain'}"] += 1
        return True


class LeavingApplication(_Application):
    """Once all is well, consumers come, take something or nothing, and go, in order or not; whatever they did not take is free a moment
    later. Leases last so long that no other reason is left for that."""

    DESTINATION = "left"
    QUEUES = 4
    RECORDS = 24
    VISITS = 10
    STAYS = (0.0, 0.001, 0.01, 0.06, 0.15)  # seconds
    SOON_SECONDS = 1.0
    LEASE_SECONDS = 600.0

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.finished = False
        self.left = self.RECORDS

    async def run(self) -> None:
        """Once."""
        rnd = self.rnd
        async with self.client() as client:
            async with client.producer(producer_id=self.process.name) as producer:
                await producer.send_many([Record(self.DESTINATION, f"{self.DESTINATION}/p0/{n}".encode(), key=str(n % self.QUEUES))
                                          for n in range(1, self.RECORDS + 1)])
            for _ in range(self.VISITS):
                await rnd.choice((self._visit, self._plain_visit))(client)
                await self._look()
            async with client.consumer(self.DESTINATION, lease_seconds=self.LEASE_SECONDS) as consumer:
                while self.left and (run := await consumer.next_run(timeout=60)):
                    self.world.delivered(self, run._pb)
                    await run.ack()
                    self.left -= len(run)
        self.finished = True

    async def _visit(self, client: Client) -> None:
        rnd = self.rnd
        async with client.consumer(self.DESTINATION, credit_messages=rnd.choice((1, 5, 40)), run_messages_max=rnd.choice((0, 1)),
                                   lease_seconds=self.LEASE_SECONDS) as consumer:
            await asyncio.sleep(rnd.choice(self.STAYS))
            if rnd.random() < 0.3 and (run := await consumer.next_run(timeout=3.0)):
                self.world.delivered(self, run._pb)
                await run.ack(run.messages[0].sequence)
                self.left -= 1

    async def _plain_visit(self, client: Client) -> None:
        """Takes a run, has no credit for another one, and hangs up; or says at some time that it wants no more, and takes what comes."""
        rnd, takes = self.rnd, self.rnd.random() < 0.5
        lease = self.channel().stream_stream(consumer_module.METHOD)()
        credit = 1 if takes else rnd.choice((1, 5, 40))
        subscribe = Subscribe(destinations=[self.DESTINATION], credit=Credit(messages=credit, bytes=clients.CREDIT_BYTES))
        subscribe.lease_duration.FromMilliseconds(int(self.LEASE_SECONDS * 1000))
        await lease.write(LeaseRequest(subscribe=subscribe).SerializeToString())
        if not takes:
            await asyncio.sleep(rnd.choice(self.STAYS))
            await lease.done_writing()
        runs: list[LeasedRunProto] = []
        try:
            while True:
                async with asyncio.timeout(0.05 if takes and runs else 60):
                    frame = await lease.read()
                if frame is EOF:
                    break
                runs += LeaseResponse.FromString(frame).runs
                if (beyond := sum(len(run.messages) for run in runs) - credit) > 0:
                    raise Violation("credit", f"{self.process.name} was sent {beyond} messages beyond its credit")
        except TimeoutError:
            if not runs:
                raise
        lease.cancel()
        ack = self.channel().stream_stream("/spillway.v1.QueueService/Ack")()
        for run in runs:
            self.world.delivered(self, run)
            await ack.write(AckRequest(settlements=[SettlementProto(
                shard=run.shard, fencing_token=run.fencing_token, sequence=run.messages[0].sequence,
                outcome=OUTCOME_RELEASE)]).SerializeToString())
            async with asyncio.timeout(60):
                await ack.read()
        ack.cancel()

    async def _look(self) -> None:
        """Nothing is leased any more."""
        world = self.world
        until = world.loop.now + self.SOON_SECONDS
        while left := world.leased(self.DESTINATION.encode()):
            if world.loop.now >= until:
                raise Violation("left behind", f"{left} are leased {self.SOON_SECONDS} s after the last consumer has gone")
            await asyncio.sleep(0.02)


class _Errors(logging.Handler):
    """What the client calls an error is one."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        why = f": {record.exc_info[1]!r}" if record.exc_info else ""
        self._world.failed(Violation("bug", f"the client says: {record.getMessage()}{why}"))


@contextmanager
def logged(world: World) -> Iterator[None]:
    """Nothing is shown while a world runs; errors of clients are failures."""
    log, errors = logging.getLogger("spillway"), _Errors(world)
    client = logging.getLogger("spillway.client")
    before, log.propagate = log.propagate, False
    quiet = logging.NullHandler()
    log.addHandler(quiet)
    client.addHandler(errors)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        client.removeHandler(errors)
        log.removeHandler(quiet)
        log.propagate = before


@contextmanager
def underneath(world: World) -> Iterator[None]:
    """What the client stands on while a world runs."""
    rnd = random.Random(f"applications {world.seed}")
    secrets = Secrets(rnd)
    of_world = (*world.producers, *world.consumers, world.operator, world.drainer, world.leaver)
    applications = {client.process.name: client for client in of_world if isinstance(client, _Application)}

    def now() -> float:
        process = PROCESS.get()
        assert process is not None
        return START_MS / 1000 + world.loop.now + applications[process.name].skew_seconds

    with (patch.object(security, "grpc", world.rpc.module()), patch.object(producer_module, "secrets", secrets),
          patch.object(consumer_module, "secrets", secrets),
          patch.object(consumer_module, "time", SimpleNamespace(time=now, time_ns=lambda: int(now() * 1e9))),
          patch.object(retry.Backoff.__init__, "__defaults__", (rnd.random,))):
        yield
