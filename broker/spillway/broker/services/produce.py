"""What becomes of a ProduceRequest: checks, options, budgets, routes; split by shard and handed to shards or other nodes.

The common record (a known destination without special rules, short names, a payload and nothing else) costs a few tests.
"""
from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

from google.protobuf.message import DecodeError
from spillway.broker.core.access import PRODUCE, Grants
from spillway.broker.core.bounds import TIME_MS_MAX
from spillway.broker.core.entry import Option
from spillway.broker.core.outbox import OUTBOX, Promise, encode_promise
from spillway.broker.core.policy import UNBOUNDED, Policy
from spillway.broker.errors import RequestError, Unavailable
from spillway.broker.runtime.calls import Batch, Call
from spillway.broker.runtime.forward import NOT_LEADER, Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.runtime.wire import LENGTHS
from spillway.broker.services.fanout import Fanout
from spillway.broker.services.names import check_destination, check_name, duration_ms
from spillway.contract.hashing import PART, queue_key, shard_of
from spillway.contract.limits import (
    DELAY_MS_MAX,
    HEADERS_BYTES_MAX,
    NAME_BYTES_MAX,
    PRODUCER_ID_BYTES_MAX,
    RECORDS_PER_REQUEST_MAX,
    TTL_MS_MAX,
)
from spillway.contract.telemetry.context import sampled
from spillway.peer.v1.queue_view_pb2 import ProduceRecordView, ProduceRequestView
from spillway.v1.message_pb2 import (
    ERROR_CODE_DESTINATION_NOT_FOUND,
    ERROR_CODE_INVALID_ARGUMENT,
    ERROR_CODE_OVER_BUDGET,
    ERROR_CODE_PERMISSION_DENIED,
    ERROR_CODE_RESOURCE_EXHAUSTED,
    ERROR_CODE_UNAVAILABLE,
    Message,
)
from spillway.v1.queue_service_pb2 import ProduceRequest

BATCH_BYTES_MAX = 16 << 10  # of messages for one shard in one piece: entries are filled piece by piece, streams in turn
RECORD_BYTES = 48  # what a message takes in memory and log beside body and name, roughly
MESSAGE_EXTRA_BYTES_MAX = 4 * HEADERS_BYTES_MAX  # of a message beside its payload: id and headers with their framing
CREATIONS_MAX = 64  # of destinations at a time, for one request
DIGEST_BYTES = 16  # of a dedup id
_Error = tuple[int, int, str, str]


class _Rule:
    """What to look at for records of a destination that is not the plain case, or of a route's source."""

    __slots__ = ("bytes_max", "fanout", "policy")

    def __init__(self, policy: Policy, fanout: Fanout | None = None) -> None:
        self.policy = policy
        self.bytes_max = policy.message_bytes_max or 1 << 62
        self.fanout = fanout


_PLAIN = _Rule(Policy())
_UNKNOWN = _Rule(Policy())


def _is_plain(policy: Policy) -> bool:
    return (policy.ordered and not policy.message_bytes_max and policy.retention == UNBOUNDED
            and policy.tenant_retention == UNBOUNDED and not any(t.retention for t in policy.tenants.values()))


