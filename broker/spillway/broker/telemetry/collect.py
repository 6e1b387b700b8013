"""Gathers a node's metrics when somebody asks: Prometheus, or the clock of an OTLP exporter.

What that costs depends on the number of destinations times shards led, and not on queues, messages or tenants. It is done in
slices, so that a scrape makes no message wait for longer than a slice.
"""
from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from spillway.broker.core.meter import OUTCOMES, Meter
from spillway.broker.core.scheduler import Destination
from spillway.broker.core.subscription import INTERNAL
from spillway.broker.telemetry import registry as r
from spillway.broker.telemetry.fairness import Fairness
from spillway.broker.telemetry.meters import FIELDS, Meters
from spillway.broker.telemetry.walk import Walk
from spillway.cluster.machine import Role
from spillway.contract.telemetry import process
from spillway.contract.telemetry.metrics import Family, Metric, Sample, Value
from spillway.contract.version import VERSION
from spillway.v1.message_pb2 import ErrorCode

if TYPE_CHECKING:
    from spillway.broker.runtime.node import Node

SLICE = 128  # counters of destinations looked at before others have a turn
CLOSED_TENANTS_MAX = 256  # tenants behind closed gates whose messages are looked up
TICK_SECONDS = 1.0
LAG_SECONDS = 0.1
_TOTALS = dict(zip(FIELDS, (r.ENQUEUED, r.ACKED, r.RETRIED, r.DEAD_LETTERED, r.DISCARDED, r.TTL_EXPIRED, r.DEDUPLICATED, r.OVERFLOWED,
                            r.PURGED, r.REDRIVEN, r.EXPIRATIONS), strict=True))
_TOLD_OUTCOMES = [i for i, name in enumerate(OUTCOMES) if name and name != "extend"]


class _Levels:
    """How a destination stands, summed up over the shards."""

    __slots__ = ("dead", "leased", "leases", "messages", "queues", "size")

    def __init__(self) -> None:
        self.messages = self.leased = self.dead = self.size = self.queues = self.leases = 0


