"""Traffic by the client that PYTHONPATH says, from "ready" until a line comes in. Exit code 0: everything came, in order and once."""
from __future__ import annotations

import asyncio
import sys

from spillway.client import Client

from tests.integration.traffic import traffic


async def main(addresses: list[str]) -> None:
    """One message at a time: what the previous client does with several while leaders change is not the question here."""
    async with Client(addresses) as client, traffic(client, "earlier", queues=1, pause=0.02) as flow:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    print(flow.received, flush=True)


asyncio.run(main(sys.argv[1:]))
