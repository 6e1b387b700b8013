"""Empties the outbox of a shard: copies what was produced to routes' sources to the shards of the targets.

One chunk is under way at a time. Every life of a copier has an epoch that is higher than those before, and in it each
piece for a shard names the number of the copy before it; the shard takes only what follows, so a piece that was
overtaken by a repetition, or that another leader had sent, can neither be taken twice nor hide one that was lost.
"""
from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left, bisect_right
from collections import deque
from typing import TYPE_CHECKING

from spillway.broker.core.outbox import OUTBOX, copy_number, decode_promise
from spillway.broker.core.queue import Message
from spillway.broker.runtime.calls import Batch, Call
from spillway.contract.hashing import PART
from spillway.v1.message_pb2 import ERROR_CODE_UNAVAILABLE

if TYPE_CHECKING:
    from spillway.broker.runtime.node import Node
    from spillway.broker.runtime.shard import ShardRuntime

log = logging.getLogger(__name__)

CHUNK_BYTES = 512 << 10  # of copies under way
CHUNK_COPIES = 4096
CHUNK_MESSAGES = 1024
PIECE_BYTES = 16 << 10  # of copies for one shard in one piece, as producers' records have it
COPY_BYTES = 48  # what a copy takes beside its body and name, roughly
RETRY_SECONDS = 0.02
RETRY_SECONDS_MAX = 1.0
EPOCH_SHIFT = 20  # epoch = term << 20 | lives in that term


