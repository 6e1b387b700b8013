"""What a backup reads: the state of a group that this node leads, as of one moment.

The moment comes after everything that was acknowledged before the backup was asked for. That takes an entry that is proposed
afterwards and committed: a leader that was deposed and does not know it yet never gets that far.
"""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from spillway.broker.errors import Unavailable
from spillway.broker.runtime.balance import META_GROUP
from spillway.cluster.errors import StorageFailed
from spillway.cluster.snapshots import Exporter
from spillway.contract.version import VERSION
from spillway.v1.cluster_service_pb2 import BackupCluster, BackupResponse

if TYPE_CHECKING:
    from spillway.broker.runtime.node import Node

BARRIER_SECONDS = 5.0
EXPORTS_MAX = 4  # at a time: each pins the files of its moment, and reads at the rate of an export
STALL_SECONDS = 60.0  # whoever takes no chunk for so long pins them no longer


class Backups:
    """Of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._open: set[object] = set()  # one for each that is being read

    async def read(self, group: int) -> AsyncIterator[BackupResponse]:
        """The state of a group that this node leads. Raises Unavailable, also if nobody takes a part for too long; ends the node where
        its state cannot be read."""
        node = self._node
        config = node.config
        if len(self._open) >= EXPORTS_MAX:
            raise Unavailable(f"node {config.node_id} is sending {EXPORTS_MAX} groups to backups already; try again")
        place = object()
        self._open.add(place)
        exporter: Exporter | None = None
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None
        stalled = False

        def give_up() -> None:
            nonlocal stalled
            stalled = True
            self._open.discard(place)
            if exporter is not None:
                exporter.close()

        try:
            exporter = await self._export(group)
            head = BackupCluster(cluster=config.cluster, shard_count=config.shards, replica_count=config.replicas, version=VERSION)
            yield BackupResponse(cluster=head)
            for chunk in exporter:
                await node.store.pace(len(chunk))
                timer = loop.call_later(STALL_SECONDS, give_up)
                yield BackupResponse(chunk=chunk)
                timer.cancel()
            if stalled:
                raise Unavailable(f"nothing was taken for {STALL_SECONDS:.0f} s")
        except StorageFailed as error:
            node.host.fatal(error)
            raise Unavailable("this node cannot read its state") from None
        finally:
            if timer is not None:
                timer.cancel()
            self._open.discard(place)
            if exporter is not None:
                exporter.close()

    async def _export(self, group: int) -> Exporter:
        node = self._node
        if group == META_GROUP:
            await node.meta.barrier()
            return node.store.exporter(group)
        runtime = node.shards.get(group)
        if runtime is None:
            raise Unavailable(f"this node has no replica of shard {group}")
        try:
            async with asyncio.timeout(BARRIER_SECONDS):
                await runtime.barrier()
        except TimeoutError:
            raise Unavailable(f"shard {group} has no quorum") from None
        if node.shards.get(group) is not runtime:
            raise Unavailable(f"the replica of shard {group} left this node")
        if runtime.needs_checkpoint():
            runtime.checkpoint()
        return node.store.exporter(group)
