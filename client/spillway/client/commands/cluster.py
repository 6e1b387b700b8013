"""The cluster's nodes: status, drain, undrain, remove. A node joins by itself: `spillway serve --join`."""
from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer
from spillway.client.cli import EXIT_UNAVAILABLE
from spillway.client.commands.common import (
    HERE,
    Connection,
    Format,
    Output,
    Stream,
    StreamFormat,
    Yes,
    command,
    confirmed,
    connect,
    now,
    plain,
    plural,
    print_done,
    print_json,
    print_line,
    print_table,
    run_async,
    seconds,
    table,
)

if TYPE_CHECKING:
    from rich.console import Group
    from spillway.client import Client, ClusterStatus

app = typer.Typer(name="cluster", no_args_is_help=True, help="The cluster's nodes. A node joins by `spillway serve --join HOST:PORT`.")
NodeId = Annotated[str, typer.Argument(help="Id of the node.", metavar="NODE")]
Wait = Annotated[float, typer.Option("--wait", parser=seconds, metavar="DURATION", help=(
    "Wait for so long until it is done: 30s, 10m; 0 to return at once."))]
POLL_SECONDS = 0.5


@command(app, "status", examples=(
    "spillway cluster status",
    "spillway cluster status --until-healthy --timeout 60s -o json",
    "spillway cluster status --watch --interval 5s"))
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until interrupted.")] = False,
    until_healthy: Annotated[bool, typer.Option("--until-healthy", help="Wait until nothing is wrong.")] = False,
    timeout: Annotated[float, typer.Option(parser=seconds, metavar="DURATION", help="With --until-healthy: for so long at most.")] = 600.0,
    interval: Annotated[float, typer.Option(parser=seconds, metavar="DURATION", help="Between two looks.")] = 2.0,
    output: StreamFormat = Stream.TABLE,
    connection: Connection = HERE,
) -> None:
    """Shows nodes, shards, what moves, what is wrong and what to do about it. Exit code 4 if something is wrong. With --watch and
    -o jsonl there is a line for each look."""
    if watch and until_healthy:
        raise typer.BadParameter("watch for ever, or until it is healthy", param_hint="--until-healthy")

    async def show() -> int:
        async with connect(connection) as client:
            return await (_watch(client, interval, output) if watch else _look(client, until_healthy, timeout, interval, output))

    run_async(show)


async def _look(client: Client, until_healthy: bool, timeout: float, interval: float, output: Stream) -> int:
    import asyncio

    from spillway.client import Unavailable

    deadline = time.monotonic() + timeout
    while True:
        try:
            found = await client.cluster.status()
        except Unavailable:
            if not until_healthy or time.monotonic() >= deadline:
                raise
        else:
            if not until_healthy or not found.problems or time.monotonic() >= deadline:
                break
        await asyncio.sleep(min(interval, max(deadline - time.monotonic(), 0)))
    if output is Stream.TABLE:
        _print(found)
    else:
        (print_json if output is Stream.JSON else print_line)(plain(found))
    return EXIT_UNAVAILABLE if found.problems else 0


async def _watch(client: Client, interval: float, output: Stream) -> int:
    """Shows it again and again: on a terminal in one place, else below one another."""
    from spillway.client import Unavailable
    from spillway.client.commands.live import Keys, is_terminal, screen

    drawing = output is Stream.TABLE and is_terminal()
    keys = Keys()
    with screen() if drawing else contextlib.nullcontext(print) as draw, keys.reading() if drawing else contextlib.nullcontext():
        while True:
            try:
                found: ClusterStatus | None = await client.cluster.status()
            except Unavailable as error:
                found, told = None, str(error)
            if output is not Stream.TABLE:
                print_line({"time": now()} | (plain(found) if found else {"error": told}))
            elif drawing:
                draw(_drawn(found) if found else told)
            elif found:
                _print(found)
            else:
                print(told)
            sys.stdout.flush()
            if await keys.next(interval) in ("q", "escape"):
                return 0


def _drawn(found: ClusterStatus) -> Group:
    from rich.console import Group
    from rich.text import Text

    told = [Text(f"wrong: {one.what}\n  do:  {one.remedy}", style="red") for one in found.problems]
    return Group(Text(_sentence(found)), *told, table(*_nodes(found)), table(*_groups(found)), Text("q: quit", style="dim"))


def _print(found: ClusterStatus) -> None:
    print(_sentence(found))
    print_table(*_nodes(found))
    print_table(*_groups(found))
    for problem in found.problems:
        print(f"wrong: {problem.what}\n  do:  {problem.remedy}")


def _sentence(found: ClusterStatus) -> str:
    shards = sum(1 for group in found.groups if group.group)
    return (f"cluster {found.cluster!r}: {plural(len(found.nodes), 'node')}, {plural(shards, 'shard')}, "
            + (f"{found.moving} moving" if found.moving else "none moving") + f", feature level {found.feature_level}")