class Copier:
    """Of one shard, while this node leads it."""

    def __init__(self, node: Node, runtime: ShardRuntime) -> None:
        self._node = node
        self._runtime = runtime
        self._epoch = 0
        self._chain: dict[int, int] = {}  # target shard -> number of the last copy sent in this epoch
        self._done = 0  # sequence up to which everything is copied
        self._partial = 0  # copies made of the message behind it
        self._trimming = 0  # sequence up to which a removal is proposed; 0: none is
        self._waiting: deque[tuple[int, Batch]] = deque()  # (sequence, batch whose call waits for it)
        self._task: asyncio.Task[None] | None = None

    def start(self, term: int) -> None:
        """The node leads the shard: goes on where the last leader stopped."""
        self._epoch = term << EPOCH_SHIFT
        self._chain.clear()
        self._done = self._partial = self._trimming = 0
        if self._runtime.state.open(OUTBOX) is not None:
            self.wake()

    def stop(self) -> None:
        """The node does not lead the shard any more. Whoever waits asks the new leader, if a repetition is recognised."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        waiting, self._waiting = self._waiting, deque()
        for _, batch in waiting:
            if batch.producer:
                self._node.pass_on(self._runtime.number, batch)
            else:
                for position in batch.positions:
                    batch.call.fail(position, ERROR_CODE_UNAVAILABLE, "",
                                    f"shard {self._runtime.number}: the leader changed; the outcome is unknown")
                batch.call.release()

    def wait(self, sequence: int, batch: Batch) -> None:
        """Answers the batch's call once everything up to a sequence is copied."""
        self._waiting.append((sequence, batch))
        self.wake()

    def wake(self) -> None:
        """The outbox has something."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(self._node.task_done)

    def trimmed(self) -> None:
        """The proposed removal is applied."""
        self._trimming = 0
        self._trim()

    async def _run(self) -> None:
        wait = RETRY_SECONDS
        while True:
            chunk = self._chunk()
            if not chunk:
                self._release(1 << 64)
                return
            if await self._copy(chunk):
                wait = RETRY_SECONDS
                self._trim()
                self._release(self._done)
            else:
                self._epoch += 1
                self._chain.clear()
                await asyncio.sleep(wait)
                wait = min(wait * 2, RETRY_SECONDS_MAX)

    def _chunk(self) -> list[Message]:
        """The next messages of the outbox."""
        state = self._runtime.state
        queue = state.open(OUTBOX)
        if queue is None:
            return []
        state.ensure(queue, CHUNK_MESSAGES, CHUNK_BYTES)
        start = bisect_right(queue.front, self._done, key=_sequence)
        if start == len(queue.front):
            state.ensure(queue, start + CHUNK_MESSAGES, CHUNK_BYTES)
        return queue.front[start:start + CHUNK_MESSAGES]

    async def _copy(self, messages: list[Message]) -> bool:
        """Copies some of the messages; false if not all of that is certain to be stored."""
        node = self._node
        call = Call(CHUNK_COPIES, 0, asyncio.get_running_loop(), lambda call: None)
        pieces: dict[int, Batch] = {}
        closed: list[tuple[int, Batch]] = []
        chain = dict(self._chain)
        producer = f"\2{self._runtime.number}"
        done, partial = self._done, self._partial
        size = copies = 0
        for sequence, _, _, body, _ in messages:
            promise = decode_promise(body)
            targets = promise.targets
            while partial < len(targets) and copies < CHUNK_COPIES and size < CHUNK_BYTES:
                target = targets[partial].encode()
                name = target + b"\0" + promise.rest
                shard = node.shard_of(name)
                if not node.policy(target).ordered:
                    name += PART
                piece = pieces.get(shard)
                if piece is None or piece.size > PIECE_BYTES:
                    if piece is not None:
                        closed.append((shard, piece))
                    piece = pieces[shard] = Batch(call, producer, chain.get(shard, 0))
                    piece.epoch = self._epoch
                    piece.copies = []
                assert piece.copies is not None
                if promise.deliver or promise.expire:
                    piece.options = piece.options or {}
                    piece.options[len(piece.names)] = (promise.deliver, promise.expire, b"", 0)
                number = chain[shard] = copy_number(sequence, partial)
                piece.copies.append(number)
                piece.names.append(name)
                piece.bodies.append(promise.body)
                piece.positions.append(copies)
                piece.size += len(promise.body) + len(name) + COPY_BYTES
                size += len(promise.body)
                partial += 1
                copies += 1
            if partial < len(targets):
                break
            done, partial = sequence, 0
        closed += pieces.items()
        call.waiting += len(closed)
        for shard, piece in closed:
            local = node.shards.get(shard)
            if local is not None and local.leading:
                local.enqueue(-self._runtime.number, piece)
                node.host.wake(shard)
            else:
                node.pass_on(shard, piece)
        call.release()
        await call.done
        if call.errors:
            log.info("shard %d: copies of a route are tried again: %s", self._runtime.number, call.errors[0][3])
            return False
        self._chain = chain
        self._done, self._partial = done, partial
        return True

    def _trim(self) -> None:
        """Proposes to remove what is copied."""
        state = self._runtime.state
        queue = state.open(OUTBOX)
        if self._trimming or queue is None:
            return
        state.ensure(queue, 1)  # a checkpoint may have put all of it away
        if queue.front[0][0] > self._done:
            return
        count = bisect_right(queue.front, self._done, key=_sequence)
        overflows: dict[bytes, int] = {}
        for message in queue.front[:count]:
            for name in decode_promise(message[3]).overflowed:
                overflows[name.encode()] = overflows.get(name.encode(), 0) + 1
        self._trimming = queue.front[count - 1][0]
        self._runtime.chores.copied(count, self._trimming, list(overflows.items()))
        self._node.host.wake(self._runtime.number)

    def _release(self, sequence: int) -> None:
        waiting = self._waiting
        while waiting and waiting[0][0] <= sequence:
            waiting.popleft()[1].call.release()

    def backlog(self) -> int:
        """Messages of the outbox that are not yet copied, as far as they are in memory."""
        queue = self._runtime.state.queues.get(OUTBOX)
        return 0 if queue is None else queue.count - bisect_left(queue.front, self._done + 1, key=_sequence)


def _sequence(message: Message) -> int:
    return message[0]
