"""pysyncobj's messages (small dicts) as protobuf of our own and back. Nothing is unpickled; a message of unknown shape
raises WireInvalid, and the connection that brought it is closed."""
from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError
from spillway.cluster.errors import WireInvalid
from spillway.peer.v1.consensus_pb2 import Frame, RaftMessage

ENTRY_TYPES = (0, 1)
Message = dict[str, Any]


def decode_frame(data: bytes) -> Frame:
    """Raises WireInvalid."""
    try:
        return Frame.FromString(data)
    except DecodeError as e:
        raise WireInvalid(f"a frame of {len(data)} bytes does not parse") from e


def encode(group: int, term: int, m: Message) -> RaftMessage:
    """One message of a replica whose current term is `term`."""
    out = RaftMessage(group=group, term=term)
    kind = m["type"]
    if kind == "append_entries":
        body = out.append
        body.round, body.commit_index = m["round"], m["commit_index"]
        body.prev_index, body.prev_term = m["prevLogIdx"], m["prevLogTerm"]
        for command, _, entry_term in m["entries"]:
            body.entries.add(term=entry_term, command=command)
    elif kind == "next_node_idx":
        answer = out.append_answer
        answer.round, answer.next_index = m["round"], m["next_node_idx"]
        answer.reset, answer.success, answer.recovering = m["reset"], m["success"], m["recovering"]
    elif kind in ("request_vote", "prevote"):
        vote = out.vote_request if kind == "request_vote" else out.prevote_request
        vote.candidate_term, vote.last_index, vote.last_term = m["term"], m["last_log_index"], m["last_log_term"]
        vote.transfer = m.get("transfer", False)
    elif kind == "response_vote":
        out.vote_answer.candidate_term = m["term"]
    elif kind == "prevote_granted":
        out.prevote_answer.candidate_term = m["term"]
    elif kind == "timeout_now":
        out.timeout_now.SetInParent()
    elif kind == "snapshot_offer":
        out.snapshot_offer.SetInParent()
    elif kind == "snapshot_done":
        out.snapshot_done.index = m["index"]
    elif kind == "recovery_request":
        out.recovery_request.incarnation = m["incarnation"]
    elif kind == "recovery_answer":
        out.recovery_answer.incarnation, out.recovery_answer.barrier_index = m["incarnation"], m["index"]
    else:
        raise AssertionError(f"a message of type {kind!r} must never leave a replica")
    return out


def decode(m: RaftMessage) -> Message:
    """As pysyncobj takes it, plus `sender_term`. Raises WireInvalid."""
    kind = m.WhichOneof("body")
    if kind == "append":
        body = m.append
        entries = []
        index, term = body.prev_index, body.prev_term
        for entry in body.entries:
            index += 1
            command = entry.command
            if not command or command[0] not in ENTRY_TYPES or entry.term < term or entry.term > m.term:
                raise WireInvalid(f"group {m.group}: entry {index} is not valid")
            term = entry.term
            entries.append((command, index, term))
        return {"type": "append_entries", "term": m.term, "sender_term": m.term, "round": body.round, "entries": entries,
                "commit_index": body.commit_index, "prevLogIdx": body.prev_index, "prevLogTerm": body.prev_term}
    if kind == "append_answer":
        answer = m.append_answer
        return {"type": "next_node_idx", "sender_term": m.term, "round": answer.round, "next_node_idx": answer.next_index,
                "reset": answer.reset, "success": answer.success, "recovering": answer.recovering}
    if kind in ("vote_request", "prevote_request"):
        vote = m.vote_request if kind == "vote_request" else m.prevote_request
        return {"type": "request_vote" if kind == "vote_request" else "prevote", "sender_term": m.term,
                "term": vote.candidate_term, "last_log_index": vote.last_index, "last_log_term": vote.last_term,
                "transfer": vote.transfer}
    if kind == "vote_answer":
        return {"type": "response_vote", "sender_term": m.term, "term": m.vote_answer.candidate_term}
    if kind == "prevote_answer":
        return {"type": "prevote_granted", "sender_term": m.term, "term": m.prevote_answer.candidate_term}
    if kind == "timeout_now":
        return {"type": "timeout_now", "sender_term": m.term, "term": m.term}
    if kind == "snapshot_offer":
        return {"type": "snapshot_offer", "sender_term": m.term}
    if kind == "snapshot_done":
        return {"type": "snapshot_done", "sender_term": m.term, "index": m.snapshot_done.index}
    if kind == "recovery_request":
        return {"type": "recovery_request", "sender_term": m.term, "incarnation": m.recovery_request.incarnation}
    if kind == "recovery_answer":
        return {"type": "recovery_answer", "sender_term": m.term, "incarnation": m.recovery_answer.incarnation,
                "index": m.recovery_answer.barrier_index}
    raise WireInvalid(f"group {m.group}: a message without a known body")
