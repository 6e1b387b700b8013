"""The previous release beside the current one: its source, out of this repository's history, and processes that run it."""
from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

from tests.integration.cluster_process import NodeProcess

# The release that nodes of this version must be able to stand beside; set it anew with each release. 0.1.0: the last one before
# nodes could join and leave.
COMMIT = "8d6b66683c0d235888b597b249349ec47728ae8f"
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("protos", "client", "broker", "cluster")


class Release:
    """A release whose source is in a directory."""

    def __init__(self, directory: Path) -> None:
        """Writes it there. Raises LookupError if the history does not have it."""
        if subprocess.run(["git", "cat-file", "-e", COMMIT + "^{commit}"], cwd=ROOT, capture_output=True).returncode:
            raise LookupError(f"the history here has no {COMMIT}: get all of it (git fetch --unshallow) to test upgrades")
        archive = subprocess.run(["git", "archive", COMMIT, *FOLDERS, "pyproject.toml"], cwd=ROOT, capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(directory, filter="data")
        self.version = tomllib.loads((directory / "pyproject.toml").read_text())["project"]["version"]
        # It asks the environment for its version, which would be that of the current tree.
        told = directory / f"spillway-{self.version}.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: spillway\nVersion: {self.version}\n")
        self.env = {"PYTHONPATH": os.pathsep.join(str(directory / folder) for folder in (".", *FOLDERS))}
        """For processes: ahead of the paths of the environment, which lead to the current tree."""
        code = "import spillway.broker.app as a, spillway.client as c; print(a.__file__, c.__file__)"
        where = subprocess.run([sys.executable, "-c", code], env={**os.environ, **self.env}, capture_output=True, text=True,
                               check=True).stdout.split()
        assert len(where) == 2 and all(Path(path).is_relative_to(directory) for path in where), where

    def run(self, node: NodeProcess) -> None:
        """The node is of this release from its next start on."""
        node.env = self.env
