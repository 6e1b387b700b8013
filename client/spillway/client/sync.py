"""The client for threads: the same names and arguments as `spillway.client`, without `await`.

One background thread runs the asyncio client, so handlers never hold up lease extensions. Objects may be used from any
thread. What the asyncio API gives as a context manager or iterator is one here, too.

    with Client("127.0.0.1:7070") as client:
        with client.producer() as producer:
            producer.send("billing", b"payload")
        with client.consumer("billing") as consumer:
            for message in consumer:
                with message:
                    print(message.payload)
"""
from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spillway.client import client as aio
from spillway.client import consumer as aio_consumer
from spillway.client import leases as aio_leases
from spillway.client import producer as aio_producer
from spillway.client.errors import Closed, SpillwayError
from spillway.client.loop_thread import LoopThread
from spillway.client.model import Gap, Receipt, Record
from spillway.client.settlements import Settlement
from spillway.client.sync_admin import Admin
from spillway.client.topology import Topology
from spillway.contract.limits import PAYLOAD_BYTES_MAX

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider


class Client:
    """See `spillway.client.Client`."""

    def __init__(self, addresses: str | Sequence[str] = "127.0.0.1:7070", *,
                 payload_bytes_max: int = PAYLOAD_BYTES_MAX, tls_ca: str = "", tls_cert: str = "", tls_key: str = "",
                 tls_server_name: str = "", token: str = "", token_file: str = "",
                 tracer_provider: TracerProvider | None = None) -> None:
        self._client = aio.Client(addresses, payload_bytes_max=payload_bytes_max, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key,
                                  tls_server_name=tls_server_name, token=token, token_file=token_file,
                                  tracer_provider=tracer_provider)
        self._loop: LoopThread | None = None

    def __enter__(self) -> Client:
        self._loop = LoopThread()
        self._loop.run(self._client.__aenter__())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """See `spillway.client.Client.close`."""
        if self._loop is not None:
            loop, self._loop = self._loop, None
            try:
                loop.run(self._client.close())
            finally:
                loop.stop()

    def wait_ready(self, timeout: float | None = None) -> Topology:
        """See `spillway.client.Client.wait_ready`."""
        return self._running().run(self._client.wait_ready(timeout))

    @property
    def topology(self) -> Topology:
        """See `spillway.client.Client.topology`."""
        return self._client.topology

    @property
    def admin(self) -> Admin:
        """Destinations and what became of their messages."""
        return Admin(self._client, self._running())

    def producer(self, **options: Any) -> Producer:
        """Makes a producer; the options are those of `spillway.client.Client.producer`."""
        loop = self._running()
        return Producer(loop.call(self._client.producer, **options), loop)

    def consumer(self, destinations: str | Sequence[str], **options: Any) -> Consumer:
        """Makes a consumer; the options are those of `spillway.client.Client.consumer`. `on_stale` is called in the
        background thread."""
        loop = self._running()
        return Consumer(loop.call(self._client.consumer, destinations, **options), loop)

    def _running(self) -> LoopThread:
        if self._loop is None:
            raise Closed("the client is not open: use `with Client(...)`")
        return self._loop


class Producer:
    """See `spillway.client.Producer`."""

    def __init__(self, producer: aio_producer.Producer, loop: LoopThread) -> None:
        self._producer = producer
        self._loop = loop

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def send(self, destination: str, payload: bytes, *, tenant: str = "", key: str = "",
             headers: Mapping[str, str] | None = None, id: str = "", delay: float | None = None,
             deliver_at: datetime | None = None, ttl: float | None = None, dedup_id: str = "",
             timeout: float | None = None) -> Receipt:
        """See `spillway.client.Producer.send`."""
        return self._loop.run(self._producer.send(destination, payload, tenant=tenant, key=key, headers=headers, id=id,
                                                  delay=delay, deliver_at=deliver_at, ttl=ttl, dedup_id=dedup_id,
                                                  timeout=timeout))

    def submit(self, destination: str, payload: bytes, *, tenant: str = "", key: str = "",
               headers: Mapping[str, str] | None = None, id: str = "", delay: float | None = None,
               deliver_at: datetime | None = None, ttl: float | None = None, dedup_id: str = "",
               timeout: float | None = None) -> concurrent.futures.Future[Receipt]:
        """As `send`, but returns a future at once. Futures do not wait for room in the buffer: bound their number."""
        return asyncio.run_coroutine_threadsafe(
            self._producer.send(destination, payload, tenant=tenant, key=key, headers=headers, id=id, delay=delay,
                                deliver_at=deliver_at, ttl=ttl, dedup_id=dedup_id, timeout=timeout), self._loop.loop)

    def send_many(self, records: Iterable[Record], *, timeout: float | None = None) -> list[Receipt]:
        """See `spillway.client.Producer.send_many`."""
        return self._loop.run(self._producer.send_many(list(records), timeout=timeout))

    def flush(self) -> None:
        """See `spillway.client.Producer.flush`."""
        self._loop.run(self._producer.flush())

    def close(self) -> None:
        """See `spillway.client.Producer.close`."""
        self._loop.run(self._producer.close())


