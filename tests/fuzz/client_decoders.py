"""Decoders of the client, the command line and the dispatcher: what brokers answer, files of policies, what receivers answer."""
from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

import typer
from google.protobuf.message import DecodeError
from spillway.client import admin_wire, policy_file, producer, settlements
from spillway.client.commands import common, messages
from spillway.client.connection import Health
from spillway.client.consumer import Consumer
from spillway.client.dispatcher import addresses, headers, outcome, sender, signing
from spillway.client.errors import InternalError, InvalidArgument, PartialFailure, SpillwayError
from spillway.client.leases import LeasedRun
from spillway.client.model import Record
from spillway.client.sequencing import Entry
from spillway.client.settlements import ACK, RETRY, Settlement
from spillway.client.topology import Router, Topology, TopologyWatch, merged
from spillway.contract import backup, snapshot
from spillway.contract.backup import Manifest
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1.cluster_service_pb2 import Node, Shard
from spillway.v1.cluster_service_pb2 import Topology as TopologyProto
from spillway.v1.message_pb2 import ERROR_CODE_INVALID_ARGUMENT, ERROR_CODE_UNAVAILABLE, ItemError, Message
from spillway.v1.queue_service_pb2 import AckResponse, Gap, LeasedMessage, LeaseResponse, ProduceResponse
from spillway.v1.queue_service_pb2 import LeasedRun as LeasedRunProto
from yarl import URL

from tests.fuzz.decoder import Decode, Decoder, Rewritten, expect, join, plain, split
from tests.fuzz.node_decoders import destination_sample, route_sample

NOW = 1_700_000_000_000
_CHANNELS: Any = None  # nothing is sent
ASKED = 4  # records or settlements of a request that is answered


def _text(data: bytes) -> str | None:
    """What a header, a name or an option can be; None for what is no text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


# -- streams ----------------------------------------------------------------------------------------------------------


@contextmanager
def _in_loop() -> Iterator[Callable[[Callable[[bytes], object]], Decode]]:
    """Makes decoders out of functions that need a loop around them."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()

        async def inside(decode: Callable[[bytes], object], data: bytes) -> None:
            decode(data)

        def wrap(decode: Callable[[bytes], object]) -> Decode:
            return lambda data: loop.run_until_complete(inside(decode, data))

        yield wrap


def _router() -> Router:
    health = Health(lambda: 0.0)
    return Router(TopologyWatch(["127.0.0.1:1"], _CHANNELS, health), health)


class _Settled:
    """Takes settlements, and tells their consumer that they are committed."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def submit(self, settlement: Settlement) -> None:
        settlement.finish(None)
        self._consumer._finished(settlement, None)


def _leased(data: bytes) -> None:
    """A frame of leases: read in every way, and settled as applications do."""
    response = LeaseResponse.FromString(data)
    consumer = Consumer(_router(), _CHANNELS, ["d"])
    consumer._settler = _Settled(consumer)  # type: ignore[assignment]
    stream: Any = object()
    consumer.credits.add(stream, 0.0)
    consumer.delivered(stream, response, 0.0)
    runs = list(consumer._buffer)
    for number, run in enumerate(runs):
        _read(run)
        if number % 3 == 0:
            run.ack()
        elif number % 3 == 1:
            run.ack(run.messages[0])
            run.release()
        else:
            for message in reversed(run.messages):
                if message.position:
                    message.ack()
                else:
                    message.retry(1.0, "why")
        expect(run.ended, run)
    for timer in (consumer._replan_timer, consumer._extend_timer):
        if timer is not None:
            timer.cancel()


def _read(run: LeasedRun) -> None:
    expect(run.count == len(run.messages) == len(run.payloads) > 0, run)
    repr(run)
    shared = headers.run_headers(run)
    for message in run.messages:
        repr(message)
        found = headers.request_headers(shared, run.shard, message, message.gap)
        _check_headers(found)
        _ = message.enqueue_time.isoformat(), dict(message.headers), message.payload, message.enqueue_unix_ms


def _check_headers(found: dict[str, str]) -> None:
    """No header smuggles another one in."""
    lower = [name.lower() for name in found]
    expect(len(set(lower)) == len(lower) and not headers.CONNECTION_HEADERS & set(lower), found)
    for name, value in found.items():
        expect(headers._TOKEN.fullmatch(name) and value.isascii() and not headers._CONTROL.search(value), (name, value))


class _Sink:
    """Counts outcomes."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def stored(self, position: int, receipt: object) -> None:
        self.told.append(position)

    def failed(self, position: int, error: SpillwayError) -> None:
        str(PartialFailure([None] * ASKED, {position: error}))
        self.told.append(position)


