"""What the documentation refers to is there: files, headings, commands, and what the programs say."""
from __future__ import annotations

import ast
import functools
import importlib.metadata
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from spillway.client.commands import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SERVICES = ROOT / "broker" / "spillway" / "broker" / "services"
PAGES = [str(p.relative_to(ROOT)) for p in sorted(ROOT.rglob("*.md"))
         if not {".venv", "build", "node_modules", ".pytest_cache"} & set(p.relative_to(ROOT).parts)]
ALERTS = set(re.findall(r"runbook_url: docs/runbook\.md#([a-z-]+)", (ROOT / "helm" / "spillway" / "rules" / "spillway.yaml").read_text()))


def prose(text: str) -> str:
    """A page without its fenced blocks: what is in them is no link and no heading."""
    return re.sub(r"^(```+)[^\n]*\n.*?^\1`*$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page.read_text()), re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
        number = next(n for n in itertools.count() if (slug if not n else f"{slug}-{n}") not in found)
        found.add(slug if not number else f"{slug}-{number}")
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', page.read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    """Relative links and pictures exist, and so do the headings that links name."""
    here = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)|(?:src|srcset|href)=\"([^\"]+)\"", prose(here.read_text())):
        path, _, anchor = "".join(target).partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        there = here.parent / path if path else here
        assert there.exists(), f"{page} links to {path}, which does not exist"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{page} links to {path}#{anchor}; the headings there are {sorted(anchors(there))}"


def test_anchors_are_as_github_makes_them(tmp_path: Path) -> None:
    """Punctuation goes, spaces are hyphens, repetitions are numbered, code in blocks is no heading."""
    page = tmp_path / "page.md"
    page.write_text("# A node, `more` (of 3)?\n## Same\n## Same\n```\n# no heading\n```\n### [A link](x.md) & over_there\n")
    assert anchors(page) == {"a-node-more-of-3", "same", "same-1", "a-link--over_there"}


def test_the_index_has_every_page() -> None:
    """Nobody writes a page that nobody finds."""
    index = (DOCS / "README.md").read_text()
    assert not [p.name for p in DOCS.glob("*.md") if p.name != "README.md" and f"({p.name})" not in index]


# -- what the programs say ----------------------------------------------------------------------------------------------


