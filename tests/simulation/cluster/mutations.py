"""Switches that break one rule each, in test code only: the simulation must see that it is broken, soon.

`python -m tests.simulation.cluster.mutations [SEEDS] [NAME...]` says with which seed each is seen, and by which checker.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from spillway.broker.core.queue import Queue
from spillway.broker.core.shard import Shard
from spillway.broker.runtime import shard as shard_module
from spillway.broker.runtime.backup import Backups
from spillway.broker.runtime.calls import Batch
from spillway.broker.runtime.forward import Forwarder, LeaseProxy
from spillway.broker.runtime.node import Node
from spillway.broker.runtime.shard import ShardRuntime
from spillway.broker.runtime.wire import run_parts
from spillway.broker.services import produce
from spillway.broker.services.admin import AdminService
from spillway.client.consumer import Consumer as ClientConsumer
from spillway.client.consumer import _Stream as ClientStream
from spillway.client.producer import Producer as ClientProducer
from spillway.client.retry import Verdict
from spillway.client.sequencing import Lane
from spillway.client.settlements import Settlement

from tests.properties import test_shard_mutants as shards
from tests.simulation.cluster.violation import Violation
from tests.simulation.cluster.world import World
from tests.simulation.raft import mutations as raft

Mutation = Callable[[], Any]


def _answer_early() -> Any:
    """I1: producers are told as soon as their messages are on their way into the log."""
    collect = ShardRuntime.collect

    def early(self: ShardRuntime) -> bytes | None:
        command = collect(self)
        if command is not None:
            for batch in self._in_flight[-1][1]:
                if batch.producer:
                    for position in batch.positions:
                        batch.call.results[position] = 1
                    batch.call.release()
                    batch.call.waiting += 1
        return command
    return patch.object(ShardRuntime, "collect", early)


def _deliver_backwards() -> Any:
    """I2: a run reaches its consumer in another order than it has in the queue."""
    def backwards(self: Node, runtime: ShardRuntime, pick: Any, queue: Queue) -> bool:
        sink = pick.consumer.sink
        if sink is None or sink.closed or not (sink.admit is None or sink.admit(pick.messages, pick.bytes)):
            return False
        runtime.state.ensure(queue, queue.lease_size)
        sink.push(*run_parts(runtime.number, queue, queue.front[:queue.lease_size][::-1]))
        return True
    return patch.object(Node, "deliver", backwards)


def _deliver_again() -> Any:
    """I4: a run begins with a message that was acknowledged."""
    last: dict[bytes, Any] = {}

    def again(self: Node, runtime: ShardRuntime, pick: Any, queue: Queue) -> bool:
        sink = pick.consumer.sink
        if sink is None or sink.closed:
            return False
        runtime.state.ensure(queue, queue.lease_size)
        run = queue.front[:queue.lease_size]
        before = last.get(queue.key)
        last[queue.key] = run[-1]
        sink.push(*run_parts(runtime.number, queue, [before, *run] if before is not None and before[0] < run[0][0] else run))
        return True
    return patch.object(Node, "deliver", again)


def _forget_producers() -> Any:
    """I5: producers' numbers are not looked at."""
    enqueue = ShardRuntime.enqueue

    def anonymous(self: ShardRuntime, stream: int, batch: Batch) -> None:
        if batch.copies is None:
            batch.producer = ""
        enqueue(self, stream, batch)
    return patch.object(ShardRuntime, "enqueue", anonymous)


def _forget_ids() -> Any:
    """I5: dedup ids do not reach the log."""
    option = produce._option

    def without(record: Any, i: int, now: int, dedup_ms: int) -> Any:
        deliver, expire, _, _ = option(record, i, now, dedup_ms)
        return deliver, expire, b"", 0
    return patch.object(produce, "_option", without)


def _own_clock() -> Any:
    """I6: each replica takes the time from its own clock."""
    apply = Shard.apply

    def timely(self: Any, index: int, entry: Any, effects: Any = None) -> None:
        entry.now_ms += id(self) // 64 % 7
        apply(self, index, entry, effects)
    return patch.object(Shard, "apply", timely)


def _miscount() -> Any:
    """I7: the last message of a run is not counted when it is acknowledged."""
    ack = Shard._ack

    def short(self: Any, queue: Queue, count: int, effects: Any) -> None:
        ack(self, queue, count, effects)
        if count > 1:
            queue.counters.acked -= 1
    return patch.object(Shard, "_ack", short)


def _gap_anywhere() -> Any:
    """The client takes every record out of sequence for a sign that its shard has forgotten the producer."""
    mixed = Lane.mixed

    def everywhere(self: Lane, entries: Any, sequences: Any, refusals: Any) -> None:
        mixed(self, entries, sequences, refusals)
        for i, refusal in refusals.items():
            entries[i].gap = entries[i].first and refusal.verdict is Verdict.OUT_OF_SEQUENCE
    return patch.object(Lane, "mixed", everywhere)


def _new_numbers() -> Any:
    """The client numbers what it sends again anew, as if no copy of it were under way."""
    rewind = Lane._rewind

    def anew(self: Lane) -> None:
        rewind(self)
        if self._resend and self.acked:
            self.producer_id = self._fresh()
            self.next, self.acked = 1, 0
    return patch.object(Lane, "_rewind", anew)


