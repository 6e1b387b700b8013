"""The commands of `spillway` that talk to a cluster. Needs the `cli` extra."""
from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import enum
import json
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from spillway.client.cli import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_UNAVAILABLE, EXIT_USAGE

CONNECT_SECONDS = 10.0
BATCH_RECORDS = 1000


class Output(enum.StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


Address = Annotated[list[str], typer.Option("--address", "-a", envvar="SPILLWAY_ADDRESS", metavar="HOST:PORT",
                                            help="A node of the cluster; may be given several times.")]
Format = Annotated[Output, typer.Option("--output", "-o", help="Tables for people, JSON for programs.")]
_ADDRESS = ["127.0.0.1:7070"]

app = typer.Typer(name="spillway", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
                  rich_markup_mode=None,
                  help="Spillway: a replicated, fair, strictly ordered multi-tenant message queue.",
                  epilog="Installed extras add commands: serve (spillway[broker]), dispatch (spillway[dispatch]).")
destinations = typer.Typer(no_args_is_help=True, help="Destinations: what consumers lease from.")
app.add_typer(destinations, name="destination")


def run(argv: list[str]) -> int:
    """Runs one command; returns the exit code."""
    try:
        app(args=argv, prog_name="spillway")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else EXIT_FAILED
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return EXIT_FAILED
    return 0


@app.command()
def produce(
    destination: Annotated[str, typer.Argument(help="Where the messages go.")],
    tenant: Annotated[str, typer.Option(help="Whose messages.")] = "",
    key: Annotated[str, typer.Option(help="Ordering key inside the tenant.")] = "",
    header: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A header; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read from here instead of standard input.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help=(
        "Each line is a JSON object: payload (text) or payload_base64, and optionally tenant, key, id, headers, delay. "
        "Without it each line is a payload."))] = False,
    whole: Annotated[bool, typer.Option(help="The whole input is one message.")] = False,
    output: Format = Output.TABLE,
    address: Address = _ADDRESS,
) -> None:
    """Sends messages, one per line of input; returns when all are stored."""
    from spillway.client import Client, Record

    headers = _headers(header or [])

    def records() -> Iterator[Record]:
        source = sys.stdin.buffer if file is None else _opened(file)
        with source:
            if whole:
                yield Record(destination, source.read(), tenant, key, headers)
                return
            for number, line in enumerate(source, 1):
                line = line.rstrip(b"\r\n")
                if json_lines:
                    yield _record(number, line, destination, tenant, key, headers)
                elif line:
                    yield Record(destination, line, tenant, key, headers)

    async def send() -> int:
        sent = 0
        async with Client(address) as client:
            await client.wait_ready(CONNECT_SECONDS)
            async with client.producer() as producer:
                for batch in _batches(records()):
                    for receipt in await producer.send_many(batch):
                        sent += 1
                        if output is Output.JSON:
                            print(json.dumps({"shard": receipt.shard, "sequence": receipt.sequence}))
        if output is Output.TABLE:
            print(f"{sent} messages stored", file=sys.stderr)
        return 0

    _run(send)


@app.command()
def consume(
    destination: Annotated[list[str], typer.Argument(help="Names, or patterns with '*'.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Stop after so many messages; 0: never.")] = 0,
    no_ack: Annotated[bool, typer.Option("--no-ack", help=(
        "Give messages back instead of acknowledging them. Only the head of each queue is seen."))] = False,
    idle: Annotated[float, typer.Option(help="Stop after so many seconds without a message; 0: never.")] = 0.0,
    output: Format = Output.TABLE,
    address: Address = _ADDRESS,
) -> None:
    """Prints messages as they come, and acknowledges each once it is printed."""
    from spillway.client import Client

    async def take() -> int:
        async with Client(address) as client:
            await client.wait_ready(CONNECT_SECONDS)
            credit = min(count, 256) if count else 256
            async with client.consumer(destination, name="spillway consume", credit_messages=credit) as consumer:
                taken = 0
                while not count or taken < count:
                    message = await consumer.next_message(idle or None)
                    if message is None:
                        break
                    taken += 1
                    if output is Output.JSON:
                        print(json.dumps(_message(message), ensure_ascii=False), flush=True)
                    else:
                        sys.stdout.buffer.write(message.payload + b"\n")
                        sys.stdout.buffer.flush()
                    if not no_ack:
                        message.ack()
        return 0

    _run(take)


