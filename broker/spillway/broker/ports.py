"""Ports to listen at: whether they can be had, said before gRPC, which only logs why it cannot bind."""
from __future__ import annotations

import socket

from spillway.broker.config import split_address
from spillway.broker.errors import ConfigError


def check_free(setting: str, address: str) -> None:
    """Raises ConfigError if nobody can listen at `host:port`."""
    host, port = split_address(setting, address)
    if not port:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{setting} {address} cannot be used: {error.strerror}") from None
