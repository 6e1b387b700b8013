"""AdminService.Explain: why a destination, a tenant or a queue is not moving, in one sentence, and when it will drain.

The leader of a queue's shard knows why that queue waits. For a tenant or a destination every leader tells about its
own shards; what stops the part with the most messages is what is told.
"""
from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import grpc
from spillway.broker.core import scheduler as sched
from spillway.broker.core.queue import Queue
from spillway.broker.errors import BrokerError
from spillway.broker.runtime.shard import ShardRuntime
from spillway.broker.services.operations import CALL_SECONDS, Operations, parts_of
from spillway.broker.services.status import pass_on
from spillway.contract.hashing import queue_key, shard_of
from spillway.v1 import admin_service_pb2 as pb

PARTS_MAX = 1024  # of an unordered queue that are looked at
# Causes that end without anybody's help: as messages were delivered until now, so they will be.
_MOVING = (pb.STALL_CAUSE_NONE, pb.STALL_CAUSE_LEASED, pb.STALL_CAUSE_LIMIT, pb.STALL_CAUSE_NO_CREDIT)
Cause = tuple[int, str, int]  # StallCause, what to say after "…: ", until when in ms since 1970 (0: unknown or never)


class Explain(Operations):
    """The handler; part of AdminService."""

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        """See admin_service.proto."""
        try:
            tenant = request.tenant if request.HasField("tenant") else None
            key = request.key if request.HasField("key") else None
            await self._check_scope(request.destination, tenant, key)
            if key is not None:
                return await self._queue(request)
            return await self._scope(request)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)

    # -- one queue -----------------------------------------------------------------------------------------------

    async def _queue(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        node = self.node
        name = queue_key(request.destination, request.tenant, request.key)
        shard = shard_of(name, node.config.shards)
        what = f"queue {request.destination}/{request.tenant}/{request.key}"
        leader = node.leader_of(shard)
        if leader is None:
            return pb.ExplainResponse(cause=pb.STALL_CAUSE_NO_QUORUM, sentence=(
                f"{what}: its shard {shard} has no leader, as a majority of its replicas is not up; its messages are "
                "safe and wait."))
        if leader != node.config.node_id:
            self._refuse_from_peer(shard, leader)
            answer: pb.ExplainResponse = await self._at(leader, "Explain", request, timeout=CALL_SECONDS)
            return answer
        runtime = node.shards[shard]
        now = node.now_ms()
        queues = [q for part in parts_of(runtime, name, PARTS_MAX) if (q := runtime.state.open(part)) is not None]
        messages = sum(q.count for q in queues)
        scope = name[:name.rindex(b"\0")]
        cause = self._gates(scope, now)
        if not messages:
            cause = (pb.STALL_CAUSE_EMPTY, "it is empty", 0)
        elif cause is None:
            for queue in queues:
                cause = _head(runtime, queue, now)
                if cause is None:
                    break
            if cause is None:
                cause = self._scheduling(scope)
        rate = self._rate(request.destination)
        scheduler = node.scheduler.waiting(scope)
        active = max(1, len([t for t in self._tenants(request.destination) if t.ready or t.held]))
        rate = rate / active / max(1, scheduler.ready + scheduler.held)
        return _response(what, cause, messages, now, rate)

    # -- a tenant or a destination -------------------------------------------------------------------------------

    async def _scope(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        node = self.node
        now = node.now_ms()
        tenant = request.tenant if request.HasField("tenant") else None
        scope = request.destination.encode() + (b"" if tenant is None else b"\0" + tenant.encode())
        what = f"destination {request.destination}" if tenant is None else f"tenant {tenant} of {request.destination}"
        leading = [r for r in node.shards.values() if r.leading]
        if tenant is None:
            messages = sum(c.messages for r in leading if (c := r.state.counters.get(scope)) is not None)
        else:
            messages = sum(r.state.tenant(scope)[0] for r in leading)
        cause = self._gates(scope, now)
        if not messages:
            cause = (pb.STALL_CAUSE_EMPTY, "it has no messages", 0)
        elif cause is None:
            cause = self._leases_or_backoff(scope, now) or self._scheduling(scope)
        rate = self._rate(request.destination)
        if tenant is not None:
            rate /= max(1, len([t for t in self._tenants(request.destination) if t.ready or t.held]))
        own = _response(what, cause, messages, now, rate)
        if self.peer:
            return own
        leaders = self._leaders()
        answers = await asyncio.gather(*(
            self._at(n, "Explain", request, timeout=CALL_SECONDS) for n in leaders), return_exceptions=True)
        parts = [own, *(a for a in answers if isinstance(a, pb.ExplainResponse))]
        best = max(parts, key=lambda part: part.messages)
        total = pb.ExplainResponse()
        total.CopyFrom(best)
        total.messages = sum(part.messages for part in parts)
        with_time = [part.drain_time.ToMilliseconds() for part in parts if part.HasField("drain_time")]
        if len(with_time) == sum(part.messages > 0 for part in parts) and with_time:
            total.drain_time.FromMilliseconds(max(with_time))
        else:
            total.ClearField("drain_time")
        if total.messages != best.messages:
            cut = best.sentence.index("; ")
            total.sentence = best.sentence[:cut] + _tail(total.messages, total, now)
        missing = self._leaderless()
        if missing:
            total.sentence += f" Shards without a leader, whose messages are not counted: {', '.join(map(str, missing))}."
            if not total.messages:
                total.cause = pb.STALL_CAUSE_NO_QUORUM
        return total

    def _leases_or_backoff(self, scope: bytes, now: int) -> Cause | None:
        """What its queues wait for if none of them can be leased."""
        waiting = self.node.scheduler.waiting(scope)
        if waiting.ready:
            return None
        if waiting.held:
            return pb.STALL_CAUSE_LEASED, f"all that can be delivered is leased ({_counted(waiting.held, 'lease')})", 0
        return pb.STALL_CAUSE_BACKOFF, "all its queues wait for the end of a backoff or a delay", 0

    # -- causes --------------------------------------------------------------------------------------------------

    def _gates(self, scope: bytes, now: int) -> Cause | None:
        """A pause or a parking, of the destination or the tenant."""
        node = self.node
        name = scope.split(b"\0")[0]
        for one in (name, scope):
            what = "the destination" if one == name else "the tenant"
            hold = node.meta.directory.holds.get(one)
            if hold is not None and hold.paused is not None:
                return pb.STALL_CAUSE_PAUSED, f"{what} is paused by an operator{_why(hold.paused)}", 0
            if hold is not None and hold.parked_until > now:
                return (pb.STALL_CAUSE_PARKED, f"{what} is parked by an operator until {_time(hold.parked_until)}"
                        f"{_why(hold.parked_why)}", hold.parked_until)
            state = node.scheduler.gate(one)
            if one in node.gates and state != sched.OPEN:
                until, step = node.gates[one]
                word = "down" if one == name else "throttled"
                if state == sched.CLOSED:
                    return (pb.STALL_CAUSE_PARKED, f"{what} is parked until {_time(until)}, as it was {word} {step} times in a "
                            "row; then one message goes out as a probe", until)
                return (pb.STALL_CAUSE_PARKED, f"{what} is parked, as it was {word} {step} times in a row, and a probe "
                        f"{'is out' if state == sched.PROBING else 'is due'}", 0)
            held = node.scheduler.waiting(one).hold_until
            if held > now:
                return pb.STALL_CAUSE_PARKED, f"{what} is parked by another node, which probes it", held
        return None

    def _scheduling(self, scope: bytes) -> Cause:
        """Why nobody takes what is ready."""
        name = scope.split(b"\0")[0]
        waiting = self.node.scheduler.waiting(name)
        if not waiting.consumers:
            return pb.STALL_CAUSE_NO_CONSUMER, "no consumer subscribes to the destination", 0
        for one in (name, scope):
            limit = self.node.scheduler.waiting(one)
            what = "the destination" if one == name else "the tenant"
            if limit.rate_wait_until_ms:
                return (pb.STALL_CAUSE_LIMIT, f"the rate limit of {what} is used up until {_time(limit.rate_wait_until_ms)}",
                        limit.rate_wait_until_ms)
            if limit.leases_full:
                return pb.STALL_CAUSE_LIMIT, f"{what} has {_counted(limit.held, 'lease')} out, as many as it may", 0
        if waiting.credit <= 0:
            busy = f"its {_counted(waiting.consumers, 'consumer')} {'is' if waiting.consumers == 1 else 'are'} busy"
            return pb.STALL_CAUSE_NO_CREDIT, f"{busy}: none has asked for more (credit)", 0
        return pb.STALL_CAUSE_NONE, "it is moving", 0

    def _rate(self, destination: str) -> float:
        return sum(r.acked_per_second(destination.encode()) for r in self.node.shards.values() if r.leading)

    def _tenants(self, destination: str) -> list[sched.Tenant]:
        known = self.node.scheduler.destinations.get(destination.encode())
        return list(known.tenants.values()) if known is not None else []


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _head(runtime: ShardRuntime, queue: Queue, now: int) -> Cause | None:
    """What the head of a queue waits for, None if it could be leased."""
    if queue.token:
        pick = runtime.picks.get(queue.token)
        who = (pick.consumer.name if pick is not None else "") or queue.consumer
        return (pb.STALL_CAUSE_LEASED, f"its head is leased by {who!r} until {_time(queue.deadline)} unless that extends it",
                queue.deadline)
    runtime.state.ensure(queue, 1)
    sequence, _, deliver, _, _ = queue.front[0]
    if queue.not_before > now:
        return (pb.STALL_CAUSE_BACKOFF, f"its head (sequence {sequence}) failed {queue.attempts} times and is tried again at "
                f"{_time(queue.not_before)}", queue.not_before)
    if deliver > now:
        return pb.STALL_CAUSE_DELAYED, f"its head (sequence {sequence}) is not to be delivered before {_time(deliver)}", deliver
    return None


def _response(what: str, cause: Cause, messages: int, now: int, rate: float) -> pb.ExplainResponse:
    kind, why, until = cause
    response = pb.ExplainResponse(cause=kind, messages=messages)  # type: ignore[arg-type]
    if until:
        response.until_time.FromMilliseconds(until)
    if messages and rate > 0 and (until or kind in _MOVING):
        start = until if until and kind != pb.STALL_CAUSE_LEASED else now
        response.drain_time.FromMilliseconds(max(now, start) + int(messages / rate * 1000))
    response.sentence = f"{what}: {why}" + _tail(messages, response, now)
    return response


def _tail(messages: int, response: pb.ExplainResponse, now: int) -> str:
    if not messages:
        return "; nothing waits."
    waits = f"; {messages} {'message waits' if messages == 1 else 'messages wait'}"
    if response.HasField("drain_time"):
        left = max(0, response.drain_time.ToMilliseconds() - now)
        return f"{waits} and, at the pace of the last half minute, will be delivered in about {_span(left)}."
    return f"{waits}; when they will be delivered cannot be said."


def _why(text: str) -> str:
    return f" ({text})" if text else ""


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _span(ms: int) -> str:
    if ms < 1000:
        return "1 s"
    if ms < 120_000:
        return f"{ms // 1000} s"
    if ms < 7_200_000:
        return f"{ms // 60_000} min"
    return f"{ms // 3_600_000} h"
