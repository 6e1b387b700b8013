"""A whole cluster in one process under a seeded clock, network and disk, with producers, consumers and operators.

First every fault while clients work; then faults end, a majority is healed, and everything must come to rest: delivered, dead
letters or purged, and the same on every replica. A run depends on its seed only.
"""
from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from google.protobuf.duration_pb2 import Duration
from spillway.broker.core.outbox import OUTBOX
from spillway.broker.core.shard import destination_of
from spillway.broker.runtime import node as node_module
from spillway.broker.services import produce
from spillway.cluster.placement import place
from spillway.cluster.raft.configuration import Configuration
from spillway.cluster.raft.progress import Limits
from spillway.contract.hashing import PART, queue_key
from spillway.v1 import admin_service_pb2 as admin
from spillway.v1.message_pb2 import Message
from spillway.v1.queue_service_pb2 import OUTCOME_ACK, LeasedRun

from tests.properties.order_history import violations
from tests.simulation.cluster import applications
from tests.simulation.cluster.applications import (
    ConsumingApplication,
    DrainingApplication,
    LeavingApplication,
    OperatingApplication,
    ProducingApplication,
)
from tests.simulation.cluster.clients import Client, Consumer, Drainer, Operator, Producer, Sent, Source
from tests.simulation.cluster.faults import Faults
from tests.simulation.cluster.loop import SimLoop
from tests.simulation.cluster.node import SimNode, underneath
from tests.simulation.cluster.observer import Observer
from tests.simulation.cluster.rpc import Network
from tests.simulation.cluster.violation import Violation
from tests.simulation.members import Operator as Members
from tests.simulation.network import RoughNetwork
from tests.simulation.raft.checkers import (
    CommittedStays,
    ElectedByMajority,
    NothingStale,
    NothingUnsynced,
    OneChangeAtATime,
    OneLeader,
    SameHistory,
)

REST_SECONDS = 240.0  # a healed cluster must have delivered everything within
FORM_SECONDS = 30.0
WELL_SECONDS = 60.0  # consumers have found all nodes again
LEAVE_SECONDS = 120.0


def _ms(milliseconds: int) -> Duration:
    out = Duration()
    out.FromMilliseconds(milliseconds)
    return out


