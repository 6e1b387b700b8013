"""Dead letters: three messages of a queue are rejected, the rest goes on and says so; then they are put back, in order."""
from __future__ import annotations

import argparse
import asyncio

from spillway.client import Client, Record, Reject

NAME = "example-redrive"
BAD = {b"3", b"4", b"5"}


async def main(address: str) -> None:
    """Handles with a bug, lists the dead letters, and handles them without it."""
    async with Client(address) as client:
        async with client.producer() as producer:
            await producer.send_many(Record(NAME, b"%d" % n, "acme", "user-1") for n in range(8))
        async with client.consumer(NAME) as consumer:
            left = 8
            while left:
                message = await consumer.next_message()
                assert message is not None
                async with message:
                    left -= 1
                    if message.payload in BAD:
                        raise Reject(reason="cannot parse it")  # never deliverable: to the dead letters, at once
                    if message.gap is not None:
                        print(f"before {message.payload.decode()}: {message.gap.count} messages are missing")
        async for dead in client.admin.list_dead_letters(NAME):
            print(f"dead letter {dead.payload.decode()}: {dead.reason}")

        # The bug is fixed. A dead letter goes back ahead of what came later, as fast as the handlers may be loaded.
        async for progress in client.admin.redrive_dead_letters(NAME, messages_per_second=1000):
            if progress.done:
                print(f"put back: {progress.redriven}")
        got = []
        async with client.consumer(NAME) as consumer:
            while len(got) < len(BAD):
                message = await consumer.next_message()
                assert message is not None
                async with message:
                    got.append(message.payload)
        assert got == sorted(BAD)
        print("handled in their order:", b" ".join(got).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:7070", help="a node (default: %(default)s)")
    asyncio.run(main(parser.parse_args().address))
