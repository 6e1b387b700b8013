"""The messages of replicas as protobuf of our own, and back. Nothing is unpickled; lengths and shapes are checked before
anything is delivered, and a message of unknown shape raises WireInvalid: the connection that brought it is closed.

There is no shape for the library's snapshots, chunked entries, forwarded commands and administration: they cannot travel.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from spillway.cluster.errors import WireInvalid
from spillway.cluster.machine import ENTRY_BYTES_MAX
from spillway.cluster.raft.configuration import decode_configuration
from spillway.cluster.raft.guard import Message
from spillway.cluster.raft.seam import CONFIGURATION
from spillway.peer.v1.raft_pb2 import RaftFrame, RaftGroupMessage

FRAME_BYTES_SOFT_MAX = 4 << 20  # a turn that has more for one peer sends several frames
FRAME_BYTES_MAX = 16 << 20  # FRAME_BYTES_SOFT_MAX and one append of the largest entry fit with room
NUMBER_MAX = 1 << 62  # of indexes and terms: the sum of two still fits into what protobuf and the journal store
ENTRY_TYPES = (0, 1, 2)
_CONFIGURATION_TYPE = CONFIGURATION[0]
INCARNATION_LENGTH_MAX = 64


def encode(group: int, term: int, m: Message) -> RaftGroupMessage:
    """One message of a replica whose current term is `term`."""
    out = RaftGroupMessage(group=group, term=term)
    kind = m["type"]
    if kind == "append_entries":
        append = out.append
        append.round, append.commit_index = m["round"], m["commit_index"]
        append.prev_index, append.prev_term = m["prevLogIdx"], m["prevLogTerm"]
        for command, _, entry_term in m["entries"]:
            append.entries.add(term=entry_term, command=command)
    elif kind == "next_node_idx":
        answer = out.append_answer
        answer.round, answer.next_index = m["round"], m["next_node_idx"]
        answer.reset, answer.success, answer.recovering = m["reset"], m["success"], m["recovering"]
    elif kind in ("request_vote", "prevote_request"):
        vote = out.vote_request if kind == "request_vote" else out.prevote_request
        vote.candidate_term, vote.last_index, vote.last_term = m["term"], m["last_log_index"], m["last_log_term"]
        vote.transfer = m["transfer"]
    elif kind == "response_vote":
        out.vote_answer.candidate_term = m["term"]
    elif kind == "prevote_answer":
        out.prevote_answer.candidate_term, out.prevote_answer.granted = m["term"], m["granted"]
    elif kind == "timeout_now":
        out.timeout_now.SetInParent()
    elif kind == "snapshot_offer":
        out.snapshot_offer.round, out.snapshot_offer.first_index = m["round"], m["first_index"]
    elif kind == "recovery_request":
        out.recovery_request.incarnation = m["incarnation"]
    elif kind == "recovery_answer":
        out.recovery_answer.incarnation, out.recovery_answer.barrier_index = m["incarnation"], m["barrier_index"]
    else:
        raise AssertionError(f"a message of type {kind!r} must not leave a replica")
    return out


class Frame(NamedTuple):
    """What one turn of a peer has for this node."""

    messages: list[tuple[int, Message]]  # group, message
    claims: list[tuple[int, int]]  # group, term
    complete: bool  # the claims are all that the peer has
    leaving: bool  # with `complete`: the peer is about to stop


def decode_frame(data: bytes) -> Frame:
    """A frame. Raises WireInvalid; then nothing of it is to be delivered."""
    if len(data) > FRAME_BYTES_MAX:
        raise WireInvalid(f"a frame of {len(data)} bytes; at most {FRAME_BYTES_MAX} are allowed")
    try:
        frame = RaftFrame.FromString(data)
    except DecodeError:
        raise WireInvalid(f"a frame of {len(data)} bytes does not parse") from None
    messages = [(m.group, decode(m)) for m in frame.messages]
    return Frame(messages, [(c.group, _number(c.term, "claim.term")) for c in frame.claims], frame.claims_complete, frame.leaving)


def decode(m: RaftGroupMessage) -> Message:
    """One message as the guard and the library take it. Raises WireInvalid."""
    term = _number(m.term, "term")
    kind = m.WhichOneof("body")
    if kind == "append":
        return _append(m, term)
    if kind == "append_answer":
        answer = m.append_answer
        return {"type": "next_node_idx", "sender_term": term, "round": answer.round, "reset": answer.reset,
                "next_node_idx": _number(answer.next_index, "next_index"), "success": answer.success,
                "recovering": answer.recovering}
    if kind in ("vote_request", "prevote_request"):
        vote = m.vote_request if kind == "vote_request" else m.prevote_request
        if kind == "vote_request" and vote.candidate_term != term:
            raise WireInvalid(f"group {m.group}: candidate_term {vote.candidate_term} in a message of term {term}")
        if vote.last_term > vote.candidate_term:
            raise WireInvalid(f"group {m.group}: last_term {vote.last_term} above candidate_term {vote.candidate_term}")
        return {"type": "request_vote" if kind == "vote_request" else "prevote_request", "sender_term": term,
                "term": _number(vote.candidate_term, "candidate_term"), "last_log_term": vote.last_term,
                "last_log_index": _number(vote.last_index, "last_index"), "transfer": vote.transfer}
    if kind == "vote_answer":
        return {"type": "response_vote", "sender_term": term, "term": m.vote_answer.candidate_term}
    if kind == "prevote_answer":
        answer_pre = m.prevote_answer
        return {"type": "prevote_answer", "sender_term": term, "term": answer_pre.candidate_term,
                "granted": answer_pre.granted}
    if kind == "timeout_now":
        return {"type": "timeout_now", "sender_term": term, "term": term}
    if kind == "snapshot_offer":
        offer = m.snapshot_offer
        return {"type": "snapshot_offer", "sender_term": term, "term": term, "round": offer.round,
                "first_index": _number(offer.first_index, "first_index")}
    if kind == "recovery_request":
        return {"type": "recovery_request", "sender_term": term, "incarnation": _incarnation(m.recovery_request.incarnation)}
    if kind == "recovery_answer":
        return {"type": "recovery_answer", "sender_term": term, "incarnation": _incarnation(m.recovery_answer.incarnation),
                "barrier_index": _number(m.recovery_answer.barrier_index, "barrier_index")}
    raise WireInvalid(f"group {m.group}: a message of unknown shape")


def _append(m: RaftGroupMessage, term: int) -> Message:
    append = m.append
    index = prev = _number(append.prev_index, "prev_index")
    if prev == 0:
        raise WireInvalid(f"group {m.group}: prev_index 0; the first entry is the same everywhere and never sent")
    last_term = append.prev_term
    entries: list[Any] = []
    for entry in append.entries:
        index += 1
        command, entry_term = entry.command, entry.term
        if not command or command[0] not in ENTRY_TYPES:
            raise WireInvalid(f"group {m.group}: entry {index} has no known type")
        if len(command) > ENTRY_BYTES_MAX + 1:
            raise WireInvalid(f"group {m.group}: entry {index} has {len(command)} bytes; at most {ENTRY_BYTES_MAX}")
        if entry_term < last_term:
            raise WireInvalid(f"group {m.group}: entry {index} has term {entry_term}, after {last_term}")
        if command[0] == _CONFIGURATION_TYPE:
            try:
                decode_configuration(command[1:])
            except ValueError as error:
                raise WireInvalid(f"group {m.group}: entry {index}: {error}") from None
        last_term = entry_term
        entries.append((command, index, entry_term))
    if last_term > term:
        raise WireInvalid(f"group {m.group}: an entry of term {last_term} in a message of term {term}")
    return {"type": "append_entries", "term": term, "sender_term": term, "round": append.round, "prevLogIdx": prev,
            "prevLogTerm": append.prev_term, "entries": entries,
            "commit_index": _number(append.commit_index, "commit_index")}


def _number(value: int, field: str) -> int:
    if value > NUMBER_MAX:
        raise WireInvalid(f"{field} {value} is beyond any index or term")
    return value


def _incarnation(value: str) -> str:
    if not 0 < len(value) <= INCARNATION_LENGTH_MAX:
        raise WireInvalid(f"an incarnation of {len(value)} characters")
    return value
