"""The processes of the load: `python -m tests.torture.worker ROLE HISTORY-FILE NAME OPTIONS`. SIGTERM ends one in good order."""
from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path

from tests.torture.consume import consume
from tests.torture.history import Writer
from tests.torture.plain import plain_consume, plain_produce
from tests.torture.produce import produce

ROLES = {"produce": produce, "consume": consume, "plain_produce": plain_produce, "plain_consume": plain_consume}


def main(argv: list[str]) -> None:
    """Runs one role. The loop is asyncio's own: its clock is exact, and the history's."""
    role, file, name, options = argv
    logging.basicConfig(level="WARNING", stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(ROLES[role](Writer(Path(file), name), name, **json.loads(options)))
    os._exit(0)  # gRPC's threads are of no interest any more


if __name__ == "__main__":
    main(sys.argv[1:])
