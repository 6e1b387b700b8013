"""Decoders of the cluster layer: what peers send, and what logs and stores hold."""
from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest import mock

import msgspec
from google.protobuf.message import DecodeError
from spillway.cluster import state_store
from spillway.cluster.errors import ChangeInvalid, PeerRefused, SnapshotInvalid, StoreRefused, WireInvalid
from spillway.cluster.machine import Role
from spillway.cluster.raft import wire
from spillway.cluster.raft.claims import Claims
from spillway.cluster.raft.configuration import Change, ChangeKind, Configuration, decode_configuration
from spillway.cluster.raft.formation import decide
from spillway.cluster.raft.group import RaftGroup, adopt_snapshot
from spillway.cluster.raft.journal import _MARK, FORMAT, NODE_KEY, JournalStore, LogViolation, NodeRow, SyncMark
from spillway.cluster.raft.progress import Limits
from spillway.cluster.raft.seam import Timing, drive
from spillway.cluster.snapshots import Exporter, Installer
from spillway.cluster.state_store import StateStore
from spillway.cluster.transport.base import Handlers
from spillway.cluster.transport.grpc import GrpcTransport
from spillway.contract import snapshot
from spillway.peer.v1.peer_service_pb2 import Hello
from spillway.peer.v1.raft_pb2 import RaftFrame

from tests.fuzz.decoder import Decode, Decoder, Rewritten, expect, join, pairs, plain, split
from tests.simulation.raft.disk import SimDisk

TERM, LAST = 3, 6  # of the replicas that messages are delivered to
MESSAGES: list[dict[str, Any]] = [
    {"type": "append_entries", "term": 3, "round": 3, "prevLogIdx": 4, "prevLogTerm": 2, "commit_index": 5,
     "entries": [(b"\0abc", 5, 2), (b"\1", 6, 3)]},
    {"type": "append_entries", "term": 3, "round": 0, "prevLogIdx": 6, "prevLogTerm": 3, "commit_index": 6, "entries": []},
    {"type": "append_entries", "term": 4, "round": 1, "prevLogIdx": 5, "prevLogTerm": 2, "commit_index": 4,
     "entries": [(b"\0new", 6, 4), (b"\0newer", 7, 4)]},
    {"type": "next_node_idx", "round": 0, "next_node_idx": 7, "reset": False, "success": True, "recovering": False},
    {"type": "next_node_idx", "round": 0, "next_node_idx": 2, "reset": True, "success": False, "recovering": True},
    {"type": "request_vote", "term": 4, "last_log_index": 9, "last_log_term": 3, "transfer": True},
    {"type": "prevote_request", "term": 4, "last_log_index": 9, "last_log_term": 3, "transfer": False},
    {"type": "response_vote", "term": 3},
    {"type": "prevote_answer", "term": 4, "granted": True},
    {"type": "timeout_now", "term": 3},
    {"type": "snapshot_offer", "term": 3, "round": 2, "first_index": 50},
    {"type": "recovery_request", "incarnation": "abc"},
    {"type": "recovery_answer", "incarnation": "abc", "barrier_index": 12},
    {"type": "append_entries", "term": 3, "round": 0, "prevLogIdx": 6, "prevLogTerm": 3, "commit_index": 6,
     "entries": [(b"\2" + Configuration(("n1", "n2", "n3"), ("n4",)).encode(), 7, 3)]},
]


def _frame(*messages: dict[str, Any], term: int = TERM) -> bytes:
    frame = RaftFrame(messages=[wire.encode(0, max(term, m.get("term", 0)), m) for m in messages], claims_complete=True)
    frame.claims.add(group=1, term=5)
    return frame.SerializeToString()


def _decode_frame(data: bytes) -> None:
    messages, claims, complete, _ = wire.decode_frame(data)
    for group, message in messages:
        again = wire.encode(group, message["sender_term"], message)
        expect(wire.decode(again) == message, message)
    known = Claims()
    for group in known.take("n2", claims, complete):
        expect(known.leader(group)[0] == "n2", claims)


# -- a replica --------------------------------------------------------------------------------------------------------


class _Machine:
    """A GroupMachine that takes everything."""

    def __init__(self, durable: int) -> None:
        self._durable = durable

    def durable_index(self) -> int:
        return self._durable

    def apply(self, index: int, term: int, command: bytes) -> None:
        pass

    def configured(self, index: int, term: int, configuration: bytes) -> None:
        decode_configuration(configuration)

    def collect(self) -> bytes | None:
        return None

    def role_changed(self, role: Role, term: int, leader: str | None) -> None:
        pass

    def reload(self) -> None:
        pass


