"""`spillway dispatch` and its use of the client library."""
from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from spillway.client import Destination, HttpTarget
from spillway.client.dispatcher import main
from spillway.client.dispatcher.broker import ClientBroker
from spillway.client.dispatcher.program import EXIT_USAGE, parser
from spillway.client.dispatcher.source import Target


class FakeAdmin:
    async def list_destinations(self) -> AsyncIterator[Destination]:
        yield Destination("consumed")
        yield Destination("plain", http=HttpTarget("http://a/"))
        yield Destination("full", http=HttpTarget("https://b/", 1.5, 3))


class FakeConsumer:
    def __init__(self, log: list[object]) -> None:
        self.log = log

    async def __aenter__(self) -> FakeConsumer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.log.append("closed")

    def runs(self) -> str:
        return "runs"


class FakeClient:
    def __init__(self) -> None:
        self.admin = FakeAdmin()
        self.log: list[object] = []

    def consumer(self, destinations: list[str], **options: Any) -> FakeConsumer:
        self.log.append((destinations, options))
        return FakeConsumer(self.log)


async def test_targets() -> None:
    """Destinations with an HTTP target are delivered; what a target leaves open has the documented defaults."""
    broker = ClientBroker(FakeClient())  # type: ignore[arg-type]
    assert await broker.targets() == [Target("plain", "http://a/", 10.0, 16), Target("full", "https://b/", 1.5, 3)]


async def test_consume() -> None:
    """A destination is leased by its own consumer, which is closed afterwards."""
    client = FakeClient()
    broker = ClientBroker(client, "d1")  # type: ignore[arg-type]
    async with broker.consume("crm", 10, 20, 30, 40.0) as runs:
        assert runs == "runs"
    assert client.log == [(["crm"], {"name": "d1", "credit_messages": 10, "credit_bytes": 20, "run_messages_max": 30,
                                     "lease_seconds": 40.0}), "closed"]


def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags have defaults that work on loopback; the address may come from the environment."""
    options = parser().parse_args([])
    assert (options.address, options.destination, options.grace_seconds) == ("127.0.0.1:7070", [], 15.0)
    monkeypatch.setenv("SPILLWAY_ADDRESS", "a:1,b:2")
    options = parser().parse_args(["--destination", "crm.*", "--destination", "x"])
    assert (options.address, options.destination) == ("a:1,b:2", ["crm.*", "x"])


def test_useless_address(caplog: pytest.LogCaptureFixture) -> None:
    """An address that is none ends the program with its own code and a reason."""
    assert main(["--address", "nonsense"]) == EXIT_USAGE
    assert "nonsense" in caplog.text
