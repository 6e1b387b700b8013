"""Changes to valid inputs, for decoders: flipped bits, other bytes, cuts, pieces of other inputs, lengths that lie.

An edit is a few numbers, so that a seeded generator and hypothesis can both make them; any numbers are an edit.
"""
from __future__ import annotations

import random
from collections.abc import Sequence

# Where sizes and kinds of numbers change in msgpack, protobuf and structs.
BYTES = (0x00, 0x01, 0x7F, 0x80, 0x81, 0x90, 0x9F, 0xC0, 0xC1, 0xC4, 0xCB, 0xCF, 0xD3, 0xDC, 0xDD, 0xDF, 0xE0, 0xFE, 0xFF)
WORDS = tuple(number.to_bytes(size, order, signed=number < 0)
              for size in (2, 4, 8) for number in (0, 1, -1, (1 << 8 * size - 1) - 1, -(1 << 8 * size - 1), 0x1000)
              for order in ("little", "big"))
VARINTS = (b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\xff\xff\xff\xff\x0f",
           b"\x80\x80\x01", b"\xff\x7f")
TEXTS = (b"\0", b"\n", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"[" * 3000, b"{\"a\":" * 1500, b"a=" + b"[" * 3000,
         b"9" * 500, b"1e999", b"nan", b"-", b"..", b"%00", b"\x91" * 2000)
EDITS = 10
Edit = tuple[int, int, int]  # which of EDITS, where, with what


def edited(data: bytes, edit: Edit, others: Sequence[bytes]) -> bytes:
    """Applies one edit. Positions and choices are taken modulo what there is."""
    kind, where, what = edit
    at = where % (len(data) + 1)
    kind %= EDITS
    if kind == 0:  # one bit
        return data[:at] + bytes((data[at] ^ 1 << what % 8,)) + data[at + 1:] if at < len(data) else data
    if kind == 1:  # any byte
        return data[:at] + bytes((what % 256,)) + data[at + 1:]
    if kind == 2:  # a byte that means something
        return data[:at] + bytes((BYTES[what % len(BYTES)],)) + data[at + 1:]
    if kind == 3:  # the end is missing
        return data[:at]
    if kind == 4:  # something within is missing
        return data[:at] + data[at + 1 + what % 16:]
    if kind == 5:  # something is there twice
        return data[:at] + data[at:at + 1 + what % 64] + data[at:]
    if kind == 6:  # a number at its limits, in place of what was there
        word = (WORDS + VARINTS)[what % (len(WORDS) + len(VARINTS))]
        return data[:at] + word + data[at + len(word):]
    if kind == 7:  # a length, or a digit, one off
        return data[:at] + bytes(((data[at] + (1 if what % 2 else -1)) % 256,)) + data[at + 1:] if at < len(data) else data
    if kind == 8:  # what confuses parsers of text, or nests without end
        return data[:at] + TEXTS[what % len(TEXTS)] + data[at:]
    other = others[what % len(others)]  # the end of another input
    cut = what // len(others) % (len(other) + 1)
    return data[:at] + other[cut:]


def mutated(rnd: random.Random, samples: Sequence[bytes], size_max: int) -> bytes:
    """An input for a decoder: mostly a valid one after a few edits, sometimes only bytes."""
    if rnd.random() < 0.05:
        return rnd.randbytes(rnd.randrange(64))
    data = rnd.choice(samples)
    for _ in range(1 + min(int(rnd.expovariate(0.6)), 8)):
        data = edited(data, (rnd.randrange(EDITS), rnd.getrandbits(32), rnd.getrandbits(32)), samples)
    return data[:size_max]
