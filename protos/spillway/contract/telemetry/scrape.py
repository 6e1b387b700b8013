"""`GET /metrics`: the smallest HTTP server that a Prometheus can scrape. One answer a connection, a few connections at a time,
nothing read beyond a request's head."""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from spillway.contract.telemetry.metrics import OPEN_METRICS, TEXT, Family, render

log = logging.getLogger(__name__)

PATH = "/metrics"
CONNECTIONS_MAX = 16
HEAD_BYTES_MAX = 8 << 10
HEAD_SECONDS = 5.0
ANSWER_SECONDS = 30.0  # for a reader that does not read
Collect = Callable[[], Awaitable[list[Family]]]


class ScrapeServer:
    """Serves what `collect` gives. One collection at a time: whoever asks meanwhile waits for its own."""

    def __init__(self, collect: Collect) -> None:
        self._collect = collect
        self._lock = asyncio.Lock()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.scrapes = 0

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port, which is another one if 0 was asked for. Raises OSError."""
        self._server = await asyncio.start_server(self._accept, host, port, limit=HEAD_BYTES_MAX)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Listens no more, and hangs up."""
        if self._server is not None:
            self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._serving) > CONNECTIONS_MAX:
                await self._answer(writer, "503 Service Unavailable", b"too many scrapes at a time\n")
                return
            try:
                async with asyncio.timeout(HEAD_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
            except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                await self._answer(writer, "400 Bad Request", b"the head of a request did not come, or is too long\n")
                return
            await self._handle(head, writer)
        except (OSError, TimeoutError):
            pass  # it hung up, or does not read
        except Exception:
            log.exception("a scrape failed")
        finally:
            writer.close()

    async def _handle(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        request, *fields = head.decode("latin-1").split("\r\n")
        method, _, rest = request.partition(" ")
        if rest.partition(" ")[0].partition("?")[0] != PATH:
            await self._answer(writer, "404 Not Found", f"there is {PATH} only\n".encode())
        elif method != "GET":
            await self._answer(writer, "405 Method Not Allowed", b"GET only\n", "Allow: GET\r\n")
        else:
            accept = next((f.partition(":")[2] for f in fields if f.lower().startswith("accept:")), "")
            open_metrics = "application/openmetrics-text" in accept
            async with self._lock:
                body = render(await self._collect(), open_metrics)
                self.scrapes += 1
            await self._answer(writer, "200 OK", body, kind=OPEN_METRICS if open_metrics else TEXT)

    @staticmethod
    async def _answer(writer: asyncio.StreamWriter, status: str, body: bytes, more: str = "",
                      kind: str = "text/plain; charset=utf-8") -> None:
        head = (f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nCache-Control: no-store\r\n"
                f"{more}Connection: close\r\n\r\n")
        writer.write(head.encode() + body)
        async with asyncio.timeout(ANSWER_SECONDS):
            await writer.drain()
