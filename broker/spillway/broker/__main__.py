"""`python -m spillway.broker`: the same as `spillway serve`."""
from __future__ import annotations

import sys

from spillway.broker.main import serve

sys.exit(serve(sys.argv[1:]))
