"""Requests under way: what a stream's handler waits for while shards work on the pieces."""
from __future__ import annotations

from asyncio import AbstractEventLoop, Future
from collections.abc import Callable
from typing import ClassVar

from spillway.broker.core.access import Grants
from spillway.broker.core.entry import Option

# (index in the request, spillway.v1.ErrorCode, field, description)
Error = tuple[int, int, str, str]


class Call:
    """One ProduceRequest or AckRequest: its pieces are done one by one, then it answers as a whole."""

    asked: ClassVar[bool] = True  # somebody wants to know

    __slots__ = ("done", "errors", "grants", "on_done", "peer", "results", "size", "traced", "traced_ns", "waiting")

    def __init__(self, count: int, size: int, loop: AbstractEventLoop, on_done: Callable[[Call], None],
                 peer: bool = False, grants: Grants | None = None) -> None:
        self.results: list[int] = [0] * count
        self.errors: list[Error] = []
        self.size = size  # bytes that it keeps from the node's ingress budget
        self.waiting = 1  # pieces not yet done; one is the handler's own, see `release`
        self.done: Future[None] = loop.create_future()
        self.on_done = on_done
        self.grants = grants  # what leases may be settled; None: all
        self.traced: dict[int, bytes] | None = None  # by index: the traceparent of sampled messages
        self.traced_ns = 0  # when it came, if anybody makes spans
        self.peer = peer  # another node's: what cannot be done here goes back to it, and not on to a third one

    def fail(self, index: int, code: int, field: str, description: str) -> None:
        """Refuses one item."""
        self.errors.append((index, code, field, description))

    def release(self) -> None:
        """A piece is done."""
        self.waiting -= 1
        if not self.waiting:
            self.on_done(self)
            if not self.done.done():
                self.done.set_result(None)


class Release(Call):
    """Leases that go back because they did not reach their consumer; if they are over meanwhile, all the better."""

    __slots__ = ()
    asked = False

    def __init__(self, count: int, loop: AbstractEventLoop) -> None:
        super().__init__(count, 0, loop, lambda call: None)


class Batch:
    """The messages of one call for one shard, in order, all of one producer without a gap."""

    __slots__ = ("bodies", "call", "copies", "epoch", "first", "give_up", "names", "options", "positions", "producer",
                 "promised", "size")

    def __init__(self, call: Call, producer: str, first: int) -> None:
        self.call = call
        self.producer = producer
        self.first = first  # producer sequence of the first message
        self.names: list[bytes] = []
        self.bodies: list[bytes] = []
        self.positions: list[int] = []  # in the call
        self.options: dict[int, Option] | None = None  # by position in the batch
        # Messages to a route's source, by position in the batch: (queue, body) as they came. What stands in `names` and
        # `bodies` for them belongs into the outbox of the shard that this node leads.
        self.promised: dict[int, tuple[bytes, bytes]] | None = None
        self.copies: list[int] | None = None  # sequences of the source of copies; `first` then is the one before them
        self.epoch = 0  # of copies, see core.entry.Enqueue
        self.give_up = 0.0  # loop time after which it is no longer passed on to another node; 0: not passed on yet
        self.size = 0
