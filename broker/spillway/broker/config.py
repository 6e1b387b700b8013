"""Settings of a node: flags over environment (SPILLWAY_*) over a TOML file over defaults. One definition gives all
four; `spillway serve --help` and `spillway config` are made from it."""
from __future__ import annotations

import argparse
import ipaddress
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
from spillway.broker.core import features
from spillway.broker.core.directory import NODES_MAX
from spillway.broker.errors import ConfigError
from spillway.cluster.exports import SNAPSHOT_BYTES_PER_SECOND
from spillway.cluster.raft.configuration import VOTERS_MAX
from spillway.contract.limits import FRAME_BYTES_MAX, PAYLOAD_BYTES_MAX, SHARDS_MAX
from spillway.contract.telemetry.endpoint import is_http
from spillway.contract.telemetry.logs import FORMATS


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that a node needs to know. Validated once, by `load`."""

    node_id: Annotated[str, "this node's id, unique in the cluster; kept for ever in the data directory"] = "n1"
    cluster: Annotated[str, "the cluster's name; nodes of another cluster are refused"] = "spillway"
    listen: Annotated[str, "host:port for clients; loopback unless you say otherwise"] = "127.0.0.1:7070"
    peer_listen: Annotated[str, "host:port for the other nodes"] = "127.0.0.1:7071"
    data_dir: Annotated[str, "where log and state live; one node, one directory"] = "spillway-data"
    peers: Annotated[list[str], "all nodes, this one included: id=peerhost:port/clienthost:port; empty: a cluster of one"] = []
    join: Annotated[list[str], "peerhost:port of some nodes of a cluster that this node joins, instead of peers"] = []
    advertise: Annotated[str, "peerhost:port/clienthost:port where others reach it, unless peers says so; empty: where it listens"] = ""
    zone: Annotated[str, "zone that this node may fail together with: no two replicas in one while zones suffice"] = ""
    host: Annotated[str, "machine that this node runs on, where several brokers do: they count as one host"] = ""
    replace_after_seconds: Annotated[int, "a node that is gone for so long is replaced, where others suffice"] = 300
    shards: Annotated[int, "Raft groups that share the queues, 1 to 1024; fixed when the cluster is created"] = 16
    replicas: Annotated[int, "replicas of each shard, at most the number of nodes; fixed when the cluster is created"] = 3
    feature_level_max: Annotated[int, "holds the cluster at this feature level, so that older versions can come back; 0: no"] = 0
    auto_create: Annotated[bool, "create a destination when something is produced to it for the first time"] = True
    payload_bytes_max: Annotated[int, f"largest payload, at most {FRAME_BYTES_MAX // 2}"] = PAYLOAD_BYTES_MAX
    ingress_bytes_max: Annotated[int, "messages accepted from producers and not yet committed, over all streams"] = 64 << 20
    disk_free_bytes_min: Annotated[int, "below this much free disk, Produce is refused; leases and acks go on"] = 256 << 20
    snapshot_bytes_per_second: Annotated[int, "all snapshots together that this node sends to others; less leaves more for traffic, "
                                              "but a replica that is behind catches up later"] = SNAPSHOT_BYTES_PER_SECOND
    streams_max: Annotated[int, "open streams of clients; further ones are refused"] = 10_000
    tls_cert: Annotated[str, "PEM file with the certificate chain of the clients' port; read again when it changes; empty: no TLS"] = ""
    tls_key: Annotated[str, "PEM file with the key of tls_cert"] = ""
    tls_client_ca: Annotated[str, "PEM file with authorities: clients must present a certificate of one; empty: they need none"] = ""
    peer_tls_cert: Annotated[str, "PEM file with this node's certificate for other nodes, which has its node_id as a DNS name; empty: no "
                                  "TLS between nodes"] = ""
    peer_tls_key: Annotated[str, "PEM file with the key of peer_tls_cert"] = ""
    peer_tls_ca: Annotated[str, "PEM file with the authority of all nodes' peer_tls_cert, and of nothing else"] = ""
    auth: Annotated[str, "none, or tokens: clients must present one"] = "none"
    admin_token_file: Annotated[str, "a file with a token that may administer everything, valid while it is there; to make the first ones "
                                     "with"] = ""
    jwt_jwks_file: Annotated[str, "a JSON Web Key Set: tokens signed with its keys are taken, too; read again when it changes"] = ""
    jwt_issuer: Annotated[str, "what the claim iss of such tokens must be"] = ""
    jwt_audience: Annotated[str, "what the claim aud of such tokens must have"] = ""
    allow_insecure: Annotated[bool, "listen beyond loopback without TLS, or without asking clients who they are"] = False
    connection_streams_max: Annotated[int, "open streams of one connection of a client; further ones are refused; 0: no limit"] = 0
    connection_messages_per_second: Annotated[int, "records produced over one connection; beyond it requests wait; 0: no limit"] = 0
    connection_bytes_in_flight_max: Annotated[int, "produce requests of one connection that are not answered; beyond it further ones "
                                                   "wait; 0: no limit"] = 0
    metrics_listen: Annotated[str, "host:port of the Prometheus endpoint /metrics; empty: none"] = ""
    otlp_endpoint: Annotated[str, "http://host:4318 of a collector that takes OTLP over HTTP, for metrics and traces; empty: none"] = ""
    trace_sample_ratio: Annotated[float, "0 to 1: of messages without a trace, for how many the broker begins one; with a trace, its flag "
                                         "decides"] = 0.0
    probe_listen: Annotated[str, "host:port of plaintext health checks for Kubernetes: startup, readiness, liveness; empty: none"] = ""
    log_level: Annotated[str, "debug, info, warning or error"] = "info"
    log_format: Annotated[str, "text, or json: one object a line, with the ids of traces"] = "text"


class Peer(msgspec.Struct, frozen=True):
    """One node of the cluster, from `NodeConfig.peers`."""

    node_id: str
    peer_address: str
    client_address: str


def _fields() -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, doc) of every setting."""
    hints = get_type_hints(NodeConfig, include_extras=True)
    found = []
    for field in msgspec.structs.fields(NodeConfig):
        kind, doc = get_args(hints[field.name])
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        found.append((field.name, kind, default, doc))
    return found