def _nodes(found: ClusterStatus) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return ("node", "state", "address", "zone", "host", "version", "replicas", "leads"), [
        (n.id, n.state.name.lower() if n.reachable else f"{n.state.name.lower()}, silent", n.address, n.zone, n.host, n.version,
         str(n.replicas), str(n.leads)) for n in found.nodes]


def _groups(found: ClusterStatus) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return ("shard", "leader", "voters", "catching up", "belongs on", "lag"), [
        (str(g.group) if g.group else "meta", g.leader or "none", ", ".join(g.voters), ", ".join(g.learners),
         ", ".join(g.wanted) if g.moving else "", str(max((r.lag for r in g.replicas), default=0))) for g in found.groups]


@command(app, "drain", examples=("spillway cluster drain n2 --wait 10m",))
def drain(node: NodeId, wait: Wait = 600.0, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Moves all replicas of a node to others, and waits until it has none. It stays in the cluster: see undrain, remove."""
    _leave("drain", node, wait, output, connection)


@command(app, "stoppable", examples=("spillway cluster stoppable n2 --wait 10m",))
def stoppable(
    node: Annotated[str, typer.Argument(help="Id of the node.", metavar="NODE", envvar="SPILLWAY_NODE_ID")],
    wait: Annotated[float, typer.Option("--wait", parser=seconds, metavar="DURATION", help=(
        "Wait for so long until it is so: 30s, 10m."))] = 0.0,
    settle: Annotated[float, typer.Option("--settle", parser=seconds, metavar="DURATION", help=(
        "Take at least so long, for load balancers to hear that the node goes."))] = 0.0,
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Waits until a node can be stopped without any group losing its majority. Exit code 4 if it cannot."""
    from spillway.client.cluster import thin_without
    from spillway.client.errors import Unavailable

    async def work() -> int:
        import asyncio

        begun = time.monotonic()
        until = begun + max(wait, settle)
        why = ""
        thin: tuple[int, ...] = ()
        async with connect(connection) as client:
            while True:
                try:
                    thin = thin_without(await client.cluster.status(timeout=max(POLL_SECONDS, min(5.0, until - time.monotonic()))), node)
                    why = "no majority without it: " + ", ".join(f"shard {n}" if n else "the meta group" for n in thin) if thin else ""
                except Unavailable as error:
                    why = str(error)
                if (left := (until if why else begun + settle) - time.monotonic()) <= 0:
                    break
                await asyncio.sleep(min(POLL_SECONDS, left))
        print_done(f"node {node} should not be stopped now: {why}" if why else f"node {node} can be stopped", output, node=node,
                   stoppable=not why, thin=list(thin))
        return EXIT_UNAVAILABLE if why else 0

    run_async(work)


@command(app, "undrain", examples=("spillway cluster undrain n2",))
def undrain(node: NodeId, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Undoes drain: the node gets its share of replicas again."""
    async def work() -> int:
        async with connect(connection) as client:
            await client.cluster.undrain(node)
        print_done(f"node {node} gets replicas again", output, node=node, state="active")
        return 0

    run_async(work)


@command(app, "remove", examples=("spillway cluster remove n2 --yes",))
def remove(node: NodeId, wait: Wait = 600.0, yes: Yes = False, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Drains a node, and then it is none of the cluster any more; also one that is dead for good. Cannot be undone."""
    confirmed(f"Remove node {node} from the cluster for good?", yes)
    _leave("remove", node, wait, output, connection)


def _leave(what: str, node: str, wait: float, output: Output, connection: Connection) -> None:
    async def work() -> int:
        async with connect(connection) as client:
            await (client.cluster.drain(node) if what == "drain" else client.cluster.remove(node))
            left = await _wait(client, node, wait)
        if left:
            print_done(f"node {node}: {plural(left, 'replica')} left, going on", output, node=node, replicas_left=left)
            return EXIT_UNAVAILABLE if wait else 0
        print_done(f"node {node} has no replica any more" if what == "drain" else f"node {node} is none of the cluster any more; stop it",
                   output, node=node, replicas_left=0)
        return 0

    run_async(work)


async def _wait(client: Client, node: str, wait: float) -> int:
    """Waits until a node has no replica, or, if it is being removed, is gone; returns what it has then."""
    import asyncio

    from spillway.client import NodeState

    until = time.monotonic() + wait
    while True:
        found = await client.cluster.status()
        own = next((n for n in found.nodes if n.id == node), None)
        # A group of which nobody answers has replicas, too; it is not known where.
        if own is None or (own.state is NodeState.DRAINING and not own.replicas and all(group.voters for group in found.groups)):
            return 0
        if time.monotonic() > until:
            return max(1, own.replicas)
        await asyncio.sleep(POLL_SECONDS)
