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


def rss_bytes(pid: int) -> int:
    """Resident memory now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no VmRSS")


def settled_rss(pid: int, seconds: float = 20.0) -> int:
    """Resident memory once process and memory are at rest: for 2 s less than 0.5 % of change and 15 % of a core."""
    deadline = time.monotonic() + seconds
    rss, cpu = rss_bytes(pid), cpu_seconds(pid)
    while time.monotonic() < deadline:
        time.sleep(2.0)
        rss_before, rss = rss, rss_bytes(pid)
        cpu_before, cpu = cpu, cpu_seconds(pid)
        if abs(rss - rss_before) < 0.005 * rss and cpu - cpu_before < 0.3:
            break
    return rss
