"""What the Raft host expects of the connections between nodes."""
from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol


class PeerHello(Protocol):
    """What a peer says of itself when a connection starts (spillway.peer.v1.Hello)."""

    @property
    def node_id(self) -> str:
        """The node's id."""

    @property
    def incarnation(self) -> str:
        """Identity of the node's store."""

    @property
    def formed(self) -> bool:
        """Whether it has taken part in the cluster with this store."""

    @property
    def founders(self) -> Mapping[str, str]:
        """The members' incarnations when it first did."""


class Handlers:
    """What a transport calls. `epoch` names one connection to one peer; it grows with each."""

    def __init__(self, connected: Callable[[str, int, PeerHello], None], frame: Callable[[str, int, bytes], None],
                 disconnected: Callable[[str, int], None]) -> None:
        self.connected = connected
        self.frame = frame
        self.disconnected = disconnected


class PeerTransport(Protocol):
    """Connections to all peers, kept up by the transport.

    FIFO within an epoch: frames arrive in the order in which they were sent, whole, at most once; the connection may
    break at any time and lose what is under way. Nothing of an epoch arrives after `disconnected` or after a later
    epoch's `connected`. A buffer of bounded size: a peer that does not read loses its connection."""

    def start(self, handlers: Handlers) -> None:
        """Starts to connect."""

    def send(self, peer: str, epoch: int, frame: bytes) -> None:
        """Sends a frame, or drops it if that connection is gone. Never blocks, never calls back."""

    def fetch_snapshot(self, peer: str, group: int) -> AsyncIterator[bytes]:
        """Chunks of a peer's snapshot of a group. Raises ClusterError if it breaks off."""

    async def close(self) -> None:
        """Ends all connections."""