@app.command()
def status(
    output: Format = Output.TABLE,
    address: Address = _ADDRESS,
) -> None:
    """Shows nodes and who leads which shard. Exit code 4 if a shard has no leader."""
    from spillway.client import Client, Unavailable

    async def show() -> int:
        async with Client(address) as client:
            try:
                topology = await client.wait_ready(2.0)
            except Unavailable:
                topology = client.topology
                if not topology.shard_count:
                    raise
        lacking = [shard for shard, leader in enumerate(topology.leaders, 1) if not leader]
        if output is Output.JSON:
            _print_json({
                "cluster": topology.cluster, "healthy": topology.ready,
                "nodes": [{"id": node, "address": where, "shards_led": sorted(topology.leads(node))}
                          for node, where in topology.nodes.items()],
                "shards": [{"shard": i, "leader": leader, "term": topology.terms[i - 1],
                            "replicas": list(topology.replicas[i - 1])} for i, leader in enumerate(topology.leaders, 1)]})
        else:
            print(f"cluster {topology.cluster!r}: {len(topology.nodes)} nodes, {topology.shard_count} shards"
                  + (f", without a leader: {', '.join(map(str, lacking))}" if lacking else ", all have a leader"))
            _print_table(("node", "address", "leads"), [
                (node, where, ", ".join(map(str, sorted(topology.leads(node))))) for node, where in topology.nodes.items()])
        return 0 if topology.ready else EXIT_UNAVAILABLE

    _run(show)


@destinations.command("list")
def destination_list(output: Format = Output.TABLE, address: Address = _ADDRESS) -> None:
    """Lists all destinations, by name."""

    async def show(admin: Any) -> int:
        found = [one async for one in admin.list_destinations()]
        if output is Output.JSON:
            _print_json([_plain(one) for one in found])
        else:
            _print_table(("name", "nack policy", "lease", "http"), [
                (one.name, one.policy.nack_policy.name.lower() if one.policy.nack_policy else "",
                 f"{one.policy.lease_seconds:g} s" if one.policy.lease_seconds else "", one.http.url if one.http else "")
                for one in found])
        return 0

    _run_admin(address, show)


@destinations.command("show")
def destination_show(name: Annotated[str, typer.Argument(help="The destination.")], output: Format = Output.TABLE,
                     address: Address = _ADDRESS) -> None:
    """Shows one destination's policy and target."""

    async def show(admin: Any) -> int:
        _print_one(_plain(await admin.get_destination(name)), output)
        return 0

    _run_admin(address, show)


@destinations.command("stats")
def destination_stats(name: Annotated[str, typer.Argument(help="The destination.")], output: Format = Output.TABLE,
                      address: Address = _ADDRESS) -> None:
    """Shows counts of one destination. Exit code 4 if shards did not answer."""

    async def show(admin: Any) -> int:
        stats = await admin.destination_stats(name)
        _print_one(_plain(stats), output)
        return EXIT_UNAVAILABLE if stats.shards_missing else 0

    _run_admin(address, show)


@destinations.command("apply")
def destination_apply(
    name: Annotated[str, typer.Argument(help="The destination.")],
    run_messages_max: Annotated[int | None, typer.Option(help="Longest run of one queue in a lease; 1 to 1024.")] = None,
    lease_seconds: Annotated[float | None, typer.Option(help="How long a lease lasts; 1 s to 12 h.")] = None,
    backoff_base: Annotated[float | None, typer.Option(help="Seconds before the first retry.")] = None,
    backoff_cap: Annotated[float | None, typer.Option(help="Seconds before a retry at most.")] = None,
    nack_policy: Annotated[str | None, typer.Option(metavar="block|block_until|skip", help=(
        "What happens to messages that fail."))] = None,
    attempts_max: Annotated[int | None, typer.Option(help="block_until: attempts before it is dead-lettered.")] = None,
    age_max: Annotated[float | None, typer.Option(help="block_until: seconds after which it is.")] = None,
    url: Annotated[str | None, typer.Option(help="Where the dispatcher sends its messages; '' for nowhere.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds per request of the dispatcher.")] = None,
    concurrency_max: Annotated[int | None, typer.Option(help="Requests at a time per dispatcher.")] = None,
    output: Format = Output.TABLE,
    address: Address = _ADDRESS,
) -> None:
    """Creates a destination, or changes what is given and keeps the rest."""
    from spillway.client import Destination, DestinationNotFound, HttpTarget, InvalidArgument, NackPolicy

    if nack_policy is not None and nack_policy.upper() not in NackPolicy.__members__:
        raise typer.BadParameter(f"{nack_policy!r} is not block, block_until or skip", param_hint="--nack-policy")
    changes: dict[str, Any] = {
        "run_messages_max": run_messages_max, "lease_seconds": lease_seconds, "backoff_base": backoff_base,
        "backoff_cap": backoff_cap, "nack_policy": NackPolicy[nack_policy.upper()] if nack_policy else None,
        "attempts_max": attempts_max, "age_max": age_max}
    changes = {field: value for field, value in changes.items() if value is not None}

    async def apply(admin: Any) -> int:
        try:
            old = await admin.get_destination(name)
        except DestinationNotFound:
            old = Destination(name)
        http = old.http
        if url is not None:
            http = HttpTarget(url, http.timeout if http else None, http.concurrency_max if http else None) if url else None
        if http is None and (timeout is not None or concurrency_max is not None):
            raise InvalidArgument("--timeout, --concurrency-max", "they need a --url")
        if http is not None:
            http = dataclasses.replace(http, timeout=http.timeout if timeout is None else timeout,
                                       concurrency_max=concurrency_max or http.concurrency_max)
        new = dataclasses.replace(old, policy=dataclasses.replace(old.policy, **changes), http=http)
        _print_one(_plain(await admin.update_destination(new, create=True)), output)
        return 0

    _run_admin(address, apply)


