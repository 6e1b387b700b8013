"""Runs a page of the documentation: its commands for real, in order, in one shell, and compares what they print.

What is run is marked in the page, by comments that a reader does not see, each before a fenced block or by itself:

    <!-- ports: 7070 7071 -->           anywhere; commands get free ports in the place of these, outputs get these back
    <!-- run -->                        a `console` block: lines with `$ ` are commands (`> ` continues one), what follows is their output
    <!-- run: exit 4 -->                likewise; the last command ends with this exit code, the others with 0
    <!-- run: background NAME -->       a `console` block with one command that goes on running; it has to print the output
    <!-- output: NAME -->               a block with what NAME prints later: waits until it has
    <!-- eventually -->                 a `console` block whose last command is repeated until it prints the output
    <!-- stop: NAME -->                 by itself: ends it, as Ctrl-C does
    <!-- file: NAME -->                 a block that is written to a file
    <!-- program: NAME -->              a block that is added to a file: blocks of one name are one program
    <!-- from: PATH -->                 a block that is in this file of the repository, line for line (PATH from the page's folder)
    <!-- not run: WHY -->               a block that is not run

A `console` block without one of these is an error, so none is forgotten. In an expected output `…` stands for anything in a line,
and by itself for any number of lines. Times, numbers of six digits and more, long hexadecimal ids and widths of columns may differ.
"""
from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
COMMAND_SECONDS = 240.0  # an installation is one command
OUTPUT_SECONDS = 60.0
END_SECONDS = 20.0
_MARK = re.compile(r"^<!-- (ports|run|output|eventually|stop|file|program|from|not run)(?:: *(.*?))? -->$")
_NORMAL = (
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?(?: UTC|Z|[+-]\d\d:\d\d)?"), "(time)"),
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{16,}\b"), "(id)"),
    (re.compile(r"\b\d{6,}\b"), "(number)"),
    (re.compile(r"─+"), "─"),
    (re.compile(r"  +"), "  "),
)


@dataclass(frozen=True)
class Block:
    """A fenced block, or a mark by itself."""

    line: int  # of the fence, from 1
    mark: str
    argument: str
    language: str = ""
    text: str = ""


@dataclass(frozen=True)
class Command:
    """One command of a `console` block and the lines that it prints."""

    text: str
    output: list[str]


class PageError(AssertionError):
    """A page that does not say what is true; tells where and what."""


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks and marks of a page, in order. Raises PageError for a `console` block without a mark."""
    mark = argument = fence = language = ""
    begun = 0
    text: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        stripped = line.strip()
        if fence:
            if stripped == fence:
                if not mark and language == "console":
                    raise PageError(f"{page.name}:{begun}: the block has no mark: run it, or say why not")
                yield Block(begun, mark, argument, language, "\n".join(text))
                mark = argument = fence = ""
                text = []
            else:
                text.append(line)
        elif found := re.match(r"^(```+)(\w*)", stripped):
            fence, language, begun = found[1], found[2], number
        elif found := _MARK.match(stripped):
            if found[1] in ("stop", "ports"):
                yield Block(number, found[1], found[2] or "")
            else:
                mark, argument = found[1], found[2] or ""
        elif stripped and mark:
            raise PageError(f"{page.name}:{number}: no block follows the mark {mark!r}")


def commands(text: str) -> list[Command]:
    """The commands of a `console` block."""
    found: list[Command] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:], []))
        elif line.startswith("> ") and found and not found[-1].output:
            found[-1] = Command(f"{found[-1].text}\n{line[2:]}", [])
        elif found:
            found[-1].output.append(line.rstrip())
    return found


def normal(line: str) -> str:
    """A line without what differs from run to run."""
    for pattern, word in _NORMAL:
        line = pattern.sub(word, line)
    return line.strip()


def matches(expected: list[str], actual: list[str]) -> bool:
    """Whether an output is what a page says; see the module."""
    wanted = [normal(line) for line in expected if line.strip()]
    given = [normal(line) for line in actual if line.strip()]
    pattern = ""
    for line in wanted:
        pattern += r"(?:[^\n]*\n)*?" if line == "…" else r"[^\n]*".join(re.escape(part) for part in line.split("…")) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in given)) is not None


class Shell:
    """A bash in which the commands of a page run, one after the other, and some beside it."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._scratch = directory / ".page"
        self._scratch.mkdir(parents=True)
        # Of a make that runs the tests, and would change what a make of the page says.
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        self._process = subprocess.Popen(["bash", "--noprofile", "--norc"], cwd=directory, stdin=subprocess.PIPE, text=True,
                                         env={**outside, **environment})
        self._number = 0
        self._background: dict[str, tuple[int, Path]] = {}

    def run(self, command: str) -> tuple[int, list[str]]:
        """Runs a command; returns its exit code and what it printed, errors included."""
        self._number += 1
        out, code = self._scratch / f"{self._number}.out", self._scratch / f"{self._number}.code"
        self._tell(f"{{ {command}\n}} > {out} 2>&1 < /dev/null; echo $? > {code}.new; mv {code}.new {code}")
        deadline = time.monotonic() + COMMAND_SECONDS
        while not code.exists():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise PageError(f"{command!r} does not end:\n{out.read_text() if out.exists() else ''}")
            time.sleep(0.02)  # polling another process
        return int(code.read_text()), out.read_text().splitlines()

    def start(self, name: str, command: str) -> None:
        """Starts a command that goes on."""
        self._number += 1
        out, pid = self._scratch / f"{self._number}.out", self._scratch / f"{self._number}.pid"
        self._tell(f"{command} > {out} 2>&1 < /dev/null &\necho $! > {pid}.new; mv {pid}.new {pid}")
        deadline = time.monotonic() + END_SECONDS
        while not pid.exists():
            if time.monotonic() > deadline:
                raise PageError(f"{command!r} was not started")
            time.sleep(0.02)
        self._background[name] = (int(pid.read_text()), out)

    def printed(self, name: str) -> list[str]:
        """What a command beside the others has printed."""
        return self._background[name][1].read_text(errors="replace").splitlines()

    def stop(self, name: str) -> None:
        """Ends a command that was started. By SIGTERM: a shell that is nobody's terminal has its children ignore SIGINT."""
        pid, _ = self._background.pop(name)
        _end(pid, signal.SIGTERM)

    def close(self) -> None:
        """Ends everything."""
        for name in list(self._background):
            self.stop(name)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()


