"""`spillway backup`. Its counterpart, `spillway restore`, comes with the broker: it makes a node's data directory."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from spillway.client.commands.common import (
    HERE,
    Connection,
    Format,
    Output,
    command,
    connect,
    plain,
    plural,
    print_done,
    run_async,
    size,
    when,
)
from spillway.client.commands.progress import Bar

if TYPE_CHECKING:
    from spillway.client import BackupProgress, Manifest

Directory = Annotated[Path, typer.Argument(help="Where the backup goes: a directory that does not exist or is empty.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check a backup that is there, to its last byte; no cluster is needed.")]


app = typer.Typer()


@command(app, examples=("spillway backup ./backup-1", "spillway backup --verify ./backup-1"))
def backup(directory: Directory, verify: Verify = False, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Writes a backup of the whole cluster while it serves: what was acknowledged before is in it. `spillway restore` makes a new cluster
    of it."""
    from spillway.client import verify_backup

    async def work() -> int:
        with Bar("checking" if verify else "writing") as bar:
            def show(progress: BackupProgress) -> None:
                bar.show(progress.groups_done, progress.groups or None, f"groups, {size(progress.bytes)}")

            if verify:
                found = verify_backup(directory, show)
            else:
                async with connect(connection) as client:
                    found = await client.cluster.back_up(directory, on_progress=show)
        _print(directory, found, verify, output)
        return 0

    run_async(work)


def _print(directory: Path, found: Manifest, verified: bool, output: Output) -> None:
    print_done(f"{'whole' if verified else 'written'}: {directory}, cluster {found.cluster!r} as of {when(found.begun)} or later, "
               f"{plural(found.shards, 'shard')}, {found.bytes:,} bytes",
               output, directory=str(directory), **plain(found), bytes=found.bytes, rows=found.rows)
