"""Streams over which a node passes on what others lead."""
from __future__ import annotations

import asyncio
from typing import Any

from spillway.broker.runtime.forward import PeerLink


async def test_what_is_sent_over_a_closed_link_fails() -> None:
    """A node that stops closes its links; whoever still passes something on is told, and no task ends with an error of its own."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    link = PeerLink("n2", "127.0.0.1:1")
    await link.close()
    failed: list[tuple[object, str]] = []
    link.ack._fail = lambda item, why: failed.append((item, why))
    link.ack.send(b"", "item")
    task = link.ack._task
    assert task is not None
    await asyncio.wait((task,))
    link.ack._task = None
    del task
    assert [item for item, _ in failed] == ["item"] and not errors
