"""Real nodes that die while a shard moves: whatever was under way leaves no trace, and the move comes about."""
from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from cluster_process import ClusterProcesses, NodeProcess
from spillway.client import Client, Record
from spillway.cluster.state_store import StateStore

Make = Callable[..., ClusterProcesses]
GROUP = 1
SLOW, FAST = 1 << 20, 256 << 20  # bytes of snapshots per second
LARGE, SMALL, QUEUES = 192, 500, 10  # messages of 128 KiB, more than a log keeps for those who are slow, and of 100 bytes
MIDDLE_BYTES = 2 << 20  # of a snapshot: some of its many chunks
WAIT_SECONDS = 60.0


def wait(what: str, condition: Callable[[], bool], *nodes: NodeProcess) -> None:
    """Polls until a condition holds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_SECONDS} s: {what}\n" + "\n".join(node.text() for node in nodes)
        time.sleep(0.02)


def fetches(node: NodeProcess) -> int:
    """How often it began to take the shard."""
    return node.text().count(f"group {GROUP}: fetches a snapshot")


def state_bytes(node: NodeProcess) -> int:
    """Of the files of its state store, which come and go."""
    total = 0
    for path in (node.data_dir / "state").glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def in_the_middle(node: NodeProcess, fetch: int, before: int) -> Callable[[], bool]:
    """Whether a part of the shard has come by this fetch, beside what its store had before."""
    return lambda: fetches(node) >= fetch and state_bytes(node) > before + MIDDLE_BYTES


async def test_a_shard_moves_though_either_side_is_killed_in_the_middle(cluster: Make) -> None:
    """The receiver first, then the sender: what had come is gone at the next start, the old state stands until all of the new one has
    come, and in the end both stores have the same messages and nothing else."""
    processes = cluster(nodes=1, flags=["--shards", "1", "--snapshot-bytes-per-second", str(SLOW)])
    sender = processes.nodes["n1"]
    payloads = {f"k{k}": [os.urandom(size) for size, count in ((128 << 10, LARGE), (100, SMALL)) for _ in range(count // QUEUES)]
                for k in range(QUEUES)}
    async with Client(processes.addresses) as client, client.producer() as producer:
        for key, bodies in payloads.items():
            await producer.send_many([Record("d", body, key=key) for body in bodies], timeout=60)

    receiver = processes.join("n2")
    await asyncio.to_thread(wait, "the receiver is in the middle", in_the_middle(receiver, 1, 0), receiver)
    receiver.kill()
    assert f"group {GROUP}: installed a snapshot" not in receiver.text()

    store = StateStore(receiver.data_dir / "state")  # as it does when it starts
    assert list(store.scan(b"R" + GROUP.to_bytes(4, "big"), b"R" + (GROUP + 1).to_bytes(4, "big"))) == []
    assert store.applied(GROUP) == (0, 0)
    store.close()
    left = state_bytes(receiver)

    receiver.start()
    await asyncio.to_thread(wait, "it is there again", in_the_middle(receiver, 2, left), receiver)
    sender.kill()
    assert f"group {GROUP}: installed a snapshot" not in receiver.text()
    await asyncio.to_thread(wait, "the receiver notices", lambda: f"group {GROUP}: the snapshot from node n1 did not" in receiver.text(),
                            receiver)
    sender.argv[sender.argv.index(str(SLOW))] = str(FAST)
    sender.start()
    await asyncio.to_thread(wait, "it has come", lambda: f"group {GROUP}: installed a snapshot" in receiver.text(), sender, receiver)

    async with Client(processes.addresses) as client:
        async with asyncio.timeout(WAIT_SECONDS):
            while "n2" not in next(g.voters for g in (await client.cluster.status()).groups if g.group == GROUP):
                await asyncio.sleep(0.05)
    assert sender.stop() == receiver.stop() == 0
    stores = [StateStore(node.data_dir / "state") for node in (sender, receiver)]
    rows = [list(store.group(GROUP).scan(b"m", b"n")) for store in stores]
    assert len(rows[0]) == sum(map(len, payloads.values())) and rows[0] == rows[1]
    assert len({key[:9] for key, _ in stores[1].scan(b"R" + GROUP.to_bytes(4, "big"), b"R" + (GROUP + 1).to_bytes(4, "big"))}) == 1
    for store in stores:
        store.close()

    sender.start()
    receiver.start()
    got: dict[str, list[bytes]] = {key: [] for key in payloads}
    async with Client(processes.addresses) as client, client.consumer("d") as consumer, asyncio.timeout(WAIT_SECONDS):
        async for run in consumer.runs():
            got[run.key].extend(run.payloads)
            await run.ack()
            if sum(map(len, got.values())) >= sum(map(len, payloads.values())):
                break
    assert got == payloads
