"""Sending and taking messages: produce, consume."""
from __future__ import annotations

import base64
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from spillway.client.commands.common import (
    CONNECT_SECONDS,
    HERE,
    Connection,
    Stream,
    StreamFormat,
    command,
    connect,
    plural,
    print_line,
    run_async,
    seconds,
    with_payload,
)
from spillway.client.commands.progress import Bar

if TYPE_CHECKING:
    from spillway.client import Record

BATCH_RECORDS = 1000
BAR_BYTES_MIN = 1 << 20  # of a file: less is sent before anybody looks


app = typer.Typer()


def _moment(text: str | datetime) -> datetime:
    """A moment as RFC 3339 has it."""
    try:
        moment = text if isinstance(text, datetime) else datetime.fromisoformat(text)
    except (ValueError, TypeError):
        raise typer.BadParameter(f"{text!r} is not a time such as 2030-01-31T08:00:00Z") from None
    if moment.tzinfo is None:
        raise typer.BadParameter(f"{text!r} lacks its offset from UTC: add Z or +01:00")
    return moment


@command(app, examples=(
    "spillway produce billing '{\"total\": 12}' --tenant acme --key user-1 --header kind=order",
    "echo 'one message a line' | spillway produce billing --tenant acme --key user-1",
    "spillway produce billing --file events.jsonl --json",
    "spillway produce billing --file invoice.pdf --whole --tenant acme --delay 5m --ttl 1d"))
def produce(
    destination: Annotated[str, typer.Argument(help="Where the messages go.")],
    payload: Annotated[str | None, typer.Argument(help="One message; without it messages are read.", metavar="[PAYLOAD]",
                                                  show_default=False)] = None,
    tenant: Annotated[str, typer.Option(help="Whose messages.")] = "",
    key: Annotated[str, typer.Option(help="Ordering key inside the tenant.")] = "",
    header: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A header; may be repeated.")] = None,
    delay: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help=(
        "Not delivered before so long: 30s, 5m, or seconds."))] = None,
    deliver_at: Annotated[datetime | None, typer.Option(parser=_moment, metavar="TIME", help=(
        "Not delivered before: RFC 3339, 2030-01-31T08:00:00Z."))] = None,
    ttl: Annotated[float | None, typer.Option(parser=seconds, metavar="DURATION", help="Not delivered after so long.")] = None,
    dedup_id: Annotated[str, typer.Option(help="A second message of the queue with this id is not stored.")] = "",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read from here instead of standard input.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help=(
        "Each line is a JSON object: payload (text) or payload_base64, and optionally tenant, key, id, headers, delay, "
        "deliver_at, ttl, dedup_id. Without it each line is a payload."))] = False,
    whole: Annotated[bool, typer.Option("--whole", help="The whole input is one message.")] = False,
    output: StreamFormat = Stream.TABLE,
    connection: Connection = HERE,
) -> None:
    """Sends a message, or one per line of input; returns when all are stored."""
    from spillway.client import Record

    if payload is not None and (file is not None or json_lines or whole):
        raise typer.BadParameter("a payload is given: no --file, --json or --whole", param_hint="PAYLOAD")
    template = Record(destination, b"", tenant, key, _headers(header or []), "", delay, deliver_at, ttl, dedup_id)
    place = 0  # in the file

    def records() -> Iterator[Record]:
        nonlocal place
        if payload is not None:
            yield template._replace(payload=payload.encode(errors="surrogateescape"))
            return
        source = sys.stdin.buffer if file is None else _opened(file)
        with source:
            if whole:
                yield template._replace(payload=source.read())
                return
            for number, line in enumerate(source, 1):
                place += len(line)
                line = line.rstrip(b"\r\n")
                if json_lines:
                    yield _record(number, line, template)
                elif line:
                    yield template._replace(payload=line)

    async def send() -> int:
        sent = 0
        async with connect(connection) as client:
            await client.wait_ready(CONNECT_SECONDS)
            with _bar(file) as bar:
                async with client.producer() as producer:
                    for batch in _batches(records()):
                        for receipt in await producer.send_many(batch):
                            sent += 1
                            if output is not Stream.TABLE:
                                print(json.dumps({"shard": receipt.shard, "sequence": receipt.sequence}))
                        bar.show(place, note=plural(sent, "message"))
        if output is Stream.TABLE:
            print(f"{plural(sent, 'message')} stored", file=sys.stderr)
        return 0

    run_async(send)


