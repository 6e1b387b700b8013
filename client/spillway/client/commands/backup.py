"""`spillway backup`. Its counterpart, `spillway restore`, comes with the broker: it makes a node's data directory."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from spillway.client.commands.common import HERE, Connection, Format, Output, command, connect, plain, plural, print_done, run_async, when

if TYPE_CHECKING:
    from spillway.client import BackupProgress, Manifest

Directory = Annotated[Path, typer.Argument(help="Where the backup goes: a directory that does not exist or is empty.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check a backup that is there, to its last byte; no cluster is needed.")]


app = typer.Typer()


@command(app)
def backup(directory: Directory, verify: Verify = False, output: Format = Output.TABLE, connection: Connection = HERE) -> None:
    """Writes a backup of the whole cluster while it serves: what was acknowledged before is in it. `spillway restore` makes a new cluster
    of it."""
    from spillway.client import verify_backup

    async def work() -> int:
        with _Bar() as bar:
            if verify:
                found = verify_backup(directory, bar.show)
            else:
                async with connect(connection) as client:
                    found = await client.cluster.back_up(directory, on_progress=bar.show)
        _print(directory, found, verify, output)
        return 0

    run_async(work)


def _print(directory: Path, found: Manifest, verified: bool, output: Output) -> None:
    print_done(f"{'whole' if verified else 'written'}: {directory}, cluster {found.cluster!r} as of {when(found.begun)} or later, "
               f"{plural(found.shards, 'shard')}, {found.bytes:,} bytes",
               output, directory=str(directory), **plain(found), bytes=found.bytes, rows=found.rows)


class _Bar:
    """How far it is, on standard error, if that is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._groups = Progress(TextColumn("groups"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[size]}"),
                                console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self._task = self._groups.add_task("", total=None, size="")

    def __enter__(self) -> _Bar:
        self._groups.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._groups.stop()

    def show(self, progress: BackupProgress) -> None:
        """So much is done."""
        self._groups.update(self._task, completed=progress.groups_done, total=progress.groups or None,
                            size=f"{progress.bytes / (1 << 20):,.1f} MiB")
