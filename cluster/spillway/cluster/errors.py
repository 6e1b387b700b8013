"""Errors of the cluster layer.

ClusterError
├── UntestedLibrary   the operator's: another pysyncobj than the one that was reviewed
├── StoreRefused      the operator's: a store that this node must not open; says what to do
├── StorageFailed     the machine's: a write or sync failed; fatal, nothing later can be trusted
│   └── StorageDamaged    also a StoreRefused: what is on the disk is not what was written; starting again does not help
├── SnapshotInvalid   the peer's: a snapshot is damaged, out of order or too old; fetch again
│   └── SnapshotBroken    its transfer broke: what came stands, and the next fetch goes on from there
├── PeerRefused       the peer's: another cluster, protocol or node id
├── WireInvalid       the peer's: bytes that are no message of ours; close the connection
└── ChangeRefused     the caller's: a change of a group's members that is not made; nothing happened
    ├── ChangeInvalid     it makes no sense as things are
    ├── NotLeading        ask the leader
    ├── ChangeInFlight    try again when the one before it is committed
    └── NotCaughtUp       try again when enough voters are in touch and up to date
"""
from __future__ import annotations

REPLACE_HINT = ("If the disk is sound, replace this node by an empty one: the others will bring it up to date (a cluster of one has no "
                "others: make a new one from a backup by `spillway restore`)")


class ClusterError(Exception):
    """Base of the cluster layer's errors."""


class UntestedLibrary(ClusterError):
    """pysyncobj's source is not the reviewed one."""


class StoreRefused(ClusterError):
    """A store must not be opened as it is."""


class StorageFailed(ClusterError):
    """A write or a sync failed."""


class StorageDamaged(StorageFailed, StoreRefused):
    """What is on the disk is not what was written."""


class SnapshotInvalid(ClusterError):
    """A snapshot cannot be installed."""


class SnapshotBroken(SnapshotInvalid):
    """The transfer of a snapshot broke."""


class PeerRefused(ClusterError):
    """A peer is not who it should be."""


class WireInvalid(ClusterError):
    """Bytes of unknown shape."""


class ChangeRefused(ClusterError):
    """A change of a group's members is not made."""


class ChangeInvalid(ChangeRefused):
    """The change makes no sense as things are."""


class NotLeading(ChangeRefused):
    """Only the leader changes its group, once it serves."""


class ChangeInFlight(ChangeRefused):
    """Another change, or a handover, is under way."""


class NotCaughtUp(ChangeRefused):
    """Too few voters would be in touch and up to date."""
