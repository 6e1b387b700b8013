"""TLS for ports and channels: PEM files that are read again when they change, and what is wrong with whoever is at an address.

gRPC asks a server's files anew for every connection, but a channel keeps what it was made with: `TlsFiles.version` tells when to make
new ones. A connection that is up outlives its certificate.

**Which certificate names which node**: the one that has the node's id as a DNS name among its subject alternative names, exactly
(wildcards and the common name do not count). Several nodes may share a certificate that names them all; then each can say that it is
any of them.
"""
from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from spillway.cluster.errors import ClusterError
from spillway.contract.files import stamp_of

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between looks at the files; symbolic links that are swapped are noticed, too
PROBE_SECONDS = 3.0
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF_WHILE_READING", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST",
           "UNKNOWN_PROTOCOL")


class TlsInvalid(ClusterError):
    """Certificate, key and authorities are not what they must be; says which file, and what to do."""


class TlsFiles:
    """A certificate, its key and the authorities of the other side, as they are in files now."""

    def __init__(self, names: tuple[str, str, str], cert: str, key: str, ca: str = "", node_id: str = "") -> None:
        """`names` are the settings that the paths come from, for messages. `ca`: others must present a certificate of it; without one
        they need none. `node_id`: the certificate must name this node, and be of `ca`. Raises TlsInvalid."""
        self._names = names
        self._paths = (cert, key, ca)
        self._node_id = node_id
        self._refused: tuple[Any, ...] = ()
        self.version = 0  # grows whenever other files are taken into use
        self.ends = 0.0  # when the certificate in use ends, Unix time; 0 if it has ended
        self._stamp = self._look()
        self._take(self._read())

    def __repr__(self) -> str:
        return f"<TlsFiles of {self._paths[0]}, version {self.version}>"

    @property
    def needs_certificates(self) -> bool:
        """Whether the other side must present a certificate."""
        return bool(self._paths[2])

    def poll(self) -> bool:
        """Takes changed files into use; false if there is nothing new. What is not valid (yet) is left, and said once."""
        stamp: tuple[Any, ...] = ("gone",)
        try:
            stamp = self._look()
            if stamp in (self._stamp, self._refused):
                return False
            pem = self._read()
            if self._look() != stamp:  # they are being written: next time
                return False
        except TlsInvalid as error:
            if stamp != self._refused:
                log.error("%s; going on with what was read before", error)
            self._refused = stamp
            return False
        self._stamp, self._refused = stamp, ()
        self._take(pem)
        log.info("took new files into use: %s", ", ".join(path for path in self._paths if path))
        return True

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a port; follows the files."""
        served = self.version

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            # In a thread of gRPC's, one at a time, for every new connection: None means that nothing has changed.
            nonlocal served
            if served == self.version:
                return None
            served = self.version
            return self._server

        return grpc.dynamic_ssl_server_credentials(self._server, fetch, self.needs_certificates)  # type: ignore[arg-type]

    def channel(self, address: str, node_id: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """A channel to a node, wherever it is: whoever is at the address must have a certificate that names it."""
        return grpc.aio.secure_channel(address, self._channel, options=[*options, ("grpc.ssl_target_name_override", node_id)])

    async def names_at(self, address: str) -> tuple[str, ...] | None:
        """The names in the certificate of whoever is at an address; None if nobody answers. Raises TlsInvalid unless it is of `ca`, and
        takes this one's."""
        found = await _shake(address, self._context(ssl.PROTOCOL_TLS_CLIENT))
        return None if found is None else _dns_names(found)

    def _look(self) -> tuple[Any, ...]:
        stamp: list[Any] = []
        for name, path in zip(self._names, self._paths, strict=True):
            if not path:
                continue
            try:
                stamp.append(stamp_of(path))
            except OSError as error:
                raise TlsInvalid(f"{name} {path} cannot be read: {error.strerror}") from None
        return tuple(stamp)

    def _read(self) -> list[bytes]:
        out = []
        for name, path in zip(self._names, self._paths, strict=True):
            try:
                out.append(Path(path).read_bytes() if path else b"")
            except OSError as error:
                raise TlsInvalid(f"{name} {path} cannot be read: {error.strerror}") from None
        self._context(ssl.PROTOCOL_TLS_SERVER)
        if self._node_id:
            names = _dns_names(self._shake_with_itself())
            if self._node_id not in names:
                raise TlsInvalid(f"{self._names[0]} {self._paths[0]} does not name this node: it needs the DNS name {self._node_id!r} "
                                 f"among its subject alternative names, and has {', '.join(map(repr, names)) or 'none'}")
        return out

    def _context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        """For Python's own TLS. Raises TlsInvalid."""
        cert, key, ca = self._paths
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        try:
            context.load_cert_chain(cert, key)
        except (ssl.SSLError, OSError) as error:
            raise TlsInvalid(f"{self._names[0]} {cert} and {self._names[1]} {key} are no certificate and its key in PEM: {error}") from None
        if ca:
            try:
                context.load_verify_locations(ca)
            except (ssl.SSLError, OSError) as error:
                raise TlsInvalid(f"{self._names[2]} {ca} has no certificates in PEM: {error}") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _shake_with_itself(self) -> Mapping[str, Any]:
        """The certificate, as others see it if both sides have it. Raises TlsInvalid if it is none for both."""
        try:
            server, _ = _meet(self._context(ssl.PROTOCOL_TLS_SERVER), self._context(ssl.PROTOCOL_TLS_CLIENT))
        except ssl.SSLError as error:
            raise TlsInvalid(f"{self._names[0]} {self._paths[0]} is not valid between nodes with {self._names[2]} {self._paths[2]}: "
                             f"{_said(error)}. It must be of that authority, not expired, and for both server and client") from None
        return server.getpeercert() or {}

    def _end(self) -> float:
        """See `ends`. By a handshake with somebody who trusts this certificate and nothing else: Python decodes what it verified only."""
        cert, key, _ = self._paths
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        try:
            server.load_cert_chain(cert, key)
            client.load_verify_locations(cert)
            found = _meet(server, client)[1].getpeercert() or {}
            return float(ssl.cert_time_to_seconds(str(found["notAfter"])))
        except (ssl.SSLError, OSError, KeyError):
            return 0.0

    def _take(self, pem: list[bytes]) -> None:
        cert, key, ca = pem
        self._server = grpc.ssl_server_certificate_configuration([(key, cert)], ca or None)
        self._channel = grpc.ssl_channel_credentials(ca or None, key, cert)
        self.ends = self._end()
        self.version += 1


