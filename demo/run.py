"""The demo's course: start, produce, kill a node, start it again, wait, verify."""
from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from spillway.client.client import Client
from spillway.client.errors import SpillwayError
from spillway.client.model import DeliveryPolicy, Destination, DestinationStats, HttpTarget, Record

from demo.children import Child, Children
from demo.cluster import Cluster, Node, NodeView, spillway
from demo.display import DestinationView, Display, View
from demo.events import SEED, TENANTS, Event, read, write
from demo.history import ACCEPTED, REFUSED, History
from demo.receivers import EVENT_HEADER, NAMES, UP
from demo.verify import Report, verify

LOOK_SECONDS = 0.5  # between two looks at everything
BATCH_SECONDS = 0.1  # events of this time are produced in one go
DOWN_SECONDS = 5.0  # between the kill and the restart of the node
CONCURRENCY_MAX = 16
TIMEOUT_SECONDS = 5.0
LAST_LOOKS_MAX = 40
SETTLED_LOOKS = 2  # this often nothing may be left before it counts as finished


@dataclass(frozen=True)
class Plan:
    """What to run."""

    events: int = 20_000
    tenants: int = TENANTS
    seed: int = SEED
    seconds_max: float = 170.0
    produce_seconds: float = 25.0
    failing_seconds: float = 10.0
    slow_seconds: float = 0.02
    rate: float = 550.0  # of the limited destination, per second
    kill: bool = True
    plain: bool = False
    keep: bool = False

    @classmethod
    def scaled(cls, events: int, **others: object) -> Plan:
        """The full demo, or a smaller one that takes its share of the time."""
        share = min(1.0, events / cls.events)
        return cls(events=events, produce_seconds=max(3.0, cls.produce_seconds * share),
                   failing_seconds=max(2.0, cls.failing_seconds * share), rate=max(300.0, cls.rate * share),
                   **others)  # type: ignore[arg-type]

    def kinds(self) -> dict[str, str]:
        """What is the matter with each destination, for people."""
        return {
            "healthy": "at once",
            "slow": f"after {self.slow_seconds * 1000:.0f} ms",
            "failing": f"500 for {self.failing_seconds:.0f} s",
            "limited": f"429 over {self.rate:.0f}/s",
            "down": "no listener",
        }


