"""The packed list of names: a deque in behaviour."""
from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spillway.broker.core import names
from spillway.broker.core.names import NameQueue


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(st.lists(st.one_of(st.binary(max_size=40), st.integers(1, 9), st.none())))
def test_it_behaves_as_a_deque(steps: list[bytes | int | None]) -> None:
    """Bytes are appended, a number takes so many, None drops every other name."""
    old, names.CHUNK_BYTES = names.CHUNK_BYTES, 64  # several buffers
    try:
        queue, model = NameQueue(), deque[bytes]()
        for step in steps:
            if isinstance(step, bytes):
                queue.append(step)
                model.append(step)
            elif step is None:
                queue.retain(lambda name: len(name) % 2 == 0)
                model = deque(n for n in model if len(n) % 2 == 0)
            else:
                for _ in range(min(step, len(model))):
                    assert queue.popleft() == model.popleft()
            assert len(queue) == len(model) and list(queue) == list(model) and bool(queue) == bool(model)
    finally:
        names.CHUNK_BYTES = old


def test_the_longest_names_fit() -> None:
    """A queue's name is at most three names of 255 bytes; there is room to spare."""
    queue = NameQueue()
    queue.append(b"x" * 65_535)
    queue.append(b"")
    assert (queue.popleft(), queue.popleft()) == (b"x" * 65_535, b"")
    with pytest.raises(IndexError):
        queue.popleft()


def test_a_list_that_is_never_empty_does_not_grow() -> None:
    """Round robin: each name goes to the end again."""
    queue = NameQueue()
    for i in range(100):
        queue.append(b"name %d" % i)
    for _ in range(100_000):
        queue.append(queue.popleft())
    held = len(queue._first) + (len(queue._last) if queue._last is not queue._first else 0)
    assert len(queue) == 100 and not queue._more and held < 2 * names.CHUNK_BYTES
