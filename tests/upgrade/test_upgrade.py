"""Nodes of the previous release and of this one in one cluster, real processes under load: up, and down again as long as the feature
level allows it."""
from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
from spillway.broker.core.features import LEVEL_MAX, MEMBERS
from spillway.client import Client, ClusterStatus, Unavailable
from spillway.contract.version import VERSION

from tests.integration.cluster_process import ClusterProcesses, NodeProcess
from tests.integration.traffic import Traffic, settled, traffic, until
from tests.upgrade.release import ROOT, Release

Make = Callable[..., ClusterProcesses]
IDS = ("n1", "n2", "n3")
MESSAGES = 200  # that must come through in each state of a cluster
PAUSE = 0.02  # what is tested is the changes of versions; the machine is to be free for those


async def flows(flow: Traffic) -> None:
    """What is produced from now on arrives."""
    enough = flow.received + MESSAGES

    async def arrived() -> bool:
        return flow.received >= enough
    await until(f"{MESSAGES} messages more", arrived)


async def exchange(processes: ClusterProcesses, node: NodeProcess, crash: bool = False) -> None:
    """Stops a node and starts it as what it is to be now; all lead and follow again as they should, in both directions between the
    versions, as each of three nodes is the preferred leader of some shards and follows in all others."""
    if crash:
        await asyncio.to_thread(node.kill)
    else:
        assert await asyncio.to_thread(node.stop) == 0, node.text()
    node.start()
    await asyncio.to_thread(processes.wait_ready, True)
    topology = await asyncio.to_thread(processes.topology, node)
    assert {shard.leader for shard in topology.shards} == set(IDS)


async def ends(node: NodeProcess, code: int, says: str) -> None:
    """A node gives up, and says why at the end of its log."""
    async def ended() -> bool:
        return not node.running
    await until(f"{node.node_id} gives up", ended)
    assert node.process is not None and node.process.returncode == code, node.text()
    assert says in node.text().strip().splitlines()[-1], node.text()


def versions(found: ClusterStatus) -> dict[str, str]:
    """What the nodes say."""
    return {n.id: n.version for n in found.nodes}


async def test_a_cluster_is_upgraded_node_by_node(previous: Release, cluster: Make) -> None:
    """Under load of the current and of the previous client: nobody is told of it, nothing is lost or reordered. What the previous
    release cannot read is not written before its last node is gone, and then is; after that it does not get in any more. One of the nodes
    crashes instead of being stopped."""
    processes = cluster()
    for node in processes.nodes.values():
        previous.run(node)
    await asyncio.to_thread(processes.start)
    earlier = subprocess.Popen([sys.executable, "-m", "tests.upgrade.client_process", *processes.addresses], cwd=ROOT,
                               env={**previous.env, "PATH": ""}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert earlier.stdin is not None and earlier.stdout is not None
    try:
        assert await asyncio.to_thread(earlier.stdout.readline) == "ready\n"
        async with Client(processes.addresses) as client, traffic(client, pause=PAUSE) as flow:
            await flows(flow)
            for node_id in IDS:
                node = processes.nodes[node_id]
                node.env = {}
                await exchange(processes, node, crash=node_id == "n2")
                await flows(flow)
                if node_id == "n2":
                    found = await client.cluster.status()
                    assert found.feature_level == 1 and settled(found, *IDS) and [n.replicas for n in found.nodes] == [3, 3, 3]
                    assert versions(found) == {"n1": VERSION, "n2": VERSION, "n3": previous.version}
                    (problem,) = found.problems
                    assert problem.what == ("the cluster stays at feature level 1, as these know no more: "
                                            f"n3 (version {previous.version})")
                    assert problem.remedy == "run version 0.2.0 or newer there, without a lower feature_level_max"
                    with pytest.raises(Unavailable, match=r"first upgrade every node; it waits for n3 \(knows up to level 1\)"):
                        await client.cluster.drain("n1", timeout=1)

            async def raised() -> bool:
                return (await client.cluster.status()).feature_level == LEVEL_MAX
            await until("the level is raised", raised)
            processes.join("n4")

            async def joined() -> bool:
                return settled(await client.cluster.status(), *IDS, "n4")
            await until("n4 is one of them", joined)
            assert (await client.cluster.status()).problems == ()
        earlier.stdin.close()
        assert await asyncio.to_thread(earlier.wait, 30) == 0
        assert int(earlier.stdout.read()) > 0
    finally:
        earlier.kill()
        earlier.wait()
        earlier.stdout.close()

    # No way back, and every one that tries is told so.
    newcomer = processes.join("n5", "--feature-level-max", "1")
    node = processes.nodes["n3"]
    node.stop()
    previous.run(node)
    node.start()
    await ends(node, 3, f"has format {LEVEL_MAX}, written by a newer Spillway; this one reads up to 1: start the newer version")
    node.env = {}
    node.argv += ["--feature-level-max", "1"]
    node.start()
    too_low = f"the cluster is at feature level {LEVEL_MAX}; this version knows up to 1, or its setting feature_level_max is lower: run"
    await ends(node, 3, too_low)
    shutil.rmtree(node.data_dir)  # with nothing that says so, the other nodes do
    node.start()
    await ends(node, 3, too_low)
    shutil.rmtree(node.data_dir)
    previous.run(node)
    node.argv = node.argv[:-2]
    node.start()
    async with Client(processes.nodes["n1"].address) as client:
        async def named() -> bool:
            return any(p.what == f"node n3 (version {previous.version}) knows feature levels up to 1, and the cluster is at {LEVEL_MAX}: "
                       "the others refuse it" for p in (await client.cluster.status()).problems)
        await until("the status says what is wrong with n3", named)

    async def logged() -> bool:
        return f"refused: node 'n3': the cluster is at feature level {LEVEL_MAX}" in processes.nodes["n1"].text()
    await until("whoever calls n3 says so, too", logged)
    await ends(newcomer, 2, "the cluster does not take this node in: feature_max: " + too_low)


async def test_an_upgrade_is_taken_back(previous: Release, cluster: Make) -> None:
    """Held at the level of the previous release by a setting, nodes of this one write nothing that it cannot read: they are replaced
    by it one by one, with their data, under load; one of them by way of a crash."""
    processes = cluster()
    plain = {node_id: list(node.argv) for node_id, node in processes.nodes.items()}
    for node in processes.nodes.values():
        node.argv += ["--feature-level-max", "1"]
    await asyncio.to_thread(processes.start)
    async with Client(processes.addresses) as client, traffic(client, pause=PAUSE) as flow:
        await flows(flow)
        found = await client.cluster.status()
        assert found.feature_level == 1 < MEMBERS and versions(found) == dict.fromkeys(IDS, VERSION)
        for node_id in reversed(IDS):
            assert json.loads((processes.nodes[node_id].data_dir / "node.json").read_text())["format"] == 1
            processes.nodes[node_id].argv = plain[node_id]
            previous.run(processes.nodes[node_id])
            await exchange(processes, processes.nodes[node_id], crash=node_id == "n2")
            await flows(flow)
