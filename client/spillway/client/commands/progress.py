"""Progress on standard error, if that is a terminal: results on standard output stay clean."""
from __future__ import annotations

import sys
from typing import Any, Self


class Bar:
    """How far something is. `total` may come later; None: not known. What is counted may be bytes. Of "" nothing is shown."""

    def __init__(self, what: str = "", total: float | None = None, in_bytes: bool = False) -> None:
        self._progress: Any = None
        if not what or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        count = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(), count, TextColumn("{task.fields[note]}"),
                                  TimeRemainingColumn(), console=Console(stderr=True), transient=True,
                                  redirect_stdout=False)  # what is printed meanwhile belongs to standard output
        self._task = self._progress.add_task(what, total=total, note="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, done: float, total: float | None = None, note: str = "") -> None:
        """So much is done."""
        if self._progress is not None:
            more = {} if total is None else {"total": total}
            self._progress.update(self._task, completed=done, note=note, **more)
