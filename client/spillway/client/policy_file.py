"""Destinations and routes as TOML files have them, for `spillway destination apply -f` and `spillway route apply -f`.

A file has one `[[destination]]` or `[[route]]` table for each, or is one of them itself. Keys are the names of the fields of
`Destination`, with those of its policy beside `name` and `http`. Durations are "30s", "1h30m", "250ms", "7d" or numbers of
seconds; sizes are "10MiB", "1 GB" or numbers of bytes. What is left out takes the broker's default.
"""
from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from spillway.client.errors import InvalidArgument
from spillway.client.model import (
    AdaptiveLimit,
    DeliveryPolicy,
    Destination,
    HttpTarget,
    Limit,
    NackPolicy,
    Retention,
    Route,
    RouteTarget,
    TenantPolicy,
)

# What the broker fills in, for a comparison with what it has. Limits and retentions are unlimited without.
DEFAULT_POLICY = DeliveryPolicy(
    run_messages_max=64, lease_seconds=30.0, backoff_base=0.2, backoff_cap=60.0, nack_policy=NackPolicy.BLOCK, ordered=True,
    lease_seconds_max=43_200.0, dead_letters_kept=True, weight=1.0, adaptive_limit=AdaptiveLimit(False, 1), dedup_window=600.0,
    backoff_factor=2.0, backoff_jitter=1.0)
DEFAULT_HTTP = HttpTarget("", 10.0, 16)

_NUMBER_MAX = 1e30  # far beyond everything, and far below what sums and products of it are infinite from
_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_UNIT_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
               "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}

Parse = Callable[[str, Any], Any]  # (path, value as TOML has it) -> value of a field; raises InvalidArgument naming the path


# -- single values -----------------------------------------------------------------------------------------------


def parse_duration(value: str | float) -> float:
    """Seconds of "30s", "1h30m", "250ms", "7d", or a number of seconds. Raises ValueError saying what is wrong."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is not a duration, such as \"30s\", \"5m\", \"1h\", \"7d\" or a number of seconds")
    if isinstance(value, int | float):
        return _finite(value)
    if re.fullmatch(r"\s*\d+(?:\.\d+)?\s*", value, re.ASCII):
        return _finite(value)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(ms|[smhd])\s*", value, re.ASCII)
    if not re.fullmatch(r"\s*(?:\d+(?:\.\d+)?\s*(?:ms|[smhd])\s*)+", value, re.ASCII):
        raise ValueError(f"{value!r} is not a duration, such as \"30s\", \"5m\", \"1h\", \"7d\" or a number of seconds")
    return round(sum(_finite(number) * _UNIT_SECONDS[unit] for number, unit in parts), 6)


def parse_size(value: str | int) -> int:
    """Bytes of "10MiB", "1.5 GB", or a number of bytes. Raises ValueError saying what is wrong."""
    parts = None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value, re.ASCII)
    if parts is None or parts[2].lower() not in _UNIT_BYTES:
        raise ValueError(f"{value!r} is not a size, such as \"10MiB\", \"1GB\" or a number of bytes")
    return round(_finite(parts[1]) * _UNIT_BYTES[parts[2].lower()])


def _finite(value: str | float) -> float:
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not abs(found) < _NUMBER_MAX:
        raise ValueError(f"{str(value)[:20]} is too large, or no number")
    return found


def _with(parse: Callable[[Any], Any]) -> Parse:
    def parsed(path: str, value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise InvalidArgument(path, str(error)) from None

    return parsed


def _typed(kind: type | tuple[type, ...], what: str) -> Parse:
    def parsed(path: str, value: Any) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InvalidArgument(path, f"{value!r} is not {what}")
        return value

    return parsed


def _number(path: str, value: Any) -> float:
    number = _typed((int, float), "a number")(path, value)
    try:
        return _finite(number)
    except ValueError as error:
        raise InvalidArgument(path, str(error)) from None


def _nack(path: str, value: Any) -> NackPolicy:
    if not isinstance(value, str) or value.upper() not in NackPolicy.__members__:
        raise InvalidArgument(path, f'{value!r} is not "block", "block_until" or "skip"')
    return NackPolicy[value.upper()]


def _texts(path: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InvalidArgument(path, f"{value!r} is not a list")
    return tuple(_text(f"{path}[{i}]", one) for i, one in enumerate(value))


def _mapping(parse: Parse) -> Parse:
    def parsed(path: str, value: Any) -> dict[str, Any]:
        return {name: parse(f"{path}.{_key(name)}", one) for name, one in _table(path, value).items()}

    return parsed


def _table(path: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidArgument(path, f"{value!r} is not a table")
    return value


def _struct(kind: Callable[..., Any], keys: Mapping[str, Parse], required: tuple[str, ...] = ()) -> Parse:
    def parsed(path: str, value: Any) -> Any:
        return kind(**_fields(path, _table(path, value), keys, required))

    return parsed


def _fields(path: str, table: Mapping[str, Any], keys: Mapping[str, Parse], required: tuple[str, ...] = ()) -> dict[str, Any]:
    for name in table:
        if name not in keys:
            raise InvalidArgument(_join(path, name), f"not known; known are {', '.join(sorted(keys))}")
    for name in required:
        if name not in table:
            raise InvalidArgument(_join(path, name), "missing")
    return {name: keys[name](_join(path, name), value) for name, value in table.items()}


def _join(path: str, name: str) -> str:
    return f"{path}.{_key(name)}" if path else _key(name)


def _key(name: str) -> str:
    """A key as TOML has it."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name, re.ASCII) else '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


