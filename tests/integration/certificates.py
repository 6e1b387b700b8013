"""Authorities, certificates and clusters that use them, for tests."""
from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import trustme
from cluster_process import ClusterProcesses, NodeProcess
from spillway.v1 import cluster_service_pb2 as pb
from spillway.v1.cluster_service_pb2_grpc import ClusterServiceStub


class Authority:
    """Issues certificates into a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.ca = trustme.CA()
        self.path = directory / f"{name}-ca.pem"
        self.ca.cert_pem.write_to_path(self.path)

    def issue(self, file: str, *names: str, expired: bool = False) -> tuple[str, str]:
        """A certificate for names, and its key: the paths of both. What was there is replaced, each file at once."""
        until = datetime.now(UTC) + timedelta(days=-1 if expired else 30)
        made = self.ca.issue_cert(*names, not_before=datetime(2020, 1, 1, tzinfo=UTC), not_after=until)
        paths = self.directory / f"{file}.crt", self.directory / f"{file}.key"
        contents = b"".join(blob.bytes() for blob in made.cert_chain_pems), made.private_key_pem.bytes()
        for path, content in zip(paths, contents, strict=True):
            fresh = path.with_suffix(path.suffix + ".new")
            fresh.write_bytes(content)
            fresh.replace(path)
        return str(paths[0]), str(paths[1])

    def credentials(self, cert: tuple[str, str] | None = None) -> grpc.ChannelCredentials:
        """For a channel that trusts this authority."""
        chain, key = (Path(path).read_bytes() for path in cert) if cert else (None, None)
        return grpc.ssl_channel_credentials(self.path.read_bytes(), key, chain)


ADMIN_TOKEN = "an-admin-token-for-these-tests-only"


class SecureCluster(ClusterProcesses):
    """Nodes that talk TLS to each other and to clients, and ask clients for tokens."""

    def __init__(self, directory: Path, nodes: int, flags: list[str] | None = None, tokens: bool = True) -> None:
        self.clients = Authority(directory, "clients")
        self.peers = Authority(directory, "peers")
        self.admin_token_file = directory / "admin.token"
        self.admin_token_file.write_text(ADMIN_TOKEN + "\n")
        super().__init__(directory, nodes, flags)
        for node_id, node in self.nodes.items():
            self.rotate(node_id)
            node.argv += self.security(node_id)
            if tokens:
                node.argv += ["--auth", "tokens", "--admin-token-file", str(self.admin_token_file)]

    def security(self, node_id: str) -> list[str]:
        """The flags of a node's certificates."""
        at = self.directory
        return ["--tls-cert", f"{at}/{node_id}-clients.crt", "--tls-key", f"{at}/{node_id}-clients.key",
                "--peer-tls-cert", f"{at}/{node_id}-peers.crt", "--peer-tls-key", f"{at}/{node_id}-peers.key",
                "--peer-tls-ca", str(self.peers.path)]

    def rotate(self, node_id: str) -> None:
        """New certificates for a node."""
        self.clients.issue(f"{node_id}-clients", "127.0.0.1", "localhost")
        self.peers.issue(f"{node_id}-peers", node_id)

    def topology(self, node: NodeProcess | None = None) -> pb.Topology:
        """See ClusterProcesses."""
        node = node or next(n for n in self.nodes.values() if n.running)
        with grpc.secure_channel(node.address, self.clients.credentials(), [("grpc.use_local_subchannel_pool", 1)]) as channel:
            return ClusterServiceStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=5, metadata=bearer(ADMIN_TOKEN)).topology

    @property
    def trust(self) -> dict[str, Any]:
        """Options of a client that trusts the nodes."""
        return {"tls_ca": str(self.clients.path)}


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call with a token."""
    return (("authorization", f"Bearer {token}"),)
