"""Generate the Python code of protos/, or check that what is committed is what would be generated.

Usage: python scripts/protos.py [--check]
"""
from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(out: Path) -> list[Path]:
    """Generate all modules below `out`; returns their paths relative to it."""
    import grpc_tools

    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}",
         f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
         f"--python_out={out}", f"--mypy_out=quiet:{out}",
         f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *sources],
        check=True, env=env)
    # A file without a service still gets an empty _pb2_grpc module: not worth keeping.
    for path in out.rglob("*_pb2_grpc.py"):
        if "class " not in path.read_text():
            path.unlink()
            path.with_suffix(".pyi").unlink(missing_ok=True)
    return sorted(p.relative_to(out) for p in out.rglob("*") if p.name.endswith(GENERATED))


def main() -> int:
    """Generate in place, or with --check compare and report."""
    if sys.argv[1:] != ["--check"]:
        generate(PROTOS)
        return 0
    with tempfile.TemporaryDirectory() as tmp:
        fresh = generate(Path(tmp))
        kept = sorted(p.relative_to(PROTOS) for p in PROTOS.rglob("*") if p.name.endswith(GENERATED))
        stale = [p for p in fresh if p not in kept or not filecmp.cmp(Path(tmp) / p, PROTOS / p, shallow=False)]
        stale += [p for p in kept if p not in fresh]
    if stale:
        print("generated code is not what protos/ gives; run `make protos`:", *stale, sep="\n  ")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
