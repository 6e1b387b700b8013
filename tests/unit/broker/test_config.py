"""Settings: where they come from, which wins, and what a wrong one says."""
from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from spillway.broker import config as config_module
from spillway.broker.config import NodeConfig, is_loopback, load, members_of, meta_founders, parser, split_address
from spillway.broker.errors import ConfigError
from spillway.broker.main import EXIT_CONFIG, serve, show_config

PEERS = "n1=127.0.0.1:7001/127.0.0.1:7002,n2=[::1]:7003/host:7004"
# One other value of every setting, as text for flags and variables.
OTHER = {
    "node_id": "n2", "cluster": "c2", "listen": "127.0.0.2:1", "peer_listen": "127.0.0.2:2", "data_dir": "/d", "peers": PEERS,
    "shards": "4", "replicas": "5", "auto_create": "false", "payload_bytes_max": "1000", "ingress_bytes_max": "1048576",
    "disk_free_bytes_min": "0", "streams_max": "1", "log_level": "debug", "join": "a:1,b:2", "advertise": "a:1/b:2", "zone": "z",
    "host": "h", "replace_after_seconds": "1", "snapshot_bytes_per_second": "1048576",
    "feature_level_max": "1", "tls_cert": "/c", "tls_key": "/k", "tls_client_ca": "/a", "peer_tls_cert": "/pc", "peer_tls_key": "/pk",
    "peer_tls_ca": "/pa", "auth": "tokens", "admin_token_file": "/t", "jwt_jwks_file": "/j", "jwt_issuer": "i", "jwt_audience": "a",
    "allow_insecure": "true", "connection_streams_max": "1", "connection_messages_per_second": "1", "connection_bytes_in_flight_max": "1",
    "metrics_listen": "127.0.0.1:9464", "otlp_endpoint": "http://127.0.0.1:4318", "trace_sample_ratio": "0.5", "log_format": "json",
    "probe_listen": "127.0.0.1:7999"}
LISTS, SWITCHES = ("peers", "join"), ("auto_create", "allow_insecure")
TEXTS = [name for name, value in msgspec.to_builtins(NodeConfig()).items() if isinstance(value, str)]
VALUES = {name: text if name in TEXTS else text.split(",") if name in LISTS else text == "true" if name in SWITCHES
          else float(text) if "." in text else int(text)
          for name, text in OTHER.items()}
DEFAULTS = msgspec.to_builtins(NodeConfig())


def flag(name: str, text: str) -> list[str]:
    """A setting as a flag."""
    dashed = name.replace("_", "-")
    if name in SWITCHES:
        return [f"--{dashed}" if text == "true" else f"--no-{dashed}"]
    return [f"--{dashed}", text]


def wrong(argv: list[str] | None = None, env: dict[str, str] | None = None) -> str:
    """What the error says."""
    with pytest.raises(ConfigError) as caught:
        load(argv or [], env or {})
    return str(caught.value)


def test_every_setting_has_another_value_here() -> None:
    """The table above names every setting: one that is added must be tested, too."""
    assert VALUES.keys() == DEFAULTS.keys()
    assert not [n for n in VALUES if VALUES[n] == DEFAULTS[n]]


def test_nothing_said_is_a_cluster_of_one_on_loopback() -> None:
    """The defaults need no flag, are valid, and reach nobody else."""
    config = load([], {})
    assert config == NodeConfig()
    assert list(members_of(config)) == ["n1"]
    assert all(is_loopback(split_address(n, getattr(config, n))[0]) for n in ("listen", "peer_listen"))


@pytest.mark.parametrize("name", OTHER)
def test_flags_win_over_variables_over_the_file_over_defaults(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting can be given in all four ways, and the nearest to the operator's hands wins. (Some are valid only with others.)"""
    monkeypatch.setattr(config_module, "validate", lambda config: config)
    given = {name: VALUES[name], **({"node_id": "n2"} if name == "peers" else {})}
    value, default = VALUES[name], DEFAULTS[name]
    as_text = ",".join(default) if isinstance(default, list) else str(default).lower() if isinstance(default, bool) else (
        str(default))
    file = tmp_path / "node.toml"
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in given.items()))
    from_file = ["--config", str(file)]
    variable = {"SPILLWAY_" + name.upper(): OTHER[name]}
    back = {"SPILLWAY_" + name.upper(): as_text}
    assert getattr(load(from_file, {}), name) == value
    assert getattr(load([], {"SPILLWAY_CONFIG": str(file)}), name) == value
    assert getattr(load([], variable), name) == value
    assert getattr(load(flag(name, OTHER[name]), {}), name) == value
    assert getattr(load(from_file, back), name) == default
    assert getattr(load([*from_file, *flag(name, as_text)], variable), name) == default
    assert getattr(load(flag(name, OTHER[name]), back), name) == value


