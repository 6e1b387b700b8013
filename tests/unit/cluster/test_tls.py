"""Certificates of nodes: what is taken, what is refused and why, and what happens when files change."""
from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from spillway.cluster.transport.base import Handlers
from spillway.cluster.transport.grpc import PROTOCOL, GrpcTransport
from spillway.cluster.transport.tls import TlsFiles, TlsInvalid, certified_names, speaks_tls
from spillway.peer.v1.peer_service_pb2 import Hello

LONG = 30.0  # seconds: a test that waits this long has failed
NAMES = ("cert", "key", "ca")


class Authority:
    """Issues certificates into a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(directory / "ca.pem")

    def issue(self, *names: str, file: str = "", until: int = 2090) -> list[str]:
        """The paths of a certificate, its key and the authority's."""
        made = self.ca.issue_cert(*names, not_before=datetime(2020, 1, 1, tzinfo=UTC), not_after=datetime(until, 1, 1, tzinfo=UTC))
        cert, key = (self.directory / f"{file or names[0]}.{kind}" for kind in ("crt", "key"))
        cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        key.write_bytes(made.private_key_pem.bytes())
        return [str(cert), str(key), str(self.directory / "ca.pem")]

    def files(self, *names: str, file: str = "") -> TlsFiles:
        """Those of a node with the first of the names."""
        return TlsFiles(NAMES, *self.issue(*names, file=file), names[0])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One."""
    return Authority(tmp_path)


def test_what_is_wrong_with_files_is_said(authority: Authority, tmp_path: Path) -> None:
    """By the setting that names the file, with what to do."""
    cert, key, ca = authority.issue("n1", "n1.example")
    assert TlsFiles(NAMES, cert, key, ca, "n1").version == 1 and not TlsFiles(NAMES, cert, key).needs_certificates
    (garbage := tmp_path / "garbage").write_text("no PEM")
    (other := tmp_path / "other").mkdir()
    strangers = Authority(other)
    for paths, node_id, said in (
            ((str(tmp_path / "none"), key, ca), "", "cert .*none cannot be read"),
            ((cert, str(garbage), ca), "", "are no certificate and its key"), ((cert, key, str(garbage)), "", "ca .* has no cert"),
            ((cert, authority.issue("n2")[1], ca), "", "are no certificate and its key"),
            ((cert, key, ca), "n2", "does not name this node: it needs the DNS name 'n2' among its subject .* has 'n1', 'n1.example'"),
            ((cert, key, ca), "N1", "does not name this node"),
            ((cert, key, strangers.issue("x")[2]), "n1", "It must be of that authority"),
            (tuple(authority.issue("old", until=2021)), "old", "certificate has expired"),
            (tuple(authority.issue("*.example")), "n1.example", "does not name this node")):
        with pytest.raises(TlsInvalid, match=said):
            TlsFiles(NAMES, *paths, node_id)


def test_when_a_certificate_ends_is_known(authority: Authority) -> None:
    """With an authority for the other side or without, and of the new one once files change; one that has ended says 0."""
    cert, key, ca = authority.issue("n1", until=2041)
    end = datetime(2041, 1, 1, tzinfo=UTC).timestamp()
    files = TlsFiles(NAMES, cert, key, ca, "n1")
    assert files.ends == TlsFiles(NAMES, cert, key).ends == end
    authority.issue("n1", until=2050)
    assert files.poll() and files.ends == datetime(2050, 1, 1, tzinfo=UTC).timestamp()
    assert TlsFiles(NAMES, *authority.issue("old", until=2021)[:2]).ends == 0


def test_changed_files_are_taken_if_they_are_valid(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    """What is half written, wrong or gone changes nothing, is said once, and is tried again when it changes."""
    files = authority.files("n1")
    assert not files.poll()
    cert, _, _ = paths = authority.issue("n1")
    assert files.poll() and files.version == 2 and not files.poll()
    whole = Path(cert).read_bytes()
    Path(cert).write_bytes(whole[:-100])
    assert not files.poll() and not files.poll() and files.version == 2
    assert sum("going on with what was read before" in m for m in caplog.messages) == 1
    Path(cert).write_bytes(whole)
    files.poll()
    authority.issue("n2", file="n1")
    assert not files.poll() and "does not name this node" in caplog.text
    Path(cert).unlink()
    assert not files.poll() and not files.poll()
    assert sum("cannot be read" in m for m in caplog.messages) == 1
    version = files.version
    authority.issue("n1")
    assert files.poll() and files.version == version + 1
    linked = Path(paths[0])
    moved = linked.rename(linked.with_name("first"))
    linked.symlink_to(moved)
    files.poll()
    version = files.version
    second = Path(authority.issue("n1", file="second")[0])
    Path(paths[1]).write_bytes(second.with_suffix(".key").read_bytes())
    linked.unlink()
    linked.symlink_to(second)  # as Kubernetes swaps them
    assert files.poll() and files.version == version + 1


class Echo:
    """A server that tells its callers whom it takes them for."""

    def __init__(self, files: TlsFiles | None) -> None:
        self.server = grpc.aio.server()

        async def names(request: bytes, context: Any) -> bytes:
            return ",".join(certified_names(context)).encode()

        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {
            "Names": grpc.unary_unary_rpc_method_handler(names)}),))
        credentials = files.server_credentials() if files else None
        port = self.server.add_secure_port("127.0.0.1:0", credentials) if credentials else self.server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"

    async def __aenter__(self) -> Echo:
        await self.server.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.server.stop(None)

    async def ask(self, files: TlsFiles, node_id: str) -> str:
        """Who it is for a node. Raises AioRpcError."""
        async with files.channel(self.address, node_id, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            answer: bytes = await channel.unary_unary("/t.T/Names")(b"", timeout=LONG)
            return answer.decode()


async def test_both_sides_show_a_certificate_that_names_them(authority: Authority, tmp_path: Path) -> None:
    """The caller learns that it has reached the node that it wants, the other one who calls; both follow their files."""
    n1, n2 = authority.files("n1"), authority.files("n2")
    (other := tmp_path / "other").mkdir()
    stranger = Authority(other).files("n1")
    async with Echo(n2) as echo:
        assert await echo.ask(n1, "n2") == "n1"
        for files, node_id in ((n1, "n1"), (stranger, "n2")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await echo.ask(files, node_id)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await n1.names_at(echo.address) == ("n2",) and await speaks_tls(echo.address)
        with pytest.raises(TlsInvalid, match="not valid here"):
            await stranger.names_at(echo.address)
        authority.issue("n2", "n2.example")
        assert n2.poll()
        assert await n1.names_at(echo.address) == ("n2", "n2.example")
        authority.issue("n1", "n1.example")
        assert n1.poll() and await echo.ask(n1, "n2") == "n1,n1.example"
    assert await n1.names_at(echo.address) is None
    async with Echo(None) as plain:
        with pytest.raises(TlsInvalid, match="does not speak TLS"):
            await n1.names_at(plain.address)
        assert not await speaks_tls(plain.address)


async def test_connections_move_to_new_certificates_before_the_old_ones_end(authority: Authority) -> None:
    """The one that is up is closed when the new one is there, and stays if none comes about; nothing is left behind."""
    said: list[tuple[str, str]] = []
    again = asyncio.Event()

    def transport(node_id: str, peers: dict[str, str]) -> tuple[GrpcTransport, TlsFiles]:
        files = authority.files(node_id)
        return GrpcTransport(lambda: Hello(protocol=PROTOCOL, cluster="c", node_id=node_id), "c", node_id, peers, None, tls=files), files

    b, b_files = transport("b", {"a": "127.0.0.1:1"})
    server = grpc.aio.server()
    b.add_to_server(server)
    port = server.add_secure_port("127.0.0.1:0", b_files.server_credentials())
    await server.start()
    a, a_files = transport("a", {"b": f"127.0.0.1:{port}"})

    def connected(peer: str, epoch: int, hello: Any) -> None:
        said.append(("up", peer))
        again.set()

    a.start(Handlers(connected, lambda *frame: None, lambda peer, epoch: said.append(("down", peer))))
    b.start(Handlers(lambda *up: None, lambda *frame: None, lambda *down: None))
    try:
        await asyncio.wait_for(again.wait(), LONG)
        for _ in range(3):
            again.clear()
            authority.issue("a")
            assert a_files.poll()
            a.rotate()
            await asyncio.wait_for(again.wait(), LONG)
        assert said == [("up", "b"), *[("down", "b"), ("up", "b")] * 3]
        async with asyncio.timeout(LONG):
            while len(a._dialing) > 1:  # the former ones end
                await asyncio.sleep(0.01)
        assert len(a._channels) == 1
        # b does not take the next one: the connection that is up goes on.
        before, kept = a._connections["b"], len(said)
        a._tls = Authority(authority.directory / "..").files("a", file="stranger")
        a.rotate()
        async with asyncio.timeout(LONG):
            while a._probed.get("b") is None:  # it was refused
                await asyncio.sleep(0.01)
        assert a._connections["b"] is before and len(said) == kept and not before.closed
    finally:
        await a.close()
        await b.close()
        await server.stop(None)
    assert not a._dialing and not a._tasks
