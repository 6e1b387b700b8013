"""What a process uses: processor time and memory, from /proc."""
from __future__ import annotations

import os
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def machine_seconds() -> dict[str, float]:
    """What all cores together did so far: `busy` with any process, `idle` (waiting for a disk included), `stolen` by the
    host of a virtual machine."""
    user, nice, system, idle, wait, irq, softirq, stolen = (
        int(x) / TICKS for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return {"busy": user + nice + system + irq + softirq, "idle": idle + wait, "stolen": stolen}


def rss_bytes(pid: int) -> int:
    """Resident memory now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no VmRSS")


def settled_rss(pid: int, rest: float = 12.0, seconds: float = 45.0) -> int:
    """Resident memory once it is at rest: for `rest` seconds less than 1 % of change; or after `seconds`. A broker gives
    memory back some seconds after its last work, so a short look would be too early."""
    deadline = time.monotonic() + seconds
    since, base = time.monotonic(), rss_bytes(pid)
    while (now := time.monotonic()) < deadline and now - since < rest:
        time.sleep(0.5)
        rss = rss_bytes(pid)
        if abs(rss - base) > 0.01 * base:
            since, base = time.monotonic(), rss
    return rss_bytes(pid)