def _meet(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A handshake in memory: what the server and the client have then. Raises ssl.SSLError."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = server.wrap_bio(there, back, server_side=True), client.wrap_bio(back, there)
    waiting = [sides[1], sides[0]]
    for _ in range(8):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
    return sides


def certified_names(context: Any) -> tuple[str, ...]:
    """The DNS names in the certificate that the caller of an RPC presented; empty without one."""
    return tuple(name.decode(errors="replace") for name in context.auth_context().get("peer_dns", ()))


async def speaks_tls(address: str) -> bool:
    """Whether whoever is at an address speaks TLS, with anybody or not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only asks for the protocol
    try:
        return await _shake(address, context) is not None
    except TlsInvalid as error:
        return "refuses" in str(error)


async def _shake(address: str, context: ssl.SSLContext) -> Mapping[str, Any] | None:
    """The certificate of who is there; None if nobody answers. Raises TlsInvalid."""
    host, _, port = address.rpartition(":")
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
            found: Mapping[str, Any] = writer.get_extra_info("peercert") or {}
            await reader.read(1)  # whoever does not take our certificate says so only now
            return found
    except ssl.SSLCertVerificationError as error:
        raise TlsInvalid(f"{address} has a certificate that is not valid here: {error.verify_message}") from None
    except ssl.SSLError as error:
        if any(text in (error.reason or str(error)) for text in _NO_TLS):
            raise TlsInvalid(f"{address} does not speak TLS, and this side does: give it a certificate, or take this one's away") from None
        raise TlsInvalid(f"{address} refuses this one's certificate: {_said(error)}") from None
    except (OSError, TimeoutError):
        return None
    finally:
        if writer is not None:
            writer.transport.abort()


def _said(error: ssl.SSLError) -> str:
    return getattr(error, "verify_message", "") or (error.reason or str(error)).lower().replace("_", " ")


def _dns_names(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS")
