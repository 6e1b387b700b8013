"""The command line: help that has examples, a start that loads little, a page that is up to date, and no command without a real test."""
from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import load

ROOT = Path(__file__).parents[2]
HEAVY = {"grpc", "google", "rich", "asyncio", "uvloop", "xxhash"}
# Calls of tests that run commands.
RUNNERS = {"run", "spillway", "run_alone", "started", "main", "create_subprocess_exec", "Terminal", "Popen"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/cli_page.py."""
    return load("cli_page")


def literals(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """The texts with which commands are called: of calls of RUNNERS, and of lists of arguments, up to the first that is no text. Before
    them may stand what starts Python."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            elements: list[Any] = node.args if called in RUNNERS else []
        else:
            elements = node.elts if isinstance(node, ast.List) else []
        texts: list[str] = []
        for one in elements:
            if isinstance(one, ast.Constant) and isinstance(one.value, str):
                texts.append(one.value)
            elif texts and texts[-1] != "-m":
                break
        if "spillway.client.cli" in texts:
            texts = texts[texts.index("spillway.client.cli") + 1:]
        if texts:
            yield tuple(texts)


def test_every_command_has_a_test_with_real_nodes(script: ModuleType) -> None:
    """In tests/integration: it is run there, by its name or an alias of it."""
    called = {texts for file in (ROOT / "tests" / "integration").glob("test_*.py") for texts in literals(ast.parse(file.read_text()))}
    lacking = [leaf.name for leaf in script.leaves() if not any(texts[:len(leaf.path)] == leaf.path for texts in called)]
    assert not lacking, f"no test of tests/integration runs: {', '.join(lacking)}"


def test_the_check_for_tests_can_fail() -> None:
    """A command that is only named is not run."""
    called = set(literals(ast.parse('run("top", "-o", "json")\nnothing("pause")\nrun(x, "park")\nf([sys.executable, "-m", '
                                    '"spillway.client.cli", "cluster", "drain", name])')))
    assert ("top", "-o", "json") in called and ("cluster", "drain") in called
    assert not any(texts[0] == "pause" for texts in called)


def test_every_command_has_help_with_examples(script: ModuleType) -> None:
    """Each begins with the command's own name; tests/integration/test_cli_examples.py runs them all."""
    found = list(script.leaves())
    assert len(found) > 45 and len({leaf.path for leaf in found}) == len(found)
    for leaf in found:
        assert leaf.command.help and leaf.examples, leaf.name
        names = [leaf.name, *([leaf.name.replace("dead-letter", "dlq")])]
        assert all(any(name in example for name in names) for example in leaf.examples), leaf.name


def test_every_command_has_the_same_options(script: ModuleType) -> None:
    """Output everywhere; a connection where there is one."""
    for leaf in script.leaves():
        if leaf.path[0] in script.PLUGGED:
            continue
        options = {option for parameter in leaf.command.params for option in parameter.opts}
        assert {"--output", "-o"} <= options, leaf.name
        if leaf.path[0] not in ("context", "completion"):
            assert {"--address", "-a", "--context", "--tls-ca", "--token-file"} <= options, leaf.name


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    """docs/cli.md has what the commands say."""
    assert script.page(script.PAGE.read_text()) == script.PAGE.read_text(), "run: .venv/bin/python scripts/cli_page.py"


@pytest.mark.parametrize(("what", "env"), [
    ('cli.main(["--help"])', {}), ('cli.main(["bench", "fairness", "--help"])', {}), ('cli.main(["context", "ls", "-o", "json"])', {}),
    ("cli.main([])", {"_SPILLWAY_COMPLETE": "complete_bash", "COMP_WORDS": "spillway dest", "COMP_CWORD": "1"})])
def test_help_and_completion_load_little(what: str, env: dict[str, str], tmp_path: Path) -> None:
    """Neither gRPC nor rich nor asyncio: what takes longer to load than an answer may take."""
    code = ("import atexit, sys\n"
            f"def told(): print(*sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
            f"atexit.register(told)\nfrom spillway.client import cli\n{what}\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
                          env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path), **env})
    assert done.stdout and done.stderr.strip() == "", done.stderr


def test_the_package_gives_what_it_says_it_has() -> None:
    """What is imported late is what types are checked against."""
    import spillway.client as package

    tree = ast.parse((ROOT / "client/spillway/client/__init__.py").read_text())
    checking = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in checking.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert homes == package._HOME_OF and sorted(homes) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__name__ == name or name == "Outcome"
    with pytest.raises(AttributeError):
        package.nothing  # noqa: B018
