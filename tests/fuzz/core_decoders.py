"""Decoders of the broker's core: log entries, rows and filters, with the state that is made of them."""
from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import msgspec
from spillway.broker.core import directory as d
from spillway.broker.core import rows
from spillway.broker.core.access import ADMIN, LEASE, Grants, Scope, Token
from spillway.broker.core.entry import (
    ACK,
    DONE,
    EXTEND,
    KEEP,
    REJECT,
    RETRY,
    VERSION,
    Enqueue,
    Entry,
    decode_entry,
    encode_entry,
)
from spillway.broker.core.errors import CorruptEntry
from spillway.broker.core.features import LEVEL_MIN
from spillway.broker.core.filters import Filter, FilterError
from spillway.broker.core.outbox import OUTBOX, Promise, decode_promise, encode_promise
from spillway.broker.core.policy import (
    Adaptive,
    Limit,
    Nack,
    Policy,
    Retention,
    TenantPolicy,
    backoff_ms,
    dead_reason,
    park_ms,
)
from spillway.broker.core.shard import Checkpoint, Shard
from spillway.broker.core.view import MemoryView
from spillway.broker.runtime.wire import run_parts
from spillway.broker.services.destinations import destination_proto
from spillway.broker.services.routes import route_proto
from spillway.broker.services.tokens import token_proto
from spillway.contract.hashing import PART
from spillway.v1.message_pb2 import Message
from spillway.v1.queue_service_pb2 import LeaseResponse

from tests.fuzz.decoder import Decoder, expect, join, pairs, plain
from tests.unit.core.shard_log import NOW, OTHER, QUEUE, Log

INDEX = 100  # of the entries that are applied, above those of the state's
DUE = NOW + 60_000
NAMES = (QUEUE, OTHER, b"d\0t2\0", b"e\0t\0k", OUTBOX)
BODY = Message(id="m", headers={"h": "v"}, payload=b"payload").SerializeToString()


# -- the state that entries are applied to ---------------------------------------------------------------------------


def _told() -> Log:
    """A shard with something of everything: some of it leased, delayed, dead, in the outbox, remembered."""
    log = Log()
    log.enqueue(*[BODY] * 6, producer="p", first=1)
    log.enqueue(BODY, name=OTHER, options={0: (DUE, DUE + 1, b"i" * 16, DUE)})
    log.enqueue(BODY, BODY, name=b"d\0t2\0")
    log.enqueue(BODY, BODY, name=b"u\0t\0k" + PART)
    log.enqueue(encode_promise(Promise(["d", "e"], ["f"], b"t\0k", BODY)), name=OUTBOX)
    log.apply([Enqueue("\x021", 0, [b"e\0t\0k"], [BODY], None, None, [5], 1 << 20)], gates=[(b"e", DUE, 1)])
    log.reject(1)
    log.grant(2)
    log.checkpoint()
    log.grant(1, b"d\0t2\0")
    log.enqueue(BODY, name=QUEUE)
    return log


@cache
def stored() -> dict[bytes, bytes]:
    """The rows of that state."""
    log = _told()
    log.checkpoint()
    return dict(log.view.rows)


def view_of(found: Iterable[tuple[bytes, bytes]]) -> MemoryView:
    """A view of rows."""
    made = Checkpoint()
    made.puts = list(found)
    view = MemoryView()
    view.commit(made)
    return view


def _applied(entry: Entry) -> None:
    """Applies an entry to the state, saves that, and looks whether what is read is what was saved."""
    view = view_of(stored().items())
    shard = Shard(view)
    shard.apply(INDEX, entry)
    digest = shard.digest()
    view.commit(shard.checkpoint())
    expect(Shard(view).digest() == digest, "another state was read than was saved")


def _entry(data: bytes) -> None:
    entry = decode_entry(data)
    expect(decode_entry(encode_entry(entry)) == entry, entry)
    _applied(entry)