_duration, _size = _with(parse_duration), _with(parse_size)
_whole = _typed(int, "a whole number")
_flag, _text = _typed(bool, "true or false"), _typed(str, "a string")
_limit = _struct(Limit, {"messages_per_second": _number, "burst": _whole, "leases_max": _whole})
_retention = _struct(Retention, {"bytes_max": _size, "age_max": _duration})
_POLICY: dict[str, Parse] = {
    "run_messages_max": _whole, "lease_seconds": _duration, "lease_seconds_max": _duration, "backoff_base": _duration,
    "backoff_cap": _duration, "backoff_factor": _number, "backoff_jitter": _number, "nack_policy": _nack, "attempts_max": _whole,
    "age_max": _duration, "ordered": _flag, "dead_letters_kept": _flag, "ttl": _duration, "message_bytes_max": _size,
    "limit": _limit, "tenant_limit": _limit, "retention": _retention, "tenant_retention": _retention, "weight": _number,
    "tenants": _mapping(_struct(TenantPolicy, {"weight": _number, "limit": _limit, "retention": _retention})),
    "adaptive_limit": _struct(AdaptiveLimit, {"disabled": _flag, "floor": _whole, "pinned": _whole}),
    "dedup_window": _duration}
_HTTP: dict[str, Parse] = {
    "url": _text, "timeout": _duration, "concurrency_max": _whole, "headers": _mapping(_text), "signing_secrets": _texts,
    "allow_private_addresses": _flag, "redirects_max": _whole}
_DESTINATION: dict[str, Parse] = {"name": _text, "http": _struct(HttpTarget, _HTTP, ("url",)), **_POLICY}
_TARGET = _struct(RouteTarget, {"destination": _text, "filter": _text, "skip_over_budget": _flag}, ("destination",))


def _targets(path: str, value: Any) -> tuple[RouteTarget, ...]:
    if not isinstance(value, list):
        raise InvalidArgument(path, f"{value!r} is not a list of names or tables")
    return tuple(RouteTarget(one) if isinstance(one, str) else _TARGET(f"{path}[{i}]", one) for i, one in enumerate(value))


_ROUTE: dict[str, Parse] = {"source": _text, "targets": _targets}


# -- files -------------------------------------------------------------------------------------------------------


def load_destinations(path: Path) -> dict[str, Destination]:
    """path of a table -> the destination, of a file in which names must be unique. Raises InvalidArgument naming the file and
    the key."""
    found = {}
    for where, table in _tables(path, "destination").items():
        given = _checked(path, where, table, _DESTINATION, ("name",))
        name, http = given.pop("name"), given.pop("http", None)
        found[where] = Destination(name, DeliveryPolicy(**given), http)
    _unique(path, {where: one.name for where, one in found.items()}, "name")
    return found


