"""What every process tells of itself, by the names that Prometheus' own clients use."""
from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from spillway.contract.telemetry.metrics import Metric, Value

CPU = Metric("process_cpu_seconds_total", "counter", "s", "User and system processor time.", "What does the process cost?")
RSS = Metric("process_resident_memory_bytes", "gauge", "By", "Resident memory.", "Does it fit?")
FDS = Metric("process_open_fds", "gauge", "{file}", "Open file descriptors.", "Will connections be refused?")
FDS_MAX = Metric("process_max_fds", "gauge", "{file}", "The most file descriptors that it may have.", "How near is the limit?")
START = Metric("process_start_time_seconds", "gauge", "s", "When the process started, in seconds since 1970.", "Did it restart?")
ALL = [CPU, RSS, FDS, FDS_MAX, START]
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STARTED = time.time()  # it is loaded then


def values() -> dict[Metric, Value]:
    """As of now; memory and files only where there is a /proc."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    out: dict[Metric, Value] = {CPU: usage.ru_utime + usage.ru_stime, FDS_MAX: resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                                START: _STARTED}
    try:
        out[RSS] = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
        out[FDS] = sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        pass
    return out
