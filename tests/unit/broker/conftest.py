"""Helpers of these tests."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# importlib mode puts no folder on sys.path; the helpers beside the tests are loaded by name once.
for _name in ("node_world", "several_nodes", "raft_world"):
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parent / f"{_name}.py")
        assert _spec is not None and _spec.loader is not None
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_name] = _module
        _spec.loader.exec_module(_module)
