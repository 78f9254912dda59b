# SPDX-License-Identifier: Apache-2.0
"""Addresses to bind and to dial, `host:port` or `[v6]:port`.

A listener without TLS that others can reach hands guest memory to whoever asks, so binding anything
but loopback needs `--tls-dir`, or the operator's explicit word (DESIGN 3.4, ADR 11).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from services.common.errors import InvalidArgumentError

INSECURE_FLAG = "--insecure-plaintext"
TLS_DIR_FLAG = "--tls-dir"
TLS_DIR_ENV = "GODWIT_TLS_DIR"
PORT_MAX = 65535

_HOST_PORT = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:\[\]\s/]+)):(?P<port>\d{1,5})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where somebody listens."""

    host: str
    """Numeric address, or a name where it is only dialled. No brackets."""
    port: int
    """0..65535; 0 only in what is to be bound: any free port."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach it. A name is not: it may resolve to anything."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return address.is_loopback


def parse_address(text: str) -> Address:
    """Read an address to dial.

    Raises:
        InvalidArgumentError: ADDRESS_INVALID.
    """
    match = _HOST_PORT.fullmatch(text)
    if not match or not 0 < int(match["port"]) <= PORT_MAX:
        raise InvalidArgumentError(
            "ADDRESS_INVALID",
            f"{text!r} is not an address",
            hint="write HOST:PORT with a port of 1..65535, for IPv6 [HOST]:PORT",
        )
    return Address(host=match["v6"] or match["host"], port=int(match["port"]))


def parse_listen(text: str, *, insecure_plaintext: bool = False, tls: bool = False) -> Address:
    """Read an address to bind; "localhost" is 127.0.0.1, any other name is refused.

    `tls`: TLS is spoken there, so that others may reach it.

    Raises:
        InvalidArgumentError: ADDRESS_INVALID; LISTEN_NOT_LOOPBACK without either.
    """
    match = _HOST_PORT.fullmatch(text)
    host = (match["v6"] or match["host"]) if match else ""
    host = "127.0.0.1" if host == "localhost" else host
    try:
        ipaddress.ip_address(host)
    except ValueError:
        host = ""
    if not match or not host or int(match["port"]) > PORT_MAX:
        raise InvalidArgumentError(
            "ADDRESS_INVALID",
            f"{text!r} cannot be bound",
            hint="write NUMERIC-HOST:PORT, e.g. 127.0.0.1:7443 or [::1]:0; port 0 takes a free one",
        )
    address = Address(host=host, port=int(match["port"]))
    if not address.is_loopback and not insecure_plaintext and not tls:
        raise InvalidArgumentError(
            "LISTEN_NOT_LOOPBACK",
            f"{address} can be reached from other machines, and this listener has no TLS",
            hint=f"bind 127.0.0.1, give {TLS_DIR_FLAG} DIR (`godwit certs` makes one), or"
            f" {INSECURE_FLAG} if the network itself is trusted",
        )
    return address
