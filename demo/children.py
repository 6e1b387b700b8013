"""Child processes that do not outlive their parent, however it ends.

Run as a program it becomes the given command, after asking the kernel (Linux) for a SIGKILL when the parent dies:

    python -m demo.children PARENT-PID COMMAND...
"""
from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
END_SECONDS_MAX = 15.0  # for a process to end by itself after SIGTERM
_PR_SET_PDEATHSIG = 1


class Child:
    """One process and its log file."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, needs_others: bool) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.needs_others = needs_others

    def __repr__(self) -> str:
        return f"<{self.name}: pid {self.process.pid}, {'running' if self.running else self.process.returncode}>"

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.returncode is None

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    async def kill(self) -> None:
        """SIGKILL: it ends without a chance to write anything."""
        if self.running:
            self.process.kill()
            await self.process.wait()

    async def end(self) -> None:
        """SIGTERM, and SIGKILL if that is not enough."""
        if not self.running:
            return
        self.process.terminate()
        try:
            async with asyncio.timeout(END_SECONDS_MAX):
                await self.process.wait()
        except TimeoutError:
            await self.kill()


class Children:
    """Starts processes; all that still run are ended on leaving."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._children: list[Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        running = [child for child in self._children if child.running]
        try:
            for first in (True, False):
                await asyncio.gather(*(child.end() for child in running if child.needs_others is first))
        finally:
            for child in running:
                if child.running:
                    child.process.kill()

    async def start(self, name: str, *command: str, pipe: bool = False, needs_others: bool = False) -> Child:
        """Starts a command; its output goes to NAME.log, appended, or to `process.stdout` if `pipe`. What `needs_others`
        is ended before them."""
        log = self._directory / f"{name}.log"
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "demo.children", str(os.getpid()), *command, cwd=ROOT,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE if pipe else file, stderr=file,
                start_new_session=True)  # Ctrl-C is for the demo, which ends its children in order
        child = Child(name, process, log, needs_others)
        self._children.append(child)
        return child


def main(argv: Sequence[str]) -> None:
    """Becomes the command."""
    parent, *command = argv
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(parent):  # it died before we asked
            raise SystemExit(1)
    os.execvp(command[0], command)  # noqa: S606 - the command is the demo's own


if __name__ == "__main__":
    main(sys.argv[1:])
