"""AdminService, counts of a destination: each leader tells of the shards that it leads, and whoever is asked adds up."""
from __future__ import annotations

import asyncio
from typing import Any

import grpc
from spillway.broker.errors import BrokerError, Unavailable
from spillway.broker.runtime.shard import ShardRuntime
from spillway.broker.services.operations import CALL_SECONDS, SHARDS_METADATA, Operations, metadata_of, parse_shards
from spillway.broker.services.status import pass_on
from spillway.v1 import admin_service_pb2 as pb

_COUNTERS = {  # field of DestinationStats: of core.queue.Counters
    "messages": "messages", "leased": "leased", "queues": "queues", "dead_letters": "dead", "enqueued_total": "enqueued",
    "acked_total": "acked", "dead_lettered_total": "dead_lettered", "retried_total": "retried", "expired_total": "expired",
    "message_bytes": "size", "ttl_expired_total": "ttl_expired", "purged_total": "purged", "redriven_total": "redriven",
    "discarded_total": "discarded", "deduplicated_total": "deduplicated", "overflowed_total": "overflowed"}
_SUMS = (*_COUNTERS, "queues_ready", "queues_waiting", "queues_leased", "leases_limit", "acked_per_second")
_MAXIMA = ("parked_tenants", "consumers")  # every node has nearly the same ones


class Stats(Operations):
    """The handler; part of AdminService."""

    async def GetDestinationStats(self, request: pb.GetDestinationStatsRequest,
                                  context: Any) -> pb.GetDestinationStatsResponse:
        """See admin_service.proto. Between nodes: counts of the shards that the call names, which this node may lead or not."""
        try:
            if not self.peer:
                await self.known("name", request.name)
            asked = self._shards_asked_for(context)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        node = self.node
        response = pb.GetDestinationStatsResponse()
        led: list[ShardRuntime] = []
        remote: dict[str, list[int]] = {}
        for shard in asked:
            runtime = node.shards.get(shard)
            leader = node.leader_of(shard)
            if runtime is not None and runtime.leading:
                led.append(runtime)
            elif self.peer or leader is None or leader == node.config.node_id:
                response.shards_missing.append(shard)
            else:
                remote.setdefault(leader, []).append(shard)
        calls = asyncio.gather(*(
            self._at(n, "GetDestinationStats", request, timeout=CALL_SECONDS, metadata=metadata_of(shards))
            for n, shards in remote.items()), return_exceptions=True)
        try:
            response.stats.CopyFrom(await self._own_stats(request.name, led))
            answers = await calls
        finally:
            calls.cancel()
        for shards, answer in zip(remote.values(), answers, strict=True):
            if isinstance(answer, pb.GetDestinationStatsResponse):
                _add(response.stats, answer.stats)
                response.shards_missing.extend(answer.shards_missing)
            elif isinstance(answer, grpc.aio.AioRpcError | Unavailable):
                response.shards_missing.extend(shards)
            else:
                raise answer
        return response

    def _shards_asked_for(self, context: Any) -> list[int]:
        named = dict(context.invocation_metadata()).get(SHARDS_METADATA) if self.peer else None
        return parse_shards(named) if named else list(range(1, self.node.config.shards + 1))

    async def _own_stats(self, name: str, led: list[ShardRuntime]) -> pb.DestinationStats:
        stats = pb.DestinationStats()
        destination = name.encode()
        oldest = 0
        for runtime in led:
            c = runtime.state.counters.get(destination)
            if c is None:
                continue
            await asyncio.sleep(0)  # looking for the oldest message may take milliseconds a shard
            for field, counter in _COUNTERS.items():
                setattr(stats, field, getattr(stats, field) + getattr(c, counter))
            stats.queues_leased += sum(queue.counters is c for queue in runtime.state.leases.values())
            stats.acked_per_second += runtime.acked_per_second(destination)
            if c.messages and (head := runtime.oldest_ms(destination)):
                oldest = min(oldest or head, head)
        if oldest:
            stats.oldest_enqueue_time.FromMilliseconds(oldest)
        scheduler = self.node.scheduler
        waiting = scheduler.waiting(destination)
        stats.queues_ready = min(waiting.ready, max(0, stats.queues - stats.queues_leased))  # those that were purged may be in it
        stats.queues_waiting = max(0, stats.queues - stats.queues_leased - stats.queues_ready)
        stats.consumers = waiting.consumers
        stats.leases_limit = scheduler.leases_limit(destination)
        self._count_gates(destination, stats)
        return stats

    def _count_gates(self, destination: bytes, stats: pb.DestinationStats) -> None:
        """What is closed, by failures or by operators."""
        node = self.node
        now = node.now_ms()
        until = 0
        tenants: set[bytes] = set()
        for scope, (end, _) in node.gates.items():
            if scope == destination:
                until = max(end, now)
            elif scope.startswith(destination + b"\0"):
                tenants.add(scope)
        for scope, hold in node.meta.directory.holds.items():
            if scope == destination:
                stats.paused = hold.paused is not None
                until = max(until, hold.parked_until if hold.parked_until > now else 0)
            elif scope.startswith(destination + b"\0") and (hold.paused is not None or hold.parked_until > now):
                tenants.add(scope)
        if until:
            stats.parked_until_time.FromMilliseconds(until)
        stats.parked_tenants = len(tenants)


def _add(total: pb.DestinationStats, part: pb.DestinationStats) -> None:
    """Adds what another node counted."""
    for field in _SUMS:
        setattr(total, field, getattr(total, field) + getattr(part, field))
    for field in _MAXIMA:
        setattr(total, field, max(getattr(total, field), getattr(part, field)))
    total.paused = total.paused or part.paused
    if part.HasField("oldest_enqueue_time") and (
            not total.HasField("oldest_enqueue_time")
            or part.oldest_enqueue_time.ToMilliseconds() < total.oldest_enqueue_time.ToMilliseconds()):
        total.oldest_enqueue_time.CopyFrom(part.oldest_enqueue_time)
    if part.HasField("parked_until_time") and (
            part.parked_until_time.ToMilliseconds() > total.parked_until_time.ToMilliseconds()):
        total.parked_until_time.CopyFrom(part.parked_until_time)
