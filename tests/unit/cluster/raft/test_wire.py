"""The encoding: everything comes back, and anything else is a typed error."""
from __future__ import annotations

import random
from typing import Any

import pytest
from spillway.cluster.errors import WireInvalid
from spillway.cluster.machine import ENTRY_BYTES_MAX
from spillway.cluster.raft import wire
from spillway.peer.v1.raft_pb2 import RaftFrame, RaftGroupMessage

MESSAGES: list[dict[str, Any]] = [
    {"type": "append_entries", "term": 7, "round": 3, "prevLogIdx": 4, "prevLogTerm": 2, "commit_index": 4,
     "entries": [(b"\0abc", 5, 2), (b"\1", 6, 7)]},
    {"type": "append_entries", "term": 7, "round": 0, "prevLogIdx": 1, "prevLogTerm": 0, "commit_index": 0, "entries": []},
    {"type": "next_node_idx", "round": 3, "next_node_idx": 9, "reset": True, "success": False, "recovering": True},
    {"type": "request_vote", "term": 7, "last_log_index": 5, "last_log_term": 6, "transfer": True},
    {"type": "prevote_request", "term": 8, "last_log_index": 5, "last_log_term": 6, "transfer": False},
    {"type": "response_vote", "term": 7},
    {"type": "prevote_answer", "term": 8, "granted": True},
    {"type": "timeout_now", "term": 7},
    {"type": "snapshot_offer", "term": 7, "round": 2, "first_index": 50},
    {"type": "recovery_request", "incarnation": "abc"},
    {"type": "recovery_answer", "incarnation": "abc", "barrier_index": 12},
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m["type"])
def test_every_message_comes_back(message: dict[str, Any]) -> None:
    """R7, R10b: with the sender's term."""
    again = wire.decode(RaftGroupMessage.FromString(wire.encode(3, 7, message).SerializeToString()))
    assert again == {**message, "sender_term": 7}


@pytest.mark.parametrize("kind", ["apply_command", "apply_command_response", "snapshot"])
def test_the_librarys_other_messages_cannot_leave(kind: str) -> None:
    """R9: commands are not forwarded inside of the library."""
    with pytest.raises(AssertionError):
        wire.encode(1, 1, {"type": kind})


def _append(**changes: Any) -> RaftGroupMessage:
    m = RaftGroupMessage(group=1, term=5)
    m.append.prev_index, m.append.prev_term = 3, 4
    m.append.entries.add(term=5, command=b"\0x")
    for name, value in changes.items():
        setattr(m.append, name, value)
    return m


@pytest.mark.parametrize(("broken", "text"), [
    (RaftGroupMessage(group=1, term=1), "unknown shape"),
    (RaftGroupMessage(group=1, term=1 << 63), "beyond"),
    (_append(prev_index=0), "prev_index 0"),
    (_append(prev_index=(1 << 63)), "beyond"),
    (_append(prev_term=6), "term 5, after 6"),
    (_append(commit_index=1 << 63), "beyond"),
])
def test_unknown_shapes_are_refused(broken: RaftGroupMessage, text: str) -> None:
    """R7: nothing of such a message is delivered."""
    with pytest.raises(WireInvalid, match=text):
        wire.decode(broken)


@pytest.mark.parametrize(("term", "command", "text"), [
    (5, b"", "no known type"), (5, b"\2x", "does not parse"), (5, b"\3x", "no known type"), (4, b"\0", "has term 4, after 5"),
    (6, b"\0", "term 6 in a message of term 5"), (5, b"\0" + bytes(ENTRY_BYTES_MAX + 1), "at most")])
def test_entries_are_checked(term: int, command: bytes, text: str) -> None:
    """Version entries of the library, configurations that are none, oversize ones and terms out of order are refused."""
    m = _append()
    m.append.entries.add(term=term, command=command)
    with pytest.raises(WireInvalid, match=text):
        wire.decode(m)


def test_votes_are_checked() -> None:
    """A candidate's term is its own, and above its log's."""
    for term, last in ((6, 3), (5, 6)):
        m = RaftGroupMessage(group=1, term=5)
        m.vote_request.candidate_term, m.vote_request.last_term = term, last
        with pytest.raises(WireInvalid):
            wire.decode(m)
    for incarnation in ("", "x" * 65):
        m = RaftGroupMessage(group=1, term=5)
        m.recovery_request.incarnation = incarnation
        with pytest.raises(WireInvalid):
            wire.decode(m)


def test_a_frame_is_taken_whole_or_not_at_all() -> None:
    """One bad message spoils the frame; so does too much of it."""
    frame = RaftFrame(messages=[wire.encode(3, 7, MESSAGES[0]), RaftGroupMessage(group=1)])
    with pytest.raises(WireInvalid):
        wire.decode_frame(frame.SerializeToString())
    with pytest.raises(WireInvalid, match="at most"):
        wire.decode_frame(bytes(wire.FRAME_BYTES_MAX + 1))


def test_any_bytes_are_a_frame_or_a_typed_error() -> None:
    """Fuzzing: changed, cut and random frames decode or raise WireInvalid, never anything else."""
    rnd = random.Random(1)
    good = RaftFrame(messages=[wire.encode(3, 7, m) for m in MESSAGES], claims_complete=True).SerializeToString()
    taken = 0
    for _ in range(5000):
        raw = bytearray(good)
        for _ in range(rnd.randrange(1, 4)):
            raw[rnd.randrange(len(raw))] = rnd.randrange(256)
        data = bytes(raw[:rnd.randrange(len(raw) + 1)]) if rnd.random() < 0.3 else bytes(raw)
        try:
            wire.decode_frame(data)
            taken += 1
        except WireInvalid:
            pass
    assert 0 < taken < 5000