def test_a_file_named_by_a_flag_replaces_the_one_named_by_a_variable(tmp_path: Path) -> None:
    """Of two files only the flag's is read."""
    for name, text in (("a", "shards = 2"), ("b", "replicas = 1")):
        (tmp_path / name).write_text(text)
    config = load(["--config", str(tmp_path / "a")], {"SPILLWAY_CONFIG": str(tmp_path / "b")})
    assert (config.shards, config.replicas) == (2, NodeConfig().replicas)


BAD = [
    ("node_id", "", "use 1 to 63"), ("node_id", "n" * 64, "use 1 to 63"), ("node_id", "a/b", "use 1 to 63"),
    ("cluster", "a b", "use 1 to 63"), ("listen", "7070", "write host:port"), ("listen", ":7070", "write host:port"),
    ("listen", "host:", "write host:port"), ("listen", "host:65536", "write host:port"), ("listen", "host:-1", "host:port"),
    ("peer_listen", "host:\u00b2", "write host:port"), ("peer_listen", "host:" + "1" * 5000, "write host:port"),
    ("peers", "n1", "write id=peerhost:port/clienthost:port"), ("peers", "n1=a:1", "write id="),
    ("peers", "=a:1/b:2", "write id="), ("peers", "n1=a:1/b", "write host:port"), ("peers", "n1=a/b:1", "write host:port"),
    ("peers", "n1=a:1/b:2,n1=a:3/b:4", "names node 'n1' twice"), ("peers", "n2=a:1/b:2", "does not name this node, 'n1'"),
    ("shards", "0", "1 to 1024"), ("shards", "1025", "1 to 1024"), ("shards", "many", "int"), ("shards", "", "int"),
    ("replicas", "0", "1 to 7"), ("replicas", "8", "1 to 7"), ("replicas", "2.5", "int"),
    ("payload_bytes_max", "0", "1 to"), ("payload_bytes_max", str((2 << 20) + 1), "1 to 2097152"),
    ("ingress_bytes_max", "1048575", "at least 1 MiB"), ("streams_max", "0", "at least 1"),
    ("join", "a", "write host:port"), ("advertise", "a:1", "write peerhost:port/clienthost:port"), ("advertise", "a:1/b", "host:port"),
    ("zone", "a/b", "use up to 63"), ("host", "h" * 64, "use up to 63"), ("replace_after_seconds", "0", "1 to"),
    ("snapshot_bytes_per_second", "1048575", "at least 1 MiB"),
    ("feature_level_max", "99", "must be 0, or 1 to"), ("connection_streams_max", "-1", "at least 0"),
    ("connection_messages_per_second", "-1", "at least 0"), ("connection_bytes_in_flight_max", "-1", "at least 0"),
    ("disk_free_bytes_min", "-1", "at least 0"), ("log_level", "loud", "say debug, info, warning or error")]


@pytest.mark.parametrize(("name", "text", "says"), BAD, ids=[n for n, _, _ in BAD])
def test_a_wrong_value_is_refused_with_its_setting_and_source(name: str, text: str, says: str, tmp_path: Path) -> None:
    """Whatever is wrong with a value, the error names the setting, where it was set (flag, variable or file), and what
    would be right."""
    argument = f"--{name.replace('_', '-')}"
    file = tmp_path / "node.toml"
    number = isinstance(DEFAULTS[name], int) and text.lstrip("-").isdigit()
    value = text.split(",") if name in LISTS else int(text) if number else text
    file.write_text(f"{name} = {json.dumps(value)}\n")
    for source, said in ((f"flag {argument}: {name} ", wrong([f"{argument}={text}"])),
                         (f"variable SPILLWAY_{name.upper()}: {name} ", wrong(env={"SPILLWAY_" + name.upper(): text})),
                         (f"file {file}: {name} ", wrong(["--config", str(file)]))):
        assert said.startswith(source) and says in said


TLS = ["--tls-cert=/c", "--tls-key=/k"]
PEER_TLS = ["--peer-tls-cert=/c", "--peer-tls-key=/k", "--peer-tls-ca=/a"]
JWT = ["--jwt-jwks-file=/j", "--jwt-issuer=i", "--jwt-audience=a"]
EVERYWHERE = ["--listen=0.0.0.0:7070", "--peer-listen=[::]:7071"]


