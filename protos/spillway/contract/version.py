"""The version of this software: of the source that runs, whatever is installed beside it."""
from __future__ import annotations

VERSION = "0.3.0"
