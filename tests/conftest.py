"""Fixtures of tests in several folders."""
from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from spillway.client import cli
from spillway.client.connecting import OPTIONS, Option

# A shell starts what runs in its background with SIGINT ignored, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                 tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of one command, in this process; `stdin` is what it reads. Nothing of how this machine's user reaches
    clusters counts."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("SPILLWAY_CONTEXT", *map(Option.variable, OPTIONS)):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        code = cli.main(list(arguments))
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
