"""The command line and the client's admin calls against real nodes."""
from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_process import ClusterProcesses
from spillway.client import (
    Client,
    DeliveryPolicy,
    Destination,
    GateCause,
    HttpTarget,
    InvalidArgument,
    Limit,
    NackPolicy,
    Record,
    Retention,
    Route,
    RouteTarget,
    StallCause,
    TenantPolicy,
    sync,
)
from spillway.client.policy_file import filled

Make = Callable[..., ClusterProcesses]
Run = Callable[..., tuple[int, str, str]]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text()
EXAMPLE = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0]


@pytest.fixture
def node(cluster: Make) -> str:
    """The address of one node."""
    return cluster().addresses[0]


@pytest.fixture
def run(node: str, command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit code, stdout, stderr) of one command; `stdin` is what it reads."""
    monkeypatch.setenv("SPILLWAY_ADDRESS", node)
    return command_line


def done(result: tuple[int, str, str]) -> Any:
    """What a command printed as JSON. It must have succeeded."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


async def rejected(client: Client, destination: str, count: int) -> None:
    """Takes so many messages and dead-letters them."""
    async with client.consumer(destination, run_messages_max=1) as consumer:
        for _ in range(count):
            message = await consumer.next_message(10)
            assert message is not None
            await message.reject("broken")


def reject(address: str, destination: str, count: int) -> None:
    """As `rejected`, for callers without a client."""
    async def work() -> None:
        async with Client(address) as client:
            await rejected(client, destination, count)

    asyncio.run(work())


def test_the_example_of_the_page_is_applied(run: Run, tmp_path: Path) -> None:
    """Every key of it; a second time nothing changes, and a changed key alone is told."""
    file = tmp_path / "policy.toml"
    file.write_text(EXAMPLE)
    planned = done(run("destination", "apply", "-f", str(file), "--dry-run", "-o", "json"))
    assert [(one["destination"], one["result"]) for one in planned] == [("billing", "created"), ("metrics", "created")]
    assert done(run("destination", "list", "-o", "json")) == []
    applied = done(run("destination", "apply", "-f", str(file), "-o", "json"))
    assert [one | {"dry_run": True} for one in applied] == planned
    assert run("destination", "apply", "-f", str(file))[:2] == (0, "billing: unchanged\nmetrics: unchanged\n")
    assert run("route", "apply", "-f", str(file))[0] == 0
    assert run("route", "apply", "-f", str(file))[:2] == (0, "events: unchanged\n")
    file.write_text(EXAMPLE.replace("burst = 100", "burst = 50"))
    changed = done(run("destination", "apply", "-f", str(file), "-o", "json"))
    assert [one["changes"] for one in changed] == [[{"field": "limit.burst", "old": "100", "new": "50"}], []]
    shown = done(run("destination", "show", "billing", "-o", "json"))
    assert shown["policy"]["tenants"]["acme"]["limit"]["leases_max"] == 16 and "Bearer" not in json.dumps(shown)


def test_the_broker_fills_in_the_defaults_that_the_command_compares_with(node: str) -> None:
    """And gives back what it was given."""
    own = Destination("full", DeliveryPolicy(
        run_messages_max=3, lease_seconds=1.5, backoff_base=70.0, nack_policy=NackPolicy.BLOCK_UNTIL, attempts_max=4, age_max=60.0,
        ordered=False, dead_letters_kept=False, ttl=3600.0, limit=Limit(2.5, 3), tenant_limit=Limit(leases_max=1),
        retention=Retention(1 << 40), backoff_jitter=0.0,
        tenants={"acme": TenantPolicy(limit=Limit(), retention=Retention(age_max=5.0)), "": TenantPolicy(2.0)}),
        HttpTarget("https://x/", headers={"A": "b"}, allow_private_addresses=True))
    with sync.Client(node) as client:
        for wanted in (Destination("bare"), own, Destination("target", http=HttpTarget("http://x/"))):
            stored = client.admin.update_destination(wanted, create=True)
            assert stored.etag and stored == client.admin.get_destination(wanted.name)
            assert filled(stored) == filled(Destination(wanted.name, wanted.policy, wanted.http, stored.etag))
            assert filled(stored) == stored


