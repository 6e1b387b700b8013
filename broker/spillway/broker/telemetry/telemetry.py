"""A node's telemetry as settings ask for it: the Prometheus endpoint, and OTLP for metrics and traces."""
from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from spillway.broker.config import split_address
from spillway.broker.errors import ConfigError
from spillway.broker.telemetry.collect import Collector
from spillway.contract.telemetry.scrape import PATH, ScrapeServer

if TYPE_CHECKING:
    from spillway.broker.runtime.node import Node

log = logging.getLogger(__name__)


class Telemetry:
    """Of one node; made before it leads anything, if a setting asks for it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.collector = Collector(node)
        self._server: ScrapeServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        config = node.config
        self._push: Any = None  # what only an endpoint makes necessary is imported only then
        self._spans: Any = None
        if config.otlp_endpoint:
            from spillway.broker.telemetry.tracing import Tracing
            from spillway.contract.telemetry import otlp

            who = otlp.resource("spillway", config.node_id, **{"spillway.cluster": config.cluster})
            self._push = otlp.MetricsPush(config.otlp_endpoint, who, self.collector.collect)
            sender = self._spans = otlp.SpanSender(config.otlp_endpoint, who)
            tracing = node.tracing = Tracing(sender.take, config.trace_sample_ratio)
            self.collector.spans = lambda: (tracing.made, tracing.dropped, sender.lost)

    async def listen(self) -> None:
        """Serves the Prometheus endpoint, if there is to be one. Raises ConfigError if it cannot."""
        address = self._node.config.metrics_listen
        if address:
            self._server = ScrapeServer(self.collector.collect)
            host, port = split_address("metrics_listen", address)
            try:
                port = await self._server.start(host, port)
            except OSError as error:
                raise ConfigError(f"metrics_listen {address} cannot be used: {error.strerror}") from None
            log.info("metrics on http://%s:%d%s", f"[{host}]" if ":" in host else host, port, PATH)

    def start(self) -> None:
        """Begins to look at what has to be looked at regularly."""
        collector = self.collector
        jobs = [collector.tick(), collector.watch_loop(), collector.walk.run()]
        if self._push is not None:
            jobs.append(self._push.run())
        for job in jobs:
            task = asyncio.get_running_loop().create_task(job)
            task.add_done_callback(_ended)
            self._tasks.append(task)

    async def stop(self) -> None:
        """Sends what is left, for a short while at most."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop()
        if self._push is not None:
            from spillway.contract.telemetry import otlp

            await asyncio.gather(self._push.stop(), otlp.within(otlp.SHUTDOWN_SECONDS, self._spans.stop))


def _ended(task: asyncio.Task[None]) -> None:
    """What looks at a node must not end it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a part of the metrics is not told any more, until this node starts again", exc_info=error)
