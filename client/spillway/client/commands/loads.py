"""What `spillway bench` does to a cluster, and how it is measured. All loads are bounded by count or time, and all memory by constants.

Times are taken in this process: it sends, takes and acknowledges in one event loop, and what it measures includes its own work. Several
of it can be run at once; `make bench` measures with processes of their own.
"""
from __future__ import annotations

import asyncio
import math
import os
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spillway.client import Client, Consumer, LeasedRun, Producer, Record

BATCH_RECORDS = 256
BATCHES_MAX = 16  # under way
PENDING_MAX = 10_000  # messages under way where each is measured: beyond, the load waits
TIMEOUT_SECONDS = 60.0
GRACE_SECONDS = 30.0  # for what is under way at the end
QUIET, NOISY = "quiet", "noisy"
_STAMP = struct.Struct("=d8s")  # when it was handed in, by this process's clock, and which run of the benchmark did
STAMP_BYTES = _STAMP.size

Progress = Callable[[float], None]  # how much of the load is done, 0 to 1


class Histogram:
    """Lengths of time, in buckets of one percent: so its memory does not grow with what it counts."""

    GROWTH = math.log(1.01)
    SECONDS_MIN = 1e-6

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.max = 0.0

    def add(self, length: float, times: int = 1) -> None:
        """Counts a length in seconds, so many times."""
        bucket = int(math.log(max(length, self.SECONDS_MIN) / self.SECONDS_MIN) / self.GROWTH)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + times
        self.count += times
        self.max = max(self.max, length)

    def quantile(self, share: float) -> float:
        """The length in seconds that so large a share does not exceed, to one percent; 0.0 if nothing was counted."""
        wanted = share * self.count
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                return min(self.SECONDS_MIN * math.exp((bucket + 1) * self.GROWTH), self.max)
        return 0.0

    def summary(self) -> dict[str, float | int]:
        """What a result says of it, in milliseconds."""
        return {"count": self.count, **{name: round(self.quantile(share) * 1000, 3) for name, share in (
            ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))}, "max": round(self.max * 1000, 3)}


async def produce(client: Client, destination: str, *, count: int, seconds: float, payload_bytes: int, tenants: int, keys: int,
                  progress: Progress) -> dict[str, Any]:
    """Sends as fast as it is taken in, to so many tenants with so many keys each."""
    from spillway.client import PartialFailure, Record

    body = os.urandom(payload_bytes)
    stored = Histogram()
    pending: deque[asyncio.Task[None]] = deque()
    sent = failed = 0
    error = ""

    async def send(producer: Producer, records: list[Record]) -> None:
        nonlocal failed, error
        begun, lost = time.perf_counter(), 0
        try:
            await producer.send_many(records, timeout=TIMEOUT_SECONDS)
        except PartialFailure as partial:
            lost = len(partial.errors)
            error = str(next(iter(partial.errors.values())))
            failed += lost
        stored.add(time.perf_counter() - begun, len(records) - lost)

    async with client.producer() as producer:
        start = time.perf_counter()
        while sent < count and time.perf_counter() - start < seconds:
            records = [Record(destination, body, f"tenant-{number % tenants}", f"key-{number // tenants % keys}")
                       for number in range(sent, min(sent + BATCH_RECORDS, count))]
            sent += len(records)
            pending.append(asyncio.ensure_future(send(producer, records)))
            if len(pending) >= BATCHES_MAX:
                await pending.popleft()
            progress(max(sent / count, (time.perf_counter() - start) / seconds))
        await asyncio.gather(*pending)
        length = time.perf_counter() - start
    return {**_rate(stored.count, payload_bytes * stored.count, length), "failed": failed, "error": error,
            "stored_ms": stored.summary()}


async def consume(client: Client, destination: str, *, count: int, seconds: float, idle: float, progress: Progress) -> dict[str, Any]:
    """Takes and acknowledges what is there, until so many, so long, or nothing for `idle` seconds. The time runs from the first one until
    the last acknowledgement is confirmed."""
    pending: deque[Any] = deque()
    taken = bytes_ = 0
    runs = Histogram()
    first = last = time.perf_counter()
    begun = first
    async with client.consumer(destination, name="spillway bench") as consumer:
        while taken < count and time.perf_counter() - begun < seconds:
            run: LeasedRun | None = await consumer.next_run(min(idle, seconds))
            if run is None:
                break
            if not taken:
                first = time.perf_counter()
            taken += len(run)
            bytes_ += sum(map(len, run.payloads))
            runs.add(len(run))
            pending.append(run.ack())
            if len(pending) > BATCH_RECORDS:
                await pending.popleft()
            last = time.perf_counter()
            progress(max(taken / count, (last - begun) / seconds))
        for settlement in pending:
            await settlement
        if pending:
            last = time.perf_counter()
    return {**_rate(taken, bytes_, last - first), "runs": runs.count}