@dataclass
class Options:
    """What may happen in a run; drawn from the seed, so that each run has faults and loads of its own ("swarm testing")."""

    nodes: int = 3
    shards: int = 2
    replicas: int = 3
    seconds: float = 12.0
    delay: float = 0.001
    faults: dict[str, float] = field(default_factory=dict)
    """Kind -> how many a second."""
    producers: int = 3
    consumers: int = 3
    messages: int = 60
    """Of each producer."""
    pause: float = 0.1
    """Of a producer between requests, seconds on average."""
    delayed: float = 0.0
    hang: float = 0.02
    success: float = 0.85
    operator: bool = True
    purges: bool = False
    routes: bool = False
    checkpoint_seconds: float = 5.0
    cache_bytes: int = 1 << 20
    unsaved_bytes: int = 512 << 10
    audit_every: int = 32
    twice: float = 0.0
    """How many frames between nodes come twice, and (`ghosts`) late frames of connections that are gone."""
    ghosts: float = 0.0
    changes: float = 0.0
    """Changes of the members of shards' groups in a second."""
    drains: float = 0.0
    """How many nodes a second an operator drains or takes back; then the nodes themselves change the members, and replace who is away."""
    limits: Limits = field(default_factory=Limits)

    applications: bool = False
    """Whether most producers, half of the consumers and the operators use the product's own client."""
    piece_bytes: int = produce.BATCH_BYTES_MAX
    turn_bytes: int = node_module.TURN_BYTES
    """Of messages in a piece of a request, and in the entries of a node's turn."""
    dedup: float = 0.0
    """Share of the records that have a dedup id: their producers send them again until they know that they are stored, and some twice."""
    ttl: float = 0.0
    """Share of the records that have a time to live of their own."""

    def with_ids(self, seed: int) -> Options:
        """With dedup ids and times to live in a third of the seeds."""
        rnd = random.Random(f"records {seed}")
        if rnd.random() < 2 / 3:
            return self
        return replace(self, dedup=rnd.choice((0.0, 0.3, 1.0)), ttl=rnd.choice((0.0, 0.1)))

    def with_applications(self, seed: int) -> Options:
        """With them in a third of the seeds; their requests are often divided."""
        rnd = random.Random(f"client {seed}")
        if rnd.random() < 2 / 3:
            return self
        return replace(self, applications=True, piece_bytes=rnd.choice((100, 500, self.piece_bytes)),
                       turn_bytes=rnd.choice((100, 2000, self.turn_bytes)))

    def with_members(self, seed: int) -> Options:
        """With changes of members, and nodes enough for them, in a quarter of the seeds; in some others nodes are drained."""
        rnd = random.Random(f"options {seed}")
        if self.nodes > 1 and rnd.random() < 0.3:
            return replace(self, nodes=5, changes=rnd.choice((0.5, 2.0, 8.0)))
        if self.nodes > 1 and rnd.random() < 0.2:
            return replace(self, nodes=5, drains=rnd.choice((0.2, 0.5, 2.0)))
        return self

    @classmethod
    def draw(cls, rnd: random.Random) -> Options:
        """Options of a seed."""
        nodes = rnd.choice((1, 3, 3, 3, 3, 5))
        append = rnd.choice((400, 4000, 1 << 20))
        kinds = [kind for kind in Faults.KINDS if rnd.random() < 0.5]
        rate = rnd.choice((0.3, 1.0, 3.0))
        weights = {kind: rnd.random() for kind in kinds}
        whole = sum(weights.values()) or 1.0
        return cls(
            nodes=nodes, shards=rnd.choice((1, 2, 3)), replicas=3, seconds=rnd.uniform(5, 15),
            delay=rnd.choice((0.0003, 0.001, 0.005, 0.03)), faults={kind: rate * w / whole for kind, w in weights.items()},
            producers=rnd.choice((1, 3, 5)), consumers=rnd.choice((1, 2, 4)), messages=rnd.choice((20, 60, 150)),
            pause=rnd.choice((0.02, 0.1, 0.3)), delayed=rnd.choice((0.0, 0.05)), hang=rnd.choice((0.0, 0.02, 0.1)),
            success=rnd.choice((1.0, 0.9, 0.6)), operator=rnd.random() < 0.5, purges=rnd.random() < 0.3,
            routes=rnd.random() < 0.3, checkpoint_seconds=rnd.choice((0.0, 1.5, 5.0)), cache_bytes=rnd.choice((0, 300, 1 << 20)),
            unsaved_bytes=rnd.choice((200, 2000, 512 << 10)), audit_every=rnd.choice((16, 64)),
            twice=rnd.choice((0.0, 0.02, 0.2)), ghosts=rnd.choice((0.0, 1.0)),
            limits=Limits(append=append, window=append * rnd.choice((1, 3)), tail=rnd.choice((0, 2000, 1 << 20)),
                          keep=rnd.choice((0, 3000, 1 << 20)), hold=rnd.choice((3000, 1 << 20))))


