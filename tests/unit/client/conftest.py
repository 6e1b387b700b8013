"""Makes the helpers beside the tests importable: importlib mode puts no folder on sys.path."""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[3])
if ROOT not in sys.path:
    sys.path.append(ROOT)
