"""How to reach a cluster: which source wins, and what is kept of contexts."""
from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from spillway.client import InvalidArgument
from spillway.client.connecting import ADDRESS, OPTIONS, Connection, Option, connect, resolve
from spillway.client.contexts import KEYS, ContextError, Contexts, default_path

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def contexts(tmp_path: Path) -> Contexts:
    """Three contexts; prod is selected, and dev was before."""
    found = Contexts(tmp_path / "spillway" / "contexts.json")
    found.add("prod", {"address": ["p:1", "p:2"], "tls_ca": "/prod.pem", "token_file": "/prod.token"})
    found.add("dev", {"address": ["d:1"], "token": "dev-token"})
    found.add("bare", {"address": ["b:1"]})
    found.select("dev")
    found.select("prod")
    return found


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """(exit code, stdout, stderr) of one command of a user without contexts."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("SPILLWAY_CONTEXT", *map(Option.variable, OPTIONS)):
        monkeypatch.delenv(name, raising=False)
    return command_line


def test_without_anything_it_is_this_machine(tmp_path: Path) -> None:
    """And nothing else."""
    assert resolve({}, {}, Contexts(tmp_path / "none")) == Connection() == Connection((ADDRESS,))


def test_flags_win_over_variables_and_those_over_contexts(contexts: Contexts) -> None:
    """Each option by itself."""
    named = {"SPILLWAY_CONTEXT": "prod"}
    assert resolve({}, named, contexts).address == ("p:1", "p:2")
    variables = named | {"SPILLWAY_ADDRESS": "v:1, v:2 v:3", "SPILLWAY_TLS_SERVER_NAME": "name"}
    found = resolve({}, variables, contexts)
    assert (found.address, found.tls_ca, found.tls_server_name) == (("v:1", "v:2", "v:3"), "/prod.pem", "name")
    found = resolve({"address": ["f:1,f:2", "f:3"], "tls_ca": "/f.pem"}, variables, contexts)
    assert (found.address, found.tls_ca, found.tls_server_name) == (("f:1", "f:2", "f:3"), "/f.pem", "name")
    assert resolve({}, {"SPILLWAY_ADDRESS": ""}, contexts).address == ("p:1", "p:2")  # an empty variable is none


def test_a_context_that_a_flag_names_wins_over_variables(contexts: Contexts) -> None:
    """What is typed now is meant more than what was exported once."""
    found = resolve({}, {"SPILLWAY_ADDRESS": "v:1", "SPILLWAY_CONTEXT": "prod"}, contexts, "dev")
    assert (found.address, found.token, found.tls_ca) == (("d:1",), "dev-token", None)
    assert resolve({"address": ["f:1"]}, {}, contexts, "dev") == Connection(("f:1",), token="dev-token")
    assert resolve({}, {}, contexts, "-").address == ("d:1",)


def test_the_selected_context_is_for_its_own_addresses(contexts: Contexts) -> None:
    """Its token is not sent to an address that was given."""
    assert resolve({}, {}, contexts) == Connection(("p:1", "p:2"), "/prod.pem", token_file="/prod.token")
    assert resolve({"address": ["f:1"]}, {}, contexts) == Connection(("f:1",))
    assert resolve({}, {"SPILLWAY_ADDRESS": "v:1"}, contexts) == Connection(("v:1",))
    assert resolve({"tls_ca": "/f.pem"}, {}, contexts) == Connection(("p:1", "p:2"), "/f.pem", token_file="/prod.token")


def test_a_token_of_a_stronger_source_is_the_only_one(contexts: Contexts) -> None:
    """Whether it is a token or a file with it."""
    found = resolve({"token": "t"}, {"SPILLWAY_TOKEN_FILE": "/v", "SPILLWAY_CONTEXT": "prod"}, contexts)
    assert (found.token, found.token_file) == ("t", None)
    found = resolve({}, {"SPILLWAY_TOKEN_FILE": "/v", "SPILLWAY_CONTEXT": "dev"}, contexts)
    assert (found.token, found.token_file) == (None, "/v")
    assert "secret" not in repr(Connection(token="secret"))


def test_every_option_is_one_of_contexts_and_connections() -> None:
    """None can be forgotten."""
    assert list(OPTIONS) == [one.name for one in fields(Connection)]
    assert set(KEYS) == {*OPTIONS, "description"}


def test_a_client_is_made_of_a_connection() -> None:
    """Of its addresses; what makes it safe is never left out silently."""
    assert "a:1, b:2" in repr(connect(Connection(("a:1", "b:2"))))
    with pytest.raises(InvalidArgument, match="is not host:port"):
        connect(Connection(("nonsense",)))


def test_contexts_are_kept_for_their_owner_only(contexts: Contexts) -> None:
    """In one file, which is replaced as a whole."""
    assert stat.S_IMODE(contexts.path.stat().st_mode) == 0o600 and not contexts.readable_by_others()
    assert stat.S_IMODE(contexts.path.parent.stat().st_mode) == 0o700
    assert [one.name for one in contexts.path.parent.iterdir()] == ["contexts.json"]
    again = Contexts(contexts.path)
    assert (again.all, again.selected, again.previous) == (contexts.all, "prod", "dev")
    contexts.path.chmod(0o644)
    assert contexts.readable_by_others()
    contexts.add("more", {"address": ["m:1"]})
    assert not contexts.readable_by_others()


def test_what_is_selected_may_go(contexts: Contexts) -> None:
    """Then nothing is; the previous one comes back by '-', and goes by it."""
    assert contexts.select("-") == "dev" and contexts.previous == "prod"
    contexts.remove("dev")
    assert contexts.selected == "" and contexts.current() is None
    assert contexts.select("-") == "prod"
    contexts.remove("prod")
    with pytest.raises(ContextError, match="no context was selected before"):
        contexts.select("-")
    contexts.select("bare")
    assert contexts.select("") == "" and contexts.previous == "bare"
    with pytest.raises(ContextError, match="known are: bare"):
        contexts.get("prod")


@pytest.mark.parametrize("name", ["", "-", "-x", "a b", "a/b", "é", "x" * 64])
def test_names_of_contexts_are_plain(contexts: Contexts, name: str) -> None:
    """So that they need no quoting, and are no option."""
    with pytest.raises(ContextError, match="is not a name"):
        contexts.add(name, {"address": ["a:1"]})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "contexts": {}}', '{"format": 1}', '{"format": 1, "contexts": []}',
                                  '{"format": 1, "contexts": {"a": 1}}', '{"format": 1, "contexts": {"a": {"what": "x"}}}',
                                  '{"format": 1, "contexts": {"a": {"address": [1]}}}', "[" * 100_000, "\ud800"])
def test_a_file_that_is_none_of_contexts_is_told(tmp_path: Path, text: str) -> None:
    """With its name, whatever is in it; and it is not overwritten."""
    file = tmp_path / "contexts.json"
    file.write_text(text, errors="surrogatepass")
    before = file.read_bytes()
    for touch in (lambda c: c.current(), lambda c: c.add("a", {"address": ["a:1"]}), lambda c: c.select("a")):
        with pytest.raises(ContextError, match="is no file of contexts"):
            touch(Contexts(file))
    assert file.read_bytes() == before


def test_where_contexts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where XDG says; a relative path there counts for nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path({"XDG_CONFIG_HOME": "/x"}) == Path("/x/spillway/contexts.json")
    assert default_path({}) == default_path({"XDG_CONFIG_HOME": "x"}) == tmp_path / ".config/spillway/contexts.json"


def test_contexts_on_the_command_line(run: Run, tmp_path: Path) -> None:
    """Added, selected, shown, removed; a token is never shown by itself."""
    code, out, err = run("context", "add", "prod", "-a", "p:1,p:2", "-a", "p:3", "--tls-ca", "ca.pem", "--token", "s3cret", "--select")
    assert code == 0 and out == "added context 'prod', and selected it\n" and "prefer --token-file" in err and "does not exist yet" in err
    assert run("context", "add", "prod", "-a", "x:1")[0] == 2
    assert run("context", "add", "dev", "-a", "d:1", "--description", "[mine]")[0] == 0
    code, out, _ = run("context", "ls")
    assert code == 0 and "[mine]" in out and [line.split()[:2] for line in out.splitlines() if "*" in line] == [["*", "prod"]]
    listed = json.loads(run("context", "ls", "-o", "json")[1])
    assert [(one["context"], one["selected"], one["token"]) for one in listed] == [("dev", False, None), ("prod", True, "…")]
    shown = json.loads(run("context", "show", "-o", "json")[1])
    assert shown["address"] == ["p:1", "p:2", "p:3"] and shown["tls_ca"] == str(Path("ca.pem").absolute())
    assert shown["file"] == str(tmp_path / "spillway" / "contexts.json")
    assert json.loads(run("context", "show", "prod", "--secrets", "-o", "json")[1])["token"] == "s3cret"
    Path(shown["file"]).chmod(0o640)
    assert "chmod 600" in run("context", "show")[2]
    assert run("context", "select", "dev")[0] == 0 and json.loads(run("context", "select", "-", "-o", "json")[1]) == {"context": "prod"}
    assert run("context", "rm", "dev", stdin="n\n")[0] == 1
    assert run("context", "rm", "dev", "--yes")[1] == "removed context 'dev'\n"
    code, _, err = run("status", "--context", "dev")
    assert code == 2 and "there is no context 'dev'" in err
    code, _, err = run("context", "add", "two", "-a", "a:1", "--token", "x", "--token-file", "y")
    assert code == 2 and "not both" in err
