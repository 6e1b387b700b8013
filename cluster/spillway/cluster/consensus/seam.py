"""pysyncobj 0.3.17, pinned by the hash of its source: its private names are used, each listed here.

Its elections, vote check, log matching and commit rule are kept. Its snapshots, dumps, membership changes, forwarding,
code versions, pickles, threads, sockets and pollers are never reached.
"""
from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pysyncobj.syncobj as library
from pysyncobj.config import SyncObjConf
from pysyncobj.journal import Journal
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from spillway.cluster.errors import UntestedLibrary

REVIEWED_SHA256 = "e8bdf06797085d734df86e24ab4802fe87893dff77268565ec036f7ad4a1cfe4"

NO_OP = b"\1"  # types of entries, the first byte of a command
REGULAR = b"\0"


def check(path: str | None = None) -> None:
    """Raises UntestedLibrary unless the installed source is the reviewed one."""
    found = hashlib.sha256(Path(path or library.__file__).read_bytes()).hexdigest()
    if found != REVIEWED_SHA256:
        raise UntestedLibrary(
            f"pysyncobj's syncobj.py has sha256 {found[:12]}..., not the reviewed {REVIEWED_SHA256[:12]}...; install 0.3.17")


def _journal(source: Any = None) -> Journal:
    assert isinstance(source, Journal), "replicas bring their own journal"
    return source


check()
library.createJournal = _journal
# What it logs are its own snapshots and code versions, which are never used.
logging.getLogger("pysyncobj").addHandler(logging.NullHandler())


class NoPoller:
    """In place of the library's socket poller."""

    def poll(self, timeout: float) -> None:
        """There is nothing to poll."""


def configuration(journal: Journal, timing: Timing) -> SyncObjConf:
    """Everything automatic switched off."""
    never = 1 << 60
    return SyncObjConf(
        autoTick=False, commandsWaitLeader=False, fullDumpFile=None, journalFile=journal, dynamicMembershipChange=False,
        appendEntriesUseBatch=True, appendEntriesBatchSizeBytes=8 << 20, appendEntriesPeriod=timing.heartbeat,
        raftMinTimeout=timing.election_min, raftMaxTimeout=timing.election_max, leaderFallbackTimeout=timing.election_max,
        connectionTimeout=timing.election_max * 2, logCompactionMinEntries=never, logCompactionMinTime=never,
        useFork=False, pollerType="select")


class Timing:
    """Seconds. An election takes the leader's silence; a lost connection to it shortens the wait."""

    def __init__(self, heartbeat: float = 0.1, election_min: float = 1.0, election_max: float = 2.0,
                 disconnect_min: float = 0.05, disconnect_max: float = 0.2) -> None:
        self.heartbeat = heartbeat
        self.election_min = election_min
        self.election_max = election_max
        self.disconnect_min = disconnect_min
        self.disconnect_max = disconnect_max


__all__ = ["NO_OP", "REGULAR", "Journal", "NoPoller", "Node", "Timing", "Transport", "check", "configuration", "library"]
