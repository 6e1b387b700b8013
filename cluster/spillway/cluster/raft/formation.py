"""Is a blank store new, or did it replace one that is lost? Decided from what the peers say of themselves; pure.

A cluster forms once: a node forms when it has heard every other member, each of them blank or already formed with this very
incarnation of it. It notes everybody's incarnation then (the founders) and says `formed` from then on. So a formed peer that
does not know our incarnation knew an earlier one: ours is lost, whatever the others say. A node that recovered names no
founders, and so tells the same to every blank node. Deciding `LOST` wrongly is harmless, it only waits; deciding `FRESH`
takes all members, and hence every formed one, whose founders cannot name an incarnation that did not exist.

Until it has decided, a node takes no part in any group. A cluster of one has nobody to ask and forms at once; its state
store then must be blank, too (see `group`).
"""
from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from spillway.cluster.transport.base import PeerHello


class Standing(enum.Enum):
    """What a blank store is."""

    WAIT = "wait"  # not all members were heard
    FRESH = "fresh"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself when a connection begins; a PeerHello."""

    node_id: str
    incarnation: str
    formed: bool
    founders: Mapping[str, str] = field(default_factory=dict)
    feature_min: int = 0
    feature_max: int = 0


def decide(node_id: str, incarnation: str, members: Iterable[str], hellos: Mapping[str, PeerHello]) -> Standing:
    """The standing of the blank store `incarnation` of a node; `hellos` are the last ones of peers heard since its start."""
    others = [m for m in members if m != node_id]
    for peer in others:
        hello = hellos.get(peer)
        if hello is not None and hello.formed and hello.founders.get(node_id) != incarnation:
            return Standing.LOST
    return Standing.FRESH if all(peer in hellos for peer in others) else Standing.WAIT
