"""Every example in the help of a command does what it says, against real nodes: as it stands there. A line that needs a shell gets one;
others are run in this process, which takes a tenth of the time."""
from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from cluster_process import ClusterProcesses
from spillway.client import AlreadyExists, Record, cli, sync

from demo.ports import free_ports
from tests.scripts import load

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "policies.md").read_text()
SECONDS_MAX = 90.0
GOES_ON = re.compile(r"spillway (serve|dev|dispatch)\b|--watch")  # until it is ended
SAYS = {"serve": "serves ", "dev": "serves ", "dispatch": "destinations=", "cluster": "cluster 'spillway'"}  # once it does its work


LEAVES = list(load("cli_page").leaves())
# What parks destinations, or takes nodes away, comes after the others.
GROUPS = sorted(dict.fromkeys(leaf.path[0] for leaf in LEAVES), key=lambda name: ("dispatch", "cluster").index(name) if name in (
    "dispatch", "cluster") else -1)


class World:
    """A cluster, a directory with the files that the examples name, and a home."""

    def __init__(self, directory: Path) -> None:
        # One replica each, so that one of the nodes can go.
        self.cluster = ClusterProcesses(directory, 3, ["--replicas", "1", "--shards", "2"])
        self.cluster.start()
        self.address = self.cluster.addresses[0]
        self.directory = directory / "work"
        self.directory.mkdir()
        for name, text in {"policy.toml": re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0],
                           "events.jsonl": '{"payload": "from a file", "tenant": "acme", "key": "user-1"}\n', "invoice.pdf": "%PDF",
                           "node.toml": 'data_dir = "node-data"\nshards = 2\n'}.items():
            (self.directory / name).write_text(text)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SPILLWAY_", "XDG_"))} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(self.directory), "SPILLWAY_ADDRESS": self.address,
            "SHELL": "/bin/bash", "PYTHONUNBUFFERED": "1"}

    def fill(self, dead_letter: bool = False) -> None:
        """What examples need to be there: destinations, messages of two tenants, and perhaps a dead letter."""
        with sync.Client(self.address) as client:
            for name in ("billing", "crm"):
                try:
                    client.admin.create_destination(name)
                except AlreadyExists:
                    pass
            with client.producer() as producer:
                producer.send_many([Record("billing", b"%d" % number, tenant, "user-1") for number in range(3)
                                    for tenant in ("acme", "beta")])
            if dead_letter:
                with client.consumer("billing", run_messages_max=1) as consumer:
                    message = consumer.next_message(SECONDS_MAX)
                    assert message is not None and message.tenant
                    message.reject("as an example")

    def token_id(self) -> str:
        """Of one of the cluster's tokens."""
        with sync.Client(self.address) as client:
            return next(iter(client.admin.list_tokens())).token_id

    def type(self, line: str) -> None:
        """Runs a line as it stands; it must succeed."""
        line = line.replace("127.0.0.1:7070", self.address)
        if "token revoke" in line:  # an id that the cluster has made, in place of the one in the help
            line = re.sub(r"\b[0-9a-f]{12}\b", self.token_id(), line)
        ports = free_ports(2)
        env = self.env | {"SPILLWAY_LISTEN": f"127.0.0.1:{ports[0]}", "SPILLWAY_PEER_LISTEN": f"127.0.0.1:{ports[1]}"}
        if GOES_ON.search(line):
            return self._start(line, env)
        if line.startswith("spillway ") and not set(line) & set("|<>&;$`\\"):
            return self._run(line, env)
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=self.directory, env=env, capture_output=True, text=True,
                              timeout=SECONDS_MAX, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return None

    def _run(self, line: str, env: dict[str, str]) -> None:
        """Runs a line in this process, as a shell would."""
        out = io.TextIOWrapper(io.BytesIO(), write_through=True)  # `consume` writes bytes
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
            for name in [*os.environ]:
                if name not in env:
                    patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
            patch.chdir(self.directory)
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
            code = cli.main(shlex.split(line)[1:])
        assert code == 0, f"{line}\n{out.buffer.getvalue().decode()}"  # type: ignore[attr-defined]

    def _start(self, line: str, env: dict[str, str]) -> None:
        """Starts a line that goes on, until it works; and ends it."""
        log = self.directory / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=self.directory, env=env, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + SECONDS_MAX
            while SAYS[line.split()[1]] not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, f"{line}\n{log.read_text()}"
                time.sleep(0.05)  # polling another process; nothing is assumed of how long it takes
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS_MAX) in (0, 130), f"{line}\n{log.read_text()}"
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One for all examples."""
    world = World(tmp_path_factory.mktemp("examples"))
    try:
        yield world
    finally:
        world.cluster.end()


@pytest.mark.parametrize("group", GROUPS)
def test_examples_of_help_work(world: World, group: str) -> None:
    """Those of one command, or of a group, one after the other."""
    if group == "destination":
        world.type("spillway destination apply -f policy.toml && spillway destination apply crm")
    if group == "route":
        world.fill()
        world.type("spillway destination apply -f policy.toml && spillway route apply -f policy.toml")
    if group == "cluster":
        world.type("spillway cluster status --until-healthy --timeout 60s")
    if group == "backup":
        shutil.rmtree(world.directory / "backup-1", ignore_errors=True)
    if group == "restore" and not (world.directory / "backup-1").exists():
        world.type("spillway backup ./backup-1")
    for leaf in LEAVES:
        if leaf.path[0] == group:
            for example in leaf.examples:
                if group in ("consume", "dead-letter", "peek", "purge", "explain", "top", "gates", "pause", "tenant", "park"):
                    world.fill(dead_letter=group == "dead-letter")
                world.type(example)
