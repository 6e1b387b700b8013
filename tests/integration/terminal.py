"""Programs on a terminal of their own, as a person has them: what they draw is read, and keys are pressed."""
from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]")
SECONDS_MAX = 60.0


class Terminal:
    """A program on a terminal of 160 columns and 40 rows; ended in every case. Its standard output is a file if `out` is one."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], out: int | None = None) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        self.raw = ""
        self._seen = 0  # of the text: what `wait_for` went past
        try:
            self.process = subprocess.Popen(argv, stdin=slave, stdout=slave if out is None else out, stderr=slave, start_new_session=True,
                                            env={**os.environ, "TERM": "xterm-256color", **env})
        finally:
            os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)

    @property
    def text(self) -> str:
        """All that was written, without what moves and colours it."""
        return ESCAPE.sub("", self.raw)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Reads until something comes that matches, after what was waited for before."""
        deadline = time.monotonic() + SECONDS_MAX
        while (found := re.compile(pattern).search(self.text, self._seen)) is None:
            assert self._read(deadline), f"{pattern!r} did not come:\n{self.text[self._seen:]}"
        self._seen = found.end()
        return found

    def press(self, keys: str) -> None:
        """Presses keys."""
        os.write(self._master, keys.encode())

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Reads to the end; returns the exit code."""
        deadline = time.monotonic() + SECONDS_MAX
        while self._read(deadline):
            pass
        return self.process.wait(max(deadline - time.monotonic(), 0.1))

    def _read(self, deadline: float) -> bool:
        """Reads a piece; whether there may be more."""
        ready, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return False
        try:
            piece = os.read(self._master, 65536)
        except OSError:  # so Linux says that nobody has the other side any more
            return False
        self.raw += piece.decode(errors="replace")
        return bool(piece)
