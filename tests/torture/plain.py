"""Producer and consumer made of generated stubs alone, as another language's would be: one node at a time, the next one when it fails."""
from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import grpc
from spillway.contract.hashing import queue_key, shard_of
from spillway.v1.message_pb2 import (
    ERROR_CODE_OUT_OF_SEQUENCE,
    ERROR_CODE_RESOURCE_EXHAUSTED,
    ERROR_CODE_STALE_TOKEN,
    ERROR_CODE_UNAVAILABLE,
    Message,
)
from spillway.v1.queue_service_pb2 import (
    SETTLEMENT_RESULT_REFUSED,
    AckRequest,
    Credit,
    HeldLease,
    LeasedRun,
    LeaseRequest,
    ProduceRecord,
    ProduceRequest,
    Settlement,
    Subscribe,
)
from spillway.v1.queue_service_pb2 import (
    Outcome as WireOutcome,
)
from spillway.v1.queue_service_pb2_grpc import QueueServiceStub

from tests.torture.history import Event, Queue, Writer, number_of
from tests.torture.load import ACK, LEASE_SECONDS, PLAIN, Numbers, Outcome, outcomes, stopping
from tests.torture.produce import pace

CALL_SECONDS = 6.0  # a broker waits up to 5 s for a leader
SILENCE_SECONDS = 15.0  # heartbeats come every 10 s
PAUSE_SECONDS = 0.1
BATCH = 64
CREDIT = 64
RETRIED = (ERROR_CODE_UNAVAILABLE, ERROR_CODE_RESOURCE_EXHAUSTED, ERROR_CODE_OUT_OF_SEQUENCE)