class Demo:
    """One run."""

    def __init__(self, plan: Plan, directory: Path, children: Children, display: Display) -> None:
        self.plan = plan
        self.directory = directory
        self.children = children
        self.display = display
        self.cluster = Cluster(directory, children)
        self.events: list[Event] = []
        self.urls: dict[str, str] = {}
        self.produced = 0
        self.phase = "starting"
        self.notes: list[str] = []
        self.counts: dict[str, list[int]] = {name: [0, 0, 0] for name in UP}
        self.stats: dict[str, DestinationStats | None] = dict.fromkeys(NAMES)
        self.restarted = not plan.kill
        self.dispatcher: Child
        self._started = time.monotonic()
        self._rates: deque[tuple[float, int]] = deque(maxlen=8)
        self._others: list[Child] = []

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def note(self, text: str) -> None:
        """Something worth a line."""
        self.notes.append(text)

    # -- course --------------------------------------------------------------------------------------------------

    async def run(self) -> bool:
        """The whole demo; returns whether it passed."""
        plan = self.plan
        path = self.directory / "events.jsonl"
        await asyncio.to_thread(write, path, plan.events, plan.tenants, plan.seed)
        self.events = await asyncio.to_thread(read, path)
        self.note(f"{len(self.events)} events of {len({e.tenant for e in self.events})} tenants,"
                  f" {len({(e.tenant, e.key) for e in self.events})} queues per destination, in {path}")
        for node in self.cluster.nodes:
            await self.cluster.start(node)
        receivers = await self.children.start(
            "receivers", sys.executable, "-m", "demo.receivers", "--slow-seconds", str(plan.slow_seconds),
            "--failing-seconds", str(plan.failing_seconds), "--rate", str(plan.rate), pipe=True)
        self._others.append(receivers)
        assert receivers.process.stdout is not None
        self.urls = json.loads(await receivers.process.stdout.readline())
        await self.cluster.ready()
        self.note(f"three nodes ready after {self.seconds:.1f} s")
        async with Client(self.cluster.addresses) as client, aiohttp.ClientSession() as session:
            await self.create(client)
            self.dispatcher = await self.children.start(
                "dispatcher", *spillway("dispatch"), "--address", ",".join(self.cluster.addresses),
                needs_others=True)
            self._others.append(self.dispatcher)
            finished = False
            async with asyncio.TaskGroup() as group:
                working = group.create_task(self.work(client))
                looking = group.create_task(self.look_on(client, session))
                try:
                    async with asyncio.timeout(plan.seconds_max - self.seconds):
                        await asyncio.shield(working)
                        finished = True
                except TimeoutError:
                    self.note(f"gave up after {plan.seconds_max:.0f} s")
                    working.cancel()
                looking.cancel()
            self.phase = "verifying"
            await self.dispatcher.end()
            for _ in range(LAST_LOOKS_MAX):  # a node that has just come back takes its leaderships back: some shards may not answer then
                await self.look(client, session)
                if all(stats is not None and not stats.shards_missing for stats in self.stats.values()):
                    break
                await asyncio.sleep(LOOK_SECONDS)
            self.display.show(self.view(await self.cluster.statuses()), last=True)
            return await self.judge(session, finished)

    async def create(self, client: Client) -> None:
        """Makes the five destinations."""
        for name in NAMES:
            await client.admin.create_destination(Destination(
                name, DeliveryPolicy(backoff_base=0.1, backoff_cap=2.0),
                HttpTarget(self.urls[name], TIMEOUT_SECONDS, CONCURRENCY_MAX, allow_private_addresses=True)))

    async def work(self, client: Client) -> None:
        """Produces, kills a node meanwhile, and waits until all is delivered."""
        self.phase = "delivering"
        async with asyncio.TaskGroup() as group:
            group.create_task(self.produce(client))
            if self.plan.kill:
                group.create_task(self.kill())
        self.phase = "all produced, delivering the rest"
        done = 0
        while done < SETTLED_LOOKS:
            await asyncio.sleep(LOOK_SECONDS)
            left = [self.stats[name] for name in UP]
            whole = all(stats is not None and not stats.shards_missing and stats.messages == 0 for stats in left)
            done = done + 1 if whole else 0

    async def produce(self, client: Client) -> None:
        """Sends every event to every destination, in order, spread over `produce_seconds`."""
        plan = self.plan
        batch = max(1, int(len(self.events) * BATCH_SECONDS / plan.produce_seconds))
        begun = time.monotonic()
        async with client.producer() as producer:
            for start in range(0, len(self.events), batch):
                await asyncio.sleep(begun + start / len(self.events) * plan.produce_seconds - time.monotonic())
                some = self.events[start:start + batch]
                await producer.send_many([
                    Record(name, event.line, tenant=event.tenant, key=event.key, id=f"event-{event.number}",
                           headers={"Content-Type": "application/json", EVENT_HEADER: str(event.number)})
                    for event in some for name in NAMES])
                self.produced += len(some)
        self.note(f"all events produced, and acknowledged by a majority of nodes, after {self.seconds:.1f} s")

    async def kill(self) -> None:
        """A third in, kills the node that leads most shards; starts it again some seconds later."""
        third = len(self.events) / 3
        while self.counts["healthy"][ACCEPTED] < third:  # noqa: ASYNC110 - counts come from another process
            await asyncio.sleep(LOOK_SECONDS / 5)
        views = {view.name: view for view in await self.cluster.statuses()}
        node = max(self.cluster.nodes, key=lambda n: views[n.name].leads)
        await self.cluster.kill(node)
        self.note(f"SIGKILL to {node.name}, leader of {views[node.name].leads} groups, at {self.seconds:.1f} s")
        await asyncio.sleep(DOWN_SECONDS)
        await self.restart(node)

    async def restart(self, node: Node) -> None:
        """Starts the killed node again."""
        await self.cluster.start(node)
        self.restarted = True
        self.note(f"{node.name} started again at {self.seconds:.1f} s")

    # -- looking on ----------------------------------------------------------------------------------------------

    async def look_on(self, client: Client, session: aiohttp.ClientSession) -> None:
        """Looks at everything and shows it, until cancelled."""
        while True:
            _, statuses = await asyncio.gather(self.look(client, session), self.cluster.statuses())
            self.cluster.check()
            for child in self._others:
                if not child.running:
                    raise RuntimeError(f"{child.name} ended with {child.process.returncode}:\n{child.tail()}")
            self.display.show(self.view(statuses))
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self, client: Client, session: aiohttp.ClientSession) -> None:
        """Reads the counts of receivers and destinations."""
        async with session.get(self.urls["control"] + "/counts") as response:
            self.counts = await response.json()
        self._rates.append((time.monotonic(), sum(counts[ACCEPTED] for counts in self.counts.values())))
        await asyncio.gather(*(self._look_at(client, name) for name in NAMES))

    async def _look_at(self, client: Client, name: str) -> None:
        try:
            async with asyncio.timeout(2.0):
                self.stats[name] = await client.admin.destination_stats(name)
        except (SpillwayError, TimeoutError):
            self.stats[name] = None

    def view(self, nodes: Sequence[NodeView]) -> View:
        """What is known now, for the display."""
        (at, delivered), (before, earlier) = self._rates[-1], self._rates[0]
        now = datetime.now(UTC)
        rows = []
        kinds = self.plan.kinds()
        for name in NAMES:
            counts, stats = self.counts.get(name, [0, 0, 0]), self.stats[name]
            if stats is None:
                rows.append(DestinationView(name, kinds[name], counts[ACCEPTED], counts[REFUSED]))
                continue
            parked = stats.parked_until_time
            rows.append(DestinationView(
                name, kinds[name], counts[ACCEPTED], counts[REFUSED], stats.messages, stats.dead_letters,
                None if stats.oldest_enqueue_time is None else (now - stats.oldest_enqueue_time).total_seconds(),
                None if parked is None or parked < now else (parked - now).total_seconds(), stats.parked_tenants))
        return View(self.seconds, self.phase, self.produced, len(self.events),
                    (delivered - earlier) / (at - before) if at > before else 0.0, rows, nodes, self.notes)

    # -- verdict -------------------------------------------------------------------------------------------------

    async def judge(self, session: aiohttp.ClientSession, finished: bool) -> bool:
        """Verifies what arrived, shows the verdict, returns whether all is well."""
        reports: dict[str, Report | None] = {}
        problems = [] if finished else ["not everything was delivered in time"]
        if self.dispatcher.process.returncode != 0:
            problems.append(f"the dispatcher ended with {self.dispatcher.process.returncode}:\n{self.dispatcher.tail()}")
        if not self.restarted:
            problems.append("the node was not killed and started again in time")
        queued = {name: None if stats is None or stats.shards_missing else stats.messages
                  for name, stats in self.stats.items()}
        for name in UP:
            async with session.get(f"{self.urls['control']}/history/{name}") as response:
                history = History.load(await response.read())
            report = await asyncio.to_thread(verify, self.events, history)
            reports[name] = report
            if not report.passed:
                problems.append(f"{name}: {report.lost} lost, {report.overtaken} out of order,"
                                f" {report.corrupt + report.misplaced} changed")
                problems += [f"{name}: {example}" for example in report.examples]
        reports["down"] = None
        if queued["down"] != len(self.events):
            problems.append(f"down: {queued['down']} messages are queued; it should be {len(self.events)}")
        problems += [f"{name}: {stats.dead_letters} dead letters" for name, stats in self.stats.items()
                     if stats is not None and stats.dead_letters]
        passed = not problems
        self.display.verdict(len(self.events), reports, queued, passed, problems)
        return passed


async def run(plan: Plan) -> bool:
    """Runs the demo in a directory of its own; returns whether it passed."""
    with contextlib.ExitStack() as stack:
        if plan.keep:
            directory = Path(tempfile.mkdtemp(prefix="spillway-demo-"))
        else:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spillway-demo-")))
        # What the client library reports belongs beside the processes' logs, not into the table.
        logging.basicConfig(filename=directory / "demo.log", level="INFO", force=True,
                            format="%(asctime)s %(levelname)s %(name)s %(message)s")
        async with Children(directory) as children:
            with Display(plan.plain) as display:
                demo = Demo(plan, directory, children, display)
                try:
                    return await demo.run()
                finally:
                    await demo.cluster.close()
                    if plan.keep:
                        display.say(f"data and logs are kept in {directory}")
