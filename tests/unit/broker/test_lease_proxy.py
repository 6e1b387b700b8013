"""What a node does for a plain client's Lease stream."""
from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from spillway.broker.core.scheduler import Consumer
from spillway.broker.runtime.consumers import Sink
from spillway.broker.runtime.forward import LeaseProxy
from spillway.contract.credits import CreditSplitter
from spillway.v1.queue_service_pb2 import Credit, Subscribe


async def test_a_client_without_credit_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it gives some there is nothing to split, and nothing wakes to do so."""
    asked = []
    wake_time = CreditSplitter.wake_time
    monkeypatch.setattr(CreditSplitter, "wake_time", lambda self, now: asked.append(now) or wake_time(self, now))
    node: Any = SimpleNamespace(config=SimpleNamespace(node_id="n1"), members={"n1": None}, on_members=[],
                                scheduler=SimpleNamespace(subscribe=lambda consumer, patterns: None))
    consumer = Consumer("c")
    proxy = LeaseProxy(SimpleNamespace(node=node), Subscribe(destinations=["d"], credit=Credit(messages=1, bytes=99)),  # type: ignore[arg-type]
                       consumer, Sink(consumer), lambda consumer, messages, size: None)
    proxy.start()
    await asyncio.sleep(0.02)
    assert asked
    assert proxy._admit("n1", 1, 10)
    await asyncio.sleep(0)
    asked.clear()
    await asyncio.sleep(0.05)
    assert not asked
    proxy.credit(1, 10)
    await asyncio.sleep(0.02)
    assert asked
    proxy.stop()
