"""What an HTTP answer means for the message: pure, one function, no clock.

==================================  ==========  ====================================================================
answer                              outcome     why
==================================  ==========  ====================================================================
2xx                                 ACK         delivered
429                                 THROTTLED   the receiver protects itself: wait as it says, burn no attempt
503 with Retry-After                THROTTLED   likewise
408, 425                            RETRY       by their definition the same request may succeed later (RFC 9110, 8470)
other 5xx, anything unheard of      RETRY       the receiver failed; the destination's backoff says when to try again
timeout after connecting, garbage   RETRY       the receiver may or may not have it
no connection                       DOWN        nobody got anything: parks the destination, burns no attempt
301, 302, 307, 308 not followed     DOWN        the endpoint is elsewhere: for its owner to configure; the message is good
address or redirect not allowed     DOWN        likewise
other 3xx, other 4xx                REJECT      the receiver will never want this message
==================================  ==========  ====================================================================
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum

RETRY_AFTER_SECONDS_MAX = 86_400.0  # a receiver may silence a tenant for a day, not for ever
RETRY_AFTER_LENGTH_MAX = 64  # an HTTP date has 29 characters

_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?", re.ASCII)
_DATE = re.compile(r"[A-Za-z]{3,9},? ", re.ASCII)  # all three date forms start with the day's name
_AGAIN = frozenset((408, 425))
_MOVED = frozenset((301, 302, 307, 308))


class Action(Enum):
    """What to settle the message with."""

    ACK = "ack"
    RETRY = "retry"
    THROTTLED = "throttled"
    DOWN = "down"
    REJECT = "reject"
    RELEASE = "release"


class Failure(Enum):
    """Why there is no answer."""

    CONNECT = "no connection"  # refused, unreachable, DNS, TLS: nothing was sent
    CONNECT_TIMEOUT = "connect timeout"  # likewise
    TIMEOUT = "timeout"  # sent at least in part
    BROKEN = "broken response"  # sent at least in part; closed early or not HTTP
    FORBIDDEN = "address not allowed"  # our own rule about addresses; nothing was sent
    REDIRECT = "redirect not followed"  # our own rules about redirects; the answer said that the message was not taken


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a message."""

    action: Action
    delay: float | None = None  # seconds; None: the destination's backoff
    reason: str = ""  # for people; made of statuses and error names, never of payloads or response bodies


DELIVERED = Outcome(Action.ACK)
RELEASED = Outcome(Action.RELEASE)


def decide(status: int, headers: Mapping[str, str], failure: Failure | None, now: float, detail: str = "") -> Outcome:
    """The outcome of one request.

    Args:
        status: the answer's status, of the last request if redirects were followed; ignored if there is a `failure`.
        headers: the answer's headers, looked up as "Retry-After" (the mapping handles case).
        failure: why there is no answer, or None.
        now: seconds since 1970, to understand dates.
        detail: name of the error, or what was not allowed, for the reason.
    """
    if failure is not None:
        reason = f"{failure.value}: {detail}" if detail else failure.value
        if failure is Failure.TIMEOUT or failure is Failure.BROKEN:
            return Outcome(Action.RETRY, None, reason)
        return Outcome(Action.DOWN, None, reason)
    if 200 <= status <= 299:
        return DELIVERED
    reason = f"HTTP {status}"
    if status == 429 or status == 503:
        delay = retry_after(headers.get("Retry-After"), now)
        if status == 429 or delay is not None:
            # No wait at all would turn into a tight loop: then the destination's backoff decides.
            return Outcome(Action.THROTTLED, delay or None, reason)
        return Outcome(Action.RETRY, None, reason)
    if status in _MOVED:
        return Outcome(Action.DOWN, None, f"{reason}: redirects are not followed; set the target to the final URL")
    if 300 <= status <= 499 and status not in _AGAIN:
        return Outcome(Action.REJECT, None, reason)
    return Outcome(Action.RETRY, None, reason)


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a Retry-After header, as seconds or as an HTTP date; 0 for a date that has passed, at most
    a day; None if the header is missing or makes no sense. Fractions of seconds, not standard but sent, count."""
    if value is None or len(value) > RETRY_AFTER_LENGTH_MAX:
        return None
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return min(float(value), RETRY_AFTER_SECONDS_MAX)
    if not _DATE.match(value):
        return None
    try:
        date = parsedate_to_datetime(value)
        until = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()  # asctime's form is in GMT but says nothing
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return min(max(until - now, 0.0), RETRY_AFTER_SECONDS_MAX)
