"""How the cluster is: status."""
from __future__ import annotations

import typer
from spillway.client.cli import EXIT_UNAVAILABLE
from spillway.client.commands.common import HERE, Connection, Format, Output, command, connect, plural, print_json, print_table, run_async

app = typer.Typer()


@command(app, examples=("spillway status", "spillway status -a 127.0.0.1:7070 -o json"))
def status(
    output: Format = Output.TABLE,
    connection: Connection = HERE,
) -> None:
    """Shows nodes and who leads which shard. Exit code 4 if a shard has no leader."""
    from spillway.client import Unavailable

    async def show() -> int:
        async with connect(connection) as client:
            try:
                topology = await client.wait_ready(2.0)
            except Unavailable:
                topology = client.topology
                if not topology.shard_count:
                    raise
        lacking = [shard for shard, leader in enumerate(topology.leaders, 1) if not leader]
        if output is Output.JSON:
            print_json({
                "cluster": topology.cluster, "healthy": topology.ready,
                "nodes": [{"id": node, "address": where, "shards_led": sorted(topology.leads(node))}
                          for node, where in topology.nodes.items()],
                "shards": [{"shard": i, "leader": leader, "term": topology.terms[i - 1],
                            "replicas": list(topology.replicas[i - 1])} for i, leader in enumerate(topology.leaders, 1)]})
        else:
            print(f"cluster {topology.cluster!r}: {plural(len(topology.nodes), 'node')}, {plural(topology.shard_count, 'shard')}"
                  + (f", without a leader: {', '.join(map(str, lacking))}" if lacking else ", all have a leader"))
            print_table(("node", "address", "leads"), [
                (node, where, ", ".join(map(str, sorted(topology.leads(node))))) for node, where in topology.nodes.items()])
        return 0 if topology.ready else EXIT_UNAVAILABLE

    run_async(show)
