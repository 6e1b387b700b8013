"""How a client proves who it is, and whom it trusts: certificates and tokens, read again when their files change."""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
from spillway.client.errors import InvalidArgument
from spillway.contract.files import stamp_of

log = logging.getLogger("spillway.client")

GRPC_ROOTS = "default"  # as tls_ca: the public authorities that gRPC comes with
TOKEN_BYTES_MAX = 16 << 10
_Stamp = tuple[tuple[int, int, int], ...]


class Security:
    """What the options tls_ca, tls_cert, tls_key, tls_server_name, token and token_file say. Belongs to one event loop."""

    def __init__(self, *, tls_ca: str = "", tls_cert: str = "", tls_key: str = "", tls_server_name: str = "", token: str = "",
                 token_file: str = "") -> None:
        """See `spillway.client.Client`. Raises InvalidArgument for options that do not go together, and files that cannot be read."""
        if bool(tls_cert) != bool(tls_key):
            missing = "tls_key" if tls_cert else "tls_cert"
            raise InvalidArgument(missing, "is missing; tls_cert and tls_key belong together")
        if (tls_cert or tls_server_name) and not tls_ca:
            raise InvalidArgument("tls_ca", f"is missing: name the file with the nodes' authority, or {GRPC_ROOTS!r} for public ones")
        if token and token_file:
            raise InvalidArgument("token_file", "is given together with token; give one of them")
        self.tls = bool(tls_ca)
        self._files = ("" if tls_ca == GRPC_ROOTS else tls_ca, tls_key, tls_cert)
        self._server_name = tls_server_name
        self._token = _checked("token", token)
        self._token_file = token_file
        self._token_stamp: _Stamp = ()
        self._stamp: _Stamp = ()
        self._credentials: grpc.ChannelCredentials | None = None
        self.version = 0  # of the certificates: grows when other files were read
        self._warned = False
        if self.tls:
            self._read()
        if token_file:
            self._token_stamp = _stamp("token_file", (token_file,))
            self._token = _checked("token_file", _text("token_file", token_file))

    def refresh(self) -> int:
        """Reads certificates whose files have changed; returns their version. What cannot be read is left as it was."""
        if self.tls:
            try:
                if _stamp("tls", self._files) != self._stamp:
                    self._read()
            except InvalidArgument as error:
                log.warning("%s; going on with what was read before", error)
        return self.version

    def channel(self, address: str, options: Sequence[tuple[str, int | str]]) -> Any:
        """A channel to a node, on which every call says who makes it. It has those methods of grpc.aio.Channel that this package uses."""
        options = list(options)
        if self._credentials is None:
            if (self._token or self._token_file) and not self._warned and not _is_loopback(address):
                self._warned = True
                log.warning("a token is sent to %s without TLS: whoever is on the way can read it", address)
            channel = grpc.aio.insecure_channel(address, options=options)
        else:
            if self._server_name:
                options.append(("grpc.ssl_target_name_override", self._server_name))
            channel = grpc.aio.secure_channel(address, self._credentials, options=options)
        return _TokenChannel(channel, self._metadata) if self._token or self._token_file else channel

    def token(self) -> str:
        """The token that a call made now carries; empty: none."""
        if self._token_file:
            try:
                if (stamp := _stamp("token_file", (self._token_file,))) != self._token_stamp:
                    self._token = _checked("token_file", _text("token_file", self._token_file))
                    self._token_stamp = stamp
            except InvalidArgument as error:  # it is being replaced
                log.warning("%s; going on with what was read before", error)
        return self._token

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token()}"),)

    def _read(self) -> None:
        stamp = _stamp("tls", self._files)
        ca, key, cert = (_bytes(name, path) for name, path in zip(("tls_ca", "tls_key", "tls_cert"), self._files, strict=True))
        self._credentials = grpc.ssl_channel_credentials(ca, key, cert)
        self._stamp = stamp
        self.version += 1


class _TokenChannel:
    """A channel whose calls carry a token. Interceptors of gRPC would do that, too, at a cost for every message of a stream."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Callable[[], Any]) -> None:
        self._channel = channel
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._with_token(self._channel.unary_unary(*arguments, **options))

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._with_token(self._channel.unary_stream(*arguments, **options))

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._with_token(self._channel.stream_stream(*arguments, **options))

    def _with_token(self, call: Any) -> Any:
        return lambda *arguments, **options: call(*arguments, metadata=self._metadata(), **options)


def _checked(name: str, token: str) -> str:
    if len(token) > TOKEN_BYTES_MAX or not all("!" <= c <= "~" for c in token):
        raise InvalidArgument(name, f"is no token: up to {TOKEN_BYTES_MAX} printable ASCII characters without spaces")
    if name == "token_file" and not token:
        raise InvalidArgument(name, "has no token in it")
    return token


def _stamp(name: str, paths: Sequence[str]) -> _Stamp:
    out = []
    for path in paths:
        if path:
            try:
                out.append(stamp_of(path))
            except OSError as error:
                raise InvalidArgument(name, f"{path} cannot be read: {error.strerror}") from None
    return tuple(out)


def _bytes(name: str, path: str) -> bytes | None:
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise InvalidArgument(name, f"{path} cannot be read: {error.strerror}") from None


def _text(name: str, path: str) -> str:
    return (_bytes(name, path) or b"").decode(errors="replace").strip()


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
