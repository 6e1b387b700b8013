"""Who calls: tokens are recognised by a digest, and nothing else lets anybody in."""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from spillway.broker.core import directory as d
from spillway.broker.core.access import ADMIN, LEASE, PRODUCE, Scope, Token
from spillway.broker.errors import ConfigError, Unauthenticated
from spillway.broker.services.principal import AdminFile, Authenticator, Limits, digest_of, make_token, subject_of

NOW = 1_700_000_000.0
ADMIN_TOKEN = "an-admin-token-of-enough-characters"


class Context:
    """What is asked of a call."""

    def __init__(self, *authorization: str, subject: bytes = b"") -> None:
        self._metadata = tuple(("authorization", value) for value in authorization)
        self._subject = subject

    def invocation_metadata(self) -> Any:
        """As gRPC has it."""
        return (("user-agent", "x"), *self._metadata)

    def auth_context(self) -> dict[str, list[bytes]]:
        """As gRPC has it."""
        return {"x509_subject": [self._subject]} if self._subject else {}


class World:
    """An authenticator and what it looks at."""

    def __init__(self, admin: AdminFile | None = None, behind: bool = False) -> None:
        self.now = NOW
        self.directory = d.Directory()
        self.authenticator = Authenticator(True, lambda: self.directory, lambda: self.now, admin, behind=lambda: behind)

    def add(self, **fields: Any) -> tuple[Token, str]:
        """A token that is stored."""
        token_id, text, digest = make_token()
        token = Token(token_id, 0, "name", digest, fields.pop("scopes", (Scope(PRODUCE),)), int(NOW * 1000), **fields)
        self.directory.apply(1, d.encode_command([d.PutToken("n", 1, token)]))
        return self.directory.tokens[token_id], text

    async def refused(self, *authorization: str) -> str:
        """Why somebody is not let in."""
        with pytest.raises(Unauthenticated) as caught:
            await self.authenticator.identify(Context(*authorization))
        return str(caught.value)


def test_a_token_has_256_random_bits_and_is_stored_as_its_sha_256() -> None:
    """No two are the same, and what is stored does not tell them."""
    made = [make_token() for _ in range(100)]
    assert len({text for _, text, _ in made}) == len({token_id for token_id, _, _ in made}) == 100
    for token_id, text, digest in made:
        secret = text.removeprefix(f"spw_{token_id}_")
        assert len(secret) == 43 and digest == hashlib.sha256(secret.encode()).digest() == digest_of(secret)


async def test_a_stored_token_lets_in_with_its_scopes_and_limits() -> None:
    """As it was made; its grants remember their decisions from call to call."""
    world = World()
    token, text = world.add(scopes=(Scope(LEASE, "a"), Scope(ADMIN, "b")), streams_max=1, messages_per_second=2, bytes_in_flight_max=3)
    one = await world.authenticator.identify(Context(f"Bearer {text}"))
    again = await world.authenticator.identify(Context(f"bearer {text}"))
    assert one.grants is again.grants and one.grants is not None and one.grants.allows(LEASE, "a") and not one.grants.allows(PRODUCE, "a")
    assert one.name == f"token {token.token_id} (name)" and one.key == token.token_id and one.limits == Limits(1, 2, 3) and not one.expires


async def test_whatever_is_no_token_is_refused() -> None:
    """None, two, another scheme, a wrong secret, another one's secret, an id that there is none of."""
    world = World()
    token, text = world.add()
    _, other = world.add()
    secret = other.rpartition(other.split("_")[1] + "_")[2]
    assert "no token" in await world.refused()
    for authorization in ((f"Basic {text}",), (text,), ("Bearer ",), (f"Bearer {text}", f"Bearer {text}"), (f"Bearer {'x' * 20_000}",)):
        assert "must be there once, as: Bearer TOKEN" in await world.refused(*authorization)
    for wrong in (text + "x", text[:-1], "spw_", f"spw_{token.token_id}_{secret}", "spw_0_0", "a.b.c", ADMIN_TOKEN):
        assert "not valid" in await world.refused(f"Bearer {wrong}")


async def test_a_token_ends_when_it_expires_or_is_revoked() -> None:
    """For calls, and for streams that were opened before."""
    world = World()
    token, text = world.add(expires_ms=int(NOW * 1000) + 1000)
    principal = await world.authenticator.identify(Context(f"Bearer {text}"))
    assert principal.expires == NOW + 1 and not world.authenticator.refusal(principal)
    world.now = NOW + 1
    assert "expired" in await world.refused(f"Bearer {text}") and "expired" in world.authenticator.refusal(principal)
    stays, text = world.add()
    principal = await world.authenticator.identify(Context(f"Bearer {text}"))
    world.directory.apply(2, d.encode_command([d.DropToken("n", 2, token.token_id)]))
    assert not world.authenticator.refusal(principal)
    world.directory.apply(2, d.encode_command([d.DropToken("n", 2, stays.token_id)]))
    assert "revoked" in await world.refused(f"Bearer {text}") and "revoked" in world.authenticator.refusal(principal)


async def test_a_node_that_may_be_behind_waits_for_news_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was made a moment ago at another node, perhaps; of one that nobody has made it hears nothing, and refuses it."""
    monkeypatch.setattr("spillway.broker.services.principal.NEWS_SECONDS", 0.1)
    world = World(behind=True)
    token_id, text, digest = make_token()
    assert "not valid" in await world.refused(f"Bearer {text}")
    looks = 0

    class News(dict[str, Token]):
        """Tokens of which one comes with the third look."""

        def get(self, key: str, default: Any = None) -> Any:
            nonlocal looks
            looks += 1
            return Token(token_id, 1, "", digest, (), 0) if looks == 3 else None

    world.directory.tokens = News()
    assert (await world.authenticator.identify(Context(f"Bearer {text}"))).key == token_id


async def test_the_admin_file_lets_in_as_long_as_its_token_is_there(tmp_path: Path) -> None:
    """Another token in it, or none, ends the former one; it may administer, and nothing else."""
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match="openssl rand"):
        AdminFile(str(path))
    path.write_text("admin")
    with pytest.raises(ConfigError, match="20 to"):
        AdminFile(str(path))
    path.write_text(ADMIN_TOKEN + "\n")
    file = AdminFile(str(path))
    world = World(file)
    principal = await world.authenticator.identify(Context(f"Bearer {ADMIN_TOKEN}"))
    assert principal.grants is not None and principal.grants.everything == (False, False, True)
    assert not file.poll() and not world.authenticator.refusal(principal)
    path.write_text("another-token-of-enough-characters")
    assert file.poll() and "changed" in world.authenticator.refusal(principal)
    assert "not valid" in await world.refused(f"Bearer {ADMIN_TOKEN}")
    await world.authenticator.identify(Context("Bearer another-token-of-enough-characters"))
    path.unlink()
    assert file.poll() and not file.poll()
    assert "not valid" in await world.refused("Bearer another-token-of-enough-characters")


async def test_where_nobody_asks_for_tokens_everybody_may_do_everything() -> None:
    """Whoever has a certificate is called by it."""
    open_ = Authenticator(False, d.Directory, lambda: NOW)
    assert (await open_.identify(Context())).grants is None
    assert (await open_.identify(Context(subject=b"CN=app\n"))).name == "certificate CN=app?"
    assert subject_of(Context()) == ""  # type: ignore[arg-type]