class World:
    """A seeded run."""

    def __init__(self, seed: int, options: Options | None = None, show: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.rnd = random.Random(seed)
        self.options = options or Options.draw(self.rnd).with_members(seed).with_applications(seed).with_ids(seed)
        self.counts: Counter[str] = Counter()
        self._hash = hashlib.blake2b(digest_size=16)
        self._show = show
        self._failure: BaseException | None = None
        self.calm = False
        self.loop = SimLoop()
        self.names = [f"n{i + 1}" for i in range(self.options.nodes)]
        self.placement = place(sorted(self.names), self.options.shards, min(self.options.replicas, len(self.names)))
        self.lags: dict[tuple[str, str], float] = {}
        self.network = RoughNetwork(self.later, lambda: self.loop.now, self._delay, self.rnd, self.options.twice, self.options.ghosts)
        self.rpc = Network(self.loop, self._delay)
        self.observers = {n: Observer(n) for n in range(1, self.options.shards + 1)}
        self.meta_history, self.leaders = SameHistory(), OneLeader()
        self.committed, self.unsynced = CommittedStays(), NothingUnsynced()
        self.elected, self.stale = ElectedByMajority(), NothingStale()
        self.configurations = OneChangeAtATime()
        self.nodes = {n: SimNode(self, n) for n in self.names}
        self.faults = Faults(self)
        self.members = Members(self, list(self.observers), voters_min=3)
        self.purged: set[str] = set()
        self.acks: list[tuple[Source, Sent, int]] = []
        self.refused_payloads: set[bytes] = set()
        """Of records that are not stored, a producer was told."""
        self.late_payloads: set[bytes] = set()
        """Of records that may be stored out of order: when their producer is gone and another one has taken its place, or as they were sent
        again."""
        self.given: dict[tuple[int, int], str] = {}  # (shard, token) -> consumer that got the lease
        self._plan()

    def founders_of(self, group: int) -> list[str]:
        """The first voters of a group."""
        return self.placement[group]

    # -- the plan ------------------------------------------------------------------------------------------------

    def draw_destination(self, rnd: random.Random, name: str) -> admin.Destination:
        """A destination with a policy of the seed. Order is for ever."""
        policy = admin.DeliveryPolicy(
            lease_duration=_ms(rnd.choice((1000, 2000, 4000))), backoff=admin.Backoff(base=_ms(rnd.choice((1, 50, 200))), cap=_ms(800)),
            run_messages_max=rnd.choice((1, 3, 64)),
            ordering=admin.ORDERING_UNORDERED if name == "u" else admin.ORDERING_ORDERED,
            nack_policy=rnd.choice((admin.NACK_POLICY_BLOCK, admin.NACK_POLICY_BLOCK, admin.NACK_POLICY_SKIP)))
        if rnd.random() < 0.3:
            policy.nack_policy = admin.NACK_POLICY_BLOCK_UNTIL
            policy.attempts_max = rnd.choice((1, 3))
        if rnd.random() < 0.2:
            policy.dead_letter_policy = admin.DEAD_LETTER_POLICY_DISCARD
        if rnd.random() < 0.2:
            policy.ttl.CopyFrom(_ms(rnd.choice((2000, 8000))))
        if rnd.random() < 0.2:
            policy.limit.CopyFrom(admin.Limit(messages_per_second=rnd.choice((20.0, 200.0)), leases_max=rnd.choice((0, 2))))
        if rnd.random() < 0.1:
            policy.tenant_limit.CopyFrom(admin.Limit(leases_max=1))
        return admin.Destination(name=name, policy=policy)

    def _plan(self) -> None:
        rnd, options = self.rnd, self.options
        names = ["a", "b", "u"][:rnd.choice((1, 2, 3))]
        self.destinations = [self.draw_destination(rnd, name) for name in names]
        self.routes = []
        self.targets: dict[str, list[str]] = {}
        if options.routes:
            self.targets["all"] = names
            self.routes.append(admin.Route(source="all", targets=[admin.RouteTarget(destination=n) for n in names]))
        sources = names + list(self.targets)
        tenants, keys = rnd.choice((1, 3)), rnd.choice((1, 2, 5))
        queues = [(d, f"t{t}", f"k{k}") for d in sources for t in range(tenants) for k in range(keys)]
        self.operator = (OperatingApplication if options.applications else Operator)(self, "operator")
        self.drainer = (DrainingApplication if options.applications else Drainer)(self, "drainer")
        self.leaver = LeavingApplication(self, "leaver")
        self.producers: list[Source] = []
        for i in range(options.producers):
            own = rnd.sample(queues, rnd.randint(1, len(queues)))
            known = rnd.random() < 0.8
            if known and options.applications:
                self.producers.append(ProducingApplication(self, f"p{i}", own, options.messages))
            else:
                self.producers.append(Producer(self, f"p{i}", own, options.messages, f"id{i}" if known else ""))
        self.consumers: list[Client] = []
        for i in range(options.consumers):
            patterns = ["*"] if not i or rnd.random() < 0.5 else [rnd.choice(names)]
            session = rnd.random() < 0.5
            if session and options.applications:
                self.consumers.append(ConsumingApplication(self, f"c{i}", patterns))
            else:
                self.consumers.append(Consumer(self, f"c{i}", patterns, session))

    # -- what happens --------------------------------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], Any]) -> Any:
        """Does something after a while, outside of all processes."""
        return self.loop.call_later(seconds, action, context=self.faults.context)

    def _delay(self, sender: str, receiver: str) -> float:
        return self.options.delay * self.rnd.choice((0.5, 1, 1, 3)) + self.lags.get((sender, receiver), 0.0)

    def trace(self, what: str, who: str, detail: str) -> None:
        """A line of the run's trace; two runs of a seed have the same lines."""
        line = f"{self.loop.now:.6f} {what} {who} {detail}"
        self._hash.update(line.encode())
        if self._show is not None:
            self._show(line)

    @property
    def digest(self) -> str:
        """Of the trace so far."""
        return self._hash.hexdigest()

    @property
    def changing(self) -> bool:
        """Whether the members of groups may change in this run: nodes replace by themselves who is away, if there are others."""
        return bool(self.options.changes or self.options.drains or self.options.nodes > self.options.replicas)

    def failed(self, error: BaseException) -> None:
        """Something that must not happen did; the run ends."""
        if self._failure is None:
            self._failure = error

    def _check(self) -> bool:
        if self._failure is None and self.rpc.bugs:
            self._failure = Violation("bug", self.rpc.bugs[0])
        if self._failure is None and self.loop.failures:
            self._failure = Violation("bug", self.loop.failures[0])
        return self._failure is not None

    def _run_until(self, seconds: float, done: Callable[[], bool] = lambda: False) -> bool:
        came = self.loop.run_until(self.loop.now + seconds, lambda: self._check() or done())
        if self._check():
            assert self._failure is not None
            raise self._failure
        return came

    def may_wipe(self, node: SimNode) -> bool:
        """Whether the others can bring a node with empty disks up to date."""
        return len(self.names) > 1 and all(self.remembers(n) for n in self.nodes.values() if n is not node)

    def remembers(self, node: SimNode) -> bool:
        """Whether a node has all that counts on it: it takes part, and so do its replicas of all groups that it votes in. A node that lost
        its disk and is an ordinary one again may not have got them all back."""
        def votes(shard: int) -> bool:
            configuration = self.configurations.last(shard)[1]
            return node.name in (configuration.voters if configuration is not None else self.founders_of(shard))
        return node.whole and all(
            (group := node.host.groups.get(shard)) is not None and group.recovery is None for shard in self.observers if votes(shard))

    def forgetful(self) -> bool:
        """Whether a node may have forgotten something."""
        may = not self.options.faults.keys().isdisjoint(("wipe", "flipped_bit"))
        return may and not all(self.remembers(n) for n in self.nodes.values())

    def voters(self) -> list[list[str]]:
        """Of all groups, by every configuration that may count."""
        found = [self.names, *(nodes for shard, nodes in self.placement.items() if self.configurations.last(shard)[1] is None)]
        for node in self.nodes.values():
            if node.life:
                found += [list(c.voters) for group in node.host.groups.values() if group.number
                          for i, c in group.journal._configurations if c.voters and i >= self.configurations.last(group.number)[0]]
        return found

    # -- what clients are told -----------------------------------------------------------------------------------

    def acknowledged(self, producer: Source, sent: Sent, sequence: int) -> None:
        """A producer was told that a record is stored; sequence 1: that it had been before."""
        observer = self.observers[sent.shard]
        self.counts["acknowledged"] += 1
        self.trace("acknowledged", producer.process.name, f"{sent.shard} {sequence}")
        self.acks.append((producer, sent, sequence))
        if sequence == 1:
            if isinstance(producer, Producer) and producer.producer_id and not observer.stored[producer.producer_id, sent.number]:
                raise Violation("I1", f"number {sent.number} of producer {producer.producer_id!r} is acknowledged, and not in the log of "
                                f"shard {sent.shard}")
            return
        stored = observer.bodies.get(sequence)
        if stored is None:
            raise Violation("I1", f"sequence {sequence} of shard {sent.shard} is acknowledged, and not in its log")
        if stored[0] != OUTBOX and (stored[0].partition(PART)[0] != sent.queue or stored[1] != sent.body):
            raise Violation("I1", f"sequence {sequence} of shard {sent.shard} is acknowledged for {sent.queue!r}, and is {stored}")

    def delivered(self, consumer: Client, run: LeasedRun) -> None:
        """A consumer got a lease."""
        observer = self.observers[run.shard]
        lease = observer.naive.leases.get(run.fencing_token)
        name = queue_key(run.destination, run.tenant, run.key)
        sequences = [m.sequence for m in run.messages]
        self.counts["messages delivered"] += len(sequences)
        self.trace("delivered", consumer.process.name, f"{run.shard} {run.fencing_token} {len(sequences)}")
        where = f"lease {run.fencing_token} of {name!r} in shard {run.shard}"
        if lease is None or lease.queue.partition(PART)[0] != name:
            raise Violation("I3", f"{where} is delivered, and not in the log")
        if (run.shard, run.fencing_token) in self.given:
            raise Violation("I3", f"{where} is delivered twice")
        self.given[run.shard, run.fencing_token] = consumer.process.name
        for sequence in sequences:
            if observer.acked_by.get(sequence, run.fencing_token) < run.fencing_token:
                raise Violation("I4", f"{where} has message {sequence}, which was acknowledged under {observer.acked_by[sequence]}")
        if sequences != lease.run:
            raise Violation("I2", f"{where} is delivered with {sequences}, the log has {lease.run}")
        for message in run.messages:
            if observer.bodies[message.sequence][1] != message.message.SerializeToString():
                raise Violation("I1", f"message {message.sequence} of {where} is not what was produced")

    def settled(self, consumer: Client, shard: int, token: int, outcome: int, sequence: int) -> None:
        """A consumer was told that a settlement took effect."""
        self.trace("settled", consumer.process.name, f"{shard} {token} {outcome}")
        if outcome == OUTCOME_ACK:
            observer = self.observers[shard]
            lease = observer.naive.leases[token]
            open_ = [s for s in lease.run if s <= sequence and observer.gone.get(s) != "acked"]
            if open_:
                raise Violation("I4", f"messages {open_} of shard {shard} are acknowledged, says the broker, and are not")

    def over(self, shard: int, token: int) -> None:
        """A consumer was told that a lease is over. Once it is, it stays so."""
        self.counts["settlements of ended leases"] += 1
        lease = self.observers[shard].live.get(token)
        if lease is not None:
            raise Violation("I3", f"lease {lease.token} of {lease.queue!r} in shard {shard} is over, the broker says, and it is not")

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Counter[str]:
        """Raises Violation, or whatever a node raised. Returns what happened how often."""
        with applications.logged(self):
            try:
                with underneath(self), applications.underneath(self):
                    self._run()
            finally:
                self.counts["simulated ms"] = int((self.loop.now - 1000.0) * 1000)
                self.loop.dispose()
        return self.counts

    def _run(self) -> None:
        for node in self.nodes.values():
            node.start()
        ready = [False]

        async def prepare() -> None:
            await self.operator.create(self.destinations, self.routes)
            ready[0] = True
        self.operator.start(prepare())
        if not self._run_until(FORM_SECONDS, lambda: ready[0]):
            raise Violation("progress", f"no cluster after {FORM_SECONDS:.0f} s")
        for client in (*self.producers, *self.consumers):
            client.start(client.run())
        if self.options.operator:
            self.operator.start(self.operator.run())
        if self.options.drains:
            self.drainer.start(self.drainer.run())
        self.faults.begin()
        if self.options.changes:
            self.members.start()
        self._run_until(self.options.seconds)
        self._heal()
        self._final()

    def _at_rest(self) -> bool:
        self._reconcile()
        return self.operator.finished and self.drainer.finished and all(p.done for p in self.producers) and self._empty()

    def _empty(self) -> bool:
        return not any(queue.left for o in self.observers.values() for queue in o.naive.queues.values())

    def _heal(self) -> None:
        """Faults end; a minority may stay away. Everything must be delivered, and then be the same everywhere."""
        self.calm = True
        left = self.faults.end()
        self.operator.start(self.operator.finish())
        if not self._run_until(REST_SECONDS, self._at_rest):
            raise Violation("progress", f"not at rest {REST_SECONDS:.0f} s after the faults: {self._restless()}")
        for node in left:
            node.recover()
        if not self._run_until(REST_SECONDS, self._same):
            raise Violation("progress", f"replicas do not meet {REST_SECONDS:.0f} s after all nodes are up: " + ", ".join(
                f"{n.name}: {[(s, r.applied, self.observers[s].last) for s, r in n.node.shards.items()] if n.started else 'down'}"
                for n in self.nodes.values()))
        # Nodes that had hung may have stored something late once more.
        if not self._run_until(WELL_SECONDS, lambda: self._empty() and not self._unwell()):
            raise Violation("progress", f"all is delivered, and not well {WELL_SECONDS:.0f} s later: {self._unwell()}")
        if self.options.applications:
            for consumer in self.consumers:
                self.loop.kill(consumer.process)
                self.rpc.died(consumer.process)
            self.leaver.start(self.leaver.run())
            if not self._run_until(LEAVE_SECONDS, lambda: self.leaver.finished and self._same()):
                raise Violation("progress", f"not at rest {LEAVE_SECONDS:.0f} s after the last consumers came: {self._restless()}")

    def leased(self, destination: bytes) -> list[tuple[str, int, int]]:
        """Live leases of a destination, by their leaders: (node, shard, token)."""
        return [(node.name, shard, token) for node in self.nodes.values() if node.started for shard, runtime in node.node.shards.items()
                if runtime.leading for token, queue in runtime.state.leases.items() if destination_of(queue.key) == destination]

    def _unwell(self) -> list[str]:
        """What is wrong with consumers that use the product's client."""
        return [what for c in self.consumers if isinstance(c, ConsumingApplication) and (what := c.unwell)]

    def _restless(self) -> str:
        queues = [(o.shard, name, len(q.left), q.not_before, q.lease) for o in self.observers.values()
                  for name, q in o.naive.queues.items() if q.left]
        return (f"{[(p.process.name, p.left, len(p.pending)) for p in self.producers if not p.done]} not sent, operator "
                f"{'finished' if self.operator.finished else 'busy'}, {len(queues)} queues wait, such as {queues[:3]}, nodes "
                f"{[(n.name, n.started, n.started and repr(n.host)) for n in self.nodes.values()]}")

    def _same(self) -> bool:
        self.faults.replace_damaged()
        self._reconcile()
        # Not empty: something whose producer had given it up was stored late.
        return self._empty() and self._settled() and all(
            n.whole and all(r.applied >= self.observers[s].last for s, r in n.node.shards.items()) for n in self.nodes.values())

    def _reconcile(self) -> None:
        """Members that lost their disk have no replica until somebody makes it: the nodes do, where the world does not change members."""
        if self.options.changes:
            for shard in self.observers:
                self.members.reconcile(shard)

    def _settled(self) -> bool:
        """Where nodes were drained: whether every shard is where it belongs by now, and nowhere else."""
        if not self.options.drains:
            return True
        if not all(n.whole for n in self.nodes.values()):
            return False
        homes = max((n.node.meta for n in self.nodes.values()), key=lambda meta: meta.rows.applied_index).directory.homes
        for shard, home in homes.items():
            configuration = self.configurations.last(shard)[1] or Configuration.of(self.founders_of(shard))
            if {*configuration.voters} != {*home.nodes} or configuration.learners:
                return False
            if any((shard in n.node.shards) != (n.name in home.nodes) for n in self.nodes.values()):
                return False
        return True

    def _final(self) -> None:
        for number, observer in self.observers.items():
            for node in self.nodes.values():
                runtime = node.node.shards.get(number)
                if runtime is not None and runtime.applied >= observer.last:
                    observer.compare(node.name, observer.last, runtime.state)
            wrong = violations(observer.ordered(), drained=True)
            if wrong:
                raise Violation("I2", f"shard {number}: {wrong[0]}")
        self._fates()
        self._orders()
        self.configurations.final()
        self.counts["runs"] += 1
        self.trace("end", "", f"{sorted(self.counts.items())}")

    def _fates(self) -> None:
        """I1: of every acknowledged record."""
        for producer, sent, sequence in self.acks:
            observer = self.observers[sent.shard]
            if sequence == 1 or sent.record.destination in self.targets:
                continue
            fate = observer.gone.get(sequence)
            if fate is None or (fate == "purged" and sent.record.destination not in self.purged):
                raise Violation("I1", f"message {sequence} of shard {sent.shard}, acknowledged to {producer.process.name}, is "
                                f"{fate or 'lost'}")
            if fate == "acked" and (sent.shard, observer.acked_by[sequence]) not in self.given:
                raise Violation("I1", f"message {sequence} of shard {sent.shard} is acknowledged under a lease that nobody got")

    def _orders(self) -> None:
        """I5 and the order of producers, over all shards: payloads are unique, so each is once in each destination, and those of
        a producer with an id come in its order in every queue."""
        stored: Counter[tuple[bytes, bytes]] = Counter()
        wrong = []
        for observer in self.observers.values():
            last: dict[tuple[bytes, str, str], int] = {}
            for name, body in (observer.bodies[s] for s in sorted(observer.bodies)):
                if name == OUTBOX:
                    continue
                queue = name.partition(PART)[0]
                payload = Message.FromString(body).payload
                stored[queue.split(b"\0")[0], payload] += 1
                source, who, serial = payload.rstrip(b".").decode().split("/")
                if self.producers[int(who[1:])].ordered and payload not in self.late_payloads:
                    if int(serial) <= last.get((queue, source, who), 0):
                        wrong.append(f"record {serial} of {who} to {source!r} is stored in {queue!r} behind {last[queue, source, who]}")
                    last[queue, source, who] = int(serial)
        twice = [found for found, times in stored.items() if times > 1]
        if twice:
            raise Violation("I5", f"{len(twice)} records are stored twice, such as {twice[0]}")
        if wrong:
            raise Violation("I2", wrong[0])
        refused = [found for found in stored if found[1] in self.refused_payloads]
        if refused:
            raise Violation("bug", f"{len(refused)} records are stored, and a producer was told that they are not, such as {refused[0]}")
        for producer, sent, _ in self.acks:
            for target in self.targets.get(sent.record.destination, (sent.record.destination,)):
                if not stored[target.encode(), sent.record.message.payload]:
                    raise Violation("I1", f"a record of {producer.process.name} to {sent.record.destination!r} is acknowledged, and "
                                    f"{target!r} does not have it")