@pytest.mark.parametrize(("flags", "says"), [
    (TLS[:1], "tls_key is missing; tls_cert and tls_key belong together"), (TLS[1:], "tls_cert is missing"),
    (PEER_TLS[:2], "peer_tls_ca is missing"), (PEER_TLS[1:], "peer_tls_cert is missing"),
    (["--tls-client-ca=/a"], "tls_client_ca is set without tls_cert"),
    (["--auth=password"], "auth is 'password'; say none or tokens"),
    (["--admin-token-file=/t"], "admin_token_file is set, and auth is 'none'"), (JWT, "jwt_jwks_file is set, and auth is 'none'"),
    ([*JWT[:2], "--auth=tokens"], "jwt_audience is missing"), (["--jwt-issuer=i"], "jwt_jwks_file is missing"),
    ([*PEER_TLS, "--node-id=n\u00e9"], "a certificate can only name it if it is ASCII"),
    (EVERYWHERE[:1], "flag --listen: listen is 0.0.0.0:7070, which other machines reach, without TLS: set tls_cert and tls_key, listen on"),
    ([EVERYWHERE[0], *TLS], "flag --listen: listen is 0.0.0.0:7070, which other machines reach, and anybody may do anything there: set "),
    ([EVERYWHERE[0], "--auth=tokens"], "without TLS"), (EVERYWHERE[1:], "flag --peer-listen: peer_listen is [::]:7071, which other"),
    ([*EVERYWHERE, *TLS, "--auth=tokens"], "peer_listen is [::]:7071, which other machines reach, without TLS: set peer_tls_cert"),
    (["--listen=host.example:7070"], "without TLS"),
    ([EVERYWHERE[0], *TLS, "--auth=tokens"], None), ([EVERYWHERE[0], *TLS, "--tls-client-ca=/a"], None),
    ([*EVERYWHERE, *TLS, *PEER_TLS, "--auth=tokens", *JWT, "--admin-token-file=/t"], None), ([*EVERYWHERE, "--allow-insecure"], None),
    (["--listen=localhost:1", "--peer-listen=[::1]:2", "--auth=tokens"], None)])
def test_a_node_protects_itself_or_stays_at_home(flags: list[str], says: str | None) -> None:
    """Half of what belongs together is refused, and so is a node that everybody could use; the error says what to do."""
    if says is None:
        load(flags, {})
    else:
        assert says in wrong(flags)


@pytest.mark.parametrize(("flags", "says"), [
    (["--join=a:1", "--peer-listen=0.0.0.0:7071"], "flag --peer-listen: peer_listen has 0.0.0.0:7071, where no other node"),
    (["--join=a:1", "--listen=[::]:7070"], "flag --listen: listen has [::]:7070, where no other node reaches this one; say with advertise"),
    (["--join=a:1", "--listen=127.0.0.1:0"], "flag --listen: listen has 127.0.0.1:0, where"),
    (["--advertise=0.0.0.0:1/b:2"], "flag --advertise: advertise has 0.0.0.0:1, where no other node reaches"),
    (["--join=a:1", "--peer-listen=0.0.0.0:7071", "--listen=0.0.0.0:7070", "--advertise=a:1/b:2", "--allow-insecure"], None),
    (["--listen=0.0.0.0:7070", "--allow-insecure"], None)])
def test_a_node_that_joins_says_where_it_is(flags: list[str], says: str | None) -> None:
    """At "any address" others would look for it on their own machines."""
    if says is None:
        load(flags, {})
    else:
        assert wrong(flags).startswith(says)


def test_a_cluster_is_founded_with_as_many_nodes_as_it_may_have() -> None:
    """Fourteen, seven of which found the meta group: the others are taken in."""
    peers = [f"n{n:02}=p:{n}/c:{n}" for n in range(1, 16)]
    assert wrong(["--node-id=n01", f"--peers={','.join(peers)}"]) == "flag --peers: peers names 15 nodes; a cluster has up to 14"
    configs = [load([f"--node-id=n{n:02}", f"--peers={','.join(peers[:14])}"], {}) for n in (1, 7, 8, 14)]
    seven = [f"n{n:02}" for n in range(1, 8)]
    assert [meta_founders(config) for config in configs] == [seven, seven, [], []]
    assert meta_founders(load(["--join=a:1"], {})) == []


def test_a_wrong_value_that_is_overridden_by_a_right_one_is_still_refused() -> None:
    """A variable that makes no sense is an error even if a flag would win: it would bite at the next start."""
    assert wrong(["--shards", "4"], {"SPILLWAY_SHARDS": "x"}).startswith("variable SPILLWAY_SHARDS: shards is 'x'")


@pytest.mark.parametrize("text", ["maybe", "2", ""])
def test_a_switch_is_true_or_false(text: str) -> None:
    """A variable for a switch takes true, false, yes, no, 1 and 0; the error says so."""
    assert wrong(env={"SPILLWAY_AUTO_CREATE": text}) == (
        f"variable SPILLWAY_AUTO_CREATE: auto_create is {text!r}; say true or false")
    for word, value in (("TRUE", True), ("yes", True), ("1", True), ("No", False), ("0", False)):
        assert load([], {"SPILLWAY_AUTO_CREATE": word}).auto_create is value


