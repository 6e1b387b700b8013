"""`spillway restore`: makes the data directory of a new cluster's first node from a backup. No node runs meanwhile.

Everything of the backup is taken over but who the nodes were and where shards belonged: `serve` finds none, and says so anew, as when
a cluster is founded. The new cluster has an identity of its own, and says whose it continues. The directory counts only when all of it
is there and synced (see `datadir`).
"""
from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from spillway.broker import datadir
from spillway.broker.config import NodeConfig
from spillway.broker.core.directory import Directory, names_nodes, succeeds
from spillway.broker.core.errors import CorruptEntry
from spillway.broker.errors import ConfigError, DataDirError
from spillway.broker.runtime.meta import DIRECTORY_ROWS
from spillway.cluster.errors import SnapshotInvalid
from spillway.cluster.raft import restored
from spillway.cluster.raft.journal import JournalStore
from spillway.cluster.state_store import GroupRows, StateStore
from spillway.contract.backup import META_GROUP, BackupInvalid, GroupFile, Manifest, read_chunks


def check(config: NodeConfig, manifest: Manifest) -> None:
    """Whether a backup can become what the settings say. Raises ConfigError."""
    if config.shards != manifest.shards:
        raise ConfigError(f"shards is {config.shards}, and {manifest.shards} in the backup, for ever: leave it out, or set it to "
                          f"{manifest.shards}")
    if config.join:
        raise ConfigError("join is set; what is restored is the first node of a new cluster, which others join: leave it out")


def restore_into(config: NodeConfig, backup: Path, manifest: Manifest) -> Path:
    """Fills the data directory. Raises DataDirError if there is something in it, or no room; BackupInvalid, StoreRefused,
    StorageFailed: what was made then is of no use, and the next restore into this directory removes it."""
    with datadir.restoring(config) as filled:
        path = filled.path
        free = shutil.disk_usage(path).free
        if free < manifest.bytes + config.disk_free_bytes_min:
            raise DataDirError(f"data_dir {path} is on a disk with {free >> 20} MiB free; the backup has {manifest.bytes >> 20} MiB, and "
                               f"disk_free_bytes_min of {config.disk_free_bytes_min >> 20} MiB is to stay: free some, or name another one")
        elapsed = datetime.now(UTC) - manifest.begun
        journal = JournalStore(path / "log", config.cluster, config.node_id)
        try:
            store = StateStore(path / "state")
            try:
                groups = [(group.group, asyncio.run(_install(store, backup, group))) for group in manifest.groups]
                cluster_id = secrets.token_hex(8)
                filled.level = _forget_nodes(store.group(META_GROUP), cluster_id, next(
                    backup / group.name for group in manifest.groups if group.group == META_GROUP))
                above = restored.jump(int(elapsed.total_seconds() * 1000))
                restored.found(journal, groups, max(group.term for group in manifest.groups) + above, above, cluster_id)
                store.sync_now()
                store.rest()
            finally:
                store.close()
        finally:
            journal.close()
    return path


async def _install(store: StateStore, backup: Path, group: GroupFile) -> GroupRows:
    async def chunks(position: object) -> AsyncIterator[bytes]:
        for chunk in read_chunks(backup, group):
            yield chunk

    try:
        await store.install(group.group, group.name, chunks, 0)
    except SnapshotInvalid as error:
        raise BackupInvalid(f"{backup / group.name} cannot be restored: {error}") from None
    return store.group(group.group)


def _forget_nodes(rows: GroupRows, cluster_id: str, file: Path) -> int:
    """They were others, of another cluster. Returns the feature level of the cluster that they were."""
    directory = Directory()
    try:
        directory.load(rows.scan(*DIRECTORY_ROWS))  # what does not decode is refused now rather than by `serve`
    except CorruptEntry as error:
        raise BackupInvalid(f"{file} cannot be restored: {error}") from None
    nodes = [key for key, _ in rows.scan(*DIRECTORY_ROWS) if names_nodes(key)]
    identity = [] if directory.identity is None else [succeeds(directory.identity, cluster_id)]
    rows.commit(rows.applied_index, rows.applied_term, identity, nodes, [])
    return directory.level