class Intake:
    """The work of Produce, for clients or (`peer`) for other nodes."""

    def __init__(self, node: Node, forwarder: Forwarder, peer: bool) -> None:
        self.node = node
        self.forwarder = forwarder
        self.peer = peer
        self._loop = asyncio.get_running_loop()
        self._known: dict[str, _Rule] = {}  # by destinations and routes' sources whose name is valid and that exist
        self._known_revision = -1

    def ingest(self, stream: int, data: bytes, grants: Grants | None = None) -> Any:
        """One ProduceRequest of a stream. A Call, or an awaitable of one if a destination has to be created first. `grants`: where it may
        produce; None: everywhere. Raises RequestError if the whole request is bad."""
        try:
            request = ProduceRequest.FromString(data)  # checks the messages inside; its objects are not used
            view = ProduceRequestView.FromString(data)
        except DecodeError:
            raise RequestError("request", f"does not parse as {ProduceRequest.DESCRIPTOR.full_name}") from None
        records = view.records
        count = len(records)
        if not 0 < count <= RECORDS_PER_REQUEST_MAX:
            raise RequestError("records", f"has {count} records; it must have 1 to {RECORDS_PER_REQUEST_MAX}")
        node = self.node
        producer = view.producer_id
        if producer:
            if view.copy_epoch and self.peer:
                return self._ingest_copies(stream, view, len(data))
            check_name("producer_id", producer)
            if len(producer) > PRODUCER_ID_BYTES_MAX:
                raise RequestError("producer_id", f"has {len(producer)} bytes; at most {PRODUCER_ID_BYTES_MAX}")
        call = Call(count, len(data), self._loop, node.call_done, self.peer)
        node.ingress_bytes += len(data)
        tracing = node.tracing
        if tracing is not None:
            call.traced_ns = time.time_ns()
        if node.disk_full:
            for i in range(count):
                call.fail(i, ERROR_CODE_RESOURCE_EXHAUSTED, "",
                          "the disk of this node is nearly full (disk_free_bytes_min); nothing was stored")
            call.release()
            return call
        if self._known_revision != node.meta.revision:
            self._known.clear()
            self._known_revision = node.meta.revision
        known = self._known
        shard_count = node.config.shards
        batches: dict[int, Batch] = {}
        closed: list[tuple[int, Batch]] = []
        unknown: set[str] = set()
        payload_max = node.config.payload_bytes_max
        plain_max = min(payload_max, len(LENGTHS) + 2)
        for i, record in enumerate(records):
            destination, tenant, key = record.destination, record.tenant, record.key
            body = record.message
            if grants is not None and not grants.allows(PRODUCE, destination, tenant):
                call.fail(i, ERROR_CODE_PERMISSION_DENIED, f"records[{i}].destination",
                          f"no produce scope for destination {destination[:300]!r}, tenant {tenant[:300]!r}")
                continue
            rule = known.get(destination)
            # The common case costs one test: known destination, short printable names.
            if rule is None or not (tenant + key).isprintable() or len(tenant) > 63 or len(key) > 63:
                try:
                    _check_names(destination, tenant, key, i)
                except RequestError as error:
                    call.fail(i, ERROR_CODE_INVALID_ARGUMENT, error.field, error.description)
                    continue
                if rule is None:
                    rule = self._rule(destination)
                    if rule is _UNKNOWN:
                        unknown.add(destination)
                        rule = _PLAIN
                    else:
                        known[destination] = rule
            size = len(body)
            # A payload and nothing else is known by its length. Anything else, or big: look inside.
            if size and (size > plain_max or body[0] != 0x1A
                         or not body.startswith(LENGTHS[size - 2 if size < 130 else size - 3], 1)):
                problem = _check_message(request.records[i].message, i, payload_max, size)
                if problem is not None:
                    call.fail(*problem)
                    continue
                if tracing is not None and (context := sampled(body)) is not None:
                    call.traced = call.traced or {}
                    call.traced[i] = context
            option: Option | None = None
            if self.peer:
                if record.deliver_unix_ms or record.expire_unix_ms or record.dedup_digest:
                    option = (record.deliver_unix_ms, record.expire_unix_ms, record.dedup_digest, record.dedup_until_unix_ms)
                    if max(option[0], option[1], option[3]) > TIME_MS_MAX or len(option[2]) > DIGEST_BYTES:
                        call.fail(i, ERROR_CODE_INVALID_ARGUMENT, f"records[{i}]", "has a time or a digest that is none")
                        continue
            elif record.HasField("delay") or record.HasField("ttl") or record.HasField("deliver_at") or record.dedup_id:
                try:
                    option = _option(record, i, node.now_ms(), (rule.policy if rule is not _PLAIN
                                                                else node.policy(destination.encode())).dedup_ms)
                except RequestError as error:
                    call.fail(i, ERROR_CODE_INVALID_ARGUMENT, error.field, error.description)
                    continue
            name = queue_key(destination, tenant, key)
            shard = shard_of(name, shard_count)
            promised = None
            if rule is not _PLAIN:
                if size > rule.bytes_max:
                    call.fail(i, ERROR_CODE_INVALID_ARGUMENT, f"records[{i}].message",
                              f"has {size} bytes; {destination!r} takes at most {rule.bytes_max} (message_bytes_max)")
                    continue
                runtime = node.shards.get(shard)
                if runtime is not None and runtime.leading:  # otherwise the leader does
                    if rule.fanout is None:
                        why = self._over_budget(rule.policy, name, size)
                        if why is not None:
                            call.fail(i, ERROR_CODE_OVER_BUDGET, f"records[{i}].destination", why)
                            continue
                        if not rule.policy.ordered:
                            name += PART
                    else:
                        found = self._promise(rule.fanout, request.records[i].message, i, name, body, option)
                        if not isinstance(found, bytes):
                            call.fail(*found)
                            continue
                        promised = (name, body)
                        name, body = OUTBOX, found
                        size = len(body)  # with the names of its targets
                        if option is not None:
                            option = (0, 0, option[2], option[3])
            batch = batches.get(shard)
            if batch is None or batch.size > BATCH_BYTES_MAX or (
                    producer and record.producer_sequence != batch.first + len(batch.names)):
                first = record.producer_sequence if producer else 0
                if producer and not first:  # the shard would take it for a duplicate
                    call.fail(i, ERROR_CODE_INVALID_ARGUMENT, f"records[{i}].producer_sequence",
                              "is 0; with a producer id it counts from 1, per shard")
                    continue
                if batch is not None:
                    closed.append((shard, batch))
                batch = batches[shard] = Batch(call, producer, first)
            if option is not None:
                if batch.options is None:
                    batch.options = {}
                batch.options[len(batch.names)] = option
            if promised is not None:
                if batch.promised is None:
                    batch.promised = {}
                batch.promised[len(batch.names)] = promised
            batch.names.append(name)
            batch.bodies.append(body)
            batch.positions.append(i)
            batch.size += size + len(name) + RECORD_BYTES
        closed += batches.items()
        if unknown:
            return self._create_then_submit(stream, call, closed, unknown, data, grants)
        self._submit(stream, call, closed)
        return call

    def _rule(self, name: str) -> _Rule:
        meta = self.node.meta
        known = meta.get(name)
        if known is not None:
            return _PLAIN if _is_plain(known.policy) else _Rule(known.policy)
        if name in meta.directory.routes:
            return _Rule(Policy(), Fanout(meta.directory, name))
        return _UNKNOWN

    # -- budgets and routes --------------------------------------------------------------------------------------

    def _over_budget(self, policy: Policy, queue: bytes, size: int) -> str | None:
        """Why a destination takes no more of a queue's tenant, None if it does."""
        cut = queue.index(b"\0")
        return self.node.shares.refusal(policy, queue[:cut], queue[:queue.index(b"\0", cut + 1)], size)

    def _promise(self, fanout: Fanout, message: Message, i: int, queue: bytes, body: bytes,
                 option: Option | None) -> bytes | _Error:
        """What the outbox keeps for a message to a route's source, or why it is refused."""
        source, tenant, key = queue.decode().split("\0")
        rest = queue[queue.index(b"\0") + 1:]
        targets: list[str] = []
        if fanout.broken:
            return i, ERROR_CODE_INVALID_ARGUMENT, f"records[{i}].destination", fanout.broken
        chosen, overflowed = fanout.targets(message, tenant, key)
        for copy in chosen:
            policy = self.node.policy(copy.destination.encode())
            if policy.message_bytes_max and len(body) > policy.message_bytes_max:
                return (i, ERROR_CODE_INVALID_ARGUMENT, f"records[{i}].message",
                        f"has {len(body)} bytes; {copy.destination!r}, a target of the route {source!r}, takes at most "
                        f"{policy.message_bytes_max} (message_bytes_max)")
            if _is_plain(policy):
                targets.append(copy.destination)
                continue
            why = self._over_budget(policy, copy.destination.encode() + b"\0" + rest, len(body))
            if why is None:
                targets.append(copy.destination)
            elif copy.skip_over_budget:
                overflowed.append(copy.destination)
            else:
                return i, ERROR_CODE_OVER_BUDGET, f"records[{i}].destination", f"route {source!r}: {why}"
        deliver, expire = option[:2] if option is not None else (0, 0)
        return encode_promise(Promise(targets, overflowed, rest, body, deliver, expire))

    def _ingest_copies(self, stream: int, view: ProduceRequestView, size: int) -> Call:
        """Copies that another node makes of what was produced to a route's source: checked and decided there. Raises RequestError
        for what no copier sends."""
        shard = self._shard_of_copies(view)
        call = Call(len(view.records), size, self._loop, self.node.call_done, self.peer)
        self.node.ingress_bytes += size
        batch = Batch(call, view.producer_id, view.copy_previous)
        batch.epoch = view.copy_epoch
        batch.copies = []
        tracing = self.node.tracing
        if tracing is not None:
            call.traced_ns = time.time_ns()
            call.traced = {i: found for i, record in enumerate(view.records) if (found := sampled(record.message)) is not None}
        for i, record in enumerate(view.records):
            name = queue_key(record.destination, record.tenant, record.key)
            if not self.node.policy(record.destination.encode()).ordered:
                name += PART
            if record.deliver_unix_ms or record.expire_unix_ms:
                batch.options = batch.options or {}
                batch.options[i] = (record.deliver_unix_ms, record.expire_unix_ms, b"", 0)
            batch.copies.append(record.copy_sequence)
            batch.names.append(name)
            batch.bodies.append(record.message)
            batch.positions.append(i)
            batch.size += len(record.message) + len(name) + RECORD_BYTES
        self._submit(stream, call, [(shard, batch)])
        return call

    def _shard_of_copies(self, view: ProduceRequestView) -> int:
        if len(view.producer_id) > PRODUCER_ID_BYTES_MAX:
            raise RequestError("producer_id", f"has {len(view.producer_id)} bytes; at most {PRODUCER_ID_BYTES_MAX}")
        shards = set()
        last = 0
        for i, record in enumerate(view.records):
            names = record.destination + record.tenant + record.key
            if not record.destination or not names.isprintable() or len(names) > 63:
                _check_names(record.destination, record.tenant, record.key, i)
            if record.deliver_unix_ms > TIME_MS_MAX or record.expire_unix_ms > TIME_MS_MAX:
                raise RequestError(f"records[{i}]", "has a time beyond any")
            if record.copy_sequence <= last:
                raise RequestError(f"records[{i}].copy_sequence", f"is {record.copy_sequence}, after {last}")
            last = record.copy_sequence
            shards.add(shard_of(queue_key(record.destination, record.tenant, record.key), self.node.config.shards))
        if len(shards) > 1:
            raise RequestError("records", f"are copies for the shards {sorted(shards)}; they must be for one")
        return shards.pop()

    # -- destinations that do not exist --------------------------------------------------------------------------

    async def _create_then_submit(self, stream: int, call: Call, batches: list[tuple[int, Batch]], unknown: set[str],
                                  data: bytes, grants: Grants | None) -> Call:
        try:
            refused = await self._create(unknown)
        except BaseException:  # the client hung up: the call counts as done, or its bytes would never be free again
            call.release()
            raise
        if not unknown.isdisjoint(self.node.meta.directory.routes):  # they are no destinations: looked at anew, as routes
            call.release()
            again = self.ingest(stream, data, grants)
            return again if isinstance(again, Call) else await again
        if refused:
            batches = [(shard, left) for shard, batch in batches for left in _without(batch, refused)]
        self._submit(stream, call, batches)
        return call

    async def _create(self, unknown: set[str]) -> dict[bytes, tuple[int, str]]:
        """Creates destinations, some at a time; what became of those that could not be: (error code, description)."""
        refused: dict[bytes, tuple[int, str]] = {}
        names = iter(sorted(unknown))
        down = ""  # the meta group does not answer: said once, the other names do not wait for it again

        async def some() -> None:
            nonlocal down
            for name in names:
                if not self.node.config.auto_create:
                    refused[name.encode()] = (
                        ERROR_CODE_DESTINATION_NOT_FOUND,
                        f"destination {name!r} does not exist; create it first, or switch auto_create on")
                    continue
                code, why = ERROR_CODE_UNAVAILABLE, down
                if not down:
                    try:
                        await self.forwarder.ensure_destination(name)
                        continue
                    except RequestError as error:  # there are too many
                        code, why = ERROR_CODE_RESOURCE_EXHAUSTED, str(error)
                    except Unavailable as error:
                        why = down = str(error)
                refused[name.encode()] = (code, f"cannot create destination {name!r}: {why}")

        await asyncio.gather(*(some() for _ in range(min(len(unknown), CREATIONS_MAX))))
        return refused

    def _submit(self, stream: int, call: Call, batches: list[tuple[int, Batch]]) -> None:
        node = self.node
        for shard, batch in batches:
            if not batch.names:
                continue
            call.waiting += 1
            runtime = node.shards.get(shard)
            if runtime is not None and runtime.leading and not node.stopping:
                runtime.enqueue(stream, batch)
                node.host.wake(shard)
            elif self.peer:
                for position in batch.positions:
                    call.fail(position, ERROR_CODE_UNAVAILABLE, NOT_LEADER, f"this node does not lead shard {shard}")
                call.release()
            else:
                self.forwarder.produce(shard, batch)
        call.release()


