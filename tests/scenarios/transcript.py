"""Transcripts of a shard: commands in, effects and state out, for people to read and for diffs to show.

A transcript is blocks with empty lines between them. A block is commands, a line of dashes, and what came of them; the
commands of one block make one log entry. Lines with # are comments.

    enqueue QUEUE BODY... [producer=NAME first=N] [delay=MS]
    grant QUEUE MESSAGES [for=MS]            the lease is called L1, L2, ... in order
    ack LEASE POSITION                       acknowledges the first POSITION messages of the lease's run
    retry LEASE POSITION [after=MS] [reason=WORD]      POSITION messages before it are acknowledged already
    throttled LEASE POSITION for=MS
    down LEASE POSITION for=MS
    reject LEASE POSITION [reason=WORD]
    release LEASE POSITION
    extend LEASE for=MS
    expire LEASE [after=MS] [dead=REASON]
    open SCOPE                               DESTINATION or DESTINATION/TENANT
    tick MS                                  moves the clock before the entry
    checkpoint                               saves, after the entry, and forgets all that may be forgotten
    restart                                  a new shard over what was saved, with the rest of the log
    load QUEUE MESSAGES                      brings messages into memory, as a leader does
    dead DESTINATION[/TENANT]                lists the dead letters

QUEUE is DESTINATION/TENANT/KEY. A sequence is written INDEX.POSITION, a time +MS since the start.
"""
from __future__ import annotations

from pathlib import Path
from unittest import mock

from spillway.broker.core import entry as e
from spillway.broker.core import state as state_module
from spillway.broker.core.queue import Queue
from spillway.broker.core.shard import Effects, Shard
from spillway.broker.core.view import MemoryView

START_MS = 1_700_000_000_000
OUTCOMES = {"ack": e.ACK, "retry": e.RETRY, "throttled": e.THROTTLED, "down": e.DOWN, "reject": e.REJECT,
            "release": e.RELEASE, "extend": e.EXTEND}
OUTCOME_NAMES = {e.EXPIRED: "expired"} | {number: name for name, number in OUTCOMES.items()}
STATUS_NAMES = {1: "ok", 2: "already settled", 3: "stale token", 4: "not the first unsettled message"}


def parse(text: str) -> list[tuple[list[str], list[str]]]:
    """Blocks as (comments and commands, output)."""
    blocks = []
    for block in text.strip().split("\n\n"):
        head, _, tail = block.partition("\n----")
        blocks.append((head.splitlines(), tail.splitlines()[1:]))
    return blocks


def run(text: str) -> str:
    """The transcript with what really came of its commands."""
    world = Transcript()
    out = []
    for lines, _ in parse(text):
        commands = [line for line in lines if not line.startswith("#")]
        out.append("\n".join([*lines, *(["----", *world.block(commands)] if commands else [])]))
    world.check()
    return "\n\n".join(out) + "\n"


def regenerate(path: Path) -> None:
    """Writes the transcript anew."""
    path.write_text(run(path.read_text()))


