"""The audit log: who did what, and what was refused, one JSON object a line, by the logger `spillway.audit`.

    {"time": "2026-01-31T08:00:00.123Z", "who": "token 1f2e3d4c5b6a (ci)", "from": "ipv4:10.0.0.7:51234",
     "method": "AdminService/PauseDelivery", "target": "destination=billing", "result": "OK"}

Every administrative call has its line, when it has ended. Refusals have one for each kind (who, where from without the port, method,
result) in a minute, with how many more there were (`more`) since the line before it, so that a flood fills no disk.
"""
from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from spillway.broker.services.refusals import Counter

log = logging.getLogger("spillway.audit")

TEXT_CHARACTERS_MAX = 300
_NAMES = ("destination", "name", "source", "tenant", "key", "token_id", "node_id", "group")
_NESTED = ("destination", "route")


class Audit:
    """Writes it."""

    def __init__(self) -> None:
        self._counter = Counter()

    def done(self, who: str, context: Any, method: str, target: str, result: str) -> None:
        """An administrative call has ended."""
        self._write(who, context, method, target, result, {})

    def refused(self, who: str, context: Any, method: str, target: str, result: str, why: str) -> None:
        """A call was not let in."""
        count = self._counter.note(f"{who} {context.peer().rpartition(':')[0]} {method} {result}")
        if count is not None:
            self._write(who, context, method, target, result, {"why": _short(why), **({"more": count} if count else {})})

    @staticmethod
    def _write(who: str, context: Any, method: str, target: str, result: str, further: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        log.info(json.dumps({"time": now, "who": who, "from": context.peer(), "method": method.removeprefix("/spillway.v1."),
                             "target": target, "result": result, **further}))


def target_of(request: Any) -> str:
    """What a request is about: its names."""
    found = []
    for part in (request, *(getattr(request, name) for name in _NESTED if hasattr(getattr(request, name, None), "DESCRIPTOR"))):
        fields = part.DESCRIPTOR.fields_by_name
        for name in _NAMES:
            if name in fields and fields[name].message_type is None:
                value = getattr(part, name)
                if value or (fields[name].has_presence and part.HasField(name)):
                    found.append(f"{name}={value}")
    return _short(" ".join(found))


def _short(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS_MAX else text[:TEXT_CHARACTERS_MAX - 1] + "…"
