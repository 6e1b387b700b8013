"""`spillway dispatch` and its use of the client library."""
from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from spillway.client import Destination, HttpTarget
from spillway.client.connecting import from_arguments
from spillway.client.contexts import Contexts, default_path
from spillway.client.dispatcher import main
from spillway.client.dispatcher.broker import ClientBroker
from spillway.client.dispatcher.program import EXIT_USAGE, parser
from spillway.client.dispatcher.source import Target
from spillway.client.errors import DestinationNotFound, Unavailable

SECRET = "whsec_" + "QUFB" * 8


class FakeAdmin:
    """Destinations as a broker shows them: no secrets in lists. Notes what is read."""

    def __init__(self) -> None:
        self.stored = {
            "consumed": Destination("consumed", etag="1"),
            "plain": Destination("plain", http=HttpTarget("http://a/"), etag="2"),
            "full": Destination("full", http=HttpTarget("https://b/", 1.5, 3, {"X-B": "2", "X-A": "1"}, (SECRET,), True, 2),
                                etag="3")}
        self.reads: list[str] = []
        self.failing: set[str] = set()
        self.hanging: set[str] = set()
        self.down = False

    async def list_destinations(self) -> AsyncIterator[Destination]:
        if self.down:
            raise Unavailable("no node answers")
        for found in list(self.stored.values()):
            yield found if found.http is None else replace(found, http=replace(found.http, signing_secrets=()))

    async def get_destination(self, name: str, timeout: float) -> Destination:
        self.reads.append(name)
        if name in self.hanging:
            await asyncio.Event().wait()
        if name in self.failing:
            raise Unavailable("no node answers")
        if name not in self.stored:
            raise DestinationNotFound(name)
        return self.stored[name]

    def put(self, name: str, url: str, etag: str) -> None:
        self.stored[name] = Destination(name, http=HttpTarget(url), etag=etag)


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


def connected() -> tuple[FakeAdmin, ClientBroker]:
    client = FakeClient()
    return client.admin, ClientBroker(client)  # type: ignore[arg-type]


async def test_targets() -> None:
    """Destinations with an HTTP target are delivered, with their secrets, which lists leave out; what a target leaves
    open has the documented defaults."""
    _, broker = connected()
    assert await broker.targets() == [
        Target("plain", "http://a/", 10.0, 16),
        Target("full", "https://b/", 1.5, 3, (("X-A", "1"), ("X-B", "2")), (SECRET,), True, 2)]


async def test_reads_what_changed() -> None:
    """A destination is read once, and again when its etag changes; one that is new at once; one that is gone, or has
    lost its URL, is forgotten."""
    admin, broker = connected()
    await broker.targets()
    assert sorted(admin.reads) == ["full", "plain"]
    await broker.targets()
    assert len(admin.reads) == 2
    admin.put("plain", "http://moved/", "9")
    admin.put("new", "http://new/", "10")
    del admin.stored["full"]
    assert [(t.destination, t.url) for t in await broker.targets()] == [("plain", "http://moved/"), ("new", "http://new/")]
    assert sorted(admin.reads[2:]) == ["new", "plain"]
    admin.stored["new"] = Destination("new", etag="11")
    assert [t.destination for t in await broker.targets()] == ["plain"]
    admin.put("new", "http://again/", "10")
    assert [t.url for t in await broker.targets()] == ["http://moved/", "http://again/"], "not as it was known before"


async def test_what_cannot_be_read_stays(caplog: pytest.LogCaptureFixture) -> None:
    """A destination that cannot be read stays as it is known, or unknown, and is told of once; the others are not
    touched. It is read as soon as it can be."""
    admin, broker = connected()
    await broker.targets()
    admin.put("plain", "http://moved/", "9")
    admin.put("new", "http://new/", "10")
    admin.put("full", "http://full/", "11")
    admin.failing = {"plain", "new"}
    for _ in range(3):
        assert [(t.destination, t.url) for t in await broker.targets()] == [("plain", "http://a/"), ("full", "http://full/")]
    assert sorted(r.getMessage().split(" ")[0] for r in caplog.records) == ["destination=new", "destination=plain"]
    admin.down = True
    with pytest.raises(Unavailable):
        await broker.targets()
    admin.down, admin.failing = False, set()
    assert [t.url for t in await broker.targets()] == ["http://moved/", "http://full/", "http://new/"]


async def test_slow_reads_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be read in time counts; one that hangs is tried again next time."""
    monkeypatch.setattr("spillway.client.dispatcher.broker.READ_SECONDS_MAX", 0.05)
    admin, broker = connected()
    admin.hanging = {"plain"}
    async with asyncio.timeout(10):
        assert [t.destination for t in await broker.targets()] == ["full"]
    admin.hanging = set()
    assert [t.destination for t in await broker.targets()] == ["plain", "full"]


async def test_deleted_between_list_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that is gone when it is read is no target."""
    admin, broker = connected()
    stored = admin.stored.pop("plain")

    async def list_destinations() -> AsyncIterator[Destination]:
        yield stored

    monkeypatch.setattr(admin, "list_destinations", list_destinations)
    assert await broker.targets() == []


def test_nothing_secret_in_repr() -> None:
    """Targets may be shown in errors and logs."""
    http = HttpTarget("https://user:password@b/", headers={"X": "token"}, signing_secrets=(SECRET,))
    target = Target("d", http.url, 1.0, 1, (("X", "token"),), http.signing_secrets)
    assert not [word for word in ("password", "token", SECRET) if word in repr(target)]
    assert not [word for word in ("token", SECRET) if word in repr(http)]


async def test_consume() -> None:
    """A destination is leased by its own consumer, which is closed afterwards."""
    client = FakeClient()
    broker = ClientBroker(client, "d1")  # type: ignore[arg-type]
    async with broker.consume("crm", 10, 20, 30, 40.0) as runs:
        assert runs == "runs"
    assert client.log == [(["crm"], {"name": "d1", "credit_messages": 10, "credit_bytes": 20, "run_messages_max": 30,
                                     "lease_seconds": 40.0}), "closed"]


def test_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flags have defaults that work on loopback; the address may come from the environment, or a context."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("SPILLWAY_ADDRESS", raising=False)
    options = parser().parse_args([])
    assert (from_arguments(options).address, options.destination, options.grace_seconds) == (("127.0.0.1:7070",), [], 15.0)
    monkeypatch.setenv("SPILLWAY_ADDRESS", "a:1,b:2")
    options = parser().parse_args(["--destination", "crm.*", "--destination", "x"])
    assert (from_arguments(options).address, options.destination) == (("a:1", "b:2"), ["crm.*", "x"])
    assert from_arguments(parser().parse_args(["--address", "c:3,d:4", "--address", "e:5"])).address == ("c:3", "d:4", "e:5")
    assert main(["--context", "nowhere"]) == EXIT_USAGE
    Contexts(default_path(os.environ)).add("prod", {"address": ["p:1"]})
    assert from_arguments(parser().parse_args(["--context", "prod"])).address == ("p:1",)


def test_useless_address(caplog: pytest.LogCaptureFixture) -> None:
    """An address that is none ends the program with its own code and a reason."""
    assert main(["--address", "nonsense"]) == EXIT_USAGE
    assert "nonsense" in caplog.text


def test_status_port_taken(caplog: pytest.LogCaptureFixture) -> None:
    """A status that cannot be served ends the program before it delivers anything."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["--address", "127.0.0.1:1", "--status-port", str(port)]) == EXIT_USAGE
    assert f"cannot serve the status on port {port}" in caplog.text
