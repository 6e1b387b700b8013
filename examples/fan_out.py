"""Copies events to two destinations by a route; one of them wants orders only."""
from __future__ import annotations

import argparse
import asyncio

from spillway.client import Client, Record, Route, RouteTarget

EVENTS = 100


async def main(address: str) -> None:
    """Makes the destinations and the route, sends events to its source, and reads what arrived at each destination."""
    async with Client(address) as client:
        for name in ("example-warehouse", "example-billing"):
            await client.admin.update_destination(name, create=True)
        await client.admin.update_route(Route("example-events", (
            RouteTarget("example-warehouse"),
            RouteTarget("example-billing", filter='headers["kind"] == "order"'))), create=True)
        async with client.producer() as producer:
            # Each receipt says that every copy is replicated; a retry makes no second one.
            await producer.send_many(
                Record("example-events", b"%d" % n, "acme", f"user-{n % 7}", {"kind": "order" if n % 4 == 0 else "page"})
                for n in range(EVENTS))
        for name, expected in (("example-warehouse", EVENTS), ("example-billing", EVENTS // 4)):
            got = []
            async with client.consumer(name) as consumer:
                while len(got) < expected:
                    message = await consumer.next_message()
                    assert message is not None
                    async with message:
                        got.append(int(message.payload))
            print(f"{name}: {len(got)} copies, the first are {sorted(got)[:5]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:7070", help="a node (default: %(default)s)")
    asyncio.run(main(parser.parse_args().address))