def parser(prog: str = "spillway serve",
           description: str = "Run a Spillway node. Without flags: a cluster of one on loopback.") -> argparse.ArgumentParser:
    """The flags of `spillway serve`, or of another command that takes them."""
    out = argparse.ArgumentParser(
        prog=prog, description=description,
        epilog="Every flag is also a variable SPILLWAY_<NAME> and a key of the TOML file; flags win, then variables.")
    out.add_argument("--config", metavar="FILE", help="a TOML file with any of these settings")
    for name, kind, default, doc in _fields():
        shown = ",".join(default) if isinstance(default, list) else default
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            out.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=f"{doc} (default: {shown})")
        else:
            out.add_argument(flag, metavar=getattr(kind, "__name__", str(kind)).upper(), help=f"{doc} (default: {shown})")
    return out


def _convert(source: str, name: str, value: Any) -> Any:
    """A setting from text or TOML, as its type; errors name where it came from."""
    kinds = {n: k for n, k, _, _ in _fields()}
    if name not in kinds:
        known = ", ".join(sorted(kinds))
        raise ConfigError(f"{source}: unknown setting {name!r}; known are {known}")
    kind = kinds[name]
    if kind == list[str] and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if kind is bool and isinstance(value, str):
        if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigError(f"{source}: {name} is {value!r}; say true or false")
        value = value.lower() in ("true", "1", "yes")
    try:
        return msgspec.convert(value, kind, strict=not isinstance(value, str))
    except (msgspec.ValidationError, UnicodeEncodeError) as e:  # bytes of a variable that are no text become surrogates
        raise ConfigError(f"{source}: {name} is {value!r}: {e}") from None


def load(argv: Sequence[str] = (), env: Mapping[str, str] | None = None) -> NodeConfig:
    """The settings from flags, variables and file. Raises ConfigError naming the setting and its source;
    argparse exits by itself on unknown flags and --help."""
    return settings(vars(parser().parse_args(list(argv))), env)


