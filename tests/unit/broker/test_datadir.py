"""The data directory: a node uses its own and no other, and says what to do about one that it refuses."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from spillway.broker.config import NodeConfig
from spillway.broker.core.features import LEVEL_MAX, LEVEL_MIN
from spillway.broker.datadir import FILE, claim, raise_format
from spillway.broker.errors import DataDirError


def config(path: Path, **fields: Any) -> NodeConfig:
    """Settings with a directory."""
    return NodeConfig(data_dir=str(path), **fields)


def refused(node: NodeConfig) -> str:
    """What the refusal says."""
    with pytest.raises(DataDirError) as caught:
        claim(node)
    return str(caught.value)


def test_a_new_directory_is_made_with_its_parents_and_claimed_again(tmp_path: Path) -> None:
    """A directory that does not exist is created, and the same node gets it at every later start."""
    path = tmp_path / "a" / "b"
    assert claim(config(path)) == path
    written = (path / FILE).read_bytes()
    (path / "log").mkdir()
    assert claim(config(path)) == path
    assert (path / FILE).read_bytes() == written
    assert json.loads(written)["format"] == LEVEL_MIN


def test_an_empty_directory_is_claimed(tmp_path: Path) -> None:
    """A volume that somebody mounted is as good as a directory of one's own making."""
    assert claim(config(tmp_path)) == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_first_start_that_was_cut_short_is_repeated(tmp_path: Path) -> None:
    """A crash between writing the claim and naming it leaves a half-written file: the next start goes on."""
    (tmp_path / FILE).with_suffix(".tmp").write_text('{"format"')
    claim(config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_somebody_elses_files_are_left_alone(tmp_path: Path) -> None:
    """A directory with other files is refused and not touched."""
    (tmp_path / "thesis.txt").write_text("x")
    assert refused(config(tmp_path)) == f"data_dir {tmp_path} is not empty and not a Spillway directory; name an empty one"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("other", "says"), [
    ({"node_id": "n9"}, "belongs to node_id 'n1', not 'n9'; start that node here, or name another directory"),
    ({"cluster": "c9"}, "belongs to cluster 'spillway', not 'c9'; a directory never changes clusters; name another one"),
    ({"shards": 9}, "belongs to shards 16, not 9; it is fixed when a cluster is created; set it back"),
    ({"replicas": 5}, "belongs to replicas 3, not 5; it is fixed when a cluster is created; set it back"),
])
def test_what_is_fixed_for_ever_cannot_be_changed(other: dict[str, Any], says: str, tmp_path: Path) -> None:
    """Each of the four settings is compared; the error names both values and the remedy, and nothing is written."""
    claim(config(tmp_path))
    before = (tmp_path / FILE).read_bytes()
    assert refused(config(tmp_path, **other)) == f"data_dir {tmp_path} {says}"
    assert (tmp_path / FILE).read_bytes() == before


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    """A directory of a later version is refused before anything in it is read."""
    (tmp_path / FILE).write_text(json.dumps({"format": LEVEL_MAX + 1}))
    assert f"has format {LEVEL_MAX + 1}, written by a newer Spillway" in refused(config(tmp_path))


def test_the_format_is_the_feature_level(tmp_path: Path) -> None:
    """What is written at a level is for versions that know it: all others say so before they look at anything. It never goes down."""
    claim(config(tmp_path))
    before = json.loads((tmp_path / FILE).read_text())
    raise_format(tmp_path, 2)
    raise_format(tmp_path, 1)
    assert json.loads((tmp_path / FILE).read_text()) == {**before, "format": 2}
    assert claim(config(tmp_path)) == tmp_path
    assert refused(config(tmp_path, feature_level_max=1)) == (
        f"data_dir {tmp_path}: the cluster is at feature level 2; this version knows up to 1, or its setting feature_level_max is lower: "
        "run version 0.2.0 or newer, without a lower feature_level_max")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": "1"}', b'{"format": null}', b"\xff\xfe"])
def test_a_damaged_claim_is_not_overwritten(content: bytes, tmp_path: Path) -> None:
    """Whatever stands there instead of a claim is refused, with the remedy, and kept for whoever looks."""
    (tmp_path / FILE).write_bytes(content)
    assert refused(config(tmp_path)) == (
        f"{tmp_path / FILE} is damaged; restore it from a backup, or replace this node by an empty one")
    assert (tmp_path / FILE).read_bytes() == content


@pytest.mark.parametrize("below", ["", "/data"])
def test_a_path_that_is_no_directory_is_refused(below: str, tmp_path: Path) -> None:
    """What the operating system says about the path reaches the operator, not a traceback."""
    file = tmp_path / "file"
    file.write_text("x")
    said = refused(config(Path(f"{file}{below}")))
    assert said.startswith(f"data_dir {file}{below} cannot be used: ")