def _entry_samples() -> tuple[bytes, ...]:
    log = _told()
    token, queue = next((t, q) for t, q in Shard(view_of(stored().items())).leases.items() if q.key == QUEUE)
    first = queue.floor
    dead = next(key for key in stored() if key.startswith(rows.DEAD))
    every = Entry(
        VERSION, NOW + 5, [Enqueue("p", 7, [QUEUE, b"new\0\0"], [BODY, BODY], None, {1: (DUE, 0, b"", 0)}),
                           Enqueue("\x021", 5, [b"e\0t\0k"], [BODY], None, None, [9], 1 << 20)],
        [(token, 1, first, ACK, 0, ""), (token, 1, 0, RETRY, DUE, "later")], [(3 << 20, KEEP, DUE, "")],
        [(b"d\0t", DUE, 2)], [(b"e\0t\0k", 1, DUE, 0)], ["c"], [(OUTBOX, 1, 5 << 20, DONE, "")], [b"d\0t2\0"], [dead], [dead],
        [(b"e", 2)])
    old = [1, NOW, [["p", 7, [QUEUE, OTHER], [BODY, BODY], {1: DUE}]], [[token, 1, first, ACK, 0, ""]], [[token, True, 0, "x"]],
           [], [[OTHER, 1, DUE, 0]], ["c"]]
    return (encode_entry(every), msgspec.msgpack.encode(old),
            encode_entry(Entry(VERSION, DUE, [], [(token, 0, 0, REJECT, 0, "no")], [(token, KEEP, DUE, "")])),
            encode_entry(Entry(VERSION, DUE, [], [(token, 0, 0, EXTEND, DUE, "")], trims=[(b"e\0t\0k", 1, 6 << 20, 1, "old")])),
            *(command for _, command in log.entries))


# -- rows -------------------------------------------------------------------------------------------------------------


def _row(kind: type[Any]) -> Any:
    def decode(data: bytes) -> None:
        row = rows.decode_row(kind, data)
        expect(rows.decode_row(kind, rows.encode_row(row)) == row, row)

    return decode


def _message_row(data: bytes) -> None:
    key, value = data[:12], data[12:]
    message = rows.decode_message(key, value)
    expect(rows.decode_message(key, rows.encode_message(message)) == message, message)


def _dedup_row(data: bytes) -> None:
    sequence, until = rows.decode_dedup(data)
    expect(rows.dedup_row(sequence, until) == data, data)
    rows.dedup_due(until, b"i" * 16)


def _every_name(shard: Shard) -> set[bytes]:
    return {key[1:] for key, _ in shard.view.scan(rows.QUEUE, b"r")} | {*NAMES, *shard.queues}


def _state(data: bytes) -> None:
    """Rows as a checkpoint or another node's snapshot left them: loaded, read in every way, delivered, changed and saved."""
    view = view_of(pairs(data))
    shard = Shard(view)
    names = sorted(_every_name(shard))
    list(shard.ready_queues())
    for destination in {name.partition(b"\0")[0] for name in names}:
        shard.oldest(destination)
        shard.top_tenants(destination, 10)
        shard.dead_letters(destination, None, b"", 100)
    for name in names:
        shard.head_ms(name)
        shard.tenant(name[:name.rfind(b"\0")])
        queue = shard.open(name)
        if queue is not None:
            shard.ensure(queue, 100)
            if queue.front:
                # Their bodies are nobody's business but the consumers'.
                _expect_frame(run_parts(1, queue, [(*m[:3], BODY, m[4]) for m in queue.front])[0], len(queue.front))
    shard.digest()
    dead = [key for key, _ in view.scan(rows.DEAD, b"e")]
    tokens = list(shard.leases)
    shard.apply(INDEX, Entry(VERSION, NOW + 1, [Enqueue("p", 7, [name], [BODY], None, {0: (0, 0, b"i" * 16, DUE)}) for name in NAMES],
                             [(token, 1, 0, ACK, 0, "") for token in tokens]))
    shard.apply(INDEX + 1, Entry(VERSION, NOW + 10 ** 7, expires=[(token, KEEP, DUE, "") for token in tokens],
                                 grants=[(name, 1, DUE, 0) for name in names], consumers=["c"], redrives=dead[:2], dead_purges=dead[2:],
                                 purges=names[::2]))
    view.commit(shard.checkpoint())
    Shard(view).digest()


def _expect_frame(pieces: list[bytes], count: int) -> None:
    run, = LeaseResponse.FromString(b"".join(pieces)).runs
    expect(len(run.messages) == count, run)


def _state_samples() -> tuple[bytes, ...]:
    found = stored()
    old = {key: _older(key, value) for key, value in found.items()}
    one = {key: value for key, value in found.items() if key[1:2] == b"e" or key in (rows.CLOCK, b"pp")}
    return tuple(join(part for row in sorted(one.items()) for part in row) for one in (found, old, one))


def _older(key: bytes, value: bytes) -> bytes:
    """A row as version 1 wrote it: without the fields that came later."""
    kept = {rows.QUEUE: 12, rows.STATS: 9}.get(key[:1])
    return value if kept is None else msgspec.msgpack.encode(msgspec.msgpack.decode(value)[:kept])


