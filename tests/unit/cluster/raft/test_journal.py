"""The journal: what it refuses, what it keeps, what it reads back."""
from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from spillway.cluster.errors import StorageFailed, StoreRefused
from spillway.cluster.raft import journal as journal_module
from spillway.cluster.raft.configuration import Configuration
from spillway.cluster.raft.journal import GroupJournal, JournalStore, LogEntry, LogViolation, RocksDisk

from tests.simulation.raft.disk import SimDisk

FOUNDED = Configuration.of(["a", "b", "c"])


def _filled(store: JournalStore, last: int = 10, term: int = 1) -> GroupJournal:
    journal = store.journal(3)
    for index in range(1, last + 1):
        journal.add(b"\0%d" % index, index, term)
    journal.setCurrentTerm(term, None)
    _turn(store)
    return journal


def _turn(store: JournalStore) -> None:
    store.write()
    store.sync()
    store.synced()


@pytest.fixture
def store() -> JournalStore:
    return JournalStore(SimDisk(), "c", "n")


def test_a_gap_or_a_lower_term_is_refused(store: JournalStore) -> None:
    """R4: entries follow each other, and terms only grow."""
    journal = _filled(store, term=2)
    for index, term in ((12, 2), (10, 2), (11, 1)):
        with pytest.raises(LogViolation):
            journal.add(b"\0", index, term)
    journal.add(b"\0", 11, 3)


@pytest.mark.parametrize(("commit", "applied", "cut"), [(5, 0, 5), (5, 0, 4), (0, 5, 5), (5, 3, 5)])
def test_committed_or_applied_entries_are_never_cut(store: JournalStore, commit: int, applied: int, cut: int) -> None:
    """R10: the journal is the last line of defence."""
    journal = _filled(store)
    journal.commit, journal.applied = commit, applied
    with pytest.raises(LogViolation):
        journal.deleteEntriesFrom(cut - journal.first)
    assert journal.last == 10


def test_a_conflicting_tail_is_cut_and_written_anew(store: JournalStore) -> None:
    """Uncommitted entries go, also from the disk; what follows takes their place."""
    journal = _filled(store)
    journal.commit = 4
    journal.deleteEntriesFrom(5 - journal.first)
    journal.add(b"\0new", 5, 7)
    assert journal.synced == 4
    _turn(store)
    again = JournalStore(store.disk, "c", "n").journal(3)
    assert again.last == 5
    assert again[-1] == (b"\0new", 5, 7)
    assert [again.term_at(i) for i in (4, 5, 6)] == [1, 7, None]


def test_term_and_vote_only_go_forward(store: JournalStore) -> None:
    """A lower term, or a second vote in a term, is refused; both survive."""
    journal = _filled(store)
    journal.setCurrentTerm(4, None)
    journal.setCurrentTerm(4, "a")
    for term, vote in ((3, None), (4, "b"), (4, None)):
        with pytest.raises(LogViolation):
            journal.setCurrentTerm(term, vote)
    _turn(store)
    again = JournalStore(store.disk, "c", "n").journal(3)
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (4, "a")


def test_a_lower_commit_index_is_refused(store: JournalStore) -> None:
    """What is committed stays so."""
    journal = _filled(store)
    journal.setRaftCommitIndex(6)
    with pytest.raises(LogViolation):
        journal.setRaftCommitIndex(5)


def test_the_librarys_own_compaction_and_clearing_are_refused(store: JournalStore) -> None:
    """R5, R16."""
    journal = _filled(store)
    for call in (lambda: journal.deleteEntriesTo(2), journal.clear):
        with pytest.raises(LogViolation):
            call()


def test_compaction_keeps_what_is_needed(store: JournalStore) -> None:
    """R5: nothing above what is applied, the entry at the state's index, two entries, and the bytes for slow followers."""
    journal = _filled(store)
    journal.commit, journal.applied = 8, 6
    assert journal.compact(upto=9, keep_bytes=1 << 20) == 0
    assert journal.compact(upto=9, keep_bytes=0) == 5
    assert (journal.first, journal.last) == (6, 10)
    assert journal[0] == (b"\x006", 6, 1)
    journal.commit = journal.applied = 10
    journal.compact(upto=10, keep_bytes=0)
    assert len(journal) == 2
    _turn(store)
    again = JournalStore(store.disk, "c", "n").journal(3)
    assert [e[1] for e in again[:]] == [9, 10]


