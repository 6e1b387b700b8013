"""A run: faults of all kinds, one after the other, for so long or so many, and what came of it."""
from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.torture.checker import judge
from tests.torture.disk_faults import Damaged, DiskFull
from tests.torture.faults import Fault, Freeze, Kill, KillAll, KillConsumer, Rolling
from tests.torture.history import read
from tests.torture.network import ROOT
from tests.torture.network_faults import Bad, Cut, Flapping, OneWay
from tests.torture.progress import Progress, outages
from tests.torture.world import SHARDS, World

KINDS: dict[str, type[Fault]] = {kind.kind: kind for kind in (
    Kill, KillAll, Freeze, Rolling, KillConsumer, Cut, OneWay, Bad, Flapping, DiskFull, Damaged)}
CALM_SECONDS = 1.5  # at most, between two faults


def schedule(seed: int, kinds: Sequence[str]) -> Iterator[tuple[Fault, float]]:
    """Faults, and the calm after each. Every kind comes once in each round, in an order of its own."""
    chance = random.Random(seed)
    while True:
        for kind in chance.sample(list(kinds), len(kinds)):
            yield KINDS[kind].planned(chance), chance.uniform(0.2, CALM_SECONDS)


def inflict(world: World, faults: Iterator[tuple[Fault, float]], *, seconds: float, count: int,
            say: Callable[[str], None]) -> str:
    """Strikes until the time is over or, if `count`, so many times. Returns what ended it early, empty: nothing."""
    end = time.monotonic() + seconds
    struck: Counter[str] = Counter()
    try:
        for fault, calm in faults:
            if sum(struck.values()) >= count if count else time.monotonic() >= end:
                break
            began = time.monotonic()
            fault.strike(world)
            struck[fault.kind] += 1
            say(f"{sum(struck.values())}: {fault}: {time.monotonic() - began:.1f} s")
            time.sleep(calm)
    except (TimeoutError, RuntimeError) as error:
        return f"{fault}: {error}"
    return ""


def report(directory: Path, **more: Any) -> dict[str, Any]:
    """What a directory's history shows."""
    progress = Progress(SHARDS)
    faults = []
    for event in read(directory):
        progress.feed(event)
        if event["kind"] == "fault":
            faults.append(event)
        elif event["kind"] == "effect":
            faults[-1] = faults[-1] | {"at": event["at"]}
    verdict = judge(read(directory)).summary()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, **more, "faults": outages(progress, faults), **verdict}


def readable(found: dict[str, Any]) -> str:
    """A report for people."""
    lines = [f"seed {found['seed']}, {found['nodes']} nodes, {found['network']}: "
             f"{found['stored']} messages stored, {found['delivered']} delivered, {found['redelivered']} redeliveries, "
             f"{found['leases']} leases, {found['dead_letters']} dead letters",
             f"{'fault':12} {'times':>6} {'stored again, worst':>20} {'median':>8} {'delivered again, worst':>23} {'median':>8}"]
    for kind, one in found["faults"].items():
        stored, delivered = one["stored"], one["delivered"]
        lines.append(f"{kind:12} {one['faults']:>6} {_seconds(stored['worst']):>20} {_seconds(stored['median']):>8} "
                     f"{_seconds(delivered['worst']):>23} {_seconds(delivered['median']):>8}")
    counts = found["violations"]
    lines.append(", ".join(f"{rule} {counts.get(rule, 0)}" for rule in ("lost", "reordered", "stored twice", "two leases"))
                 + (", everything else 0" if found["clean"] else ""))
    for rule, examples in found["examples"].items():
        lines += [f"  {rule} ({counts[rule]}): {example}" for example in examples]
    if found["ended_early"]:
        lines.append(f"ended early: {found['ended_early']}")
    lines += found["skipped"] + found["notes"]
    lines.append("CLEAN" if found["clean"] and not found["ended_early"] else f"NOT CLEAN; replay: {found['replay']}")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def save(directory: Path, found: dict[str, Any]) -> None:
    """Beside the history."""
    (directory / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    (directory / "report.txt").write_text(readable(found) + "\n")