async def latency(client: Client, destination: str, *, rate: float, count: int, seconds: float, payload_bytes: int, keys: int,
                  progress: Progress) -> dict[str, Any]:
    """Sends at a rate, and measures of each message until it is stored, until it is here again, and until its acknowledgement is
    confirmed. What was due is sent late rather than never, and its time runs from when it was due."""
    mark = os.urandom(8)
    padding = bytes(max(payload_bytes - STAMP_BYTES, 0))
    stored, delivered, settled = Histogram(), Histogram(), Histogram()

    async def send(producer: Producer, number: int, due: float) -> None:
        await producer.send(destination, _STAMP.pack(due, mark) + padding, tenant="bench", key=f"key-{number % keys}",
                            timeout=TIMEOUT_SECONDS)
        stored.add(time.perf_counter() - due)

    async def take(consumer: Consumer) -> None:
        async for run in consumer.runs():
            came = time.perf_counter()
            due = [stamp for payload in run.payloads if (stamp := _due(payload, mark)) is not None]
            for one in due:
                delivered.add(came - one)
            _spawn(pending, confirm(run, due))

    async def confirm(run: LeasedRun, due: list[float]) -> None:
        await run.ack()
        for one in due:
            settled.add(time.perf_counter() - one)

    pending: set[asyncio.Task[Any]] = set()
    async with client.producer() as producer, client.consumer(destination, name="spillway bench") as consumer:
        taking = asyncio.ensure_future(take(consumer))
        try:
            start = time.perf_counter()
            sent = 0
            while sent < count and (due := start + sent / rate) - start < seconds:
                await _sleep_until(due)
                while len(pending) > PENDING_MAX:
                    await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                _spawn(pending, send(producer, sent, due))
                sent += 1
                progress(max(sent / count, (due - start) / seconds))
            await _until(lambda: settled.count >= sent or taking.done())
        finally:
            taking.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
    return {"messages": sent, "lost": sent - settled.count, "stored_ms": stored.summary(), "delivered_ms": delivered.summary(),
            "settled_ms": settled.summary()}


async def fairness(client: Client, destination: str, *, tenants: int, rate: float, dump: int, seconds: float, handlers: int,
                   handler_seconds: float, payload_bytes: int, progress: Progress) -> dict[str, Any]:
    """Quiet tenants send a little each, for `seconds`; then another one dumps so many messages at once, and they go on for as long. So
    many handlers, each busy for `handler_seconds` with a message, serve them all. Measured is until a quiet tenant's message is in a
    handler, before the dump and from then on."""
    from spillway.client import Record

    mark = os.urandom(8)
    padding = bytes(max(payload_bytes - STAMP_BYTES, 0))
    alone, beside = Histogram(), Histogram()
    dumped_at = math.inf
    sent = handled_noisy = 0
    pending: set[asyncio.Task[Any]] = set()

    async def handle(consumer: Consumer) -> None:
        nonlocal handled_noisy
        while (run := await consumer.next_run()) is not None:
            came = time.perf_counter()
            for payload in run.payloads:
                if run.tenant == NOISY:
                    handled_noisy += 1
                elif (due := _due(payload, mark)) is not None:
                    (alone if due < dumped_at else beside).add(came - due)
                await asyncio.sleep(handler_seconds)
            await run.ack()

    async def send(producer: Producer, number: int, due: float) -> None:
        await producer.send(destination, _STAMP.pack(due, mark) + padding, tenant=f"{QUIET}-{number % tenants}",
                            key=f"key-{number // tenants % 10}", timeout=TIMEOUT_SECONDS)

    async def dump_all(producer: Producer) -> float:
        begun = time.perf_counter()
        body = bytes(payload_bytes)
        for first in range(0, dump, BATCH_RECORDS):
            await producer.send_many([Record(destination, body, NOISY, f"key-{number % 1000}")
                                      for number in range(first, min(first + BATCH_RECORDS, dump))], timeout=TIMEOUT_SECONDS)
        return time.perf_counter() - begun

    async with (client.producer() as producer, client.producer() as loud,
                client.consumer(destination, name="spillway bench", credit_messages=handlers, run_messages_max=1) as consumer):
        working = [asyncio.ensure_future(handle(consumer)) for _ in range(handlers)]
        dumping: asyncio.Future[float] | None = None
        try:
            start = time.perf_counter()
            per_second = tenants * rate
            while (due := start + sent / per_second) - start < 2 * seconds:
                await _sleep_until(due)
                if dumping is None and due - start >= seconds:
                    dumped_at = due
                    dumping = asyncio.ensure_future(dump_all(loud))
                while len(pending) > PENDING_MAX:
                    await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                _spawn(pending, send(producer, sent, due))
                sent += 1
                progress((due - start) / (2 * seconds))
            taken_in = await dumping if dumping is not None else 0.0
            await _until(lambda: alone.count + beside.count >= sent or any(one.done() for one in working))
        finally:
            for one in working:
                one.cancel()
            await asyncio.gather(*working, *pending, return_exceptions=True)
    before, after = alone.summary(), beside.summary()
    return {"messages": sent, "lost": sent - alone.count - beside.count, "alone_ms": before, "beside_dump_ms": after,
            "p99_ratio": round(after["p99"] / before["p99"], 2) if before["p99"] else None, "dump_messages": dump,
            "dump_seconds": round(taken_in, 3), "dump_handled": handled_noisy}


def _rate(messages: int, bytes_: int, length: float) -> dict[str, Any]:
    length = max(length, 1e-9)
    return {"messages": messages, "bytes": bytes_, "seconds": round(length, 3), "messages_per_second": round(messages / length, 1),
            "bytes_per_second": round(bytes_ / length)}


def _due(payload: bytes, mark: bytes) -> float | None:
    """When a message was due, if this run of the benchmark sent it."""
    if len(payload) < STAMP_BYTES:
        return None
    due, marked = _STAMP.unpack_from(payload)
    return float(due) if marked == mark else None


def _spawn(pending: set[asyncio.Task[Any]], work: Any) -> None:
    task = asyncio.ensure_future(work)
    pending.add(task)
    task.add_done_callback(pending.discard)


async def _sleep_until(due: float) -> None:
    await asyncio.sleep(max(due - time.perf_counter(), 0))


async def _until(done: Callable[[], bool]) -> None:
    """Waits for what is under way, not for ever."""
    end = time.perf_counter() + GRACE_SECONDS
    while not done() and time.perf_counter() < end:  # noqa: ASYNC110  # what it waits for is many things, and none of them tells
        await asyncio.sleep(0.005)
