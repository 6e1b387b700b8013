"""Ports for nodes on loopback: of the demo, the benchmarks and the tests."""
from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)  # below what Linux gives to connections that go out: one of those could take a port before a node does
_given: set[int] = set()  # a node that is down for a while still owns its port


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing is bound to now, no connection on its way out either (TIME_WAIT), and that this process was not given
    before. Another process may take one before it is used: then the node that should listen there says so and ends. Raises OSError if
    there are not so many."""
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(free) == count:
            break
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            free.append(port)
    if len(free) < count:
        raise OSError(f"{count} ports between {PORTS[0]} and {PORTS[-1]} are wanted, and only {len(free)} are free")
    return free