def _produced(data: bytes) -> None:
    """An answer to two shards' records: each has its outcome, or is kept, or the answer is refused and changes nothing."""
    response = ProduceResponse.FromString(data)
    made = producer.Producer(_router(), _CHANNELS, payload_bytes_max=1 << 20)
    made._offer = made._blocked = lambda lane: None  # type: ignore[method-assign]
    sink = _Sink()
    parts = []
    for shard in (1, 2):
        lane = producer._Lane(shard, "p", lambda: "q")
        for position in range(ASKED // 2):
            lane.add(Entry(b"body", sink, (shard - 1) * 2 + position))
        parts.append((lane, lane.take(ASKED, 1 << 20, oversize=True)[0]))
    batch = producer._Request(b"", parts)
    stream: Any = object.__new__(producer._Stream)
    stream.producer, stream.address = made, "127.0.0.1:1"
    try:
        stream.check(batch, response)
    except InternalError:
        expect(not sink.told and all(lane.in_flight for lane, _ in parts), response)
        raise
    stream.answered(batch, response)
    for lane, _ in parts:
        for _ in range(3):
            if lane.stuck:
                lane.resume()
            lane.broken(entries) if (entries := lane.take(ASKED, 1 << 20, oversize=True)[0]) else None
    for lane, _ in parts:
        lane.fail_all(lambda sent: InternalError("over"))
        expect(lane.idle, lane)
    expect(sorted(sink.told) == list(range(ASKED)), sink.told)


class _Leased:
    """As much of a run as settlements use."""

    shard, fencing_token, unsure = 1, 5, 1


def _acked(data: bytes) -> None:
    """An answer to settlements: each has its outcome, or is kept to be sent again."""
    response = AckResponse.FromString(data)
    finished: list[Settlement] = []
    settler = settlements.Settler(_router(), _CHANNELS, lambda one, error: finished.append(one))
    settler.unfinished = ASKED
    batch = settlements._Request(b"", [Settlement(_Leased(), outcome, 1, 7, None, "")  # type: ignore[arg-type]
                                       for outcome in (ACK, ACK, RETRY, settlements.EXTEND)])
    stream: Any = object.__new__(settlements._Stream)
    stream.settler, stream.address, stream.pending = settler, "127.0.0.1:1", deque()
    try:
        stream.check(batch, response)
    except InternalError:
        expect(not finished and settler.unfinished == ASKED, response)
        raise
    stream.answered(batch, response)
    if settler._timer is not None:
        settler._timer.cancel()
    expect(len(finished) + len(settler._retry) == ASKED and settler.unfinished == len(settler._retry), settler._retry)


def _streams(decode: Callable[[bytes], object]) -> Callable[[], Any]:
    @contextmanager
    def opened() -> Iterator[Decode]:
        with _in_loop() as wrap:
            yield wrap(decode)

    return opened


def _topology(data: bytes) -> None:
    """What nodes say of the cluster, one after the other."""
    known = Topology()
    for part in split(data):
        heard = TopologyProto.FromString(part)
        known = merged(known, heard)
        expect(len(known.leaders) == len(known.terms) == len(known.replicas) == known.shard_count, known)
        for shard in range(known.shard_count + 2):
            known.leader_of(shard)
        _ = known.ready, [known.leads(node) for node in known.nodes]


_TOPOLOGY = TopologyProto(cluster="c", shard_count=4, nodes=[Node(id="n1", address="a:1"), Node(id="n2", address="b:2")], shards=[
    Shard(shard=number, leader=f"n{1 + number % 2}", term=number, replicas=["n1", "n2"]) for number in range(1, 5)])


# -- admin ------------------------------------------------------------------------------------------------------------


def _admin(data: bytes) -> None:
    """An answer of the admin service; the first byte says to what."""
    kind, read = _ADMIN[data[0] % len(_ADMIN) if data else 0]
    found = common.plain(read(kind.FromString(data[1:])))
    common.flat(found) if isinstance(found, dict) else str(found)


def _destination_again(found: pb.Destination) -> object:
    made = admin_wire.destination_from_pb(found)
    policy_file.filled(made)
    with suppress(InvalidArgument):  # what no broker takes cannot be sent
        admin_wire.destination_to_pb(made)
    return made


_ADMIN: list[tuple[Any, Callable[[Any], object]]] = [
    (pb.Destination, _destination_again), (pb.Route, admin_wire.route_from_pb), (pb.GetDestinationStatsResponse, admin_wire.stats_from_pb),
    (pb.DeadLetter, admin_wire.dead_letter_from_pb), (pb.Gate, admin_wire.gate_from_pb),
    (pb.ExplainResponse, admin_wire.explanation_from_pb), (pb.PeekedMessage, admin_wire.peeked_from_pb)]


def _admin_samples() -> tuple[bytes, ...]:
    message = Message(id="m", headers={"h": "v"}, payload=b"p")
    stats = pb.GetDestinationStatsResponse(shards_missing=[1, 2])
    stats.stats.messages = 5
    dead = pb.DeadLetter(shard=1, sequence=2, destination="d", tenant="t", key="k", attempts=3, reason="r", message=message)
    gate = pb.Gate(tenant="t", cause=pb.GATE_CAUSE_PARKED, step=2, reason="r")
    told = pb.ExplainResponse(sentence="s", cause=1, messages=5)  # type: ignore[arg-type]
    peeked = pb.PeekedMessage(sequence=2, attempts=3, leased=True, message=message)
    for stamp in (stats.stats.oldest_enqueue_time, stats.stats.parked_until_time, dead.enqueue_time, dead.dead_time, gate.until_time,
                  told.until_time, told.drain_time, peeked.enqueue_time, peeked.deliver_time, peeked.expire_time):
        stamp.FromMilliseconds(NOW)
    made = (destination_sample(), route_sample(), stats, dead, gate, told, peeked)
    return tuple(bytes((number,)) + one.SerializeToString() for number, one in enumerate(made))


# -- files ------------------------------------------------------------------------------------------------------------

_DESTINATIONS = b"""[[destination]]
name = "d"
run_messages_max = 5
lease_seconds = "1m30s"
backoff_cap = 7.5
nack_policy = "skip"
ordered = false
retention = {bytes_max = "1.5 GiB", age_max = "7d"}
tenants.t = {weight = 2, limit = {messages_per_second = 5.5, burst = 3}}
adaptive_limit = {floor = 2}
[destination.http]
url = "https://user@example.com/x"
timeout = "250ms"
headers = {"X-A" = "b"}
signing_secrets = ["whsec_AAAA"]
"""
_ROUTES = b"""[[route]]
source = "r"
targets = ["d", {destination = "e", filter = 'tenant == "t"', skip_over_budget = true}]
"""


@contextmanager
def _policies() -> Iterator[Decode]:
    with TemporaryDirectory() as name, Rewritten(Path(name) / "policies.toml") as file:

        def decode(data: bytes) -> None:
            """A file of destinations and routes; what it says can be compared, printed and, if a broker may take it, sent."""
            file.write(data)
            refused = []
            try:
                for one in policy_file.load_destinations(file.path).values():
                    common.plain(policy_file.filled(one))
                    with suppress(InvalidArgument):  # what is out of range, only brokers know
                        again = admin_wire.destination_from_pb(admin_wire.destination_to_pb(one))
                        expect(again.name == one.name, one)
            except InvalidArgument as error:  # of one kind, but not of the other
                refused.append(error)
            try:
                for route in policy_file.load_routes(file.path).values():
                    admin_wire.route_from_pb(admin_wire.route_to_pb(route))
            except InvalidArgument as error:
                refused.append(error)
            if len(refused) == 2:
                raise refused[0]
            policy_file.other_tables(file.path, "route")

        yield decode


def _options(data: bytes) -> None:
    """Durations, sizes and times of the command line."""
    text = _text(data)
    if text is None:
        return
    for parse in (common.seconds, messages._moment, lambda text: messages._headers([text]), policy_file.parse_size):
        try:
            parse(text)  # type: ignore[operator]
        except (typer.BadParameter, ValueError):
            if data[-1:] == b" ":  # each may refuse what another one takes
                raise


def _line(data: bytes) -> None:
    record = messages._record(1, data, Record("d", b"", headers={"a": "b"}))
    expect(isinstance(record.payload, bytes), record)


# -- requests to receivers --------------------------------------------------------------------------------------------


def _message_headers(data: bytes) -> None:
    """Headers of a message, which a tenant chose: names and values that gRPC has let through."""
    texts = [_text(part) for part in split(data)]
    given = {name: value for name, value in zip(texts[::2], texts[1::2], strict=False) if name is not None and value is not None}
    _check_headers(headers.message_headers(given))
    for text in texts:
        if text is not None:
            expect(unquote(headers.encode(text)) == text, text)


def _answer(data: bytes) -> None:
    """Status and headers of a receiver's answer, as HTTP libraries give them, with bytes that are no UTF-8 as surrogates."""
    parts = [part.decode("utf-8", "surrogateescape") for part in split(data[2:])]
    status = int.from_bytes(data[:2], "big") % 700
    made = outcome.decide(status, {"Retry-After": parts[0]} if parts else {}, None, NOW / 1000)
    expect(made.delay is None or 0 <= made.delay <= outcome.RETRY_AFTER_SECONDS_MAX, made)
    to = sender._redirected(URL("https://user@example.com/x?y"), parts[1] if len(parts) > 1 else None)
    expect(isinstance(to, str) or (to.scheme == "https" and to.host and to.user is None), to)


def _address(data: bytes) -> None:
    kind = addresses.special(data.decode("utf-8", "surrogateescape"))
    expect(kind is None or kind, data)


def _secret(data: bytes) -> None:
    text = _text(data)
    if text is not None:
        made = signing.Signer([text]).headers("id.1", b"payload", NOW / 1000)
        expect(set(made) == signing.SIGNATURE_HEADERS and made[signing.SIGNATURE].startswith("v1,"), made)


# -- backups ----------------------------------------------------------------------------------------------------------


_BACKUP = Manifest("c", 2, 3, "1.0", datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC),
                   tuple(backup.GroupFile(group, 9, 2, 5, 100, "ab" * 32) for group in range(3)))


