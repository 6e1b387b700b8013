"""protos/ works with another toolchain: a Go program made from it talks to real nodes."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_process import ClusterProcesses

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "go"
PLUGINS = ("google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.10", "google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.5.1")
PACKAGE = "spillway.test/client/spillwayv1"
BUILD_SECONDS = 300


def go(*argv: str, cwd: Path) -> None:
    """Runs the go command; skips the test if modules cannot be had."""
    env = dict(os.environ, GOBIN=str(CACHE / "bin"), GOFLAGS="-mod=mod", CGO_ENABLED="0")
    done = subprocess.run(["go", *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=BUILD_SECONDS)
    if done.returncode and any(s in done.stderr for s in ("dial tcp", "no such host", "i/o timeout", "connection refused")):
        pytest.skip(f"Go modules cannot be fetched here: {done.stderr.strip().splitlines()[-1]}")
    assert not done.returncode, done.stderr


@pytest.fixture(scope="module")
def program() -> Path:
    """The compiled client. Its generated code is made anew, never committed."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    source = CACHE / "client"
    shutil.rmtree(source, ignore_errors=True)
    (source / "spillwayv1").mkdir(parents=True)
    here = Path(__file__).parent / "go"
    shutil.copy(here / "main.go", source / "main.go")
    shutil.copy(here / "go.mod.template", source / "go.mod")
    for plugin in PLUGINS:
        if not (CACHE / "bin" / plugin.split("/")[-1].split("@")[0]).exists():
            go("install", plugin, cwd=ROOT)
    import grpc_tools

    protos = sorted(str(p.relative_to(ROOT / "protos")) for p in (ROOT / "protos" / "spillway" / "v1").glob("*.proto"))
    mapping = [f"--{kind}_opt=M{p}={PACKAGE}" for p in protos for kind in ("go", "go-grpc")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
         f"--go_out={source}", f"--go-grpc_out={source}", "--go_opt=module=spillway.test/client",
         "--go-grpc_opt=module=spillway.test/client", *mapping, *protos],
        check=True, env=dict(os.environ, PATH=f"{CACHE / 'bin'}{os.pathsep}{os.environ['PATH']}"))
    go("mod", "tidy", cwd=source)
    go("build", "-o", str(CACHE / "spillway-client"), ".", cwd=source)
    return CACHE / "spillway-client"


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_go_client_produces_leases_and_acknowledges(
        program: Path, cluster: Callable[..., ClusterProcesses], nodes: int) -> None:
    """Code generated for Go from protos/ works against any one node, which forwards to the leaders of the shards."""
    address = cluster(nodes=nodes).addresses[0]
    done = subprocess.run([str(program), address], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "OK\n"), done.stderr
