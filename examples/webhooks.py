"""Delivers over HTTP with the dispatcher: signed requests to an endpoint that answers 503 for a while, and nothing is lost."""
from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import hashlib
import hmac
import secrets
import time

from aiohttp import web
from spillway.client import Client, DeliveryPolicy, Destination, HttpTarget, Record
from spillway.client.dispatcher.broker import ClientBroker
from spillway.client.dispatcher.dispatcher import Dispatcher

CUSTOMERS, EACH = 10, 20
KEY = secrets.token_bytes(32)
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class Receiver:
    """A customer's endpoint."""

    def __init__(self) -> None:
        self.down_until = time.monotonic() + 1.5
        self.refused = 0
        self.events: dict[str, list[int]] = collections.defaultdict(list)
        self.complete = asyncio.Event()

    async def handle(self, request: web.Request) -> web.Response:
        """One webhook, as https://www.standardwebhooks.com describes it."""
        if time.monotonic() < self.down_until:
            self.refused += 1
            return web.Response(status=503, headers={"Retry-After": "1"})
        body = await request.read()
        signed = b".".join((request.headers["webhook-id"].encode(), request.headers["webhook-timestamp"].encode(), body))
        expected = "v1," + base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
        if not hmac.compare_digest(request.headers["webhook-signature"], expected):
            return web.Response(status=401)
        self.events[request.headers["Spillway-Key"]].append(int(body))
        if sum(map(len, self.events.values())) >= CUSTOMERS * EACH:
            self.complete.set()
        return web.Response()


async def main(address: str) -> None:
    """Starts the endpoint, tells the broker of it, sends events, and runs a dispatcher until all have arrived."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/events", receiver.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with Client(address) as client:
        await client.admin.update_destination(Destination(
            "example-webhooks", DeliveryPolicy(backoff_base=0.1, backoff_cap=1.0),
            HttpTarget(f"http://127.0.0.1:{port}/events", signing_secrets=(SECRET,), headers={"X-Team": "billing"},
                       allow_private_addresses=True)), create=True)  # loopback: refused unless allowed
        async with client.producer() as producer:
            await producer.send_many(Record("example-webhooks", b"%d" % n, "acme", f"customer-{c}")
                                     for n in range(EACH) for c in range(CUSTOMERS))
        dispatcher = Dispatcher(ClientBroker(client, "example"), ["example-webhooks"])  # as `spillway dispatch` does
        running = asyncio.ensure_future(dispatcher.run())
        await receiver.complete.wait()
        dispatcher.stop()
        await running
    await runner.cleanup()
    assert all(list(dict.fromkeys(numbers)) == list(range(EACH)) for numbers in receiver.events.values())
    print(f"the endpoint was down at first and refused {receiver.refused} requests; then it got all {CUSTOMERS * EACH} events, "
          "signed, and every customer's in order")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:7070", help="a node (default: %(default)s)")
    asyncio.run(main(parser.parse_args().address))
