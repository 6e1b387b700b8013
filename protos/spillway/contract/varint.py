"""Base-128 varints, as protobuf writes lengths and numbers: for code that writes messages by hand."""
from __future__ import annotations


def varint(value: int) -> bytes:
    """Base-128 varint of a number >= 0."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
