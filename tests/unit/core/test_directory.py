"""The directory of destinations: who may create, who may replace, what is refused."""
from __future__ import annotations

from unittest import mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.broker.core import directory as d
from spillway.broker.core.errors import CorruptEntry
from spillway.broker.core.policy import Nack, Policy


def put(name: str, create: bool = True, replace: bool = True, etag: int = 0, **policy: int) -> d.Put:
    """A request."""
    return d.Put(d.VERSION, "node", 7, d.destination(name, Policy(**policy)), create, replace, etag)


def apply(directory: d.Directory, index: int, *puts: d.Put) -> list[int]:
    """Outcomes of a command, through the codec."""
    changes, _ = directory.apply(index, d.encode_command(list(puts)))
    assert all((change.origin, change.number) == ("node", 7) for change in changes)
    return [change.outcome for change in changes]


@pytest.mark.parametrize(("exists", "create", "replace", "etag", "outcome"), [
    (False, True, True, 0, d.OK), (False, True, False, 0, d.OK), (False, False, True, 0, d.MISSING),
    (False, True, True, 5, d.ETAG), (False, False, True, 5, d.MISSING),
    (True, True, True, 0, d.OK), (True, True, False, 0, d.EXISTS), (True, False, True, 0, d.OK),
    (True, True, True, 5, d.OK), (True, False, True, 5, d.OK), (True, True, True, 4, d.ETAG),
    (True, True, False, 5, d.EXISTS)])
def test_who_may_change_a_destination(exists: bool, create: bool, replace: bool, etag: int, outcome: int) -> None:
    """Creating needs permission to create, replacing to replace, and an etag must be that of the last change."""
    directory = d.Directory()
    if exists:
        apply(directory, 5, put("a"))
    assert apply(directory, 9, put("a", create, replace, etag, lease_ms=77)) == [outcome]
    found = directory.destinations.get("a")
    assert (found is not None) == (exists or outcome == d.OK)
    if found is not None:
        assert (found.revision, found.lease_ms) == ((9, 77) if outcome == d.OK else (5, Policy().lease_ms))


def test_a_change_tells_what_is_now() -> None:
    """The answer carries the destination as it is after the change, or as it hindered the change."""
    directory = d.Directory()
    (made,), rows = directory.apply(3, d.encode_command([put("a", lease_ms=9)]))
    assert made.destination == directory.destinations["a"]
    (refused,), none = directory.apply(4, d.encode_command([put("a", replace=False)]))
    assert refused.destination == made.destination and none == []
    (missing,), _ = directory.apply(5, d.encode_command([put("b", create=False)]))
    assert missing.destination is None
    again = d.Directory()
    again.load(iter(rows))
    assert again.destinations == directory.destinations


def test_the_directory_is_full_at_its_limit() -> None:
    """DESTINATIONS_MAX destinations fit, one more does not, and those that are there can still be changed."""
    directory = d.Directory()
    with mock.patch.object(d, "DESTINATIONS_MAX", 2):
        assert apply(directory, 1, put("a"), put("b"), put("c")) == [d.OK, d.OK, d.FULL]
        assert apply(directory, 2, put("a"), put("c")) == [d.OK, d.FULL]


def test_a_policy_survives_the_store() -> None:
    """A stored destination gives back the policy that it was made from."""
    policy = Policy(1, 2, 3, 4, Nack.BLOCK_UNTIL, 5, 6)
    assert d.destination("a", policy).policy() == policy


@given(garbage=st.binary(max_size=100))
def test_garbage_is_no_command(garbage: bytes) -> None:
    """Random bytes are a command by accident only, and raise nothing but CorruptEntry."""
    for use in (lambda: d.Directory().apply(1, garbage), lambda: d.Directory().load(iter([(b"", garbage)]))):
        try:
            use()
        except CorruptEntry:
            pass


def test_other_versions_are_refused_whole() -> None:
    """A command or row of a version that this software does not know changes nothing, nor does a field too many."""
    directory = d.Directory()
    newer = msgspec.structs.replace(put("b"), version=d.VERSION + 1)
    inner = put("c")
    inner.destination = msgspec.structs.replace(inner.destination, version=d.VERSION + 1)
    for other in (newer, inner):
        with pytest.raises(CorruptEntry, match="version"):
            directory.apply(1, d.encode_command([put("a"), other]))
    with pytest.raises(CorruptEntry, match="version"):
        d.Directory().load(iter([(b"c", msgspec.msgpack.encode(inner.destination))]))
    command = d.encode_command([put("a")])
    assert command[1] == 0x97  # one Put of seven fields
    with pytest.raises(CorruptEntry):
        directory.apply(1, command[:1] + b"\x98" + command[2:] + b"\x91" * 100_000 + b"\x00")
    assert directory.destinations == {}
