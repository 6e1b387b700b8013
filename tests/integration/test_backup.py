"""Backups of real clusters that serve meanwhile, and new clusters made from them."""
from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cluster_process import ClusterProcesses, NodeProcess
from spillway.client import (
    BackupProgress,
    Client,
    ClusterStatus,
    DeliveryPolicy,
    Destination,
    LeasedRun,
    NackPolicy,
    OutcomeUnknown,
    Route,
    RouteTarget,
    SpillwayError,
    verify_backup,
)
from traffic import until

Make = Callable[..., ClusterProcesses]
SHARDS = 4
FLAGS = ["--shards", str(SHARDS), "--cluster", "first"]
QUEUES = [f"k{k}" for k in range(12)]
BEFORE, ACKED = 30, 10  # messages of each queue when the backup begins, and how many of them are acknowledged by then


async def spillway(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "spillway.client.cli", *arguments, stdout=subprocess.PIPE,
                                                   stderr=subprocess.PIPE)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


def settled(found: ClusterStatus, *node_ids: str) -> bool:
    """Whether these are the nodes, and every shard has the replicas and the leader that it should have."""
    return ({n.id for n in found.nodes} == set(node_ids) and all(n.reachable for n in found.nodes) and not found.moving
            and all(g.leader == g.wanted[0] and len(g.voters) == min(3, len(node_ids)) for g in found.groups if g.group))


@asynccontextmanager
async def noise(client: Client) -> AsyncIterator[list[int]]:
    """Traffic while the block runs: of a destination of its own, and of a route, numbered, to one that nobody consumes from. The list
    has the numbers up to which all copies of the route's messages are acknowledged."""
    copied: list[int] = []

    async def produce() -> None:
        async with client.producer() as producer:
            while True:
                await asyncio.gather(*(producer.send("noise", b"x" * 500, key=key) for key in QUEUES))

    async def copy() -> None:
        for n in itertools.count():
            await send(client, "stream", n)
            copied.append(n)

    async def consume() -> None:
        async with client.consumer("noise") as consumer:
            async for run in consumer.runs():
                await run.ack()

    tasks = [asyncio.ensure_future(one()) for one in (produce, copy, consume)]
    try:
        yield copied
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def send(client: Client, destination: str, *numbers: int) -> None:
    """One message of each number to each queue, acknowledged on return."""
    async with client.producer() as producer:
        await asyncio.gather(*(producer.send(destination, b"%d" % n, tenant="acme", key=key) for n in numbers for key in QUEUES))


async def take(client: Client, destination: str, count: int, reject: bool = False, run_messages_max: int = 0) -> list[LeasedRun]:
    """Takes and settles so many messages, run by run."""
    runs: list[LeasedRun] = []
    async with asyncio.timeout(60), client.consumer(destination, run_messages_max=run_messages_max) as consumer:
        async for run in consumer.runs():
            runs.append(run)
            await (run.messages[0].reject("no good") if reject else run.ack())
            if sum(map(len, runs)) >= count:
                break
    return runs


def numbers(runs: list[LeasedRun]) -> dict[str, list[int]]:
    """What came of each queue, in order."""
    found: dict[str, list[int]] = {key: [] for key in QUEUES}
    for run in runs:
        found[run.key].extend(int(p) for p in run.payloads)
    return found


def restored(directory: Path, node_id: str, address: NodeProcess, data_dir: Path, *flags: str) -> NodeProcess:
    """A node on a restored directory, where another one was."""
    node = NodeProcess(directory, node_id, address.address, address.peer_address, list(flags))
    node.argv[node.argv.index("--data-dir") + 1] = str(data_dir)
    return node


