"""The HTTP server of /metrics: what it answers, and what it does not wait for."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from spillway.contract.telemetry import scrape
from spillway.contract.telemetry.metrics import Family, Metric
from spillway.contract.telemetry.scrape import ScrapeServer

ONE = Metric("one_total", "counter", "1", "One.", "One?")


@pytest.fixture
async def server() -> AsyncIterator[tuple[ScrapeServer, int]]:
    """A server and its port."""
    async def collect() -> list[Family]:
        await asyncio.sleep(0)
        return [Family(ONE, [((), 1)])]

    made = ScrapeServer(collect)
    yield made, await made.start("127.0.0.1", 0)
    await made.stop()


async def ask(port: int, request: str) -> tuple[str, str]:
    """(head, body) of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    head, _, body = (await asyncio.wait_for(reader.read(), 30)).decode().partition("\r\n\r\n")
    writer.close()
    return head, body


async def test_it_answers_a_scrape(server: tuple[ScrapeServer, int]) -> None:
    """In the format that is asked for."""
    made, port = server
    head, body = await ask(port, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 ") and "version=0.0.4" in head and body.endswith("one_total 1\n")
    head, body = await ask(port, "GET /metrics?x=1 HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0\r\n\r\n")
    assert "openmetrics-text" in head and body.endswith("# EOF\n")
    assert made.scrapes == 2


@pytest.mark.parametrize(("request_", "status"), [
    ("POST /metrics HTTP/1.1\r\n\r\n", 405), ("GET / HTTP/1.1\r\n\r\n", 404), ("\x00\r\n\r\n", 404),
    ("GET /metrics HTTP/1.1\r\n" + "x" * 20_000, 400)])
async def test_it_answers_nothing_else(server: tuple[ScrapeServer, int], request_: str, status: int) -> None:
    """Other methods, paths and heads without end are refused, and the connection is closed."""
    made, port = server
    head, _ = await ask(port, request_)
    assert head.startswith(f"HTTP/1.1 {status} ")
    assert made.scrapes == 0


async def test_those_who_say_nothing_hold_a_few_connections_for_a_while(server: tuple[ScrapeServer, int],
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of connections further ones are told to come later, or hung up on; who says nothing is put out."""
    _, port = server

    async def status() -> str:
        try:
            return (await ask(port, "GET /metrics HTTP/1.1\r\n\r\n"))[0][9:12]
        except ConnectionResetError:  # it did not read the request
            return "503"

    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(scrape.CONNECTIONS_MAX)]
    assert await status() == "503"
    for _, writer in silent:
        writer.close()
    async with asyncio.timeout(30):
        while await status() != "200":
            await asyncio.sleep(0)
    monkeypatch.setattr(scrape, "HEAD_SECONDS", 0.01)
    assert (await ask(port, "GET /met"))[0].startswith("HTTP/1.1 400 ")
