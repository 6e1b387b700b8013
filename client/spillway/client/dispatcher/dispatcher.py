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
from dataclasses import asdict, astuple, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from spillway.client.dispatcher.lane import CLOSED, Counts, Lane
from spillway.client.dispatcher.metrics import Past
from spillway.client.dispatcher.sender import AddressCheck, Resolver, Sender
from spillway.client.dispatcher.source import Broker, Target
from spillway.client.errors import SpillwayError
from spillway.contract.version import VERSION

if TYPE_CHECKING:
    from spillway.client.spans import Tracing

log = logging.getLogger("spillway.dispatcher")

WATCH_SECONDS = 1.0  # how often targets are read and states looked at
TARGETS_SECONDS_MAX = 5.0  # for reading targets; states and a stop wait for it
SUMMARY_SECONDS = 10.0
GRACE_SECONDS = 15.0  # Kubernetes gives 30 s before SIGKILL, and the last settlements take up to 10 s of them
LANES_MAX = 2048  # each may hold several MiB and has connections of its own; run more dispatchers beyond
RESOLVER_THREADS = 64  # as many name servers may hang at a time without anybody else noticing
NAMES_SHOWN_MAX = 10  # in a summary

BACKOFF = "backoff"  # until when: the broker knows
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
        self.sender: Sender | None = None
        self.retiring: set[asyncio.Task[None]] = set()  # senders of the target as it was, with requests under way
        self.state: str | None = None
        self.circuit = CLOSED
        self.seen = Counts()


