"""The repository keeps its own rules."""
from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from spillway.peer.v1 import queue_view_pb2
from spillway.v1 import queue_service_pb2

ROOT = Path(__file__).resolve().parents[2]
ROOTS = ("protos", "client", "broker", "cluster")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """A program of the environment, from the repository's root."""
    return subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_namespace_has_no_package_file() -> None:
    """One stray spillway/__init__.py would hide the other folders' parts."""
    assert not [r for r in ROOTS if (ROOT / r / "spillway" / "__init__.py").exists()]


def test_every_part_is_typed() -> None:
    """Each part of the namespace has a py.typed."""
    for part in ("protos/spillway/v1", "protos/spillway/contract", "client/spillway/client", "broker/spillway/broker",
                 "cluster/spillway/cluster"):
        assert (ROOT / part / "py.typed").exists(), part


def test_generated_code_is_what_the_protos_give() -> None:
    """Nobody edited it, nobody forgot it."""
    done = subprocess.run([sys.executable, "scripts/protos.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout


def test_the_layers_hold() -> None:
    """Imports point down, the core is pure, and only the Raft adapter touches its library."""
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True,
                          env={"PYTHONPATH": ":".join(ROOTS), "PATH": "/usr/bin:/bin"})
    assert not done.returncode, done.stdout + done.stderr


def test_only_the_raft_adapter_names_its_library() -> None:
    """pysyncobj's private names stay in one package."""
    users = {str(p.relative_to(ROOT).parent) for r in ROOTS for p in (ROOT / r).rglob("*.py")
             if re.search(r"^\s*(import|from) pysyncobj", p.read_text(), re.MULTILINE)}
    assert users == {"cluster/spillway/cluster/raft"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the wheel."""
    out = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("hatchling")
    done = run("hatchling", "build", "-t", "wheel", "-d", str(out))
    assert not done.returncode, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl"))).namelist()


def test_the_wheel_has_one_tree_and_no_tests(wheel: list[str]) -> None:
    """Everything is below spillway/, and nothing of the tests, the demo or the benchmarks."""
    assert {n.split("/")[0] for n in wheel if not n.startswith("spillway-")} == {"spillway"}
    for name in ("spillway/v1/queue_service_pb2.py", "spillway/client/py.typed", "spillway/broker/core/shard.py",
                 "spillway/cluster/raft/host.py"):
        assert name in wheel
    assert not [n for n in wheel if "test_" in n or n.startswith(("demo", "bench"))]


def test_the_client_needs_no_storage_engine_and_no_consensus_library() -> None:
    """spillway.client imports where neither rocksdict nor pysyncobj is installed."""
    code = ("import sys; sys.modules['rocksdict'] = sys.modules['pysyncobj'] = None\n"
            "import spillway.client, spillway.client.sync, spillway.client.cli\n"
            "assert not [m for m in sys.modules if m.startswith(('spillway.broker', 'spillway.cluster'))]")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def fields(descriptor: Descriptor) -> dict[str, tuple[int, int, bool]]:
    """name -> (number, wire type, repeated) of a message's fields."""
    wire = {FieldDescriptor.TYPE_STRING: 2, FieldDescriptor.TYPE_BYTES: 2, FieldDescriptor.TYPE_MESSAGE: 2,
            FieldDescriptor.TYPE_FIXED64: 1}
    return {f.name: (f.number, wire[f.type], f.is_repeated) for f in descriptor.fields}


@pytest.mark.parametrize(("public", "view"), [
    (queue_service_pb2.ProduceRequest, queue_view_pb2.ProduceRequestView),
    (queue_service_pb2.ProduceRecord, queue_view_pb2.ProduceRecordView)])
def test_the_views_read_the_same_bytes(public: type, view: type) -> None:
    """The broker's views of public requests have their field numbers and wire types."""
    assert fields(public.DESCRIPTOR) == fields(view.DESCRIPTOR)  # type: ignore[attr-defined]


def undocumented() -> Iterator[str]:
    """Definitions in .proto files without a comment above or behind them."""
    for path in sorted((ROOT / "protos").rglob("*.proto")):
        before = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            text = line.strip()
            if re.match(r"(message|enum|service|rpc|oneof)\b|[\w.<>, ]+ \w+ = \d+", text) and not text.startswith(
                    ("syntax", "package", "import", "option", "reserved")) and not before.startswith("//"):
                yield f"{path.relative_to(ROOT)}:{number}: {text}"
            before = text


def test_every_definition_of_the_protocol_has_a_comment() -> None:
    """Messages, fields, enum values and RPCs say what they mean."""
    assert not list(undocumented())


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for p in sorted(ROOT.rglob("*.md"))
                                  if not {".venv", "build", ".pytest_cache"} & set(p.parts)])
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    """Relative links of the documentation exist."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target
