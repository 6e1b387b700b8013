"""Results as tables for people."""
from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [[_text(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
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
    for letter, section in (("a", _throughput), ("b", _round_trip), ("c", _neighbour), ("d", _memory), ("e", _failover),
                            ("f", _pick), ("g", _isolation), ("h", _changes), ("i", _transfer), ("j", _tracing)):
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
                     brokers, cores["producer"], cores["consumer"],
                     r["machine_cores"]["others"] + r["machine_cores"]["stolen"], r["produced"] - r["settled"]))
    return "a  Throughput, 1 KiB, produced to acknowledged\n" + table(
        ("", "messages/s", "of raw gRPC", "of raw RocksDB", "brokers' cores", "producer's", "consumer's", "strangers'",
         "missing"), rows)


def _round_trip(results: dict[str, Any]) -> str:
    limits = results["limits"]
    floor = limits["grpc"]["round_trip"]["p50_ms"] + limits["rocksdb"]["single_sync"]["p50_ms"]
    rows = []
    for r in results["b"]:
        for key, what in (("produced", "stored"), ("delivered", "delivered"), ("settled", "acknowledgement confirmed")):
            rows.append((f"{r['nodes']} node{'s' if r['nodes'] > 1 else ''}, sent until {what}", r[key]["p50_ms"],
                         r[key]["p99_ms"], r[key]["p50_ms"] / floor))
    return "b  Round trip of one message, nothing else going on\n" + table(
        ("", "p50 ms", "p99 ms", "p50 of raw gRPC + sync"), rows)


def _neighbour(results: dict[str, Any]) -> str:
    c = results["c"]
    rows = []
    for key, what in (("to_handler", "sent until its handler starts"), ("to_stored", "sent until stored")):
        for phase, when in (("before", "before the dump"), ("while_dumping", "while the dump is taken in"),
                            ("during", "from the dump on")):
            one = c[key][phase]
            rows.append((f"{what}, {when}", one["count"], one["p50_ms"], one["p99_ms"], one["max_ms"]))
    return (f"c  100 quiet tenants beside one that dumps 50,000 messages (stored in {c['burst_stored_seconds']} s; "
            f"backlog at the end {c['burst_backlog_at_end']:,}; {c['handled_per_second']:,} handled/s of 1,000)\n"
            + table(("quiet tenants", "messages", "p50 ms", "p99 ms", "max ms"), rows))


def _memory(results: dict[str, Any]) -> str:
    rows = []
    for r in results["d"]:
        for turn in ("first", "second"):
            rows.append((f"{r['queues']:,} queues, {turn} round", r["rss_fresh"] / 1e6, r["warm_rss_drained"] / 1e6,
            r[f"{turn}_rss_full"] / 1e6,
                         r[f"{turn}_rss_drained"] / 1e6, r[f"{turn}_bytes_per_full_queue"],
                         r[f"{turn}_bytes_per_emptied_queue"]))
    return "d  Memory of the broker, one message of 100 B per queue\n" + table(
        ("", "fresh MB", "warm MB", "full MB", "drained MB", "B per full queue", "B per emptied queue"), rows)


def _failover(results: dict[str, Any]) -> str:
    e = results["e"]
    rows = []
    for key, what in (("all", "all queues"), ("affected", f"{e['queues_affected']} queues that the killed node led"),
                      ("others", "other queues"), ("around_restart", "all queues, around the restart")):
        one = e[key]
        if one["messages"]:
            rows.append((what, one["send_to_stored_max"], one["send_to_delivered_max"], one["delivery_gap_overall"],
                         one["delivery_gap_of_worst_queue"], one["delivery_gap_of_median_queue"]))
    restart = e["restart"]
    return "\n".join([
        f"e  The leader of {e['shards_led_by_victim']} shards is killed at 2,000 messages/s: {e['sent']:,} sent, "
        f"{e['sends_failed']} sends failed, {e['lost']} lost, {e['stored_twice']} stored twice, {e['reordered']} "
        f"reordered, {e['misplaced']} misplaced, {e['redelivered']} redelivered",
        table(("seconds", "longest to stored", "longest to delivered", "delivery gap overall", "of worst queue",
               "of median queue"), rows),
        f"Started again after {restart['down_seconds']} s, it answered after {restart['answers_after_seconds']} s and had "
        f"caught up after {restart['caught_up_after_seconds']} s; leaders were back after "
        f"{restart['leaders_back_after_seconds'] or '(not)'} s."])


def _changes(results: dict[str, Any]) -> str:
    h = results["h"]
    rows = [(one["change"], f"{one['seconds']:.1f}", one["send_to_stored_max"], one["send_to_delivered_max"],
             one["delivery_gap_of_worst_queue"]) for one in h["changes"]]
    return (f"h  A cluster changes at {h['per_second']:.0f} messages/s of 1 KiB in {h['queues']} queues: {h['sent']:,} sent, "
            f"{h['sends_failed']} sends failed, {h['lost']} lost, {h['stored_twice']} stored twice, {h['reordered']} reordered, "
            f"{h['redelivered']} redelivered\n"
            + table(("change", "took s", "longest to stored s", "longest to delivered s", "delivery gap of worst queue s"), rows))


def _transfer(results: dict[str, Any]) -> str:
    i = results["i"]
    rows = [(side, before / 1e6, peak / 1e6, (peak - before) / 1e6) for side, before, peak in (
        ("the node that sends it", i["sender_rss_before"], i["sender_rss_peak"]),
        ("the node that receives it", i["rss_fresh"], i["receiver_rss_peak"]))]
    return (f"i  A shard of {i['shard_bytes'] / 1e6:,.0f} MB, {i['messages']:,} messages, moves to a node that joins: "
            f"{i['seconds']} s, {i['megabytes_per_second']} MB/s, a voter after {i['until_voter_seconds']} s; killed with "
            f"{i['receiver_bytes_at_kill'] / 1e6:,.0f} MB of a first attempt: {'a clean state' if i['clean'] else 'NOT CLEAN'}\n"
            + table(("resident memory", "before MB", "peak MB", "growth MB"), rows))


def _tracing(results: dict[str, Any]) -> str:
    j = results["j"]
    rows = [(what, median(j["per_second"][name]), j["cost_percent"].get(name, {}).get("median"), j["cost_percent"].get(name, {}).get("low"),
             j["cost_percent"].get(name, {}).get("high"), j["bars_percent"].get(name), median(j["cpu_us_per_message"][name]),
             j["cpu_percent"].get(name, {}).get("median"))
            for name, what in (("bare", "neither metrics nor traces"), ("off", "metrics, scraped each second"),
                               ("unsampled", "and traces, nothing sampled"),
                               ("sampled", f"and traces, one of {j['sampled_every']} sampled"))]
    return (f"j  What traces and metrics take from one node, {j['rounds']} rounds of {j['seconds']:g} s each in turn; the collector got "
            f"{j['collector']['bytes'] / 1e6:,.1f} MB in {j['collector']['requests']:,} requests\n"
            + table(("", "messages/s", "cost %", "low quarter", "high quarter", "bar", "node's us/message", "of it %"), rows)
            + "\nMetrics are compared with neither, traces with metrics alone.")


def _pick(results: dict[str, Any]) -> str:
    best = {(r["limited"], r["queues"]): r["fastest_round"] for r in results["f"]}
    rows = [(f"{r['queues']:,} queues ready" + ", limits" * r["limited"], r["nanoseconds"], r["fastest_round"], r["slowest_round"],
             r["fastest_round"] / best[r["limited"], 10], r["fastest_round"] / best[False, r["queues"]]) for r in results["f"]]
    return "f  The scheduler's work for one lease: picked, charged, settled, its queue ready again\n" + table(
        ("", "ns", "fastest round", "slowest round", "of 10 queues'", "of without limits"), rows)


def _isolation(results: dict[str, Any]) -> str:
    g = results["g"]
    rows = [(f"{p['dead']} of {g['destinations']} destinations dead", p["per_second"], ratio, p["p50_ms"], p["p99_ms"], p99, p["max_ms"])
            for p, ratio, p99 in zip(g["phases"], g["throughput_ratio"], g["p99_ratio"], strict=True)]
    return "g  The five destinations that stay healthy, from send to their endpoint\n" + table(
        ("", "delivered/s", "of before", "p50 ms", "p99 ms", "times before", "max ms"), rows)
