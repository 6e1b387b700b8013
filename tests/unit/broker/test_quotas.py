"""Limits of connections and tokens: who is over one is refused or waits, and what is over is free again."""
from __future__ import annotations

import asyncio

import pytest
from spillway.broker.errors import TooMuch
from spillway.broker.services.principal import Limits, Principal
from spillway.broker.services.quotas import IDLE_SECONDS, Quotas


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


ANYBODY = Principal("anonymous")


def test_nothing_is_counted_without_limits() -> None:
    """No account, no cost."""
    quotas = Quotas(Limits())
    assert quotas.open("c", ANYBODY) is None and quotas.open("c", Principal("x", key="k")) is None and len(quotas) == 0


def test_streams_are_counted_by_connection_and_by_token() -> None:
    """One that is refused counts nowhere; one that ends makes room."""
    quotas = Quotas(Limits(streams=2))
    one, two = quotas.open("c", ANYBODY), quotas.open("c", ANYBODY)
    with pytest.raises(TooMuch, match="connection c has 2 open streams"):
        quotas.open("c", ANYBODY)
    assert quotas.open("other", ANYBODY) is not None
    token = Principal("token k", key="k", limits=Limits(streams=1))
    assert one is not None and two is not None
    one.end()
    mine = quotas.open("c", token)
    two.end()
    for connection in ("c", "d"):
        with pytest.raises(TooMuch, match="token k has 1 open streams"):
            quotas.open(connection, token)
    assert mine is not None
    mine.end()
    assert quotas.open("d", token) is not None


def test_records_over_the_rate_make_the_stream_wait() -> None:
    """Those of a second may come at once; a new stream gets no second of its own."""
    clock = Clock()
    quotas = Quotas(Limits(messages_per_second=10), clock)
    one = quotas.open("c", ANYBODY)
    assert one is not None and one.spend(10) == 0.0 and one.spend(5) == 0.5
    one.end()
    two = quotas.open("c", ANYBODY)
    assert two is not None and two.spend(5) == 1.0
    clock.now = 10.0
    assert two.spend(10) == 0.0 and two.spend(100_000) == 60.0


async def test_bytes_in_flight_make_others_wait_until_they_are_answered() -> None:
    """Of all streams of a connection together; one request may always be under way, however big."""
    quotas = Quotas(Limits(bytes_in_flight=100))
    one, two = quotas.open("c", ANYBODY), quotas.open("c", ANYBODY)
    assert one is not None and two is not None
    await one.wait_for_bytes(1000)
    one.hold(1000)
    waiting = asyncio.create_task(two.wait_for_bytes(50))
    await asyncio.sleep(0)
    assert not waiting.done()
    one.end()  # with what it held
    await waiting
    two.hold(50)
    await two.wait_for_bytes(50)
    waiting = asyncio.create_task(two.wait_for_bytes(51))
    await asyncio.sleep(0)
    assert not waiting.done()
    two.hold(-50)
    await waiting


def test_accounts_that_are_not_used_are_forgotten() -> None:
    """So connections that come and go leave nothing."""
    clock = Clock()
    quotas = Quotas(Limits(streams=1), clock)
    for n in range(1000):
        clock.now += IDLE_SECONDS / 2
        quota = quotas.open(f"c{n}", ANYBODY)
        assert quota is not None
        quota.end()
    assert len(quotas) < 5
