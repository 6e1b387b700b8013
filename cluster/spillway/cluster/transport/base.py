"""What carries frames and snapshots between the nodes of a cluster: the protocol, and who is called when.

A transport knows nothing of Raft. It moves opaque frames over *connections*. Between two nodes there is at most one
connection at a time, used in both directions; each side numbers it by an `epoch` that only grows. Every implementation
keeps these rules:

- Frames of one connection arrive complete, in the order of `send`, at most once. Losing the rest of a connection is
  allowed at any time; repeating, reordering and inventing are not.
- `connected` comes before the first `frame` of that epoch, `disconnected` after the last one. A new epoch of a peer is
  announced only after the old one was disconnected. Nothing crosses epochs.
- `send` never calls a handler and never blocks. A frame for an epoch that is not the present one is dropped. What waits
  for a slow peer is bounded; beyond the bound the connection is reset, never grown.
- Handlers are called on the node's event loop, one at a time.
- `peer` is the node id that the connection showed in its hello, checked against the cluster and its members.

Numbered connections follow the review's adapter rule 1; one multiplexed stream for each pair of nodes is as in
CockroachDB's and TiKV's multi-Raft.
"""
from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from spillway.cluster.snapshots import Position


class PeerHello(Protocol):
    """What a peer says of itself and its store when a connection begins."""

    @property
    def incarnation(self) -> str:
        """Identity of the peer's store: a node that lost its disk has a new one."""

    @property
    def formed(self) -> bool:
        """The peer has taken part in the cluster with this store."""

    @property
    def founders(self) -> Mapping[str, str]:
        """Members' incarnations as the peer knew them when it first took part: node id -> incarnation."""

    @property
    def feature_min(self) -> int:
        """Lowest feature level of the cluster at which the peer can work; 0: it did not say."""

    @property
    def feature_max(self) -> int:
        """Highest feature level of the cluster at which the peer can work; 0: it did not say."""


@dataclass(frozen=True, slots=True)
class Handlers:
    """Who is told of connections and frames. Each call only notes what came and returns at once."""

    connected: Callable[[str, int, PeerHello], None]
    """(peer, epoch, hello): a connection is up in both directions."""
    frame: Callable[[str, int, bytes], None]
    """(peer, epoch, frame). Raises WireInvalid for bytes of unknown shape: the transport closes the connection."""
    disconnected: Callable[[str, int], None]
    """(peer, epoch): the connection is gone, with everything that was under way in it."""


class PeerTransport(Protocol):
    """Connections to all peers of a node. See the module for what is guaranteed."""

    def start(self, handlers: Handlers) -> None:
        """Begins to make and take connections, and goes on to reconnect by itself until `close`."""

    def send(self, peer: str, epoch: int, frame: bytes) -> None:
        """Queues a frame on the connection `epoch` to `peer`; drops it if that is not the present one."""

    def fetch_snapshot(self, peer: str, group: int, position: Position | None) -> AsyncIterator[bytes]:
        """The chunks of the group's state as of one moment at `peer`, in order: from `position` on if the peer still has that
        moment, else from the first one on. Raises SnapshotBroken if the transfer breaks; the caller tries again."""

    async def close(self) -> None:
        """Closes all connections and waits until nothing runs any more."""
