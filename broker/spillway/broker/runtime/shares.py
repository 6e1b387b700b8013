"""What nodes tell each other about destinations whose queues they share: bytes and ages (budgets), demand (limits), closed
gates. Several times a second and as hints: what must survive is in the shards and in the meta group.

A node that does not hear from another for a while forgets what that one told. So a budget may be passed by what is
taken in during one exchange, and a limit, divided by demand, while demand moves between nodes.
"""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
from spillway.broker.core import scheduler as sched
from spillway.broker.core.policy import UNBOUNDED, UNLIMITED, Adaptive, Policy, Retention, tenant_retention
from spillway.broker.core.state import destination_of
from spillway.broker.errors import Unavailable
from spillway.peer.v1.share_service_pb2 import SharedScope, ShareRequest, ShareResponse

if TYPE_CHECKING:
    from spillway.broker.runtime.forward import Forwarder
    from spillway.broker.runtime.node import Node

log = logging.getLogger(__name__)

SHARE_SECONDS, SHARE_SECONDS_MAX = 0.25, 1.0
REPORT_PAGE = 500  # destinations looked at before others get a turn
FORGET_MS = 3_000  # without news of a node
# A gate that nobody speaks of any more is kept closed for so long: its shard may be changing hands.
GATE_LINGER_MS = 1_500
GATE_GRACE_MS = 2_000  # a gate of another node is kept closed here this much longer than it is there, unless it tells
PROBE_MS = 1_000  # a gate that has been half-open here for so long without a probe is nothing to the other nodes
ASKED_MAX = 4_096
USAGE_MAX = 65_536  # scopes remembered
USAGE_MS = 50  # how long a sum over the shards is used before it is made again
AGES_SECONDS = 1.0
AGES_PAGE = 512  # queues looked at before others get a turn
DEMAND_MIN = 0.05  # of all demand, what a node is taken to have at least: so it can start


def is_shared(policy: Policy) -> bool:
    """Whether a policy has limits or budgets that hold for the cluster."""
    return (policy.limit != UNLIMITED or policy.tenant_limit != UNLIMITED or policy.retention != UNBOUNDED
            or policy.tenant_retention != UNBOUNDED or bool(policy.tenants) or bool(policy.adaptive.pinned))


def _has_age(policy: Policy) -> bool:
    return bool(policy.retention.age_ms_max or policy.tenant_retention.age_ms_max
                or any(t.retention is not None and t.retention.age_ms_max for t in policy.tenants.values()))


class _Usage:
    __slots__ = ("at_ms", "size")

    def __init__(self, at_ms: int, size: int) -> None:
        self.at_ms = at_ms
        self.size = size


class _Part:
    """What another node told."""

    __slots__ = ("at_ms", "number", "scopes")

    def __init__(self) -> None:
        self.number = 0
        self.at_ms = 0
        self.scopes: dict[bytes, SharedScope] = {}


