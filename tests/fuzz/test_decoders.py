"""Every decoder returns, or raises what it declares, whatever it is given; and a decoder that does not is caught."""
from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz import __main__ as command
from tests.fuzz.decoder import Decode, Decoder, expect, plain, undeclared
from tests.fuzz.decoders import all_decoders
from tests.fuzz.mutate import edited
from tests.fuzz.regressions import REGRESSIONS

INPUT_BYTES_MAX = 4096
QUICK = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
EDITS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1 << 12), st.integers(0, 1 << 12)), min_size=1, max_size=4)


def never_raises_else(decoder: Decoder, decode: Decode, phases: Sequence[Phase] = tuple(Phase), examples: int = 100) -> None:
    """Any bytes, and edits of valid inputs, raise nothing but what is declared."""

    def takes(data: bytes) -> None:
        error = undeclared(decoder, decode, data[:INPUT_BYTES_MAX])
        if error is not None:
            raise AssertionError(f"{decoder.name} raises {type(error).__name__} for {data[:INPUT_BYTES_MAX]!r}") from error

    @settings(QUICK, phases=phases, max_examples=examples)
    @given(data=st.binary(max_size=100))
    def takes_any(data: bytes) -> None:
        takes(data)

    @settings(QUICK, phases=phases, max_examples=examples)
    @given(sample=st.sampled_from(decoder.samples), edits=EDITS)
    def takes_edited(sample: bytes, edits: list[tuple[int, int, int]]) -> None:
        data = sample
        for edit in edits:
            data = edited(data, edit, decoder.samples)
        takes(data)

    takes_any()
    takes_edited()


@pytest.mark.parametrize("name", all_decoders())
def test_a_decoder_takes_its_samples_and_refuses_only_as_declared(name: str) -> None:
    """Samples are valid: a search that starts from what is refused at once finds nothing."""
    decoder = all_decoders()[name]
    with decoder.opened() as decode:
        for sample in decoder.samples:
            decode(sample)
        never_raises_else(decoder, decode)


@pytest.mark.parametrize("name", sorted({name for name, _ in REGRESSIONS}))
def test_what_once_failed_does_so_no_more(name: str) -> None:
    """Inputs that raised what was not declared, or were taken for something."""
    decoder = all_decoders()[name]
    with decoder.opened() as decode:
        for data in (data for one, data in REGRESSIONS if one == name):
            error = undeclared(decoder, decode, data)
            if error is not None:
                raise AssertionError(f"{name} raises {type(error).__name__} for {data[:200]!r}") from error


# -- decoders that are broken on purpose --------------------------------------------------------------------------------


def _reads_beyond_the_end(data: bytes) -> None:
    struct.unpack_from("<Q", data)


def _takes_lengths_on_trust(data: bytes) -> None:
    size = data[0] if data else 0
    expect(len(data[1:1 + size]) == size, data)


def _forgets_a_bit(data: bytes) -> None:
    number = int.from_bytes(data[:8], "little") & ~(1 << 40)
    expect(number.to_bytes(8, "little")[:len(data)] == data[:8], data)


def _ends_the_process(data: bytes) -> None:
    if len(data) % 7 == 3:
        sys.exit(1)


def _decodes_text(data: bytes) -> None:
    data.decode()


def _recurs(data: bytes) -> None:
    at = data.find(b"[")
    if at >= 0:
        _recurs(data[at + 1:])


@pytest.mark.parametrize("broken", [
    _reads_beyond_the_end, _takes_lengths_on_trust, _forgets_a_bit, _ends_the_process, _decodes_text, _recurs], ids=lambda f: f.__name__)
def test_a_broken_decoder_is_caught(broken: Callable[[bytes], None]) -> None:
    """What declares KeyError only and does something else does not pass."""
    decoder = Decoder("broken", plain(broken), (KeyError,), (struct.pack("<Q", 7), b"\3abc", b"text"))
    with decoder.opened() as decode, pytest.raises(AssertionError, match="broken raises"):
        # What a hundred examples have depends on which modules are loaded, as Hypothesis takes constants from them. So: many; and no
        # smaller one, which says nothing more.
        never_raises_else(decoder, decode, (Phase.generate,), examples=2000)


# -- long runs ----------------------------------------------------------------------------------------------------------

_RUN = """
import sys
from pathlib import Path
from tests.fuzz import run
from tests.fuzz.decoder import Decoder, plain
run.SECONDS_MAX, run.WATCH_SECONDS, run.MEMORY_BYTES_MAX = 3.0, 0.1, 256 << 20
found = Decoder("broken", plain(lambda data: [{}][0]), (ValueError,), (b"1",))
made = run.Run(found, found.open().__enter__(), Path(sys.argv[1]), 100, Path(sys.argv[2]))
for number in range(101):
    made.one(str(number).encode())
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[str], dict[str, object]]]:
    """Gives "0", "1", ... to a decoder, an expression, in a process of its own; returns the result."""

    def ended(expression: str) -> dict[str, object]:
        result = tmp_path / "result"
        subprocess.run([sys.executable, "-c", _RUN.replace("{}", expression), str(tmp_path), str(result)], check=True, timeout=60)
        found: dict[str, object] = json.loads(result.read_text())
        return found

    yield ended


@pytest.mark.parametrize(("expression", "inputs", "failed", "what"), [
    ("int(data)", 100, 0, ""),
    ("int(b'x')", 100, 0, ""),  # as declared
    ("[0] * 50 and [0][int(data) // 50]", 100, 50, "IndexError"),
    ("1 // (int(data) - 7)", 100, 1, "ZeroDivisionError"),
    ("bytes(1 << 32) if data == b'9' else 0", 100, 1, "MemoryError"),
    ("[0 for _ in iter(int, 1) if _] if data == b'2' else 0", 3, 1, "TimeoutError"),
    ("exit(1)", 100, 100, "SystemExit"),
])
def test_a_run_counts_and_keeps_what_fails(run: Callable[[str], dict[str, object]], tmp_path: Path, expression: str, inputs: int,
                                           failed: int, what: str) -> None:
    """All inputs asked for are decoded, one that fails for each place is kept, and none takes memory or time without end."""
    result = run(expression)
    assert (result["inputs"], result["undeclared"]) == (inputs, failed)
    kept = result["failures"]
    assert isinstance(kept, list) and len(kept) == bool(failed)
    if kept:
        assert kept[0]["error"].startswith(what), kept
        file = Path(kept[0]["replay"].rpartition(" ")[2])
        assert file.parent == tmp_path and file.read_bytes().isdigit()


def test_a_process_that_is_gone_is_a_failure(tmp_path: Path) -> None:
    """A child that ends without a result has not passed."""
    result = command.part(Decoder("unknown", plain(len), (), (b"",)), 10, 1, False, tmp_path)
    assert result["undeclared"] == 1 and "KeyError" in result["failures"][0]["error"]


def test_the_command_line_fuzzes_and_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line of JSON for each decoder, and an input again."""
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    assert command.main(["--decoder", "etag", "--inputs", "500"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["decoder"], line["inputs"], line["undeclared"], line["failures"]) == ("etag", 500, 0, [])
    file = tmp_path / "input"
    file.write_bytes(b"x")
    assert command.main(["--decoder", "etag", "--replay", str(file)]) == 0
    assert "as it declares" in capsys.readouterr().out
