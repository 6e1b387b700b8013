"""How a client says who it is: certificates and tokens of files that change."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from spillway.client import Client, InvalidArgument
from spillway.client.connection import Channels
from spillway.client.security import Security


class Server:
    """Answers with the token that it was called with."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.server = grpc.aio.server()

        async def token(request: bytes, context: Any) -> bytes:
            return str(dict(context.invocation_metadata()).get("authorization", "none")).encode()

        async def tokens(requests: Any, context: Any) -> None:
            async for _ in requests:
                await context.write(await token(b"", context))

        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {
            "One": grpc.unary_unary_rpc_method_handler(token), "Many": grpc.stream_stream_rpc_method_handler(tokens)}),))
        port = self.server.add_secure_port("127.0.0.1:0", credentials) if credentials else self.server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"

    async def __aenter__(self) -> Server:
        await self.server.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.server.stop(None)

    async def ask(self, channels: Channels) -> str:
        """The token of a call."""
        answer: bytes = await channels.get(self.address, "control").unary_unary("/t.T/One")(b"", timeout=30)
        return answer.decode()


@pytest.mark.parametrize(("options", "field"), [
    ({"tls_cert": "c", "tls_ca": "a"}, "tls_key"), ({"tls_key": "k", "tls_ca": "a"}, "tls_cert"),
    ({"tls_cert": "c", "tls_key": "k"}, "tls_ca"), ({"tls_server_name": "n"}, "tls_ca"), ({"token": "t", "token_file": "f"}, "token_file"),
    ({"tls_ca": "/none"}, "tls"),
    ({"token_file": "/none"}, "token_file"), ({"token": "a b"}, "token"), ({"token": "a\n"}, "token"), ({"token": "\u00e9"}, "token"),
    ({"token": "x" * 20_000}, "token"), ({"token_file": "/dev/null"}, "token_file")])
def test_options_that_cannot_be_are_refused(options: dict[str, str], field: str) -> None:
    """By name, before anything is sent."""
    with pytest.raises(InvalidArgument) as caught:
        Client(**options)  # type: ignore[arg-type]
    assert caught.value.field == field


async def test_a_token_goes_with_every_call_and_follows_its_file(tmp_path: Path) -> None:
    """One that is being replaced is the former one until the new one is there."""
    (path := tmp_path / "token").write_text("first\n")
    channels = Channels(Security(token_file=str(path)))
    async with Server() as server:
        assert await server.ask(channels) == "Bearer first"
        stream = channels.get(server.address, "produce").stream_stream("/t.T/Many")()
        await stream.write(b"")
        assert await stream.read() == b"Bearer first"
        path.write_text("second")
        assert await server.ask(channels) == "Bearer second" and channels.token() == "second"
        path.unlink()
        assert await server.ask(channels) == "Bearer second"
        path.write_text("")
        assert await server.ask(channels) == "Bearer second"
        stream.cancel()
        assert await server.ask(Channels()) == "none"
        await channels.close()


async def test_a_token_that_anybody_could_read_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Without TLS, beyond this machine."""
    caplog.set_level(logging.WARNING, "spillway.client")
    channels = Channels(Security(token="t"))
    for address in ("127.0.0.1:1", "[::1]:1", "localhost:1"):
        channels.get(address, "control")
    assert not caplog.messages
    for address in ("host.example:1", "10.0.0.1:1"):
        channels.get(address, "control")
    assert len(caplog.messages) == 1 and "without TLS" in caplog.text
    await channels.close()


async def test_certificates_follow_their_files(tmp_path: Path) -> None:
    """A new authority is trusted for new channels, and a call that is under way goes on over the former one."""
    def credentials(ca: trustme.CA) -> grpc.ServerCredentials:
        ca.cert_pem.write_to_path(tmp_path / "ca")
        cert = ca.issue_cert("broker.example")
        return grpc.ssl_server_credentials([(cert.private_key_pem.bytes(), b"".join(b.bytes() for b in cert.cert_chain_pems))])

    async with Server(credentials(trustme.CA())) as server:
        security = Security(tls_ca=str(tmp_path / "ca"), tls_server_name="broker.example", token="t")
        channels = Channels(security)
        assert await server.ask(channels) == "Bearer t" and security.version == 1
        stream = channels.get(server.address, "produce").stream_stream("/t.T/Many")()
        await stream.write(b"")
        assert await stream.read() == b"Bearer t"
        async with Server(credentials(trustme.CA())) as new:
            assert await new.ask(channels) == "Bearer t" and security.version == 2
            with pytest.raises(grpc.aio.AioRpcError):
                await server.ask(channels)
            await stream.write(b"")
            assert await stream.read() == b"Bearer t"
            (tmp_path / "ca").unlink()
            assert await new.ask(channels) == "Bearer t" and security.version == 2
        stream.cancel()
        await channels.close()
