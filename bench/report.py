"""Results as tables for people."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [[_text(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
             for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.2f}"
    return str(cell)


def render(results: dict[str, Any]) -> str:
    """All tables."""
    parts = [_machine(results)]
    for letter, section in (("a", _throughput),):
        if letter in results:
            parts.append(section(results))
    parts += [f"Workload {letter} FAILED: {why}" for letter, why in results["failed"].items()]
    return "\n\n".join(parts)


def _machine(results: dict[str, Any]) -> str:
    m, limits = results["machine"], results["limits"]
    grpc, rocks = limits["grpc"], limits["rocksdb"]
    return "\n".join([
        f"{m['cores_usable']} cores, {m['cpu']}, Linux {m['kernel']}, {m['filesystem']}, Python {m['python']}, "
        f"commit {m['commit'][:10]}{' with changes' if m['uncommitted_changes'] else ''}, "
        f"load before {m['load_average_before']}"
        + (", QUICK: not for comparison" if results["quick"] else ""),
        "", table(("raw limits of this run", "messages/s", "one alone p50 ms", "p99 ms"), [
            (f"gRPC stream there and back, batches of {grpc['batch']}", grpc["messages_per_second"],
             grpc["round_trip"]["p50_ms"], grpc["round_trip"]["p99_ms"]),
            (f"RocksDB write and sync, batches of {rocks['batch']}", rocks["messages_per_second"],
             rocks["single_sync"]["p50_ms"], rocks["single_sync"]["p99_ms"])])])


def _throughput(results: dict[str, Any]) -> str:
    limits = results["limits"]
    rows = []
    for r in results["a"]:
        rate, cores = r["messages_per_second"], r["cores"]
        brokers = sum(v for k, v in cores.items() if k not in ("producer", "consumer"))
        rows.append((f"{r['nodes']} node{'s' if r['nodes'] > 1 else ''}, {r['queues']:,} queues", rate,
                     rate / limits["grpc"]["messages_per_second"], rate / limits["rocksdb"]["messages_per_second"],
                     brokers, cores["producer"], cores["consumer"], r["produced"] - r["settled"]))
    return "a  Throughput, 1 KiB, produced to acknowledged\n" + table(
        ("", "messages/s", "of raw gRPC", "of raw RocksDB", "brokers' cores", "producer's", "consumer's", "missing"), rows)
