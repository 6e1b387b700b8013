"""The pages that say what to type are true: their commands run against real nodes and print what the page says."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from doc_page import ROOT, Block, Page, PageError, blocks, checkout, commands, matches

RUN = {"client.md", "migrating.md", "production.md", "quickstart.md"}
ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}


@pytest.mark.slow
def test_the_quickstart(tmp_path: Path) -> None:
    """From a fresh checkout, without an environment, to a delivered message; every command does what the page says."""
    checkout(tmp_path)
    reachable = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path / "build"),
                                "hatchling"], capture_output=True, text=True, timeout=120, check=False)
    if reachable.returncode:
        pytest.skip(f"no package registry can be reached: {reachable.stderr.strip().splitlines()[-1:]}")
    page = Page(ROOT / "docs" / "quickstart.md", tmp_path, {"PATH": "/usr/local/bin:/usr/bin:/bin", "VIRTUAL_ENV": ""})
    assert page.run() >= 12


@pytest.mark.parametrize(("page", "commands", "programs"), [
    ("client.md", 3, ["guide.py", "raw.py"]),
    ("migrating.md", 7, ["bridge.py"]),
    ("production.md", 2, []),
])
def test_a_page_says_what_happens(tmp_path: Path, page: str, commands: int, programs: list[str]) -> None:
    """Its commands print what it says, and its programs are typed."""
    assert Page(ROOT / "docs" / page, tmp_path, ENVIRONMENT).run() == commands
    for program in programs:
        checked = subprocess.run([sys.executable, "-m", "mypy", "--strict", str(tmp_path / program)], cwd=ROOT, capture_output=True,
                                 text=True, timeout=200, check=False)
        assert not checked.returncode, checked.stdout


def test_every_page_with_marks_is_run() -> None:
    """A page that says what is run is run."""
    marked = {p.name for p in (ROOT / "docs").glob("*.md") if any(block.mark in ("run", "program") for block in blocks(p))}
    assert marked >= {"client.md", "quickstart.md"} and marked == RUN


def write(tmp_path: Path, text: str) -> Path:
    """A page."""
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def run(tmp_path: Path, text: str) -> int:
    """Runs a page that is `text`."""
    directory = tmp_path / "there"
    directory.mkdir()
    return Page(write(tmp_path, text), directory, ENVIRONMENT).run()


def test_a_page_is_run(tmp_path: Path) -> None:
    """Commands share a shell, files are there, what runs beside is waited for and ended, programs are put together."""
    assert run(tmp_path, """
<!-- program: a.py -->
```python
x = 1
```
<!-- program: a.py -->
```python
print(x + 1)
```
<!-- run -->
```console
$ y=3; cd /
$ echo $y \\
> and more
3 and more
$ pwd
/
$ cd -
…
$ python3 a.py
2
```
<!-- run: background loop -->
```console
$ while true; do sleep 0.05; echo again 2026-01-01 10:00:00; done
again 2020-02-02 22:22:22
```
<!-- output: loop -->
```text
again …
```
<!-- stop: loop -->
<!-- run: exit 3 -->
```console
$ (exit 3)
```
<!-- from: page.md -->
```text
2
```
""") == 7


@pytest.mark.parametrize(("text", "why"), [
    ("```console\n$ true\n```\n", "page.md:1: the block has no mark"),
    ("<!-- run -->\nwords\n", "page.md:2: no block follows the mark"),
    ("<!-- run -->\n```console\n$ echo no\nyes\n```\n", "'echo no' ends with 0 and prints\n----\nno\n---- and not\nyes"),
    ("<!-- run -->\n```console\n$ false\n```\n", "'false' ends with 1"),
    ("<!-- run: exit 3 -->\n```console\n$ true\n```\n", "'true' ends with 0"),
    ("<!-- run -->\n```console\n$ echo more\n```\n", "'echo more' ends with 0 and prints\n----\nmore"),
    ("<!-- from: page.md -->\n```text\n" + "never\n" * 2 + "```\n<!-- from: other.md -->\n```text\nno\n```\n", "other.md"),
])
def test_a_page_that_is_not_true_is_found_out(tmp_path: Path, text: str, why: str) -> None:
    """Each kind of mistake is told with its place."""
    (tmp_path / "other.md").write_text("yes")
    with pytest.raises(PageError) as caught:
        run(tmp_path, text)
    assert why in str(caught.value)


@pytest.mark.parametrize(("expected", "actual", "same"), [
    (["a  b"], ["a     b"], True),
    (["a b"], ["ab"], False),
    (["at 2026-01-01 10:00:00 UTC, 1234567"], ["at 2027-03-03 11:11:11 UTC, 7654321"], True),
    (["12 messages"], ["13 messages"], False),
    (["a … c"], ["a b c"], True),
    (["a", "…", "c"], ["a", "b", "b", "c"], True),
    (["a", "…"], ["a"], True),
    (["a"], ["a", "b"], False),
    (["a", "b"], ["a"], False),
    (["(a|b)"], ["a"], False),
    (["0123456789abcdef0"], ["fedcba98765432100"], True),
])
def test_what_may_differ(expected: list[str], actual: list[str], same: bool) -> None:
    """Times, ids, long numbers and widths; nothing else."""
    assert matches(expected, actual) is same


def test_blocks_and_commands(tmp_path: Path) -> None:
    """Fences inside a fence belong to it; a command may go over lines."""
    page = write(tmp_path, "<!-- not run: why -->\n````console\n```\n$ x\n````\n<!-- stop: a -->\n")
    assert list(blocks(page)) == [Block(2, "not run", "why", "console", "```\n$ x"), Block(6, "stop", "a")]
    assert [(c.text, c.output) for c in commands("$ a \\\n> b\nout\n> out\n$ c")] == [("a \\\nb", ["out", "> out"]), ("c", [])]