def _manifest(data: bytes) -> None:
    found = backup.decode_manifest(data)
    expect(backup.decode_manifest(backup.encode_manifest(found).encode()) == found, found)
    expect({"/", "\0"}.isdisjoint("".join(group.name for group in found.groups)), found)


def _group_file(*rows: tuple[bytes, bytes]) -> bytes:
    bodies = [(b"H", snapshot.HEADER.pack(snapshot.FORMAT, 1, 9, 2)),
              *((b"R", snapshot.ROW.pack(len(key), len(value)) + key + value) for key, value in rows),
              (b"T", snapshot.TRAILER.pack(len(rows)))]
    made, checksum = b"", 0
    for number, (kind, body) in enumerate(bodies):
        chunk, checksum = snapshot.seal(kind, number, checksum, body)
        made += backup.LENGTH.pack(len(chunk)) + chunk
    return made


_GROUP_FILE = _group_file((b"key", b"value"), (b"other", b""))


@contextmanager
def _group() -> Iterator[Decode]:
    """A group's file: whatever is let through is what was written."""
    with TemporaryDirectory() as name, Rewritten(Path(name) / backup.file_name(1)) as file:
        group = backup.GroupFile(1, 9, 2, 2, len(_GROUP_FILE), hashlib.sha256(_GROUP_FILE).hexdigest())

        def decode(data: bytes) -> None:
            file.write(data)
            list(backup.read_chunks(Path(name), group))
            expect(data == _GROUP_FILE, data)

        yield decode