def _end(pid: int, sig: signal.Signals) -> None:
    deadline = time.monotonic() + END_SECONDS
    try:
        os.kill(pid, sig)
        while _alive(pid):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.02)
    except (ProcessLookupError, FileNotFoundError):  # the latter: it went between two looks at it
        pass


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


class Page:
    """A page that is being run."""

    def __init__(self, page: Path, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        """Commands run in `directory`. A node and its clients take the ports that the page says, unless a command says otherwise."""
        self.page = page
        self.directory = directory
        self.blocks = list(blocks(page))
        names = [port for block in self.blocks if block.mark == "ports" for port in block.argument.split()]
        self.ports = dict(zip(names, map(str, free_ports(len(names))), strict=True))
        own = {"SPILLWAY_ADDRESS": "127.0.0.1:7070", "SPILLWAY_LISTEN": "127.0.0.1:7070", "SPILLWAY_PEER_LISTEN": "127.0.0.1:7071"}
        self.environment = {name: self.there(value) for name, value in own.items()} | {
            "TZ": "UTC", "COLUMNS": "200", "NO_COLOR": "1", **(environment or {})}

    def there(self, text: str) -> str:
        """A text of the page with the ports of this run."""
        return self._exchange(text, self.ports)

    def back(self, text: str) -> str:
        """The other way round."""
        return self._exchange(text, {there: here for here, there in self.ports.items()})

    @staticmethod
    def _exchange(text: str, words: Mapping[str, str]) -> str:
        return re.sub(rf"\b({'|'.join(words)})\b", lambda found: words[found[0]], text) if words else text

    def run(self) -> int:
        """Does what the page says; returns how many commands ran. Raises PageError where something else happens."""
        count = 0
        shell = Shell(self.directory, self.environment)
        try:
            for block in self.blocks:
                count += self._do(shell, block)
        finally:
            shell.close()
        return count

    def _do(self, shell: Shell, block: Block) -> int:
        if block.mark in ("file", "program"):
            path = self.directory / block.argument
            before = path.read_text() + "\n\n" if block.mark == "program" and path.exists() else ""
            path.write_text(before + self.there(block.text) + "\n")
        elif block.mark == "from":
            if block.text not in (self.page.parent / block.argument).read_text():
                raise self._wrong(block, f"the block is not in {block.argument}")
        elif block.mark == "output":
            self._await(shell, block, block.argument, block.text.splitlines())
        elif block.mark == "stop":
            shell.stop(block.argument)
        elif block.mark == "run" and block.argument.startswith("background "):
            command, = commands(block.text)
            name = block.argument.removeprefix("background ")
            shell.start(name, self.there(command.text))
            self._await(shell, block, name, command.output)
            return 1
        elif block.mark in ("run", "eventually"):
            found = commands(block.text)
            for command in found:
                last = command is found[-1]
                code = int(block.argument.removeprefix("exit ")) if last and block.argument else 0
                self._once(shell, block, command, code, block.mark == "eventually" and last)
            return len(found)
        return 0

    def _once(self, shell: Shell, block: Block, command: Command, code: int, again: bool) -> None:
        deadline = time.monotonic() + OUTPUT_SECONDS
        while True:
            ended, printed = shell.run(self.there(command.text))
            given = [self.back(line) for line in printed]
            if ended == code and matches(command.output, given):
                return
            if not again or time.monotonic() > deadline:
                raise self._wrong(block, f"{command.text!r} ends with {ended} and prints", given, command.output)

    def _await(self, shell: Shell, block: Block, name: str, expected: list[str]) -> None:
        deadline = time.monotonic() + OUTPUT_SECONDS
        while True:
            given = [self.back(line) for line in shell.printed(name)]
            if matches(["…", *expected, "…"], given):
                return
            if time.monotonic() > deadline:
                raise self._wrong(block, f"{name!r} prints", given, expected)
            time.sleep(0.05)  # polling another process

    def _wrong(self, block: Block, what: str, given: list[str] | None = None, expected: list[str] | None = None) -> PageError:
        lines = [f"{self.page.name}:{block.line}: {what}"]
        if given is not None:
            lines += ["----", *given, "---- and not", *(expected or []), "----"]
        return PageError("\n".join(lines))


def checkout(directory: Path) -> None:
    """Copies what is under version control, or new and not ignored, as a fresh clone would have it."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                            check=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        source = ROOT / name
        if source.is_file():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            target.chmod(source.stat().st_mode)