def test_refusals_name_file_and_key(run: Run, tmp_path: Path) -> None:
    """Ranges are the broker's."""
    file = tmp_path / "policy.toml"
    for text, where in (("lease_seconds = '13h'", "lease_seconds"), ("limit.burst = 5", "limit.burst"),
                        ("backoff_cap = '1000d'", "backoff_cap"), ("tenants.acme.weight = 1000", 'tenants["acme"].weight'),
                        ("http = {url = 'ftp://x'}", "http.url"), ("attempts_max = 3", "nack_policy")):
        file.write_text(f"[[destination]]\nname = 'd'\n{text}\n")
        code, _, err = run("destination", "apply", "-f", str(file))
        assert code == 2 and err.startswith(f"spillway: {file}: destination[0].{where}: ") and err.count("\n") == 1, err
    for target in ("{destination = 'nowhere'}", "{destination = 's'}"):
        file.write_text(f"source = 's'\ntargets = [{target}]\n")
        code, _, err = run("route", "apply", "-f", str(file))
        assert code == 2 and err.startswith(f"spillway: {file}: targets"), err
    assert run("route", "show", "s")[0] == run("destination", "show", "d")[0] == run("gates", "d")[0] == 3
    code, _, err = run("destination", "apply", "d", "--lease-seconds", "13h")
    assert code == 2 and "destination.policy.lease_seconds" in err


def test_deliveries_are_paused_and_parked(run: Run, node: str) -> None:
    """Whoever asks is told; producing goes on; opened gates deliver at once."""
    assert run("produce", "d", "--tenant", "acme", "--key", "k", stdin="one\n")[0] == 0
    assert run("pause", "d", "--reason", "maintenance")[0] == 0
    assert run("park", "d", "acme", "--for", "1h")[0] == 0
    with sync.Client(node) as client:
        gates = client.admin.list_gates("d")
        assert [(g.tenant, g.cause, g.reason) for g in gates] == [
            (None, GateCause.PAUSED, "maintenance"), ("acme", GateCause.PARKED, "")]
        assert gates[1].until_time is not None
        told = client.admin.explain("d", "acme", "k")
        assert told.cause in (StallCause.PAUSED, StallCause.PARKED) and told.messages == 1
    assert run("consume", "d", "--idle", "0.5")[1] == ""
    assert "maintenance" in run("gates", "d")[1] and "paused" in run("explain", "d")[1]
    assert run("resume", "d")[0] == 0
    assert run("consume", "d", "--idle", "0.5")[1] == ""
    assert run("unpark", "d", "acme")[0] == 0
    assert run("consume", "d", "-n", "1", "--idle", "10")[1] == "one\n"
    assert done(run("gates", "d", "-o", "json")) == []
    assert done(run("explain", "d", "-o", "json"))["cause"] == "empty"


def test_messages_are_looked_at_and_purged(run: Run) -> None:
    """By queue, tenant and destination."""
    for tenant, count in (("acme", 3), ("beta", 1), ("", 2)):
        assert run("produce", "d", "--tenant", tenant, "--key", "k", stdin="x\n" * count)[0] == 0
    assert run("produce", "d", "--tenant", "acme", "--key", "once", "--dedup-id", "7", stdin="y\n" * 3)[0] == 0
    peeked = done(run("peek", "d", "acme", "k", "-n", "2", "-o", "json"))
    assert (len(peeked["messages"]), peeked["total"], peeked["messages"][0]["payload"]) == (2, 3, "x")
    assert [(t["tenant"], t["messages"]) for t in done(run("top", "d", "-n", "2", "-o", "json"))["tenants"]] == [
        ("acme", 4), ("", 2)]
    assert run("purge", "d", "acme", stdin="n\n")[0] == 1
    assert done(run("purge", "d", "acme", "k", "-y", "-o", "json")) == {"messages": 3, "queues": 1, "dry_run": False}
    assert done(run("purge", "d", "", "--dry-run", "-o", "json")) == {"messages": 2, "queues": 1, "dry_run": True}
    assert done(run("purge", "d", "-y", "-o", "json")) == {"messages": 4, "queues": 3, "dry_run": False}
    stats = done(run("destination", "stats", "d", "-o", "json"))
    assert (stats["messages"], stats["purged_total"], stats["deduplicated_total"]) == (0, 7, 2)


