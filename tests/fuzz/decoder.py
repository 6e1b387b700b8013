"""What a fuzzer needs to know of a decoder, and how inputs of several parts are one string of bytes."""
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

Decode = Callable[[bytes], object]

PART_BYTES_MAX = 0xFFFF


class Mismatch(AssertionError):
    """What was decoded is not what is encoded again, or does something that was not asked for. No decoder declares it."""


@dataclass(frozen=True)
class Decoder:
    """One decoder, with all that hangs on what it returns."""

    name: str
    open: Callable[[], AbstractContextManager[Decode]]
    """Gives the function that decodes, and what it needs for as long as it is used."""
    declared: tuple[type[Exception], ...]
    """What it may raise for bytes that it refuses."""
    samples: tuple[bytes, ...] = field(repr=False)
    """Valid inputs; at least one."""
    modules: tuple[str, ...] = ()
    """Product modules whose branches guide the search."""

    @contextmanager
    def opened(self) -> Iterator[Decode]:
        """As `open`, while nothing is logged: what is said of thousands of bad inputs is read by nobody."""
        before = logging.root.manager.disable
        logging.disable()
        try:
            with self.open() as decode:
                yield decode
        finally:
            logging.disable(before)


def undeclared(decoder: Decoder, decode: Decode, data: bytes) -> BaseException | None:
    """What a decoder raises for an input although it does not declare it."""
    try:
        decode(data)
    except decoder.declared:
        return None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too
        return error
    return None


class Rewritten:
    """A file that gets other contents again and again; to create or truncate one by name costs more than most decoders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)

    def write(self, data: bytes) -> None:
        """All that it holds from now on."""
        os.pwrite(self._file.fileno(), data, 0)
        os.ftruncate(self._file.fileno(), len(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def plain(decode: Decode) -> Callable[[], AbstractContextManager[Decode]]:
    """For `Decoder.open`: a function that needs nothing."""
    return lambda: nullcontext(decode)


def join(parts: Iterable[bytes]) -> bytes:
    """Parts as one input: each with its length in two bytes before it."""
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def split(data: bytes) -> list[bytes]:
    """The parts of an input, whatever it is; the last one may be cut."""
    parts = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at:at + 2], "big")
        parts.append(data[at + 2:at + 2 + size])
        at += 2 + size
    return parts


def pairs(data: bytes) -> list[tuple[bytes, bytes]]:
    """Parts two by two: keys and values. An odd one out is dropped."""
    parts = split(data)
    return list(zip(parts[::2], parts[1::2], strict=False))


def expect(condition: object, what: object) -> None:
    """Raises Mismatch unless the condition holds."""
    if not condition:
        raise Mismatch(what)
