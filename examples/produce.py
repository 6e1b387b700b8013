"""Sends events: one at a time, many at once, later, and only once."""
from __future__ import annotations

import argparse
import asyncio

from spillway.client import Client, Record


async def main(address: str) -> None:
    """Connects to any node of the cluster; the client finds the others."""
    async with Client(address) as client, client.producer() as producer:
        # (destination, tenant, key) names a queue. A queue costs nothing while it is empty: take a key for each user.
        receipt = await producer.send("example-produce", b'{"event": "signup"}', tenant="acme", key="user-1")
        print(f"stored by a majority of nodes: shard {receipt.shard}, sequence {receipt.sequence}")

        # The fast path: one call for many records, which go out in batches, in order for each queue.
        records = [Record("example-produce", b'{"page": %d}' % i, "acme", f"user-{i % 10}", {"kind": "page"})
                   for i in range(1000)]
        receipts = await producer.send_many(records)
        print(f"stored {len(receipts)} more")

        # Delivered in a minute; dropped if it could not be delivered within an hour.
        await producer.send("example-produce", b'{"event": "reminder"}', tenant="acme", key="user-1", delay=60, ttl=3600)

        # Retries of this client never store twice. A caller without state of its own, for one a web hook's handler that is
        # called again, gives an id: a second record of the queue with it is acknowledged and not stored.
        for _ in range(3):
            await producer.send("example-produce", b'{"order": 17}', tenant="acme", key="orders", dedup_id="order-17")
        stats = await client.admin.destination_stats("example-produce")
        print(f"waiting: {stats.messages} messages in {stats.queues} queues")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:7070", help="a node (default: %(default)s)")
    asyncio.run(main(parser.parse_args().address))