class Nodes:
    """Stubs of the nodes, one after the other."""

    def __init__(self, addresses: list[str]) -> None:
        options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, options=options) for address in addresses]
        self._turn = count(secrets.randbelow(len(addresses)))

    def next(self) -> Any:
        """Another node."""
        return QueueServiceStub(self._channels[next(self._turn) % len(self._channels)])

    async def close(self) -> None:
        """Ends the connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))


class Stream:
    """A stream of one request, one response, opened again at another node when it fails."""

    def __init__(self, nodes: Nodes, method: str) -> None:
        self._nodes = nodes
        self._method = method
        self._call: Any = None

    async def ask(self, request: Any) -> Any:
        """The response; None: it failed, and what the request did is unknown."""
        try:
            if self._call is None:
                self._call = getattr(self._nodes.next(), self._method)()
            async with asyncio.timeout(CALL_SECONDS):
                await self._call.write(request)
                response = await self._call.read()
            if response is not grpc.aio.EOF:
                return response
        except (grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError):
            pass
        self.close()
        await asyncio.sleep(PAUSE_SECONDS)
        return None

    def close(self) -> None:
        """Ends the call."""
        if self._call is not None:
            self._call.cancel()
            self._call = None


class Lane:
    """The records of one producer in one shard: numbered, sent in order, again and again until each is stored."""

    def __init__(self, history: Writer, nodes: Nodes, by: str, shard: int) -> None:
        self._history = history
        self._stream = Stream(nodes, "Produce")
        self._producer_id = f"{by}-{secrets.token_hex(8)}"
        self._shard = shard
        self._numbers = count(1)
        self._waiting: list[tuple[Event, ProduceRecord]] = []
        self._more = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    def put(self, queue: Queue, number: int, payload: bytes) -> None:
        """One more message."""
        destination, tenant, key = queue
        record = ProduceRecord(destination=destination, tenant=tenant, key=key, producer_sequence=next(self._numbers),
                               message=Message(payload=payload))
        self._waiting.append(({"kind": "stored", "q": queue, "n": number, "shard": self._shard}, record))
        self._more.set()

    @property
    def empty(self) -> bool:
        """Whether everything is stored."""
        return not self._waiting

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._more.clear()
                await self._more.wait()
            batch = self._waiting[:BATCH]
            response = await self._stream.ask(ProduceRequest(producer_id=self._producer_id, records=[r for _, r in batch]))
            if response is None:
                continue
            refused = {error.index: error for error in response.errors}
            for index, error in refused.items():
                assert error.code in RETRIED, error
            done = min(refused, default=len(batch))  # what is behind a refused one is sent again, too
            self._history.write(*(event | {"seq": sequence}
                                  for (event, _), sequence in zip(batch[:done], response.sequences, strict=False)))
            del self._waiting[:done]
            if refused:
                self._stream.close()
                await asyncio.sleep(PAUSE_SECONDS)


async def plain_produce(history: Writer, by: str, addresses: list[str], per_second: float, seed: int, shards: int,
                        count: int) -> None:
    """Sends to all queues that are its own; ends when all is stored."""
    nodes = Nodes(addresses)
    numbers = Numbers(by, (PLAIN,), seed)
    lanes = {shard: Lane(history, nodes, by, shard) for shard in range(1, shards + 1)}

    def sent(due: int) -> None:
        chosen = [numbers.next() for _ in range(due)]
        history.write(*({"kind": "sent", "q": queue, "n": number} for queue, number, _ in chosen))
        for queue, number, payload in chosen:
            lanes[shard_of(queue_key(*queue), shards)].put(queue, number, payload)

    await pace(sent, per_second, count)
    while not all(lane.empty for lane in lanes.values()):
        await asyncio.sleep(PAUSE_SECONDS)
        _check(lane.task for lane in lanes.values())
    for lane in lanes.values():
        lane.task.cancel()
    await nodes.close()


def _check(tasks: Any) -> None:
    for task in tasks:
        if task.done():
            task.result()


class Settler:
    """Settles one after the other, as often as it takes."""

    def __init__(self, history: Writer, nodes: Nodes) -> None:
        self._history = history
        self._stream = Stream(nodes, "Ack")
        self._queue: asyncio.Queue[tuple[Settlement, str, asyncio.Future[str]]] = asyncio.Queue()
        self.task = asyncio.create_task(self._run())

    async def settle(self, run: LeasedRun, sequence: int, outcome: Outcome) -> str:
        """Hands a settlement in; returns its result: ok, stale, or unknown."""
        settlement = Settlement(shard=run.shard, fencing_token=run.fencing_token, sequence=sequence,
                                outcome=WireOutcome.Value(f"OUTCOME_{outcome.name.upper()}"))
        seconds = LEASE_SECONDS if outcome.name == "extend" else outcome.delay
        if seconds is not None:
            settlement.delay.FromMilliseconds(round(seconds * 1000))
        event: Event = {"shard": run.shard, "token": run.fencing_token, "seq": sequence, "outcome": outcome.name}
        self._history.write({"kind": "settle", "seconds": seconds or 0.0, **event})
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((settlement, outcome.name, future))
        result = await future
        self._history.write({"kind": "settled", "result": result, **event})
        return result

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while not self._queue.empty() and len(batch) < BATCH:
                batch.append(self._queue.get_nowait())
            while batch:
                response = await self._stream.ask(AckRequest(settlements=[one for one, _, _ in batch]))
                if response is None:
                    continue
                again = []
                errors = {error.index: error.code for error in response.errors}
                for i, (item, result) in enumerate(zip(batch, response.results, strict=True)):
                    if errors.get(i) in RETRIED:
                        again.append(item)
                    else:
                        item[2].set_result("ok" if result != SETTLEMENT_RESULT_REFUSED else
                                           "stale" if errors.get(i) == ERROR_CODE_STALE_TOKEN else "unknown")
                batch = again
                if again:
                    self._stream.close()
                    await asyncio.sleep(PAUSE_SECONDS)


class PlainConsumer:
    """Leases from one node at a time, and tells the next one what it still has."""

    def __init__(self, history: Writer, by: str, addresses: list[str], seed: int) -> None:
        self._history = history
        self._by = by
        self._nodes = Nodes(addresses)
        self._settler = Settler(history, Nodes(addresses))
        self._choice: Iterator[Outcome] = outcomes(seed)
        self._session = secrets.token_hex(16)
        self._live: dict[tuple[int, int], float] = {}  # lease -> its deadline, by the shared clock
        self._credit = asyncio.Queue[int]()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until told to stop."""
        stop = asyncio.create_task(stopping().wait())
        while not stop.done():
            stream = asyncio.create_task(self._stream())
            await asyncio.wait([stream, stop], return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                stream.cancel()
            await asyncio.gather(stream, return_exceptions=stop.done())
            await asyncio.sleep(PAUSE_SECONDS)
            _check((self._settler.task,))
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._settler.task.cancel()

    async def _stream(self) -> None:
        """One Lease stream, until it ends."""
        call = self._nodes.next().Lease()
        now = time.monotonic()
        self._live = {lease: deadline for lease, deadline in self._live.items() if deadline > now}
        self._credit = asyncio.Queue()
        subscribe = Subscribe(destinations=[PLAIN], consumer=self._by, credit=Credit(messages=CREDIT, bytes=16 << 20),
                              session=self._session, held=[HeldLease(shard=s, fencing_token=t) for s, t in self._live])
        credit = self._credit
        writer: asyncio.Task[None] | None = None
        try:
            await call.write(LeaseRequest(subscribe=subscribe))
            writer = asyncio.create_task(self._give(call, credit))
            while True:
                async with asyncio.timeout(SILENCE_SECONDS):
                    response = await call.read()
                if response is grpc.aio.EOF or response.draining:
                    return
                for run in response.runs:
                    task = asyncio.create_task(self._handle(run, credit))
                    self._tasks.add(task)
                    task.add_done_callback(self._handled)
        except (grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError):
            pass
        finally:
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    def _handled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        task.result()

    async def _give(self, call: Any, credit: asyncio.Queue[int]) -> None:
        """Gives back the credit of what was handled."""
        while True:
            messages = await credit.get()
            await call.write(LeaseRequest(credit=Credit(messages=messages, bytes=messages << 10)))

    async def _handle(self, run: LeasedRun, credit: asyncio.Queue[int]) -> None:
        queue: Queue = (run.destination, run.tenant, run.key)
        lease = (run.shard, run.fencing_token)
        event: Event = {"q": queue, "shard": run.shard, "token": run.fencing_token}
        deadline = time.monotonic() + run.expire_unix_ms / 1000 - time.time()
        self._live[lease] = deadline
        numbers = [number_of(queue, m.message.payload) for m in run.messages]
        self._history.write({"kind": "lease", "deadline": deadline, **event, "messages": [
            [n, m.sequence, m.attempt] for n, m in zip(numbers, run.messages, strict=True)]})
        handled = 0
        for number, message in zip(numbers, run.messages, strict=True):
            at = time.monotonic()
            if at >= deadline:
                break
            self._history.write({"kind": "start", "at": at, "n": number, "seq": message.sequence, **event})
            await asyncio.sleep(0.001)
            self._history.write({"kind": "end", "n": number, "seq": message.sequence, **event})
            outcome = next(self._choice)
            if outcome.name == "extend":
                extended_at = time.monotonic()
                if await self._settler.settle(run, 0, outcome) == "ok":
                    deadline = self._live[lease] = extended_at + LEASE_SECONDS
            elif outcome.name == "forget":
                handled = 0
                break
            elif outcome is not ACK:
                # A bare client makes sure of what comes before: the outcome is of the first unsettled message.
                if not handled or await self._settler.settle(run, handled, ACK) == "ok":
                    await self._settler.settle(run, message.sequence, outcome)
                    self._live.pop(lease, None)
                handled = 0
                break
            handled = message.sequence
        if handled:
            result = await self._settler.settle(run, handled, ACK)
            if result == "stale" or handled == run.messages[-1].sequence:
                self._live.pop(lease, None)
        credit.put_nowait(len(run.messages))


async def plain_consume(history: Writer, by: str, addresses: list[str], seed: int) -> None:
    """Takes whatever comes, until told to stop; what it holds then expires."""
    await PlainConsumer(history, by, addresses, seed).run()
