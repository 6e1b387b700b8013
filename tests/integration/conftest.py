"""Fixtures: real nodes."""
from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# importlib mode puts no folder on sys.path; the helpers beside the tests are loaded by name once.
for _name in ("cluster_process", "certificates", "doc_page", "otlp_receiver", "plain_client", "terminal", "traffic"):
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parent / f"{_name}.py")
        assert _spec is not None and _spec.loader is not None
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_name] = _module
        _spec.loader.exec_module(_module)

from cluster_process import ClusterProcesses  # noqa: E402


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., ClusterProcesses]]:
    """Starts clusters: cluster(nodes=1, flags=[...], start=True)."""
    made: list[ClusterProcesses] = []

    def make(nodes: int = 1, flags: list[str] | None = None, start: bool = True) -> ClusterProcesses:
        directory = tmp_path / f"cluster{len(made)}"
        directory.mkdir()
        out = ClusterProcesses(directory, nodes, flags)
        made.append(out)
        if start:
            out.start()
        return out

    yield make
    for processes in made:
        processes.end()
