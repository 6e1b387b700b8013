"""The way in: one connection to a cluster, from which producers, consumers and admin calls are made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from spillway.client.admin import Admin
from spillway.client.cluster import Cluster
from spillway.client.connection import Channels, Health
from spillway.client.consumer import CREDIT_BYTES, CREDIT_MESSAGES, LEASE_TOTAL_SECONDS, Consumer
from spillway.client.errors import Closed, InvalidArgument, SpillwayError, Unavailable
from spillway.client.leases import LeasedRun
from spillway.client.producer import IN_FLIGHT_BYTES_MAX, Producer
from spillway.client.security import Security
from spillway.client.topology import Router, Topology, TopologyWatch
from spillway.client.tracing import tracing
from spillway.contract.limits import PAYLOAD_BYTES_MAX

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

Part = TypeVar("Part", Producer, Consumer)


class Client:
    """A connection to a cluster. Use it as `async with`, in one event loop.

    `addresses` is one `host:port` or several; any live node of the cluster will do, the others are found through it.
    `payload_bytes_max` is checked before a record is sent; set it to the nodes' setting if that is not the default.

    `tls_ca` is a PEM file with the authority of the nodes' certificates, or "default" for public ones; without it there is no TLS.
    `tls_cert` and `tls_key` are PEM files with a certificate of the client's own, where nodes demand one. `tls_server_name` is the name in
    the nodes' certificates, if that is not in their addresses. `token`, or the content of `token_file`, says who calls. Files are read
    again when they change: new calls and streams go with what is new. Raises InvalidArgument if something of this cannot be.

    `tracer_provider` is OpenTelemetry's, for spans; by default the one that is configured for the process when the client is made, if
    there is one.
    """

    def __init__(self, addresses: str | Sequence[str] = "127.0.0.1:7070", *,
                 payload_bytes_max: int = PAYLOAD_BYTES_MAX, tls_ca: str = "", tls_cert: str = "", tls_key: str = "",
                 tls_server_name: str = "", token: str = "", token_file: str = "",
                 tracer_provider: TracerProvider | None = None) -> None:
        self._seeds = [addresses] if isinstance(addresses, str) else list(addresses)
        if not self._seeds or not all(":" in address for address in self._seeds):
            raise InvalidArgument("addresses", f"{addresses!r} is not host:port, or a list of them")
        self._security = Security(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, tls_server_name=tls_server_name, token=token,
                                  token_file=token_file)
        self._payload_bytes_max = payload_bytes_max
        self._tracing = tracing(tracer_provider)
        self._channels: Channels | None = None
        self._watch: TopologyWatch | None = None
        self._router: Router | None = None
        self._parts: list[Producer | Consumer] = []

    def __repr__(self) -> str:
        return f"<Client of {', '.join(self._seeds)}: {'open' if self._watch is not None else 'closed'}>"

    async def __aenter__(self) -> Client:
        self._channels = Channels(self._security)
        health = Health(asyncio.get_running_loop().time)
        self._watch = TopologyWatch(self._seeds, self._channels, health)
        self._router = Router(self._watch, health)
        self._watch.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes what was made from it and the connections. The producers' and consumers' own `async with` is better:
        it ends in the right order."""
        if self._watch is None or self._channels is None:
            return
        await asyncio.gather(*(part.close() for part in self._parts))
        watch, channels = self._watch, self._channels
        self._watch = self._router = self._channels = None
        await watch.close()
        await channels.close()

    async def wait_ready(self, timeout: float | None = None) -> Topology:
        """Waits until every shard has a leader. Raises Unavailable after `timeout` seconds, PermissionDenied if a node refuses this
        client."""
        watch = self._open()[0].watch
        try:
            async with asyncio.timeout(timeout):
                return await watch.known(complete=True)
        except TimeoutError:
            lacking = [i for i, leader in enumerate(watch.current.leaders, 1) if leader not in watch.current.nodes]
            raise Unavailable(f"after {timeout} s shards {lacking} have no leader" if watch.current.shard_count else
                              f"after {timeout} s none of {', '.join(self._seeds)} has told the topology"
                              + (f" ({watch.reason})" if watch.reason else "")) from None

    @property
    def topology(self) -> Topology:
        """What is known of the cluster right now; `shard_count` is 0 until something is."""
        return self._open()[0].watch.current

    @property
    def admin(self) -> Admin:
        """Destinations and what became of their messages."""
        return Admin(*self._open())

    @property
    def cluster(self) -> Cluster:
        """How the nodes are, and who of them is to leave."""
        return Cluster(*self._open())

    def producer(self, *, linger: float = 0.0, in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX,
                 producer_id: str | None = None, close_timeout: float = 30.0) -> Producer:
        """Makes a producer.

        `linger` is how many seconds a record may wait for others to travel with; 0 sends at once and batches only
        while requests are in flight. `in_flight_bytes_max` bounds the memory of unacknowledged records.
        `producer_id` is for people who read the broker's state: what goes out is it and a random suffix, as numbers
        restart with every producer. `close_timeout` is how many seconds closing waits for acknowledgements.
        """
        router, channels = self._open()
        return self._kept(Producer(router, channels, linger=linger, in_flight_bytes_max=in_flight_bytes_max,
                                   producer_id=producer_id, payload_bytes_max=self._payload_bytes_max,
                                   close_timeout=close_timeout, tracing=self._tracing))

    def consumer(self, destinations: str | Sequence[str], *, name: str = "", credit_messages: int = CREDIT_MESSAGES,
                 credit_bytes: int = CREDIT_BYTES, run_messages_max: int = 0, lease_seconds: float | None = None,
                 lease_total_max: float = LEASE_TOTAL_SECONDS,
                 on_stale: Callable[[LeasedRun, SpillwayError], None] | None = None,
                 close_timeout: float = 10.0) -> Consumer:
        """Makes a consumer.

        `destinations` are names, or patterns in which '*' stands for any run of characters. `name` is shown to
        operators. At most `credit_messages` messages of about `credit_bytes` bytes are delivered and not settled.
        `run_messages_max` is the longest run in one lease (0: the destination's policy), `lease_seconds` how long a
        lease lasts before it is extended (None: the destination's policy), `lease_total_max` for how many seconds it
        is extended at most. `on_stale(run, error)` is called when a settlement that nobody awaits is refused; by
        default that is logged.
        """
        router, channels = self._open()
        names = [destinations] if isinstance(destinations, str) else list(destinations)
        return self._kept(Consumer(router, channels, names, name=name, credit_messages=credit_messages,
                                   credit_bytes=credit_bytes, run_messages_max=run_messages_max,
                                   lease_seconds=lease_seconds, lease_total_max=lease_total_max, on_stale=on_stale,
                                   close_timeout=close_timeout, tracing=self._tracing))

    def _open(self) -> tuple[Router, Channels]:
        if self._router is None or self._channels is None:
            raise Closed("the client is not open: use `async with Client(...)`")
        return self._router, self._channels

    def _kept(self, part: Part) -> Part:
        self._parts = [p for p in self._parts if not p.closed]
        self._parts.append(part)
        return part