def load_routes(path: Path) -> dict[str, Route]:
    """path of a table -> the route, of a file in which sources must be unique. Raises InvalidArgument naming the file and the
    key."""
    found = {where: Route(**_checked(path, where, table, _ROUTE, ("source", "targets")))
             for where, table in _tables(path, "route").items()}
    _unique(path, {where: one.source for where, one in found.items()}, "source")
    return found


def other_tables(path: Path, kind: str) -> bool:
    """Whether a file that was read has tables of another kind, too."""
    with path.open("rb") as f:
        return not {"destination", "route"}.isdisjoint(set(tomllib.load(f)) - {kind})


def in_file(path: Path, where: str, error: InvalidArgument) -> InvalidArgument:
    """A broker's refusal of a table of a file, naming the file and the key."""
    field = re.sub(r"^(destination|route)(\.|$)", "", error.field).removeprefix("policy.")
    place = ".".join(part for part in (where, field) if part)
    return InvalidArgument(f"{path}: {place}" if place else str(path), error.description)


def _tables(path: Path, kind: str) -> dict[str, Mapping[str, Any]]:
    """path of a table -> the table, for each of one kind in a file; "" is the file itself."""
    try:
        with path.open("rb") as f:
            found = tomllib.load(f)
    except OSError as error:
        raise InvalidArgument(str(path), error.strerror or "it cannot be read") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(str(path), f"it is not TOML: {error}") from None
    if not {"destination", "route"} & set(found):
        return {"": found}
    for name in set(found) - {"destination", "route"}:
        raise InvalidArgument(f"{path}: {_key(name)}", "not known; known beside [[destination]] and [[route]] is nothing")
    tables = found.get(kind, [])
    if not isinstance(tables, list) or not all(isinstance(one, Mapping) for one in tables):
        raise InvalidArgument(f"{path}: {kind}", f"it must be tables: [[{kind}]]")
    if not tables:
        raise InvalidArgument(str(path), f"there is no [[{kind}]] in it")
    return {f"{kind}[{i}]": one for i, one in enumerate(tables)}


def _checked(path: Path, where: str, table: Mapping[str, Any], keys: Mapping[str, Parse], required: tuple[str, ...]) -> dict[str, Any]:
    try:
        return _fields(where, table, keys, required)
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error.field}", error.description) from None


def _unique(path: Path, names: Mapping[str, str], key: str) -> None:
    first: dict[str, str] = {}
    for where, name in names.items():
        if name in first:
            raise InvalidArgument(f"{path}: {where}.{key}", f"{name!r} is {first[name]}'s, too")
        first[name] = where


# -- comparison --------------------------------------------------------------------------------------------------


def filled(destination: Destination) -> Destination:
    """A destination as the broker stores it: with defaults instead of None, and nothing instead of limits without a limit."""
    given = destination.policy
    policy = _filled(given, DEFAULT_POLICY)
    if given.backoff_cap is None:
        policy = replace(policy, backoff_cap=max(policy.backoff_base, policy.backoff_cap))
    empty = {name: None for name in ("limit", "tenant_limit", "retention", "tenant_retention")
             if getattr(policy, name) in (Limit(), Retention())}
    policy = replace(policy, **empty, tenants={tenant: _filled(own, TenantPolicy(1.0)) for tenant, own in sorted(policy.tenants.items())})
    http = destination.http
    if http is not None:
        http = _filled(replace(http, headers=dict(sorted(http.headers.items()))), DEFAULT_HTTP)
    return replace(destination, policy=policy, http=http)


def _filled(value: Any, default: Any) -> Any:
    """A dataclass with a default's values instead of None and 0, in what it holds, too."""
    changes = {}
    for field in fields(value):
        own: Any = getattr(value, field.name)
        other = getattr(default, field.name)
        if own is None or (own == 0 and own is not False and field.name != "backoff_jitter"):  # 0 is how the protocol has None
            changes[field.name] = other
        elif is_dataclass(own):
            kind: Any = type(own)
            changes[field.name] = _filled(own, kind() if other is None else other)
    return replace(value, **changes)
