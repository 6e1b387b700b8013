"""Consumes in order for each key, several keys at a time; what fails is tried again before what is behind it."""
from __future__ import annotations

import argparse
import asyncio
import collections

from spillway.client import Client, LeasedMessage, Record

WORKERS = 8
KEYS, EACH = 20, 25


async def main(address: str) -> None:
    """Sends numbered events of twenty users, then handles them; some fail the first time."""
    seen: dict[str, list[int]] = collections.defaultdict(list)
    failed: set[bytes] = set()
    done = asyncio.Event()

    async def handle(message: LeasedMessage) -> None:
        """The work. An exception is a failure: the message comes again, and its queue waits for it."""
        number = int(message.payload)
        if number % 7 == 3 and message.id not in failed:
            failed.add(message.id)
            raise ConnectionError("the database is away for a moment")
        seen[message.key].append(number)
        if sum(map(len, seen.values())) == KEYS * EACH:
            done.set()

    async with Client(address) as client:
        async with client.producer() as producer:
            await producer.send_many(Record("example-ordered", b"%d" % n, "acme", f"user-{k}", id=f"{k}-{n}")
                                     for n in range(EACH) for k in range(KEYS))
        async with client.consumer("example-ordered") as consumer:
            async def work() -> None:
                async for message in consumer:
                    try:
                        async with message:  # acknowledged at the end of the block, retried on an exception
                            await handle(message)
                    except ConnectionError as error:
                        print(f"{message.key}: event {message.payload.decode()} failed ({error}), will be tried again")

            workers = [asyncio.ensure_future(work()) for _ in range(WORKERS)]
            await done.wait()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    assert all(numbers == list(range(EACH)) for numbers in seen.values())
    print(f"{len(failed)} events failed once; all {KEYS * EACH} were handled, and every user's in order")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:7070", help="a node (default: %(default)s)")
    asyncio.run(main(parser.parse_args().address))
