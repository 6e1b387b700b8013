"""A producer that is the product's client: idempotent, in order, as fast as told."""
from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from spillway.client import BufferFull, Client, OutcomeUnknown, Producer, Receipt, SendTimeout, SpillwayError

from tests.torture.history import Event, Queue, Writer
from tests.torture.load import CLIENT_DESTINATIONS, Numbers, stopping

TURN_SECONDS = 0.01


async def pace(send: Callable[[int], None], per_second: float, count: int) -> None:
    """Calls `send` with how many are due, until told to stop or, if `count`, until so many were due."""
    stop = stopping()
    start = time.monotonic()
    sent = 0
    while not stop.is_set() and (not count or sent < count):
        due = int((time.monotonic() - start) * per_second) - sent
        if count:
            due = min(due, count - sent)
        if due > 0:
            send(min(due, 100))
            sent += min(due, 100)
        await asyncio.sleep(TURN_SECONDS)


async def produce(history: Writer, by: str, addresses: list[str], per_second: float, seed: int, count: int) -> None:
    """Sends to all queues that are its own; ends when all is answered."""
    numbers = Numbers(by, CLIENT_DESTINATIONS, seed)
    pending: set[asyncio.Future[Receipt]] = set()

    def sent(due: int) -> None:
        chosen = [numbers.next() for _ in range(due)]
        history.write(*({"kind": "sent", "q": queue, "n": number} for queue, number, _ in chosen))
        for queue, number, payload in chosen:
            _send(history, producer, pending, queue, number, payload)

    async with Client(addresses) as client, client.producer() as producer:
        await client.wait_ready(60)
        await pace(sent, per_second, count)
        while pending:
            await asyncio.wait(pending)


def _send(history: Writer, producer: Producer, pending: set[asyncio.Future[Receipt]], queue: Queue, number: int,
          payload: bytes) -> None:
    destination, tenant, key = queue

    def answered(future: asyncio.Future[Receipt]) -> None:
        pending.discard(future)
        event: Event = {"q": queue, "n": number}
        try:
            receipt = future.result()
        except SpillwayError as error:
            unknown = isinstance(error, OutcomeUnknown) or (isinstance(error, SendTimeout) and error.outcome_unknown)
            history.write({"kind": "failed", "sure": not unknown, "error": repr(error), **event})
        else:
            history.write({"kind": "stored", "shard": receipt.shard, "seq": 0 if receipt.duplicate else receipt.sequence, **event})

    try:
        future = producer.send_nowait(destination, payload, tenant=tenant, key=key)
    except BufferFull as error:
        history.write({"kind": "failed", "q": queue, "n": number, "sure": True, "error": repr(error)})
        return
    pending.add(future)
    future.add_done_callback(answered)