@command(app, examples=("spillway consume billing --count 1", "spillway consume 'billing' crm --idle 1 -o jsonl",
                        "spillway consume billing -n 1 --no-ack"))
def consume(
    destination: Annotated[list[str], typer.Argument(help="Names, or patterns with '*'.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Stop after so many messages; 0: never.")] = 0,
    no_ack: Annotated[bool, typer.Option("--no-ack", help=(
        "Give messages back instead of acknowledging them. Only the head of each queue is seen."))] = False,
    idle: Annotated[float, typer.Option(parser=seconds, metavar="DURATION", help=(
        "Stop after so long without a message: 5s, or seconds; 0: never."))] = 0.0,
    output: StreamFormat = Stream.TABLE,
    connection: Connection = HERE,
) -> None:
    """Prints messages as they come, and acknowledges each once it is printed."""
    async def take() -> int:
        async with connect(connection) as client:
            await client.wait_ready(CONNECT_SECONDS)
            credit = min(count, 256) if count else 256
            async with client.consumer(destination, name="spillway consume", credit_messages=credit) as consumer:
                taken = 0
                while not count or taken < count:
                    message = await consumer.next_message(idle or None)
                    if message is None:
                        break
                    taken += 1
                    if output is not Stream.TABLE:
                        print_line(_message(message))
                    else:
                        sys.stdout.buffer.write(message.payload + b"\n")
                        sys.stdout.buffer.flush()
                    if not no_ack:
                        message.ack()
        return 0

    run_async(take)


# -- inner ---------------------------------------------------------------------------------------------------------


def _bar(file: Path | None) -> Bar:
    """How far a file is; nothing for what is small, or no file."""
    try:
        total = file.stat().st_size if file is not None and file.is_file() else 0
    except OSError:
        total = 0
    return Bar("sending", total, in_bytes=True) if total >= BAR_BYTES_MIN else Bar()


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        from spillway.client import InvalidArgument

        raise InvalidArgument(str(path), error.strerror or "it cannot be read") from None


def _headers(given: list[str]) -> dict[str, str]:
    headers = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"{one!r} is not NAME=VALUE", param_hint="--header")
        headers[name] = value
    return headers


def _record(number: int, line: bytes, template: Record) -> Record:
    """One line of JSON; what it does not say is the template's."""
    from spillway.client import InvalidArgument

    where = f"line {number}"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(where, f"it is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InvalidArgument(where, "it is not a JSON object")
    known = {"payload", "payload_base64", "tenant", "key", "id", "headers", "delay", "deliver_at", "ttl", "dedup_id"}
    if set(found) - known:
        raise InvalidArgument(where, f"{sorted(set(found) - known)} are not known; known are {sorted(known)}")
    try:
        changes: dict[str, Any] = {name: str(found[name]) for name in ("tenant", "key", "id", "dedup_id") if name in found}
        changes["payload"] = base64.b64decode(found["payload_base64"], validate=True) if "payload_base64" in found else (
            str(found.get("payload", "")).encode())
        changes["headers"] = {**(template.headers or {}), **{str(k): str(v) for k, v in dict(found.get("headers", {})).items()}}
        if found.keys() & {"delay", "deliver_at"}:  # one stands instead of the other
            changes["delay"] = changes["deliver_at"] = None
        for name, parse in (("delay", seconds), ("ttl", seconds), ("deliver_at", _moment)):
            if found.get(name) is not None:
                changes[name] = parse(found[name])
    except typer.BadParameter as error:
        raise InvalidArgument(f"{where}: {name}", error.message) from None
    except (ValueError, TypeError) as error:
        raise InvalidArgument(where, str(error)) from None
    return template._replace(**changes)


def _batches(records: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for record in records:
        batch.append(record)
        if len(batch) == BATCH_RECORDS:
            yield batch
            batch = []
    if batch:
        yield batch


def _message(message: Any) -> dict[str, Any]:
    out = {"destination": message.destination, "tenant": message.tenant, "key": message.key, "id": message.id,
           "headers": dict(message.headers), "shard": message.shard, "sequence": message.sequence,
           "attempt": message.attempt, "enqueue_time": message.enqueue_time.isoformat()}
    with_payload(out, message.payload)
    if message.gap is not None:
        out["gap"] = dataclasses.asdict(message.gap)
    return out


