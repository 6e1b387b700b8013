"""A group's state as a stream of checked chunks: between nodes, to whoever makes a backup, and in its files.

    chunk     checksum (4 bytes), kind (1), number (4), body; little-endian
    kind H    the first: format, group, applied index, applied term
    kind P    a part of what the next R completes: a row may be larger than a chunk
    kind R    rows: key length (4), value length (4), key, value; in key order
    kind T    the last: how many rows there were

A chunk's checksum continues the one before it (CRC-32 over both), so the last one vouches for every byte, for the order and
for the end. Whoever raises FORMAT goes on reading the older ones: backups are made of them.
"""
from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

FORMAT = 2
CHUNK_BYTES_MAX = 256 << 10
FRAME = struct.Struct("<IcI")
BODY_BYTES_MAX = CHUNK_BYTES_MAX - FRAME.size
HEADER = struct.Struct("<BIQQ")
ROW = struct.Struct("<II")
TRAILER = struct.Struct("<Q")


class ChunkInvalid(ValueError):
    """A chunk is damaged, not the next one, or says what cannot be."""


def seal(kind: bytes, number: int, checksum: int, body: bytes) -> tuple[bytes, int]:
    """Chunk `number`, after one with a checksum (0: there is none); and its own checksum."""
    head = kind + number.to_bytes(4, "little")
    checksum = zlib.crc32(body, zlib.crc32(head, checksum))
    return b"".join((checksum.to_bytes(4, "little"), head, body)), checksum


def unseal(chunk: bytes, number: int, checksum: int) -> tuple[bytes, bytes, int]:
    """(kind, body, checksum) of what is to be chunk `number`, after one with a checksum. Raises ChunkInvalid."""
    if not FRAME.size <= len(chunk) <= CHUNK_BYTES_MAX:
        raise ChunkInvalid(f"a chunk of {len(chunk)} bytes")
    said, kind, at = FRAME.unpack_from(chunk)
    if at != number:
        raise ChunkInvalid(f"chunk {at} instead of {number}")
    found = zlib.crc32(memoryview(chunk)[4:], checksum)
    if found != said:
        raise ChunkInvalid(f"the checksum of chunk {number} is wrong")
    if (kind == b"H") != (number == 0) or kind not in b"HPRT":
        raise ChunkInvalid(f"chunk {number} is of kind {kind!r}")
    return kind, chunk[FRAME.size:], found


@dataclass(frozen=True, slots=True)
class Header:
    """Of a state."""

    format: int
    group: int
    index: int
    """Of the last entry in it."""
    term: int
    """Of that entry."""


def unpack_header(body: bytes) -> Header:
    """The body of the first chunk. Raises ChunkInvalid if it is none, or of another format."""
    if len(body) != HEADER.size or body[0] != FORMAT:
        raise ChunkInvalid(f"of format {body[0] if body else 0}; this version takes {FORMAT}: run the same version on both")
    return Header(*HEADER.unpack(body))


def unpack_trailer(body: bytes) -> int:
    """How many rows there were, from the body of the last chunk. Raises ChunkInvalid if it is none."""
    if len(body) != TRAILER.size:
        raise ChunkInvalid("its last chunk says nothing")
    rows: int = TRAILER.unpack(body)[0]
    return rows