# -- inner -------------------------------------------------------------------------------------------------------


def _run(command: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Runs a command's coroutine, faster if uvloop is there, and exits; an error becomes a line and an exit code."""
    from spillway.client.errors import DestinationNotFound, InvalidArgument, SpillwayError, Unavailable

    try:
        try:
            import uvloop
        except ImportError:
            code = asyncio.run(command())
        else:
            code = uvloop.run(command())
    except SpillwayError as error:
        print(f"spillway: {error}", file=sys.stderr)
        code = EXIT_FAILED
        if isinstance(error, InvalidArgument):
            code = EXIT_USAGE
        elif isinstance(error, DestinationNotFound):
            code = EXIT_NOT_FOUND
        elif isinstance(error, Unavailable):
            code = EXIT_UNAVAILABLE
    raise typer.Exit(code)


def _run_admin(address: list[str], command: Callable[[Any], Coroutine[Any, Any, int]]) -> NoReturn:
    from spillway.client import Client

    async def connected() -> int:
        async with Client(address) as client:
            return await command(client.admin)

    _run(connected)


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


def _record(number: int, line: bytes, destination: str, tenant: str, key: str, headers: dict[str, str]) -> Any:
    from spillway.client import InvalidArgument, Record

    where = f"line {number}"
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InvalidArgument(where, f"it is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InvalidArgument(where, "it is not a JSON object")
    known = {"payload", "payload_base64", "tenant", "key", "id", "headers", "delay"}
    if set(found) - known:
        raise InvalidArgument(where, f"{sorted(set(found) - known)} are not known; known are {sorted(known)}")
    try:
        payload = base64.b64decode(found["payload_base64"], validate=True) if "payload_base64" in found else (
            str(found.get("payload", "")).encode())
        return Record(destination, payload, str(found.get("tenant", tenant)), str(found.get("key", key)),
                      {**headers, **{str(k): str(v) for k, v in dict(found.get("headers", {})).items()}},
                      str(found.get("id", "")), None if found.get("delay") is None else float(found["delay"]))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(where, str(error)) from None


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
    try:
        out["payload"] = message.payload.decode()
    except UnicodeDecodeError:
        out["payload_base64"] = base64.b64encode(message.payload).decode()
    if message.gap is not None:
        out["gap"] = dataclasses.asdict(message.gap)
    return out


def _plain(value: Any) -> dict[str, Any]:
    return {name: _scalar(field) for name, field in dataclasses.asdict(value).items()}


def _scalar(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _scalar(field) for name, field in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, enum.Enum):
        return value.name.lower()
    return value


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_one(value: dict[str, Any], output: Output) -> None:
    if output is Output.JSON:
        _print_json(value)
        return
    rows = []
    for name, field in value.items():
        if isinstance(field, dict):
            rows += [(f"{name}.{inner}", "" if one is None else str(one)) for inner, one in field.items()]
        else:
            rows.append((name, "" if field is None else str(field)))
    _print_table(("field", "value"), rows)


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)


__all__ = ["app", "run"]