class Consumer:
    """See `spillway.client.Consumer`."""

    def __init__(self, consumer: aio_consumer.Consumer, loop: LoopThread) -> None:
        self._consumer = consumer
        self._loop = loop

    def __enter__(self) -> Consumer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[LeasedMessage]:
        while True:
            try:
                message = self.next_message()
            except Closed:
                return
            assert message is not None
            yield message

    def runs(self) -> Iterator[LeasedRun]:
        """See `spillway.client.Consumer.runs`."""
        while True:
            try:
                run = self.next_run()
            except Closed:
                return
            assert run is not None
            yield run

    def next_message(self, timeout: float | None = None) -> LeasedMessage | None:
        """See `spillway.client.Consumer.next_message`."""
        message = self._loop.run(self._consumer.next_message(timeout))
        return None if message is None else LeasedMessage(message, self._loop)

    def next_run(self, timeout: float | None = None) -> LeasedRun | None:
        """See `spillway.client.Consumer.next_run`."""
        run = self._loop.run(self._consumer.next_run(timeout))
        return None if run is None else LeasedRun(run, self._loop)

    @property
    def state(self) -> aio_consumer.ConsumerState:
        """How it is doing now."""
        return self._consumer.state

    def close(self) -> None:
        """See `spillway.client.Consumer.close`."""
        self._loop.run(self._consumer.close())


class _Settles:
    """Outcomes: `wait=True` returns once committed (StaleLease if the lease was lost), else at once."""

    _leased: aio_leases.LeasedRun | aio_leases.LeasedMessage
    _loop: LoopThread

    def _settle(self, wait: bool, settle: Callable[..., Settlement], *args: Any) -> None:
        async def settled() -> None:
            settlement = settle(*args)
            if wait:
                await settlement

        self._loop.run(settled())

    def retry(self, delay: float | None = None, reason: str = "", *, wait: bool = True) -> None:
        """It failed; see `spillway.client.LeasedRun.retry`."""
        self._settle(wait, self._leased.retry, delay, reason)

    def throttled(self, delay: float | None = None, *, wait: bool = True) -> None:
        """See `spillway.client.LeasedRun.throttled`."""
        self._settle(wait, self._leased.throttled, delay)

    def down(self, delay: float | None = None, *, wait: bool = True) -> None:
        """See `spillway.client.LeasedRun.down`."""
        self._settle(wait, self._leased.down, delay)

    def reject(self, reason: str = "", *, wait: bool = True) -> None:
        """See `spillway.client.LeasedRun.reject`."""
        self._settle(wait, self._leased.reject, reason)

    def release(self, *, wait: bool = True) -> None:
        """See `spillway.client.LeasedRun.release`."""
        self._settle(wait, self._leased.release)

    def extend(self, seconds: float | None = None, *, wait: bool = True) -> None:
        """See `spillway.client.LeasedRun.extend`."""
        self._settle(wait, self._leased.extend, seconds)

    @property
    def destination(self) -> str:
        """The queue's destination."""
        return self._leased.destination

    @property
    def tenant(self) -> str:
        """The queue's tenant."""
        return self._leased.tenant

    @property
    def key(self) -> str:
        """The queue's key."""
        return self._leased.key

    @property
    def shard(self) -> int:
        """The queue's shard."""
        return self._leased.shard

    @property
    def fencing_token(self) -> int:
        """Names the lease; only grows per queue."""
        return self._leased.fencing_token

    @property
    def gap(self) -> Gap | None:
        """Messages right before this that went to the dead letters."""
        return self._leased.gap


class LeasedRun(_Settles):
    """See `spillway.client.LeasedRun`."""

    def __init__(self, run: aio_leases.LeasedRun, loop: LoopThread) -> None:
        self._run = self._leased = run
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._run)

    @property
    def messages(self) -> list[LeasedMessage]:
        """The messages, oldest first."""
        return [LeasedMessage(message, self._loop) for message in self._run.messages]

    @property
    def payloads(self) -> list[bytes]:
        """The payloads alone, oldest first."""
        return self._run.payloads

    def ack(self, upto: int | LeasedMessage | None = None, *, wait: bool = True) -> None:
        """See `spillway.client.LeasedRun.ack`."""
        self._settle(wait, self._run.ack, upto.sequence if isinstance(upto, LeasedMessage) else upto)


class LeasedMessage(_Settles):
    """See `spillway.client.LeasedMessage`; here it is a plain context manager."""

    def __init__(self, message: aio_leases.LeasedMessage, loop: LoopThread) -> None:
        self._message = self._leased = message
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._message)

    def __enter__(self) -> LeasedMessage:
        self._message.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> bool:
        processing, self._message.processing = self._message.processing, None
        try:
            return self._loop.call(self._message.settle_by, error)
        finally:
            if processing is not None:
                processing.end(error)

    def ack(self, *, wait: bool = True) -> None:
        """Done: never delivered again."""
        self._settle(wait, self._message.ack)

    @property
    def sequence(self) -> int:
        """Its place in the shard."""
        return self._message.sequence

    @property
    def attempt(self) -> int:
        """1 for the first delivery."""
        return self._message.attempt

    @property
    def id(self) -> str:
        """The producer's own id of the event; may be empty."""
        return self._message.id

    @property
    def headers(self) -> Mapping[str, str]:
        """As produced."""
        return self._message.headers

    @property
    def payload(self) -> bytes:
        """As produced."""
        return self._message.payload


__all__ = ["Admin", "Client", "Consumer", "LeasedMessage", "LeasedRun", "Producer", "SpillwayError"]
