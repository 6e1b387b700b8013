"""Child processes that cannot outlive their parent, and the workers among them.

Run as a program it becomes the given command, after asking the kernel for a SIGKILL when the parent dies:

    python -m bench.children PARENT-PID COMMAND...
"""
from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.counters import Counters

ROOT = Path(__file__).resolve().parents[1]
END_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


class Child:
    """One process and its log."""

    def __init__(self, name: str, command: list[str], directory: Path, fds: tuple[int, ...] = ()) -> None:
        self.name = name
        self.command = command
        self.log = directory / f"{name}.log"
        self._fds = fds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; its output is appended to the log."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.children", str(os.getpid()), *self.command],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=self._fds)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has started and not ended."""
        return self._process is not None and self._process.poll() is None

    def wait(self, seconds: float) -> int:
        """Waits for its end; returns the exit code. Raises TimeoutError."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} did not end within {seconds} s:\n{self.tail()}") from None

    def kill(self) -> None:
        """SIGKILL, and waits."""
        if self._process is not None and self.running:
            self._process.kill()
            self._process.wait()

    def end(self) -> None:
        """SIGTERM, and SIGKILL if that does not help."""
        if self._process is not None and self.running:
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Worker(Child):
    """A process that runs one role of `bench.worker` and leaves a result."""

    def __init__(self, role: str, directory: Path, counters: Counters, **options: Any) -> None:
        self.result_file = directory / f"{role}.result.json"
        self.result_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench.worker", role, str(counters.fd), str(self.result_file), json.dumps(options)]
        super().__init__(role, command, directory, (counters.fd,))

    def result(self, seconds: float) -> dict[str, Any]:
        """What it found, once it has ended. Raises TimeoutError, RuntimeError."""
        code = self.wait(seconds)
        if code or not self.result_file.exists():
            raise RuntimeError(f"{self.name} ended with {code}:\n{self.tail()}")
        found: dict[str, Any] = json.loads(self.result_file.read_text())
        return found


class Children:
    """Whatever was started in a `with` block is ended with it."""

    def __init__(self) -> None:
        self._all: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for child in reversed(self._all):
            child.kill()

    def add(self, child: Child) -> None:
        """Takes care of a child that may be started later, or again."""
        self._all.append(child)

    def start(self, child: Child) -> None:
        """Starts a child and takes care of it."""
        self.add(child)
        child.start()

    def check(self) -> None:
        """Raises RuntimeError if a worker failed."""
        for child in self._all:
            if isinstance(child, Worker) and not child.running and child.wait(0):
                raise RuntimeError(f"{child.name} failed:\n{child.tail()}")


def poll(condition: Any, seconds: float, what: str, children: Children | None = None, step: float = 0.02) -> None:
    """Waits until the condition holds. Raises TimeoutError, or RuntimeError if a worker failed meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        if children is not None:
            children.check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(step)


def _become(argv: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(argv[0]):
        sys.exit("the parent is gone")
    os.execv(argv[1], argv[1:])


if __name__ == "__main__":
    _become(sys.argv[1:])
