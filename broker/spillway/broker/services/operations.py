"""AdminService, what operators do to messages: peek, purge, dead letters back or away, top tenants.

Each handler of the clients' port asks the leaders of the shards, whose peers' port answers for the shards that they lead.
"""
from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
from spillway.broker.core.rows import DeadRow
from spillway.broker.core.state import prefix_end
from spillway.broker.errors import BrokerError, NotFound, RequestError, Unavailable
from spillway.broker.runtime.forward import Forwarder
from spillway.broker.runtime.node import Node
from spillway.broker.runtime.shard import ShardRuntime
from spillway.broker.services.names import check_destination, check_name
from spillway.broker.services.status import pass_on
from spillway.contract.hashing import PART, queue_key, shard_of
from spillway.v1 import admin_service_pb2 as pb
from spillway.v1.message_pb2 import Message

CALL_SECONDS = 5.0
LONG_CALL_SECONDS = 3600.0  # a purge of a million queues takes its time
PEEK_DEFAULT, PEEK_MAX = 10, 100
PEEK_BYTES_MAX = 1 << 20
PEEK_PARTS_MAX = 10_000  # of an unordered queue: beyond it, `count` is no more than this
TOP_DEFAULT, TOP_MAX = 10, 1000
PAGE = 256
SHARDS_METADATA = "spillway-shards"  # of a call between nodes: the shards that it is for, by number, with commas
RETRY_SECONDS, RETRY_SECONDS_MAX = 0.2, 20.0  # while leaders change
REDRIVE_PER_SECOND, REDRIVE_PER_SECOND_MIN, REDRIVE_PER_SECOND_MAX = 100.0, 0.1, 100_000.0
REDRIVE_SLICE_SECONDS = 0.1
REDRIVE_SLICE_MAX = 1024
REDRIVE_BLOCKED_MAX = 10_000  # dead letters that wait for the lease of their queue to end


