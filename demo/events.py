"""Writes the demo's events: track, identify and page calls of many tenants' users, as JSON lines.

The same seed gives the same bytes, everywhere: only integer arithmetic and `random.Random.random` are used, whose
sequence Python promises to keep. Sizes of tenants are skewed as in real life: the largest sends about a sixth of
everything, the smallest a handful.

    python -m demo.events --events 20000 --out events.jsonl
"""
from __future__ import annotations

import argparse
import json
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import NamedTuple

EVENTS = 20_000
TENANTS = 200
SEED = 20_240_601
START = datetime(2024, 6, 1, 8, 0, tzinfo=UTC)

_FIRST = ("Ada", "Bruno", "Chloé", "Dinesh", "Emeka", "Fatima", "Grete", "Hiro", "Inês", "Jonas", "Kwame", "Lucía", "Mei",
          "Noor", "Olga", "Pavel", "Quinn", "Rosa", "Søren", "Tala")
_LAST = ("Almeida", "Bauer", "Chen", "Diallo", "Eriksen", "Fischer", "García", "Haddad", "Ito", "Johansson", "Kim", "López",
         "Müller", "Novák", "Okafor", "Patel", "Rossi", "Silva", "Tanaka", "Weber")
_PLANS = ("free", "starter", "team", "business", "enterprise")
_PAGES = (("Home", "/"), ("Pricing", "/pricing"), ("Docs", "/docs/getting-started"), ("Product", "/products/ocean-mug"),
          ("Cart", "/cart"), ("Checkout", "/checkout"), ("Account", "/account/settings"), ("Blog", "/blog/why-queues"))
_PRODUCTS = (("Ocean Mug", "mug-01", 1400), ("Linen Tote", "tote-07", 2250), ("Field Notebook", "note-03", 990),
             ("Desk Lamp", "lamp-12", 7900), ("Wool Socks", "sock-05", 1250), ("Tea Sampler", "tea-09", 1890))
_CALLS = ("Product Viewed", "Product Added", "Checkout Started", "Order Completed", "Coupon Applied", "Signed In",
          "Search Performed", "Email Opened", "Trial Started", "Report Exported")
_AGENTS = ("Mozilla/5.0 (X11; Linux x86_64; rv:126.0) Gecko/20100101 Firefox/126.0",
           "Mozilla/5.0 (Macintosh; Intel Mac OS X 14_5) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 "
           "Safari/605.1.15",
           "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148")


class Event(NamedTuple):
    """One line of the file: `number` is its place, `key` the user's id, by which it is ordered."""

    number: int
    tenant: str
    key: str
    line: bytes


def tenant_name(rank: int) -> str:
    """The tenant with the given rank by size, from 0."""
    return f"tenant-{rank:03d}"


def generate(count: int = EVENTS, tenants: int = TENANTS, seed: int = SEED) -> Iterator[dict[str, object]]:
    """`count` events in order of time. Deterministic."""
    draw = Random(seed)  # noqa: S311 - it shall be predictable
    weights = list(accumulate(1_000_000 // (rank + 1) for rank in range(tenants)))
    moment = START
    for number in range(count):
        rank = _rank(weights, _below(draw, weights[-1]))
        # Some ten events per user, but a few of them do a lot: the lowest of three draws.
        users = max(2, count // (40 * (rank + 1)))
        user = min(_below(draw, users), _below(draw, users), _below(draw, users))
        moment += timedelta(milliseconds=_below(draw, 90))
        yield _event(draw, number, tenant_name(rank), f"user-{rank:03d}-{user:05d}", user + rank, moment)


def _below(draw: Random, limit: int) -> int:
    return int(draw.random() * limit)


def _rank(weights: Sequence[int], point: int) -> int:
    low, high = 0, len(weights) - 1
    while low < high:
        middle = (low + high) // 2
        if weights[middle] > point:
            high = middle
        else:
            low = middle + 1
    return low


def _event(draw: Random, number: int, tenant: str, user: str, person: int, moment: datetime) -> dict[str, object]:
    sent = moment + timedelta(milliseconds=5 + _below(draw, 400))
    first, last = _FIRST[person % len(_FIRST)], _LAST[person // 3 % len(_LAST)]
    common: dict[str, object] = {
        "messageId": str(uuid.UUID(int=int(draw.random() * (1 << 53)) << 75 | number, version=4)),
        "userId": user,
        "writeKey": f"wk_{tenant}",
        "timestamp": _time(moment),
        "sentAt": _time(sent),
        "context": {
            "ip": f"203.0.113.{_below(draw, 254) + 1}",
            "library": {"name": "analytics.js", "version": "2.11.1"},
            "locale": ("en-GB", "de-DE", "pt-BR", "ja-JP")[_below(draw, 4)],
            "userAgent": _AGENTS[_below(draw, len(_AGENTS))],
        },
    }
    kind = _below(draw, 10)
    if kind == 0:
        return {"type": "identify", **common, "traits": {
            "name": f"{first} {last}", "email": f"{first}.{last}@example.com".lower(), "plan": _PLANS[_below(draw, 5)],
            "logins": _below(draw, 500), "createdAt": _time(moment - timedelta(days=_below(draw, 900)))}}
    if kind <= 3:
        title, path = _PAGES[_below(draw, len(_PAGES))]
        return {"type": "page", **common, "name": title, "properties": {
            "title": title, "path": path, "url": f"https://shop.example{path}", "referrer": "https://search.example/"}}
    product, sku, cents = _PRODUCTS[_below(draw, len(_PRODUCTS))]
    quantity = 1 + _below(draw, 4)
    return {"type": "track", **common, "event": _CALLS[_below(draw, len(_CALLS))], "properties": {
        "product": product, "sku": sku, "quantity": quantity, "currency": "EUR",
        "price": cents / 100, "revenue": cents * quantity / 100}}


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def encode(event: dict[str, object]) -> bytes:
    """The event as one line, without its end."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def write(path: Path, count: int = EVENTS, tenants: int = TENANTS, seed: int = SEED) -> None:
    """Writes the events to a file, one per line."""
    with path.open("wb") as file:
        for event in generate(count, tenants, seed):
            file.write(encode(event) + b"\n")


def read(path: Path) -> list[Event]:
    """The events of a file: whose they are is in the line (`writeKey`, `userId`)."""
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file):
            event = json.loads(line)
            found.append(Event(number, event["writeKey"].removeprefix("wk_"), event["userId"], line.rstrip(b"\n")))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Writes an event file."""
    parser = argparse.ArgumentParser(prog="python -m demo.events", description="Write the demo's events as JSON lines.")
    parser.add_argument("--events", type=int, default=EVENTS, help="how many (default: %(default)s)")
    parser.add_argument("--tenants", type=int, default=TENANTS, help="of how many tenants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="same seed, same file (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("events.jsonl"), help="the file (default: %(default)s)")
    options = parser.parse_args(argv)
    write(options.out, options.events, options.tenants, options.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
