"""Fixtures: the previous release, and clusters."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.cluster_process import ClusterProcesses
from tests.upgrade.release import Release


@pytest.fixture(scope="session")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The previous release."""
    try:
        return Release(tmp_path_factory.mktemp("previous"))
    except LookupError as error:
        pytest.skip(f"UPGRADES ARE NOT TESTED: {error}")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., ClusterProcesses]]:
    """Makes clusters of three nodes that lead one shard each, and starts none of them."""
    made: list[ClusterProcesses] = []

    def make(*flags: str) -> ClusterProcesses:
        out = ClusterProcesses(tmp_path, 3, ["--shards", "3", *flags])
        made.append(out)
        return out

    yield make
    for processes in made:
        processes.end()
