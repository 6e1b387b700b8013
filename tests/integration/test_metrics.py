"""What running nodes and a dispatcher tell Prometheus, and whether rules and dashboards find it there."""
from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from spillway.client import Client, DeliveryPolicy, Destination, HttpTarget, Record

from demo.ports import free_ports

Cluster = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
SECONDS_MAX = 60.0
OF_PROMETHEUS = {"up"}
WITH_TLS = {"spillway_certificate_end_timestamp_seconds"}  # see test_security.py


async def scraped(address: str) -> dict[str, float]:
    """series -> value, as they are told; promtool finds nothing wrong with it."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as response:
        assert response.status == 200
        text = await response.text()
    if promtool := shutil.which("promtool"):
        done = await asyncio.to_thread(subprocess.run, [promtool, "check", "metrics"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    out = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            assert series not in out, "told twice"
            out[series] = float(value)
    return out


async def until(address: str, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """A scrape for which a condition holds."""
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            found = await scraped(address)
            if condition(found):
                return found
            await asyncio.sleep(0.1)


def named() -> dict[str, str]:
    """Series' name -> where it is named: in rules and dashboards."""
    found = {}
    for path in (ROOT / "helm/spillway/rules/spillway.yaml", *sorted((ROOT / "helm/spillway/dashboards").glob("*.json"))):
        text = path.read_text()
        if path.suffix == ".json":
            board = json.loads(text)
            exprs = [t["expr"] for p in board["panels"] for t in p.get("targets", ())]
            exprs += [v["definition"] for v in board["templating"]["list"] if "definition" in v]
        else:
            exprs = re.findall(r"expr: >-\n +(.+)", text)
        for expr in exprs:
            found.update(dict.fromkeys(re.findall(r"\b(?:spillway|process)_\w+|\bup\b", expr), path.name))
    return found


@pytest.fixture
async def target() -> AsyncIterator[TestServer]:
    """A receiver that fails once."""
    failed = False

    async def answer(request: web.Request) -> web.Response:
        nonlocal failed
        failed, first = True, not failed
        return web.Response(status=500 if first else 204)

    application = web.Application()
    application.router.add_post("/", answer)
    server = TestServer(application)
    await server.start_server()
    yield server
    await server.close()


async def test_rules_and_dashboards_find_what_they_name(cluster: Cluster, target: TestServer) -> None:
    """A node and a dispatcher with traffic tell every metric that a rule or a dashboard names; counts are those of the traffic, and the
    same again when nothing happened in between."""
    address, of_dispatcher = (f"127.0.0.1:{port}" for port in free_ports(2))
    nodes = cluster(flags=["--metrics-listen", address])
    dispatcher = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "spillway.client.cli", "dispatch", "--address", nodes.addresses[0], "--metrics-listen", of_dispatcher)
    try:
        async with Client(nodes.addresses) as client:
            await client.wait_ready(SECONDS_MAX)
            await client.admin.create_destination(Destination("web", policy=DeliveryPolicy(backoff_base=0.01), http=HttpTarget(
                str(target.make_url("/")), allow_private_addresses=True)))
            async with client.producer() as producer:
                await producer.send_many([Record("web", b"x", "t", str(i)) for i in range(20)])
                await producer.send_many([Record("waits", b"x", f"t{i % 3}", str(i)) for i in range(30)])
            node = await until(address, lambda found: found.get('spillway_messages_acked_total{destination="web"}') == 20
                               and found.get('spillway_oldest_message_seconds{destination="waits",state="ready"}', 0) > 0)
            told = await until(of_dispatcher, lambda found: found.get(
                'spillway_dispatcher_outcomes_total{destination="web",outcome="delivered"}') == 20)
            assert node['spillway_messages{destination="waits",state="waiting"}'] == 30
            assert node['spillway_tenant_backlog_messages{destination="waits",tenant="t0"}'] == 10
            assert node['spillway_messages_retried_total{destination="web"}'] == 1
            assert node['spillway_end_to_end_seconds_count{destination="web"}'] == 20
            assert node['spillway_end_to_end_seconds_bucket{destination="web",le="+Inf"}'] == 20
            assert node["spillway_fsync_seconds_count"] > 0 < node["spillway_commit_seconds_count"]
            assert told['spillway_dispatcher_outcomes_total{destination="web",outcome="retried"}'] == 1
            assert told['spillway_dispatcher_http_seconds_count{destination="web"}'] == 21
            again = await scraped(address)
            assert again['spillway_messages_acked_total{destination="web"}'] == 20
            assert {k for k in again if "tenant" not in k} == {k for k in node if "tenant" not in k}
            there = OF_PROMETHEUS | WITH_TLS | {series.partition("{")[0] for series in (*node, *told)}
            missing = {name: where for name, where in named().items() if name not in there}
            assert not missing
        dispatcher.terminate()
        assert await asyncio.wait_for(dispatcher.wait(), SECONDS_MAX) == 0
    finally:
        if dispatcher.returncode is None:
            dispatcher.kill()
            await dispatcher.wait()