def test_dead_letters_are_redriven_and_purged(run: Run, node: str) -> None:
    """Of one tenant or all; those that are back come in order."""
    for tenant in ("acme", "beta"):
        assert run("produce", "d", "--tenant", tenant, "--key", "k", stdin="1\n2\n3\n")[0] == 0
    assert run("dead-letter", "redrive", "d")[0] == 3
    reject(node, "d", 6)
    assert len(done(run("dead-letter", "list", "d", "acme", "-o", "json"))) == 3
    assert run("dead-letter", "redrive", "d", "acme", "k", "--dry-run")[:2] == (
        0, "would be put back: 3 dead letters of 'd', tenant 'acme', key 'k'\n")
    assert run("dead-letter", "redrive", "d", "acme", "--rate", "1000")[:2] == (
        0, "put back: 3 dead letters of 'd', tenant 'acme'\n")
    assert run("consume", "d", "-n", "3", "--idle", "10")[1] == "1\n2\n3\n"
    assert run("dead-letter", "purge", "d", "-y")[:2] == (0, "removed: 3 dead letters of 'd'\n")


def test_a_route_is_made_used_and_deleted(run: Run) -> None:
    """Each target gets its copies."""
    for name in ("a", "b"):
        assert run("destination", "apply", name)[0] == 0
    assert run("route", "create", "events", "a")[0] == 0
    with_filter = Route("events", (RouteTarget("a"), RouteTarget("b", 'headers["kind"] == "order"')))
    with sync.Client(_address()) as client:
        old = client.admin.get_route("events")
        stored = client.admin.update_route(Route("events", with_filter.targets, old.etag))
        assert stored.targets == with_filter.targets and stored.etag != old.etag
        with pytest.raises(InvalidArgument):
            client.admin.create_route(Route("other", (RouteTarget("a", "headers["),)))
        with client.producer() as producer:
            producer.send_many([Record("events", b"%d" % n, "t", "k", {"kind": "order" if n % 2 else "page"}) for n in range(4)])
    assert run("consume", "a", "-n", "4", "--idle", "10")[1] == "0\n1\n2\n3\n"
    assert run("consume", "b", "-n", "2", "--idle", "10")[1] == "1\n3\n"
    assert run("route", "delete", "events")[0] == 0 and done(run("route", "list", "-o", "json")) == []


def _address() -> str:
    import os

    return os.environ["SPILLWAY_ADDRESS"]


def test_a_redrive_outlives_its_node(cluster: Make) -> None:
    """The client goes on at another one, and counts each dead letter once."""
    processes = cluster(nodes=3)
    keys = 40

    async def work() -> None:
        async with Client(processes.addresses) as client:
            async with client.producer() as producer:
                await producer.send_many(Record("d", b"%d" % n, "t", f"k{k}") for k in range(keys) for n in range(5))
            await rejected(client, "d", keys * 5)
            last = None
            async for step in client.admin.redrive_dead_letters("d", messages_per_second=100):
                if last is None:
                    next(iter(processes.nodes.values())).kill()
                last = step
            assert last is not None and last.done
            stats = await client.admin.destination_stats("d")
            while stats.shards_missing:
                stats = await client.admin.destination_stats("d")
            assert (stats.dead_letters, stats.messages) == (0, keys * 5)
            assert abs(last.redriven - keys * 5) <= 100  # what was put back while no node could say so is not counted

    asyncio.run(asyncio.wait_for(work(), 100))
