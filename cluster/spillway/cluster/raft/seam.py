"""pysyncobj 0.3.17, pinned by the hash of its source, with its clock and its chance taken over.

Its elections, vote check, log matching and commit rule are used; they were read line by line. Its snapshots, dumps,
membership changes, command forwarding, code versions, pickles, threads, sockets and pollers are never reached. Another
version may differ anywhere, and private names are used, so any other source is refused: whoever upgrades reads the
difference, runs the simulations and changes REVIEWED_SHA256.
"""
from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pysyncobj.syncobj as library
from pysyncobj.config import SyncObjConf
from pysyncobj.journal import Journal
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from spillway.cluster.errors import UntestedLibrary

REVIEWED_SHA256 = "e8bdf06797085d734df86e24ab4802fe87893dff77268565ec036f7ad4a1cfe4"

REGULAR = b"\0"  # types of entries: the first byte of a command
NO_OP = b"\1"
CONFIGURATION = b"\2"

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2  # library._RAFT_STATE


@dataclass(frozen=True, slots=True)
class Timing:
    """How fast a group reacts, in seconds. An election takes silence of `election_min` to `election_max`, long enough that
    a pause of the collector or of the disk is none; a connection that breaks needs no such wait (`lost_min` to
    `lost_max`), because a pre-vote protects a leader that others still hear."""

    heartbeat: float = 0.1
    election_min: float = 1.0
    election_max: float = 2.0
    fallback: float = 1.5  # a leader without answers of a majority for so long steps down
    lost_min: float = 0.05
    lost_max: float = 0.2


class Source:
    """The time and chance that the library sees: those of the node that is being driven. Constant within a turn."""

    def __init__(self) -> None:
        self.now = 0.0
        self.chance: Callable[[], float] = random.random

    def random(self) -> float:
        """In place of random.random."""
        return self.chance()


source = Source()


def drive(now: float, chance: Callable[[], float]) -> None:
    """Says whose time (seconds) and chance (0 to 1) the library sees from now on. Every entry to a node calls it first."""
    source.now = now
    source.chance = chance


def check(path: str | None = None) -> None:
    """Raises UntestedLibrary unless the library's source is the reviewed one."""
    found = hashlib.sha256(Path(path or library.__file__).read_bytes()).hexdigest()
    if found != REVIEWED_SHA256:
        raise UntestedLibrary(f"pysyncobj's syncobj.py has sha256 {found[:12]}..., not the reviewed "
                              f"{REVIEWED_SHA256[:12]}...; install pysyncobj==0.3.17")


def _given_journal(journal: Any = None) -> Journal:
    assert isinstance(journal, Journal), "a replica brings its own journal"
    return journal


check()
library.createJournal = _given_journal
library.monotonicTime = lambda: source.now
library.random = source
library.logger.addHandler(logging.NullHandler())


class PeerNode(Node):  # type: ignore[misc]
    """A member of a group; one object each, compared by identity, which is what makes the library's dictionaries fast."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__


class NoPoller:
    """In place of the library's socket poller."""

    def poll(self, timeout: float) -> None:
        """There is nothing to poll."""


def configuration(journal: Journal, timing: Timing) -> SyncObjConf:
    """Everything automatic switched off."""
    never = 1 << 60
    return SyncObjConf(
        autoTick=False, commandsWaitLeader=False, fullDumpFile=None, journalFile=journal, dynamicMembershipChange=False,
        appendEntriesUseBatch=True, appendEntriesPeriod=timing.heartbeat, raftMinTimeout=timing.election_min,
        raftMaxTimeout=timing.election_max, leaderFallbackTimeout=timing.fallback,
        connectionTimeout=timing.election_max * 2, logCompactionMinEntries=never, logCompactionMinTime=never,
        useFork=False, pollerType="select")


__all__ = ["CANDIDATE", "CONFIGURATION", "FOLLOWER", "LEADER", "NO_OP", "REGULAR", "Journal", "NoPoller", "PeerNode", "Timing", "Transport",
           "check", "configuration", "drive", "library", "source"]
