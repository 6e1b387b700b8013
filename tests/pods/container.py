"""Containers without a container engine: the Dockerfile's stages and the chart's pods, on this machine's system instead of a base image.

A container's root is an overlay of the image over this machine's root; it has namespaces of its own for mounts, processes, network and host
name, and runs without privileges. That is what the kernel does for an engine, too. What is not as there: the base image is this machine's
system, and there is no seccomp profile. For root only; see `missing`.
"""
from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "chroot", "mount")


def missing(directory: Path) -> str:
    """Why there can be no containers here; empty if there can."""
    if os.geteuid():
        return "not root"
    if tools := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"no {', '.join(tools)}"
    name = f"spillway-helm-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces are not allowed"
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", "sh", "-ec", overlay(directory)], capture_output=True, text=True)
    return f"overlays do not work: {tried.stderr.strip()}" if tried.returncode else ""


def overlay(directory: Path, image: Path | None = None) -> str:
    """Shell commands that make `directory`/root: what is in `image` over this machine's root, and what is written over both, in memory, as
    an overlay cannot have layers that are inside of each other."""
    root, scratch = (shlex.quote(str(directory / name)) for name in ("root", "scratch"))
    python = Path(os.path.realpath(shutil.which("python3") or sys.executable))  # it may be root's alone; a base image's is everybody's
    reachable = shlex.join(f".{folder}" for folder in python.parents)
    return f"""
        mkdir -p {root} {scratch}
        mount --make-rprivate /
        mount -t tmpfs tmpfs {scratch}
        mkdir {scratch}/upper {scratch}/work
        {"" if image is None else f"cp -a {shlex.quote(str(image))}/. {scratch}/upper"}
        mount -t overlay overlay -o lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work {root}
        cd {root}
        chmod o+x {reachable}
        mount --rbind /dev dev
        mount -t proc proc proc"""


@dataclass
class Image:
    """What a Dockerfile made: one of its stages."""

    files: Path
    """What its instructions wrote, but for `copies`."""
    copies: dict[str, Path] = field(default_factory=dict)
    """What comes from another stage: path -> where it is."""
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    workdir: str = "/"


def build(dockerfile: Path, directory: Path) -> Image:
    """Runs the Dockerfile's instructions, those that ours uses; returns the last stage. `COPY . .` copies what .dockerignore lets
    through."""
    stages: dict[str, Image] = {}
    image = Image(directory)
    for line in dockerfile.read_text().splitlines():
        word, _, rest = line.partition(" ")
        match word:
            case "FROM":
                image = Image(directory / f"stage{len(stages)}")
                image.files.mkdir(parents=True)
                stages[rest.partition(" AS ")[2] or "last"] = image
            case "WORKDIR":
                image.workdir = rest
                (image.files / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "ENV":
                name, _, value = rest.partition("=")
                image.environment[name] = value
            case "USER":
                image.user = rest
            case "ENTRYPOINT":
                image.entrypoint = json.loads(rest)
            case "CMD":
                image.command = json.loads(rest)
            case "COPY" if rest == ". .":
                _copy_context(image.files / image.workdir.lstrip("/"))
            case "COPY":
                stage, source, target = rest.split()
                image.copies[target] = stages[stage.removeprefix("--from=")].files / source.lstrip("/")
            case "RUN":
                _run_step(rest, image, directory / "building")
            case _:
                assert word in ("", "ARG", "LABEL", "EXPOSE") or word.startswith("#"), f"a Dockerfile's {word} is not known here"
    return image


def _copy_context(target: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*" and rules[-2:] == ["**/__pycache__", "**/*.pyc"], "what is let through is a list of what is needed"
    for rule in rules[1:-2]:
        source, destination = ROOT / rule.removeprefix("!"), target / rule.removeprefix("!")
        destination.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy2(source, destination)


def _run_step(command: str, image: Image, place: Path) -> None:
    assert not image.copies, "RUN comes before COPY --from"
    script = f"""{overlay(place, image.files)}
        mount -t tmpfs tmpfs tmp
        chroot . sh -c {shlex.quote(f"cd {image.workdir} && {command}")}
        cp -a ../scratch/upper/. {shlex.quote(str(image.files))}"""
    done = subprocess.run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", script],
                          capture_output=True, text=True, env={**os.environ, "TMPDIR": "/tmp"}, timeout=900)
    assert done.returncode == 0, f"RUN {command}:\n{done.stdout}{done.stderr}"


@dataclass(frozen=True)
class Mount:
    """A volume in a container."""

    path: str
    source: Path | None  # None: an empty one in memory
    read_only: bool = False


class Container:
    """A process in a root of its own."""

    def __init__(self, directory: Path, image: Image, namespace: str, hostname: str, argv: Sequence[str], environment: Mapping[str, str],
                 mounts: Sequence[Mount], user: int, log: Path) -> None:
        """Starts it. `namespace`: of the network; `user`: id of its user and groups."""
        directory.mkdir(parents=True, exist_ok=True)
        self._environment = {**image.environment, **environment, "HOSTNAME": hostname}
        self._user = user
        self.log = log
        q = shlex.quote
        lines = [overlay(directory, image.files), f"hostname {q(hostname)}"]
        for mount in [*(Mount(path, source, True) for path, source in image.copies.items()), *mounts]:
            target = q("." + mount.path)
            if mount.source is None:
                lines += [f"mkdir -p {target}", f"mount -t tmpfs -o mode=1777 tmpfs {target}"]
                continue
            if mount.source.is_dir():
                lines.append(f"mkdir -p {target}")
            else:
                lines.append(f"mkdir -p {q('.' + str(Path(mount.path).parent))}; touch {target}")
            lines.append(f"mount --bind {q(str(mount.source))} {target}")
            if mount.read_only:
                lines.append(f"mount -o remount,ro,bind {target}")
        lines += ["mount -o remount,ro .", f"exec chroot . {shlex.join(self._without_privileges(argv))}"]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, "unshare", "--mount", "--pid", "--uts", "--fork",
                 "sh", "-ec", "\n".join(lines)], stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def _without_privileges(self, argv: Sequence[str]) -> list[str]:
        return ["setpriv", f"--reuid={self._user}", f"--regid={self._user}", f"--groups={self._user}", "--no-new-privs", "--inh-caps=-all",
                "--bounding-set=-all", "env", "-i", *(f"{name}={value}" for name, value in self._environment.items()), *argv]

    @property
    def pid(self) -> int:
        """Of its first process, as this machine sees it; 0 if there is none yet, or any more."""
        try:
            return int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])
        except (OSError, IndexError):
            return 0

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        """Sends a signal to its first process."""
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Waits until it has ended; returns the exit code. Raises subprocess.TimeoutExpired."""
        return self._process.wait(seconds)

    def execute(self, argv: Sequence[str], seconds: float, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a further command in it, as `kubectl exec` and hooks do."""
        return subprocess.run(["nsenter", f"--target={self.pid}", "--mount", "--pid", "--uts", "--net", "--root", "--wd",
                               *self._without_privileges(argv)], input=stdin, capture_output=True, text=True, timeout=seconds)

    def end(self) -> None:
        """Ends it at once, and with its first process all others of it."""
        if self.running:
            if pid := self.pid:
                os.kill(pid, signal.SIGKILL)
            else:
                self._process.kill()
            self._process.wait(30)

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")
