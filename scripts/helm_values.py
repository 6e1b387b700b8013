"""Writes the table of values in helm/spillway/README.md from the comments of values.yaml; `--check` only compares.

A comment that begins with `# --` stands above the value that it describes. A map without one is described by what is in it.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

CHART = Path(__file__).resolve().parents[1] / "helm" / "spillway"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"


def documented(text: str) -> list[tuple[str, str, str]]:
    """(path, default, description) of every value with a comment, in the file's order. Raises ValueError for a value without one."""
    import yaml

    defaults = yaml.safe_load(text)
    rows: list[tuple[str, str, str]] = []
    path: list[tuple[int, str]] = []  # indentation, key
    said, below = "", -1  # a description that waits for its value; what is inside a described value is not described
    for number, line in enumerate(text.splitlines(), 1):
        if (comment := re.match(r" *# -- (.*)", line)) is not None:
            said = comment[1]
            continue
        key = re.match(r"( *)([A-Za-z][A-Za-z0-9]*):", line)
        if key is None:
            continue
        indent = len(key[1])
        if 0 <= below < indent:
            continue
        below = -1
        path = [*(part for part in path if part[0] < indent), (indent, key[2])]
        value = defaults
        for _, name in path:
            value = value[name]
        name = ".".join(name for _, name in path)
        if said:
            rows.append((name, json.dumps(value), said))
            said, below = "", indent
        elif not isinstance(value, dict) or not value:
            raise ValueError(f"values.yaml:{number}: {name} has no description; write `# -- ...` above it")
    return rows


def table(text: str) -> str:
    """The rows as Markdown."""
    def cell(content: str) -> str:
        return content.replace("|", "\\|")
    return "| value | default | what it is |\n| --- | --- | --- |\n" + "".join(
        f"| `{name}` | `{cell(default)}` | {cell(what)} |\n" for name, default, what in documented(text))


def main(argv: list[str]) -> int:
    """Returns 1 if `--check` finds a difference."""
    readme = CHART / "README.md"
    old = readme.read_text()
    head, _, rest = old.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = head + BEGIN + table((CHART / "values.yaml").read_text()) + END + tail
    if "--check" in argv:
        if new != old:
            print("helm/spillway/README.md is not what values.yaml says; run scripts/helm_values.py", file=sys.stderr)
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
