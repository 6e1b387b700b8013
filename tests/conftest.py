"""Fixtures of tests in several folders."""
from __future__ import annotations

import io
import signal
from collections.abc import Callable

import pytest
from spillway.client import cli

# A shell starts what runs in its background with SIGINT ignored, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of one command, in this process; `stdin` is what it reads."""
    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        code = cli.main(list(arguments))
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
