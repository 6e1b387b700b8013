"""Benchmarks of a running cluster: bench produce, consume, latency, fairness."""
from __future__ import annotations

import os
import platform
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from spillway.client.cli import EXIT_FAILED
from spillway.client.commands.common import (
    CONNECT_SECONDS,
    HERE,
    Connection,
    Format,
    Output,
    Yes,
    command,
    confirmed,
    connect,
    now,
    plural,
    print_json,
    print_table,
    run_async,
    seconds,
    size,
    size_of,
)
from spillway.client.commands.progress import Bar

if TYPE_CHECKING:
    from spillway.client import Client
    from spillway.client.commands.loads import Progress

OWN = "bench"  # the destination that needs no question: what waits there is this command's
SECONDS_MAX = 3600.0
COUNT_MAX = 100_000_000

app = typer.Typer(no_args_is_help=True, help=(
    "Benchmarks of a running cluster, from this one process. They load it: not for one that others need now."))
DestinationOption = Annotated[str, typer.Option("--destination", "-d", metavar="NAME", help=(
    f"Where to; created if missing. For another one than {OWN!r} that exists you are asked: what waits there may be taken."))]
Size = Annotated[int, typer.Option("--size", parser=size_of, metavar="SIZE", help="Of each payload: 1KiB, 100KiB, or bytes.")]
For = Annotated[float, typer.Option("--for", parser=seconds, metavar="DURATION", help="For so long at most; up to 1h.")]
Count = Annotated[int, typer.Option("--count", "-n", min=1, max=COUNT_MAX, help="So many messages at most.")]


@command(app, "produce", examples=("spillway bench produce --count 2000 --size 1KiB --tenants 10 --keys 10",
                                   "spillway bench produce --count 100000000 --for 2s -o json"))
