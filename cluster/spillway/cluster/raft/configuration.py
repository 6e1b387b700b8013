"""Who belongs to a group: voters, who count, and learners, who only receive. Pure.

A configuration is an entry of the log, and the last one in a log is the one that its replica goes by, committed or not; what
a truncation takes away is followed no longer (Ongaro's thesis, 4.1). That makes it a function of the log: nothing beside the
log can be forgotten, and a restart reads it there again. An entry has the whole configuration, not the change, so that a
replica need not know any earlier one.

Each change adds or removes one voter, at most: a majority before it and a majority after it have a node in common, so that no
two leaders can be elected or entries committed apart. See `membership` for when a change may be made.
"""
from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec
from spillway.cluster.errors import ChangeInvalid

VOTERS_MAX = 7
LEARNERS_MAX = 8  # one more than a cluster has beside its voters: a voter is demoted before a learner takes its place
NODE_ID_LENGTH_MAX = 255


class ChangeKind(enum.Enum):
    """What may happen to the membership of a node."""

    ADD_LEARNER = "add-learner"
    PROMOTE = "promote"  # a learner, that has caught up, to a voter
    DEMOTE = "demote"  # a voter to a learner: its node goes on as a member, as one that is removed does not
    REMOVE = "remove"  # a learner or a voter


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one node's membership."""

    kind: ChangeKind
    node_id: str


class _Row(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    voters: list[str]
    learners: list[str]


@dataclass(frozen=True, slots=True)
class Configuration:
    """Node ids, sorted. One without voters is that of a replica that has not heard of any: it never campaigns."""

    voters: tuple[str, ...] = ()
    learners: tuple[str, ...] = ()

    @classmethod
    def of(cls, voters: list[str]) -> Configuration:
        """What a group is founded with."""
        return cls(tuple(sorted(voters)))

    @property
    def quorum(self) -> int:
        """How many voters decide."""
        return len(self.voters) // 2 + 1

    def __contains__(self, node_id: object) -> bool:
        return node_id in self.voters or node_id in self.learners

    def after(self, change: Change) -> Configuration:
        """With a change. Raises ChangeInvalid if it makes no sense."""
        node_id, kind = change.node_id, change.kind
        if kind is ChangeKind.ADD_LEARNER:
            if node_id in self:
                raise ChangeInvalid(f"node {node_id} is a member already")
            if not 0 < len(node_id) <= NODE_ID_LENGTH_MAX:
                raise ChangeInvalid(f"a node id has 1 to {NODE_ID_LENGTH_MAX} characters")
            return Configuration(self.voters, self._with_learner(node_id))
        if node_id not in self:
            raise ChangeInvalid(f"node {node_id} is not a member")
        learners = tuple(n for n in self.learners if n != node_id)
        if kind in (ChangeKind.REMOVE, ChangeKind.DEMOTE):
            if self.voters == (node_id,):
                raise ChangeInvalid(f"node {node_id} is the only voter; add another one first")
            if kind is ChangeKind.DEMOTE:
                if node_id in self.learners:
                    raise ChangeInvalid(f"node {node_id} is a learner already")
                learners = self._with_learner(node_id)
            return Configuration(tuple(n for n in self.voters if n != node_id), learners)
        if node_id in self.voters:
            raise ChangeInvalid(f"node {node_id} is a voter already")
        if len(self.voters) == VOTERS_MAX:
            raise ChangeInvalid(f"there are {VOTERS_MAX} voters; remove one first")
        return Configuration(tuple(sorted((*self.voters, node_id))), learners)

    def _with_learner(self, node_id: str) -> tuple[str, ...]:
        if len(self.learners) == LEARNERS_MAX:
            raise ChangeInvalid(f"there are {LEARNERS_MAX} learners; promote or remove one first")
        return tuple(sorted((*self.learners, node_id)))

    def encode(self) -> bytes:
        """The same bytes for the same configuration."""
        return msgspec.msgpack.encode(_Row(list(self.voters), list(self.learners)))


def _parts(data: bytes) -> int:
    try:
        return len(msgspec.msgpack.decode(data, type=list))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0


def decode_configuration(data: bytes) -> Configuration:
    """The inverse of `encode`. Raises ValueError."""
    try:
        row = msgspec.msgpack.decode(data, type=_Row)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        newer = f" ({parts} parts; this version reads 2: a newer one wrote it; run that one)" if (parts := _parts(data)) > 2 else ""
        raise ValueError(f"a configuration of {len(data)} bytes does not parse: {error}{newer}") from None
    voters, learners = row.voters, row.learners
    everybody = {*voters, *learners}
    if voters != sorted(voters) or learners != sorted(learners) or len(everybody) != len(voters) + len(learners):
        raise ValueError("the nodes of a configuration are not in order, or not distinct")
    if len(voters) > VOTERS_MAX or len(learners) > LEARNERS_MAX:
        raise ValueError(f"a configuration of {len(voters)} voters and {len(learners)} learners")
    if not all(0 < len(node_id) <= NODE_ID_LENGTH_MAX for node_id in everybody):
        raise ValueError("a node id of a configuration is empty or too long")
    return Configuration(tuple(voters), tuple(learners))