@pytest.mark.parametrize(("line", "says"), [
    ("shard = 4", "unknown setting 'shard'; known are admin_token_file, advertise, allow_insecure,"),
    ("[node]\nshards = 4", "unknown setting 'node'"),
    ("shards = '4x'", "shards is '4x'"), ("shards = true", "shards is True"), ("node_id = 4", "node_id is 4"),
    ("peers = [1]", "peers is [1]")])
def test_a_file_with_a_wrong_line_is_named_with_it(line: str, says: str, tmp_path: Path) -> None:
    """Unknown keys and values of another type are refused: a typo never means the default."""
    file = tmp_path / "node.toml"
    file.write_text(line)
    said = wrong(["--config", str(file)])
    assert said.startswith(f"file {file}: ") and says in said


@pytest.mark.parametrize(("content", "says"), [
    (None, "cannot be read: No such file"), (b"shards = ", "is not valid TOML: Invalid value"),
    (b"\xff", "is not valid TOML: 'utf-8' codec")])
def test_a_file_that_cannot_be_read_names_who_asked_for_it(content: bytes | None, says: str, tmp_path: Path) -> None:
    """The error names the file and whether flag or variable named it."""
    file = tmp_path / "node.toml"
    if content is not None:
        file.write_bytes(content)
    assert wrong(["--config", str(file)]).startswith(f"flag --config: {file} {says}")
    assert wrong(env={"SPILLWAY_CONFIG": str(file)}).startswith(f"variable SPILLWAY_CONFIG: {file} {says}")


def test_members_are_what_peers_name() -> None:
    """Each entry gives one node with both addresses; brackets around a v6 host are not part of the host."""
    members = members_of(load(["--peers", PEERS], {}))
    assert {n: (m.peer_address, m.client_address) for n, m in members.items()} == {
        "n1": ("127.0.0.1:7001", "127.0.0.1:7002"), "n2": ("[::1]:7003", "host:7004")}
    assert split_address("listen", "[::1]:7003") == ("::1", 7003)


@pytest.mark.parametrize(("host", "loopback"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
    ("10.0.0.1", False), ("example.org", False)])
def test_loopback_is_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    """A name that is not known to be loopback counts as reachable."""
    assert is_loopback(host) is loopback


def test_help_names_every_setting_with_its_default() -> None:
    """`spillway serve --help` is made from the one definition."""
    said = " ".join(parser().format_help().split())
    for name, default in DEFAULTS.items():
        assert "--" + name.replace("_", "-") in said
        assert f"(default: {','.join(default) if isinstance(default, list) else default})" in said


def test_config_prints_what_serve_would_take(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`spillway config` prints all settings as JSON, those of variables and flags included, and exits with 0."""
    monkeypatch.setenv("SPILLWAY_SHARDS", "4")
    assert show_config(["--cluster", "c2"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {**DEFAULTS, "shards": 4, "cluster": "c2"} and not printed.err


@pytest.mark.parametrize(("command", "name"), [(show_config, "config"), (serve, "serve")])
def test_a_wrong_setting_is_one_line_and_an_exit_code_of_its_own(
        command: object, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands refuse it before anything is opened: one line on standard error, exit code 2, no traceback."""
    assert callable(command)
    assert command(["--shards", "0"]) == EXIT_CONFIG == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err == f"spillway {name}: flag --shards: shards is 0; it must be 1 to 1024\n"


@pytest.mark.parametrize(("argv", "says"), [
    (["--node-id", "n1", "--peers", PEERS, "--join", "a:1"], "join and peers are both set"),
    (["--node-id", "n1", "--peers", PEERS, "--advertise", "a:1/b:2"], "advertise and peers are both set")])
def test_a_node_is_founded_or_joins(argv: list[str], says: str) -> None:
    """Settings that contradict each other are refused."""
    assert says in wrong(argv)


def test_a_node_that_joins_knows_itself_only() -> None:
    """Where others reach it: where it listens, unless it says otherwise."""
    found = members_of(load(["--node-id", "n4", "--join", "a:1"], {}))
    assert {n: (m.peer_address, m.client_address) for n, m in found.items()} == {"n4": ("127.0.0.1:7071", "127.0.0.1:7070")}
    found = members_of(load(["--node-id", "n4", "--join", "a:1", "--advertise", "p:1/c:2"], {}))
    assert {n: (m.peer_address, m.client_address) for n, m in found.items()} == {"n4": ("p:1", "c:2")}