class _Clock:
    def monotonic(self) -> float:
        return 10.0


def _encoded(peer: str, group: int, term: int, message: dict[str, Any]) -> None:
    wire.encode(group, term, message).SerializeToString()


@cache
def _log() -> dict[bytes, bytes]:
    """The rows of a replica that has voted in term 3 and has entries of two terms."""
    disk = SimDisk()
    store = JournalStore(disk, "c", "n1", lambda: "abc")
    store.change_node(formed=True, founders={"n1": "abc", "n2": "def", "n3": "ghi"})
    journal = store.journal(0)
    journal.setCurrentTerm(TERM, None)
    for index in range(1, LAST + 1):
        journal.add(b"\1" if index in (1, LAST) else b"\0command", index, 1 if index == 1 else 3 if index == LAST else 2)
    journal.found(Configuration.of(["n1", "n2", "n3"]))
    journal.admit("abc")
    store.write()
    return dict(disk.rows)


def _replica(rows: dict[bytes, bytes], durable: int) -> RaftGroup:
    disk = SimDisk()
    disk.rows = rows
    drive(10.0, lambda: 0.5)
    store = JournalStore(disk, "c", "n1", lambda: "abc")
    group = RaftGroup(0, "n1", ["n1", "n2", "n3"], _Machine(durable), store.journal(0), Timing(), Limits(), _encoded, _Clock())
    for peer in ("n2", "n3"):
        group.connected(peer)
    return group


def _lead(group: RaftGroup) -> None:
    drive(20.0, lambda: 0.5)
    for message in ({}, {"type": "prevote_answer", "sender_term": TERM, "term": TERM + 1, "granted": True},
                    {"type": "response_vote", "sender_term": TERM + 1, "term": TERM + 1}):
        if message:
            group.deliver("n2", message)
        group.engine.deadline = -1.0
        group.tick()
    expect(group.engine.state == 2, group)


def _deliver(data: bytes) -> None:
    """A frame of a peer, as a follower, a leader or a replica that recovers has it; the first byte says which."""
    messages = wire.decode_frame(data[1:]).messages
    group = _replica(dict(_log()), 2)
    kind = data[0] % 3 if data else 0
    if kind == 1:
        _lead(group)
    elif kind == 2:
        group.recover("abc")
    for number, message in messages:
        if number == 0:
            group.deliver("n2", message)
            group.tick()
            group.journal.store.write()
            group.journal.store.synced()
    group.tick()
    group.collect()


def _replica_samples() -> tuple[bytes, ...]:
    """To a follower and one that recovers, each message; to a leader, of term 4, what it may get."""
    for_leader = (*MESSAGES[3:5], *({**m, "term": 5} for m in MESSAGES[5:7]), MESSAGES[0], MESSAGES[11])
    return (b"\0" + _frame(*MESSAGES[:2]), *(bytes((kind,)) + _frame(m) for kind in (0, 2) for m in MESSAGES),
            *(b"\1" + _frame(m, term=TERM if m is MESSAGES[0] else TERM + 1) for m in for_leader))


# -- the log ----------------------------------------------------------------------------------------------------------


def _journal(data: bytes) -> None:
    """The rows of a node's log: opened, checked, and gone on with."""
    disk = SimDisk()
    disk.rows = dict(pairs(data))
    store = JournalStore(disk, "c", "n1", lambda: "abc")
    decide("n1", store.node.incarnation, ["n1", "n2"], {"n2": store.node})
    group = _replica(disk.rows, 0)
    journal = group.journal
    drive(30.0, lambda: 0.5)
    for index in range(journal.first, journal.last + 2):
        journal.term_at(index)
    expect(len(journal.entries(journal.first, journal.last + 1)) == len(journal), journal.group)
    journal.setRaftCommitIndex(max(journal.commit, journal.last))
    group.engine.deadline = -1.0
    group.tick()
    group.apply_committed()
    store.write()


def _journal_samples() -> tuple[bytes, ...]:
    rows = _log()
    intent = {**rows, b"\0\0\0\0I": (5).to_bytes(8, "little")}
    blank = {NODE_KEY: msgspec.msgpack.encode(NodeRow(FORMAT, "c", "n1", "abc"))}
    return tuple(join(part for row in sorted(one.items()) for part in row) for one in (rows, intent, blank))