def _promise(data: bytes) -> None:
    promise = decode_promise(data)
    expect(decode_promise(encode_promise(promise)) == promise, promise)


# -- the meta group ---------------------------------------------------------------------------------------------------

POLICY = Policy(
    16, 5_000, 100, 10_000, Nack.BLOCK_UNTIL, 3, 60_000, 3.0, 0.5, False, 60_000, True, 1_000, 4096, Limit(5.0, 10, 3), Limit(1.0),
    Retention(1 << 20, 5_000), Retention(1 << 10), 2.0, {"t": TenantPolicy(0.5, Limit(2.0), Retention(5, 6))}, Adaptive(False, 2, 3),
    60_000)
HTTP = d.HttpTarget("https://example.com/x", 5_000, 4, {"A": "b"}, ("whsec_" + "AAAA" * 8,), True, 2)
DESTINATION = d.destination("d", POLICY, HTTP)
COMMANDS: list[d.Command] = [
    d.PutDestination("n1", 1, DESTINATION, True, False, 0),
    d.PutV1("n1", 2, d.DestinationV1("e", 0, 64, 30_000, 200, 60_000, 1, 0, 0, HTTP), True, True, 0),
    d.PutRoute("n1", 3, d.Route("r", 0, (d.Target("d", 'tenant == "t"', True), d.Target("e"))), True, True, 0),
    d.DropRoute("n2", 4, "r", 0),
    d.SetHold("n1", 5, b"d\0t", "why", True), d.SetHold("n1", 6, b"d", park_until=DUE, park_why="x"),
    d.Settle("n1", 7, (d.Home(1, 0, ("n1", "n2")),),
             (d.Member("n1", 0, "p:1", "c:1"), d.Member("n2", 0, "p:2", "c:2", "z", "h", "i")), True),
    d.PutMember("n2", 8, d.Member("n3", 0, "p:3", "c:3", "z", "h", "i", d.DRAINS, 1, 2), True, True, 0, (d.Home(2, 0, ("n3",)),)),
    d.DropMember("n2", 9, "n9", 0), d.Raise("n1", 10, 2),
    d.PutToken("n1", 11, Token("id", 0, "ci", bytes(32), (Scope(LEASE, "a*"), Scope(ADMIN, "b", "")), NOW, NOW, 1, 2, 3)),
    d.DropToken("n2", 12, "other")]


def _command(data: bytes) -> None:
    directory = d.Directory()
    directory.apply(1, d.encode_command([d.PutDestination("n1", 1, d.destination(name, Policy()), True, False, 0) for name in "de"]))
    changes, puts, deletes = directory.apply(2, data)
    kept = [row for row in puts if row[0] not in deletes]
    again = d.Directory()
    again.load(iter(kept))
    for change in changes:
        if change.outcome == d.OK and isinstance(change.record, d.Destination | d.Route | d.Hold):
            _use(change.record)
    expect(again.level in (LEVEL_MIN, directory.level), again.level)
    expect(again.homes.items() <= directory.homes.items(), again.homes)
    expect(again.tokens.items() <= directory.tokens.items(), again.tokens)
    for one in (again.destinations, again.routes, again.holds, again.members):
        for name, record in one.items():
            current = directory.destinations | directory.routes | directory.holds | directory.members  # type: ignore[operator]
            expect(current.get(name) == record, record)


def _use(record: d.Destination | d.Route | d.Hold) -> None:
    """What every node does with a record that it has applied or loaded."""
    if isinstance(record, d.Destination):
        destination_proto(record).SerializeToString()
        for step in (0, 5, 1000):
            expect(backoff_ms(record.policy, step, 0.5) > 0, record)
            expect(park_ms(record.policy, step, 0.5) > 0, record)
            dead_reason(record.policy, step, 1)
    elif isinstance(record, d.Route):
        route_proto(record).SerializeToString()


def _directory(data: bytes) -> None:
    directory = d.Directory()
    directory.load(iter(pairs(data)))
    for record in (*directory.destinations.values(), *directory.routes.values(), *directory.holds.values()):
        _use(record)
    for token in directory.tokens.values():
        token_proto(token).SerializeToString()
        expect(Grants(token.scopes).allows(LEASE, "a") in (True, False), token)


