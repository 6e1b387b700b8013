"""A cluster under load that faults are inflicted on: what every fault needs."""
from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from spillway.client import SpillwayError, sync

from tests.torture.disk import Disks
from tests.torture.history import Writer, number_of
from tests.torture.load import CLIENT_DESTINATIONS, KEYS, PLAIN, TENANTS, described, destinations
from tests.torture.network import Network
from tests.torture.nodes import WAIT_SECONDS, Nodes, Worker, until
from tests.torture.progress import Progress, Tail

SHARDS = 16
DRAIN_SECONDS = 120.0


class World:
    """Nodes, their network and disks, the processes of the load, and what they have seen so far."""

    def __init__(self, directory: Path, nodes: int, network: Network, seed: int, *, per_second: float, messages: int = 0,
                 disk_mib: int = 0) -> None:
        """`messages`: how many are produced at most; 0: as long as it takes. `disk_mib`: the size of each node's own disk, if any."""
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*.jsonl"):
            old.unlink()
        self.directory = directory
        self.network = network
        self.seed = seed
        self.disks = Disks(directory, disk_mib)
        self.nodes = Nodes(directory, nodes, network, disk_mib)
        self.history = Writer(directory / "run.jsonl", "run")
        self.progress = Progress(SHARDS)
        self.notes: list[str] = []
        self._tail = Tail(directory, self.progress.feed)
        self._faults = count(1)
        self._fault = 0  # the one that goes on
        self._names = count(1)
        self._per_second = per_second
        self._messages = messages
        self.producers: list[Worker] = []
        self.consumers: list[Worker] = []

    def start(self) -> None:
        """Everything runs, and every shard moves, when this returns."""
        self.history.write(*described())
        for node_id in self.nodes.ids:
            self.disks.mount(node_id)
        for node in self.nodes.nodes.values():
            node.start()
        self.nodes.wait_healthy()
        with self.client() as client:
            for destination in destinations():
                client.admin.update_destination(destination, create=True, timeout=WAIT_SECONDS)
        for role in ("consume", "consume", "plain_consume"):
            self.start_consumer(role)
        parts = (("produce", 0.4), ("produce", 0.4), ("plain_produce", 0.2))
        for role, part in parts:
            name = f"p{next(self._names)}"
            options: dict[str, Any] = {"addresses": self.nodes.addresses_of_clients, "per_second": self._per_second * part,
                                       "seed": self.seed + len(self.producers), "count": round(self._messages * part)}
            if role == "plain_produce":
                options["shards"] = SHARDS
            self.producers.append(Worker(self.directory, role, name, json.dumps(options)))
        self.wait_moving(self.progress.shards, time.monotonic())

    def start_consumer(self, role: str) -> None:
        """One more consumer."""
        number = next(self._names)
        options = json.dumps({"addresses": self.nodes.addresses_of_clients, "seed": self.seed * 1000 + number})
        self.consumers.append(Worker(self.directory, role, f"c{number}", options))

    def client(self) -> sync.Client:
        """A client of the operator's."""
        return sync.Client(self.nodes.addresses_of_clients)

    # -- for faults ----------------------------------------------------------------------------------------------

    def victim(self, pick: int) -> tuple[str, list[int]]:
        """The leader of some shard, and all shards that it leads."""
        until("every shard has a leader", lambda: len(self.nodes.leaders()) == SHARDS)
        leaders = self.nodes.leaders()
        node_id = leaders[1 + pick % SHARDS]
        return node_id, [shard for shard, leader in leaders.items() if leader == node_id]

    @contextmanager
    def fault(self, kind: str, shards: Iterable[int], **more: Any) -> Iterator[float]:
        """Notes a fault, from its beginning until it is healed; gives the moment of its beginning."""
        number = next(self._faults)
        at = time.monotonic()
        self.history.write({"kind": "fault", "at": at, "number": number, "fault": kind, "shards": list(shards), **more})
        self._fault = number
        yield at
        self.history.write({"kind": "healed", "number": number})

    def in_effect(self) -> None:
        """The fault that has begun takes effect only now: from here on it is measured."""
        self.history.write({"kind": "effect", "number": self._fault})

    def look(self) -> None:
        """Takes in what the load has written. Raises RuntimeError if a process of it failed."""
        self._tail.read()
        for worker in (*self.producers, *self.consumers):
            worker.check()

    def wait_moving(self, shards: Iterable[int], since: float) -> None:
        """Waits until the shards store and deliver what is sent from a moment on. Raises TimeoutError."""
        chosen = list(shards)

        def moving() -> bool:
            self.look()
            return self._load_is_over() or self.progress.moving(chosen, since)
        try:
            until("shards move", moving)
        except TimeoutError as error:
            still = [s for s in chosen if not self.progress.moving([s], since)]
            raise TimeoutError(f"{error}: {still} do not") from None

    def recover(self) -> None:
        """Waits until everything is as if nothing had been. Raises TimeoutError, RuntimeError."""
        self.nodes.wait_healthy()
        self.wait_moving(self.progress.shards, time.monotonic())

    def _load_is_over(self) -> bool:
        return bool(self._messages) and all(worker.process.poll() is not None for worker in self.producers)

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Ends the load in good order, waits until everything is delivered, and takes stock."""
        self.network.heal()
        for producer in self.producers:
            if producer.process.poll() is None and not self._messages:
                producer.end(WAIT_SECONDS)
            producer.wait(WAIT_SECONDS)
        with self.client() as client:
            drained = True
            try:
                until("everything delivered", lambda: self._waiting(client) == 0, DRAIN_SECONDS)
            except TimeoutError:
                drained = False
            for consumer in self.consumers:
                consumer.end(WAIT_SECONDS)
            if not drained:
                self._left(client)
            for destination in destinations():
                for letter in client.admin.list_dead_letters(destination.name, timeout=WAIT_SECONDS):
                    queue = (letter.destination, letter.tenant, letter.key)
                    self.history.write({"kind": "dead", "q": queue, "n": number_of(queue, letter.payload), "seq": letter.sequence})
                stats = client.admin.destination_stats(destination.name, timeout=WAIT_SECONDS)
                self.history.write({"kind": "books", "destination": destination.name, "enqueued": stats.enqueued_total,
                                    "acked": stats.acked_total, "dead": stats.dead_letters, "left": stats.messages})
        self.history.write({"kind": "drained", "complete": drained})
        self._tail.read()

    def _waiting(self, client: sync.Client) -> int:
        """Messages that are not delivered; -1: not known."""
        total = 0
        for destination in destinations():
            try:
                stats = client.admin.destination_stats(destination.name)
            except SpillwayError:
                return -1
            if stats.shards_missing:
                return -1
            total += stats.messages
        return total

    def _left(self, client: sync.Client) -> None:
        for producer in self.producers:
            for destination in CLIENT_DESTINATIONS if producer.role == "produce" else (PLAIN,):
                for tenant in range(TENANTS):
                    for key in range(KEYS):
                        queue = (destination, f"{producer.name}-{tenant}", f"k{key}")
                        for message in client.admin.peek(*queue, limit=100).messages:
                            self.history.write({"kind": "left", "q": queue, "n": number_of(queue, message.payload),
                                                "seq": message.sequence})

    def close(self) -> None:
        """Ends whatever still runs."""
        for worker in (*self.producers, *self.consumers):
            worker.kill()
        self.nodes.end()
        self.network.close()
        self.disks.close()
        self.history.close()