class Transcript:
    """One shard and its story."""

    def __init__(self) -> None:
        self.view = MemoryView()
        self.shard = Shard(self.view)
        self.log: list[tuple[int, bytes]] = []
        self.saved = 0
        self.now = START_MS
        self.leases: dict[str, tuple[int, list[int]]] = {}  # name -> (token, sequences of the run)
        self.out: list[str] = []

    def block(self, commands: list[str]) -> list[str]:
        """Runs one block."""
        self.out = []
        entry = e.Entry(e.VERSION, 0, consumers=["consumer"])
        after = []
        for command in commands:
            verb, *words = command.split()
            options = dict(w.split("=", 1) for w in words if "=" in w)
            plain = [w for w in words if "=" not in w]
            if verb == "tick":
                self.now += int(plain[0])
            elif verb in ("checkpoint", "restart", "load", "dead"):
                after.append((verb, plain))
            else:
                self._gather(entry, verb, plain, options)
        entry.now_ms = self.now
        if entry.enqueues or entry.settles or entry.expires or entry.gates or entry.grants:
            self._apply(entry)
        for verb, plain in after:
            getattr(self, f"_{verb}")(*plain)
        if not any(verb == "dead" for verb, _ in after):
            self._show()
        return self.out

    def check(self) -> None:
        """Restarted, the shard is what it was."""
        fresh = Shard(self.view)
        for index, command in self.log[self.saved:]:
            fresh.apply(index, e.decode_entry(command))
        assert fresh.digest() == self.shard.digest()

    def _gather(self, entry: e.Entry, verb: str, plain: list[str], options: dict[str, str]) -> None:
        if verb == "enqueue":
            name, *bodies = plain
            chosen: dict[int, e.Option] | None = None
            if options.keys() & {"delay", "ttl", "id"}:
                chosen = {0: (self.now + int(options["delay"]) if "delay" in options else 0,
                              self.now + int(options["ttl"]) if "ttl" in options else 0,
                              options.get("id", "").encode(), self.now + int(options.get("remember", 0)))}
            entry.enqueues.append(e.Enqueue(options.get("producer", ""), int(options.get("first", 0)),
                                            [queue_of(name)] * len(bodies), [b.encode() for b in bodies], None, chosen))
        elif verb == "grant":
            name, messages = plain
            entry.grants.append((queue_of(name), int(messages), self.now + int(options.get("for", 1_000)), 0))
        elif verb == "expire":
            not_before = self.now + int(options["after"]) if "after" in options else 0
            entry.expires.append((self.leases[plain[0]][0], "dead" in options, not_before, options.get("dead", "")))
        elif verb == "open":
            entry.gates.append((plain[0].replace("/", "\0").encode(), 0, 0))
        else:
            token, run_ = self.leases[plain[0]]
            position = int(plain[1]) if len(plain) > 1 else 0
            wait = int(options.get("after", options.get("for", 0)))
            entry.settles.append((token, position, run_[position - 1] if 0 < position <= len(run_) else 0, OUTCOMES[verb],
                                  self.now + wait if verb in ("retry", "throttled", "down", "extend") else 0,
                                  options.get("reason", "")))

    def _apply(self, entry: e.Entry) -> None:
        index = len(self.log) + 1
        self.log.append((index, e.encode_entry(entry)))
        effects = Effects()
        self.shard.apply(index, entry, effects)
        say = self.out.append
        for batch, skipped in zip(entry.enqueues, effects.enqueued, strict=True):
            say("out of sequence" if skipped < 0 else f"stored {len(batch.bodies) - skipped}"
                + (f", {skipped} known already" if skipped else ""))
        for settle, status in zip(entry.settles, effects.settled, strict=True):
            say(f"{OUTCOME_NAMES[settle[3]]}: {STATUS_NAMES[status]}")
        for token, name, outcome in effects.released:
            say(f"{self._lease_name(token)} of {path_of(name)} ended: {OUTCOME_NAMES[outcome]}")
        for scope, until, step in effects.gates:
            say(f"gate {path_of(scope)} " + (f"closed until {self._time(until)}, step {step}" if until else "opened"))
        for queue in effects.granted:
            if queue is None:
                say("no lease")
                continue
            self.shard.ensure(queue, queue.lease_size)
            messages = queue.front[:queue.lease_size]
            self.leases[f"L{len(self.leases) + 1}"] = queue.token, [m[0] for m in messages]
            bodies = " ".join(m[3].decode() for m in messages)
            say(f"L{len(self.leases)} token {sequence_of(queue.token)}: {bodies}, attempt {queue.attempts + 1}"
                + self._gap(queue))
        for name in effects.ready:
            say(f"ready {path_of(name)}")
        for due, name in effects.delayed:
            say(f"ready {path_of(name)} at {self._time(due)}")

    def _show(self) -> None:
        stored = {k[1:] for k, _ in self.view.scan(b"q", b"r")}
        shown = False
        for name in sorted(self.shard.queues.keys() | stored):
            queue = self.shard.queues.get(name)
            if queue is None:
                if name not in self.shard._gone:
                    self.out.append(f"  {path_of(name)}: in the store only")
                    shown = True
                continue
            shown = True
            parts = [" ".join(f"{m[3].decode()}@{sequence_of(m[0])}" for m in self.shard.messages(queue))]
            if queue.cold:
                parts.append(f"{queue.cold} cold")
            if queue.token:
                parts.append(f"{self._lease_name(queue.token)} {queue.lease_acked}/{queue.lease_size} "
                             f"until {self._time(queue.deadline)}")
            if queue.attempts:
                parts.append(f"{queue.attempts} attempts")
            if queue.not_before > self.now:
                parts.append(f"not before {self._time(queue.not_before)}")
            self.out.append(f"  {path_of(name)}: " + ", ".join(parts) + self._gap(queue))
        if not shown:
            self.out.append("  nothing")

    def _checkpoint(self) -> None:
        with mock.patch.object(state_module, "CACHE_BYTES_MAX", 0):
            made = self.shard.checkpoint()
        self.view.commit(made)
        self.saved = len(self.log)
        kinds = {b"q": "queue", b"m": "message", b"l": "lease", b"d": "dead letter", b"p": "producer", b"g": "gate"}
        for what, keys in (("put", [k for k, _ in made.puts]), ("deleted", made.deletes)):
            counts = [f"{n} {kind}" for prefix, kind in kinds.items() if (n := sum(k[:1] == prefix for k in keys))]
            if counts:
                self.out.append(f"rows {what}: " + ", ".join(counts))
        if made.ranges:
            self.out.append(f"ranges deleted: {len(made.ranges)}")

    def _restart(self) -> None:
        self.shard = Shard(self.view)
        for index, command in self.log[self.saved:]:
            self.shard.apply(index, e.decode_entry(command))
        self.out += [f"ready {path_of(name)}" + (f" at {self._time(due)}" if due > self.now else "")
                     for name, due in self.shard.ready_queues()]
        self.out += [f"gate {path_of(scope)} closed until {self._time(until)}, step {step}"
                     for scope, (until, step) in sorted(self.shard.gates.items())]

    def _load(self, name: str, messages: str) -> None:
        queue = self.shard.open(queue_of(name))
        assert queue is not None
        self.shard.ensure(queue, int(messages))

    def _dead(self, scope: str) -> None:
        destination, _, tenant = scope.partition("/")
        for key, row in self.shard.dead_letters(destination.encode(), tenant.encode() or None, b"", 100):
            self.out.append(f"  {row.body.decode()}@{sequence_of(int.from_bytes(key[-8:], 'big'))} of {path_of(row.queue)}: "
                            f"{row.attempts} attempts, {row.reason or 'no reason'}, dead {self._time(row.dead_ms)}")

    def _lease_name(self, token: int) -> str:
        return next((name for name, (known, _) in self.leases.items() if known == token), "L?")

    def _time(self, ms: int) -> str:
        return f"{ms - START_MS:+d}"

    def _gap(self, queue: Queue) -> str:
        if queue.gap is None:
            return ""
        count, first, last = queue.gap
        return f", gap of {count} from {sequence_of(first)} to {sequence_of(last)}"


def queue_of(path: str) -> bytes:
    """The queue's name in the core."""
    return path.replace("/", "\0").encode()


def path_of(name: bytes) -> str:
    """The name as the transcript writes it."""
    return name.decode().replace("\0", "/")


def sequence_of(number: int) -> str:
    """A sequence or token as INDEX.POSITION."""
    return f"{number >> 20}.{number & 0xFFFFF}"