class Dispatcher:
    """Delivers all destinations with an HTTP target whose name fits, until `stop`."""

    def __init__(self, broker: Broker, patterns: Sequence[str] = (), grace_seconds: float = GRACE_SECONDS,
                 address_check: AddressCheck | None = None, tracing: Tracing | None = None,
                 watch_seconds: float = WATCH_SECONDS, summary_seconds: float = SUMMARY_SECONDS) -> None:
        """
        Args:
            broker: where targets and runs come from.
            patterns: names of destinations, '*' standing for anything; empty: all.
            grace_seconds: how long `stop` waits for requests under way.
            address_check: asked before every connection; see `AddressCheck`.
            tracing: makes spans of deliveries, of messages that are sampled.
            watch_seconds: how often the broker is asked for targets.
            summary_seconds: how often a summary is logged.
        """
        self._broker = broker
        self._wanted = matcher(patterns)
        self._grace_seconds = grace_seconds
        self._address_check = address_check
        self._tracing = tracing
        self._watch_seconds = watch_seconds
        self._summary_seconds = summary_seconds
        self._members: dict[str, _Member] = {}
        self._stop = asyncio.Event()
        self._executor = ThreadPoolExecutor(RESOLVER_THREADS, "resolve")
        self._resolver = Resolver(self._executor)
        self._past = Counts()  # of lanes that ended
        self.past = Past()  # the same by destination
        self._summarised = Counts()
        self._reachable = True
        self._unusable: dict[Target, str] = {}
        self._crowded = False
        self._user_agent = f"spillway/{VERSION}"

    def __repr__(self) -> str:
        return f"<Dispatcher: {len(self._members)} destinations, {self.counts()}>"

    def counts(self) -> Counts:
        """What all lanes did since the dispatcher started."""
        return total([self._past, *(m.lane.counts for m in self._members.values() if m.lane is not None)])

    def lanes(self) -> list[tuple[str, Lane]]:
        """Those that there are, by destination."""
        return [(name, member.lane) for name, member in self._members.items() if member.lane is not None]

    @property
    def reachable(self) -> bool:
        """Whether targets could be read the last time."""
        return self._reachable

    @property
    def unusable(self) -> int:
        """How many destinations have a target that is of no use."""
        return len(self._unusable)

    def states(self) -> dict[str, str | None]:
        """Each destination's state; None: nothing was sent yet."""
        return {name: member.state for name, member in self._members.items()}

    def status(self) -> dict[str, object]:
        """What is going on now, for people and programs, as JSON has it: `docs/webhooks.md` tells of the fields. There is
        nothing of messages and targets in it but names, counts and kinds of failure."""
        return {
            "time": _moment(time.time()),
            "stopping": self._stop.is_set(),
            "broker_reachable": self._reachable,
            "counts": asdict(self.counts()),
            "destinations": [_lane_status(name, member) for name, member in sorted(self._members.items())],
            "not_delivered": [{"destination": target.destination, "reason": why} for target, why in self._unusable.items()],
        }

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
            target = wanted.get(name)
            if target != member.target and not (target is not None and self._change(member, target)):
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
            if target not in self._unusable:
                self._start(target)
        self._unusable = {target: why for target, why in self._unusable.items() if wanted.get(target.destination) == target}

    def _sender(self, target: Target) -> Sender | None:
        """A sender for a target; None if it is not usable."""
        try:
            return Sender(target, self._resolver, self._user_agent, self._address_check)
        except ValueError as e:
            log.error("destination=%s is not delivered: %s", target.destination, e)
            self._unusable[target] = str(e)
            return None

    def _start(self, target: Target) -> None:
        sender = self._sender(target)
        if sender is None:
            return
        member = self._members[target.destination] = _Member(target)
        member.task = asyncio.create_task(self._member(member, sender), name=f"lane {target.destination}")
        log.info("destination=%s started: concurrency_max=%d timeout=%gs", target.destination, target.concurrency_max,
                 target.timeout)

    def _change(self, member: _Member, target: Target) -> bool:
        """Takes a changed target into use without interrupting deliveries, if that can be."""
        old, lane = member.target, member.lane
        if lane is None or member.sender is None or member.leaving.is_set() or (
                (old.timeout, old.concurrency_max) != (target.timeout, target.concurrency_max)):
            return False
        sender = self._sender(target)
        if sender is None:
            return False
        sender.open()
        retiring = asyncio.create_task(member.sender.retire())
        member.retiring.add(retiring)
        retiring.add_done_callback(member.retiring.discard)
        member.target, member.sender = target, sender
        lane.change(target, sender)
        log.info("destination=%s changed", target.destination)
        return True

    async def _member(self, member: _Member, sender: Sender) -> None:
        """One lane from start to end."""
        try:
            sender.open()
            member.sender = sender
            lane = member.lane = Lane(member.target, self._broker, sender, tracing=self._tracing)
            running = asyncio.create_task(lane.run())
            leaving = asyncio.create_task(member.leaving.wait())
            try:
                await asyncio.wait([running, leaving], return_when=asyncio.FIRST_COMPLETED)
                member.leaving.set()  # from now on it is not changed any more
                await lane.stop(self._grace_seconds)
                if running.done():
                    running.result()
            finally:
                leaving.cancel()
                running.cancel()
                if member.retiring:
                    await asyncio.wait(member.retiring)  # nothing is under way any more
                await member.sender.close()
        except Exception:  # a bug in one lane must not stop the others; the watch starts it again
            log.exception("destination=%s: its lane failed", member.target.destination)
        finally:
            if member.lane is not None:
                self._past = total([self._past, member.lane.counts])
                self.past.ended(member.target.destination, member.lane)
            del self._members[member.target.destination]
            log.info("destination=%s ended", member.target.destination)

    # -- reports -------------------------------------------------------------------------------------------------

    def _report_states(self) -> None:
        for name, member in self._members.items():
            lane = member.lane
            if lane is None:
                continue
            counts = Counts(*astuple(lane.counts))
            state = state_of(difference(counts, member.seen)) or member.state
            member.seen = counts
            circuit = lane.circuit
            if (state, circuit) == (member.state, member.circuit):
                continue
            # A dead destination's probes are half-open at every turn of its backoff: of interest while it is looked into.
            level = logging.INFO if state == DELIVERING else logging.WARNING if state != member.state else logging.DEBUG
            log.log(level, "destination=%s state=%s was=%s circuit=%s failures_in_a_row=%d until=%s%s", name, state,
                    member.state or "new", circuit, lane.failures_in_a_row, _until(lane),
                    "" if state == DELIVERING else f": {lane.last_failure}")
            member.state, member.circuit = state, circuit

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


def _moment(seconds: float | None) -> str | None:
    """Seconds since 1970 as RFC 3339 has it."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _until(lane: Lane) -> str:
    """Until when nothing is sent, in a log line: of a throttled destination that is as its last tenant."""
    if lane.circuit != CLOSED:
        return BACKOFF
    throttled = lane.throttled_until()
    if not throttled:
        return "-"
    return _moment(max((seconds for seconds in throttled.values() if seconds is not None), default=None)) or BACKOFF


def _lane_status(name: str, member: _Member) -> dict[str, object]:
    lane = member.lane
    out: dict[str, object] = {"destination": name, "state": member.state or "new"}
    if lane is None:
        return out
    counts = asdict(lane.counts)
    throttled = lane.throttled_until()
    known = [seconds for seconds in throttled.values() if seconds is not None]
    return {
        **out, "circuit": lane.circuit, "failures_in_a_row": lane.failures_in_a_row, "last_status": lane.last_status,
        "last_error": lane.last_failure or None, "last_error_time": _moment(lane.last_failure_at),
        "throttled_tenants": len(throttled), "throttled_until": _moment(max(known, default=None)),
        "in_flight": lane.in_flight, "concurrency_max": lane.target.concurrency_max,
        "failed": counts["retried"] + counts["throttled"] + counts["down"] + counts["rejected"], **counts}
