"""What protects a node's ports, from its settings: certificates, and what to tell people of it."""
from __future__ import annotations

import logging

from spillway.broker.config import NodeConfig, is_loopback, split_address
from spillway.broker.errors import ConfigError
from spillway.cluster.transport.tls import TlsFiles, TlsInvalid


def clients_tls(config: NodeConfig) -> TlsFiles | None:
    """The certificate of the clients' port; None without TLS. Raises ConfigError."""
    return _files(config, ("tls_cert", "tls_key", "tls_client_ca"), "")


def peers_tls(config: NodeConfig) -> TlsFiles | None:
    """The certificate for other nodes; None without TLS. Raises ConfigError."""
    return _files(config, ("peer_tls_cert", "peer_tls_key", "peer_tls_ca"), config.node_id)


def _files(config: NodeConfig, names: tuple[str, str, str], node_id: str) -> TlsFiles | None:
    cert, key, ca = (getattr(config, name) for name in names)
    if not cert:
        return None
    try:
        return TlsFiles(names, cert, key, ca, node_id)
    except TlsInvalid as error:
        raise ConfigError(str(error)) from None


def protection(config: NodeConfig) -> list[tuple[int, str]]:
    """What protects which port, for the log: (level, line)."""
    clients = ["TLS" if config.tls_cert else "no TLS"]
    if config.tls_client_ca:
        clients.append("certificates of tls_client_ca")
    clients.append("tokens" if config.auth == "tokens" else "no tokens")
    peers = "TLS both ways, certificates that name the node" if config.peer_tls_cert else "no TLS"
    lines = [_line("clients", "listen", config.listen, ", ".join(clients),
                  bool(config.tls_cert) and (config.auth == "tokens" or bool(config.tls_client_ca))),
            _line("nodes", "peer_listen", config.peer_listen, peers, bool(config.peer_tls_cert))]
    if config.metrics_listen:
        local = is_loopback(split_address("metrics_listen", config.metrics_listen)[0])
        lines.append((logging.INFO, f"metrics on {config.metrics_listen}: no TLS, read only; "
                      + ("only this machine reaches it" if local else "other machines reach it, and read names of destinations there")))
    return lines


def _line(who: str, setting: str, address: str, what: str, protected: bool) -> tuple[int, str]:
    local = is_loopback(split_address(setting, address)[0])
    if protected:
        return logging.INFO, f"{who} on {address}: {what}"
    where = "only this machine reaches it" if local else "NOT PROTECTED, and other machines reach it (allow_insecure)"
    return logging.INFO if local else logging.WARNING, f"{who} on {address}: {what}; {where}"