class Shares:
    """Of one node. Also judges budgets."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._number = node.now_ms()  # higher than in any earlier life
        self._parts: dict[str, _Part] = {}
        self._answers: dict[bytes, dict[str, tuple[int, int]]] = {}  # tenant's scope -> node -> (bytes, told ms)
        self._usage: dict[bytes, _Usage] = {}  # what is here and elsewhere, and what was taken in since
        self._oldest: dict[bytes, int] = {}  # destination or tenant -> enqueue ms of its oldest message here
        self._remote_gates: dict[bytes, int] = {}  # closed by other nodes -> when one of them last said so
        self._opened: dict[bytes, int] = {}  # gates opened here -> when
        self._shared: list[tuple[bytes, Policy]] = []
        self._revision = -1
        self._wake = asyncio.Event()

    # -- budgets -------------------------------------------------------------------------------------------------

    def refusal(self, policy: Policy, destination: bytes, scope: bytes, size: int) -> str | None:
        """Why a destination takes no more of a tenant (`destination NUL tenant`), in words; None if it takes `size` bytes
        more, which then count."""
        whole, own = policy.retention, UNBOUNDED
        if policy.tenant_retention != UNBOUNDED or policy.tenants:
            own = tenant_retention(policy, scope[len(destination) + 1:].decode())
        if whole == UNBOUNDED and own == UNBOUNDED:
            return None
        now = self._node.now_ms()
        counted = []
        for name, budget in ((destination, whole), (scope, own)):
            if budget is not UNBOUNDED:
                why = self._exceeded(name, budget, size, now)
                if why is not None:
                    return f"{_words(name)} {why}"
                counted.append(name)
        for name in counted:
            self._usage[name].size += size
        return None

    def _exceeded(self, scope: bytes, budget: Retention, size: int, now: int) -> str | None:
        usage = self._usage.get(scope)
        if usage is None or now - usage.at_ms > USAGE_MS:
            if len(self._usage) > USAGE_MAX:
                self._usage.clear()
            usage = self._usage[scope] = _Usage(now, self._bytes_here(scope) + self._bytes_elsewhere(scope, now))
        if budget.bytes_max and usage.size + size > budget.bytes_max:
            return (f"is over its retention budget: {usage.size} bytes wait there and {size} more do not fit into "
                    f"{budget.bytes_max} (retention.bytes_max)")
        if budget.age_ms_max:
            oldest = self._oldest.get(scope, 0)
            for part in self._parts.values():
                told = part.scopes.get(scope)
                if told is not None and told.oldest_unix_ms and now - part.at_ms < FORGET_MS:
                    oldest = min(oldest or told.oldest_unix_ms, told.oldest_unix_ms)
            if oldest and now - oldest > budget.age_ms_max:
                return (f"is over its retention budget: its oldest message waits for {(now - oldest) // 1000} s, longer than "
                        f"{budget.age_ms_max / 1000:g} s (retention.age_max)")
        return None

    def _bytes_here(self, scope: bytes) -> int:
        states = [r.state for r in self._node.shards.values() if r.leading]
        if b"\0" in scope:
            return sum(state.tenant(scope)[1] for state in states)
        return sum(state.counters[scope].size for state in states if scope in state.counters)

    def _bytes_elsewhere(self, scope: bytes, now: int) -> int:
        if b"\0" in scope:
            answers = self._answers.get(scope)
            if answers is None:
                if len(self._answers) < ASKED_MAX and len(self._node.members) > 1:
                    self._answers[scope] = {}
                    self._wake.set()
                return 0
            return sum(size for size, at in answers.values() if now - at < FORGET_MS)
        return sum(part.scopes[scope].message_bytes for part in self._parts.values()
                   if scope in part.scopes and now - part.at_ms < FORGET_MS)

    async def watch_ages(self) -> None:
        """Keeps the ages of destinations with a budget of age."""
        while True:
            await asyncio.sleep(AGES_SECONDS)
            await self.look_at_ages()

    async def look_at_ages(self) -> None:
        """Finds the oldest message of every destination and tenant with a budget of age, among all their queues, some at a
        time."""
        found: dict[bytes, int] = {}
        for name, policy in self._policies():
            if not _has_age(policy):
                continue
            prefix = name + b"\0"
            for runtime in list(self._node.shards.values()):
                start = b""
                while runtime.leading:
                    names = runtime.state.queue_names(prefix, start, AGES_PAGE)
                    for queue in names:
                        head = runtime.state.head_ms(queue)
                        scope = queue[:queue.index(b"\0", len(prefix))]
                        for key in (name, scope):
                            if head and head < found.get(key, 1 << 62):
                                found[key] = head
                    await asyncio.sleep(0)
                    if len(names) < AGES_PAGE:
                        break
                    start = names[-1] + b"\0"
        self._oldest = found

    # -- the exchange --------------------------------------------------------------------------------------------

    def _policies(self) -> list[tuple[bytes, Policy]]:
        meta = self._node.meta
        if self._revision != meta.revision:
            self._revision = meta.revision
            self._shared = [(d.name.encode(), d.policy) for d in meta.directory.destinations.values() if is_shared(d.policy)]
        return self._shared

    async def report(self) -> ShareRequest:
        """What this node tells the others now. Lets others have a turn now and then."""
        node = self._node
        now = node.now_ms()
        self._number += 1
        request = ShareRequest(node_id=node.config.node_id, number=self._number)
        for i, (name, policy) in enumerate(self._policies()):
            if i % REPORT_PAGE == REPORT_PAGE - 1:
                await asyncio.sleep(0)
            size, demand = self._bytes_here(name), node.scheduler.demand(name)
            if size or demand:
                request.scopes.append(SharedScope(scope=name, message_bytes=size, demand=demand,
                                                  oldest_unix_ms=self._oldest.get(name, 0)))
            if _has_age(policy):
                for scope, oldest in self._oldest.items():
                    if scope.startswith(name + b"\0"):
                        request.scopes.append(SharedScope(scope=scope, oldest_unix_ms=oldest))
        for scope, (until, _) in node.gates.items():
            if self._closes(scope, until, now):
                request.scopes.append(SharedScope(scope=scope, parked_until_unix_ms=max(until, now) + GATE_GRACE_MS))
        self._opened = {scope: at for scope, at in self._opened.items() if now - at < FORGET_MS and scope not in node.gates}
        request.scopes.extend(SharedScope(scope=scope, opened=True) for scope in self._opened)
        fresh = [scope for scope in self._answers if (u := self._usage.get(scope)) is None or now - u.at_ms < FORGET_MS]
        self._answers = {scope: self._answers[scope] for scope in fresh}
        request.asked.extend(fresh)
        return request

    def _closes(self, scope: bytes, until: int, now: int) -> bool:
        """Whether the others must not deliver to a scope because of its gate here. A half-open gate waits for a probe, and if this
        node has nothing to probe with, or no consumer, that may be for ever: then the others find out for themselves."""
        gate = self._node.scheduler.gate(scope)
        return gate != sched.OPEN and not (gate == sched.HALF_OPEN and now > until + PROBE_MS)

    def told(self, request: ShareRequest) -> ShareResponse:
        """Another node's part."""
        node = self._node
        if request.node_id in node.members and request.node_id != node.config.node_id:
            part = self._parts.setdefault(request.node_id, _Part())
            if request.number > part.number:
                part.number = request.number
                part.at_ms = node.now_ms()
                part.scopes = {}
                for scope in request.scopes:
                    known = part.scopes.get(scope.scope)
                    if known is None:
                        part.scopes[scope.scope] = scope
                    else:
                        known.MergeFrom(scope)
                self._use_gates()
        response = ShareResponse()
        for asked in request.asked[:ASKED_MAX]:
            if asked.count(b"\0") == 1 and (size := self._bytes_here(asked)):
                response.scopes.append(SharedScope(scope=asked, message_bytes=size))
        return response

    def _use_gates(self) -> None:
        """Closes what the others keep closed, and opens what they have opened."""
        node = self._node
        now = node.now_ms()
        closed: dict[bytes, int] = {}
        opened: set[bytes] = set()
        for part in self._current(now):
            for scope, told in part.scopes.items():
                if told.parked_until_unix_ms > now:
                    closed[scope] = max(closed.get(scope, 0), told.parked_until_unix_ms)
                elif told.opened:
                    opened.add(scope)
        for scope, at in list(self._remote_gates.items()):
            if scope not in closed and (scope in opened or now - at > GATE_LINGER_MS):
                del self._remote_gates[scope]
                node.remote_hold(scope, 0)
        for scope, until in closed.items():
            self._remote_gates[scope] = now
            # A node that has closed the gate itself probes; were it held by the others, nobody would.
            node.remote_hold(scope, until if node.scheduler.gate(scope) == sched.OPEN else 0)

    async def divide_limits(self) -> None:
        """Takes this node's part of every limit. Lets others have a turn now and then."""
        node = self._node
        now = node.now_ms()
        for i, (name, policy) in enumerate(self._policies()):
            if i % REPORT_PAGE == REPORT_PAGE - 1:
                await asyncio.sleep(0)
            if policy.limit == UNLIMITED and policy.tenant_limit == UNLIMITED and policy.adaptive == Adaptive() and not any(
                    t.limit for t in policy.tenants.values()):
                continue
            own = node.scheduler.demand(name)
            others = [part.scopes[name].demand for part in self._current(now) if name in part.scopes]
            node.scheduler.set_share(name, share(own, [d for d in others if d > 0], len(node.members)))

    def _current(self, now: int) -> Iterator[_Part]:
        for part in self._parts.values():
            if now - part.at_ms < FORGET_MS:
                yield part

    def handed_over(self, scope: bytes, until: int) -> None:
        """The shard that keeps a closed gate is led by another node now, which will say so in a moment."""
        self._remote_gates[scope] = self._node.now_ms()
        self._node.remote_hold(scope, until + GATE_GRACE_MS)

    def opened(self, scope: bytes) -> None:
        """A gate was opened here."""
        self._opened[scope] = self._node.now_ms()
        self._wake.set()

    def wake(self) -> None:
        """Something changed that the others should know soon."""
        self._wake.set()

    async def run(self, forwarder: Forwarder) -> None:
        """Tells the others, again and again."""
        node = self._node
        busy: dict[str, asyncio.Task[None]] = {}
        while True:
            try:
                async with asyncio.timeout(SHARE_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            peers = [n for n in node.members if n != node.config.node_id]
            if not peers:
                continue
            begin = node.clock.monotonic()
            await self.divide_limits()
            request = await self.report()
            for peer in peers:
                if peer not in busy or busy[peer].done():
                    busy[peer] = asyncio.get_running_loop().create_task(self._tell(forwarder, peer, request))
            self._use_gates()
            # Woken often, it still rests; and with very many destinations it takes a small part of the node's time.
            await asyncio.sleep(min(SHARE_SECONDS_MAX, max(SHARE_SECONDS / 5, 20 * (node.clock.monotonic() - begin))))

    async def _tell(self, forwarder: Forwarder, peer: str, request: ShareRequest) -> None:
        try:
            response: ShareResponse = await forwarder.link(peer).share.Share(request, timeout=FORGET_MS / 1000)
        except (grpc.aio.AioRpcError, Unavailable):
            return  # it will hear the next one
        now = self._node.now_ms()
        told = {scope.scope: scope.message_bytes for scope in response.scopes}
        for asked in request.asked:
            answers = self._answers.get(asked)
            if answers is not None:
                answers[peer] = (told.get(asked, 0), now)


def share(own: float, others: list[float], nodes: int) -> float:
    """A node's part of a limit: by demand, and for every node that has any at least a little, so that all can start. The
    parts of nodes that know the same demands add up to at most 1."""
    if own <= 0:
        return 1 / nodes if not others else DEMAND_MIN / (1 + DEMAND_MIN * len(others))
    total = own + sum(others)
    least = DEMAND_MIN * total
    return max(own, least) / (max(own, least) + sum(max(d, least) for d in others))


def _words(scope: bytes) -> str:
    if b"\0" in scope:
        return f"tenant {scope.split(bytes(1))[1].decode()!r} of destination {destination_of(scope + bytes(1)).decode()!r}"
    return f"destination {scope.decode()!r}"
