"""The log of a replica whose state comes from a backup, in a cluster that it is the first node of.

It is founded like the log of a replica that took a snapshot: as one entry, the last one in the state. But that entry is not where
the backed up log was. The cluster that was backed up went on, and what it said to others afterwards must stay in the past: whoever
remembers its fencing tokens, sequences or terms, which are made of log indexes, must see greater ones only. So must shards of one
backup that remember each other's, as they were not saved at the same moment. Hence the jump, in indexes and terms.
"""
from __future__ import annotations

from collections.abc import Iterable

from spillway.cluster.errors import StoreRefused
from spillway.cluster.raft.configuration import Configuration
from spillway.cluster.raft.journal import JournalStore
from spillway.cluster.state_store import GroupRows

INDEX_MAX = 1 << 39  # half of what the numbers made of indexes have room for
DAY_MS = 24 * 3600 * 1000


def jump(elapsed_ms: int) -> int:
    """How many entries, or terms, a log may have got since a backup was begun: at most one a millisecond, day and night, as each is
    synced by a majority before the next. And a day's more: clocks differ, and a backup takes its time."""
    return max(0, elapsed_ms) + DAY_MS


def found(store: JournalStore, groups: Iterable[tuple[int, GroupRows]], term: int, above: int, cluster_id: str) -> None:
    """Founds the logs of states that came from a backup: each `above` entries above its state, all in a term; this node is the only
    member of a new cluster. Durable on return, once the states are synced. Raises StoreRefused if an index is beyond any, StorageFailed."""
    node_id = store.node.node_id
    configuration = Configuration.of([node_id])
    for number, rows in groups:
        index = rows.applied_index + above
        if index > INDEX_MAX or term > INDEX_MAX:
            raise StoreRefused(f"group {number} would begin at entry {index} of term {term}; at most {INDEX_MAX} is possible")
        rows.configure(index, configuration.encode())
        rows.commit(index, term, [], [], [])
        journal = store.journal(number)
        journal.setCurrentTerm(term, None)
        journal.restart(index, term, (index, configuration))
        journal.admit(store.node.incarnation)
    store.write()
    store.change_node(formed=True, founders={node_id: store.node.incarnation}, cluster_id=cluster_id)
