"""Runs the transcripts beside this file. After a change that is meant, write them anew and read the diff:

    SCENARIOS_REGENERATE=1 pytest tests/scenarios
"""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.scenarios import transcript

SCENARIOS = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    """The shard does what the transcript tells."""
    if os.environ.get("SCENARIOS_REGENERATE"):
        transcript.regenerate(path)
    assert transcript.run(path.read_text()) == path.read_text()


def test_all_scenarios_are_found() -> None:
    """The transcripts are there to be run."""
    assert len(SCENARIOS) >= 9
