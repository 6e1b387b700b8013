"""Channels to nodes, and which nodes answer.

Each kind of stream has its own connection: many long streams queue at one connection's limit, and a flood of
deliveries must not hold up settlements.
"""
from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Literal

import grpc
from spillway.client.retry import Backoff
from spillway.client.security import Security
from spillway.v1.cluster_service_pb2 import GetTopologyRequest
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub

Kind = Literal["control", "produce", "lease", "ack"]
MESSAGE_BYTES_MAX = 16 << 20
FORMER_SECONDS = 60.0  # calls over a channel with former certificates: then they are cancelled, and made anew
CALLS_END_SECONDS = 0.002  # between looks whether cancelled calls have ended
CALLS_END_LOOKS = 25  # without progress
_GRPC_CALL = "_AioCall."  # how the coroutines in which grpc.aio waits for the end of a call are named
DOWN_SECONDS_BASE = 0.05
DOWN_SECONDS_CAP = 2.0

_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 60_000),  # a server answers faster pings with GOAWAY
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 250),  # a node that has started again leads a second later
    ("grpc.dns_min_time_between_resolutions_ms", 500),  # a pod that starts again has its name, and another address; by default 30 s
    ("grpc.enable_retries", 0),  # they stop at the first response header: streams resume by themselves here
    ("grpc.use_local_subchannel_pool", 1),  # else kinds would share a connection
]


async def answers(channel: grpc.aio.Channel, seconds: float) -> bool:
    """Whether a node answers something easy within so many seconds. A refusal is an answer, too."""
    try:
        await ClusterServiceStub(channel).GetTopology(GetTopologyRequest(), timeout=seconds)
    except grpc.aio.AioRpcError as error:
        return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return True


def calls_under_way() -> int:
    """How many calls in this loop gRPC has not heard the end of, whoever made them."""
    return sum(getattr(task.get_coro(), "__qualname__", "").startswith(_GRPC_CALL) for task in asyncio.all_tasks())


async def _calls_ended() -> None:
    """Waits for gRPC to hear of the end of calls that were cancelled. What it hears after the loop is closed becomes an error in another
    loop of this process, if there is one. Which calls they are it does not tell: others may go on and begin, so no progress is the end."""
    least, looks = 1 << 60, 0
    while under_way := calls_under_way():
        looks = 0 if under_way < least else looks + 1
        if looks > CALLS_END_LOOKS:
            return
        least = min(least, under_way)
        await asyncio.sleep(CALLS_END_SECONDS)


class Channels:
    """The open channels, one per (address, kind). Belongs to one event loop."""

    def __init__(self, security: Security | None = None) -> None:
        self._security = security or Security()
        self._channels: dict[tuple[str, Kind], grpc.aio.Channel] = {}
        self._version = self._security.version
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, address: str, kind: Kind) -> grpc.aio.Channel:
        """The channel to a node for a kind of stream; connects in the background. After a change of certificates it is a new one."""
        if self._security.refresh() != self._version:
            self._version = self._security.version
            for former in self._channels.values():
                closing = asyncio.get_running_loop().create_task(former.close(FORMER_SECONDS))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
            self._channels.clear()
        channel = self._channels.get((address, kind))
        if channel is None:
            channel = self._security.channel(address, [*_OPTIONS, ("spillway.kind", kind)])
            self._channels[address, kind] = channel
        return channel

    def token(self) -> str:
        """The token that a call made now carries; empty: none."""
        return self._security.token()

    async def retain(self, addresses: Iterable[str]) -> None:
        """Closes the channels to all other addresses."""
        keep = set(addresses)
        gone = [key for key in self._channels if key[0] not in keep]
        for channel in [self._channels.pop(key) for key in gone]:
            await channel.close()

    async def close(self) -> None:
        """Closes all channels."""
        for closing in self._closing:
            closing.cancel()
        await self.retain(())
        await _calls_ended()


class Health:
    """Which addresses failed lately. A failed one is avoided for a while that doubles with each failure."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._down: dict[str, tuple[Backoff, float]] = {}

    def failed(self, address: str) -> float:
        """Notes a failure; returns for how many seconds the address is avoided."""
        backoff, until = self._down.get(address) or (Backoff(DOWN_SECONDS_BASE, DOWN_SECONDS_CAP), 0.0)
        now = self._clock()
        if until > now:  # several streams fail together: that is one failure
            return until - now
        wait = backoff.next()
        self._down[address] = (backoff, now + wait)
        return wait

    def worked(self, address: str) -> None:
        """Notes an answer."""
        self._down.pop(address, None)

    def is_up(self, address: str) -> bool:
        """Whether there is no reason to avoid the address now."""
        down = self._down.get(address)
        return down is None or down[1] <= self._clock()