def _configuration(data: bytes) -> None:
    made = decode_configuration(data)
    expect(decode_configuration(made.encode()) == made, made)
    for kind in ChangeKind:
        for node_id in ("n2", "n9"):
            with suppress(ChangeInvalid):
                after = made.after(Change(kind, node_id))
                expect(decode_configuration(after.encode()) == after, after)


@contextmanager
def _mark() -> Iterator[Decode]:
    """The file beside the log that says how far it was synced."""
    with TemporaryDirectory() as name, Rewritten(Path(name) / "log.synced") as file:

        def decode(data: bytes) -> None:
            file.write(data)
            mark = SyncMark(file.path)
            expect(not mark.value or mark.value == int.from_bytes(data[:8], "little"), data)
            mark.set(mark.value)
            mark.close()

        yield decode


# -- snapshots --------------------------------------------------------------------------------------------------------


class _Rows:
    generation, applied_index = 1, 5

    def flip(self, generation: int, index: int, term: int) -> None:
        state_store._META.pack(1, generation, index, term)


class _Store:
    """As much of a StateStore as an Installer uses."""

    def __init__(self) -> None:
        self.installers: dict[int, Installer] = {}
        self.rows = _Rows()
        self.written = 0

    def group(self, group_id: int) -> _Rows:
        return self.rows

    def drop(self, group_id: int, generation: int) -> None:
        pass

    def write(self, batch: Any) -> None:
        self.written += len(batch)


def _snapshot(data: bytes) -> None:
    """Chunks of a snapshot. With a first byte that is odd, their checksums and numbers are put right."""
    store = _Store()
    installer = Installer(store, 1)  # type: ignore[arg-type]
    checksum = 0
    for number, part in enumerate(split(data[1:])):
        chunk = part
        if data[0] & 1:
            chunk, checksum = snapshot.seal(part[:1], number, checksum, part[1:])
        installer.feed(chunk)
    if not data or not data[0] & 2:
        expect(installer.rewind().number <= len(data), installer)
        return
    index, _ = installer.finish()
    expect(index > 5, installer)


def _chunks(*rows: tuple[bytes, bytes], cut: int = 1 << 20) -> list[tuple[bytes, bytes]]:
    """(kind, body) of the chunks of a snapshot."""
    body = b"".join(len(k).to_bytes(4, "little") + len(v).to_bytes(4, "little") + k + v for k, v in rows)
    parts = [body[at:at + cut] for at in range(0, len(body), cut)]
    return [(b"H", snapshot.HEADER.pack(snapshot.FORMAT, 1, 9, 3)), *((b"P", part) for part in parts[:-1]), (b"R", parts[-1]),
            (b"T", len(rows).to_bytes(8, "little"))]


def _snapshot_samples() -> tuple[bytes, ...]:
    """As an Exporter frames them, and without checksums."""
    rows = ((b"a", b"1"), (b"b", b""), (b"long" * 10, b"value" * 20))
    made = []
    for cut in (1 << 20, 40):
        chunks = _chunks(*rows, cut=cut)
        exporter = Exporter(mock.Mock(), b"R" + bytes(8), 1, 9, 3, mock.Mock())
        for kind, body in chunks:
            exporter._add(kind, body)
        made.append(b"\2" + join(exporter._ready))
        made.append(b"\3" + join(kind + body for kind, body in chunks))
    return tuple(made)


# -- the state store --------------------------------------------------------------------------------------------------


class _Iterator:
    def __init__(self, rows: dict[bytes, bytes]) -> None:
        self._rows = rows
        self._keys = sorted(rows)
        self._at = 0

    def seek(self, key: bytes) -> None:
        self._at = next((i for i, k in enumerate(self._keys) if k >= key), len(self._keys))

    def valid(self) -> bool:
        return self._at < len(self._keys)

    def key(self) -> bytes:
        return self._keys[self._at]

    def value(self) -> bytes:
        return self._rows[self._keys[self._at]]

    def next(self) -> None:
        self._at += 1

    def status(self) -> None:
        pass


class _Read:
    """As much of ReadOptions."""

    end = b""

    def set_iterate_upper_bound(self, end: bytes) -> None:
        self.end = end


class _Database:
    """As much of a database as a StateStore uses to open."""

    rows: ClassVar[dict[bytes, bytes]] = {}

    def __init__(self, path: str, options: Any) -> None:
        pass

    def get(self, key: bytes) -> bytes | None:
        return self.rows.get(key)

    def iter(self, read: _Read) -> _Iterator:
        return _Iterator({key: value for key, value in self.rows.items() if key < read.end})

    def write(self, batch: Any) -> None:
        pass

    def property_int_value(self, name: str) -> int:
        return 0

    def flush_wal(self, sync: bool) -> None:
        pass

    def close(self) -> None:
        pass


