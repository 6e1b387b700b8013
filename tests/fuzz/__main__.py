"""Fuzzes decoders: `python -m tests.fuzz` all of them, `--decoder NAME` some; `--replay FILE` shows what one does with an input.

Prints one line of JSON for each. Ends with 1 if one raised what it does not declare, took too long, or took its process along.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.decoder import Decoder, undeclared
from tests.fuzz.decoders import all_decoders

INPUTS = 100_000
GUIDED = 0.5
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/fuzz"
INPUTS_PER_SECOND_MIN = 50  # of a process that has not ended on its own


def part(decoder: Decoder, inputs: int, seed: int, guided: bool, corpus: Path) -> dict[str, Any]:
    """The result of one child process."""
    with tempfile.NamedTemporaryFile() as file:
        given = {"name": decoder.name, "modules": decoder.modules, "inputs": inputs, "seed": seed, "guided": guided,
                 "folder": str(FOLDER), "corpus": str(corpus), "result": file.name}
        command = [sys.executable, "-m", "tests.fuzz.run", json.dumps(given)]
        try:
            ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                                   cwd=ROOT, timeout=60 + inputs / INPUTS_PER_SECOND_MIN)
            how = f"exit code {ended.returncode}: {ended.stderr[-1000:]}"
        except subprocess.TimeoutExpired:
            how = "it did not end"
        text = Path(file.name).read_text()
        if text:
            found: dict[str, Any] = json.loads(text)
            return found
        return {"inputs": 0, "seconds": 0.0, "undeclared": 1, "failures": [{"error": f"the process is gone: {how}", "replay": " ".join(
            command[1:])}], "slowest_ms": 0.0, "slowest_bytes": 0, "memory_mib": 0}


def fuzz(decoder: Decoder, inputs: int, seed: int, share: float) -> dict[str, Any]:
    """Fuzzes one: first guided by coverage, then not."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    first = int(inputs * share) if importlib.util.find_spec("atheris") else 0
    with tempfile.TemporaryDirectory() as corpus:
        parts = [part(decoder, count, seed, guided, Path(corpus))
                 for count, guided in ((first, True), (inputs - first, False)) if count]
    total = {"decoder": decoder.name, "inputs": sum(p["inputs"] for p in parts), "guided": parts[0]["inputs"] if first else 0,
             "seconds": round(sum(p["seconds"] for p in parts), 1), "undeclared": sum(p["undeclared"] for p in parts)}
    slowest = max(parts, key=lambda p: float(p["slowest_ms"]))
    return {**total, "slowest_ms": slowest["slowest_ms"], "slowest_bytes": slowest["slowest_bytes"],
            "memory_mib": max(p["memory_mib"] for p in parts), "failures": [failure for p in parts for failure in p["failures"]]}


def replay(decoder: Decoder, file: Path) -> int:
    """Decodes a kept input, and shows what it raises."""
    with decoder.opened() as decode:
        error = undeclared(decoder, decode, file.read_bytes())
    if error is None:
        print(f"{decoder.name} takes {file}, or refuses it as it declares")
        return 0
    traceback.print_exception(error)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    decoders = all_decoders()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--decoder", action="append", choices=sorted(decoders), metavar="NAME", help="only this one; several times")
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"for each decoder (default: {INPUTS})")
    parser.add_argument("--seed", type=int, default=1, help="of the mutators (default: 1)")
    parser.add_argument("--guided", type=float, default=GUIDED, help=f"share of inputs that coverage guides (default: {GUIDED})")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="decode this input only")
    parser.add_argument("--list", action="store_true", help="print the names of all decoders")
    given = parser.parse_args(arguments)
    names = given.decoder or list(decoders)
    if given.list:
        print("\n".join(decoders))
        return 0
    if given.replay is not None:
        if len(names) != 1:
            parser.error("--replay needs one --decoder")
        return replay(decoders[names[0]], given.replay)
    failed = 0
    for name in names:
        result = fuzz(decoders[name], given.inputs, given.seed, given.guided)
        print(json.dumps(result), flush=True)
        failed += bool(result["undeclared"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
