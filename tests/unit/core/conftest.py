"""Profiles of the random tests: the default is deterministic and quick, `long` searches anew each time.

    HYPOTHESIS_PROFILE=long pytest tests/properties tests/unit/core
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from spillway.broker.core import state as state_module

from tests.unit.core.shard_log import Log

settings.register_profile("default", derandomize=True, deadline=None, database=None, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("long", parent=settings.get_profile("default"), derandomize=False, max_examples=5_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def log() -> Log:
    """An empty shard."""
    return Log()


@pytest.fixture
def no_cache() -> Iterator[None]:
    """A checkpoint forgets what it saved."""
    with mock.patch.object(state_module, "CACHE_BYTES_MAX", 0):
        yield
