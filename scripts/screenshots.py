"""Writes the text screenshots of docs/cli.md: starts a cluster of three nodes with some traffic, and shows what the commands say of it.

They stand between lines `<!-- begin screenshot NAME -->` and `<!-- end screenshot NAME -->`. Ports are told as the README has them.
"""
from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from spillway.client import Client, DeliveryPolicy, Destination, Limit, Retention, TenantPolicy

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cli.md"
sys.path.insert(0, str(ROOT))
from demo.ports import free_ports  # noqa: E402

SETTLE_SECONDS = 8.0  # of traffic, before anybody looks
SHOWN = {
    "top": "spillway top --once",
    "top tenants": "spillway top crm --once",
    "explain": "spillway explain crm globex",
    "explain json": "spillway explain billing -o json",
    "cluster status": "spillway cluster status",
    "tenant list": "spillway tenant list crm",
}


class Nodes:
    """Three nodes, ended in every case."""

    def __init__(self, directory: Path) -> None:
        ports = free_ports(6)
        self.clients = [f"127.0.0.1:{port}" for port in ports[:3]]
        peers = [f"127.0.0.1:{port}" for port in ports[3:]]
        members = ",".join(f"n{i + 1}={peers[i]}/{self.clients[i]}" for i in range(3))
        self._processes = [subprocess.Popen(
            [sys.executable, "-m", "spillway.broker", "--node-id", f"n{i + 1}", "--listen", self.clients[i], "--peer-listen", peers[i],
             "--data-dir", str(directory / f"n{i + 1}"), "--peers", members, "--shards", "6", "--zone", "abc"[i], "--log-level", "error"],
            stdout=subprocess.DEVNULL) for i in range(3)]

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)


async def traffic(client: Client) -> None:
    """Sends to some destinations, and serves some of them; goes on until cancelled."""
    async def send(destination: str, tenants: Sequence[str], per_second: float) -> None:
        number = 0
        async with client.producer() as producer:
            while True:
                tenant = tenants[number * number % 7 % len(tenants)]
                sent = producer.send_nowait(destination, b"x" * 400, tenant=tenant, key=f"user-{number % 50}")
                sent.add_done_callback(lambda one: one.cancelled() or one.exception())  # the last ones fail as it ends
                number += 1
                await asyncio.sleep(1 / per_second)

    async def serve(destination: str) -> None:
        async with client.consumer(destination, name="worker") as consumer:
            async for message in consumer:
                message.ack()

    async with asyncio.TaskGroup() as group:
        for destination, tenants, per_second in (("billing", ("acme", "globex", "initech"), 120), ("crm", ("globex", "acme", "hooli"), 40),
                                                 ("search", ("acme", "hooli"), 60), ("warehouse", ("acme",), 15)):
            group.create_task(send(destination, tenants, per_second))
        for destination in ("billing", "crm", "search"):
            group.create_task(serve(destination))


def shown(command: str, addresses: Sequence[str]) -> str:
    """What a command prints, ports as the README has them."""
    argv = ["bash", "-c", command.replace("spillway", f"{sys.executable} -m spillway.client.cli", 1)]
    env = {**os.environ, "SPILLWAY_ADDRESS": " ".join(addresses), "COLUMNS": "140", "TZ": "UTC"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode not in (0, 4):
        raise SystemExit(f"{command}: {done.stderr}")
    text = done.stdout
    for address, told in zip(addresses, ("127.0.0.1:7070", "127.0.0.1:7080", "127.0.0.1:7090"), strict=True):
        text = text.replace(address.ljust(len(told)), told.ljust(len(address)))
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines() if line.strip())


async def take(addresses: Sequence[str]) -> dict[str, str]:
    """name -> screenshot."""
    async with Client(list(addresses)) as client:
        await client.wait_ready(60)
        large = {"acme": TenantPolicy(4.0, Limit(messages_per_second=200.0, leases_max=16), Retention(bytes_max=2 << 30))}
        for name in ("billing", "crm", "search", "warehouse"):
            await client.admin.create_destination(Destination(name, DeliveryPolicy(tenants=large if name == "crm" else {})))
        await client.admin.park("crm", seconds=900, reason="their maintenance until 16:00")
        await client.admin.pause("crm", "hooli", reason="contract ended")
        load = asyncio.ensure_future(traffic(client))
        try:
            done, _ = await asyncio.wait((load,), timeout=SETTLE_SECONDS)
            if done:
                load.result()
            return {name: await asyncio.to_thread(shown, command, addresses) for name, command in SHOWN.items()}
        finally:
            load.cancel()
            await asyncio.wait((load,))


def main() -> int:
    """Writes the page."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        nodes = stack.enter_context(Nodes(Path(directory)))
        found = asyncio.run(take(nodes.clients))
    text = PAGE.read_text()
    for name, screenshot in found.items():
        block = f"```\n$ {SHOWN[name]}\n{screenshot}\n```\n"
        place = rf"(?<=<!-- begin screenshot {name} -->\n).*?(?=<!-- end screenshot {name} -->)"
        text, count = re.subn(place, lambda _, block=block: block, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{PAGE} has no screenshot {name!r}")
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