class Operations:
    """The handlers; part of AdminService."""

    node: Node
    forwarder: Forwarder
    peer: bool
    known: Callable[[str, str], Awaitable[object]]  # (field, destination's name): raises NotFound

    # -- peek ----------------------------------------------------------------------------------------------------

    async def PeekMessages(self, request: pb.PeekMessagesRequest, context: Any) -> pb.PeekMessagesResponse:
        """See admin_service.proto."""
        try:
            await self._check_scope(request.destination, request.tenant, request.key)
            if request.limit > PEEK_MAX:
                raise RequestError("limit", f"is {request.limit}; at most {PEEK_MAX}")
            name = queue_key(request.destination, request.tenant, request.key)
            shard = shard_of(name, self.node.config.shards)
            leader = await self.forwarder.await_leader(shard)
            if leader != self.node.config.node_id:
                self._refuse_from_peer(shard, leader)
                answer: pb.PeekMessagesResponse = await self._at(leader, "PeekMessages", request, timeout=CALL_SECONDS)
                return answer
            return _peek(self.node.shards[shard], name, request.limit or PEEK_DEFAULT)
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)

    # -- purge ---------------------------------------------------------------------------------------------------

    async def PurgeMessages(self, request: pb.PurgeMessagesRequest, context: Any) -> pb.PurgeMessagesResponse:
        """See admin_service.proto."""
        total = pb.PurgeMessagesResponse()

        async def once() -> None:
            if request.validate_only:
                total.Clear()
            plan = await self._plan(context)
            for runtime in self._own(plan):
                await self._purge(runtime, request, total)
            async for part in self._others("PurgeMessages", request, plan):
                total.messages += part.messages
                total.queues += part.queues

        try:
            await self._check_scope(*_scope(request))
            await self._stubbornly(once)
            return total
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)

    async def _purge(self, runtime: ShardRuntime, request: pb.PurgeMessagesRequest, total: pb.PurgeMessagesResponse) -> None:
        for prefix, exact in _prefixes(request):
            start = b""
            while True:
                if not runtime.leading:
                    raise Unavailable(f"shard {runtime.number}: the leader changed; ask again")
                names = runtime.state.queue_names(prefix, start, PAGE)
                if exact:
                    names = [name for name in names if name == prefix]
                if request.validate_only:
                    counts = [queue.count for name in names if (queue := runtime.state.open(name)) is not None]
                else:
                    waiting = [runtime.chores.purge(name) for name in names]
                    self.node.host.wake(runtime.number)
                    counts = await asyncio.gather(*waiting)
                total.messages += sum(counts)
                total.queues += sum(count > 0 for count in counts)
                if exact or len(names) < PAGE:
                    break
                start = names[-1] + b"\0"
                await asyncio.sleep(0)

    # -- dead letters --------------------------------------------------------------------------------------------

    async def PurgeDeadLetters(self, request: pb.PurgeDeadLettersRequest, context: Any) -> pb.PurgeDeadLettersResponse:
        """See admin_service.proto."""
        total = pb.PurgeDeadLettersResponse()

        async def once() -> None:
            if request.validate_only:
                total.Clear()
            plan = await self._plan(context)
            for runtime in self._own(plan):
                async for page in self._dead(runtime, request):
                    if not request.validate_only:
                        waiting = [runtime.chores.purge_dead(key) for key, _ in page]
                        self.node.host.wake(runtime.number)
                        await asyncio.gather(*waiting)
                    total.dead_letters += len(page)
            async for part in self._others("PurgeDeadLetters", request, plan):
                total.dead_letters += part.dead_letters

        try:
            await self._check_scope(*_scope(request))
            await self._stubbornly(once)
            return total
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)

    async def _stubbornly(self, once: Callable[[], Awaitable[None]]) -> None:
        """Does something that may be repeated again and again while leaders change, up to a time. Raises what the last try
        raised, or at once what is not UNAVAILABLE."""
        deadline = asyncio.get_running_loop().time() + RETRY_SECONDS_MAX
        while True:
            try:
                await once()
                return
            except (Unavailable, grpc.aio.AioRpcError) as error:
                if self.peer or not _is_unavailable(error) or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    async def RedriveDeadLetters(self, request: pb.RedriveDeadLettersRequest,
                                 context: Any) -> AsyncIterator[pb.RedriveDeadLettersResponse]:
        """See admin_service.proto."""
        try:
            await self._check_scope(*_scope(request))
            rate = request.messages_per_second or REDRIVE_PER_SECOND
            if not REDRIVE_PER_SECOND_MIN <= rate <= REDRIVE_PER_SECOND_MAX:
                raise RequestError("messages_per_second", f"is {rate:g}; it must be {REDRIVE_PER_SECOND_MIN:g} to "
                                   f"{REDRIVE_PER_SECOND_MAX:g}")
            if self.peer:
                led = self._own(await self._plan(context))
                if request.validate_only:
                    yield pb.RedriveDeadLettersResponse(redriven=await self._count_dead(led, request), done=True)
                else:
                    async for count in self._redrive(led, request, rate):
                        yield pb.RedriveDeadLettersResponse(redriven=count)
                    yield pb.RedriveDeadLettersResponse(done=True)
                return
            total = sum(count for _, count in (await self._find_dead(request)).values())
            if not total:
                raise NotFound("tenant" if request.HasField("tenant") else "destination", "there is no such dead letter")
            if not request.validate_only:
                async for count in self._redrive_all(request, rate):
                    yield pb.RedriveDeadLettersResponse(redriven=min(count, total))
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)
        yield pb.RedriveDeadLettersResponse(redriven=total, done=True)

    async def _find_dead(self, request: pb.RedriveDeadLettersRequest) -> dict[str, tuple[list[int], int]]:
        """By the node that leads them, the shards that have dead letters which a request means, and how many."""
        counting = pb.RedriveDeadLettersRequest()
        counting.CopyFrom(request)
        counting.validate_only = True
        found: dict[str, tuple[list[int], int]] = {}

        async def once() -> None:
            found.clear()
            plan = await self._plan(None)
            found[self.node.config.node_id] = plan.get(self.node.config.node_id, []), await self._count_dead(
                self._own(plan), request)
            for node, shards in plan.items():
                if node != self.node.config.node_id:
                    call = self.forwarder.link(node).admin.RedriveDeadLetters(
                        counting, timeout=LONG_CALL_SECONDS, metadata=metadata_of(shards))
                    async for part in call:
                        found[node] = shards, part.redriven

        await self._stubbornly(once)
        return {node: (shards, count) for node, (shards, count) in found.items() if count}

    async def _redrive_all(self, request: pb.RedriveDeadLettersRequest, rate: float) -> AsyncIterator[int]:
        """Redrives on all nodes, and again what is left when a leader has changed; how many are back, as it grows."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + RETRY_SECONDS_MAX
        before = 0
        while found := await self._find_dead(request):
            count = 0
            try:
                async for count in self._merge(request, rate, found):
                    yield before + count
                return
            except (Unavailable, grpc.aio.AioRpcError) as error:
                if count:
                    deadline = loop.time() + RETRY_SECONDS_MAX
                if not _is_unavailable(error) or loop.time() > deadline:
                    raise
            before += count
            await asyncio.sleep(RETRY_SECONDS)

    async def _merge(self, request: pb.RedriveDeadLettersRequest, rate: float,
                     found: dict[str, tuple[list[int], int]]) -> AsyncIterator[int]:
        """Redrives on all nodes at once, each at its part of the rate; the sum of what is back, as it grows."""
        total = sum(count for _, count in found.values())
        counts = dict.fromkeys(found, 0)
        changed = asyncio.Event()

        async def one(node: str, shards: list[int], count: int) -> None:
            part = pb.RedriveDeadLettersRequest()
            part.CopyFrom(request)
            part.messages_per_second = max(REDRIVE_PER_SECOND_MIN, rate * count / total)
            if node == self.node.config.node_id:
                async for back in self._redrive(self._own({node: shards}), part, part.messages_per_second):
                    counts[node] = back
                    changed.set()
            else:
                call = self.forwarder.link(node).admin.RedriveDeadLetters(
                    part, timeout=LONG_CALL_SECONDS, metadata=metadata_of(shards))
                async for answer in call:
                    if not answer.done:
                        counts[node] = answer.redriven
                        changed.set()

        def ended(work: asyncio.Future[Any]) -> None:
            changed.set()
            if not work.cancelled():
                work.exception()  # is looked at: whoever wanted to know may be gone by now

        work = asyncio.gather(*(one(node, *what) for node, what in found.items()))
        work.add_done_callback(ended)
        try:
            while not work.done():
                await changed.wait()
                changed.clear()
                yield sum(counts.values())
            await work
        finally:
            work.cancel()

    async def _count_dead(self, led: list[ShardRuntime], request: Any) -> int:
        count = 0
        for runtime in led:
            async for page in self._dead(runtime, request):
                count += len(page)
        return count

    async def _dead(self, runtime: ShardRuntime, request: Any) -> AsyncIterator[list[tuple[bytes, DeadRow]]]:
        """Dead letters of a shard that fit a request, in pages."""
        destination, tenant, key = _scope(request)
        wanted = None if key is None else queue_key(destination, tenant or "", key)
        after = b""
        while True:
            if not runtime.leading:
                raise Unavailable(f"shard {runtime.number}: the leader changed; ask again")
            page = runtime.state.dead_letters(destination.encode(), None if tenant is None else tenant.encode(), after, PAGE)
            if found := [(k, row) for k, row in page if wanted is None or row.queue.partition(PART)[0] == wanted]:
                yield found
            if len(page) < PAGE:
                return
            after = page[-1][0]
            await asyncio.sleep(0)

    async def _redrive(self, led: list[ShardRuntime], request: pb.RedriveDeadLettersRequest, rate: float) -> AsyncIterator[int]:
        """Puts back the dead letters of the shards that this node leads, at a rate; yields how many are back. Where a queue
        is leased, its dead letters wait, all of them, so that they keep their order."""
        back = 0
        size = max(1, min(REDRIVE_SLICE_MAX, int(rate * REDRIVE_SLICE_SECONDS)))
        loop = asyncio.get_running_loop()
        due = loop.time()
        blocked: dict[tuple[ShardRuntime, bytes], deque[tuple[bytes, DeadRow]]] = {}
        waiting = 0

        async def put(runtime: ShardRuntime, letters: list[tuple[bytes, DeadRow]]) -> int:
            nonlocal due, waiting
            due = max(due, loop.time() - REDRIVE_SLICE_SECONDS) + len(letters) / rate
            results = [runtime.chores.redrive(key, len(row.body)) for key, row in letters]
            self.node.host.wake(runtime.number)
            done = 0
            for (key, row), result in zip(letters, await asyncio.gather(*results), strict=True):
                if result:
                    done += 1
                elif runtime.state.dead_letter(key) is not None:
                    blocked.setdefault((runtime, row.queue), deque()).append((key, row))
                    waiting += 1
            await asyncio.sleep(max(0.0, due - loop.time()))
            return done

        async def retry() -> int:
            nonlocal waiting
            done = 0
            for runtime, name in list(blocked):
                letters = blocked.pop((runtime, name))
                waiting -= len(letters)
                done += await put(runtime, list(letters)[:size])
                if rest := list(letters)[size:]:
                    blocked.setdefault((runtime, name), deque()).extend(rest)
                    waiting += len(rest)
            return done

        for runtime in led:
            async for page in self._dead(runtime, request):
                free = []
                for key, row in page:
                    if (runtime, row.queue) in blocked:
                        blocked[runtime, row.queue].append((key, row))
                        waiting += 1
                    else:
                        free.append((key, row))
                for i in range(0, len(free), size):
                    back += await put(runtime, [f for f in free[i:i + size] if (runtime, f[1].queue) not in blocked])
                    for f in free[i + size:]:
                        if (runtime, f[1].queue) in blocked:
                            blocked[runtime, f[1].queue].append(f)
                            waiting += 1
                    free[i + size:] = [f for f in free[i + size:] if (runtime, f[1].queue) not in blocked]
                    yield back
                while waiting > REDRIVE_BLOCKED_MAX:
                    await asyncio.sleep(REDRIVE_SLICE_SECONDS)
                    back += await retry()
                    yield back
        while blocked:
            await asyncio.sleep(REDRIVE_SLICE_SECONDS)
            back += await retry()
            yield back

    # -- tenants -------------------------------------------------------------------------------------------------

    async def ListTopTenants(self, request: pb.ListTopTenantsRequest, context: Any) -> pb.ListTopTenantsResponse:
        """See admin_service.proto."""
        try:
            await self._check_scope(request.destination, None, None)
            if request.limit > TOP_MAX:
                raise RequestError("limit", f"is {request.limit}; at most {TOP_MAX}")
            limit = request.limit or TOP_DEFAULT
            sums: dict[str, list[int]] = {}
            for runtime in self._led():
                # Of each shard more than asked for: who is big in all of them may be nowhere the biggest.
                for messages, size, scope in runtime.state.top_tenants(request.destination.encode(), TOP_MAX):
                    one = sums.setdefault(scope.split(b"\0")[1].decode(), [0, 0])
                    one[0] += messages
                    one[1] += size
                await asyncio.sleep(0)
            response = pb.ListTopTenantsResponse()
            if not self.peer:
                wide = pb.ListTopTenantsRequest(destination=request.destination, limit=TOP_MAX)
                response.shards_missing.extend(self._leaderless())
                for node in self._leaders():
                    try:
                        part = await self._at(node, "ListTopTenants", wide, timeout=CALL_SECONDS)
                    except (Unavailable, grpc.aio.AioRpcError):
                        response.shards_missing.extend(
                            s for s in range(1, self.node.config.shards + 1) if self.node.leader_of(s) == node)
                        continue
                    for tenant in part.tenants:
                        one = sums.setdefault(tenant.tenant, [0, 0])
                        one[0] += tenant.messages
                        one[1] += tenant.message_bytes
            best = sorted(sums.items(), key=lambda item: (-item[1][0], item[0]))[:limit]
            response.tenants.extend(pb.TenantStats(tenant=name, messages=n, message_bytes=size) for name, (n, size) in best)
            return response
        except (BrokerError, grpc.aio.AioRpcError) as error:
            await pass_on(context, error)

    # -- gates ---------------------------------------------------------------------------------------------------

    def own_gates(self, destination: str) -> list[pb.Gate]:
        """The gates that THROTTLED or DOWN closed and that this node keeps."""
        name = destination.encode()
        found = []
        for scope, (until, step) in self.node.gates.items():
            if scope == name or scope.startswith(name + b"\0"):
                gate = pb.Gate(cause=pb.GATE_CAUSE_FAILURES, step=step)
                if scope != name:
                    gate.tenant = scope[len(name) + 1:].decode()
                gate.until_time.FromMilliseconds(until)
                found.append(gate)
        return found

    # -- who has what --------------------------------------------------------------------------------------------

    def _led(self) -> Iterator[ShardRuntime]:
        for runtime in list(self.node.shards.values()):
            if runtime.leading:
                yield runtime

    def _leaders(self) -> list[str]:
        """The other nodes that lead shards; none for a call that came from another node."""
        if self.peer:
            return []
        own = self.node.config.node_id
        leaders = {self.node.leader_of(shard) for shard in range(1, self.node.config.shards + 1)}
        return sorted(leader for leader in leaders if leader is not None and leader != own)

    def _leaderless(self) -> list[int]:
        return [shard for shard in range(1, self.node.config.shards + 1) if self.node.leader_in_touch(shard) is None]

    async def _plan(self, context: Any) -> dict[str, list[int]]:
        """Who leads which shards, each shard once. For another node's call, those of this node that it asks for. Raises
        RequestError if it asks for none, Unavailable if this node does not lead one of these, or a shard has no leader for long."""
        own = self.node.config.node_id
        plan: dict[str, list[int]] = {}
        if not self.peer:
            for shard in range(1, self.node.config.shards + 1):
                plan.setdefault(await self.forwarder.await_leader(shard), []).append(shard)
            return plan
        plan[own] = parse_shards(dict(context.invocation_metadata()).get(SHARDS_METADATA, ""))
        self._own(plan)
        return plan

    def _own(self, plan: dict[str, list[int]]) -> list[ShardRuntime]:
        """This node's part of a plan. Raises Unavailable if it leads one of the shards no more."""
        led = []
        for shard in plan.get(self.node.config.node_id, []):
            runtime = self.node.shards.get(shard)
            if runtime is None or not runtime.leading:
                raise Unavailable(f"this node does not lead shard {shard}")
            led.append(runtime)
        return led

    async def _at(self, node: str, method: str, request: Any, **options: Any) -> Any:
        """The answer of another node's AdminService. Raises what it answers, or Unavailable if no way leads there: it has left the
        cluster, or this node stops."""
        return await getattr(self.forwarder.link(node).admin, method)(request, **options)

    async def _others(self, method: str, request: Any, plan: dict[str, list[int]]) -> AsyncIterator[Any]:
        """The answers of the other nodes of a plan, one after the other."""
        for node, shards in plan.items():
            if node != self.node.config.node_id:
                yield await self._at(node, method, request, timeout=LONG_CALL_SECONDS, metadata=metadata_of(shards))

    def _refuse_from_peer(self, shard: int, leader: str) -> None:
        if self.peer:
            raise Unavailable(f"this node does not lead shard {shard}", leader)

    async def _check_scope(self, destination: str, tenant: str | None, key: str | None) -> None:
        check_destination("destination", destination)
        if tenant is not None:
            check_name("tenant", tenant, empty=True)
        if key is not None:
            check_name("key", key, empty=True)
            if tenant is None:
                raise RequestError("tenant", "is needed with a key")
        if not self.peer:
            await self.known("destination", destination)


