"""What a dispatcher is doing, over HTTP: `GET /status` on loopback, as JSON. For whoever is on the machine; no other."""
from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

HOST = "127.0.0.1"
HOSTS = frozenset((HOST, "localhost", "[::1]"))  # by which it may be called; another name is a web page's trick


@asynccontextmanager
async def status_server(status: Callable[[], dict[str, object]], port: int) -> AsyncIterator[int]:
    """Serves what `status` returns; gives the port.

    Args:
        status: called for each request; JSON takes what it returns.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    async def answer(request: web.Request) -> web.Response:
        if request.url.raw_host not in HOSTS:
            raise web.HTTPForbidden
        return web.json_response(status(), headers={"Cache-Control": "no-store"})

    application = web.Application()
    application.router.add_get("/status", answer)
    runner = web.AppRunner(application, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, port).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
