"""Keeps one lane per destination that has an HTTP target; reports what happens, per destination and in sum.

Logs hold names, counts and statuses; never payloads, headers or URLs (which may carry passwords). There is no line
per message: a line when a destination's state changes, looked at once a second, and a summary every ten.
"""
from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, fields
from importlib.metadata import PackageNotFoundError, version

from spillway.client.dispatcher.lane import Counts, Lane
from spillway.client.dispatcher.sender import AddressCheck, Resolver, Sender
from spillway.client.dispatcher.source import Broker, Target
from spillway.client.errors import SpillwayError

log = logging.getLogger("spillway.dispatcher")

WATCH_SECONDS = 1.0  # how often targets are read and states looked at
TARGETS_SECONDS_MAX = 5.0  # for reading targets; states and a stop wait for it
SUMMARY_SECONDS = 10.0
GRACE_SECONDS = 15.0  # Kubernetes gives 30 s before SIGKILL, and the last settlements take up to 10 s of them
LANES_MAX = 2048  # each may hold several MiB and has connections of its own; run more dispatchers beyond
RESOLVER_THREADS = 64  # as many name servers may hang at a time without anybody else noticing
NAMES_SHOWN_MAX = 10  # in a summary

DELIVERING, FAILING, THROTTLED, DOWN = "delivering", "failing", "throttled", "down"


def matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a destination's name fits one of the patterns, in which '*' is any run of characters; none: all do."""
    if not patterns:
        return lambda name: True
    whole = re.compile("|".join(".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns), re.DOTALL)
    return lambda name: whole.fullmatch(name) is not None


def state_of(delta: Counts) -> str | None:
    """A destination's state by what its lane did in the last second; None: nothing, so it is what it was. One
    success says more than any number of failures: some queues fail, the destination works."""
    if delta.delivered:
        return DELIVERING
    if delta.down:
        return DOWN
    if delta.retried or delta.rejected:
        return FAILING
    return THROTTLED if delta.throttled else None


def difference(new: Counts, old: Counts) -> Counts:
    """What was counted in between."""
    return Counts(*(a - b for a, b in zip(astuple(new), astuple(old), strict=True)))


def total(counts: Sequence[Counts]) -> Counts:
    """The sum."""
    return Counts(*(sum(column) for column in zip(*map(astuple, counts), strict=True))) if counts else Counts()


class _Member:
    """A destination: its lane, and what was last said about it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.lane: Lane | None = None
        self.task: asyncio.Task[None] | None = None
        self.leaving = asyncio.Event()
        self.state: str | None = None
        self.seen = Counts()


class Dispatcher:
    """Delivers all destinations with an HTTP target whose name fits, until `stop`."""

    def __init__(self, broker: Broker, patterns: Sequence[str] = (), grace_seconds: float = GRACE_SECONDS,
                 address_check: AddressCheck | None = None,
                 watch_seconds: float = WATCH_SECONDS, summary_seconds: float = SUMMARY_SECONDS) -> None:
        """
        Args:
            broker: where targets and runs come from.
            patterns: names of destinations, '*' standing for anything; empty: all.
            grace_seconds: how long `stop` waits for requests under way.
            address_check: asked before every connection; see `AddressCheck`.
            watch_seconds: how often the broker is asked for targets.
            summary_seconds: how often a summary is logged.
        """
        self._broker = broker
        self._wanted = matcher(patterns)
        self._grace_seconds = grace_seconds
        self._address_check = address_check
        self._watch_seconds = watch_seconds
        self._summary_seconds = summary_seconds
        self._members: dict[str, _Member] = {}
        self._stop = asyncio.Event()
        self._executor = ThreadPoolExecutor(RESOLVER_THREADS, "resolve")
        self._resolver = Resolver(self._executor)
        self._past = Counts()  # of lanes that ended
        self._summarised = Counts()
        self._reachable = True
        self._unusable: dict[Target, str] = {}
        self._crowded = False
        try:
            self._user_agent = "spillway/" + version("spillway")
        except PackageNotFoundError:
            self._user_agent = "spillway"

    def __repr__(self) -> str:
        return f"<Dispatcher: {len(self._members)} destinations, {self.counts()}>"

    def counts(self) -> Counts:
        """What all lanes did since the dispatcher started."""
        return total([self._past, *(m.lane.counts for m in self._members.values() if m.lane is not None)])

    def states(self) -> dict[str, str | None]:
        """Each destination's state; None: nothing was sent yet."""
        return {name: member.state for name, member in self._members.items()}

    def stop(self) -> None:
        """Makes `run` finish. Safe to call twice and from a signal handler of the event loop."""
        self._stop.set()

    async def run(self) -> None:
        """Delivers until `stop`; then finishes what is under way and gives back the rest."""
        summary_due = time.monotonic() + self._summary_seconds
        try:
            while not self._stop.is_set():
                await self._watch()
                self._report_states()
                if time.monotonic() >= summary_due:
                    summary_due += self._summary_seconds
                    self._report_summary()
                try:
                    async with asyncio.timeout(self._watch_seconds):
                        await self._stop.wait()
                except TimeoutError:
                    pass
        finally:
            for member in self._members.values():
                member.leaving.set()
            tasks = [member.task for member in self._members.values() if member.task is not None]
            if tasks:
                await asyncio.wait(tasks)
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._report_summary()
            log.info("stopped")

    # -- destinations --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Starts lanes of new targets, replaces those of changed ones, stops those that are gone."""
        try:
            async with asyncio.timeout(TARGETS_SECONDS_MAX):
                targets = await self._broker.targets()
        except (SpillwayError, TimeoutError) as e:
            if self._reachable:
                log.warning("targets cannot be read: %s; going on with those known", e or type(e).__name__)
            self._reachable = False
            return
        if not self._reachable:
            log.info("targets can be read again")
        self._reachable = True
        wanted = {target.destination: target for target in targets if self._wanted(target.destination)}
        for name, member in self._members.items():
            if wanted.get(name) != member.target:
                member.leaving.set()
        for name, target in wanted.items():
            if name in self._members:
                continue  # if it changed: once the old lane has finished
            if len(self._members) >= LANES_MAX:
                if not self._crowded:
                    log.error("more than %d destinations: the rest is not delivered; run more dispatchers, each with"
                              " its own --destination patterns", LANES_MAX)
                self._crowded = True
                break
            if self._unusable.get(target) is None:
                self._start(target)
        self._unusable = {target: why for target, why in self._unusable.items() if wanted.get(target.destination) == target}

    def _start(self, target: Target) -> None:
        try:
            sender = Sender(target, self._resolver, self._user_agent, self._address_check)
        except ValueError as e:
            self._unusable[target] = str(e)
            log.error("destination=%s is not delivered: %s", target.destination, e)
            return
        member = self._members[target.destination] = _Member(target)
        member.task = asyncio.create_task(self._member(member, sender), name=f"lane {target.destination}")
        log.info("destination=%s started: concurrency_max=%d timeout=%gs", target.destination, target.concurrency_max,
                 target.timeout)

    async def _member(self, member: _Member, sender: Sender) -> None:
        """One lane from start to end."""
        try:
            async with sender:
                lane = member.lane = Lane(member.target, self._broker, sender)
                running = asyncio.create_task(lane.run())
                leaving = asyncio.create_task(member.leaving.wait())
                try:
                    await asyncio.wait([running, leaving], return_when=asyncio.FIRST_COMPLETED)
                    await lane.stop(self._grace_seconds)
                    if running.done():
                        running.result()
                finally:
                    leaving.cancel()
                    running.cancel()
        except Exception:  # a bug in one lane must not stop the others; the watch starts it again
            log.exception("destination=%s: its lane failed", member.target.destination)
        finally:
            if member.lane is not None:
                self._past = total([self._past, member.lane.counts])
            del self._members[member.target.destination]
            log.info("destination=%s ended", member.target.destination)

    # -- reports -------------------------------------------------------------------------------------------------

    def _report_states(self) -> None:
        for name, member in self._members.items():
            lane = member.lane
            if lane is None:
                continue
            counts = Counts(*astuple(lane.counts))
            state = state_of(difference(counts, member.seen))
            member.seen = counts
            if state is None or state == member.state:
                continue
            before, member.state = member.state or "new", state
            if state == DELIVERING:
                log.info("destination=%s state=%s was=%s", name, state, before)
            else:
                log.warning("destination=%s state=%s was=%s: %s", name, state, before, lane.last_failure)

    def _report_summary(self) -> None:
        counts = self.counts()
        delta = difference(counts, self._summarised)
        self._summarised = counts
        troubled = sorted(f"{name} ({member.state})" for name, member in self._members.items()
                          if member.state not in (None, DELIVERING))
        more = f" and {len(troubled) - NAMES_SHOWN_MAX} more" if len(troubled) > NAMES_SHOWN_MAX else ""
        log.info("destinations=%d %s%s", len(self._members),
                 " ".join(f"{field.name}={getattr(delta, field.name)}" for field in fields(delta)),
                 f"; troubled: {', '.join(troubled[:NAMES_SHOWN_MAX])}{more}" if troubled else "")