def settings(flags: dict[str, Any], env: Mapping[str, str] | None = None, defaults: Mapping[str, Any] | None = None) -> NodeConfig:
    """As `load`, of what a `parser` found; `defaults` are others than those of `serve`."""
    env = os.environ if env is None else env
    values: dict[str, Any] = dict(defaults or {})
    sources: dict[str, str] = {}

    def take(source: str, name: str, value: Any) -> None:
        values[name] = _convert(source, name, value)
        sources[name] = source

    path, asked = flags.pop("config"), "flag --config"
    if path is None:
        path, asked = env.get("SPILLWAY_CONFIG"), "variable SPILLWAY_CONFIG"
    if path:
        try:
            with Path(path).open("rb") as f:
                table = tomllib.load(f)
        except OSError as e:
            raise ConfigError(f"{asked}: {path} cannot be read: {e.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
            raise ConfigError(f"{asked}: {path} is not valid TOML: {e}") from None
        for name, value in table.items():
            take(f"file {path}", name, value)
    for name, *_ in _fields():
        if (text := env.get("SPILLWAY_" + name.upper())) is not None:
            take(f"variable SPILLWAY_{name.upper()}", name, text)
    for name, value in flags.items():
        if value is not None:
            take(f"flag --{name.replace('_', '-')}", name, value)
    try:
        return validate(NodeConfig(**values))
    except ConfigError as e:
        source = sources.get(str(e).partition(" ")[0])
        raise ConfigError(f"{source}: {e}" if source else str(e)) from None


def validate(config: NodeConfig) -> NodeConfig:
    """The same settings, checked against each other. Raises ConfigError; its first word is the setting."""
    for name in ("node_id", "cluster"):
        value = getattr(config, name)
        if not value or len(value) > 63 or not all(c.isalnum() or c in "-_." for c in value):
            raise ConfigError(f"{name} is {value!r}; use 1 to 63 letters, digits, '-', '_' or '.'")
    for name in ("listen", "peer_listen"):
        split_address(name, getattr(config, name))
    if config.probe_listen:
        split_address("probe_listen", config.probe_listen)
    if not 1 <= config.shards <= SHARDS_MAX:
        raise ConfigError(f"shards is {config.shards}; it must be 1 to {SHARDS_MAX}")
    if not 1 <= config.replicas <= 7:
        raise ConfigError(f"replicas is {config.replicas}; it must be 1 to 7")
    if config.feature_level_max and not features.LEVEL_MIN <= config.feature_level_max <= features.LEVEL_MAX:
        raise ConfigError(f"feature_level_max is {config.feature_level_max}; it must be 0, or {features.LEVEL_MIN} to {features.LEVEL_MAX}")
    if not 1 <= config.payload_bytes_max <= FRAME_BYTES_MAX // 2:
        raise ConfigError(f"payload_bytes_max is {config.payload_bytes_max}; it must be 1 to {FRAME_BYTES_MAX // 2}")
    if config.ingress_bytes_max < 1 << 20:
        raise ConfigError(f"ingress_bytes_max is {config.ingress_bytes_max}; it must be at least 1 MiB")
    if config.disk_free_bytes_min < 0:
        raise ConfigError(f"disk_free_bytes_min is {config.disk_free_bytes_min}; it must be at least 0")
    if config.snapshot_bytes_per_second < 1 << 20:
        raise ConfigError(f"snapshot_bytes_per_second is {config.snapshot_bytes_per_second}; it must be at least 1 MiB")
    if config.streams_max < 1:
        raise ConfigError(f"streams_max is {config.streams_max}; it must be at least 1")
    for name in ("connection_streams_max", "connection_messages_per_second", "connection_bytes_in_flight_max"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 0")
    if config.metrics_listen:
        split_address("metrics_listen", config.metrics_listen)
    if config.otlp_endpoint and not is_http(config.otlp_endpoint):
        raise ConfigError(f"otlp_endpoint is {config.otlp_endpoint!r}; write http://host:port or https://host:port")
    if not 0 <= config.trace_sample_ratio <= 1:
        raise ConfigError(f"trace_sample_ratio is {config.trace_sample_ratio}; it must be 0 to 1")
    if config.log_format not in FORMATS:
        raise ConfigError(f"log_format is {config.log_format!r}; say text or json")
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"log_level is {config.log_level!r}; say debug, info, warning or error")
    for address in config.join:
        split_address("join", address)
    if config.join and config.peers:
        raise ConfigError("join and peers are both set; a cluster is founded with peers, and later nodes join")
    if config.advertise and config.peers:
        raise ConfigError("advertise and peers are both set; peers has this node's addresses already")
    own = own_of(config)
    if config.join or config.advertise:
        for name, address in (("peer_listen", own.peer_address), ("listen", own.client_address)):
            if is_nowhere(address):
                raise ConfigError(f"{'advertise' if config.advertise else name} has {address}, where no other node reaches this one; say "
                                  "with advertise where they do: peerhost:port/clienthost:port")
    for name in ("zone", "host"):
        value = getattr(config, name)
        if len(value) > 63 or not all(c.isalnum() or c in "-_." for c in value):
            raise ConfigError(f"{name} is {value!r}; use up to 63 letters, digits, '-', '_' or '.'")
    if not 1 <= config.replace_after_seconds <= 30 * 86400:
        raise ConfigError(f"replace_after_seconds is {config.replace_after_seconds}; it must be 1 to {30 * 86400}")
    _validate_security(config)
    members = members_of(config)
    if config.peers and config.node_id not in members:
        raise ConfigError(f"peers does not name this node, {config.node_id!r}; it names {', '.join(sorted(members))}")
    if len(members) > NODES_MAX:
        raise ConfigError(f"peers names {len(members)} nodes; a cluster has up to {NODES_MAX}")
    return config


def _validate_security(config: NodeConfig) -> None:
    """Raises ConfigError for half of a pair, and for a node that everybody could use."""
    for names in (("tls_cert", "tls_key"), ("peer_tls_cert", "peer_tls_key", "peer_tls_ca")):
        given = [name for name in names if getattr(config, name)]
        if given and len(given) < len(names):
            missing = next(name for name in names if name not in given)
            raise ConfigError(f"{missing} is missing; {' and '.join(names)} belong together")
    if config.tls_client_ca and not config.tls_cert:
        raise ConfigError("tls_client_ca is set without tls_cert; clients' certificates need TLS")
    if config.auth not in ("none", "tokens"):
        raise ConfigError(f"auth is {config.auth!r}; say none or tokens")
    if config.admin_token_file and config.auth != "tokens":
        raise ConfigError("admin_token_file is set, and auth is 'none': nobody asks for tokens; say auth = tokens")
    given = [name for name in ("jwt_jwks_file", "jwt_issuer", "jwt_audience") if getattr(config, name)]
    if given and len(given) < 3:
        missing = next(name for name in ("jwt_jwks_file", "jwt_issuer", "jwt_audience") if name not in given)
        raise ConfigError(f"{missing} is missing; jwt_jwks_file, jwt_issuer and jwt_audience belong together")
    if given and config.auth != "tokens":
        raise ConfigError("jwt_jwks_file is set, and auth is 'none': nobody asks for tokens; say auth = tokens")
    if config.peer_tls_cert and not config.node_id.isascii():
        raise ConfigError(f"node_id is {config.node_id!r}; a certificate can only name it if it is ASCII")
    if config.allow_insecure:
        return
    host, _ = split_address("listen", config.listen)
    if not is_loopback(host):
        if not config.tls_cert:
            raise ConfigError(f"listen is {config.listen}, which other machines reach, without TLS: set tls_cert and tls_key, listen on "
                              "loopback, or say allow_insecure")
        if config.auth == "none" and not config.tls_client_ca:
            raise ConfigError(f"listen is {config.listen}, which other machines reach, and anybody may do anything there: set "
                              "auth = tokens, or tls_client_ca, or say allow_insecure")
    host, _ = split_address("peer_listen", config.peer_listen)
    if not is_loopback(host) and not config.peer_tls_cert:
        raise ConfigError(f"peer_listen is {config.peer_listen}, which other machines reach, without TLS: set peer_tls_cert, "
                          "peer_tls_key and peer_tls_ca, listen on loopback, or say allow_insecure")


def own_of(config: NodeConfig) -> Peer:
    """This node, where others reach it. Raises ConfigError."""
    if not config.advertise:
        return Peer(config.node_id, config.peer_listen, config.listen)
    peer, slash, client = config.advertise.partition("/")
    if not slash:
        raise ConfigError(f"advertise has {config.advertise!r}; write peerhost:port/clienthost:port")
    split_address("advertise", peer)
    split_address("advertise", client)
    return Peer(config.node_id, peer, client)


def members_of(config: NodeConfig) -> dict[str, Peer]:
    """All nodes that the cluster is founded with, by id; of one that joins, itself. Raises ConfigError for an entry of another form or
    a repeated id."""
    members: dict[str, Peer] = {}
    for entry in config.peers:
        node_id, equals, addresses = entry.partition("=")
        peer, slash, client = addresses.partition("/")
        if not (node_id and equals and slash):
            raise ConfigError(f"peers has {entry!r}; write id=peerhost:port/clienthost:port")
        split_address("peers", peer)
        split_address("peers", client)
        if node_id in members:
            raise ConfigError(f"peers names node {node_id!r} twice")
        members[node_id] = Peer(node_id, peer, client)
    return members or {config.node_id: own_of(config)}


def meta_founders(config: NodeConfig) -> list[str]:
    """Node ids that the meta group is founded with on this node; none on one that the group's leader takes in later: it joins, or there are
    more nodes than voters."""
    founders = sorted(members_of(config))[:VOTERS_MAX]
    return founders if config.node_id in founders and not config.join else []


def split_address(name: str, address: str) -> tuple[str, int]:
    """host and port of `host:port` or `[v6]:port`. Raises ConfigError naming the setting."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise ConfigError(f"{name} has {address!r}; write host:port")
    return host.strip("[]"), int(port)


def is_nowhere(address: str) -> bool:
    """Whether an address, valid as one to listen at, is none to be reached at from elsewhere."""
    host, port = split_address("address", address)
    try:
        return port == 0 or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
