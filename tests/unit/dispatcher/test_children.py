"""Processes that the demo starts end with it, however it ends."""
from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from demo.children import ROOT, Children

FOREVER = "import time; time.sleep(1000)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(1000)"
PARENT = """
import asyncio, sys
from pathlib import Path
from demo.children import Children

async def main():
    async with Children(Path(sys.argv[1])) as children:
        child = await children.start("child", sys.executable, "-c", "print('up', flush=True); import time; time.sleep(1000)",
                                     pipe=True)
        await child.process.stdout.readline()
        print(child.process.pid, flush=True)
        await child.process.wait()

asyncio.run(main())
"""


async def test_ended_on_leaving(tmp_path: Path) -> None:
    """Leaving ends what still runs, also when it is left by an error."""
    with pytest.raises(ZeroDivisionError):
        async with Children(tmp_path) as children:
            child = await children.start("child", sys.executable, "-c", FOREVER)
            assert child.running
            raise ZeroDivisionError
    assert child.process.returncode == -signal.SIGTERM


async def test_stubborn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not end by itself is killed."""
    monkeypatch.setattr("demo.children.END_SECONDS_MAX", 0.1)
    async with Children(tmp_path) as children:
        child = await children.start("child", sys.executable, "-c", STUBBORN, pipe=True)
        assert child.process.stdout is not None
        assert await child.process.stdout.readline() == b"ready\n"
    assert child.process.returncode == -signal.SIGKILL


async def test_log(tmp_path: Path) -> None:
    """Output goes to the child's log."""
    async with Children(tmp_path) as children:
        child = await children.start("child", sys.executable, "-c", "print(1); print(2)")
        await child.process.wait()
        assert child.tail(1) == "2" and (tmp_path / "child.log").read_text() == "1\n2\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_parent_killed(tmp_path: Path) -> None:
    """SIGKILL to the demo takes its children along."""
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            ended, _, _ = select.select([child], [], [], 20.0)
            assert ended
        finally:
            os.close(child)
