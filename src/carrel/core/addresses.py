"""Addresses for guests: ranges as a site writes them, and which of a new guest's addresses is its own."""

import ipaddress
from collections.abc import Collection, Iterable, Sequence

from carrel.errors import CarrelError

POOL_MAX = 2**16
"""Addresses of a pool: more is a mistyped prefix."""


def expand(ranges: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses of ranges, each once, in the order given.

    Args:
        ranges: ``10.0.0.5``, ``10.0.0.10-10.0.0.20``, or ``10.0.1.0/24`` without its network and broadcast address.

    Raises:
        CarrelError: one is no range, or there are too many addresses.

    >>> expand(["10.0.0.9-10.0.0.10", "10.0.1.0/30"])
    ('10.0.0.9', '10.0.0.10', '10.0.1.1', '10.0.1.2')
    """
    found: dict[str, None] = {}
    for text in ranges:
        try:
            addresses = _range(text)
        except ValueError as error:
            raise CarrelError(
                f"{text!r} is no range of addresses: {error}; give 10.0.0.10-10.0.0.20 or 10.0.1.0/24"
            ) from error
        for address in addresses:
            found[str(address)] = None
    return tuple(found)


def guest_address(seen: Iterable[str], *, parents: Collection[str]) -> str | None:
    """Return the address that a guest got, out of those seen on it; None: wait, it has none of its own yet.

    A clone that goes on from a running parent still has the parent's address until its own lease comes; whoever is
    told that one reaches the parent, or another clone.
    """
    for text in seen:
        try:
            address = ipaddress.ip_address(text.partition("/")[0])
        except ValueError:
            continue
        usable = address.version == 4 and not (address.is_loopback or address.is_link_local or address.is_unspecified)
        if usable and str(address) not in parents:
            return str(address)
    return None


def _range(text: str) -> Sequence[ipaddress.IPv4Address]:
    if "/" in text:
        network = ipaddress.IPv4Network(text)
        _check_size(network.num_addresses)
        return list(network.hosts())
    first, _, last = (part.strip() for part in text.partition("-"))
    begin, end = int(ipaddress.IPv4Address(first)), int(ipaddress.IPv4Address(last or first))
    if end < begin:
        raise ValueError("its end comes before its beginning")
    _check_size(end - begin + 1)
    return [ipaddress.IPv4Address(number) for number in range(begin, end + 1)]


def _check_size(addresses: int) -> None:
    if addresses > POOL_MAX:
        raise ValueError(f"it has {addresses} addresses, and a pool has {POOL_MAX} at most")