class Collector:
    """Of one node. Setting `node.meters` is what switches counting on, so it is made before the node leads anything."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.meters = node.meters = Meters()
        self.walk = Walk(node)
        self.fairness = Fairness(node)
        self.streams: Callable[[], int] = lambda: 0
        """How many streams clients have open."""
        self.certificate_ends: Callable[[], dict[str, float]] = dict
        """Port -> when its certificate ends, Unix time."""
        self.spans: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0)
        """How many spans were made, left out, and not taken by the collector."""
        node.host.on_leadership(self._leader_changed)

    def _leader_changed(self, group: int, leader: str | None, term: int) -> None:
        self.meters.leader_changes += leader is not None

    # -- upkeep --------------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Until cancelled: once a second, what has to be looked at while it lasts."""
        clock = self._node.clock
        last = clock.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = clock.monotonic()
            self.ticked(int((now - last) * 1000))
            last = now

    def ticked(self, ms: int) -> None:
        """So many milliseconds have passed."""
        for scope in self._node.closed_scopes():
            if b"\0" not in scope:
                self.meters.of(scope).parked_ms += ms
        self.fairness.look()

    async def watch_loop(self) -> None:
        """Until cancelled: how late the loop is."""
        monotonic = self._node.clock.monotonic
        while True:
            begin = monotonic()
            await asyncio.sleep(LAG_SECONDS)
            self.meters.loop_lag.add(int((monotonic() - begin - LAG_SECONDS) * 1e6))

    # -- what is told --------------------------------------------------------------------------------------------

    async def collect(self) -> list[Family]:
        """All metrics, as of now."""
        samples: dict[Metric, list[Sample]] = {metric: [] for metric in r.ALL}

        def tell(metric: Metric, value: Value, *labels: str) -> None:
            samples[metric].append((labels, value))

        await self._destinations(tell)
        self._raft(tell)
        self._process(tell)
        return [Family(metric, found) for metric, found in samples.items()]

    async def _destinations(self, tell: Callable[..., None]) -> None:
        node, meters = self._node, self.meters
        if len(meters.by_destination) > r.DESTINATIONS_MAX:
            meters.keep({name.encode() for name in node.meta.directory.destinations}, [r for r in node.shards.values() if r.leading])
        levels: dict[bytes, _Levels] = {}
        outbox = looked = 0
        for runtime in list(node.shards.values()):
            if not runtime.leading:
                continue
            for name, c in list(runtime.state.counters.items()):
                looked += 1
                if looked % SLICE == 0:
                    await asyncio.sleep(0)
                    if not runtime.leading:
                        break
                if name.startswith(INTERNAL):
                    outbox += c.messages
                    continue
                meters.add_up(runtime, name, c)
                one = levels.get(name)
                if one is None:
                    one = levels[name] = _Levels()
                one.messages += c.messages
                one.leased += c.leased
                one.dead += c.dead
                one.size += c.size
                one.queues += c.queues
                one.leases += c.leases
        tell(r.OUTBOX, outbox)
        await self._stand(tell, levels)
        for destination, meter in meters.by_destination.items():
            self._happened(tell, destination.decode(), meter)
        for messages, scope in self.walk.tenants:
            tell(r.TENANT_BACKLOG, messages, *scope.decode().split("\0"))

    async def _stand(self, tell: Callable[..., None], levels: dict[bytes, _Levels]) -> None:
        """How destinations stand. Those without a series of their own are summed up, or the worst of them counts."""
        node, meters = self._node, self.meters
        closed = node.closed_scopes()
        tenants: dict[bytes, list[bytes]] = {}
        for scope in closed:
            of, separator, tenant = scope.partition(b"\0")
            if separator:
                tenants.setdefault(of, []).append(tenant)
        left = CLOSED_TENANTS_MAX
        now = node.now_ms()
        sums: dict[str, list[float]] = {}
        folded = 0
        for i, (name, one) in enumerate(levels.items()):
            if i % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            meter = meters.by_destination.get(name)
            if meter is None and name.decode() in node.meta.directory.destinations:
                meter = meters.of(name)
            if meter is None and not one.messages and not one.dead:
                continue  # it was deleted
            own = meter is not None and meter is not meters.other
            folded += not own
            label = name.decode() if own else r.OTHER
            flow = node.scheduler.destinations.get(name)
            parked = name in closed
            waiting, queues = one.messages - one.leased, one.queues - one.leases
            behind_messages, behind_queues = (waiting, queues) if parked else (0, 0)
            if not parked:
                for tenant in tenants.get(name, ())[:left]:
                    left -= 1
                    behind_messages += sum(rt.state.tenant(name + b"\0" + tenant)[0] for rt in node.shards.values() if rt.leading)
                    if flow is not None and (one_of := flow.tenants.get(tenant)) is not None:
                        behind_queues += len(one_of.ready)
            behind_messages, behind_queues = min(behind_messages, waiting), min(behind_queues, queues)
            ready = 0 if parked or flow is None else max(0, min(flow.ready - behind_queues, queues - behind_queues))
            oldest, oldest_ready = self.walk.oldest_unsettled(name), self.walk.oldest_ready(name)
            values = [waiting - behind_messages, one.leased, behind_messages, one.dead,
                      ready, one.leases, queues - ready - behind_queues, behind_queues, one.size,
                      (now - oldest) / 1000 if oldest else 0.0, (now - oldest_ready) / 1000 if oldest_ready else 0.0,
                      int(parked), len(tenants.get(name, ())), _consumers(flow), node.scheduler.leases_limit(name)]
            before = sums.get(label)
            sums[label] = values if before is None else [
                max(a, b) if k in (9, 10, 11, 13, 14) else a + b for k, (a, b) in enumerate(zip(before, values, strict=True))]
        for label, values in sums.items():
            for state, value in zip(("waiting", "leased", "parked", "dead"), values[:4], strict=True):
                tell(r.MESSAGES, value, label, state)
            for state, value in zip(("ready", "leased", "delayed", "parked"), values[4:8], strict=True):
                tell(r.QUEUES, value, label, state)
            tell(r.BYTES, values[8], label)
            tell(r.OLDEST, values[9], label, "unsettled")
            tell(r.OLDEST, values[10], label, "ready")
            for metric, value in zip((r.PARKED, r.PARKED_TENANTS, r.CONSUMERS, r.LEASES_LIMIT), values[11:], strict=True):
                tell(metric, value, label)
        tell(r.FOLDED, folded)

    def _happened(self, tell: Callable[..., None], name: str, meter: Meter) -> None:
        if name == r.OTHER and not meter.totals[0] and not meter.leased:
            return  # there are not so many destinations
        for field, total in zip(FIELDS, meter.totals, strict=True):
            tell(_TOTALS[field], total, name)
        tell(r.LEASED, meter.leased, name)
        tell(r.REDELIVERED, meter.redelivered, name)
        tell(r.PARKED_SECONDS, meter.parked_ms / 1000, name)
        for outcome in _TOLD_OUTCOMES:
            tell(r.LEASES_ENDED, meter.outcomes[outcome], name, OUTCOMES[outcome])
        tell(r.WAIT, meter.wait, name)
        tell(r.END_TO_END, meter.end_to_end, name)
        if name != r.OTHER:
            tell(r.FAIRNESS, self.fairness.of(name.encode()), name)

    def _raft(self, tell: Callable[..., None]) -> None:
        node, host, meters = self._node, self._node.host, self.meters
        rest: list[tuple[int, int, int]] = []
        for i, (number, status) in enumerate(sorted(host.status().items())):
            values = (status.term, int(status.role is Role.LEADER), max(0, status.commit_index - status.applied_index))
            if i >= r.GROUPS_MAX:
                rest.append(values)
                continue
            label = str(number) if number else "meta"
            for metric, value in zip((r.RAFT_TERM, r.RAFT_LEADING, r.RAFT_LAG), values, strict=True):
                tell(metric, value, label)
        if rest:
            tell(r.RAFT_TERM, max(v[0] for v in rest), r.OTHER)
            tell(r.RAFT_LEADING, sum(v[1] for v in rest), r.OTHER)
            tell(r.RAFT_LAG, max(v[2] for v in rest), r.OTHER)
        tell(r.RAFT_LEADERLESS, sum(node.leader_in_touch(n) is None for n in range(1, node.config.shards + 1)))
        tell(r.RAFT_CHANGES, meters.leader_changes)
        tell(r.RAFT_PEERS, len(host.present))
        tell(r.MEMBERS, len(node.members))
        tell(r.COMMIT, meters.commits)
        tell(r.FSYNC, host.store.syncs)
        tell(r.SNAPSHOT_SENT, host.snapshot_bytes_sent)
        tell(r.SNAPSHOT_RECEIVED, host.snapshot_bytes_received)
        tell(r.FEATURE_LEVEL, node.meta.directory.level)

    def _process(self, tell: Callable[..., None]) -> None:
        node, meters, config = self._node, self.meters, self._node.config
        for code in ErrorCode.values():
            if code:
                tell(r.REFUSED, meters.refused.get(code, 0), ErrorCode.Name(code).removeprefix("ERROR_CODE_").lower())
        tell(r.DUPLICATES, meters.duplicates)
        tell(r.STALE, meters.stale)
        tell(r.INFO, 1, config.node_id, config.cluster, VERSION)
        tell(r.LOOP_LAG, meters.loop_lag)
        tell(r.DISK_FREE, shutil.disk_usage(Path(config.data_dir)).free)
        tell(r.DISK_FULL, int(node.disk_full))
        tell(r.INGRESS, node.ingress_bytes)
        tell(r.INGRESS_LIMIT, config.ingress_bytes_max)
        tell(r.STREAMS, self.streams())
        tell(r.STREAMS_LIMIT, config.streams_max)
        for port, end in self.certificate_ends().items():
            tell(r.CERTIFICATE_END, end, port)
        for result, count in zip(("made", "dropped", "lost"), self.spans(), strict=True):
            tell(r.SPANS, count, result)
        for metric, value in process.values().items():
            tell(metric, value)


def _consumers(flow: Destination | None) -> int:
    return 0 if flow is None else sum(len(s.consumers) for s in flow.subscriptions)
