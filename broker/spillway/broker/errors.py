"""Errors of the broker, one tree. The gRPC status of each stands in services.status, nowhere else.

BrokerError
├── ConfigError          the operator's: a flag, variable or file is wrong; names the setting and the remedy
├── DataDirError         the operator's: the data directory is another node's, a newer version's, or locked
├── RequestError         the caller's: names the field; do not retry
│   ├── NotFound
│   ├── AlreadyExists
│   └── EtagMismatch
├── Unauthenticated      the caller's: no token, or one that is not valid
├── PermissionDenied     the caller's: its token does not allow that; names what would
├── TooMuch              the caller's: over a limit of its connection or token; retry later
└── Unavailable          nobody's: no leader, not the leader, stopping; retry
"""
from __future__ import annotations


class BrokerError(Exception):
    """Base of the broker's errors."""


class ConfigError(BrokerError):
    """A setting is wrong."""


class DataDirError(BrokerError):
    """The data directory cannot be used."""


class RequestError(BrokerError):
    """The caller's request is wrong. `field` is the field's path in the request."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class NotFound(RequestError):
    """What the field names does not exist."""


class AlreadyExists(RequestError):
    """What the field names exists already."""


class EtagMismatch(RequestError):
    """Someone else changed it meanwhile."""


class Unauthenticated(BrokerError):
    """Nobody knows who calls."""


class PermissionDenied(BrokerError):
    """The caller may not do this."""


class TooMuch(BrokerError):
    """The caller is over a limit. `retry_seconds` is when it may try again."""

    def __init__(self, description: str, retry_seconds: float = 1.0) -> None:
        super().__init__(description)
        self.retry_seconds = retry_seconds


class Unavailable(BrokerError):
    """The outcome may be unknown; an idempotent retry is safe. `leader` is where to try, if known."""

    def __init__(self, description: str, leader: str | None = None) -> None:
        super().__init__(description)
        self.leader = leader
