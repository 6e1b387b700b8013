"""Writes the generated parts of docs/cli.md from the commands themselves; `--check` only says whether they are up to date.

The parts stand between lines `<!-- begin NAME -->` and `<!-- end NAME -->`; what is around them is written by hand.
"""
from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
from spillway.client.cli import EXIT_CODES, PLUGGED
from spillway.client.commands import app
from spillway.client.connecting import OPTIONS

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
CONNECTION = {"context", *OPTIONS}  # options that every command has which talks to a cluster


class Leaf(NamedTuple):
    """A command that does something, by its whole name without `spillway`."""

    path: tuple[str, ...]
    command: Any

    @property
    def name(self) -> str:
        """As it is typed."""
        return " ".join(("spillway", *self.path))

    @property
    def examples(self) -> list[str]:
        """The examples of its help."""
        return [line.strip() for line in (self.command.epilog or "").splitlines() if line.startswith("  ")]

    @property
    def connects(self) -> bool:
        """Whether it has the options of a connection."""
        return any(one.name == "context" for one in self.command.params)


def leaves(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """All commands, in the order of the help; aliases are left out."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from leaves(command, (*path, name))
        else:
            yield Leaf((*path, name), command)


def commands() -> str:
    """A section for each command."""
    return "\n\n".join(_section(leaf) for leaf in leaves())


def exit_codes() -> str:
    """The table of exit codes."""
    return "\n".join(("| code | meaning |", "| --- | --- |", *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())))


def connection() -> str:
    """The table of the options of a connection."""
    leaf = next(leaf for leaf in leaves() if leaf.connects)
    rows = [_option(one, _context(leaf.command)) for one in leaf.command.params if one.name in CONNECTION]
    return "\n".join(("| option | what it is |", "| --- | --- |", *rows))


def _section(leaf: Leaf) -> str:
    command = leaf.command
    context = _context(command)
    shown = [one for one in command.params if one.name not in {*CONNECTION, "help"} or not leaf.connects]
    rows = [_option(one, context) for one in shown if one.name != "help"]
    usage = " ".join((leaf.name, *command.collect_usage_pieces(context)))
    parts = [f"### {leaf.name}", _joined(command.help or ""), f"```\n{usage}\n```"]
    if rows:
        parts.append("\n".join(("| | |", "| --- | --- |", *rows)))
    if leaf.path[0] in PLUGGED:
        parts.append(f"`{leaf.name} --help` lists its options.")
    parts.append("```\n" + "\n".join(leaf.examples) + "\n```")
    return "\n\n".join(parts)


def _context(command: Any) -> Any:
    return command.make_context(command.name, [], resilient_parsing=True)


def _option(one: Any, context: Any) -> str:
    names, told = (_joined(text).replace("|", "\\|") for text in one.get_help_record(context))
    return f"| `{names}` | {told} |"


def _joined(text: str) -> str:
    return " ".join(text.split())


def page(text: str) -> str:
    """The page with its generated parts as they should be."""
    for name, made in (("commands", commands()), ("exit codes", exit_codes()), ("connection", connection())):
        text, count = re.subn(rf"(?<=<!-- begin {name} -->\n).*?(?=<!-- end {name} -->)", lambda _, made=made: made + "\n", text,
                              flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{PAGE} has no part {name!r}")
    return text


def main() -> int:
    """Writes or checks the page."""
    text = PAGE.read_text()
    wanted = page(text)
    if "--check" in sys.argv[1:]:
        if text != wanted:
            print(f"{PAGE} is not up to date: .venv/bin/python scripts/cli_page.py", file=sys.stderr)
        return int(text != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