def _without(batch: Batch, refused: dict[bytes, tuple[int, str]]) -> list[Batch]:
    """What is left of a batch without the records of some destinations, which are told why. Records of a producer behind a
    refused one are refused by the shard, as out of sequence."""
    kept = []
    left = Batch(batch.call, batch.producer, batch.first)
    for k, (name, body, position) in enumerate(zip(batch.names, batch.bodies, batch.positions, strict=True)):
        why = refused.get(name[:name.index(b"\0")])
        if why is not None:
            batch.call.fail(position, why[0], f"records[{position}].destination", why[1])
            if batch.producer:
                if left.names:
                    kept.append(left)
                left = Batch(batch.call, batch.producer, batch.first + k + 1)
            continue
        if batch.options and k in batch.options:
            left.options = left.options or {}
            left.options[len(left.names)] = batch.options[k]
        if batch.promised and k in batch.promised:
            left.promised = left.promised or {}
            left.promised[len(left.names)] = batch.promised[k]
        left.names.append(name)
        left.bodies.append(body)
        left.positions.append(position)
        left.size += len(body) + len(name) + RECORD_BYTES
    if left.names:
        kept.append(left)
    return kept


def _option(record: ProduceRecordView, i: int, now: int, dedup_ms: int) -> Option:
    """What a record says about its time and its repetition. Raises RequestError."""
    deliver = expire = until = 0
    digest = b""
    if record.HasField("delay"):
        deliver = now + duration_ms(f"records[{i}].delay", record.delay, 0, DELAY_MS_MAX)
    if record.HasField("deliver_at"):
        if deliver:
            raise RequestError(f"records[{i}].deliver_at", "is given together with delay; give one of them")
        deliver = record.deliver_at.seconds * 1000 + -(-record.deliver_at.nanos // 1_000_000)
        if deliver > now + DELAY_MS_MAX:
            raise RequestError(f"records[{i}].deliver_at", f"is more than {DELAY_MS_MAX // 86_400_000} days ahead")
        if deliver <= now:
            deliver = 0
    if record.HasField("ttl"):
        expire = now + duration_ms(f"records[{i}].ttl", record.ttl, 1, TTL_MS_MAX)
    if record.dedup_id:
        check_name(f"records[{i}].dedup_id", record.dedup_id)
        name = f"{record.destination}\0{record.tenant}\0{record.key}\0{record.dedup_id}".encode()
        digest = hashlib.blake2b(name, digest_size=DIGEST_BYTES).digest()
        until = now + dedup_ms
    return deliver, expire, digest, until


def _check_names(destination: str, tenant: str, key: str, i: int) -> None:
    check_destination(f"records[{i}].destination", destination)
    check_name(f"records[{i}].tenant", tenant, empty=True)
    check_name(f"records[{i}].key", key, empty=True)


def _check_message(message: Message, i: int, payload_max: int, stored: int) -> _Error | None:
    """What is wrong with a message that takes `stored` bytes, fields included that this version does not know."""
    field = f"records[{i}].message"
    if len(message.payload) > payload_max:
        return (i, ERROR_CODE_INVALID_ARGUMENT, field + ".payload",
                f"has {len(message.payload)} bytes; at most {payload_max} (payload_bytes_max)")
    size = len(message.id.encode())
    if size > NAME_BYTES_MAX:
        return (i, ERROR_CODE_INVALID_ARGUMENT, field + ".id", f"has {size} bytes; at most {NAME_BYTES_MAX}")
    if not message.id.isprintable():
        try:
            check_name(field + ".id", message.id, empty=True)
        except RequestError as error:
            return (i, ERROR_CODE_INVALID_ARGUMENT, error.field, error.description)
    if message.headers:
        size = sum(len(k.encode()) + len(v.encode()) for k, v in message.headers.items())
        if size > HEADERS_BYTES_MAX:
            return (i, ERROR_CODE_INVALID_ARGUMENT, field + ".headers", f"have {size} bytes; at most {HEADERS_BYTES_MAX}")
    if stored > len(message.payload) + MESSAGE_EXTRA_BYTES_MAX:
        return (i, ERROR_CODE_INVALID_ARGUMENT, field,
                f"has {stored} bytes beside {len(message.payload)} of payload: repeated or unknown fields")
    return None

