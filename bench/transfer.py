"""Workload i: a large shard moves to a node that joins, which is killed in the middle of it once; what that costs in memory."""
from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import xxhash
from rocksdict import AccessType, Options, Rdict
from spillway.cluster.state_store import StateStore

from bench.children import Child, Children, Worker, poll
from bench.counters import Counters
from bench.nodes import Nodes
from bench.usage import rss_bytes, settled_rss

LARGE_BYTES, SMALL_BYTES = 64 << 10, 1 << 10  # payloads: some are kept in files of their own, some among the other rows
SMALL_PART = 8  # one byte in so many is of a small payload
FILL_BYTES_PER_SECOND_MIN, MOVE_BYTES_PER_SECOND_MIN = 4 << 20, 2 << 20  # slower is an error
SAMPLE_SECONDS = 0.01
GROUP, PREFIX_BYTES = 1, 9  # of a row's key: its kind, group and generation


def measure(directory: Path, shard_bytes: int) -> dict[str, Any]:
    """One node with one shard of so many bytes; another one joins, is killed when half of them have come, and starts again."""
    small, large = shard_bytes // SMALL_PART // SMALL_BYTES, (shard_bytes - shard_bytes // SMALL_PART) // LARGE_BYTES
    with Children() as children:
        nodes = Nodes(directory, 1, children, ["--shards", "1"])
        sender = nodes.children["n1"]
        rss_fresh = settled_rss(sender.pid)
        begin = time.monotonic()
        worker = Worker("fill", directory, Counters(), addresses=nodes.addresses, parts=[[LARGE_BYTES, large], [SMALL_BYTES, small]])
        children.start(worker)
        stored = worker.result(60 + shard_bytes / FILL_BYTES_PER_SECOND_MIN)["stored"]
        fill_seconds = time.monotonic() - begin
        if stored != large + small:
            raise RuntimeError(f"{stored} of {large + small} messages were stored")
        rss_full = settled_rss(sender.pid)
        patience = 60 + shard_bytes / MOVE_BYTES_PER_SECOND_MIN

        with Watch(sender) as sending:
            begin = time.monotonic()
            nodes.join("n2")
            receiver = nodes.children["n2"]
            with Watch(receiver) as first:
                poll(lambda: tree_bytes(directory / "n2" / "state") > shard_bytes // 2, patience, "half of the shard", step=0.1)
                receiver.kill()
            killed_after = time.monotonic() - begin
            left = tree_bytes(directory / "n2" / "state")
            begin = time.monotonic()
            receiver.start()
            with Watch(receiver) as second:
                poll(lambda: "installed a snapshot" in receiver.log.read_text(errors="replace"), patience, "the snapshot", step=0.05)
                seconds = time.monotonic() - begin
                poll(lambda: _is_member(nodes, "n2"), patience, "n2 to be a voter that has everything", step=0.1)
                member_seconds = time.monotonic() - begin
                time.sleep(2)  # what the switch of states leaves behind
                lost = sender.log.read_text(errors="replace").count("lost the connection to node n2")
        for child in (receiver, sender):
            child.end()
        left_over = generations(directory / "n2" / "state") - 1
        found = {name: digest(directory / name / "state") for name in ("n1", "n2")}
    return {
        "shard_bytes": large * LARGE_BYTES + small * SMALL_BYTES, "messages": large + small, "fill_seconds": round(fill_seconds, 1),
        "killed_after_seconds": round(killed_after, 1), "receiver_bytes_at_kill": left,
        "seconds": round(seconds, 1), "until_voter_seconds": round(member_seconds, 1),
        "megabytes_per_second": round(shard_bytes / seconds / 1e6, 1),
        "rss_fresh": rss_fresh, "sender_rss_before": rss_full, "sender_rss_peak": sending.peak,
        "sender_rss_growth": sending.peak - rss_full,
        "receiver_rss_peak": max(first.peak, second.peak), "receiver_rss_growth": max(first.peak, second.peak) - rss_fresh,
        "connections_lost": lost - 1,  # beside the one of the node that was killed
        "sender_rows": found["n1"][0], "receiver_rows": found["n2"][0], "generations_left_over": left_over,
        "clean": found["n1"] == found["n2"] and found["n2"][0] >= large + small and not left_over,
    }


class Watch:
    """Looks at a process's resident memory all the time, in a thread."""

    def __init__(self, child: Child) -> None:
        self.peak = 0
        self._child = child
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            try:
                self.peak = max(self.peak, rss_bytes(self._child.pid))
            except (OSError, ValueError):  # it has just ended
                return

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _is_member(nodes: Nodes, node: str) -> bool:
    """Whether a node votes in the shard and has applied what the leader has committed."""
    status = nodes.cluster()
    groups = {} if status is None else {g.group: g for g in status.groups}
    group, own = groups.get(GROUP), nodes.status(node)
    return bool(group and own and GROUP in own and node in group.voters and own[GROUP].role in ("leader", "follower")
                and own[GROUP].applied_index >= own[GROUP].commit_index > 0)


def tree_bytes(directory: Path) -> int:
    """What the files of a directory have in them; files may come and go meanwhile."""
    total = 0
    for path in directory.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def generations(path: Path) -> int:
    """How many generations of the shard's rows there are in the store of a node that has stopped, of which one is the state. A
    StateStore would drop the others."""
    database: Any = Rdict(str(path), Options(raw_mode=True), access_type=AccessType.read_only())
    found, begin, end = set(), b"R" + GROUP.to_bytes(4, "big"), b"R" + (GROUP + 1).to_bytes(4, "big")
    rows = database.iter()
    rows.seek(begin)
    while rows.valid() and rows.key() < end:
        found.add(rows.key()[:PREFIX_BYTES])
        rows.seek(rows.key()[:PREFIX_BYTES] + b"\xff" * 5)  # beyond any key
    del rows
    database.close()
    return len(found)


def digest(path: Path) -> tuple[int, str]:
    """Of the shard's messages and queues in the store of a node that has stopped: how many rows, and a digest of them."""
    store = StateStore(path)
    try:
        rows, hashed = 0, xxhash.xxh3_128()
        for begin, end in ((b"m", b"n"), (b"q", b"r")):
            for key, value in store.group(GROUP).scan(begin, end):
                rows += 1
                for part in (key, value):
                    hashed.update(len(part).to_bytes(4, "little"))
                    hashed.update(part)
        return rows, hashed.hexdigest()
    finally:
        store.close()
