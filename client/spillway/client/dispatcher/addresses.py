"""Which addresses a request may go to: pure, a table and one function.

A URL is what somebody entered; without this rule it could make the dispatcher call what only the dispatcher's own
network reaches (server-side request forgery): its loopback, a database next door, a cloud's metadata service. The rule
is about numeric addresses, at the moment of connecting. Names say nothing: what they resolve to changes between a
check and its use (DNS rebinding).

Allowed is what the IANA registries of special-purpose addresses (RFC 6890 and its successors) call globally reachable
unicast. `ipaddress.is_global` is not used: what it says differs between patch releases of Python.
"""
from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

_SPECIAL_V4 = tuple((IPv4Network(network), name) for network, name in (
    ("0.0.0.0/32", "unspecified"),  # connects to this host
    ("0.0.0.0/8", "this network"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "shared (CGNAT)"),  # Alibaba Cloud's metadata service is in here
    ("127.0.0.0/8", "loopback"),
    ("168.63.129.16/32", "a metadata service"),  # Azure's, on a public address
    ("169.254.0.0/16", "link-local"),  # metadata services of most clouds
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "reserved"),  # Oracle Cloud's metadata service is in here
    ("192.0.2.0/24", "documentation"),
    ("192.88.99.0/24", "a 6to4 relay"),
    ("192.168.0.0/16", "private"),
    ("198.18.0.0/15", "benchmarking"),
    ("198.51.100.0/24", "documentation"),
    ("203.0.113.0/24", "documentation"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
))

# IPv6 networks whose addresses lead to an IPv4 address: it decides. With the number of bits behind it.
_EMBEDDING = (
    (IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped: the kernel connects to the IPv4 address
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64 with the well-known prefix (RFC 6052): how networks of IPv6 alone reach IPv4
    (IPv6Network("2002::/16"), 80),  # 6to4
)

_GLOBAL_V6 = IPv6Network("2000::/3")  # all that IANA has given out as global unicast
_SPECIAL_V6 = tuple((IPv6Network(network), name) for network, name in (
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    ("64:ff9b:1::/48", "a local NAT64 prefix"),  # where it leads is the network's own affair
    ("fc00::/7", "private"),  # metadata services of AWS (fd00:ec2::254) and Google (fd20:ce::254), too
    ("fe80::/10", "link-local"),
    ("fec0::/10", "private"),
    ("ff00::/8", "multicast"),
    ("2001::/23", "reserved"),  # Teredo, ORCHID, benchmarking
    ("2001:db8::/32", "documentation"),
    ("3fff::/20", "documentation"),
))


class AddressForbidden(OSError):
    """Requests may not go to this address; the message says why, for people."""


def special(address: str) -> str | None:
    """What kind of address this is, if requests may go there only with `allow_private_addresses`; None for a public one.

    Args:
        address: a numeric IPv4 or IPv6 address as the socket library writes it, with or without a scope; anything else
            is "no address".
    """
    try:
        found = ip_address(address)
    except ValueError:
        return "no address"
    return _special_v4(found) if isinstance(found, IPv4Address) else _special_v6(found)


def _special_v4(address: IPv4Address) -> str | None:
    return next((name for network, name in _SPECIAL_V4 if address in network), None)


def _special_v6(address: IPv6Address) -> str | None:
    for network, bits in _EMBEDDING:
        if address in network:
            return _special_v4(IPv4Address(int(address) >> bits & 0xFFFFFFFF))
    for network, name in _SPECIAL_V6:
        if address in network:
            return name
    return None if address in _GLOBAL_V6 else "reserved"


def check_public(address: str, port: int) -> None:
    """An `AddressCheck` (see `sender`) that lets public addresses through. Raises AddressForbidden."""
    kind = special(address)
    if kind is not None:
        raise AddressForbidden(f"{address} is {kind}")
