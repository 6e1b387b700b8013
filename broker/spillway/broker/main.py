"""`spillway serve`, `dev`, `config` and `restore`: entry points of the broker."""
from __future__ import annotations

import asyncio
import gc
import resource
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
from spillway.broker.config import NodeConfig, load, parser, settings
from spillway.broker.errors import BrokerError
from spillway.broker.native_log import sort_out
from spillway.broker.restore import check, restore_into
from spillway.cluster.errors import ClusterError
from spillway.contract.backup import BackupInvalid, read_manifest
from spillway.contract.telemetry import logs

EXIT_CONFIG = 2  # a wrong setting: do not restart without changing it
DEV_SHARDS = 4  # enough to see that there are several
EXIT_DATA = 3  # the data directory or the disk: look before restarting


def allow_files() -> None:
    """Takes all descriptors that the system would give: connections must not leave the stores without any."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems have a limit beside it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(argv: list[str]) -> int:
    """Runs a node until SIGTERM or SIGINT. Returns the exit code."""
    try:
        config = load(argv)
    except BrokerError as error:
        print(f"spillway serve: {error}", file=sys.stderr)
        return EXIT_CONFIG
    return _run(config)


def dev(argv: list[str]) -> int:
    """Runs a node to try things with: as `serve`, but everything is in a temporary directory, which goes when it ends, unless one is
    given; few shards, and little in the log. Returns the exit code."""
    flags = parser("spillway dev", "Run a node to try things with: everything in a temporary directory, which goes when it ends, unless "
                   "--data-dir says where. Takes the settings of serve.")
    found = vars(flags.parse_args(argv))
    with tempfile.TemporaryDirectory(prefix="spillway-dev-") as directory:
        try:
            config = settings(found, defaults={"data_dir": directory, "shards": DEV_SHARDS, "replicas": 1, "log_level": "warning"})
        except BrokerError as error:
            print(f"spillway dev: {error}", file=sys.stderr)
            return EXIT_CONFIG
        if config.data_dir == directory:
            print("spillway dev: everything is temporary; --data-dir keeps it", file=sys.stderr)
        return _run(config)


def _run(config: NodeConfig) -> int:
    """Runs a node until SIGTERM or SIGINT. Returns the exit code."""
    if config.tls_cert or config.peer_tls_cert:
        sort_out()
    from spillway.broker.app import serve_until_stopped  # gRPC, which reads how much to say as it is loaded

    logs.configure(config.log_level, config.log_format, config.node_id)
    # Request-sized garbage dies by reference count, and full collections of millions of queue objects would stall the
    # loop: they are rare, and what is alive at start is never visited. Streams that end in an error leave cycles, in
    # grpcio, too: those of the middle generation are collected before they are many, and in a few milliseconds.
    gc.set_threshold(20_000, 10, 1000)
    allow_files()
    gc.freeze()
    try:
        import uvloop

        return uvloop.run(serve_until_stopped(config))
    except ImportError:
        return asyncio.run(serve_until_stopped(config))


def show_config(argv: list[str]) -> int:
    """Prints the settings that `serve` would take with the same arguments, as JSON."""
    try:
        config = load(argv)
    except BrokerError as error:
        print(f"spillway config: {error}", file=sys.stderr)
        return EXIT_CONFIG
    print(msgspec.json.format(msgspec.json.encode(config), indent=2).decode())
    return 0


def restore(argv: list[str]) -> int:
    """Makes the data directory of a new cluster's first node from a backup. Returns the exit code."""
    flags = parser("spillway restore", "Make the data directory of a new cluster's first node from a backup. Takes the settings of serve; "
                   "cluster, shards and replicas are the backup's unless you say otherwise, and shards must be.")
    flags.add_argument("backup", metavar="BACKUP", help="a directory that `spillway backup` made")
    found = vars(flags.parse_args(argv))
    backup = Path(found.pop("backup"))
    try:
        manifest = read_manifest(backup)
        config = settings(found, defaults={"cluster": manifest.cluster, "shards": manifest.shards, "replicas": manifest.replicas})
        check(config, manifest)
        path = restore_into(config, backup, manifest)
    except (BrokerError, BackupInvalid) as error:
        print(f"spillway restore: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except ClusterError as error:
        print(f"spillway restore: {error}", file=sys.stderr)
        return EXIT_DATA
    same = f"--cluster {config.cluster} --shards {config.shards} --replicas {config.replicas}"
    print(f"""restored: node {config.node_id} of cluster {config.cluster!r} in {path}
  from:   cluster {manifest.cluster!r} as of {manifest.begun.isoformat(" ", "seconds")} or later, {manifest.rows:,} rows
  start:  spillway serve --data-dir {path} --node-id {config.node_id} {same}
  others: spillway serve --join {config.peer_listen} {same}     (each with an id and an empty directory of its own)
  The cluster that was backed up must not run under this name any more.""")
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