def _overtake() -> Any:
    """The client takes room for a record though others wait for it."""
    def take(self: ClientProducer, size: int) -> bool:
        if not self._fits(size):
            return False
        self._room -= size
        return True
    return patch.object(ClientProducer, "_take_room", take)


def _leak_credit() -> Any:
    """The client does not take back the credit of leases that were lost."""
    finished = ClientConsumer._finished

    def leaky(self: ClientConsumer, settlement: Settlement, error: Exception | None) -> None:
        out = self.credits.messages_out, self.credits.bytes_out
        finished(self, settlement, error)  # type: ignore[arg-type]
        if error is not None:
            self.credits.messages_out, self.credits.bytes_out = out
    return patch.object(ClientConsumer, "_finished", leaky)


def _spend_twice() -> Any:
    """What two nodes granted on the same credit goes to the client."""
    admit = LeaseProxy._admit

    def admitted(self: LeaseProxy, node_id: str, messages: int, size: int) -> bool:
        return admit(self, node_id, messages, size) or not self._stopped
    return patch.object(LeaseProxy, "_admit", admitted)


def _keep_late() -> Any:
    """Nothing is given back that came too late for its client, or was too much."""
    return patch.object(Forwarder, "give_back", lambda self, run: None)


def _leave_silently() -> Any:
    """A consumer of the client that is closed does not say what has come."""
    async def silent(self: ClientStream) -> None:
        pass
    return patch.object(ClientStream, "report", silent)


def _behind() -> Any:
    """A change is answered before the node that was asked for it knows it."""
    return patch.object(AdminService, "_made", lambda self, context: None)


def _old_backup() -> Any:
    """I1: a backup has what the last checkpoint had."""
    async def export(self: Backups, group: int) -> Any:
        return self._node.store.exporter(group)
    return patch.object(Backups, "_export", export)


def _shard(mutant: type[Shard]) -> Mutation:
    def mutate() -> Any:
        return patch.object(shard_module, "Shard", mutant)
    return mutate


SEEN: dict[str, Mutation] = {
    "I1, answered before it is replicated": _answer_early,
    "I2, a run backwards": _deliver_backwards,
    "I2, retries behind others": _shard(shards.RetriesBehindOthers),
    "I3, two leases of a queue": _shard(shards.LeasesTwice),
    "I3, tokens used again": _shard(shards.ReusesTokens),
    "I4, delivered after its acknowledgement": _deliver_again,
    "I4, rows of what is acknowledged stay": _shard(shards.ForgetsToDeleteRows),
    "I5, producers are forgotten": _forget_producers,
    "I5, dedup ids are forgotten": _forget_ids,
    "I6, a clock of one's own": _own_clock,
    "I7, a counter that is short": _miscount,
    "client, forgotten for a gap": _gap_anywhere,
    "client, other numbers for copies": _new_numbers,
    "client, records overtake": _overtake,
    "client, credit leaks": _leak_credit,
    "client, nothing is said at the end": _leave_silently,
    "credit is spent twice": _spend_twice,
    "what came too late is kept": _keep_late,
    "a change is answered too early": _behind,
    "I1, a backup of the last checkpoint": _old_backup,
    "R2, released before it is synced": raft.SEEN["release before sync"],
    "R2, counted before it is synced": raft.SEEN["apply unsynced"],
    "R5, compacted up to what is applied": raft.SEEN["compact applied"],
    "R6, applied again after a restart": raft.SEEN["apply again"],
    "R8, frames of old connections": raft.SEEN["any epoch"],
    "R10, appends are not trimmed": raft.SEEN["never trim"],
    "R10, the commit index is not clamped": raft.SEEN["trim without clamp"],
    "R10, claims more than was verified": raft.SEEN["trim without claim"],
    "R10a, every reset counts": raft.SEEN["every reset"],
    "R10b, answers to any term count": raft.SEEN["any term"],
    "R11, votes count twice": raft.SEEN["every vote"],
    "R16, an install is forgotten": raft.SEEN["forget install"],
    "R18, a wiped node is a fresh one": raft.SEEN["wiped is fresh"],
    "R18, admitted at once": raft.SEEN["no barrier"],
}


def first_failure(name: str, seeds: int, by: str = "") -> tuple[int, str] | None:
    """The first seed from 0 on that fails without the rule, and how; None if all pass. With `by`, the first one that this checker sees:
    what is broken often breaks other promises, too, and chance decides which one is looked at first."""
    with SEEN[name]():
        for seed in range(seeds):
            try:
                World(seed).run()
            except Violation as violation:
                if by in ("", violation.rule):
                    return seed, violation.rule
            except Exception as error:
                return seed, type(error).__name__
    return None


if __name__ == "__main__":
    for wanted in sys.argv[2:] or SEEN:
        found = first_failure(wanted, int(sys.argv[1]) if len(sys.argv) > 1 else 100)
        print(f"{wanted:40} {'NOT SEEN' if found is None else f'seed {found[0]}: {found[1]}'}", flush=True)