async def test_totals_of_a_cluster_are_those_of_its_nodes(cluster: Cluster) -> None:
    """What three nodes tell adds up to what was stored, also after one of them was stopped and others lead its shards: nothing is counted
    twice, and a new leader does not begin with what others did."""
    listen = [f"127.0.0.1:{port}" for port in free_ports(3)]
    nodes = cluster(3, start=False)
    for node, address in zip(nodes.nodes.values(), listen, strict=True):
        node.argv += ["--metrics-listen", address]
    nodes.start()

    async def total(name: str, of: list[str]) -> float:
        return sum([(await scraped(address)).get(f'{name}{{destination="d"}}', 0) for address in of])

    async with Client(nodes.addresses) as client:
        await client.wait_ready(SECONDS_MAX)
        async with client.producer() as producer:
            await producer.send_many([Record("d", b"x", "t", str(i)) for i in range(100)])
            assert await total("spillway_messages_enqueued_total", listen) == 100
            alone = await total("spillway_messages_enqueued_total", listen[:1])
            assert await asyncio.to_thread(nodes.nodes["n1"].stop) == 0
            await asyncio.to_thread(nodes.wait_ready)
            assert await total("spillway_messages_enqueued_total", listen[1:]) == 100 - alone
            await producer.send_many([Record("d", b"x", "t", str(i)) for i in range(100)])
    assert await total("spillway_messages_enqueued_total", listen[1:]) == 200 - alone
    found = await scraped(listen[1])
    assert found["spillway_raft_peers_connected"] == 1 and found["spillway_cluster_members"] == 3
    assert found["spillway_raft_leaderless_groups"] == 0


async def test_shards_whose_leaders_died_are_counted(cluster: Cluster) -> None:
    """Also by a node that cannot win an election, and goes on to follow who is gone: the alert looks at that. `explain` names them."""
    [port] = free_ports(1)
    nodes = cluster(3, start=False)
    nodes.nodes["n1"].argv += ["--metrics-listen", f"127.0.0.1:{port}"]
    nodes.start()
    shards = len((await asyncio.to_thread(nodes.topology)).shards)
    async with Client(nodes.nodes["n1"].address) as client:
        await client.admin.create_destination("d")
        for name in ("n2", "n3"):
            nodes.nodes[name].kill()
        await until(f"127.0.0.1:{port}", lambda found: found["spillway_raft_leaderless_groups"] == shards)
        explained = await client.admin.explain("d")
        assert f"Shards without a leader, whose messages are not counted: {', '.join(map(str, range(1, shards + 1)))}" in explained.sentence


async def test_a_port_that_is_taken_is_said(cluster: Cluster) -> None:
    """A node that cannot serve its metrics does not start, and says which setting is to blame."""
    [port] = free_ports(1)
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", port)
    try:
        nodes = cluster(flags=["--metrics-listen", f"127.0.0.1:{port}"], start=False)
        node = nodes.nodes["n1"]
        node.start()
        assert await asyncio.to_thread(node.wait) == 2
        assert "metrics_listen" in node.text()
    finally:
        server.close()