def decoders() -> list[Decoder]:
    """All of them. What gRPC cannot parse it refuses by itself."""
    client, dispatcher = "spillway.client.", "spillway.client.dispatcher."
    broken = (InternalError, DecodeError)
    errors = [ItemError(index=1, code=ERROR_CODE_UNAVAILABLE, description="why"),
              ItemError(index=3, code=ERROR_CODE_INVALID_ARGUMENT, field="records[3].tenant", description="why")]
    run = LeasedRunProto(shard=1, fencing_token=5, expire_unix_ms=NOW * 2, destination="d", tenant="t", key="k", messages=[LeasedMessage(
        sequence=i, attempt=1, enqueue_unix_ms=NOW, message=Message(id="m", headers={"h": "v"}, payload=b"p")) for i in (1, 2, 3)])
    gap = LeasedRunProto(expire_unix_ms=NOW * 2, messages=run.messages[:1], gap=Gap(count=1, first_sequence=2, last_sequence=3))
    return [
        Decoder("client-leases", _streams(_leased), broken, (LeaseResponse(runs=[run, gap, run]).SerializeToString(),
                                                             LeaseResponse(draining=True).SerializeToString()),
                (client + "consumer", client + "leases", dispatcher + "headers")),
        Decoder("client-produce-answer", _streams(_produced), broken, (
            ProduceResponse(sequences=[1, 2, 3, 4]).SerializeToString(),
            ProduceResponse(sequences=[1, 0, 3, 0], errors=errors).SerializeToString(),
            ProduceResponse(sequences=[0] * 4, errors=[ItemError(index=i, code=i + 1) for i in range(4)]).SerializeToString()),  # type: ignore[arg-type]
                (client + "producer", client + "sequencing", client + "errors")),
        Decoder("client-ack-answer", _streams(_acked), broken, (
            AckResponse(results=[1, 2, 1, 1]).SerializeToString(), AckResponse(results=[1, 3, 1, 3], errors=errors).SerializeToString()),
                (client + "settlements", client + "errors")),
        Decoder("client-topology", plain(_topology), broken, (
            join((_TOPOLOGY.SerializeToString(),)), join((_TOPOLOGY.SerializeToString(), _TOPOLOGY.SerializeToString()))),
                (client + "topology",)),
        Decoder("client-admin-answer", plain(_admin), broken, _admin_samples(), (client + "admin_wire",)),
        Decoder("policy-file", _policies, (InvalidArgument,), (_DESTINATIONS, _ROUTES, _DESTINATIONS + _ROUTES, b'name = "d"\nttl = 5'),
                (client + "policy_file", client + "admin_wire")),
        Decoder("command-options", plain(_options), (typer.BadParameter, ValueError), (
            b"1h30m 250ms", b"7.5", b"1.5 GiB", b"2030-01-31T08:00:00+01:00", b"X-A=b"), (client + "policy_file",)),
        Decoder("produce-line", plain(_line), (InvalidArgument,), (
            b'{"payload": "p", "tenant": "t", "key": 5, "id": "i", "headers": {"a": "b"}, "delay": "5s", "ttl": 7.5, "dedup_id": "x"}',
            b'{"payload_base64": "AAAA", "deliver_at": "2030-01-31T08:00:00Z"}'), (client + "commands.messages",)),
        Decoder("message-headers", plain(_message_headers), (), (
            join((b"X-A", b"b", b"content-type", b"text/plain", b"Connection", b"x, y", b"Spillway-Key", b"\xc3\xa9")),),
                (dispatcher + "headers",)),
        Decoder("receiver-answer", plain(_answer), (), (
            b"\1\xad" + join((b"120", b"https://example.com/y#z")), b"\1\xf7" + join((b"Wed, 21 Oct 2026 07:28:00 GMT", b"//other/../x")),
            b"\1\x33" + join((b"Wednesday, 21-Oct-26 07:28:00 GMT", b"http://[::1]:80/")), b"\0\xc8"),
                (dispatcher + "outcome", dispatcher + "sender")),
        Decoder("backup-manifest", plain(_manifest), (backup.BackupInvalid,), (backup.encode_manifest(_BACKUP).encode(),),
                ("spillway.contract.backup",)),
        Decoder("backup-group", _group, (backup.BackupInvalid,), (_GROUP_FILE,),
                ("spillway.contract.backup", "spillway.contract.snapshot")),
        Decoder("receiver-address", plain(_address), (), (
            b"93.184.216.34", b"2606:2800:220:1:248:1893:25c8:1946", b"fe80::1%eth0", b"::ffff:10.0.0.1"), (dispatcher + "addresses",)),
        Decoder("signing-secret", plain(_secret), (ValueError,), (b"whsec_" + b"AAAA" * 8, b"whsec_" + b"b" * 43 + b"="),
                (dispatcher + "signing",)),
    ]


