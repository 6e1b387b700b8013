"""Where nodes and clients are, and how what they send to each other is lost: on loopback, through the suite's proxy, or in network
namespaces of their own.

Everything is said in directed links, as in `proxy`. Clients are one party, `CLIENT`.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from demo.ports import free_ports
from tests.torture.proxy import Link

ROOT = Path(__file__).resolve().parents[2]
CLIENT = "clients"
ENTERED = "SPILLWAY_TORTURE_NETWORK"  # set inside the clients' namespace: the name that the namespaces begin with


@dataclass(frozen=True)
class Place:
    """Where a node listens, what it calls the others, where clients find it, and what starts a process there."""

    listen: str
    peer_listen: str
    peers: str
    address: str
    prefix: list[str] = field(default_factory=list)


class Network(Protocol):
    """What carries messages."""

    modes: frozenset[str]
    """Of `proxy.MODES`, those that it can do."""

    def places(self, nodes: list[str]) -> dict[str, Place]:
        """Makes room for nodes."""

    def set(self, links: Iterable[Link], mode: str) -> None:
        """Changes directed links."""

    def heal(self) -> None:
        """Everything passes."""

    def close(self) -> None:
        """Takes it down."""


def _peers(nodes: list[str], peer: dict[str, str], client: dict[str, str]) -> str:
    return ",".join(f"{n}={peer[n]}/{client[n]}" for n in nodes)


class Loopback:
    """Nothing in between, nothing is lost."""

    modes = frozenset({"pass"})

    def places(self, nodes: list[str]) -> dict[str, Place]:
        """See Network."""
        ports = free_ports(2 * len(nodes))
        listen = {n: f"127.0.0.1:{ports[2 * i]}" for i, n in enumerate(nodes)}
        peer = {n: f"127.0.0.1:{ports[2 * i + 1]}" for i, n in enumerate(nodes)}
        everyone = _peers(nodes, peer, listen)
        return {n: Place(listen[n], peer[n], everyone, listen[n]) for n in nodes}

    def set(self, links: Iterable[Link], mode: str) -> None:
        """See Network."""
        raise NotImplementedError("loopback loses nothing")

    def heal(self) -> None:
        """See Network."""

    def close(self) -> None:
        """See Network."""


class ProxyNetwork:
    """Every pair of nodes, and clients with every node, talk through a process of the suite."""

    modes = frozenset({"pass", "drop", "refuse", "slow", "lossy"})

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.children", str(os.getpid()), sys.executable, "-m", "tests.torture.proxy"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._changed: set[Link] = set()

    def places(self, nodes: list[str]) -> dict[str, Place]:
        """See Network."""
        pairs = [(a, b) for b in nodes for a in (CLIENT, *nodes) if a != b]
        ports = free_ports(2 * len(nodes) + len(pairs))
        fronts = {pair: f"127.0.0.1:{ports.pop()}" for pair in pairs}
        listen = {n: f"127.0.0.1:{ports.pop()}" for n in nodes}
        peer = {n: f"127.0.0.1:{ports.pop()}" for n in nodes}
        for (a, b), front in fronts.items():
            host, port = front.split(":")
            target_host, target_port = (listen if a == CLIENT else peer)[b].split(":")
            self._order({"listen": [a, b, host, int(port), target_host, int(target_port)]})
        client = {n: fronts[CLIENT, n] for n in nodes}
        return {n: Place(listen[n], peer[n], _peers(nodes, {m: peer[m] if m == n else fronts[n, m] for m in nodes}, client),
                         client[n]) for n in nodes}

    def set(self, links: Iterable[Link], mode: str) -> None:
        """See Network."""
        chosen = list(links)
        self._changed.update(chosen)
        self._order({"links": [[a, b, mode] for a, b in chosen]})

    def heal(self) -> None:
        """See Network."""
        self.set(list(self._changed), "pass")
        self._changed.clear()

    def close(self) -> None:
        """See Network."""
        self._process.kill()
        self._process.communicate()

    def _order(self, order: dict[str, object]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "done\n", "the proxy ended"


class Namespaces:
    """Every node in a network namespace of its own, joined by a bridge in another one, to which the clients' belongs, too; packets
    are dropped by the kernel. For root, and inside the clients' namespace: see `enter`."""

    modes = frozenset({"pass", "drop", "refuse", "lossy", "slow"})
    LOSSY_PERCENT = 8
    _LOST: ClassVar = {"drop": "drop", "lossy": f"numgen random mod 100 < {LOSSY_PERCENT} drop"}
    _SLOW = ("tbf", "rate", "4mbit", "burst", "16kb", "latency", "200ms")

    def __init__(self, name: str) -> None:
        self._name = name
        self._namespaces: list[str] = []
        self._addresses: dict[str, str] = {CLIENT: "10.111.0.1"}
        self._modes: dict[Link, str] = {}
        self._slow: set[str] = set()

    @staticmethod
    def missing() -> str:
        """Why it cannot be used here; empty if it can."""
        if os.geteuid():
            return "not root"
        tools = [tool for tool in ("ip", "nft", "tc") if shutil.which(tool) is None]
        if tools:
            return f"no {', '.join(tools)}"
        name = f"spillway-{os.getpid()}-try"
        if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
            return "namespaces are not allowed"
        try:
            works = subprocess.run(["ip", "netns", "exec", name, "nft", "add", "table", "inet", "torture"], capture_output=True)
        finally:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        return "nft does not work" if works.returncode else ""

    @staticmethod
    def enter(module: str, argv: list[str]) -> int:
        """Runs a module of the suite inside the namespace of the clients; returns its exit code."""
        name = f"spillway-{os.getpid()}"
        bridge, clients = f"{name}-bridge", f"{name}-{CLIENT}"
        try:
            for namespace in (bridge, clients):
                _run("ip", "netns", "add", namespace)
            _run("ip", "-n", bridge, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", bridge, "link", "set", "bridge", "up")
            _join(bridge, clients, CLIENT, "10.111.0.1")
            return subprocess.run(["ip", "netns", "exec", clients, sys.executable, "-m", "bench.children", str(os.getpid()),
                                   sys.executable, "-m", module, *argv], cwd=ROOT, env=os.environ | {ENTERED: name}).returncode
        finally:
            listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
            for line in listed.splitlines():
                if line.split()[0].startswith(f"{name}-"):
                    subprocess.run(["ip", "netns", "del", line.split()[0]], capture_output=True)

    def places(self, nodes: list[str]) -> dict[str, Place]:
        """See Network."""
        for i, node in enumerate(nodes):
            namespace = f"{self._name}-{node}"
            _run("ip", "netns", "add", namespace)
            self._namespaces.append(namespace)
            self._addresses[node] = f"10.111.0.{10 + i}"
            _join(f"{self._name}-bridge", namespace, node, self._addresses[node])
        listen = {n: f"{self._addresses[n]}:7070" for n in nodes}
        peer = {n: f"{self._addresses[n]}:7071" for n in nodes}
        ip = shutil.which("ip")
        assert ip is not None
        return {n: Place(listen[n], peer[n], _peers(nodes, peer, listen), listen[n], [ip, "netns", "exec", f"{self._name}-{n}"])
                for n in nodes}

    def set(self, links: Iterable[Link], mode: str) -> None:
        """See Network. A slow link makes everything slow that its sender sends."""
        changed: set[str] = set()
        for link in links:
            self._modes[link] = mode
            changed.update(link)
        for party in changed:
            self._apply(party)

    def heal(self) -> None:
        """See Network."""
        changed = {party for link in self._modes for party in link}
        self._modes.clear()
        for party in changed:
            self._apply(party)

    def close(self) -> None:
        """See Network. The clients' namespace and the bridge's go when `enter` ends."""
        for namespace in self._namespaces:
            _run("ip", "netns", "del", namespace)

    def _apply(self, party: str) -> None:
        """Loads the rules of one party. What is lost is lost on its arrival: a sender that is told would repeat it sooner."""
        arriving = [f"ip saddr {self._addresses[a]} {self._LOST[mode]}" for (a, b), mode in self._modes.items()
                    if b == party and mode in self._LOST]
        leaving = [f"ip daddr {self._addresses[b]} meta l4proto tcp reject with tcp reset" for (a, b), mode in self._modes.items()
                   if a == party and mode == "refuse"]
        text = "table inet torture\ndelete table inet torture\ntable inet torture {\n"
        for hook, rules in (("input", arriving), ("output", leaving)):
            text += f"chain {hook} {{ type filter hook {hook} priority 0; {'; '.join(rules)}\n}}\n"
        namespace = f"{self._name}-{party}"
        _run("ip", "netns", "exec", namespace, "nft", "-f", "-", text=text + "}\n")
        slow = any(a == party and mode == "slow" for (a, _), mode in self._modes.items())
        if slow != (party in self._slow):
            self._slow ^= {party}
            _run("ip", "netns", "exec", namespace, "tc", "qdisc", *(("add", "dev", "eth0", "root", *self._SLOW) if slow else
                                                                     ("del", "dev", "eth0", "root")))


def _join(bridge: str, namespace: str, name: str, address: str) -> None:
    """Connects a namespace to the bridge."""
    _run("ip", "-n", bridge, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _run("ip", "-n", bridge, "link", "set", name, "master", "bridge", "up")
    _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    _run("ip", "-n", namespace, "link", "set", "eth0", "up")
    _run("ip", "-n", namespace, "link", "set", "lo", "up")


def _run(*command: str, text: str | None = None) -> None:
    done = subprocess.run(command, input=text, text=True, capture_output=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def between(ones: Iterable[str], others: Iterable[str]) -> list[Link]:
    """The links from every one to every other."""
    return [(a, b) for a in ones for b in others if a != b]
