"""Both homes of a shard's rows, the sorted list in memory and the database, do the same with the same checkpoints."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spillway.broker.core.entry import decode_entry
from spillway.broker.core.shard import Checkpoint, Shard
from spillway.broker.core.view import MemoryView
from spillway.cluster.state_store import GroupRows, StateStore

from tests.properties.shard_world import Store, World, cache_bytes, random_program

KEY = st.binary(min_size=1, max_size=3).map(lambda key: bytes(b % 4 + 97 for b in key))
Rows = list[tuple[bytes, bytes]]
ENTRIES = st.tuples(st.lists(st.tuples(KEY, st.binary(max_size=3)), max_size=6), st.lists(KEY, max_size=4),
                    st.lists(st.tuples(KEY, KEY).map(lambda ends: tuple(sorted(ends))), max_size=2))


class Stored:
    """Rows of a group in the database; takes checkpoints as the runtime gives them."""

    def __init__(self, rows: GroupRows) -> None:
        self.rows = rows
        self.get = rows.get

    def scan(self, start: bytes, end: bytes, limit: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """See GroupRows."""
        return self.rows.scan(start, end, limit)

    def commit(self, checkpoint: Checkpoint) -> None:
        """See GroupRows."""
        self.rows.commit(self.rows.applied_index + 1, 1, checkpoint.puts, checkpoint.deletes, checkpoint.ranges)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Callable[[], Stored]]]:
    """Where the database is, and an empty group of it for each call."""
    path = tmp_path_factory.mktemp("state")
    store = StateStore(path)
    groups = count(1)
    yield path, lambda: Stored(store.group(next(groups)))
    store.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commits=st.lists(ENTRIES, max_size=5), start=KEY, end=KEY, limit=st.none() | st.integers(0, 5))
def test_rows_are_the_same_in_memory_and_in_the_database(
        home: tuple[Path, Callable[[], Stored]], commits: list[tuple[Rows, list[bytes], Rows]], start: bytes, end: bytes,
        limit: int | None) -> None:
    """After any checkpoints, in which ranges go before deletes and deletes before puts, both give the same rows."""
    views: list[Store] = [MemoryView(), home[1]()]
    for puts, deletes, ranges in commits:
        made = Checkpoint()
        made.puts, made.deletes, made.ranges = puts, deletes, ranges
        for view in views:
            view.commit(made)
    memory, stored = views
    assert list(memory.scan(b"\0", b"\xff")) == list(stored.scan(b"\0", b"\xff"))
    assert list(memory.scan(start, max(start, end), limit)) == list(stored.scan(start, max(start, end), limit))
    assert memory.get(start) == stored.get(start)


@pytest.mark.parametrize("seed", range(6))
def test_a_shard_over_the_database_does_what_the_naive_one_does(
        home: tuple[Path, Callable[[], Stored]], seed: int) -> None:
    """I2 to I7 hold over the database as they do over memory."""
    with cache_bytes(seed % 2 * 2_000):
        World(store=home[1], short=seed % 3 == 0).run(random_program(seed, 250))


def test_a_shard_survives_its_process(tmp_path: Path) -> None:
    """A database that was closed and opened again, with the rest of the log, is the shard that went on."""
    store = StateStore(tmp_path)
    groups = count(1)
    with cache_bytes(0):
        world = World(store=lambda: Stored(store.group(next(groups))))
        for kind, a, b, c in random_program(99, 400):
            world.step(kind, a, b, c)
        world.commit(0, 0, 0)
        digest = world.leader.digest()
    store.close()
    again = StateStore(tmp_path)
    for number, replica in enumerate(world.replicas, 1):
        shard = Shard(Stored(again.group(number)))
        for index, command in world.log:
            if index > replica.saved:
                shard.apply(index, decode_entry(command))
        assert shard.digest() == digest
    again.close()
