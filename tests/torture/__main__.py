"""`python -m tests.torture --minutes 20 --seed N --nodes 3 [--faults kill,cut,...]`, `python -m tests.torture kills --count 100`, and
`python -m tests.torture check DIRECTORY`. See README.md beside this."""
from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from pathlib import Path

from tests.torture.disk import Disks
from tests.torture.network import ENTERED, ROOT, Loopback, Namespaces, Network, ProxyNetwork
from tests.torture.run import KINDS, inflict, readable, report, save, schedule
from tests.torture.world import World

OUT = ROOT / "build" / "torture"
DISK_MIB = 192
NETWORKS = ("namespaces", "proxy", "loopback")


def main(argv: list[str]) -> int:
    """Runs; returns 0 if every promise was kept."""
    options = _options(argv)
    if options.command == "check":
        print(readable(_check(options.directory)))
        return 0
    kinds = ["kill"] if options.command == "kills" else (options.faults or ",".join(KINDS)).split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        print(f"unknown faults {', '.join(unknown)}; known are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    name = options.network or ("loopback" if not any(KINDS[k].needs == "network" for k in kinds) else
                               "proxy" if Namespaces.missing() else "namespaces")
    if name == "namespaces" and ENTERED not in os.environ:
        if why := Namespaces.missing():
            print(f"no network namespaces: {why}; use --network proxy", file=sys.stderr)
            return 2
        return Namespaces.enter("tests.torture", [*argv, "--seed", str(options.seed), "--network", name])
    return _run(options, kinds, name)


def _run(options: argparse.Namespace, kinds: list[str], network_name: str) -> int:
    directory = options.out or OUT / f"{options.command}-{options.nodes}-{options.seed}"
    shutil.rmtree(directory, ignore_errors=True)
    skipped: list[str] = []
    if any(KINDS[kind].needs == "disk" for kind in kinds) and (why := Disks.missing(directory / "try")):
        skipped.append(f"disk faults are left out: {why}")
        kinds = [kind for kind in kinds if KINDS[kind].needs != "disk"]
    if network_name == "loopback":
        left_out = [kind for kind in kinds if KINDS[kind].needs == "network"]
        skipped += [f"{kind} is left out: on loopback nothing is lost" for kind in left_out]
        kinds = [kind for kind in kinds if kind not in left_out]
    disk_mib = DISK_MIB if any(KINDS[kind].needs == "disk" for kind in kinds) else 0
    network = _network(network_name)
    world = World(directory, options.nodes, network, options.seed, per_second=options.rate, disk_mib=disk_mib)
    print(f"history in {directory}; nodes and load write their logs there", flush=True)
    early = ""
    try:
        world.start()
        early = inflict(world, schedule(options.seed, kinds), seconds=options.minutes * 60, count=options.count,
                        say=lambda text: print(text, flush=True))
        if not early:
            world.finish()
    except (TimeoutError, RuntimeError) as error:
        early = str(error)
    finally:
        world.close()
    replay = f"python -m tests.torture {' '.join(sys.argv[1:])}" + ("" if "--seed" in sys.argv else f" --seed {options.seed}")
    found = report(directory, seed=options.seed, nodes=options.nodes, network=network_name, ended_early=early, skipped=skipped,
                   notes=world.notes, replay=replay)
    save(directory, found)
    print(readable(found))
    return 0 if found["clean"] and not early else 1


def _network(name: str) -> Network:
    if name == "namespaces":
        return Namespaces(os.environ[ENTERED])
    return ProxyNetwork() if name == "proxy" else Loopback()


def _check(directory: Path) -> dict[str, object]:
    return report(directory, seed="?", nodes="?", network="?", ended_early="", skipped=[], notes=[], replay="?")


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Real faults on real processes, judged by their history.")
    parser.add_argument("command", nargs="?", default="run", choices=("run", "kills", "check"))
    parser.add_argument("directory", nargs="?", type=Path, help="check: the directory of a history")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long faults are inflicted")
    parser.add_argument("--count", type=int, default=0, help="how many faults, instead of --minutes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--nodes", type=int, default=3, choices=(1, 3, 5))
    parser.add_argument("--faults", help=f"some of {','.join(KINDS)}; all by default")
    parser.add_argument("--rate", type=float, default=500.0, help="messages per second")
    parser.add_argument("--network", choices=NETWORKS, help="namespaces for root, otherwise the suite's proxy")
    parser.add_argument("--out", type=Path, help="where history, logs and report go; build/torture/... by default")
    options = parser.parse_args(argv)
    if options.command == "kills" and not options.count:
        options.count = 100
    if options.command == "check" and options.directory is None:
        parser.error("check needs a directory")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