def _adopt(applied: tuple[int, int], configuration: tuple[int, bytes] | None) -> None:
    """What a log is made of that begins with a snapshot."""
    if applied > (LAST, 0):
        group = _replica(dict(_log()), 2)
        adopt_snapshot(group.journal, *applied, configuration)
        group.journal.store.write()
        _replica(group.journal.store.disk.rows, applied[0])  # type: ignore[attr-defined]


@contextmanager
def _store() -> Iterator[Decode]:
    with TemporaryDirectory() as name, mock.patch.object(state_store, "Rdict", _Database), \
            mock.patch.object(state_store, "_options", lambda size: None), mock.patch.object(state_store, "ReadOptions", _Read):
        path = Path(name)

        def decode(data: bytes) -> None:
            """The rows of a store beside those of its groups: opened, and groups made of them."""
            _Database.rows = dict(pairs(data))
            store = StateStore(path)
            for group_id in (0, 1, 2):
                rows = store.group(group_id)
                rows.commit(rows.applied_index, rows.applied_term, [(b"k", b"v")], [], [])
                configuration = store.configuration(group_id)
                if not group_id:
                    _adopt(store.applied(group_id), configuration)
                Installer(store, group_id).abort()
                rows.flip(rows.generation + 1, rows.applied_index, rows.applied_term)

        yield decode


def _store_samples() -> tuple[bytes, ...]:
    meta = state_store._META.pack(1, 2, 77, 3)
    members = state_store._INDEX.pack(70) + Configuration(("n1", "n2"), ("n3",)).encode()
    rows = {b"F": b"\1", b"R\0\0\0\0\0\0\0\2" + state_store.CONFIGURATION_KEY: members,
            b"M\0\0\0\0": meta, b"M\0\0\0\1": meta, b"R\0\0\0\0\0\0\0\2k": b"v", b"R\0\0\0\1\0\0\0\3k": b"v"}
    return (join(part for row in rows.items() for part in row), join((b"F", b"\1")), b"")


# -- connections ------------------------------------------------------------------------------------------------------


def _hello(data: bytes) -> None:
    hellos: dict[str, Hello] = {}
    transport = GrpcTransport(Hello, "c", "n1", {"n2": "127.0.0.1:1", "n3": "127.0.0.1:2"}, None)
    transport._handlers = Handlers(lambda peer, epoch, hello: hellos.update({peer: hello}), lambda *frame: None, lambda *gone: None)
    transport._open("", Hello.FromString(data))
    decide("n1", "abc", ["n1", "n2", "n3"], hellos)


_HELLO = Hello(protocol=1, cluster="c", node_id="n2", incarnation="def", formed=True, founders={"n1": "abc", "n2": "def"})


def decoders() -> list[Decoder]:
    """All of them."""
    raft = "spillway.cluster.raft."
    frames = (_frame(*MESSAGES), *(_frame(message) for message in MESSAGES))
    return [
        Decoder("raft-frame", plain(_decode_frame), (WireInvalid,), frames, (raft + "wire", raft + "claims")),
        Decoder("raft-replica", plain(_deliver), (WireInvalid, LogViolation), _replica_samples(),
                (raft + "wire", raft + "group", raft + "guard", raft + "journal", raft + "engine")),
        Decoder("journal", plain(_journal), (StoreRefused,), _journal_samples(), (raft + "journal", raft + "group")),
        Decoder("configuration", plain(_configuration), (ValueError,), (
            Configuration(("n1", "n2"), ("n3",)).encode(), Configuration(("n1",)).encode(), Configuration().encode()),
                (raft + "configuration",)),
        Decoder("sync-mark", _mark, (), (_MARK.pack(7, zlib.crc32((7).to_bytes(8, "little"))),), (raft + "journal",)),
        Decoder("snapshot", plain(_snapshot), (SnapshotInvalid,), _snapshot_samples(),
                ("spillway.cluster.snapshots", "spillway.contract.snapshot")),
        Decoder("state-store", _store, (StoreRefused,), _store_samples(), ("spillway.cluster.state_store",)),
        # What gRPC cannot parse it refuses by itself.
        Decoder("hello", plain(_hello), (PeerRefused, DecodeError), (_HELLO.SerializeToString(),), ("spillway.cluster.transport.grpc",)),
    ]
