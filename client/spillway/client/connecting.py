"""How the command line and the dispatcher reach a cluster: what flags, variables and contexts say, and the client made of it.

What wins, each option by itself: flags, the context named by `--context`, variables `SPILLWAY_<NAME>`, the context named by
`SPILLWAY_CONTEXT`, the selected context, the default. Of the selected context nothing is taken when an address is given: its token
is for its own cluster.
"""
from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from opentelemetry.trace import TracerProvider
    from spillway.client.client import Client
    from spillway.client.contexts import Contexts

ADDRESS = "127.0.0.1:7070"


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a cluster. None: not given."""

    address: tuple[str, ...] = (ADDRESS,)  # host:port of some nodes
    tls_ca: str | None = None  # path of a PEM file with the certificates that nodes are trusted by
    tls_cert: str | None = None  # path of a PEM file: the client's own certificate
    tls_key: str | None = None  # path of a PEM file: its key
    tls_server_name: str | None = None  # name that nodes' certificates must have, instead of the address's host
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None  # path of a file with the token


@dataclass(frozen=True, slots=True)
class Option:
    """One option, as flag, variable and key of a context."""

    metavar: str
    help: str
    path: bool = False  # it is the path of a file

    @staticmethod
    def flag(name: str) -> str:
        """"--tls-ca" of "tls_ca"."""
        return "--" + name.replace("_", "-")

    @staticmethod
    def variable(name: str) -> str:
        """"SPILLWAY_TLS_CA" of "tls_ca"."""
        return "SPILLWAY_" + name.upper()


OPTIONS = {
    "address": Option("HOST:PORT", "A node of the cluster; may be given several times."),
    "tls_ca": Option("FILE", "Certificates that nodes are trusted by (PEM); makes the connection TLS.", path=True),
    "tls_cert": Option("FILE", "This client's own certificate (PEM).", path=True),
    "tls_key": Option("FILE", "The key of that certificate (PEM).", path=True),
    "tls_server_name": Option("NAME", "Name that the nodes' certificates must have, if it is not the address's."),
    "token": Option("TOKEN", "Token; other users of this machine may see it: prefer a file."),
    "token_file": Option("FILE", "File with the token.", path=True),
}
assert list(OPTIONS) == [one.name for one in fields(Connection)]


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str], contexts: Contexts, context: str | None = None) -> Connection:
    """What all sources say together. `flags` has what the command line gave, by the names of OPTIONS; `context` is the value of
    `--context`. Raises ContextError for a context that does not exist, or a file of contexts that cannot be read."""
    given = {name: value for name, value in flags.items() if value}
    variables = {name: text for name in OPTIONS if (text := environment.get(Option.variable(name)))}
    sources: list[Mapping[str, Any]] = [given]
    if context:
        sources.append(contexts.get(context))
    sources.append(variables)
    if not context and (named := environment.get("SPILLWAY_CONTEXT")):
        sources.append(contexts.get(named))
    elif not context and not any("address" in source for source in sources):
        sources.append(contexts.current() or {})
    found: dict[str, Any] = {name: next((source[name] for source in sources if source.get(name)), None) for name in OPTIONS}
    # One of the two says it: a token of a stronger source is not outvoted by a file of a weaker one.
    for source in sources:
        if source.get("token") or source.get("token_file"):
            found |= {"token": source.get("token"), "token_file": source.get("token_file")}
            break
    found["address"] = addresses(found["address"]) or (ADDRESS,)
    return Connection(**found)


def addresses(value: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """Addresses one by one, of a list or of text with commas or spaces between them."""
    texts = [value] if isinstance(value, str) else value or ()
    return tuple(one for text in texts for one in text.replace(",", " ").split())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a connection, for a command that parses its arguments itself. They read no variables: `from_arguments` does."""
    for name, option in OPTIONS.items():
        parser.add_argument(Option.flag(name), metavar=option.metavar, action="append" if name == "address" else "store",
                            help=f"{option.help} Variable {Option.variable(name)}.")
    parser.add_argument("--context", metavar="NAME", help="Context that says how to reach the cluster. Variable SPILLWAY_CONTEXT.")


def from_arguments(found: argparse.Namespace) -> Connection:
    """What the arguments of `add_arguments` say, with variables and contexts. Raises ContextError."""
    from spillway.client.contexts import Contexts, default_path

    flags = {name: getattr(found, name) for name in OPTIONS}
    return resolve(flags, os.environ, Contexts(default_path(os.environ)), found.context)


def connect(connection: Connection, tracer_provider: TracerProvider | None = None) -> Client:
    """The client of a connection, to be used with `async with`. The only place where commands make one."""
    from spillway.client.client import Client
    from spillway.client.errors import InvalidArgument

    security = {name: value for name in OPTIONS if name != "address" and (value := getattr(connection, name)) is not None}
    for name in security.keys() - inspect.signature(Client).parameters:  # never left out silently: it is there for safety
        raise InvalidArgument(Option.flag(name), "this version of the client cannot do that; leave it out, or upgrade")
    return Client(list(connection.address), tracer_provider=tracer_provider, **security)