def produce(
    count: Count = 100_000,
    for_: For = 60.0,
    payload_bytes: Size = 1024,
    tenants: Annotated[int, typer.Option(min=1, max=1_000_000, help="So many tenants in turn.")] = 10,
    keys: Annotated[int, typer.Option(min=1, max=1_000_000, help="So many keys of each tenant in turn.")] = 100,
    destination: DestinationOption = OWN,
    yes: Yes = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Sends as fast as the cluster takes it in. The messages stay, for `bench consume` or `purge`."""
    from spillway.client.commands import loads

    settings: dict[str, Any] = {"count": count, "seconds": _bounded(for_), "payload_bytes": payload_bytes, "tenants": tenants, "keys": keys}
    _run("produce", destination, settings, lambda client, progress: loads.produce(client, destination, progress=progress, **settings),
         yes, output, connection, empty=False)


@command(app, "consume", examples=("spillway bench consume --idle 1s", "spillway bench consume --count 1000 --idle 1s -o json"))
def consume(
    count: Count = 1_000_000,
    for_: For = 60.0,
    idle: Annotated[float, typer.Option(parser=seconds, metavar="DURATION", help="Stop after so long without a message.")] = 5.0,
    destination: DestinationOption = OWN,
    yes: Yes = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Leases and acknowledges what is there, such as `bench produce` has left, as fast as it comes."""
    from spillway.client.commands import loads

    settings: dict[str, Any] = {"count": count, "seconds": _bounded(for_), "idle": idle}
    _run("consume", destination, settings, lambda client, progress: loads.consume(client, destination, progress=progress, **settings),
         yes, output, connection, empty=False)


@command(app, "latency", examples=("spillway bench latency --rate 50 --count 100", "spillway bench latency --rate 50 --for 2s -o json"))
def latency(
    rate: Annotated[float, typer.Option(min=0.1, max=100_000, help="Messages per second.")] = 100.0,
    count: Count = COUNT_MAX,
    for_: For = 10.0,
    payload_bytes: Size = 1024,
    keys: Annotated[int, typer.Option(min=1, max=1_000_000, help="So many keys in turn.")] = 100,
    destination: DestinationOption = OWN,
    yes: Yes = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Sends at a steady rate, takes and acknowledges, and times each message until it is stored, delivered and settled."""
    from spillway.client.commands import loads

    settings: dict[str, Any] = {"rate": rate, "count": count, "seconds": _bounded(for_), "payload_bytes": _stamped(payload_bytes),
                                "keys": keys}
    _run("latency", destination, settings, lambda client, progress: loads.latency(client, destination, progress=progress, **settings),
         yes, output, connection, empty=True)


@command(app, "fairness", examples=("spillway bench fairness --tenants 5 --dump 2000 --for 2s",))
def fairness(
    tenants: Annotated[int, typer.Option(min=1, max=10_000, help="So many quiet tenants.")] = 20,
    rate: Annotated[float, typer.Option(min=0.01, max=1000, help="Messages per second of each of them.")] = 2.0,
    dump: Annotated[int, typer.Option(min=0, max=10_000_000, help="So many messages another tenant sends at once.")] = 20_000,
    for_: For = 10.0,
    handlers: Annotated[int, typer.Option(min=1, max=1000, help="So many messages are handled at a time.")] = 16,
    handler_seconds: Annotated[float, typer.Option("--handler-time", parser=seconds, metavar="DURATION", help=(
        "Each takes so long."))] = 0.005,
    payload_bytes: Size = 1024,
    destination: DestinationOption = OWN,
    yes: Yes = False,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Times the messages of quiet tenants, alone for --for, and then as long beside one that dumps a backlog. Takes twice --for."""
    from spillway.client.commands import loads

    settings: dict[str, Any] = {"tenants": tenants, "rate": rate, "dump": dump, "seconds": _bounded(for_), "handlers": handlers,
                "handler_seconds": handler_seconds, "payload_bytes": _stamped(payload_bytes)}
    _run("fairness", destination, settings, lambda client, progress: loads.fairness(client, destination, progress=progress, **settings),
         yes, output, connection, empty=True)


# -- inner ---------------------------------------------------------------------------------------------------------


def _bounded(length: float) -> float:
    if not 0 < length <= SECONDS_MAX:
        raise typer.BadParameter(f"{length:g} s is not more than 0 and at most an hour", param_hint="--for")
    return length


def _stamped(payload_bytes: int) -> int:
    from spillway.client.commands.loads import STAMP_BYTES

    return max(payload_bytes, STAMP_BYTES)  # each carries when it was sent


def _run(mode: str, destination: str, settings: dict[str, Any], load: Callable[[Client, Progress], Awaitable[dict[str, Any]]], yes: bool,
         output: Output, connection: Connection, empty: bool) -> None:
    """Runs a load and prints its result. `empty`: what waits in the destination would be in the way, and goes before and after."""
    async def work() -> int:
        async with connect(connection) as client:
            await client.wait_ready(CONNECT_SECONDS)
            await _prepare(client, destination, yes)
            if empty:
                await client.admin.purge(destination)
            begun = now()
            with Bar(mode, total=1.0) as bar:
                found = await load(client, lambda share: bar.show(min(share, 1.0)))
            if empty:
                await client.admin.purge(destination)
            result = {"mode": mode, "destination": destination, "time": begun, "result": found, "settings": settings,
                      "cluster": await _cluster(client), "client": _client()}
        if output is Output.JSON:
            print_json(result)
        else:
            _print(mode, found)
        if found.get("failed"):
            print(f"spillway: {plural(found['failed'], 'message')} not stored: {found['error']}", file=sys.stderr)
        if found.get("lost"):
            print(f"spillway: {plural(found['lost'], 'message')} did not come back in time", file=sys.stderr)
        if mode == "produce" and found["messages"] and output is Output.TABLE:
            print(f"they stay in {destination!r}: spillway bench consume takes them, spillway purge {destination} removes them",
                  file=sys.stderr)
        return EXIT_FAILED if found.get("failed") or found.get("lost") else 0

    run_async(work)


async def _prepare(client: Client, destination: str, yes: bool) -> None:
    """Makes sure that the destination is there, and that its messages may be touched."""
    from spillway.client import AlreadyExists, DestinationNotFound

    try:
        await client.admin.get_destination(destination)
    except DestinationNotFound:
        try:
            await client.admin.create_destination(destination)
        except AlreadyExists:
            pass
    else:
        if destination != OWN:
            confirmed(f"destination {destination!r} exists: load it, and remove what waits there?", yes)


async def _cluster(client: Client) -> dict[str, Any]:
    """What was measured, for whoever reads a result later."""
    found = await client.cluster.status()
    return {"cluster": found.cluster, "nodes": len(found.nodes), "shards": sum(1 for group in found.groups if group.group),
            "voters": max((len(group.voters) for group in found.groups if group.group), default=0),
            "versions": sorted({node.version for node in found.nodes if node.version}), "healthy": not found.problems}


def _client() -> dict[str, Any]:
    """Where it was measured."""
    from spillway.contract.version import VERSION

    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    return {"version": VERSION, "cores": os.cpu_count(), "cpu": cpu, "system": platform.platform(), "python": platform.python_version()}


def _print(mode: str, found: dict[str, Any]) -> None:
    if "messages_per_second" in found:
        print(f"{mode}: {found['messages']:,} messages, {size(found['bytes'])} in {found['seconds']:.2f} s: "
              f"{found['messages_per_second']:,.0f} messages/s, {size(found['bytes_per_second'])}/s")
    timed = [(name.removesuffix("_ms").replace("_", " "), one) for name, one in found.items() if name.endswith("_ms")]
    if timed:
        print_table(("until" if mode != "fairness" else "in a handler", "messages", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms"), [
            (name, f"{one['count']:,}", *(f"{one[key]:,.2f}" for key in ("p50", "p90", "p99", "p999", "max"))) for name, one in timed])
    if mode == "fairness":
        print(f"{found['dump_messages']:,} messages were dumped in {found['dump_seconds']:.2f} s, {found['dump_handled']:,} of them "
              f"handled; p99 of the quiet tenants: {found['p99_ratio']} x")
