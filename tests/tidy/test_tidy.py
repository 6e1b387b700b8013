"""The repository keeps its own rules."""
from __future__ import annotations

import ast
import configparser
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from spillway.broker.core.features import LEVELS
from spillway.peer.v1 import queue_view_pb2
from spillway.v1 import queue_service_pb2

ROOT = Path(__file__).resolve().parents[2]
ROOTS = ("protos", "client", "broker", "cluster")
TYPED = ("spillway/v1", "spillway/peer", "spillway/contract", "spillway/client", "spillway/broker", "spillway/cluster")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """A program of the environment, from the repository's root."""
    return subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)


def succeeds(code: str) -> None:
    """A fresh interpreter runs it without an error."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_the_namespace_has_no_package_file() -> None:
    """One stray spillway/__init__.py would hide the other folders' parts."""
    assert not [r for r in ROOTS if (ROOT / r / "spillway" / "__init__.py").exists()]


def test_every_part_is_typed() -> None:
    """Each part of the namespace has a py.typed."""
    found = {str(p.parent.relative_to(ROOT / r)) for r in ROOTS for p in (ROOT / r / "spillway").glob("*/py.typed")}
    parts = {str(p.relative_to(ROOT / r)) for r in ROOTS for p in (ROOT / r / "spillway").iterdir() if [*p.rglob("*.py")]}
    assert found == parts == set(TYPED)