async def test_a_cluster_is_backed_up_under_load_and_restored(cluster: Make, tmp_path: Path) -> None:
    """Whatever was acknowledged before the backup began is in the new cluster, in order, and nothing twice: messages, destinations with
    their policies, routes, dead letters, gates. Tokens and sequences only grow, also beyond those that the old cluster gave
    afterwards. Another node joins, and gets replicas."""
    processes = cluster(nodes=3, flags=FLAGS)
    backup = tmp_path / "backup"
    policy = DeliveryPolicy(nack_policy=NackPolicy.SKIP, run_messages_max=5, weight=2.0)
    async with Client(processes.addresses) as client:
        for name in ("orders", "copies", "broken", "noise", "streamed"):
            await client.admin.create_destination(Destination(name, policy))
        for source, target in (("events", "copies"), ("stream", "streamed")):
            await client.admin.create_route(Route(source, (RouteTarget(target),)))
        await client.admin.pause("copies", "acme", reason="maintenance")
        async with noise(client) as copied:
            await send(client, "orders", *range(BEFORE))
            await send(client, "events", 7)
            await send(client, "broken", 1)
            await take(client, "broken", len(QUEUES), reject=True)
            counts = dict.fromkeys(QUEUES, 0)
            async with client.consumer("orders", run_messages_max=5) as consumer:
                async for run in consumer.runs():
                    if counts[run.key] < ACKED:
                        counts[run.key] += len(run)
                        await run.ack()
                    else:
                        await run.release()
                    if min(counts.values()) >= ACKED:
                        break
            known = await client.admin.get_destination("orders")
            streamed = len(copied)
            code, out, err = await spillway("backup", str(backup), "-o", "json", "-a", processes.addresses[1])
            assert code == 0, err
        report = json.loads(out)
        assert (report["cluster"], report["shards"], len(report["groups"])) == ("first", SHARDS, SHARDS + 1)
        assert (await spillway("backup", "--verify", str(backup)))[0] == 0
        await send(client, "orders", *range(BEFORE, BEFORE + 5))
        last = {run.key: (run.messages[-1].fencing_token, run.messages[-1].sequence)
                for run in await take(client, "orders", len(QUEUES) * (BEFORE - max(counts.values())))}
    processes.end()

    code, out, err = await spillway("restore", str(backup), "--data-dir", str(tmp_path / "new"), "--node-id", "r1", "--cluster", "second")
    assert code == 0 and "--cluster second --shards 4 --replicas 3" in out, err
    old = processes.nodes["n1"]
    new = ClusterProcesses(tmp_path, 0, ["--shards", str(SHARDS), "--cluster", "second"])
    new.nodes["r1"] = restored(tmp_path, "r1", old, tmp_path / "new", *new.flags)
    try:
        new.start()
        async with Client(new.addresses) as client:
            assert {d.name async for d in client.admin.list_destinations()} == {"orders", "copies", "broken", "noise", "streamed"}
            assert (await client.admin.get_destination("orders")) == known
            assert [(r.source, r.targets) async for r in client.admin.list_routes()] == [
                ("events", (RouteTarget("copies"),)), ("stream", (RouteTarget("streamed"),))]
            assert [(g.tenant, g.reason) async for g in client.admin.list_gates("copies")] == [("acme", "maintenance")]
            assert (await client.admin.destination_stats("copies")).messages == len(QUEUES)
            assert sorted([d.key async for d in client.admin.list_dead_letters("broken")]) == sorted(QUEUES)
            stats = await client.admin.destination_stats("orders")
            assert (stats.messages, stats.acked_total) == (sum(BEFORE - n for n in counts.values()), sum(counts.values()))
            await client.admin.resume("copies", "acme")
            await send(client, "events", 8)
            assert numbers(await take(client, "copies", 2 * len(QUEUES))) == {key: [7, 8] for key in QUEUES}
            # A route's copies are in other shards, which were saved at other moments: none is lost that was acknowledged, none is there
            # twice, and those that are made from now on are not taken for earlier ones.
            await send(client, "stream", *range(10**6, 10**6 + 20))
            found = numbers(await take(client, "streamed", (await client.admin.destination_stats("streamed")).messages))
            assert all(came == sorted(set(came)) and set(came) >= {*range(streamed), *range(10**6, 10**6 + 20)} for came in found.values())

            joined = new.join("r2")

            async def grown() -> bool:
                return settled(await client.cluster.status(), "r1", "r2")
            await until("r2 has replicas", grown)
            assert joined.running
            await send(client, "orders", 1000)
            runs = await take(client, "orders", stats.messages + len(QUEUES))
            assert numbers(runs) == {key: [*range(n, BEFORE), 1000] for key, n in counts.items()}
            for run in runs:
                assert run.messages[0].fencing_token > last[run.key][0]
                assert int(run.payloads[-1]) != 1000 or run.messages[-1].sequence > last[run.key][1]
            assert (await client.admin.destination_stats("orders")).messages == 0
    finally:
        new.end()


async def test_a_backup_outlives_the_leaders_of_its_groups(cluster: Make, tmp_path: Path) -> None:
    """One node dies while its shards are still to be read: they are read from their next leaders, and have everything."""
    processes = cluster(nodes=3, flags=FLAGS)
    async with Client(processes.addresses) as client:
        await send(client, "d", *range(5))
        victim = processes.leader(SHARDS)

        def kill(progress: BackupProgress) -> None:
            if progress.groups_done == 1 and victim.running:
                victim.kill()
        made = await client.cluster.back_up(tmp_path / "b", on_progress=kill)
        assert not victim.running and verify_backup(tmp_path / "b") == made
    processes.end()
    code, _, err = await spillway("restore", str(tmp_path / "b"), "--data-dir", str(tmp_path / "new"), "--node-id", victim.node_id)
    assert code == 0, err
    node = processes.nodes[victim.node_id] = restored(tmp_path, victim.node_id, victim, tmp_path / "new", *FLAGS)
    node.start()
    async with Client(node.address) as client:
        assert numbers(await take(client, "d", 5 * len(QUEUES))) == {key: [*range(5)] for key in QUEUES}


