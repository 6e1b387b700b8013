"""What to do after a failure. Pure: randomness is an argument."""
from __future__ import annotations

import enum
import random
from collections.abc import Callable

import grpc
from spillway.v1 import message_pb2


class Backoff:
    """Exponential waiting times with jitter: uniform in [d/2, d], d = min(cap, base * 2^n), in seconds."""

    __slots__ = ("_base", "_cap", "_failures", "_random")

    def __init__(self, base: float, cap: float, random: Callable[[], float] = random.random) -> None:
        self._base = base
        self._cap = cap
        self._random = random
        self._failures = 0

    def next(self) -> float:
        """Seconds to wait after one more failure."""
        limit = min(self._cap, self._base * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return limit * (0.5 + 0.5 * self._random())

    def reset(self) -> None:
        """After a success: the next failure starts from `base` again."""
        self._failures = 0

    @property
    def failures(self) -> int:
        """How many failures there were since the last success."""
        return self._failures


class Verdict(enum.Enum):
    """What a refused record means for its producer."""

    UNKNOWN = enum.auto()  # it may be stored: send it again under the same number
    NOT_STORED = enum.auto()  # it is not stored: send it again
    OUT_OF_SEQUENCE = enum.auto()  # it is not stored because an earlier one is missing
    REFUSED = enum.auto()  # it is not stored and never will be; its number was not used
    REFUSED_UNKNOWN = enum.auto()  # it failed for good, and whether it is stored is unknown


VERDICTS = {
    message_pb2.ERROR_CODE_INVALID_ARGUMENT: Verdict.REFUSED,
    message_pb2.ERROR_CODE_DESTINATION_NOT_FOUND: Verdict.REFUSED,
    message_pb2.ERROR_CODE_PERMISSION_DENIED: Verdict.REFUSED,
    message_pb2.ERROR_CODE_OVER_BUDGET: Verdict.REFUSED,  # tried again, it would hold up other destinations' records
    message_pb2.ERROR_CODE_UNAVAILABLE: Verdict.UNKNOWN,
    message_pb2.ERROR_CODE_RESOURCE_EXHAUSTED: Verdict.NOT_STORED,
    message_pb2.ERROR_CODE_OUT_OF_SEQUENCE: Verdict.OUT_OF_SEQUENCE,
}


def verdict_of(code: int) -> Verdict:
    """The verdict on a record refused with this ErrorCode. Codes of later versions count as failures for good."""
    return VERDICTS.get(code, Verdict.REFUSED_UNKNOWN)  # type: ignore[call-overload,no-any-return]


# Statuses that end a stream although it would end the same way on every other node.
_FINAL = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})


def is_final(code: grpc.StatusCode | None) -> bool:
    """Whether a stream that ended with this status would fail again wherever it is opened."""
    return code in _FINAL