def test_generated_code_is_what_the_protos_give() -> None:
    """Nobody edited it, nobody forgot it."""
    done = subprocess.run([sys.executable, "scripts/protos.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout


# The linter on one tree only: the environment's own paths to the sources would lay both trees over one another.
LINT = """
import sys
roots, here, options = sys.argv[1].split(":"), sys.argv[2].split(":"), sys.argv[3:]
sys.path[:] = roots + [p for p in sys.path[1:] if p not in here]
sys.argv[:] = ["lint-imports", *options]
from importlinter.cli import lint_imports_command
lint_imports_command()
"""


def contracts(root: Path, *options: str) -> tuple[int, dict[str, str]]:
    """(exit code, contract -> KEPT or BROKEN) of a tree."""
    roots, here = (":".join(str(r / folder) for folder in ROOTS) for r in (root, ROOT))
    done = subprocess.run([sys.executable, "-c", LINT, roots, here, *options], cwd=root, capture_output=True, text=True,
                          timeout=120)
    verdicts = dict(re.findall(r"^(.+) (KEPT|BROKEN)$", done.stdout, re.MULTILINE))
    assert verdicts, done.stdout + done.stderr
    return done.returncode, verdicts


def test_the_layers_hold() -> None:
    """Imports point down, the core is pure, and only the Raft adapter touches its library."""
    code, verdicts = contracts(ROOT)
    assert (code, set(verdicts.values())) == (0, {"KEPT"}), verdicts


def test_no_contract_is_asleep(tmp_path: Path) -> None:
    """With one forbidden import each, every import contract breaks: none looks at packages that do not exist."""
    for root in ROOTS:
        shutil.copytree(ROOT / root, tmp_path / root)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, line in (("protos/spillway/contract/limits.py", "import spillway.cluster.clock"),
                       ("client/spillway/client/errors.py", "import spillway.peer.v1.raft_pb2"),
                       ("broker/spillway/broker/core/policy.py", "import time"),
                       ("cluster/spillway/cluster/clock.py", "import pysyncobj")):
        with (tmp_path / path).open("a") as f:
            f.write(line + "\n")
    code, verdicts = contracts(tmp_path, "--no-cache")
    assert code and set(verdicts.values()) == {"BROKEN"}, verdicts
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert verdicts.keys() == {c["name"] for c in declared}


def test_only_the_raft_adapter_names_its_library() -> None:
    """pysyncobj's private names stay in one package."""
    users = {str(p.relative_to(ROOT).parent) for r in ROOTS for p in (ROOT / r).rglob("*.py")
             if re.search(r"^\s*(import|from) pysyncobj", p.read_text(), re.MULTILINE)}
    assert users == {"cluster/spillway/cluster/raft"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without a network."""
    out = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("hatchling")
    done = run("hatchling", "build", "-t", "wheel", "-d", str(out))
    assert not done.returncode, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_has_one_tree_and_no_tests(wheel: zipfile.ZipFile) -> None:
    """The wheel is the four folders laid over one another: each of their modules once, typed, below spillway/, and nothing
    of the tests, the demo or the benchmarks."""
    names = [n for n in wheel.namelist() if not n.startswith("spillway-")]
    assert len(names) == len(set(names))
    sources = {str(p.relative_to(ROOT / r)) for r in ROOTS for p in (ROOT / r / "spillway").rglob("*")
               if p.suffix in (".py", ".pyi") or p.name == "py.typed"}
    assert {n for n in names if n.endswith((".py", ".pyi", "py.typed"))} == sources
    assert {f"{part}/py.typed" for part in TYPED} <= sources
    assert {n.split("/")[0] for n in names} == {"spillway"}
    assert not [n for n in names if re.search(r"(^|/)(tests?|demo|bench)(/|$)|(^|/)(test_|conftest)|\.log$|\.pyc$", n)]


def test_the_wheels_programs_exist(wheel: zipfile.ZipFile) -> None:
    """Each entry point of the wheel names a module that is in it."""
    text = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(text)
    modules = {v.split(":")[0] for section in points.values() for v in section.values()}
    assert len(modules) >= 3
    for module in modules:
        path = module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & set(wheel.namelist()), module


def test_the_client_needs_no_storage_engine_and_no_consensus_library() -> None:
    """spillway.client imports where neither rocksdict nor pysyncobj is installed."""
    succeeds("import sys; sys.modules['rocksdict'] = sys.modules['pysyncobj'] = None\n"
            "import spillway.client, spillway.client.sync, spillway.client.cli\n"
            "assert not [m for m in sys.modules if m.startswith(('spillway.broker', 'spillway.cluster'))]")


def test_the_clients_names_are_where_they_are_looked_for() -> None:
    """What type checkers see of `spillway.client` is what it loads when asked, and all that it exports."""
    module = importlib.import_module("spillway.client")
    tree = ast.parse(Path(str(module.__file__)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: part.module for part in block.body if isinstance(part, ast.ImportFrom) for name in part.names}
    assert seen == module._HOME_OF
    assert sorted(seen) == sorted(module.__all__)
    assert [name for name in seen if not hasattr(module, name)] == []


def test_a_node_starts_without_what_only_terminals_need() -> None:
    """A node that starts takes its processor time from the others of its machine: libraries for terminals once took half of it."""
    succeeds("import sys, spillway.broker.main\n"
            "heavy = {'rich', 'typer', 'click', 'prompt_toolkit', 'pygments', 'aiohttp'} & set(sys.modules)\n"
            "assert not heavy, heavy")


def fields(descriptor: Descriptor) -> dict[str, tuple[int, int, bool]]:
    """name -> (number, wire type, repeated) of a message's fields."""
    length = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)
    wire = {**dict.fromkeys(length, 2), **dict.fromkeys((FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64), 1),
            **dict.fromkeys((FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32), 5)}
    return {f.name: (f.number, wire.get(f.type, 0), f.is_repeated) for f in descriptor.fields}


ADDED = {"AckScope": "AckRequest"}  # messages with only what is added to a public one
BETWEEN_NODES = 14  # numbers from here on


@pytest.mark.parametrize("view", queue_view_pb2.DESCRIPTOR.message_types_by_name)
def test_the_views_read_the_same_bytes(view: str) -> None:
    """Each of the broker's views of public messages has the fields of its original, by number and wire type. What only
    nodes tell each other has numbers that the original does not come near to."""
    public = queue_service_pb2.DESCRIPTOR.message_types_by_name[ADDED.get(view, view.removesuffix("View"))]
    seen = queue_view_pb2.DESCRIPTOR.message_types_by_name[view]
    between_nodes = {f.number for f in seen.fields} - {f.number for f in public.fields}
    assert min(between_nodes, default=BETWEEN_NODES) >= BETWEEN_NODES > max(f.number for f in public.fields)
    assert view in ADDED or fields(public) == {name: one for name, one in fields(seen).items() if one[0] not in between_nodes}


DEFINITIONS = {"message_type", "enum_type", "service", "field", "oneof_decl", "nested_type", "value", "method"}


def definitions(parent: Any, name: str, path: tuple[int, ...] = ()) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, path as of SourceCodeInfo) of everything that stands in a .proto file, what is nested included."""
    for kind, found in parent.ListFields():
        for i, item in enumerate(found if kind.name in DEFINITIONS else ()):
            made_by_compiler = ((kind.name == "nested_type" and item.options.map_entry)
                                or (kind.name == "oneof_decl" and item.name.startswith("_")))
            if not made_by_compiler:
                here = (*path, kind.number, i)
                yield f"{name}.{item.name}", here
                yield from definitions(item, f"{name}.{item.name}", here)


def test_every_definition_of_the_protocol_has_a_comment(tmp_path: Path) -> None:
    """Services, RPCs, messages, fields, enums and their values say what they mean."""
    protos = sorted(str(p.relative_to(ROOT / "protos")) for p in (ROOT / "protos").rglob("*.proto"))
    import grpc_tools

    done = run("grpc_tools.protoc", "-Iprotos", f"-I{Path(grpc_tools.__file__).parent / '_proto'}", "--include_source_info",
               f"--descriptor_set_out={tmp_path / 'set'}", *protos)
    assert not done.returncode, done.stderr
    files = FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    assert len(files) == len(protos)
    seen, silent = 0, []
    for file in files:
        commented = {tuple(at.path) for at in file.source_code_info.location
                     if (at.leading_comments or at.trailing_comments).strip()}
        for name, path in definitions(file, file.name):
            seen += 1
            if path not in commented:
                silent.append(name)
    assert seen > 150 and not silent


def test_the_page_about_upgrades_has_every_feature_level() -> None:
    """With the version that brings it."""
    told = re.findall(r"^\| (\d+) \| (\S+) \| .+ \|$", (ROOT / "docs/upgrade.md").read_text(), re.MULTILINE)
    assert told == [(str(number), level.since) for number, level in LEVELS.items()]


def test_the_page_about_metrics_has_every_metric() -> None:
    """As it is defined, with the question that it answers."""
    done = subprocess.run([sys.executable, "scripts/observability.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr


def test_the_image_has_all_that_the_extras_ask_for() -> None:
    """What pyproject.toml asks for, of everything that the image is to do, is pinned in requirements/image.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"--extra (\w+)", (ROOT / "scripts" / "image.sh").read_text())
    assert {"broker", "jwt", "dispatch", "cli"} <= set(extras)
    pinned = set(re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "requirements" / "image.txt").read_text(), re.MULTILINE))
    asked = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", one)[0]).lower() for one in asked}
    assert not names - {re.sub(r"[-_.]+", "-", one).lower() for one in pinned}