async def test_producers_and_consumers_live_through_a_restore(cluster: Make, tmp_path: Path) -> None:
    """An idempotent producer goes on where it was: what the backup has is not stored twice. If the backup lacks what it had sent, it is
    told. A consumer gets again what it held, and cannot settle by its old lease."""
    processes = cluster(nodes=1, flags=FLAGS)
    node = processes.nodes["n1"]
    async with Client(processes.addresses) as client, client.producer(producer_id="p") as producer:
        for n in range(3):
            await producer.send("d", b"%d" % n, key="k")
        held = client.consumer("d", lease_seconds=60, run_messages_max=1)
        async with held:
            run = await anext(aiter(held.runs()))
            assert (await spillway("backup", str(tmp_path / "b"), "-a", node.address))[0] == 0
            node.kill()
            code, _, err = await spillway("restore", str(tmp_path / "b"), "--data-dir", str(tmp_path / "new"))
            assert code == 0, err
            again = processes.nodes["n1"] = restored(tmp_path, "n1", node, tmp_path / "new", *FLAGS)
            again.start()
            await producer.send("d", b"3", key="k")
            await run.ack()  # the lease was alive when the backup was made, and still is
        assert [int(r.payloads[0]) for r in await take(client, "d", 3, run_messages_max=1)] == [1, 2, 3]

        # From here on the backup is too old for this producer.
        again.kill()
        code, _, err = await spillway("restore", str(tmp_path / "b"), "--data-dir", str(tmp_path / "newer"))
        assert code == 0, err
        last = processes.nodes["n1"] = restored(tmp_path, "n1", node, tmp_path / "newer", *FLAGS)
        last.start()
        with pytest.raises(OutcomeUnknown):
            await producer.send("d", b"4", key="k")


async def test_the_founders_are_several(cluster: Make, tmp_path: Path) -> None:
    """The restored node may also be started with the list of all members, as deployments have it: the others begin empty, and recover
    from it as nodes that lost their disk."""
    one = cluster(nodes=1, flags=FLAGS)
    async with Client(one.addresses) as client:
        await send(client, "d", *range(5))
        assert (await spillway("backup", str(tmp_path / "b"), "-a", one.addresses[0]))[0] == 0
    one.end()
    three = cluster(nodes=3, flags=FLAGS, start=False)
    code, _, err = await spillway("restore", str(tmp_path / "b"), "--data-dir", str(three.nodes["n2"].data_dir), "--node-id", "n2")
    assert code == 0, err
    for node in three.nodes.values():
        node.start()
    async with Client(three.addresses) as client:
        async def grown() -> bool:
            try:
                return settled(await client.cluster.status(), "n1", "n2", "n3")
            except SpillwayError:
                return False
        await until("all three have replicas", grown)
        three.nodes["n2"].kill()  # whatever it had, the others have
        assert numbers(await take(client, "d", 5 * len(QUEUES))) == {key: [*range(5)] for key in QUEUES}


async def test_wrong_use_is_refused(cluster: Make, tmp_path: Path) -> None:
    """With the reason and the remedy: over data of a running node, from what is no backup, from a damaged one; a backup over anything."""
    processes = cluster(nodes=1, flags=FLAGS)
    node = processes.nodes["n1"]
    backup = str(tmp_path / "b")

    async def refused(*arguments: str) -> str:
        code, out, err = await spillway(*arguments)
        assert code == 2 and not out, (code, out, err)
        return err

    assert "is no backup" in await refused("restore", str(tmp_path), "--data-dir", str(tmp_path / "x"))
    assert (await spillway("backup", backup, "-a", node.address))[0] == 0
    assert "is not empty, and a backup never overwrites anything; name a new one" in await refused("backup", backup, "-a", node.address)
    text = await refused("restore", backup, "--data-dir", str(node.data_dir))
    assert "has the data of a node, and a restore never replaces any; name another directory" in text
    assert node.running and not (tmp_path / "x").exists()
    file = tmp_path / "b" / "meta.group"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "meta.group is damaged" in await refused("restore", backup, "--data-dir", str(tmp_path / "x"))
    code, _, err = await spillway("backup", "--verify", backup)
    assert code == 1 and "meta.group is damaged" in err
    code, _, err = await spillway("serve", "--data-dir", str(tmp_path / "x"), *FLAGS)
    assert code == 3 and "is half of a restore that did not finish; run `spillway restore` again" in err