def test_old_entries_leave_memory_and_are_read_back(store: JournalStore) -> None:
    """The tail in memory is bounded; what a slow follower needs comes from the disk."""
    journal = store.journal(3, tail_bytes_max=400)
    for index in range(1, 41):
        journal.add(b"\0%d" % index, index, 1 + index // 20)
    journal.commit = journal.applied = 30
    _turn(store)
    assert journal.tail_bytes <= 1000
    assert len(journal._tail) < 40
    assert [e[1] for e in journal[:]] == list(range(1, 41))
    assert journal[0][1] == 1
    assert [e[1] for e in journal.entries(5, 8)] == [5, 6, 7]
    assert [e[1] for e in journal.entries_up_to(1, 41, 200)] == [1, 2, 3]
    assert [e[1] for e in journal.entries_up_to(39, 41, 1)] == [39]
    assert journal.term_start(25) == 20
    journal.compact(upto=30, keep_bytes=0)
    assert journal[0][1] == 30


def test_a_long_log_is_not_read_into_memory(store: JournalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a start, either: what the state has durably leaves memory while the rest is still being read. The rest stays, as it may be
    cut."""
    journal = store.journal(3)
    journal.setCurrentTerm(1, "n1")
    for index in range(1, 41):
        journal.add(b"\0%d" % index, index, 1)
    _turn(store)
    sizes: list[int] = []
    append = GroupJournal._append

    def watched(self: GroupJournal, entry: LogEntry) -> None:
        append(self, entry)
        sizes.append(self.tail_bytes)

    monkeypatch.setattr(GroupJournal, "_append", watched)
    again = JournalStore(store.disk, "c", "n")
    read = again.journal(3, 400, 30)
    assert len(read._tail) < 16 and max(sizes[:30]) < 500
    assert (read.first, read.last, read.synced) == (1, 40, 40)
    assert [e[1] for e in read[:]] == list(range(1, 41))
    assert len(again.journal(3, 400, 0)._tail) == 40


def test_the_whole_tail_may_be_cut(store: JournalStore) -> None:
    """All that is in memory is of a leader that was deposed: the last entry is then one that had left memory, or had been about to."""
    journal = store.journal(3, tail_bytes_max=400)
    for index in range(1, 41):
        journal.add(b"\0%d" % index, index, 1)
    journal.commit = journal.applied = 30
    _turn(store)
    journal.deleteEntriesFrom(30)
    assert journal.last == 30 and journal[-1][1] == 30


def test_unapplied_entries_stay_in_memory(store: JournalStore) -> None:
    """Only what is applied and synced may go: the rest may still be cut."""
    journal = store.journal(3, tail_bytes_max=0)
    for index in range(1, 11):
        journal.add(b"\0", index, 1)
    _turn(store)
    assert len(journal._tail) == 10


def test_a_snapshot_starts_the_log_anew(store: JournalStore) -> None:
    """R16: one entry stands for everything before it."""
    journal = _filled(store)
    journal.commit = journal.applied = 4
    with pytest.raises(LogViolation):
        journal.restart(4, 1, None)
    journal.found(FOUNDED)
    journal.restart(50, 3, None)
    _turn(store)
    again = JournalStore(store.disk, "c", "n").journal(3)
    assert (again.first, again.last, again.term_at(50)) == (50, 50, 3)


def test_a_crash_loses_only_what_was_not_synced(store: JournalStore) -> None:
    """The log after a crash is a prefix that holds everything synced."""
    journal = _filled(store)
    assert isinstance(store.disk, SimDisk)
    for index in range(11, 20):
        journal.add(b"\0", index, 1)
        store.write()
    store.disk.crash(random.Random(3))
    assert 10 <= JournalStore(store.disk, "c", "n").journal(3).last < 20


def test_a_hole_in_the_log_is_refused(store: JournalStore) -> None:
    """R18: a log that lacks entries must not take part."""
    journal = _filled(store)
    assert isinstance(store.disk, SimDisk)
    del store.disk.rows[journal._key(5)]
    with pytest.raises(StoreRefused, match="lacks the entries 5 to 5; replace this node"):
        JournalStore(store.disk, "c", "n").journal(3)


def test_a_lost_vote_row_is_refused(store: JournalStore) -> None:
    """R18: so is a log without its term and vote."""
    _filled(store)
    assert isinstance(store.disk, SimDisk)
    del store.disk.rows[b"\0\0\0\3H"]
    with pytest.raises(StoreRefused, match="term and vote"):
        JournalStore(store.disk, "c", "n").journal(3)


@pytest.mark.parametrize(("cluster", "node", "text"), [("c", "m", "belongs to node 'n'"), ("d", "n", "of cluster 'c'")])
def test_another_nodes_store_is_refused(tmp_path: Path, cluster: str, node: str, text: str) -> None:
    """The store says whose it is, and the error what to do."""
    JournalStore(tmp_path / "log", "c", "n").close()
    with pytest.raises(StoreRefused, match=f"{text}.*name another directory"):
        JournalStore(tmp_path / "log", cluster, node)
    JournalStore(tmp_path / "log", "c", "n").close()


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old version does not guess."""
    monkeypatch.setattr(journal_module, "FORMAT", 9)
    JournalStore(tmp_path / "log", "c", "n").close()
    monkeypatch.undo()
    with pytest.raises(StoreRefused, match=r"format 9, written by a newer Spillway.*start the newer version"):
        JournalStore(tmp_path / "log", "c", "n")


def test_a_store_in_use_is_refused(tmp_path: Path) -> None:
    """Two processes never share a store."""
    store = JournalStore(tmp_path / "log", "c", "n")
    with pytest.raises(StoreRefused, match="in use by another process"):
        JournalStore(tmp_path / "log", "c", "n")
    store.close()


def test_a_flipped_bit_in_the_write_ahead_log_is_refused(tmp_path: Path) -> None:
    """R18: RocksDB's default would forget synced entries silently."""
    store = JournalStore(tmp_path / "log", "c", "n")
    journal = store.journal(3)
    journal.setCurrentTerm(1, None)
    for index in range(1, 60):
        journal.add(b"\0" + b"x" * 500, index, 1)
        _turn(store)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (tmp_path / "log").iterdir():
        if file.is_file() and file.name != "LOCK":
            (copy / file.name).write_bytes(file.read_bytes())
    store.close()
    wal = max(copy.glob("*.log"), key=lambda f: f.stat().st_size)
    raw = bytearray(wal.read_bytes())
    raw[len(raw) // 2] ^= 1
    wal.write_bytes(raw)
    with pytest.raises(StoreRefused, match="replace this node by an empty one"):
        JournalStore(copy, "c", "n")


def _files(path: Path, pattern: str) -> list[Path]:
    """The store's files of a kind, the largest first."""
    return sorted(path.glob(pattern), key=lambda f: f.stat().st_size, reverse=True)


def _crashed(store: JournalStore, directory: Path) -> Path:
    """What a crash leaves of the store `directory / "log"`: a copy, as closing would write the rest out."""
    out = directory / "crashed"
    shutil.copytree(directory / "log", out / "log", ignore=shutil.ignore_patterns("LOCK"))
    shutil.copy(directory / "log.synced", out)
    store.close()
    return out / "log"


def _synced(directory: Path, entries: int) -> tuple[JournalStore, GroupJournal]:
    """A store with so many entries."""
    store = JournalStore(directory / "log", "c", "n")
    journal = store.journal(3)
    journal.setCurrentTerm(1, None)
    for index in range(1, entries + 1):
        journal.add(b"\0" + random.Random(index).randbytes(500), index, 1)
        _turn(store)
    return store, journal


@pytest.mark.parametrize("cut", ["last byte", "half", "everything", "the file"])
def test_a_log_that_lost_synced_entries_at_its_end_is_refused(tmp_path: Path, cut: str) -> None:
    """A write-ahead log that ends early looks like one whose last write a crash tore. What was synced was acknowledged: it is
    known how far that was, so that it is not forgotten silently."""
    store, _ = _synced(tmp_path, 59)
    crashed = _crashed(store, tmp_path)
    wal = _files(crashed, "*.log")[0]
    if cut == "the file":
        wal.unlink()
    else:
        size = wal.stat().st_size
        with wal.open("r+b") as file:
            file.truncate({"last byte": size - 1, "half": size // 2, "everything": 0}[cut])
    with pytest.raises(StoreRefused, match=r"were synced.*replace this node by an empty one"):
        JournalStore(crashed, "c", "n")


def test_a_torn_write_that_was_never_synced_is_accepted(tmp_path: Path) -> None:
    """Nothing was acknowledged because of it: a crash may take it. The same store goes on, and is not refused later."""
    store, journal = _synced(tmp_path, 9)
    journal.add(b"\0" + b"x" * 500, 10, 1)
    store.write()
    crashed = _crashed(store, tmp_path)
    wal = _files(crashed, "*.log")[0]
    with wal.open("r+b") as file:
        file.truncate(wal.stat().st_size - 1)
    for last in (9, 10, 11):
        again = JournalStore(crashed, "c", "n")
        journal = again.journal(3)
        assert journal.last == last
        journal.add(b"\0" + b"x" * 500, last + 1, 1)
        _turn(again)
        again.close()


@pytest.mark.parametrize("mark", [b"", b"\xff" * 12, b"\xff" * 3, None], ids=["empty", "damaged", "short", "missing"])
def test_a_mark_that_cannot_be_read_counts_for_nothing(tmp_path: Path, mark: bytes | None) -> None:
    """The log itself is sound; the next sync makes the mark anew."""
    store, _ = _synced(tmp_path, 9)
    crashed = _crashed(store, tmp_path)
    file = crashed.with_name("log.synced")
    written = file.read_bytes()
    file.unlink()
    if mark is not None:
        file.write_bytes(mark)
    again = JournalStore(crashed, "c", "n")
    assert again.journal(3).last == 9
    again.journal(4).setCurrentTerm(1, None)
    _turn(again)
    again.close()
    assert len(file.read_bytes()) == len(written) and file.read_bytes() != mark


def test_a_damaged_table_is_no_shorter_log(tmp_path: Path) -> None:
    """A scan that meets damage does not end as if there were nothing more."""
    store, _ = _synced(tmp_path, 199)
    store.rest()
    store.close()
    table = _files(tmp_path / "log", "*.sst")[0]
    raw = bytearray(table.read_bytes())
    raw[len(raw) // 2] ^= 1
    table.write_bytes(raw)
    again = JournalStore(tmp_path / "log", "c", "n")
    with pytest.raises(StoreRefused, match=r"cannot be read.*replace this node by an empty one"):
        again.journal(3)
    again.close()


def test_both_disks_behave_alike(tmp_path: Path) -> None:
    """The simulated disk and RocksDB hold the same rows after the same batches."""
    disks = [SimDisk(), RocksDisk(tmp_path / "db")]
    rnd = random.Random(1)
    for _ in range(200):
        batches = [disk.batch() for disk in disks]
        for _ in range(rnd.randrange(1, 5)):
            key, kind = b"%03d" % rnd.randrange(60), rnd.randrange(4)
            for batch in batches:
                if kind < 2:
                    batch.put(key, b"v%d" % kind)
                elif kind == 2:
                    batch.delete(key)
                else:
                    batch.delete_range(key, b"%03d" % (int(key) + 5))
        for disk, batch in zip(disks, batches, strict=True):
            disk.write(batch)
    found = [list(disk.scan(b"", b"\xff")) for disk in disks]
    assert found[0] == found[1]
    for disk in disks:
        disk.sync()
        assert disk.get(b"zzz") is None
        disk.close()


def test_the_node_row_survives(tmp_path: Path) -> None:
    """Incarnation and standing are what they were."""
    store = JournalStore(tmp_path / "log", "c", "n")
    incarnation = store.node.incarnation
    store.change_node(formed=True, founders={"n": incarnation})
    store.close()
    again = JournalStore(tmp_path / "log", "c", "n")
    assert (again.node.incarnation, again.node.formed, again.node.founders) == (incarnation, True, {"n": incarnation})
    again.close()


def test_a_failing_disk_is_reported(store: JournalStore) -> None:
    """Errors of the disk have one type, which is fatal."""
    _filled(store)
    assert isinstance(store.disk, SimDisk)
    store.disk.fails = True
    with pytest.raises(StorageFailed):
        store.sync()


# -- who the members are -----------------------------------------------------------------------------------------


def _with_members(store: JournalStore) -> tuple[GroupJournal, Configuration]:
    """Entries 1 to 20; of these 5 and 15 change the members."""
    journal = store.journal(3)
    journal.found(FOUNDED)
    four = Configuration(("a", "b", "c", "d"))
    for index in range(1, 21):
        configuration = {5: four, 15: FOUNDED}.get(index)
        journal.add(b"\0x" if configuration is None else b"\2" + configuration.encode(), index, 1)
    journal.setCurrentTerm(1, None)
    _turn(store)
    return journal, four


def _members(journal: GroupJournal) -> tuple[int, Configuration]:
    return journal.configuration_index, journal.configuration


def test_the_last_configuration_in_the_log_counts(store: JournalStore) -> None:
    """R17: also after a restart, and what is cut off does not."""
    journal, four = _with_members(store)
    assert _members(journal) == _members(JournalStore(store.disk, "c", "n").journal(3)) == (15, FOUNDED)
    journal.deleteEntriesFrom(15 - journal.first)
    assert _members(journal) == (5, four)
    journal.deleteEntriesFrom(5 - journal.first)
    assert _members(journal) == (0, FOUNDED)
    _turn(store)
    again = JournalStore(store.disk, "c", "n").journal(3)
    again.found(four)
    assert _members(again) == (0, FOUNDED), "what the disk says counts"


@pytest.mark.parametrize("first", [4, 5, 6, 15, 18])
def test_compaction_keeps_the_configuration(store: JournalStore, first: int) -> None:
    """R17: the entry may go, what it says stays, and a cut behind it brings it back."""
    journal, four = _with_members(store)
    journal.commit = journal.applied = first
    journal.compact(first, 0)
    assert journal.first == first
    _turn(store)
    for known in (journal, JournalStore(store.disk, "c", "n").journal(3)):
        assert _members(known) == (15, FOUNDED)
        if 5 <= first < 15:
            known.deleteEntriesFrom(15 - first)
            assert _members(known) == (5, four)


def test_a_snapshot_brings_its_configuration(store: JournalStore) -> None:
    """R17: or none, if there was never any but the first."""
    journal, four = _with_members(store)
    journal.restart(50, 1, (40, four))
    assert _members(journal) == (40, four)
    _turn(store)
    assert _members(JournalStore(store.disk, "c", "n").journal(3)) == (40, four)


def test_a_dropped_replica_leaves_its_vote(store: JournalStore) -> None:
    """R17: the node may be a member again, and must not vote twice in a term."""
    journal, _ = _with_members(store)
    journal.setCurrentTerm(7, "b")
    journal.admit("i")
    journal.begin_install(3)
    _turn(store)
    store.journal(4).setCurrentTerm(2, "x")
    store.drop(3)
    _turn(store)
    again = JournalStore(store.disk, "c", "n")
    fresh = again.journal(3)
    assert (fresh.last, fresh.getCurrentTerm(), fresh.getVotedForNodeId()) == (0, 7, "b")
    assert (fresh.admitted, fresh.install_above, fresh._configurations) == (None, None, [])
    assert again.journal(4).getVotedForNodeId() == "x"
    assert not again.has_replica(3) and again.node.dropped == [3]


def test_a_store_without_configurations_is_raised(store: JournalStore) -> None:
    """Format 1 is read, with the replicas that the node was founded with."""
    store.change_node(format=1, formed=True)
    assert JournalStore(store.disk, "c", "n").founding
    store.change_node(format=journal_module.FORMAT)
    assert not JournalStore(store.disk, "c", "n").founding


def test_a_node_knows_its_replicas(store: JournalStore) -> None:
    """Also those whose log is empty."""
    store.journal(3).found(FOUNDED)
    store.journal(4)
    _turn(store)
    assert store.has_replica(3) and not store.has_replica(4)


def test_a_damaged_configuration_is_refused(store: JournalStore) -> None:
    """With what to do about it."""
    _with_members(store)
    store.put((3).to_bytes(4, "big") + b"C", bytes(8) + b"\x92\x91")
    _turn(store)
    with pytest.raises(StoreRefused, match="damaged"):
        JournalStore(store.disk, "c", "n").journal(3)
