"""Ports for nodes: nobody's."""
from __future__ import annotations

import socket

import pytest

from demo import ports
from demo.ports import free_ports


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """The only one there is to give."""
    (one,) = free_ports(1)
    monkeypatch.setattr(ports, "PORTS", range(one, one + 1))
    monkeypatch.setattr(ports, "_given", set())
    return one


def test_none_is_given_twice(port: int) -> None:
    """A node that is down for a while would lose its own."""
    assert free_ports(1) == [port]
    with pytest.raises(OSError, match=rf"1 ports between {port} and {port} are wanted, and only 0 are free"):
        free_ports(1)


def test_one_that_is_listened_at(port: int) -> None:
    """Somebody has it."""
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="only 0 are free"):
        free_ports(1)


def test_one_of_a_connection_that_ended(port: int) -> None:
    """Its port cannot be bound by all for another minute."""
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = server.accept()
        accepted.close()  # first: this side waits
        assert client.recv(1) == b""
    with pytest.raises(OSError, match="only 0 are free"):
        free_ports(1)