def metadata_of(shards: list[int]) -> tuple[tuple[str, str], ...]:
    """Of a call to another node: the shards that it is for."""
    return ((SHARDS_METADATA, ",".join(map(str, shards))),)


def parse_shards(asked: object) -> list[int]:
    """What `metadata_of` says. Raises RequestError."""
    numbers = asked.split(",") if isinstance(asked, str) else []
    if not all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers) or not numbers:
        raise RequestError(SHARDS_METADATA, "must name shards by number, with commas, in the call's metadata")
    return [int(number) for number in numbers]


def _is_unavailable(error: Exception) -> bool:
    return isinstance(error, Unavailable) or (
        isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE)


def _scope(request: Any) -> tuple[str, str | None, str | None]:
    tenant = request.tenant if request.HasField("tenant") else None
    key = request.key if "key" in request.DESCRIPTOR.fields_by_name and request.HasField("key") else None
    return request.destination, tenant, key


def _prefixes(request: pb.PurgeMessagesRequest) -> list[tuple[bytes, bool]]:
    """(prefix of queues' names, whether it is a whole name) that a request means."""
    destination, tenant, key = _scope(request)
    if tenant is None:
        return [(destination.encode() + b"\0", False)]
    if key is None:
        return [(f"{destination}\0{tenant}\0".encode(), False)]
    name = queue_key(destination, tenant, key)
    return [(name, True), (name + PART, False)]


