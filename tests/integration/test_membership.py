"""Real clusters whose nodes come and go under load: nothing is lost or reordered, and nobody who uses them is told of it."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from cluster_process import ClusterProcesses, NodeProcess
from spillway.client import Client, InvalidArgument, NodeNotFound, NodeState, Unavailable
from traffic import settled, traffic, until

from demo.ports import free_ports

Make = Callable[..., ClusterProcesses]


async def ended(node: NodeProcess) -> None:
    """A node that was removed ends by itself."""
    async def gone() -> bool:
        return not node.running
    await until(f"{node.node_id} ends", gone)
    assert node.process is not None and node.process.returncode == 0 and "this node was removed" in node.text()


async def test_a_cluster_grows_and_shrinks_under_load(cluster: Make) -> None:
    """Three nodes become five, one is drained, taken back and removed, one is killed and replaced by a new one: whoever produces and
    consumes notices nothing, and every shard is where it belongs in the end."""
    processes = cluster(nodes=3, flags=["--shards", "8", "--replace-after-seconds", "3"])

    async with Client(processes.addresses) as client, traffic(client) as flow:
        async def is_settled(*node_ids: str) -> None:
            async def condition() -> bool:
                return settled(await client.cluster.status(), *node_ids)
            await until(f"{node_ids} have what belongs to them", condition)

        processes.join("n4")
        processes.join("n5")
        await is_settled("n1", "n2", "n3", "n4", "n5")
        shares = {n.id: (n.replicas, n.leads) for n in (await client.cluster.status()).nodes}
        assert {r for r, _ in shares.values()} <= {4, 5} and {leads for _, leads in shares.values()} <= {1, 2}, shares

        await client.cluster.drain("n2")

        async def drained() -> bool:
            found = await client.cluster.status()
            own = next(n for n in found.nodes if n.id == "n2")
            return own.state is NodeState.DRAINING and (own.replicas, own.leads) == (0, 0) and not found.moving
        await until("n2 has nothing", drained)
        await client.cluster.undrain("n2")
        await is_settled("n1", "n2", "n3", "n4", "n5")
        await client.cluster.remove("n2")
        await is_settled("n1", "n3", "n4", "n5")
        await ended(processes.nodes["n2"])
        processes.nodes["n2"].start()
        assert processes.nodes["n2"].wait() == 3
        assert "node 'n2' was removed from cluster 'spillway'; its data is of no more use" in processes.nodes["n2"].text()
        before = flow.received
        processes.nodes["n3"].kill()

        async def replaced() -> bool:
            found = await client.cluster.status()
            return all("n3" not in g.voters for g in found.groups if g.group) and not found.moving
        await until("the dead one's replicas are elsewhere", replaced)
        await client.cluster.remove("n3")
        await is_settled("n1", "n4", "n5")
        assert flow.received > before

        async def told() -> bool:
            return client.topology.nodes.keys() == {"n1", "n4", "n5"}
        await until("the client knows, too", told)
        assert (await client.cluster.status()).problems == ()


async def test_all_nodes_are_restarted_one_by_one(cluster: Make) -> None:
    """A rolling restart: each hands its leaderships over, comes back with its data, and gets them again."""
    processes = cluster(nodes=3, flags=["--shards", "8"])
    async with Client(processes.addresses) as client, traffic(client):
        for node in processes.nodes.values():
            assert node.stop() == 0
            node.start()

            async def back() -> bool:
                return settled(await client.cluster.status(), "n1", "n2", "n3")
            await until(f"{node.node_id} is back", back)


async def test_a_cluster_of_one_grows(cluster: Make) -> None:
    """What began as one node becomes three, with three replicas of everything; the first one may even leave."""
    processes = cluster(nodes=1, flags=["--shards", "4"])
    async with Client(processes.addresses) as client, traffic(client):
        for joined in ("n2", "n3", "n4"):
            processes.join(joined)

        async def grown() -> bool:
            return settled(await client.cluster.status(), "n1", "n2", "n3", "n4")
        await until("there are four", grown)
        assert all(len(g.voters) == 3 for g in (await client.cluster.status()).groups if g.group)
        await client.cluster.remove("n1")

        async def left() -> bool:
            return settled(await client.cluster.status(), "n2", "n3", "n4")
        await until("the first one is gone", left)
        await ended(processes.nodes["n1"])
        for node in ("n2", "n3", "n4"):  # they know each other without it
            processes.nodes[node].kill()
        for node in ("n2", "n3", "n4"):
            processes.nodes[node].start()
        await until("all are back", left)


async def test_a_founder_that_lost_its_disk_founds_no_second_cluster(cluster: Make) -> None:
    """The first node of a cluster that grew is started without its disk, and without --join: it does not know that it was one of
    several. The others tell it, and it ends; clients believe none of it. With --join it is one of them again."""
    processes = cluster(nodes=1, flags=["--shards", "4"])
    first = processes.nodes["n1"]
    processes.join("n2")
    processes.join("n3")
    async with Client(processes.addresses) as client, traffic(client) as flow:
        async def whole() -> bool:
            return settled(await client.cluster.status(), "n1", "n2", "n3")
        await until("there are three", whole)
        identity = client.topology.cluster_id
        assert identity
        assert first.stop() == 0

        async def led() -> bool:
            return client.topology.ready and "n1" not in client.topology.leaders
        await until("others lead", led)
        shutil.rmtree(first.data_dir)
        first.start()

        async def ended() -> bool:
            return not first.running
        await until("the rogue ends", ended)
        assert first.process is not None and first.process.returncode == 3
        assert f"this node was one of cluster 'spillway' with the identity {identity}" in first.text()
        assert "start it with --join and an empty data_dir" in first.text()
        assert (client.topology.cluster_id, client.topology.nodes.keys()) == (identity, {"n1", "n2", "n3"})
        shutil.rmtree(first.data_dir)
        first.argv += ["--join", processes.nodes["n2"].peer_address]
        first.start()
        before = flow.received
        await until("it is back", whole)
        assert flow.received > before
        assert {processes.topology(node).cluster_id for node in processes.nodes.values()} == {identity}


async def test_a_node_that_was_away_finds_its_cluster_or_its_end(cluster: Make) -> None:
    """It comes back at other addresses, where nobody looks for it: it says so, and is one of them again. It is removed while it is away:
    none of those who know would call it, and it ends all the same when it comes back, with --join or without."""
    processes = cluster(nodes=3, flags=["--shards", "4"])
    moved = processes.join("n4")
    async with Client(processes.addresses) as client, traffic(client):
        async def whole() -> bool:
            return settled(await client.cluster.status(), "n1", "n2", "n3", "n4")
        await until("there are four", whole)
        assert moved.stop() == 0
        before = moved.address, moved.peer_address
        moved.address, moved.peer_address = (f"127.0.0.1:{port}" for port in free_ports(2))
        moved.argv = [dict(zip(before, (moved.address, moved.peer_address), strict=True)).get(word, word) for word in moved.argv]
        moved.start()

        async def found() -> bool:
            return client.topology.nodes.get("n4") == moved.address and await whole()
        await until("n4 is back, elsewhere", found)

        assert moved.stop() == 0
        await client.cluster.remove("n4")

        async def three() -> bool:
            return settled(await client.cluster.status(), "n1", "n2", "n3")
        await until("n4 is none of them", three)
        moved.start()
        await ended(moved)
        join = moved.argv.index("--join")
        del moved.argv[join:join + 2]
        moved.log.unlink()
        moved.start()
        await ended(moved)


async def test_a_cluster_is_founded_with_more_nodes_than_voters(cluster: Make) -> None:
    """Seven vote in the meta group; it takes in the eighth as a learner, also when that one starts again before it is."""
    processes = cluster(nodes=8, flags=["--shards", "2"], start=False)
    last = processes.nodes["n8"]
    for node in processes.nodes.values():
        node.start()
    async with Client(processes.addresses) as client:
        async def whole() -> bool:
            try:
                found = await client.cluster.status()
            except Unavailable:  # eight processes start slowly on a small machine
                return False
            meta = found.groups[0]
            return settled(found, *processes.nodes) and (len(meta.voters), meta.learners) == (7, ("n8",))
        await until("all have the meta group", whole, 120)
        assert last.stop() == 0
        last.start()
        await until("the last one is back", whole)


async def test_replicas_are_in_different_zones(cluster: Make) -> None:
    """Zones are what nodes say: when a third one comes, every shard has a replica in each."""
    processes = cluster(nodes=1, flags=["--shards", "4"], start=False)
    processes.nodes["n1"].argv += ["--zone", "a"]
    processes.start()
    async with Client(processes.addresses) as client:
        for node_id, zone in (("n2", "a"), ("n3", "b"), ("n4", "c")):
            processes.join(node_id, "--zone", zone)

        async def apart() -> bool:
            found = await client.cluster.status()
            zones = {n.id: n.zone for n in found.nodes}
            return settled(found, "n1", "n2", "n3", "n4") and all(
                {zones[v] for v in g.voters} == {"a", "b", "c"} for g in found.groups if g.group)
        await until("every shard is in three zones", apart)


async def test_what_must_not_be_is_refused_with_a_remedy(cluster: Make) -> None:
    """Two nodes with one id, data of another cluster, other shards, a removed node that comes back, leaving too few: nothing of it
    happens, and it is said what to do."""
    processes = cluster(nodes=3, flags=["--shards", "4"])

    async def ends(node: NodeProcess, says: str) -> None:
        async def ended() -> bool:
            return not node.running
        await until(f"{node.node_id} gives up", ended)
        assert node.process is not None and node.process.returncode == 2
        assert says in node.text(), node.text()

    async with Client(processes.addresses) as client:
        with pytest.raises(InvalidArgument, match="without node 'n1' there are 2 nodes, and shards have 3 replicas; let another node join"):
            await client.cluster.drain("n1")
        with pytest.raises(NodeNotFound, match="there is no node 'n9'; there are n1, n2, n3"):
            await client.cluster.remove("n9")

        twin = processes.join("n2 twin")
        twin.kill()
        twin.argv[twin.argv.index("n2 twin")] = "n2"
        twin.start()
        await ends(twin, "a node 'n2' is running already; choose another node_id")
        del processes.nodes["n2 twin"]

        await ends(processes.join("n4", "--cluster", "other"), "this is cluster 'spillway', not 'other'")
        await ends(processes.join("n6", "--shards", "5"), "is 5, and 4 in this cluster, for ever; start the node with --shards 4")

        processes.join("n5")

        async def four() -> bool:
            return settled(await client.cluster.status(), "n1", "n2", "n3", "n5")
        await until("n5 is one of them", four)
        await client.cluster.remove("n5")

        async def three() -> bool:
            return settled(await client.cluster.status(), "n1", "n2", "n3")
        await until("n5 is none of them", three)
        left = processes.nodes["n5"]
        await ended(left)
        left.start()
        await ends(left, "has the data of a cluster, and is no node of this one")


def test_the_status_of_a_cluster_is_for_people_and_programs(cluster: Make) -> None:
    """As a table, as JSON, and with an exit code."""
    processes = cluster(nodes=3, flags=["--shards", "4"])

    def spillway(*arguments: str) -> tuple[int, str, str]:
        address = processes.nodes["n1"].address
        done = subprocess.run([sys.executable, "-m", "spillway.client.cli", "cluster", *arguments, "--address", address],
                              capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    code, text, _ = spillway("status")
    assert code == 0 and "3 nodes, 4 shards, none moving" in text and "wrong" not in text
    code, text, _ = spillway("status", "-o", "json")
    found: dict[str, Any] = json.loads(text)
    assert code == 0 and [n["id"] for n in found["nodes"]] == ["n1", "n2", "n3"]
    assert [(g["group"], sorted(g["voters"])) for g in found["groups"]] == [(g, ["n1", "n2", "n3"]) for g in range(5)]
    code, _, error = spillway("drain", "n2")
    assert code == 2 and "let another node join first" in error
    code, _, error = spillway("remove", "n9", "--yes")
    assert code == 3 and "no node 'n9'" in error
    processes.nodes["n3"].kill()
    code, text, _ = spillway("status")
    assert code == 4 and "wrong: node n3 does not answer\n  do:  start it again" in text
    processes.join("n4")
    deadline = time.monotonic() + 60
    while "4 nodes" not in spillway("status")[1]:
        assert time.monotonic() < deadline, processes.nodes["n4"].text()
    code, text, error = spillway("remove", "n3", "--yes")
    assert code == 0 and "none of the cluster any more" in text, error
    code, text, _ = spillway("status")
    assert code == 0 and "n3" not in text