def wordings(node: ast.expr, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """The texts that an expression can give, with … for what is known only when it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(one) for one in itertools.product(*(wordings(part, functions) for part in parts))]
        case ast.FormattedValue(value=value):
            return wordings(value, functions) if isinstance(value, ast.IfExp) else ["…"]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return [a + b for a in wordings(left, functions) for b in wordings(right, functions)]
        case ast.IfExp(body=body, orelse=other):
            return wordings(body, functions) + wordings(other, functions)
        case ast.Call(func=ast.Name(id=name)) if name in functions:
            returned = next(n for n in ast.walk(functions[name]) if isinstance(n, ast.Return))
            assert returned.value is not None
            return wordings(returned.value, functions)
        case _:
            return ["…"]


def said(file: str) -> Iterator[ast.expr]:
    """The texts of `cluster status` and `explain` for people, as expressions."""
    for node in ast.walk(ast.parse((SERVICES / file).read_text())):
        match node:
            case ast.Call(func=ast.Name(id="say"), args=[what, remedy]):
                yield from (what, remedy)
            case ast.Tuple(elts=[ast.Attribute(attr=cause), text, _]) if cause.startswith("STALL_CAUSE_"):
                yield text
            case ast.keyword(arg="sentence", value=text):
                yield text
            case ast.AugAssign(target=ast.Attribute(attr="sentence"), value=text):
                yield text


def short(text: str) -> str:
    """A wording as the runbook has it: what varies is one …, without the spaces and the end of the line around it."""
    return re.sub(r"…(?:[ /,:]*…)+", "…", " ".join(text.split())).rstrip(".").strip("… ")


@pytest.mark.parametrize(("file", "least"), [("cluster_status.py", 16), ("explain.py", 17)])
def test_the_runbook_knows_everything_that_is_said(file: str, least: int) -> None:
    """Each sentence about a problem, and each remedy, that `spillway cluster status` and `spillway explain` can print is in the runbook."""
    functions = {n.name: n for n in ast.walk(ast.parse((SERVICES / file).read_text())) if isinstance(n, ast.FunctionDef)}
    told = {short(one) for expression in said(file) for one in wordings(expression, functions)} - {""}
    assert len(told) >= least, told
    runbook = " ".join((DOCS / "runbook.md").read_text().split())
    assert not sorted(one for one in told if one not in runbook)


def test_the_runbook_has_what_alerts_link_to() -> None:
    """The chart's, by anchors that stay."""
    assert len(ALERTS) > 10 and anchors(DOCS / "runbook.md") >= ALERTS


# -- commands -----------------------------------------------------------------------------------------------------------


def typed(page: str) -> Iterator[str]:
    """What a page says to type that begins with `spillway`."""
    text = (ROOT / page).read_text()
    for line in re.sub(r"\\\n\s*>?", " ", text).splitlines():
        if found := re.match(r"^\s*(?:\$ )?(?:\.venv/bin/)?(spillway [a-z-]+(?![\w:]).*)$", line):
            yield found[1]
        yield from re.findall(r"`(?:\.venv/bin/)?(spillway [a-z-]+(?![\w:])[^`]*)`", line)


def check_command(line: str) -> None:
    """Parses a command as the program would, and does nothing else. Raises SystemExit or the parser's error."""
    words = shlex.split(re.split(r"\s#\s|\s[|&]|\s<{1,3}|\s>{1,2}|;\s", line + " ")[0])[1:]
    plugged = {point.name: point for point in importlib.metadata.entry_points(group="spillway.commands")}
    if words[0] in plugged:
        plugged_parser(words[0]).parse_args(words[1:])
        return
    command: Any = commands()
    context = command.make_context("spillway", words[:1])
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        if words or not hasattr(command, "resolve_command"):
            context = command.make_context(name, words[:1] if hasattr(command, "resolve_command") else list(words), parent=context)
        else:
            return  # a group by itself, as in "`spillway cluster`"


@functools.cache
def commands() -> Any:
    """The commands that talk to a cluster, for their parser: it is slow to make."""
    return typer.main.get_command(app)


def plugged_parser(name: str) -> Any:
    """The parser of a command that parses its own arguments."""
    from spillway.broker.config import parser as settings
    from spillway.client.dispatcher.program import parser as dispatch

    found = dispatch() if name == "dispatch" else settings(f"spillway {name}")
    if name == "restore":
        found.add_argument("backup", nargs="?")
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_commands_of_a_page_exist(page: str) -> None:
    """With these arguments and options. What has an ellipsis in it is left out, and so are names of commands in a sentence."""
    for line in typed(page):
        bare = re.fullmatch(r"spillway [a-z-]+( [a-z-]+)?", line) is not None
        if "…" in line or "..." in line or "$(" in line or "[OPTIONS]" in line:  # the last: how a command is used
            continue
        try:
            check_command(line)
        except SystemExit as error:
            assert error.code in (0, None), f"{page}: {line}"
        except Exception as error:
            missing = type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError")
            assert (bare and missing) or type(error).__name__ == "Exit", f"{page}: {line}: {error!r}"


def test_a_command_that_does_not_exist_is_found_out() -> None:
    """So is an option that does not, and an argument that is missing."""
    for line in ("spillway nothing", "spillway cluster nothing", "spillway explain billing --nothing", "spillway serve --nothing 1",
                 "spillway cluster drain", "spillway park billing --for 10parsecs"):
        with pytest.raises((Exception, SystemExit)) as caught:
            check_command(line)
        assert getattr(caught.value, "code", 2) == 2
