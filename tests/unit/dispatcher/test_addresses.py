"""Which addresses are public: a table of both kinds, in every guise that leads to the same place."""
from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spillway.client.dispatcher.addresses import AddressForbidden, check_public, special

SPECIAL_V4 = [
    ("0.0.0.0", "unspecified"), ("0.1.2.3", "this network"), ("10.0.0.0", "private"), ("10.255.255.255", "private"),
    ("100.64.0.1", "shared (CGNAT)"), ("100.100.100.200", "shared (CGNAT)"), ("100.127.255.255", "shared (CGNAT)"),
    ("127.0.0.1", "loopback"), ("127.1.2.3", "loopback"), ("168.63.129.16", "a metadata service"),
    ("169.254.0.1", "link-local"), ("169.254.169.254", "link-local"), ("172.16.0.1", "private"),
    ("172.31.255.255", "private"), ("192.0.0.192", "reserved"), ("192.0.2.1", "documentation"),
    ("192.88.99.1", "a 6to4 relay"), ("192.168.1.1", "private"), ("198.18.0.1", "benchmarking"),
    ("198.19.255.255", "benchmarking"), ("198.51.100.1", "documentation"), ("203.0.113.1", "documentation"),
    ("224.0.0.1", "multicast"), ("239.255.255.255", "multicast"), ("240.0.0.1", "reserved"), ("255.255.255.255", "reserved"),
]
PUBLIC_V4 = ["1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255",
             "128.0.0.0", "168.63.129.15", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0",
             "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255"]


def guises(address: str) -> list[str]:
    """IPv6 addresses that lead to an IPv4 address."""
    number = int(IPv4Address(address))
    return [f"::ffff:{address}", str(IPv6Address(0xFFFF << 32 | number)), str(IPv6Address((0x64FF9B << 96) | number)),
            str(IPv6Address(0x2002 << 112 | number << 80)), str(IPv6Address(0x2002 << 112 | number << 80 | 0xFFFF))]


@pytest.mark.parametrize(("address", "kind"), SPECIAL_V4)
def test_special_ipv4(address: str, kind: str) -> None:
    """Addresses that are not public are none in IPv6 clothes, either."""
    assert special(address) == kind
    assert [special(guise) for guise in guises(address)] == [kind] * 5
    with pytest.raises(AddressForbidden, match=address):
        check_public(address, 80)


@pytest.mark.parametrize("address", PUBLIC_V4)
def test_public_ipv4(address: str) -> None:
    """The neighbours of special networks are public, also by way of NAT64, on which networks of IPv6 alone depend."""
    assert special(address) is None
    assert [special(guise) for guise in guises(address)] == [None] * 5
    check_public(address, 80)


@pytest.mark.parametrize(("address", "kind"), [
    ("::", "unspecified"), ("::1", "loopback"), ("0:0:0:0:0:0:0:1", "loopback"), ("::127.0.0.1", "reserved"),
    ("::2", "reserved"), ("::ffff:0:127.0.0.1", "reserved"), ("64:ff9b:1::7f00:1", "a local NAT64 prefix"),
    ("100::1", "reserved"), ("fc00::1", "private"), ("fd00:ec2::254", "private"), ("fd20:ce::254", "private"),
    ("fe80::1", "link-local"), ("fe80::1%eth0", "link-local"), ("fe80::1%2", "link-local"), ("febf::1", "link-local"),
    ("fec0::1", "private"), ("ff02::1", "multicast"), ("ff0e::1", "multicast"), ("2001::7f00:1", "reserved"),
    ("2001:db8::1", "documentation"), ("3fff::1", "documentation"), ("5f00::1", "reserved"), ("4000::1", "reserved"),
    ("::ffff:127.0.0.1%1", "loopback"), ("1fff:ffff::1", "reserved"),
])
def test_special_ipv6(address: str, kind: str) -> None:
    """Nothing in IPv6 is public but what IANA has given out."""
    assert special(address) == kind


@pytest.mark.parametrize("address", ["2000::1", "2606:4700:4700::1111", "2a00:1450:4001::200e", "2001:200::1",
                                     "2001:4860:4860::8888", "3ffe:ffff::1", "2003::1"])
def test_public_ipv6(address: str) -> None:
    """Global unicast is."""
    assert special(address) is None


@pytest.mark.parametrize("text", ["", "localhost", "127.1", "0177.0.0.1", "0x7f.0.0.1", "2130706433", "1.2.3.4.5", "8.8.8.8 ",
                                  "[::1]", "::1::", "8.8.8.08"])
def test_no_address(text: str) -> None:
    """What is not an address in its one plain form is not let through."""
    assert special(text) == "no address"


@given(st.one_of(st.ip_addresses().map(str), st.text(max_size=50)))
def test_always_a_verdict(text: str) -> None:
    """The rule never fails, and what it lets through, Python's own tables never call loopback, private or the like."""
    if special(text) is None:
        address = IPv6Address(text) if ":" in text else IPv4Address(text)
        assert not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified)
        if isinstance(address, IPv4Address):
            assert not address.is_private
