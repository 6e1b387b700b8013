"""Snapshots as a node sends them: how many, how fast, and until when one can go on."""
from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from spillway.cluster import exports
from spillway.cluster.exports import KEPT_MAX, RUNNING_MAX, Exports, Pace
from spillway.cluster.snapshots import Exporter, Installer
from spillway.cluster.state_store import StateStore

FAST = 1 << 40
ROWS = [(b"%03d" % n, bytes(100_000)) for n in range(20)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    """A store of some groups with 2 MB each."""
    store = StateStore(tmp_path / "source")
    for group in range(1, 8):
        store.group(group).commit(10, 2, ROWS, [], [])
    yield store
    store.close()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[StateStore]:
    """An empty one."""
    store = StateStore(tmp_path / "target")
    yield store
    store.close()


class Made:
    """Every export that was begun."""

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self.all: list[Exporter] = []

    def __call__(self, group: int) -> Exporter:
        self.all.append(self.store.exporter(group))
        return self.all[-1]


@pytest.fixture
def made(store: StateStore) -> Made:
    return Made(store)


async def some(sending: AsyncGenerator[bytes, None], installer: Installer, count: int) -> None:
    """Takes so many chunks, then the connection breaks."""
    for _ in range(count):
        installer.feed(await anext(sending))
    await sending.aclose()


async def rest(sending: AsyncGenerator[bytes, None], installer: Installer) -> None:
    async for chunk in sending:
        installer.feed(chunk)


class Time:
    """Sleeps that end at once, on a clock that they move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now, raising=False)
        monkeypatch.setattr(exports.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def test_all_exports_keep_to_one_rate(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at once take as long as one after the other: what they send in all, at the rate of the node."""
    rate = 1 << 20
    sending = Exports(store.exporter, rate)
    time = Time(monkeypatch)
    streams = [sending.send(group, "n2", None) for group in (1, 2, 3)]
    sent = 0
    while streams:
        for stream in streams[:]:
            if (chunk := await anext(stream, None)) is None:
                streams.remove(stream)
            else:
                sent += len(chunk)
    assert sent > 3 * 20 * 100_000
    assert time.now - 100.0 == pytest.approx(sent / rate - exports.BURST_SECONDS)


async def test_a_pause_earns_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an hour without snapshots the first one does not flood the network."""
    time = Time(monkeypatch)
    pace = Pace(1_000)
    await pace.take(1_000)
    time.now += 3600
    since = time.now
    for _ in range(10):
        await pace.take(1_000)
    assert time.now - since == pytest.approx(10 - exports.BURST_SECONDS)


async def test_a_broken_export_goes_on(made: Made, target: StateStore) -> None:
    """From where the receiver is, with the state of the moment at which it began; kept until then, and gone when it has ended."""
    sending = Exports(made, FAST)
    installer = Installer(target, 1)
    await some(sending.send(1, "n2", None), installer, 6)
    assert repr(sending) == "<exports: 0 running, 1 kept>"
    made.store.group(1).commit(11, 2, [(b"zz", b"late")], [b"010"], [])
    await rest(sending.send(1, "n2", installer.rewind()), installer)
    assert installer.finish() == (10, 2)
    assert dict(target.group(1).scan(b"", b"z")) == dict(ROWS)
    assert len(made.all) == 1 and repr(sending) == "<exports: 0 running, 0 kept>"


async def test_a_receiver_that_comes_back_ends_its_own_call(made: Made, target: StateStore) -> None:
    """The sender may not have noticed yet that a connection is gone: the new one takes over the export and its place among those that
    run, and the old call sends nothing any more."""
    sending = Exports(made, FAST)
    calls = [sending.send(group, "n2", None) for group in range(1, RUNNING_MAX + 1)]
    installer = Installer(target, 1)
    for call in calls:
        chunk = await anext(call)
        if call is calls[0]:
            installer.feed(chunk)
    await rest(sending.send(1, "n2", installer.rewind()), installer)
    assert installer.finish() == (10, 2) and len(made.all) == RUNNING_MAX
    assert [chunk async for chunk in calls[0]] == []
    assert repr(sending) == f"<exports: {RUNNING_MAX - 1} running, 0 kept>"
    for call in calls[1:]:
        assert [chunk async for chunk in call]
    assert repr(sending) == "<exports: 0 running, 0 kept>"


@pytest.mark.parametrize("why", ["no position", "another moment", "another peer", "another group"])
async def test_what_cannot_go_on_begins_anew(made: Made, target: StateStore, why: str) -> None:
    """With the first chunk of the state as of now."""
    sending = Exports(made, FAST)
    installer = Installer(target, 1)
    await some(sending.send(1, "n2", None), installer, 6)
    made.store.group(1).commit(11, 2, [(b"zz", b"late")], [], [])
    position = None if why == "no position" else installer.position
    if why == "another moment":
        await some(sending.send(1, "n2", None), Installer(target, 1), 1)
    group, peer = 2 if why == "another group" else 1, "n3" if why == "another peer" else "n2"
    again = Installer(target, group)
    await rest(sending.send(group, peer, position), again)
    assert again.finish()[0] == (10 if why == "another group" else 11)


async def test_few_run_at_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes later waits for a place, and its moment is when it gets one; who gives up waiting takes none. Who waits is told
    all the time that the sender is there."""
    monkeypatch.setattr(exports, "STILL_THERE_SECONDS", 0.001)
    sending = Exports(made, FAST)
    first = [sending.send(group, "n2", None) for group in range(1, RUNNING_MAX + 1)]
    for call in first:
        await anext(call)
    signs = 0

    async def first_chunk(peer: str) -> bytes:
        nonlocal signs
        async for chunk in (call := sending.send(6, peer, None)):
            if chunk:
                await call.aclose()
                return chunk
            signs += 1
        raise AssertionError("nothing")

    waiting = [asyncio.ensure_future(first_chunk(peer)) for peer in ("n2", "n3", "n4")]
    async with asyncio.timeout(60):
        while signs < 10:
            await asyncio.sleep(0.001)
    assert len(made.all) == RUNNING_MAX and not any(task.done() for task in waiting)
    waiting[0].cancel()
    made.store.group(6).commit(11, 2, [], [], [])
    for call in first[:2]:
        await call.aclose()
    await asyncio.gather(*waiting[1:])
    assert [e.index for e in made.all[RUNNING_MAX:]] == [11, 11]
    assert waiting[0].cancelled()
    for call in first[2:]:
        await call.aclose()
    assert repr(sending) == "<exports: 0 running, 4 kept>" and sending._slots._value == RUNNING_MAX
    sending.close()


async def test_broken_ones_are_kept_within_bounds(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many, and so long: they pin the files of their moment."""
    monkeypatch.setattr(exports, "RESUME_SECONDS", 0.01)
    sending = Exports(made, FAST)

    async def broken(group: int) -> None:
        call = sending.send(group, "n2", None)
        await anext(call)
        await call.aclose()

    for group in range(1, KEPT_MAX + 3):
        await broken(group)
    assert [e.ended for e in made.all] == [True, True] + [False] * KEPT_MAX
    async with asyncio.timeout(60):
        while not all(e.ended for e in made.all):
            await asyncio.sleep(0.001)
    await broken(1)
    sending.close()
    assert made.all[-1].ended


async def test_a_receiver_that_takes_nothing_has_no_place(made: Made, monkeypatch: pytest.MonkeyPatch, target: StateStore) -> None:
    """Its machine is gone, and the connection does not tell: others may run. If it comes back after all, it goes on."""
    monkeypatch.setattr(exports, "TAKEN_SECONDS", 0.01)
    sending = Exports(made, FAST)
    installer = Installer(target, 1)
    call = sending.send(1, "n2", None)
    installer.feed(await anext(call))
    async with asyncio.timeout(60):
        while repr(sending) != "<exports: 0 running, 1 kept>":
            await asyncio.sleep(0.001)
    monkeypatch.undo()
    await rest(sending.send(1, "n2", installer.rewind()), installer)
    assert installer.finish() == (10, 2) and len(made.all) == 1
    assert [chunk async for chunk in call] == []
    assert sending._slots._value == RUNNING_MAX


async def test_a_call_that_is_let_go_of_is_a_broken_one(made: Made) -> None:
    """gRPC drops the generator of a call whose client is gone."""
    sending = Exports(made, FAST)
    call: Any = sending.send(1, "n2", None)
    await anext(call)
    del call
    gc.collect()
    for _ in range(5):
        await asyncio.sleep(0)
    assert repr(sending) == "<exports: 0 running, 1 kept>"
    sending.close()