def parts_of(runtime: ShardRuntime, name: bytes, limit: int) -> list[bytes]:
    """Up to `limit` names under which the messages of a queue stand: its own, or, unordered, one for each message."""
    state = runtime.state
    found = [name] if state.open(name) is not None else []
    prefix = name + PART
    return found + state.queue_names(prefix, b"", limit) if prefix < prefix_end(prefix) else found


def _peek(runtime: ShardRuntime, name: bytes, limit: int) -> pb.PeekMessagesResponse:
    state = runtime.state
    response = pb.PeekMessagesResponse()
    size = 0
    for part in parts_of(runtime, name, PEEK_PARTS_MAX):
        left = limit - len(response.messages)
        if part != name and (left <= 0 or size > PEEK_BYTES_MAX):
            response.count += 1  # a part is one message
            continue
        queue = state.open(part)
        if queue is None:
            continue
        response.count += queue.count
        if left <= 0 or size > PEEK_BYTES_MAX:
            continue
        state.ensure(queue, left, PEEK_BYTES_MAX)
        held = queue.lease_size - queue.lease_acked if queue.token else 0
        for i, (sequence, enqueue_ms, deliver, body, expire) in enumerate(queue.front[:left]):
            size += len(body)
            if response.messages and size > PEEK_BYTES_MAX:
                break
            one = response.messages.add(sequence=sequence, attempts=queue.attempts if i == 0 else 0, leased=i < held,
                                        message=Message.FromString(body))
            one.enqueue_time.FromMilliseconds(enqueue_ms)
            if deliver or (i == 0 and queue.not_before):
                one.deliver_time.FromMilliseconds(max(deliver, queue.not_before if i == 0 else 0))
            if expire:
                one.expire_time.FromMilliseconds(expire)
    return response


