"""A consumer that is the product's client: many handlers, all outcomes."""
from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import partial

from spillway.client import Client, LeasedMessage, LeasedRun, Settlement, SpillwayError, StaleLease

from tests.torture.history import Event, Queue, Writer, number_of
from tests.torture.load import ACK, CLIENT_DESTINATIONS, LEASE_SECONDS, LEASE_TOTAL_SECONDS, Outcome, outcomes, stopping

HANDLERS = 24
HANDLING_SECONDS = 0.002
CREDIT = 128


async def consume(history: Writer, by: str, addresses: list[str], seed: int) -> None:
    """Takes whatever comes, until told to stop; then gives the rest back."""
    choice = outcomes(seed)
    async with Client(addresses) as client:
        await client.wait_ready(60)
        consumer = client.consumer(CLIENT_DESTINATIONS, name=by, credit_messages=CREDIT, lease_total_max=LEASE_TOTAL_SECONDS,
                                   on_stale=lambda run, error: None)

        async def handle() -> None:
            async for run in consumer.runs():
                await Handler(history, run, choice).all()

        tasks = [asyncio.create_task(handle()) for _ in range(HANDLERS)]
        stop = asyncio.create_task(stopping().wait())
        done, _ = await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop}:
            task.result()  # a handler ends only by an error
        history.write({"kind": "closing"})
        await consumer.close()
        await asyncio.gather(*tasks)


class Handler:
    """Handles one run."""

    def __init__(self, history: Writer, run: LeasedRun, choice: Iterator[Outcome]) -> None:
        self._history = history
        self._run = run
        self._choice = choice
        self._queue: Queue = (run.destination, run.tenant, run.key)
        self._tasks: set[asyncio.Task[None]] = set()
        self._lease: Event = {"shard": run.shard, "token": run.fencing_token}
        self._numbers = [number_of(self._queue, payload) for payload in run.payloads]
        # By the broker's own deadline, not by what the client makes of it.
        deadline = time.monotonic() + run._pb.expire_unix_ms / 1000 - time.time()
        history.write({"kind": "lease", "q": self._queue, "deadline": deadline, **self._lease, "messages": [
            [n, m.sequence, m.attempt] for n, m in zip(self._numbers, run.messages, strict=True)]})

    async def all(self) -> None:
        """One message after the other, until one fails or the lease is lost; acknowledges together what was handled."""
        run = self._run
        handled: LeasedMessage | None = None
        for number, message in zip(self._numbers, run.messages, strict=True):
            at = time.monotonic()
            if run.ended or run.seconds_left() <= 0:
                return
            event: Event = {"q": self._queue, "n": number, "seq": message.sequence, **self._lease}
            self._history.write({"kind": "start", "at": at, **event})
            await asyncio.sleep(HANDLING_SECONDS)
            self._history.write({"kind": "end", **event})
            outcome = next(self._choice)
            if outcome.name == "extend":
                await self._settle(0, "extend", lambda: run.extend(LEASE_SECONDS))
            elif outcome.name == "forget":
                task = asyncio.get_running_loop().create_task(self._too_late(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                return
            elif outcome is not ACK:
                if handled is not None:
                    self._settle(handled.sequence, "ack", partial(run.ack, handled))
                self._settle(message.sequence, outcome.name, partial(self._fail, outcome))
                return
            handled = message
        if handled is not None:
            self._settle(handled.sequence, "ack", run.ack)

    async def _too_late(self, message: LeasedMessage) -> None:
        """A handler that hangs until the client extends its lease no more, and the lease is over."""
        await asyncio.sleep(LEASE_TOTAL_SECONDS + 2 * LEASE_SECONDS)
        self._settle(message.sequence, "release", self._run.release)

    def _fail(self, outcome: Outcome) -> Settlement:
        """Ends the lease."""
        run = self._run
        match outcome.name:
            case "reject":
                return run.reject("torture")
            case "release":
                return run.release()
            case "throttled":
                return run.throttled(outcome.delay)
            case "down":
                return run.down(outcome.delay)
            case _:
                return run.retry(outcome.delay)

    def _settle(self, sequence: int, name: str, hand_in: Callable[[], Settlement]) -> asyncio.Task[None]:
        """Hands a settlement in, and notes what becomes of it."""
        event: Event = {"seq": sequence, "outcome": name, **self._lease}
        settlement: Settlement | None = None
        if not self._run.ended:
            self._history.write({"kind": "settle", "seconds": LEASE_SECONDS if name == "extend" else 0.0, **event})
            settlement = hand_in()
        task = asyncio.get_running_loop().create_task(self._outcome(event, settlement))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _outcome(self, event: Event, settlement: Settlement | None) -> None:
        if settlement is None:
            return
        try:
            await settlement
        except StaleLease:
            result = "stale"
        except SpillwayError:
            result = "unknown"
        else:
            result = "ok"
        self._history.write({"kind": "settled", "result": result, **event})
