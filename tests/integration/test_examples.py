"""Every program of examples/ does what it says, against a real node."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_process import ClusterProcesses

EXAMPLES = Path(__file__).parents[2] / "examples"
LAST_LINES = {
    "produce.py": "waiting: 1003 messages in 11 queues",
    "ordered_consumer.py": "all 500 were handled, and every user's in order",
    "webhooks.py": "then it got all 200 events, signed, and every customer's in order",
    "fan_out.py": "example-billing: 25 copies, the first are [0, 4, 8, 12, 16]",
    "redrive.py": "handled in their order: 3 4 5",
}


def test_the_list_is_complete() -> None:
    """No program without a test, and none that the README of the folder does not name."""
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    assert programs == set(LAST_LINES)
    assert all(f"[{name}]({name})" in (EXAMPLES / "README.md").read_text() for name in programs)


@pytest.mark.parametrize("name", sorted(LAST_LINES))
def test_an_example_runs(cluster: Callable[..., ClusterProcesses], name: str) -> None:
    """It ends by itself, without an error, and its last line is what it promises."""
    processes = cluster(nodes=1)
    done: subprocess.CompletedProcess[Any] = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--address", processes.addresses[0]], capture_output=True, text=True, timeout=60,
        check=False)
    assert done.returncode == 0, done.stderr
    assert LAST_LINES[name] in done.stdout.splitlines()[-1]
