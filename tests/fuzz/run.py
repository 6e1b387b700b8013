"""One decoder and many inputs, in a process of its own.

`guided` inputs come first: libFuzzer (atheris) looks for those that reach new branches of the decoder's modules. The others are
edits of the valid samples and of what the guided part has kept, in a process whose modules are not instrumented, several
times as fast. Both use the edits of `mutate`, and what libFuzzer does by itself half of the time.
"""
from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

INPUT_BYTES_MAX = 4096
SECONDS_MAX = 30.0  # for one input: more is a failure; far above what a busy machine makes of it
MEMORY_BYTES_MAX = 2 << 30  # beyond what the process has before the first input: then allocations fail
FAILURES_MAX = 20  # kept of a decoder; one for each place that raises
WATCH_SECONDS = 1.0


class Run:
    """Gives inputs to a decoder, counts, and keeps those that fail."""

    def __init__(self, decoder: Any, decode: Callable[[bytes], object], folder: Path, inputs: int, result: Path) -> None:
        from tests.fuzz.decoder import undeclared

        self._decoder = decoder
        self._decode = decode
        self._undeclared = undeclared
        self._folder = folder
        self._inputs = inputs
        self._result = result
        self._failures: dict[str, dict[str, str]] = {}
        self._failed = 0
        self._slowest = 0.0
        self._slowest_input = b""
        self._current = b""
        self._since = self._started = time.perf_counter()
        self.count = 0
        signal.signal(signal.SIGALRM, self._watch)
        signal.setitimer(signal.ITIMER_REAL, WATCH_SECONDS, WATCH_SECONDS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES_MAX, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def one(self, data: bytes) -> None:
        """Decodes an input. Ends the process after the last one."""
        self._current = data
        since = self._since = time.perf_counter()
        error = self._undeclared(self._decoder, self._decode, data)
        took = time.perf_counter() - since
        self._since = 0.0
        if error is not None:
            self._failed += 1
            self._keep(data, error)
        if took > self._slowest:
            self._slowest, self._slowest_input = took, data
        self.count += 1
        if self.count >= self._inputs:
            self.end()

    def _keep(self, data: bytes, error: BaseException) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        if place in self._failures or len(self._failures) >= FAILURES_MAX:
            return
        file = self._folder / f"{self._decoder.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        file.write_bytes(data)
        self._failures[place] = {"error": f"{place}: {error}"[:300], "replay": shlex.join(
            ["python", "-m", "tests.fuzz", "--decoder", self._decoder.name, "--replay", str(file)])}

    def _watch(self, number: int, frame: object) -> None:
        if self._since and time.perf_counter() - self._since > SECONDS_MAX:
            self._failed += 1
            self._keep(self._current, TimeoutError(f"it takes longer than {SECONDS_MAX:g} s").with_traceback(_here()))
            self.count += 1
            self.end()

    def end(self) -> NoReturn:
        """Writes the result, and ends the process as it is: neither atheris nor gRPC let it end otherwise in all cases."""
        took = time.perf_counter() - self._started
        self._result.write_text(json.dumps({
            "inputs": self.count, "seconds": round(took, 1), "undeclared": self._failed, "failures": list(self._failures.values()),
            "slowest_ms": round(self._slowest * 1000, 1), "slowest_bytes": len(self._slowest_input),
            "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}))
        sys.stdout.flush()
        os._exit(0)


def _here() -> Any:
    try:
        raise RuntimeError
    except RuntimeError as error:
        return error.__traceback__


def plain(name: str, folder: Path, corpus: Path, inputs: int, seed: int, result: Path) -> NoReturn:
    """Edits of samples and of the corpus, by a seeded generator: the same again for the same seed and corpus."""
    from tests.fuzz.decoders import all_decoders
    from tests.fuzz.mutate import mutated

    decoder = all_decoders()[name]
    found = [file.read_bytes() for file in sorted(corpus.iterdir())]
    samples = (*decoder.samples, *found)
    rnd = random.Random(seed)
    with decoder.opened() as decode:
        run = Run(decoder, decode, folder, inputs, result)
        for sample in samples[:inputs - 1]:
            run.one(sample)
        while True:
            run.one(mutated(rnd, samples, INPUT_BYTES_MAX))


def product() -> set[str]:
    """The names of all modules of the product."""
    return {".".join(file.relative_to(root).with_suffix("").parts) for root in map(Path, sys.path)
            for file in root.glob("spillway/**/*.py")}


def guided(name: str, modules: list[str], folder: Path, corpus: Path, inputs: int, seed: int, result: Path) -> NoReturn:
    """What libFuzzer makes of the samples and of the corpus, which it adds to."""
    import atheris

    # It includes whole packages only: what is left out is every other module.
    with atheris.instrument_imports(include=["spillway"], exclude=sorted(product() - {*modules})):
        from tests.fuzz.decoders import all_decoders
    from tests.fuzz.mutate import EDITS, edited

    decoder = all_decoders()[name]
    for sample in decoder.samples:
        (corpus / hashlib.sha256(sample).hexdigest()).write_bytes(sample)

    def mutate(data: bytes, size_max: int, seed: int) -> bytes:
        rnd = random.Random(seed)
        if rnd.random() < 0.5:
            return bytes(atheris.Mutate(data, size_max))
        for _ in range(1 + rnd.getrandbits(2)):
            data = edited(data, (rnd.randrange(EDITS), rnd.getrandbits(32), rnd.getrandbits(32)), decoder.samples)
        return data[:size_max]

    with decoder.opened() as decode:
        run = Run(decoder, decode, folder, inputs, result)
        atheris.Setup([name, f"-max_len={INPUT_BYTES_MAX}", f"-seed={seed}", "-timeout=0", "-rss_limit_mb=0", "-verbosity=0",
                       "-close_fd_mask=0", "-print_final_stats=0", str(corpus)], run.one, custom_mutator=mutate)
        atheris.Fuzz()
    run.end()


def main(arguments: str) -> NoReturn:
    """Called by `__main__` in a child process, with all that it needs in JSON."""
    given = json.loads(arguments)
    folder, corpus, result = Path(given["folder"]), Path(given["corpus"]), Path(given["result"])
    if given["guided"]:
        guided(given["name"], given["modules"], folder, corpus, given["inputs"], given["seed"], result)
    plain(given["name"], folder, corpus, given["inputs"], given["seed"], result)


if __name__ == "__main__":
    main(sys.argv[1])