def _directory_samples() -> tuple[bytes, ...]:
    directory = d.Directory()
    _, puts, _ = directory.apply(1, d.encode_command(COMMANDS[:3] + COMMANDS[4:]))
    old = (b"e", msgspec.msgpack.encode(d.DestinationV1("e", 1, 64, 30_000, 200, 60_000, 2, 0, 0)))
    return (join(part for row in puts for part in row), join(old), *(join(row) for row in puts))


# -- filters ----------------------------------------------------------------------------------------------------------

FILTERS = (
    'headers["type"] == "order"', 'tenant in ["a", "b"] && !(key == "k")', 'headers.type.matches(r"^a[b-d]{2,5}\\w+$") || id != ""',
    'headers.exists(h, h.startsWith("x-"))', 'size(key) > 3 ? has(headers.a) : int(id) + 1 < 5', '"x" in headers',
    'timestamp(headers.at) < timestamp("2030-01-01T00:00:00Z")', '[1, 2.5, 3u].all(n, n > 0)',
    'duration("1h").getHours() == 1 // why', '{"a": [1]}["a"][0] == 1')
HEADERS = [{}, {"type": "order", "a": "1", "x-y": "", "at": "2029-01-01T00:00:00Z"}]


def _filter(data: bytes) -> None:
    found = Filter(data.decode("utf-8", "surrogatepass"))
    for headers in HEADERS:
        try:
            found.matches(headers, "t", "key", "7")
        except FilterError:
            pass


def _filter_text(data: bytes) -> None:
    """As text that is none of UTF-8 cannot come from anywhere, it is left out."""
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return
    _filter(data)


# -- the list ---------------------------------------------------------------------------------------------------------

_ROWS: dict[type[Any], list[msgspec.Struct]] = {
    rows.QueueRow: [rows.QueueRow(1, 3, 1 << 40, 2, 99, 98, 7 << 20, 3, 1, 1_000, "c", (2, 5, 6), 77, 9), rows.QueueRow(1, 1, 5, 0, 0, 0)],
    rows.StatsRow: [rows.StatsRow(1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)],
    rows.TenantRow: [rows.TenantRow(1, 2, 3_000)],
    rows.ProducerRow: [rows.ProducerRow(1, 17, 5 << 20)],
    rows.CopierRow: [rows.CopierRow(1, 3 << 20, 17, 1 << 40)],
    rows.GateRow: [rows.GateRow(1, 1_000, 3)],
    rows.ClockRow: [rows.ClockRow(1, NOW)],
    rows.DeadRow: [rows.DeadRow(1, QUEUE, 3, "no", NOW, DUE, BODY, 12)]}
_CORE = ("spillway.broker.core.entry", "spillway.broker.core.rows")
_STATE = (*_CORE, "spillway.broker.core.shard", "spillway.broker.core.removals", "spillway.broker.core.state")


def decoders() -> list[Decoder]:
    """All of them."""
    corrupt = (CorruptEntry,)
    head = b"mq\0" + b"\0" * 9
    return [
        Decoder("entry", plain(_entry), corrupt, _entry_samples(), _STATE),
        *(Decoder(f"row-{kind.__name__.removesuffix('Row').lower()}", plain(_row(kind)), corrupt,
                  tuple(rows.encode_row(sample) for sample in samples), _CORE) for kind, samples in _ROWS.items()),
        Decoder("row-message", plain(_message_row), corrupt,
                (head + rows.encode_message((7, NOW, 0, BODY, 0)), head + rows.encode_message((7, NOW, DUE, BODY, DUE))), _CORE),
        Decoder("row-dedup", plain(_dedup_row), corrupt, (rows.dedup_row(7 << 20, DUE),), _CORE),
        Decoder("state", plain(_state), corrupt, _state_samples(), (*_STATE, "spillway.broker.runtime.wire")),
        Decoder("promise", plain(_promise), corrupt, (encode_promise(Promise(["d", "e"], ["f"], b"t\0k", BODY, NOW, DUE)),),
                ("spillway.broker.core.outbox",)),
        Decoder("meta-entry", plain(_command), corrupt, (d.encode_command(COMMANDS), *(d.encode_command([c]) for c in COMMANDS)),
                ("spillway.broker.core.directory", "spillway.broker.core.policy")),
        Decoder("meta-rows", plain(_directory), corrupt, _directory_samples(), ("spillway.broker.core.directory",)),
        Decoder("filter", plain(_filter_text), (FilterError,), tuple(text.encode() for text in FILTERS),
                ("spillway.broker.core.filters",)),
    ]


