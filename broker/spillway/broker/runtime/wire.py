"""Assembles the frames of the Lease stream from stored bytes.

A protobuf message may be written by hand as its fields one after the other; a stored message is already the bytes of
`spillway.v1.Message`. So delivering costs a few packed integers per message and no protobuf object. The layout must
follow queue_service.proto; a test parses every shape with the generated code.
"""
from __future__ import annotations

import struct

from spillway.broker.core.queue import Message, Queue
from spillway.contract.hashing import PART
from spillway.contract.varint import varint

# LeasedRun: shard = 1 fixed32, fencing_token = 2 fixed64, expire_unix_ms = 3 fixed64
_RUN = struct.Struct("<BIBQBQ")
# LeasedMessage: sequence = 1 fixed64, attempt = 2 fixed32, enqueue_unix_ms = 3 fixed64, tag of message = 4
_MESSAGE = struct.Struct("<BQBIBQB")
_run = _RUN.pack
_message = _MESSAGE.pack
_MESSAGE_SIZE = _MESSAGE.size


LENGTHS = [varint(i) for i in range(0x4000)]  # of one or two bytes


def _varint(value: int) -> bytes:
    return LENGTHS[value] if value < 0x4000 else varint(value)


def name_fields(queue: bytes) -> bytes:
    """destination = 4, tenant = 5, key = 6 of a LeasedRun."""
    destination, tenant, key = queue.partition(PART)[0].split(b"\0")
    return (b"\x22" + LENGTHS[len(destination)] + destination + b"\x2a" + LENGTHS[len(tenant)] + tenant
            + b"\x32" + LENGTHS[len(key)] + key)


def gap_field(gap: tuple[int, int, int]) -> bytes:
    """gap = 8 of a LeasedRun."""
    inner = b"\x08" + varint(gap[0]) + struct.pack("<BQBQ", 0x11, gap[1], 0x19, gap[2])
    return b"\x42" + varint(len(inner)) + inner


def run_parts(shard: int, queue: Queue, messages: list[Message]) -> tuple[list[bytes], int]:
    """A LeasedRun as `runs = 1` of a LeaseResponse: (pieces to join, their total size)."""
    parts = [b"", _run(0x0D, shard, 0x11, queue.token, 0x19, queue.deadline), name_fields(queue.key)]
    size = _RUN.size + len(parts[2])
    attempt = queue.attempts + 1
    for sequence, enqueue_ms, _, body, _ in messages:
        head = _message(0x09, sequence, 0x15, attempt, 0x19, enqueue_ms, 0x22) + _varint(len(body))
        total = len(head) + len(body)
        lead = b"\x3a" + _varint(total)
        parts += (lead, head, body)
        size += len(lead) + total
        attempt = 1  # only the head has been tried before
    if queue.gap is not None and queue.gap[1] < messages[-1][0]:  # redriven messages may all be before what is missing
        parts.append(gap_field(queue.gap))
        size += len(parts[-1])
    parts[0] = b"\x0a" + varint(size)
    return parts, size + len(parts[0])
